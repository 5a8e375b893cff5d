"""Ranges to grids: min-max, percentile and MSE (L2.4) calibration of weights per channel and activations per tensor."""

from dataclasses import dataclass

import numpy as np
import torch

from .fake_quant import Tiles, dense, nearest_codes
from .quant_table import QuantSpec, TensorQuant

NORM = 2.4  # BRECQ, QDrop and MQBench search scales under the L2.4 norm of the rounding error
CANDIDATES = 100  # shrink factors 0.01 .. 1.00 of the full range
_BINS = 1 << 15
_TILE = 1 << 16  # weights at a time: with the errors made of them, they stay in the cache
_LOOK = 4  # candidates between looks at what is cut off, which cost about as much as a candidate
# float32 represents integers up to 2^24: an int32 bias of fewer steps is exact in the simulation, with room for a step that shrinks.
_MAX_BIAS_CODE = float(1 << 22)
_SMALLEST_SCALE = 1e-12  # keeps scales, and products of two scales, normal floats
_DEAD_CHANNEL_SCALE = 1e-6  # for channels without weights: fine enough for any bias, and `fit_bias` widens it where it is too fine


@dataclass(frozen=True)
class Histogram:
    """Exact range and binned values of one activation. Bins are aligned to powers of two, so merging is exact and order-free.

    Bin i covers [i - _BINS/2, i + 1 - _BINS/2) * 2^exponent.
    """

    low: float
    high: float
    exponent: int
    counts: np.ndarray  # int64 [_BINS]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Histogram":
        """The histogram of a tensor of any shape; it must be finite and not empty."""
        low, high = (float(v) for v in torch.aminmax(tensor))
        largest = max(abs(low), abs(high), _SMALLEST_SCALE)
        exponent = int(np.frexp(largest)[1]) - int(np.log2(_BINS // 2))  # largest < 2^(exponent) * BINS/2
        tensor = dense(tensor)
        counts = torch.zeros(_BINS, dtype=torch.int64, device=tensor.device)
        for (tile,) in Tiles(tensor).of(tensor):
            index = tile.mul(2.0**-exponent).floor_().to(torch.int32).add_(_BINS // 2).clamp_(0, _BINS - 1)
            counts += torch.bincount(index, minlength=_BINS)
        return cls(low, high, exponent, counts.cpu().numpy())

    def merged(self, other: "Histogram") -> "Histogram":
        exponent = max(self.exponent, other.exponent)
        counts = self._counts_at(exponent) + other._counts_at(exponent)
        return Histogram(min(self.low, other.low), max(self.high, other.high), exponent, counts)

    def above(self, low: float) -> "Histogram":
        """The histogram of the same values with all below `low` moved there; the range stays exact, other values move to bins' centres."""
        low, high = max(self.low, low), max(self.high, low)
        centres, counts = self.values()
        moved = Histogram.of(torch.from_numpy(np.clip(np.concatenate([centres, [low, high]]), low, high)))
        index = np.floor(np.clip(centres, low, high) * 2.0**-moved.exponent).astype(np.int64) + _BINS // 2
        return Histogram(low, high, moved.exponent, np.bincount(index.clip(0, _BINS - 1), weights=counts, minlength=_BINS).astype(np.int64))

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Centres and counts of the bins that hold anything."""
        filled = np.flatnonzero(self.counts)
        return (filled - _BINS // 2 + 0.5) * 2.0**self.exponent, self.counts[filled]

    def percentile(self, percent: float) -> tuple[float, float]:
        """The range that holds the central `percent` of the values on each side, within the exact range."""
        centres, counts = self.values()
        share = np.cumsum(counts) / counts.sum()
        low = centres[np.searchsorted(share, 1 - percent / 100)]
        high = centres[min(np.searchsorted(share, percent / 100), len(centres) - 1)]
        return max(self.low, float(low)), min(self.high, float(high))

    def _counts_at(self, exponent: int) -> np.ndarray:
        shift = exponent - self.exponent
        if shift == 0:
            return self.counts
        target = ((np.arange(_BINS) - _BINS // 2) >> min(shift, 60)) + _BINS // 2
        return np.bincount(target, weights=self.counts, minlength=_BINS).astype(np.int64)


def calibrate_activation(histogram: Histogram, spec: QuantSpec, method: str, percentile: float, norm: float = NORM) -> TensorQuant:
    """The grid of an activation from its histogram; one whose range is known needs none, and gets a power of two for its scale."""
    if spec.span is not None:
        low, high = spec.span
        scale = np.float32((high - low) / (1 << spec.bits))
        return TensorQuant(spec, scale, np.int32(spec.qmin - round(low / float(scale))), fixed=True)
    low, high = histogram.low, histogram.high
    if method == "percentile":
        low, high = histogram.percentile(percentile)
    elif method == "mse":
        low, high = _mse_range(histogram, spec, norm)
    scale, zero_point = grid(np.array([low]), np.array([high]), spec)
    return TensorQuant(spec, scale[0], zero_point[0])


def calibrate_weight(weight: np.ndarray, spec: QuantSpec, method: str, percentile: float, norm: float = NORM) -> TensorQuant:
    """The grid of a weight in its ONNX layout, per channel along `spec.axis`, or per block of it."""
    rows = rows_of(weight, spec).astype(np.float32)
    if method == "percentile":
        low, high = np.percentile(rows, [100 - percentile, percentile], axis=1)
    else:
        low, high = rows.min(axis=1), rows.max(axis=1)
    if method == "mse":
        factor = _mse_shrink(rows, low, high, spec, norm)
        low, high = low * factor, high * factor
    return unrows(TensorQuant(spec, *weight_grid(low, high, spec)), weight.shape)


def weight_grid(low: np.ndarray, high: np.ndarray, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    """`grid`, with the scale of dead channels for those without weights."""
    scale, zero_point = grid(low, high, spec)
    return np.where(np.maximum(-low, high) < _SMALLEST_SCALE, np.float32(_DEAD_CHANNEL_SCALE), scale), zero_point


def unrows(grids: TensorQuant, shape: tuple[int, ...]) -> TensorQuant:
    """Scales and zero points [C] of the rows of a weight of a shape, as its spec has them."""
    spec, scale, zero_point = grids.spec, np.asarray(grids.scale), np.asarray(grids.zero_point)
    if spec.axis is None:
        scale, zero_point = scale[0], zero_point[0]
    elif spec.block is not None:
        others = [size for axis, size in enumerate(shape) if axis != spec.axis]
        scale, zero_point = (np.moveaxis(p.reshape(*others, -1), -1, spec.axis) for p in (scale, zero_point))
    return TensorQuant(spec, scale, zero_point)


def rows_of(weight: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """The values that share a scale, as rows [C, K]; a last block that is not full is filled with zeros, which no range sees."""
    if spec.axis is None:
        return weight.reshape(1, -1)
    if spec.block is None:
        return np.moveaxis(weight, spec.axis, 0).reshape(weight.shape[spec.axis], -1)
    last = np.moveaxis(weight, spec.axis, -1)
    missing = -last.shape[-1] % spec.block
    return np.pad(last, [(0, 0)] * (last.ndim - 1) + [(0, missing)]).reshape(-1, spec.block)


def grid(low: np.ndarray, high: np.ndarray, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero point (int32) for ranges [C]; zero is always on the grid, and no scale is zero or denormal.

    An empty range (a constant zero) is taken for one of width 1.

    Symmetric: zero_point 0 and the smallest scale whose grid holds both ends. Asymmetric: scale = (high - low) / (qmax - qmin),
    zero_point = round(qmin - low / scale).
    """
    low, high = np.minimum(low, 0.0).astype(np.float64), np.maximum(high, 0.0).astype(np.float64)
    scale = np.maximum(high / spec.qmax, low / spec.qmin) if spec.symmetric else (high - low) / (spec.qmax - spec.qmin)
    scale = np.where(scale < _SMALLEST_SCALE, 1.0 / (spec.qmax - spec.qmin), scale).astype(np.float32)
    zero_point = np.zeros_like(scale) if spec.symmetric else np.clip(np.rint(spec.qmin - low / scale), spec.qmin, spec.qmax)
    return scale, zero_point.astype(np.int32)


def fit_bias(weight: TensorQuant, bias: np.ndarray, input_scale: np.ndarray | np.float32) -> TensorQuant:
    """Widen the weight scales of channels whose int32 bias (scale s_x * s_w) would not fit, and choose them for dead channels.

    A channel of (almost) zero weights has a tiny scale, in which its bias is astronomically many steps.
    """
    floor = np.abs(bias.reshape(-1)) / (float(input_scale) * _MAX_BIAS_CODE)
    if weight.spec.axis is None:
        floor = floor.max(initial=0.0)
    scale = np.maximum(weight.scale, np.maximum(floor, _SMALLEST_SCALE)).astype(np.float32)
    return TensorQuant(weight.spec, scale, weight.zero_point, weight.codes)


def calibrate_bias(bias: np.ndarray, weight: TensorQuant, input_scale: np.ndarray | np.float32, bits: int) -> TensorQuant:
    """int32 codes of a bias with scale s_x * s_w ([C], or one) and zero point 0, as integer kernels add it to their accumulators."""
    scale = np.asarray(input_scale.astype(np.float32) * weight.scale.astype(np.float32))
    limit = (1 << (bits - 1)) - 1
    codes = np.clip(np.rint(bias.reshape(-1).astype(np.float32) / scale).astype(np.float64), -limit, limit).astype(np.int32)
    spec = QuantSpec(bits, signed=True, symmetric=True, axis=bias.ndim - 1 if scale.ndim else None, narrow=True)
    return TensorQuant(spec, scale, np.zeros(scale.shape, np.int32), codes.reshape(bias.shape))


def _mse_range(histogram: Histogram, spec: QuantSpec, norm: float) -> tuple[float, float]:
    """The range with the least error in a norm: ends are searched in turn (a symmetric grid has only one)."""
    values, counts = histogram.values()
    factors = np.linspace(1.0 / CANDIDATES, 1.0, CANDIDATES)
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    best_low, best_high = low, high
    if spec.symmetric:
        end = max(-low, high)
        factor = factors[np.argmin(histogram_errors(values, counts, -end * factors, end * factors, spec, norm))]
        return -end * factor, end * factor
    for _ in range(2 if low < 0 < high else 1):
        if high > 0:
            lows = np.full(CANDIDATES, best_low)
            best_high = high * factors[np.argmin(histogram_errors(values, counts, lows, high * factors, spec, norm))]
        if low < 0:
            highs = np.full(CANDIDATES, best_high)
            best_low = low * factors[np.argmin(histogram_errors(values, counts, low * factors, highs, spec, norm))]
    return float(best_low), float(best_high)


def histogram_errors(
    values: np.ndarray, counts: np.ndarray, lows: np.ndarray, highs: np.ndarray, spec: QuantSpec, norm: float
) -> np.ndarray:
    """sum_i counts_i |x_i - x~_i|^norm for each candidate range [K]."""
    scale, zero_point = (torch.from_numpy(a).float().unsqueeze(1) for a in grid(lows, highs, spec))
    x, weights = torch.from_numpy(values).float(), torch.from_numpy(counts).double()
    errors = []
    for s, z in zip(scale.split(8), zero_point.split(8), strict=True):  # 8 candidates at a time keep the work in cache
        codes = nearest_codes(x, s, z, spec)
        errors.append(((codes - z) * s - x).abs_().pow_(norm).double() @ weights)
    return torch.cat(errors).numpy()


def _mse_shrink(rows: np.ndarray, low: np.ndarray, high: np.ndarray, spec: QuantSpec, norm: float) -> np.ndarray:
    """For each row [C, K], the factor on its range with the least error in a norm; as many rows at a time as fit the cache."""
    together = max(1, _TILE // max(rows.shape[1], 1))
    groups = [slice(start, start + together) for start in range(0, len(rows), together)]
    found = [_mse_factors(rows[group], low[group], high[group], spec, norm) for group in groups]
    return np.concatenate(found) if found else np.ones(0)


def _mse_factors(rows: np.ndarray, low: np.ndarray, high: np.ndarray, spec: QuantSpec, norm: float) -> np.ndarray:
    """Candidates are tried downwards. What a range cuts off only grows: a row where that alone exceeds the best error is done.

    Factors are doubles, as they are tried: rounded, they may move a zero point that is on a tie.
    """
    x, left = torch.from_numpy(rows), np.arange(len(rows))
    best, factor = np.full(len(rows), np.inf), np.ones(len(rows))
    for number, candidate in enumerate(np.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES)):
        lows, highs = low[left] * candidate, high[left] * candidate
        scale, zero_point = (torch.from_numpy(a).float().unsqueeze(1) for a in grid(lows, highs, spec))
        error = _row_errors(x, scale, zero_point, spec, norm)
        better = error < best[left]
        best[left[better]], factor[left[better]] = error[better], candidate
        if number % _LOOK < _LOOK - 1:
            continue
        done = _cut_off(x, *_farthest(lows, highs, scale, spec), norm) > best[left]
        left, x = left[~done], x[torch.from_numpy(~done)]
        if not len(left):
            break
    return factor


def _row_errors(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec, norm: float) -> np.ndarray:
    """sum |x - x~|^norm of each row [C, K]."""
    error = torch.zeros(len(x), dtype=torch.float64)
    for part in x.split(_TILE, dim=1):
        codes = nearest_codes(part, scale, zero_point, spec)
        error += codes.sub_(zero_point).mul_(scale).sub_(part).abs_().pow_(norm).sum(dim=1)
    return error.numpy()


def _farthest(lows: np.ndarray, highs: np.ndarray, scale: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """How far grids [C, 1] of ranges reach that are no wider than these: a zero point on a tie is rounded either way."""
    if spec.symmetric:
        return spec.qmin * scale, spec.qmax * scale
    low, high = (torch.from_numpy(ends).float().unsqueeze(1) for ends in (np.minimum(lows, 0.0), np.maximum(highs, 0.0)))
    return low - 0.5 * scale, high + 0.5 * scale


def _cut_off(x: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, norm: float) -> np.ndarray:
    """The least part of an error in a norm that is of values beyond the ends of a grid, for each row [C, K]."""
    cut = torch.zeros(len(x), dtype=torch.float64)
    for part in x.split(_TILE, dim=1):
        cut += torch.maximum(lowest - part, part - highest).clamp_(min=0.0).pow_(norm).sum(dim=1)
    return cut.numpy()
