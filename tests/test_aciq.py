"""ACIQ: the analytic clipping against integrals and samples, the bits of channels, and the moments that it keeps."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolchain.baselines import aciq
from toolchain.calibration import Histogram, calibrate_activation, calibrate_weight
from toolchain.quant_table import QuantSpec, TensorQuant, activation_spec, dequantize, quantize, weight_spec

# The authors' tables (2 to 8 bits), to the digits they print; their Gaussian ones were found on a coarser search.
PUBLISHED = {
    "laplace": [2.83068299, 3.89722946, 5.02864014, 6.20476633, 7.41312622, 8.64561995, 9.89675982],
    "gauss": [1.71063519, 2.15159277, 2.55913646, 2.93620062, 3.28691474, 3.6151146, 3.92403714],
}


def expected_error(prior: str, alpha: float, bits: int) -> float:
    """E[(x - Q(x))^2] by quadrature: the noise of uniform levels, and both tails (Eq. 2 to 5 of the paper)."""
    x = np.linspace(alpha, alpha + 60.0, 400_001)
    density = 0.5 * np.exp(-x) if prior == "laplace" else np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    tail = 2 * np.trapezoid((x - alpha) ** 2 * density, x)
    return float(tail + alpha**2 / (3 * 4.0**bits))


@pytest.mark.parametrize("prior", aciq.PRIORS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_alpha_minimises_the_expected_error(prior: str, bits: int) -> None:
    alpha = aciq.clipping(bits, prior)
    assert alpha == pytest.approx(PUBLISHED[prior][bits - 2], abs=1e-4)
    around = np.linspace(0.8 * alpha, 1.2 * alpha, 81)
    errors = [expected_error(prior, a, bits) for a in around]
    assert around[int(np.argmin(errors))] == pytest.approx(alpha, abs=around[1] - around[0])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("behind_relu", [False, True])
@pytest.mark.parametrize("prior", aciq.PRIORS)
def test_clipped_activations_beat_min_max(prior: str, behind_relu: bool, bits: int) -> None:
    rng = np.random.default_rng(0)
    x = (rng.laplace(size=200_000) if prior == "laplace" else rng.normal(size=200_000)).astype(np.float32)
    x = np.maximum(x, 0) if behind_relu else x + np.float32(0.5)
    histogram, spec = Histogram.of(torch.from_numpy(x)), activation_spec(bits, symmetric=False)
    errors = [
        float(np.mean((dequantize(quantize(x, found), found) - x) ** 2))
        for found in (aciq.calibrate_clipped(histogram, spec), calibrate_activation(histogram, spec, "minmax", 100.0))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_a_known_range_stays() -> None:
    spec = activation_spec(8, symmetric=False, span=(0.0, 1.0))
    found = aciq.calibrate_clipped(Histogram.of(torch.rand(100)), spec)
    assert (float(found.scale), found.fixed) == (1 / 256, True)


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.0, 2.0], [-1.0, 1.0]])
def test_few_distinct_values_are_no_problem(values: list[float]) -> None:
    found = aciq.calibrate_clipped(Histogram.of(torch.tensor(values)), activation_spec(4, symmetric=False))
    assert np.isfinite(found.scale)
    assert found.scale > 0


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40), st.integers(2, 8))
def test_bits_keep_their_mean_and_order(spread: list[float], bits: int) -> None:
    found = aciq.allocate(np.array(spread), bits)
    assert found.mean() <= bits
    assert found.min() >= 2
    assert found.max() <= 8
    order = np.argsort(spread)
    assert np.all(np.diff(found[order]) >= 0)
    if len(set(spread)) == 1:
        assert np.all(found == bits)


def weight(shape: tuple[int, ...] = (16, 8, 3, 3)) -> np.ndarray:
    rng = np.random.default_rng(1)
    sizes = np.exp(rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
    return (rng.normal(size=shape) * sizes).astype(np.float32)


def coded(array: np.ndarray, found: TensorQuant) -> TensorQuant:
    return TensorQuant(found.spec, found.scale, found.zero_point, quantize(array, found))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_allocated_bits_lower_the_error_at_equal_mean_bits(bits: int, symmetric: bool) -> None:
    array = weight()
    spec = weight_spec(bits, 0, symmetric)
    found = coded(array, aciq.calibrate_allocated(array, spec))
    assert found.codes is not None
    per_channel = found.codes.reshape(16, -1)
    levels = per_channel.max(axis=1) - per_channel.min(axis=1) + 1
    assert np.log2(levels).mean() <= bits
    assert found.spec.bits <= 8
    plain = coded(array, calibrate_weight(array, spec, "minmax", 100.0))
    errors = [float(np.mean((grid.dequantized() - array) ** 2)) for grid in (found, plain)]
    assert errors[0] < errors[1] if bits > 2 else errors[0] == errors[1]  # no channel can spare a bit of two


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (weight_spec(4, 0, True), (16, 8, 3, 3)),
        (weight_spec(8, 1, True), (8, 16)),
        (weight_spec(4, None, True), (16, 8)),
        (weight_spec(4, 0, True, block=16), (40, 6)),
    ],
)
def test_norms_of_channels_are_kept(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    array = weight(shape)
    before = coded(array, aciq.calibrate_allocated(array, spec))
    after = aciq.with_norms(array, before)
    assert np.array_equal(after.codes, before.codes)  # pyright: ignore[reportArgumentType]
    assert np.shape(after.scale) == np.shape(before.scale)
    if spec.block is None:
        axes: Any = tuple(axis for axis in range(array.ndim) if axis != spec.axis) if spec.axis is not None else None
        np.testing.assert_allclose(after.dequantized().std(axis=axes), array.std(axis=axes), rtol=1e-5)  # float32 sums


def test_dead_channels_survive() -> None:
    array = weight()
    array[3] = 0.0
    found = aciq.with_norms(array, coded(array, aciq.calibrate_allocated(array, weight_spec(4, 0, True))))
    assert np.all(np.isfinite(found.scale))
    assert np.all(np.asarray(found.scale) > 0)
