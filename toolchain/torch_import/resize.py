"""Resize and Upsample.

Every mode is a sum of a few taps along each axis: an index and a weight for each output position, made once for each size. Coordinates are
computed in float32 like ONNX Runtime's, whose ties they must break the same way. What torch interpolates alike is left to torch, which is
faster and keeps channels last.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto

from .operator import Converter, NodeView, Operator, with_numbers

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}
_TIE = 1e-6  # ONNX Runtime takes this much about a half for a tie; held against it on 8,000 pairs of sizes
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, None)


@dataclass(frozen=True)
class _Rule:
    mode: str
    transform: str
    rounding: str
    cubic_a: float
    exclude_outside: bool
    antialias: bool


@dataclass(frozen=True)
class _Axis:
    """How one axis is resized; `roi` is the part of it that is looked at, in shares of its length."""

    axis: int
    size: int
    out: int
    scale: float
    roi: tuple[float, float]


def resize(view: NodeView) -> Operator:
    """Resize of every version, by scales or by sizes."""
    attrs = view.attrs
    oldest = view.opset < 11
    rule = _Rule(
        attrs.get("mode", "nearest"),
        "asymmetric" if oldest else attrs.get("coordinate_transformation_mode", "half_pixel"),
        "simple" if oldest else attrs.get("nearest_mode", "round_prefer_floor"),
        attrs.get("cubic_coeff_a", -0.75),
        bool(attrs.get("exclude_outside", 0)),
        bool(attrs.get("antialias", 0)),
    )
    _check(view, rule)
    axes, policy = attrs.get("axes"), attrs.get("keep_aspect_ratio_policy", "stretch")
    extrapolation = attrs.get("extrapolation_value", 0.0)

    def call(
        x: torch.Tensor, roi: Sequence[float] | None = None, scales: Sequence[float] | None = None, sizes: Sequence[int] | None = None
    ) -> torch.Tensor:
        positions = [axis % x.dim() for axis in axes] if axes is not None else list(range(x.dim()))
        lengths = [x.shape[position] for position in positions]
        wanted, factors = _targets(lengths, scales, sizes, policy)
        if wanted == lengths:
            return x  # as ONNX Runtime, whatever the scales and the crop are
        count = len(positions)
        regions = [(roi[i], roi[count + i]) for i in range(count)] if roi else [(0.0, 1.0)] * count
        every = [_Axis(*values) for values in zip(positions, lengths, wanted, factors, regions, strict=True)]
        # As ONNX Runtime, which crops no axis that it does not resize and smooths none whose size stays.
        every = [axis for axis in every if axis.scale != 1.0 and not (rule.antialias and axis.out == axis.size)]
        return _interpolated_by_torch(x, rule, every) if _is_torch(x, rule, every) else _interpolated(x, rule, every, extrapolation)

    if "scales" in attrs:  # Upsample-7
        given = attrs["scales"]
        return Operator(lambda x: call(x, None, given), view.inputs[:1])
    if oldest:
        return with_numbers(view, (1,), lambda x, scales: call(x, None, scales))
    return with_numbers(view, (1, 2, 3), call)


def _check(view: NodeView, rule: _Rule) -> None:
    if rule.mode not in ("nearest", "linear", "bilinear", "cubic"):
        view.refuse(f"mode {rule.mode!r} is not known")
    if rule.mode == "nearest" and rule.transform == "half_pixel_symmetric":
        view.refuse("how half_pixel_symmetric coordinates round to the nearest is not known exactly")
    if rule.mode != "nearest" and view.dtype(0) not in _FLOATS:
        view.refuse("integers are only resized to the nearest")
    known = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize")
    if rule.transform not in (*known, "tf_half_pixel_for_nn"):
        view.refuse(f"coordinate transformation {rule.transform!r} is not known")


def _targets(
    lengths: Sequence[int], scales: Sequence[float] | None, sizes: Sequence[int] | None, policy: str
) -> tuple[list[int], list[float]]:
    """(output size, scale) of each axis."""
    if sizes:
        factors = [float(np.float32(out) / np.float32(size)) for out, size in zip(sizes, lengths, strict=True)]
        if policy == "stretch":
            return [int(out) for out in sizes], factors
        factor = min(factors) if policy == "not_larger" else max(factors)
        return [math.floor(float(np.float32(factor) * np.float32(size)) + 0.5) for size in lengths], [factor] * len(lengths)
    assert scales is not None  # one of the two is there in a valid model
    return [int(np.float32(size) * np.float32(scale)) for size, scale in zip(lengths, scales, strict=True)], [float(s) for s in scales]


def _is_torch(x: torch.Tensor, rule: _Rule, axes: Sequence[_Axis]) -> bool:
    """Whether `F.interpolate` computes the same: its axes, its coordinates, and sizes that are exactly the scaled ones."""
    if not axes or rule.antialias or x.dim() not in _LINEAR or any(axis.axis < 2 or axis.size * axis.scale != axis.out for axis in axes):
        return False
    if rule.mode == "nearest":
        doubling = all(axis.scale in (2.0, 4.0, 8.0) for axis in axes)
        plain = rule.transform == "asymmetric" and rule.rounding in ("floor", "simple")
        # Half-pixel coordinates lie between the same two pixels, below or above their middle.
        return doubling and (plain or (rule.transform in ("half_pixel", "pytorch_half_pixel") and rule.rounding.startswith("round")))
    centred = rule.transform in ("half_pixel", "pytorch_half_pixel", "align_corners") and all(axis.out > 1 for axis in axes)
    return centred and (rule.mode != "cubic" or (x.dim() == 4 and rule.cubic_a == -0.75 and not rule.exclude_outside))


def _interpolated_by_torch(x: torch.Tensor, rule: _Rule, axes: Sequence[_Axis]) -> torch.Tensor:
    size = list(x.shape[2:])
    for axis in axes:
        size[axis.axis - 2] = axis.out
    if rule.mode == "nearest":
        return F.interpolate(x, size, mode="nearest")
    mode = "bicubic" if rule.mode == "cubic" else _LINEAR[x.dim()]
    return F.interpolate(x, size, mode=mode, align_corners=rule.transform == "align_corners")


def _interpolated(x: torch.Tensor, rule: _Rule, axes: Sequence[_Axis], extrapolation: float) -> torch.Tensor:
    for axis in axes:
        index, weight, outside = _taps(rule, axis, x.device)
        shape = [1] * x.dim()
        shape[axis.axis] = axis.out
        if weight is None:
            x = x.index_select(axis.axis, index[0])
        else:
            factors = weight.to(x.dtype)
            taps = [x.index_select(axis.axis, i) * w.reshape(shape) for i, w in zip(index, factors, strict=True)]
            x = torch.stack(taps).sum(dim=0) if len(taps) > 2 else taps[0] + taps[1]
        if outside is not None:
            x = x.masked_fill(outside.reshape(shape), extrapolation)
    return x


@lru_cache(maxsize=256)
def _taps(rule: _Rule, axis: _Axis, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """For one axis: indices [taps, out], weights [taps, out] (None: one tap of weight 1), and what lies outside (None: nothing)."""
    position = _coordinates(rule.transform, axis)
    outside = None
    if rule.transform == "tf_crop_and_resize":
        beyond = (position < 0) | (position > axis.size - 1)
        outside = torch.from_numpy(beyond).to(device) if beyond.any() else None
    if rule.mode == "nearest":
        index = np.clip(_rounded(position, rule.rounding, axis.scale < 1), 0, axis.size - 1)
        return torch.from_numpy(index[None].astype(np.int64)).to(device), None, outside
    if rule.mode != "cubic" and not rule.antialias:
        position = np.clip(position, 0, axis.size - 1)
    index, weight = _kernel(rule, position, min(axis.scale, 1.0) if rule.antialias else 1.0)
    if rule.exclude_outside:
        weight = np.where((index < 0) | (index >= axis.size), 0, weight)
        weight = weight / weight.sum(axis=0)
    index = np.clip(index, 0, axis.size - 1)
    return torch.from_numpy(index).to(device), torch.from_numpy(weight).to(device), outside


def _coordinates(transform: str, axis: _Axis) -> np.ndarray:
    """The place in the input that each output position looks at, in pixels (float32)."""
    y, half, scale = np.arange(axis.out, dtype=np.float32), np.float32(0.5), np.float32(axis.scale)
    last = np.float32(axis.size - 1)
    if transform == "asymmetric":
        return y / scale
    if transform == "align_corners":
        return y * last / np.float32(axis.out - 1) if axis.out > 1 else np.zeros_like(y)
    if transform == "tf_crop_and_resize":
        start, end = (np.float32(share) for share in axis.roi)
        if axis.out > 1:
            return start * last + y * (end - start) * last / np.float32(axis.out - 1)
        return np.full_like(y, half * (start + end) * last)
    if transform == "pytorch_half_pixel" and axis.out == 1:
        return np.zeros_like(y)
    if transform == "tf_half_pixel_for_nn":
        return (y + half) / scale
    shift = np.float32(0)
    if transform == "half_pixel_symmetric":  # the middle of the input is the middle of the output, whatever rounding made of its size
        shift = np.float32(axis.size) * half * (np.float32(1) - np.float32(axis.out) / (scale * np.float32(axis.size)))
    return shift + (y + half) / scale - half


def _rounded(position: np.ndarray, rounding: str, shrinks: bool) -> np.ndarray:
    if rounding == "simple":
        return np.ceil(position) if shrinks else np.trunc(position)
    if rounding == "floor":
        return np.floor(position)
    if rounding == "ceil":
        return np.ceil(position)
    exact = position.astype(np.float64)  # the sum with a half would round in float32
    return np.ceil(exact - 0.5 - _TIE) if rounding == "round_prefer_floor" else np.floor(exact + 0.5 + _TIE)


def _kernel(rule: _Rule, position: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights [taps, out] of the linear or cubic kernel, stretched by 1 / scale against aliasing."""
    reach = 2 if rule.mode == "cubic" else 1
    first = math.floor(-reach / scale) + 1
    base = np.floor(position)
    offsets = np.arange(first, 2 - first)
    distance = np.abs((offsets[:, None] - (position - base)[None].astype(np.float64)) * scale)
    if rule.mode == "cubic":
        a = rule.cubic_a
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    else:
        weight = np.clip(1 - distance, 0, 1)
    if scale != 1.0:
        weight = weight / weight.sum(axis=0)
    return (base[None] + offsets[:, None]).astype(np.int64), weight


CONVERTERS: dict[str, Converter] = {"Resize": resize, "Upsample": resize}
