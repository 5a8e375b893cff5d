"""ACIQ: analytic clipping, bit allocation and bias correction.

Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for rapid-deployment" (NeurIPS 2019).

Implemented:

* activations are clipped where the expected squared error is least for values of a Laplace or a normal distribution, whose scale is that
  of the samples (section 3, Eq. 6). Values behind a Relu are the positive half of such a distribution, and have a bit more for it;
* the prior is chosen for each value by the error that is measured on the samples; where no clipping is better than both, there is none
  ("mix" in the authors' code);
* weights are not clipped (the paper found no gain); each output channel has a number of bits of its own, by the logarithm of its
  range^(2/3), at the same mean (section 4, Eq. 11: "ACIQ-Mix"), for 4 bits and less as in the authors' code. Channels have 2 to 8 bits,
  where the authors let them vanish;
* the norm that rounding takes from each channel's weights goes into its scale, and the mean into its bias (section 5, Eq. 12 and 13).

Not implemented: clipping and bit allocation per channel of *activations*. A QDQ graph has one scale for each activation, and so have
integer kernels. All channels of a weight travel in the integer type of the widest, so that ACIQ's files are not smaller than its most
precise channels: the mean number of bits is what compares with other methods.
"""

import math
from dataclasses import replace

import numpy as np

from ..calibration import Histogram, calibrate_activation, grid, histogram_errors, rows_of, unrows, weight_grid
from ..quant_table import QuantSpec, TensorQuant

PRIORS = ("laplace", "gauss")
_MOST_ALLOCATED = 4  # bits above which every channel has the same
_FEWEST, _MOST = 2, 8
_STEPS = 60  # halvings: beyond the resolution of a float


def clipping(bits: int, prior: str) -> float:
    """The alpha that minimises E[(x - Q(x))^2] over [-alpha, alpha] in 2^bits levels, for x of unit scale (Eq. 6).

    The scale is b = E|x| of a Laplace and the standard deviation of a normal distribution. The derivatives of the expected errors

        laplace: 2 exp(-alpha) + alpha^2 / (3 * 4^bits)
        gauss:   (1 + alpha^2) (1 - erf(alpha / sqrt 2)) - sqrt(2 / pi) alpha exp(-alpha^2 / 2) + alpha^2 / (3 * 4^bits)

    rise strictly with alpha, so that their zero is found by halving.
    """
    noise = 1.0 / (3.0 * 4.0**bits)
    low, high = 0.0, 50.0
    for _ in range(_STEPS):
        alpha = 0.5 * (low + high)
        if prior == "laplace":
            slope = alpha * noise - math.exp(-alpha)
        else:
            slope = alpha * math.erfc(alpha / math.sqrt(2)) - math.sqrt(2 / math.pi) * math.exp(-alpha * alpha / 2) + alpha * noise
        low, high = (alpha, high) if slope < 0 else (low, alpha)
    return 0.5 * (low + high)


def calibrate_clipped(histogram: Histogram, spec: QuantSpec) -> TensorQuant:
    """The grid of an activation: of the analytic ranges for both priors and the whole range, the one with the least squared error."""
    if spec.span is not None:
        return calibrate_activation(histogram, spec, "minmax", 100.0)
    values, counts = histogram.values()
    ranges = [(histogram.low, histogram.high), *(_range(histogram, values, counts, spec, prior) for prior in PRIORS)]
    lows, highs = (np.array(ends) for ends in zip(*ranges, strict=True))
    best = int(np.argmin(histogram_errors(values, counts, lows, highs, spec, 2.0)))
    scale, zero_point = grid(lows[best : best + 1], highs[best : best + 1], spec)
    return TensorQuant(spec, scale[0], zero_point[0])


def _range(histogram: Histogram, values: np.ndarray, counts: np.ndarray, spec: QuantSpec, prior: str) -> tuple[float, float]:
    """Where a value is clipped under a prior, within what was seen of it."""
    half = histogram.low >= 0.0
    if half:  # the zeros of a Relu, which fill the first bin, are the other half
        above = values > 2.0**histogram.exponent
        values, counts = values[above], counts[above]
    centre = 0.0 if half or spec.symmetric else float(np.average(values, weights=counts))
    deviations = np.abs(values - centre)
    if not counts.sum():
        return histogram.low, histogram.high
    moment = np.average(deviations, weights=counts) if prior == "laplace" else math.sqrt(np.average(deviations**2, weights=counts))
    alpha = float(moment) * clipping(spec.bits + (1 if half and not spec.symmetric else 0), prior)
    return max(histogram.low, centre - alpha), min(histogram.high, centre + alpha)


def allocate(spread: np.ndarray, bits: int) -> np.ndarray:
    """Bits of each channel [C]: log2 of 2^target (spread^(2/3)) / mean(spread^(2/3)), rounded, 2 to 8, on average at most `bits` (Eq. 11).

    The target is the largest at which the average holds.
    """
    share = np.maximum(spread, 1e-30) ** (2.0 / 3.0)
    ideal = np.log2(share / share.mean())
    low, high = bits - float(_MOST), bits + float(_MOST) - ideal.min()
    for _ in range(_STEPS):
        target = 0.5 * (low + high)
        found = np.clip(np.rint(ideal + target), _FEWEST, _MOST)
        low, high = (target, high) if found.mean() <= bits else (low, target)
    return np.clip(np.rint(ideal + low), _FEWEST, _MOST).astype(int)


def calibrate_allocated(weight: np.ndarray, spec: QuantSpec) -> TensorQuant:
    """The grid of a weight: each channel's range in as many levels as its bits allow. The spec has the bits of the widest channel."""
    rows = rows_of(weight, spec).astype(np.float32)
    low, high = rows.min(axis=1), rows.max(axis=1)
    bits = np.full(len(rows), spec.bits)
    if spec.axis is not None and spec.block is None and spec.bits <= _MOST_ALLOCATED:
        bits = allocate(high - low, spec.bits)
    scale, zero_point = np.empty(len(rows), np.float32), np.zeros(len(rows), np.int32)
    for number in np.unique(bits):
        own = bits == number
        scale[own], zero_point[own] = weight_grid(low[own], high[own], replace(spec, bits=int(number)))
    return unrows(TensorQuant(replace(spec, bits=int(bits.max())), scale, zero_point), weight.shape)


def with_norms(weight: np.ndarray, quantized: TensorQuant) -> TensorQuant:
    """The grid under which each channel of the rounded weights deviates from its mean as the float one does (Eq. 12 and 13).

    Codes stay: a factor on the channel is one on its scale. The difference of the means is none of the grid's, which has zero on it.

    Args:
        weight: the float weight.
        quantized: its grid, with codes.
    """
    spec = quantized.spec
    spreads = [rows_of(array, spec).astype(np.float64).std(axis=1) for array in (weight, quantized.dequantized())]
    factor = np.divide(spreads[0], spreads[1], out=np.ones_like(spreads[0]), where=spreads[1] > 0)
    shaped = unrows(TensorQuant(spec, factor.astype(np.float32), np.zeros(len(factor), np.int32)), weight.shape).scale
    return replace(quantized, scale=np.asarray(quantized.scale * shaped, np.float32)[()])
