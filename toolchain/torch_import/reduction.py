"""Reductions, arg-reductions and running reductions. Axes are an attribute before opset 18 (ReduceSum: 13), an input from then on."""

from collections.abc import Callable, Sequence

import torch

from .operator import Converter, NodeView, Operator, with_numbers

_Reduction = Callable[[torch.Tensor, tuple[int, ...], bool], torch.Tensor]


def _prod(x: torch.Tensor, axes: tuple[int, ...], keepdims: bool) -> torch.Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, dim=axis, keepdim=keepdims)
    return x


def _extreme(function: Callable[..., torch.Tensor], sign: int) -> _Reduction:
    """amax or amin, with ONNX's value for an empty set: the end of the type's range."""

    def call(x: torch.Tensor, axes: tuple[int, ...], keepdims: bool) -> torch.Tensor:
        if x.numel():
            return function(x, dim=axes, keepdim=keepdims)
        if x.is_floating_point():
            value = -sign * float("inf")
        else:
            info = torch.iinfo(x.dtype) if x.dtype != torch.bool else None
            value = sign < 0 if info is None else (info.min if sign > 0 else info.max)
        return torch.full_like(x.sum(dim=axes, keepdim=keepdims), value, dtype=x.dtype)

    return call


_REDUCTIONS: dict[str, _Reduction] = {
    "ReduceMean": lambda x, axes, keep: torch.mean(x, dim=axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: torch.sum(x, dim=axes, keepdim=keep),
    "ReduceProd": _prod,
    "ReduceMax": _extreme(torch.amax, 1),
    "ReduceMin": _extreme(torch.amin, -1),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(dim=axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(dim=axes, keepdim=keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(dim=axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(dim=axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, dim=axes, keepdim=keep),
}


def reduce(view: NodeView) -> Operator:
    """A Reduce* operator; no axes means all, or (with `noop_with_empty_axes`) each element for itself."""
    attrs = view.attrs
    keepdims, noop = bool(attrs.get("keepdims", 1)), bool(attrs.get("noop_with_empty_axes", 0))
    function = _REDUCTIONS[view.proto.op_type]

    def call(x: torch.Tensor, axes: Sequence[int] | None = None) -> torch.Tensor:
        if not axes and (noop or x.dim() == 0):
            return function(x.unsqueeze(0), (0,), False).to(x.dtype)
        return function(x, tuple(axes or range(x.dim())), keepdims).to(x.dtype)  # torch sums narrow integers in int64

    if "axes" in attrs:
        axes = list(attrs["axes"])
        return Operator(lambda x: call(x, axes), view.inputs[:1])
    return with_numbers(view, (1,), call)


def arg_reduce(view: NodeView) -> Operator:
    """ArgMax and ArgMin; among equals the first, or (`select_last_index`) the last."""
    attrs = view.attrs
    axis, keepdims, last = attrs.get("axis", 0), bool(attrs.get("keepdims", 1)), bool(attrs.get("select_last_index", 0))
    function = torch.argmax if view.proto.op_type == "ArgMax" else torch.argmin

    def call(x: torch.Tensor) -> torch.Tensor:
        if last:
            return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=keepdims)
        return function(x, dim=axis, keepdim=keepdims)

    return Operator(call, view.inputs)


def cumulative(view: NodeView) -> Operator:
    """CumSum and CumProd along an axis, from either end (`reverse`), each element with or without (`exclusive`) itself."""
    attrs = view.attrs
    exclusive, reverse = bool(attrs.get("exclusive", 0)), bool(attrs.get("reverse", 0))
    function, neutral = (torch.cumsum, 0) if view.proto.op_type == "CumSum" else (torch.cumprod, 1)

    def call(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        axis = int(axes[0])
        y = function(x.flip(axis) if reverse else x, dim=axis).to(x.dtype)
        if exclusive:
            first = torch.full_like(y.narrow(axis, 0, 1), neutral)
            y = torch.cat([first, y.narrow(axis, 0, y.shape[axis] - 1)], dim=axis)
        return y.flip(axis) if reverse else y

    return with_numbers(view, (1,), call)


CONVERTERS: dict[str, Converter] = {
    **dict.fromkeys(_REDUCTIONS, reduce),
    "ArgMax": arg_reduce,
    "ArgMin": arg_reduce,
    "CumSum": cumulative,
    "CumProd": cumulative,
}
