"""Ranges and grids: the laws of the histogram, the optimality of MSE, and what must never come out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnxruntime.quantization.quant_utils import QuantType, compute_data_quant_params, compute_scale_zp, quantize_nparray

from toolchain import calibration
from toolchain.calibration import Histogram, calibrate_activation, calibrate_bias, calibrate_weight, fit_bias, grid
from toolchain.quant_table import BIAS_BITS, QuantSpec, TensorQuant, activation_spec, dequantize, quantize, weight_spec

# Denormals underflow when they are scaled to a coarser bin, and may land on the other side of zero.
FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
ARRAYS = hnp.arrays(np.float32, st.integers(1, 60), elements=FLOATS)


def error(x: np.ndarray, found: TensorQuant) -> float:
    """The L2.4 norm that the search minimises."""
    return float((np.abs(dequantize(quantize(x, found), found) - x).astype(np.float64) ** 2.4).sum())


@given(ARRAYS, ARRAYS)
@settings(deadline=None)
def test_merging_histograms_is_exact(a: np.ndarray, b: np.ndarray) -> None:
    merged = Histogram.of(torch.from_numpy(a)).merged(Histogram.of(torch.from_numpy(b)))
    whole = Histogram.of(torch.from_numpy(np.concatenate([a, b])))
    assert (merged.low, merged.high, merged.exponent) == (whole.low, whole.high, whole.exponent)
    assert np.array_equal(merged.counts, whole.counts)
    assert merged.counts.sum() == a.size + b.size


@given(ARRAYS)
@settings(deadline=None)
def test_histogram_resolves_the_range(x: np.ndarray) -> None:
    histogram = Histogram.of(torch.from_numpy(x))
    values, counts = histogram.values()
    assert histogram.low == x.min()
    assert histogram.high == x.max()
    assert counts.sum() == x.size
    width = 2.0**histogram.exponent
    assert width <= max(np.abs(x).max(), 1e-12) / 4096
    assert np.abs(np.sort(x) - np.repeat(values, counts)).max() <= width  # every value within its bin


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_mse_is_no_worse_than_minmax(bits: int, symmetric: bool, shift: float) -> None:
    x = (np.random.default_rng(bits).standard_t(3, 20000) + shift).astype(np.float32)
    spec = activation_spec(bits, symmetric)
    histogram = Histogram.of(torch.from_numpy(x))
    minmax, mse = (calibrate_activation(histogram, spec, method, 99.99) for method in ("minmax", "mse"))
    assert error(x, mse) <= error(x, minmax) * 1.001  # the search sees bins of 1/8192 of the range, not the values themselves
    if bits <= 4:
        assert error(x, mse) < 0.7 * error(x, minmax)


def test_mse_search_is_near_the_exhaustive_optimum() -> None:
    x = np.maximum(np.random.default_rng(0).normal(size=5000), 0).astype(np.float32)
    spec = activation_spec(4, False)
    found = calibrate_activation(Histogram.of(torch.from_numpy(x)), spec, "mse", 99.99)
    ends = np.linspace(0.1, float(x.max()), 2000)
    best = min(error(x, TensorQuant(spec, *(p[0] for p in grid(np.zeros(1), np.array([end]), spec)))) for end in ends)
    assert error(x, found) <= 1.02 * best


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_grids_are_per_channel_in_the_weights_own_layout(axis: int, symmetric: bool) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 5, 3, 3)).astype(np.float32) * np.arange(1, 7).reshape(-1, 1, 1, 1)
    spec = weight_spec(4, axis, symmetric)
    found = calibrate_weight(weight, spec, "mse", 99.99)
    assert found.scale.shape == found.zero_point.shape == (weight.shape[axis],)
    for channel in range(weight.shape[axis]):
        row = np.take(weight, channel, axis)
        alone = calibrate_weight(row.reshape(1, -1), weight_spec(4, 0, symmetric), "mse", 99.99)
        assert np.atleast_1d(alone.scale)[0] == np.atleast_1d(found.scale)[channel]


def _best_of_all_candidates(row: np.ndarray, spec: QuantSpec) -> tuple[float, float]:
    """The least error over every candidate, and that of the scale that was found: with the arithmetic of the reference, in doubles."""
    ends = [row.min(keepdims=True) * f for f in np.arange(1, 101) / 100], [row.max(keepdims=True) * f for f in np.arange(1, 101) / 100]
    grids = [TensorQuant(spec, *(p[0] for p in grid(low, high, spec))) for low, high in zip(*ends, strict=True)]
    return min(error(row, found) for found in grids), error(row, calibrate_weight(row, spec, "mse", 99.99))


@given(
    hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-4, 4, width=16)),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([7, 64, 1 << 16]),
)
@settings(deadline=None, max_examples=60)
def test_the_weight_search_stops_early_only_where_nothing_better_follows(row: np.ndarray, bits: int, symmetric: bool, tile: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_TILE", tile)  # so that rows are cut into pieces, and searched in groups
        best, found = _best_of_all_candidates(row, weight_spec(bits, None, symmetric))
    assert found <= best * (1 + 1e-4) + 1e-12  # the search adds up float32 errors


def test_the_grid_is_the_one_that_was_judged() -> None:
    """[-1, 1] times some factor puts the zero point on a tie, which a factor of fewer digits breaks otherwise."""
    best, found = _best_of_all_candidates(np.array([-1, 1, 1], np.float32), weight_spec(2, None, False))
    assert found == pytest.approx(best, rel=1e-6)  # float32 errors


def test_rows_are_searched_alike_alone_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_t(3, (40, 30)).astype(np.float32)
    weight[3], weight[7] = 0.0, 0.25
    spec = weight_spec(4, 0, True)
    found = calibrate_weight(weight, spec, "mse", 99.99).scale
    for tile in (1, 100):  # a value at a time; three rows at a time
        monkeypatch.setattr(calibration, "_TILE", tile)
        assert np.array_equal(calibrate_weight(weight, spec, "mse", 99.99).scale, found)


def test_percentile_cuts_the_tails() -> None:
    x = np.concatenate([np.linspace(0, 1, 9999), [50.0]]).astype(np.float32)
    found = calibrate_activation(Histogram.of(torch.from_numpy(x)), activation_spec(8, False), "percentile", 99.9)
    assert float(found.scale) * 255 == pytest.approx(0.999, abs=50 / 4096)  # one bin of the whole range


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-(2.0**100), 2.0**100, width=32), st.integers(2, 8), st.booleans())
def test_scales_are_normal_positive_floats_and_zero_is_on_the_grid(a: float, b: float, bits: int, symmetric: bool) -> None:
    spec = activation_spec(bits, symmetric)
    scale, zero_point = grid(np.array([min(a, b)]), np.array([max(a, b)]), spec)
    assert np.isfinite(scale[0])
    assert scale[0] >= np.finfo(np.float32).tiny
    assert spec.qmin <= zero_point[0] <= spec.qmax


def test_dead_channels_and_constant_activations() -> None:
    weight = np.zeros((3, 4), np.float32)
    weight[1] = [1, -2, 3, 4]
    weight[2] = 1e-30
    found = calibrate_weight(weight, weight_spec(4, 0, True), "mse", 99.99)
    bias = np.array([0.5, 0.5, -1e4], np.float32)
    fitted = fit_bias(found, bias, np.float32(0.1))
    codes = calibrate_bias(bias, fitted, np.float32(0.1), BIAS_BITS)
    assert np.isfinite(fitted.scale).all()
    assert np.abs(codes.dequantized() / bias - 1).max() < 1e-2
    assert codes.codes is not None
    assert np.abs(codes.codes).max() <= 1 << 22
    assert np.atleast_1d(fitted.scale)[1] == np.atleast_1d(found.scale)[1]  # a living channel is left alone
    for constant in (0.0, 3.0):
        flat = calibrate_activation(Histogram.of(torch.full((8,), constant)), activation_spec(4, False), "mse", 99.99)
        assert dequantize(quantize(np.array([constant], np.float32), flat), flat)[0] == pytest.approx(constant, rel=1e-6)


def test_biases_round_to_the_accumulators_grid() -> None:
    weight = TensorQuant(weight_spec(4, 0, True), np.array([0.5, 0.25], np.float32), np.zeros(2, np.int32))
    bias = calibrate_bias(np.array([1.0, -0.3], np.float32), weight, np.float32(0.1), BIAS_BITS)
    assert bias.codes is not None
    assert bias.codes.tolist() == [20, -12]
    assert np.array_equal(bias.scale, np.array([0.5, 0.25], np.float32) * np.float32(0.1))


@given(ARRAYS)
def test_8_bit_activation_codes_are_those_of_onnxruntime(x: np.ndarray) -> None:
    """The same range gives the same scale, zero point and codes as `onnxruntime.quantization`."""
    spec = activation_spec(8, False)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if high - low < 1e-6:
        return  # a constant zero: ONNX Runtime takes scale 1, this project a range of 1
    scale, zero_point = grid(np.array([low]), np.array([high]), spec)
    theirs_zero_point, theirs_scale = compute_scale_zp(np.float32(low), np.float32(high), np.uint8(0), np.uint8(255))
    assert np.float32(theirs_scale) == pytest.approx(scale[0], rel=1e-6)
    assert abs(int(theirs_zero_point) - int(zero_point[0])) <= 1  # their scale is float32 before the division, ours after


def test_8_bit_weight_codes_are_those_of_onnxruntime() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)
    found = calibrate_weight(weight, weight_spec(8, 0, True), "minmax", 99.99)
    for channel in range(4):
        zero_point, scale = compute_data_quant_params(weight[channel], QuantType.QInt8.tensor_type, symmetric=True)
        codes = quantize_nparray(QuantType.QInt8.tensor_type, weight[channel], scale, zero_point)
        assert np.atleast_1d(found.scale)[channel] == np.float32(scale)
        assert np.array_equal(quantize(weight, found)[channel], np.asarray(codes, np.int32).reshape(-1))
