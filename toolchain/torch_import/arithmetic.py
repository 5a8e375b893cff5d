"""Element-wise operators of two or more tensors: arithmetic, comparisons, logic, bits. Broadcasting is NumPy's, which is torch's."""

import math
from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F

from .operator import Converter, NodeView, Operator, plain

_PLAIN: dict[str, Callable[..., torch.Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Where": torch.where,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Not": torch.logical_not,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "BitwiseNot": torch.bitwise_not,
}
_VARIADIC: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "Sum": torch.add,
    "Max": torch.maximum,
    "Min": torch.minimum,
}


def variadic(view: NodeView) -> Operator:
    """Sum, Max and Min of any number of tensors."""
    function = _VARIADIC[view.proto.op_type]
    return Operator(lambda *tensors: reduce(function, tensors), view.inputs)


def mean(view: NodeView) -> Operator:
    """Mean of any number of tensors."""
    return Operator(lambda *tensors: reduce(torch.add, tensors) / len(tensors), view.inputs)


def div(view: NodeView) -> Operator:
    """Div; integers are divided towards zero."""

    def call(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")

    return Operator(call, view.inputs)


def mod(view: NodeView) -> Operator:
    """Mod: the sign of the divisor, or (`fmod`) of the dividend."""
    return Operator(torch.fmod if view.attrs.get("fmod", 0) else torch.remainder, view.inputs)


def pow_(view: NodeView) -> Operator:
    """Pow; the result has the type of the base, whatever that of the exponent."""
    exponent = view.constant(1)
    if exponent is not None and exponent.size == 1 and exponent.ndim == 0:
        number = exponent.item()
        return Operator(lambda x: torch.pow(x, number).to(x.dtype), view.inputs[:1])
    return Operator(lambda x, y: torch.pow(x, y).to(x.dtype), view.inputs)


def bit_shift(view: NodeView) -> Operator:
    """BitShift in either direction."""
    return Operator(torch.bitwise_left_shift if view.attrs["direction"] == "LEFT" else torch.bitwise_right_shift, view.inputs)


def clip(view: NodeView) -> Operator:
    """Clip of every version: bounds are attributes before opset 11, optional scalars from then on."""
    if view.opset < 11:
        low, high = view.attrs.get("min"), view.attrs.get("max")
    else:
        bounds = [view.constant(index) for index in (1, 2)]
        if any(bound is None and view.has(index) for index, bound in enumerate(bounds, start=1)):
            return Operator(_clip, view.inputs)
        low, high = (bound.reshape(-1)[0].item() if bound is not None else None for bound in bounds)
    if low is None and high is None:
        return Operator(lambda x: x, view.inputs[:1])
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    return Operator(lambda x: clamp(x, low, high), view.inputs[:1], bounds=bounds if bounds[0] < bounds[1] else None)


def clamp(x: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    """`torch.clamp`; of floats by another name, whose gradient is the same and several times faster on CPUs (no selection by masks)."""
    if not x.is_floating_point():
        return torch.clamp(x, low, high)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return F.hardtanh(x, low, high) if low < high else torch.clamp(x, low, high)


def _clip(x: torch.Tensor, low: torch.Tensor | None = None, high: torch.Tensor | None = None) -> torch.Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


CONVERTERS: dict[str, Converter] = {
    **plain(_PLAIN),
    **dict.fromkeys(_VARIADIC, variadic),
    "Mean": mean,
    "Div": div,
    "Mod": mod,
    "Pow": pow_,
    "BitShift": bit_shift,
    "Clip": clip,
}
