"""AdaQuant: its objective falls at every layer, and weights, steps and biases all take part."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import zoo
from toolchain.config import Config
from toolchain.pipeline import Quantized, quantize
from toolchain.quant_table import TensorQuant
from toolchain.quant_table import quantize as encode


def run(folder: Path, **options: Any) -> tuple[Quantized, dict[str, np.ndarray]]:
    source = zoo.loaded(zoo.tiny_resnet(), folder)
    settings: dict[str, Any] = {"weight_bits": 3, "activation_bits": 3, "iterations": 100, "device": "cpu", **options}
    return quantize(source, zoo.images(64), Config(algorithm="adaquant", **settings)), dict(source.constants)


@pytest.mark.parametrize("target", ["ort-cpu", "academic"])
def test_it_beats_min_max_at_every_layer(target: str, tmp_path: Path) -> None:
    found, _ = run(tmp_path, target=target, iterations=60, weight_range="minmax", activation_range="minmax")
    inner = found.results[1:-1]  # the edges have 8 bits: little is left to gain
    assert len(inner) == 5
    assert all(result.loss_after < result.loss_before for result in inner)
    assert sum(result.loss_after for result in inner) < 0.8 * sum(result.loss_before for result in inner)


def test_weights_steps_and_biases_all_move(tmp_path: Path) -> None:
    found, constants = run(tmp_path, iterations=60)
    plain, _ = run(tmp_path, iterations=1, weight_lr=0.0, activation_lr=0.0)
    inner = [name for name in found.placement.weights if found.table[name].spec.bits == 3]
    learned = {name for result in found.results if result.kept == "learned" for name in result.changes}
    inner = [name for name in inner if name in learned]
    assert len(inner) >= 4  # of 5
    assert any(np.abs(encode(constants[name], found.table[name]) - codes(found.table[name])).max() >= 2 for name in inner)
    assert all(not np.array_equal(found.table[name].scale, plain.table[name].scale) for name in inner)
    activations = [name for name, spec in found.placement.activations.items() if spec.bits == 3 and name in learned]
    assert len(activations) >= 3  # of 4
    assert all(found.table[name].scale != plain.table[name].scale for name in activations)
    biases = [name for name, bias in found.placement.biases.items() if bias.weight in inner]
    assert any(not np.array_equal(codes(found.table[name]), encode(constants[name], found.table[name])) for name in biases)


def test_without_rates_nothing_changes(tmp_path: Path) -> None:
    found, constants = run(tmp_path, iterations=3, weight_lr=0.0, activation_lr=0.0)
    for name in found.placement.weights:
        assert np.array_equal(codes(found.table[name]), encode(constants[name], found.table[name]))
    assert {result.kept for result in found.results} == {"initial"}


def test_same_seed_same_codes(tmp_path: Path) -> None:
    one, two, other = (run(tmp_path, iterations=20, seed=seed)[0].table for seed in (1, 1, 2))
    weights = [name for name in one if one[name].codes is not None]
    assert all(np.array_equal(codes(one[name]), codes(two[name])) for name in weights)
    assert not all(np.array_equal(codes(one[name]), codes(other[name])) for name in weights)


def codes(grid: TensorQuant) -> np.ndarray:
    assert grid.codes is not None
    return grid.codes
