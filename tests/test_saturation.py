"""Weights of 8 bits that x86 CPUs without VNNI multiply exactly: their kernels are imitated, pair by pair, in 16 bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import zoo
from toolchain.calibration import calibrate_weight
from toolchain.config import Config
from toolchain.pipeline import quantize
from toolchain.quant_table import QuantSpec, TensorQuant, weight_spec
from toolchain.quant_table import quantize as encode
from toolchain.saturation import MOST, fitted, settled, summed_axes


def vpmaddubsw(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums of products of bytes [..., K], neighbours added in 16 bits with saturation, as CPUs without VNNI do."""
    odd = activations.shape[-1] % 2
    a, w = (np.pad(array.astype(np.int32), [(0, 0)] * (array.ndim - 1) + [(0, odd)]) for array in (activations, weights))
    pairs = a[..., 0::2] * w[..., 0::2] + a[..., 1::2] * w[..., 1::2]
    return np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum(axis=-1)


def worst_inputs(rows: np.ndarray) -> np.ndarray:
    """Activations [2, C, K] that bring the sums of rows of weights [C, K] as far up, and as far down, as they get."""
    return np.stack([np.where(rows > 0, 255, 0), np.where(rows < 0, 255, 0)])


def rows_of(codes: np.ndarray, kind: str, channel_axis: int) -> np.ndarray:
    """What an integer kernel sums up for each output channel, in its order: channels last."""
    if kind == "Conv":
        return np.moveaxis(codes, 1, -1).reshape(len(codes), -1)
    return np.moveaxis(codes, channel_axis, 0).reshape(codes.shape[channel_axis], -1)


CASES = [("Conv", (4, 3, 3, 3), 0), ("Conv", (4, 6, 1, 1), 0), ("Conv", (4, 2, 5), 0), ("Gemm", (5, 7), 0), ("MatMul", (7, 5), 1)]


@pytest.mark.parametrize(("kind", "shape", "channel_axis"), CASES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_fitted_weights_do_not_saturate(kind: str, shape: tuple[int, ...], channel_axis: int, per_channel: bool) -> None:
    for seed in range(20):
        weight = np.random.default_rng(seed).standard_t(3, size=shape).astype(np.float32)
        spec = weight_spec(8, channel_axis if per_channel else None, symmetric=True)
        plain = calibrate_weight(weight, spec, "minmax", 100.0)
        summed = summed_axes(kind, shape, channel_axis)
        grid = fitted(weight, TensorQuant(replace(spec, summed=summed), plain.scale, plain.zero_point))
        assert (np.asarray(grid.scale) >= plain.scale).all()
        assert (np.asarray(grid.scale) <= 2.02 * plain.scale).all()  # 7 bits are 127 / 63 = 2.016 times as coarse
        rows = rows_of(encode(weight, grid), kind, channel_axis)
        for inputs in worst_inputs(rows):
            np.testing.assert_array_equal(vpmaddubsw(inputs, rows), (inputs.astype(np.int32) * rows).sum(axis=-1))


def test_without_the_fit_they_do() -> None:
    rows = np.full((1, 4), 127)
    inputs = worst_inputs(rows)[0]
    assert vpmaddubsw(inputs, rows) < (inputs * rows).sum()


@given(
    codes=hnp.arrays(np.int8, st.sampled_from([(4, 3, 3, 3), (2, 5, 1, 1), (3, 1, 2, 2)]), elements=st.integers(-127, 127)),
)
def test_settled_codes_do_not_saturate(codes: np.ndarray) -> None:
    """Only pairs that would are changed; both towards zero, by half of what is too much."""
    summed = (2, 3, 1)
    grid = TensorQuant(
        QuantSpec(8, signed=True, symmetric=True, axis=0, narrow=True, summed=summed), np.ones(len(codes)), np.zeros(1), codes
    )
    found = settled(grid).codes
    assert found is not None
    before, after = (rows_of(array.astype(np.int32), "Conv", 0) for array in (codes, found))
    for inputs in worst_inputs(after):
        np.testing.assert_array_equal(vpmaddubsw(inputs, after), (inputs.astype(np.int32) * after).sum(axis=-1))
    assert (np.abs(after) <= np.abs(before)).all()
    assert (after * before >= 0).all()
    if before.shape[1] % 2:
        before, after = (np.pad(rows, ((0, 0), (0, 1))) for rows in (before, after))
    first, second = before[:, 0::2], before[:, 1::2]
    is_fine = (first * second <= 0) | (np.abs(first + second) <= MOST)
    np.testing.assert_array_equal((after == before).reshape(len(before), -1, 2).all(axis=-1), is_fine)
    again = settled(settled(grid)).codes
    np.testing.assert_array_equal(found, again)


def test_which_layers_need_it() -> None:
    assert summed_axes("Conv", (8, 1, 3, 3), 0) is None  # depthwise: products of 32 bits
    assert summed_axes("Conv", (1, 1, 3, 3), 0) == (2, 3, 1)
    assert summed_axes("Conv", (8, 2, 3, 3), 0) == (2, 3, 1)
    assert summed_axes("ConvTranspose", (8, 2, 3, 3), 1) is None
    assert summed_axes("MatMul", (2, 7, 5), 2) == (1,)


@pytest.mark.parametrize("options", [{"algorithm": "mse"}, {"algorithm": "qdrop", "iterations": 30}, {"algorithm": "lapq"}])
def test_no_layer_of_a_quantized_model_saturates(options: dict[str, Any], tmp_path: Path) -> None:
    source = zoo.loaded(zoo.every_rule(), tmp_path)
    table = quantize(source, zoo.images(16), Config(**options, weight_bits=8, activation_bits=8, device="cpu")).table
    paired = 0
    for node in source.graph.weighted:
        weight = source.graph.weight(node)
        if weight is None or weight not in table or table[weight].spec.summed is None:
            continue
        codes = table[weight].codes
        assert codes is not None
        assert table[weight].spec.bits == 8
        paired += 1
        rows = rows_of(codes.astype(np.int32), node.op_type, source.channel_axis(node))
        for inputs in worst_inputs(rows):
            np.testing.assert_array_equal(vpmaddubsw(inputs, rows), (inputs * rows).sum(axis=-1))
    assert paired > 3


def test_other_runtimes_and_zero_points_have_7_bits(tmp_path: Path) -> None:
    source = zoo.loaded(zoo.tiny_resnet(), tmp_path)
    cases: list[dict[str, Any]] = [{"target": "openvino"}, {"target": "portable"}, {"weight_scheme": "asymmetric"}]
    for options in cases:
        config = Config(**options, algorithm="minmax", weight_bits=8, activation_bits=8, device="cpu")
        table = quantize(source, zoo.images(8), config).table
        assert {grid.spec.bits for grid in table.tensors.values() if grid.codes is not None} - {32} == {7}
        assert "weights of 7 bits" in config.precision.convention
    assert "no pair of products saturates" in Config(weight_bits=8, activation_bits=8).precision.convention
