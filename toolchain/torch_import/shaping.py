"""Operators that move elements and change none: reshaping, permuting, joining, cutting."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .operator import Converter, NodeView, Operator, with_numbers
from .padding import to_torch

_NO_END = (2**31 - 1, 2**63 - 1)  # for ONNX Runtime these mean the last element in the direction of the step


def reshape(view: NodeView) -> Operator:
    """Reshape; 0 copies the input's axis unless `allowzero`."""
    keep = not view.attrs.get("allowzero", 0)

    def call(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return x.reshape([x.shape[i] if s == 0 and keep else s for i, s in enumerate(sizes)])

    return with_numbers(view, (1,), call)


def flatten(view: NodeView) -> Operator:
    """Flatten to a matrix."""
    axis = view.attrs.get("axis", 1)

    def call(x: torch.Tensor) -> torch.Tensor:
        position = axis if axis >= 0 else axis + x.dim()
        return x.reshape(math.prod(x.shape[:position]), math.prod(x.shape[position:]))

    return Operator(call, view.inputs)


def transpose(view: NodeView) -> Operator:
    """Transpose; without `perm` the axes are reversed."""
    perm = view.attrs.get("perm")
    return Operator(lambda x: x.permute(perm if perm is not None else tuple(reversed(range(x.dim())))), view.inputs)


def squeeze(view: NodeView) -> Operator:
    """Squeeze; without axes every axis of size 1 goes."""

    def call(x: torch.Tensor, axes: Sequence[int] | None = None) -> torch.Tensor:
        return x.squeeze(tuple(axes)) if axes is not None else x.squeeze()

    return _with_axes(view, call)


def unsqueeze(view: NodeView) -> Operator:
    """Unsqueeze; the axes are those of the result."""

    def call(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        rank = x.dim() + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return _with_axes(view, call)


def expand(view: NodeView) -> Operator:
    """Expand: broadcasting in both directions, so a 1 in the shape keeps the input's axis."""

    def call(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return x.expand(torch.broadcast_shapes(x.shape, tuple(sizes)))

    return with_numbers(view, (1,), call)


def tile(view: NodeView) -> Operator:
    """Tile by a number of repeats for each axis."""

    def call(x: torch.Tensor, repeats: Sequence[int]) -> torch.Tensor:
        return x.repeat(tuple(repeats))

    return with_numbers(view, (1,), call)


def concat(view: NodeView) -> Operator:
    """Concat along an axis."""
    axis = view.attrs["axis"]
    return Operator(lambda *parts: torch.cat(parts, dim=axis), view.inputs)


def split(view: NodeView) -> Operator:
    """Split of every version: sizes by attribute (before 13) or input, else equal parts of which (from 18) the last may be smaller."""
    axis = view.attrs.get("axis", 0)
    count = view.attrs.get("num_outputs", len(view.proto.output))

    def call(x: torch.Tensor, sizes: Sequence[int] | None = None) -> tuple[torch.Tensor, ...]:
        if sizes is None:
            part = -(-x.shape[axis] // count)
            sizes = [min(part, x.shape[axis] - i * part) for i in range(count)]
        return x.split(list(sizes), dim=axis)

    if "split" in view.attrs:
        fixed = view.attrs["split"]
        return Operator(lambda x: call(x, fixed), view.inputs[:1])
    return with_numbers(view, (1,), call)


def slice_(view: NodeView) -> Operator:
    """Slice of every version; bounds are attributes before opset 10."""

    def call(
        x: torch.Tensor,
        starts: Sequence[int],
        ends: Sequence[int],
        axes: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
    ) -> torch.Tensor:
        axes = axes if axes is not None else range(len(starts))
        steps = steps if steps is not None else [1] * len(starts)
        index = [slice(None)] * x.dim()
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            size = x.shape[axis]
            if step > 0:
                index[axis] = slice(max(start, -size), max(end, -size), step)
            else:  # torch has no negative steps: take the same elements forwards, then turn them around
                to_first = end < -size or end in _NO_END
                taken = range(size)[slice(max(start, -size), None if to_first else end, step)]
                index[axis] = slice(taken[-1], taken[0] + 1, -step) if taken else slice(0, 0)
                x = x[tuple(index)].flip(axis)
                index[axis] = slice(None)
        return x[tuple(index)]

    if "starts" in view.attrs:
        attrs = view.attrs
        return Operator(lambda x: call(x, attrs["starts"], attrs["ends"], attrs.get("axes")), view.inputs[:1])
    return with_numbers(view, (1, 2, 3, 4), call)


def depth_to_space(view: NodeView) -> Operator:
    """DepthToSpace: channels become a block of pixels, in either order (DCR, CRD)."""
    block, mode = view.attrs["blocksize"], view.attrs.get("mode", "DCR")

    def call(x: torch.Tensor) -> torch.Tensor:
        if mode == "CRD":
            return F.pixel_shuffle(x, block)
        n, c, h, w = x.shape
        y = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return y.reshape(n, c // block**2, h * block, w * block)

    return _of_images(view, call)


def space_to_depth(view: NodeView) -> Operator:
    """SpaceToDepth: a block of pixels becomes channels, in either order (DCR; CRD from opset 28)."""
    block, mode = view.attrs["blocksize"], view.attrs.get("mode", "DCR")

    def call(x: torch.Tensor) -> torch.Tensor:
        if mode == "CRD":
            return F.pixel_unshuffle(x, block)
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return y.reshape(n, c * block**2, h // block, w // block)

    return _of_images(view, call)


def center_crop_pad(view: NodeView) -> Operator:
    """CenterCropPad: each axis cut or zero-padded around its middle."""
    axes = view.attrs.get("axes")

    def call(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        begin, end = [0] * x.dim(), [0] * x.dim()
        for axis, size in zip(axes if axes is not None else range(x.dim()), sizes, strict=True):
            more = size - x.shape[axis]
            low = more // 2 if more >= 0 else -(-more // 2)
            begin[axis], end[axis] = low, more - low
        return F.pad(x, to_torch(begin, end))

    return with_numbers(view, (1,), call)


def _with_axes(view: NodeView, call: Callable[..., torch.Tensor]) -> Operator:
    """Axes are an attribute before opset 13, an input from then on."""
    if "axes" in view.attrs:
        axes = view.attrs["axes"]
        return Operator(lambda x: call(x, axes), view.inputs[:1])
    return with_numbers(view, (1,), call)


def _of_images(view: NodeView, call: Callable[[torch.Tensor], torch.Tensor]) -> Operator:
    mode = view.attrs.get("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        view.refuse(f"mode {mode!r} is not known")
    return Operator(call, view.inputs)


CONVERTERS: dict[str, Converter] = {
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Expand": expand,
    "Tile": tile,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "CenterCropPad": center_crop_pad,
}
