"""Pooling with every padding convention of ONNX.

torch pads both sides alike and by at most half a window. Where ONNX wants more, the input is padded beforehand, up to exactly the elements
that the windows cover, and means are sums divided by the count of elements that take part.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .operator import Converter, NodeView, Operator, with_numbers
from .padding import WindowPads, to_torch

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def max_pool(view: NodeView) -> Operator:
    """MaxPool, with the indices of the maxima where they are asked for."""
    pads, ceil = _window(view)
    columns_first = bool(view.attrs.get("storage_order", 0))

    def call(x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        inside = _inside(pads)
        spatial, begin = x.shape[2:], pads.begin
        if not inside:
            begin, end = _covering_pads(pads, spatial, ceil)
            lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
            x = F.pad(x, to_torch(begin, end), value=lowest)
        arguments = (pads.kernel, pads.strides, begin if inside else 0, pads.dilations, ceil and inside)
        pool = _MAX[len(pads.kernel)]
        if not view.has_output(1):
            return pool(x, *arguments)
        y, index = pool(x, *arguments, return_indices=True)
        return y, _flat_indices(index, x.shape[2:], [0] * len(spatial) if inside else begin, spatial, columns_first)

    return Operator(call, view.inputs)


def _flat_indices(
    index: torch.Tensor, padded: Sequence[int], begin: Sequence[int], spatial: Sequence[int], columns_first: bool
) -> torch.Tensor:
    """Indices within one padded plane (torch) as indices into the whole unpadded tensor (ONNX)."""
    coordinates = [c - low for c, low in zip(torch.unravel_index(index, tuple(padded)), begin, strict=True)]
    axes = list(zip(coordinates, spatial, strict=True))
    flat = torch.zeros_like(index)
    for coordinate, size in reversed(axes) if columns_first else axes:
        flat = flat * size + coordinate
    planes = torch.arange(index.shape[0] * index.shape[1], device=index.device).reshape(*index.shape[:2], *[1] * len(spatial))
    return flat + planes * math.prod(spatial)


def average_pool(view: NodeView) -> Operator:
    """AveragePool; elements of the padding count or do not, those that only `ceil_mode` adds never do."""
    pads, ceil = _window(view)
    include = bool(view.attrs.get("count_include_pad", 0))
    pool = _AVERAGE[len(pads.kernel)]

    def call(x: torch.Tensor) -> torch.Tensor:
        if _inside(pads) and not any(d > 1 for d in pads.dilations):
            return pool(x, pads.kernel, pads.strides, pads.begin, ceil_mode=ceil, count_include_pad=include)
        begin, end = _covering_pads(pads, x.shape[2:], ceil)
        ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
        if include:
            declared = pads.sizes(x.shape[2:])
            ones = F.pad(ones, to_torch(*declared), value=1.0)
            count = F.pad(ones, to_torch([0] * len(begin), [e - d for e, d in zip(end, declared[1], strict=True)]))
        else:
            count = F.pad(ones, to_torch(begin, end))
        return _window_sum(F.pad(x, to_torch(begin, end)), pads) / _window_sum(count, pads)

    return Operator(call, view.inputs)


def lp_pool(view: NodeView) -> Operator:
    """LpPool: (sum over the window of |x|^p)^(1/p)."""
    pads, ceil = _window(view)
    p = view.attrs.get("p", 2)

    def call(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, to_torch(*_covering_pads(pads, x.shape[2:], ceil)))
        return _window_sum(padded.abs() ** p, pads) ** (1.0 / p)

    return Operator(call, view.inputs)


def max_unpool(view: NodeView) -> Operator:
    """MaxUnpool: elements back at the flat indices that MaxPool gave, zeros elsewhere."""
    attrs = view.attrs
    kernel = attrs["kernel_shape"]
    pads = WindowPads.of(attrs, kernel)

    def call(x: torch.Tensor, index: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
        natural = [
            (size - 1) * stride + k - low - high
            for size, stride, k, low, high in zip(x.shape[2:], pads.strides, kernel, pads.begin, pads.end, strict=True)
        ]
        inner = [*x.shape[:2], *natural]
        flat = torch.zeros(math.prod(inner), dtype=x.dtype, device=x.device).scatter(0, index.reshape(-1), x.reshape(-1))
        y = flat.reshape(inner)
        return y if shape is None else F.pad(y, to_torch([0] * len(inner), [s - i for s, i in zip(shape, inner, strict=True)]))

    return with_numbers(view, (2,), call)


def global_pool(view: NodeView) -> Operator:
    """GlobalAveragePool, GlobalMaxPool and GlobalLpPool over all spatial axes."""
    kind, p = view.proto.op_type, view.attrs.get("p", 2)

    def call(x: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(2, x.dim()))
        if kind == "GlobalMaxPool":
            return torch.amax(x, dim=axes, keepdim=True)
        if kind == "GlobalAveragePool":
            return torch.mean(x, dim=axes, keepdim=True)
        return (x.abs() ** p).sum(dim=axes, keepdim=True) ** (1.0 / p)

    return Operator(call, view.inputs)


def _window(view: NodeView) -> tuple[WindowPads, bool]:
    pads = WindowPads.of(view.attrs, view.attrs["kernel_shape"])
    if len(pads.kernel) not in _MAX:
        view.refuse(f"it has {len(pads.kernel)} spatial axes, torch pools over 1 to 3")
    return pads, bool(view.attrs.get("ceil_mode", 0))


def _inside(pads: WindowPads) -> bool:
    return pads.symmetric and all(2 * p <= k for p, k in zip(pads.begin, pads.kernel, strict=True))


def _covering_pads(pads: WindowPads, spatial: Sequence[int], ceil: bool) -> tuple[list[int], list[int]]:
    """Pads such that the windows end where the padded input does; negative ones cut what no window covers.

    With `ceil_mode` a window that would start beyond the input and its left padding is left out, as torch and ONNX agree.
    """
    low, high = pads.sizes(spatial)
    end = []
    for size, k, stride, dilation, a, b in zip(spatial, pads.kernel, pads.strides, pads.dilations, low, high, strict=True):
        extent = (k - 1) * dilation + 1
        room = size + a + b - extent
        windows = (-(-room // stride) if ceil else room // stride) + 1
        if ceil and (windows - 1) * stride >= size + a:
            windows -= 1
        end.append((windows - 1) * stride + extent - size - a)
    return list(low), end


def _window_sum(x: torch.Tensor, pads: WindowPads) -> torch.Tensor:
    rank = len(pads.kernel)
    if all(d == 1 for d in pads.dilations):
        return _AVERAGE[rank](x, pads.kernel, pads.strides) * math.prod(pads.kernel)
    ones = torch.ones((1, 1, *pads.kernel), dtype=x.dtype, device=x.device)
    sums = _CONV[rank](x.reshape(-1, 1, *x.shape[2:]), ones, None, pads.strides, 0, pads.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


CONVERTERS: dict[str, Converter] = {
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "LpPool": lp_pool,
    "MaxUnpool": max_unpool,
    "GlobalAveragePool": global_pool,
    "GlobalMaxPool": global_pool,
    "GlobalLpPool": global_pool,
}
