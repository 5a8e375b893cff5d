"""Element-wise mathematical functions of one tensor."""

from collections.abc import Callable

import torch

from .operator import Converter, NodeView, Operator, plain

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Det": torch.linalg.det,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,  # half to even, as ONNX
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
}


def is_inf(view: NodeView) -> Operator:
    """IsInf of either sign, or of one."""
    signs = [sign for sign, name in ((1, "detect_positive"), (-1, "detect_negative")) if view.attrs.get(name, 1)]

    def call(x: torch.Tensor) -> torch.Tensor:
        found = torch.zeros_like(x, dtype=torch.bool)
        for sign in signs:
            found = found | (x == sign * float("inf"))
        return found

    return Operator(call, view.inputs)


CONVERTERS: dict[str, Converter] = {**plain(_FUNCTIONS), "IsInf": is_inf}
