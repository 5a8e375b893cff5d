"""Bias correction: the means that it promises, and what it leaves alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import zoo
from toolchain.activations import TorchModel
from toolchain.bias_correction import SAMPLES, correct_biases
from toolchain.config import Config
from toolchain.importing import cut_blocks
from toolchain.pipeline import quantize
from toolchain.quant_table import QuantTable
from toolchain.simulation import simulated_values
from toolchain.source import SourceModel, infer_types


def shifts(source: SourceModel, is_corrected: bool, target: str = "ort-cpu") -> list[float]:
    """How far the rounded weights of each layer, all else in float, move the mean of its channels; the largest, in steps of the bias."""
    samples = zoo.images(SAMPLES)
    table = quantize(source, samples, Config(algorithm="mse", device="cpu", bias_correction=is_corrected, target=target)).table
    floats = simulated_values(source, QuantTable(), samples)
    found = []
    for node in source.graph.weighted:
        weight, bias = source.graph.weight(node), source.graph.bias(node)
        assert weight is not None
        assert bias is not None
        values = simulated_values(source, QuantTable({weight: table[weight], bias: table[bias]}), samples)
        moved = channel_means(values[node.outputs[0]]) - channel_means(floats[node.outputs[0]])
        found.append(float((np.abs(moved) / table[bias].scale).max()))
    return found


def channel_means(array: np.ndarray) -> np.ndarray:
    return array.mean(axis=tuple(axis for axis in range(array.ndim) if axis != 1), dtype=np.float64)


@pytest.mark.parametrize(("batch", "target"), [("N", "ort-cpu"), (4, "ort-cpu"), ("N", "openvino")])
def test_means_are_those_of_the_float_model(batch: int | str, target: str, tmp_path: Path) -> None:
    source = zoo.loaded(zoo.tiny_resnet(batch=batch), tmp_path)
    # What is left is the rounding of the bias to its int32 grid; the margin is that of float32 means.
    assert max(shifts(source, True, target)) <= 0.5 + 1e-3
    assert max(shifts(source, False, target)) > 1.0


def test_only_biases_change(tmp_path: Path) -> None:
    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(32)
    config = Config(algorithm="mse", device="cpu", bias_correction=False)
    found = quantize(source, samples, config)
    types = infer_types(source, samples.shapes, samples.inputs)
    model = TorchModel.of(source, types, cut_blocks(source, types, {}, config), torch.device("cpu"))
    table = correct_biases(model, found.placement, found.table, samples)
    changed = {name for name in table if table[name] is not found.table[name]}
    assert changed == set(found.placement.biases)
    assert all(np.array_equal(table[name].scale, found.table[name].scale) for name in changed)


def test_learned_models_are_left_alone(tmp_path: Path) -> None:
    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(32)
    tables = [
        quantize(source, samples, Config(algorithm="brecq", device="cpu", iterations=5, bias_correction=on)).table for on in (True, False)
    ]
    for name, grid in tables[0].tensors.items():
        other = tables[1][name].codes
        assert grid.codes is None if other is None else np.array_equal(grid.codes, other)  # pyright: ignore[reportArgumentType]
