"""Activation functions, each with ONNX's defaults."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .arithmetic import clamp
from .operator import Converter, NodeView, Operator, plain

_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
}


def _relu(view: NodeView) -> Operator:
    return Operator(torch.relu, view.inputs, bounds=(0.0, math.inf))


def _leaky_relu(view: NodeView) -> Operator:
    alpha = view.attrs.get("alpha", 0.01)
    return Operator(lambda x: F.leaky_relu(x, alpha), view.inputs)


def _prelu(view: NodeView) -> Operator:
    return Operator(lambda x, slope: torch.where(x < 0, x * slope, x), view.inputs)


def _elu(view: NodeView) -> Operator:
    alpha = view.attrs.get("alpha", 1.0)
    return Operator(lambda x: F.elu(x, alpha), view.inputs)


def _celu(view: NodeView) -> Operator:
    alpha = view.attrs.get("alpha", 1.0)
    return Operator(lambda x: F.celu(x, alpha), view.inputs)


def _selu(view: NodeView) -> Operator:
    alpha, gamma = view.attrs.get("alpha", 1.67326319217681884765625), view.attrs.get("gamma", 1.05070102214813232421875)
    return Operator(lambda x: gamma * F.elu(x, alpha), view.inputs)


def _thresholded_relu(view: NodeView) -> Operator:
    alpha = view.attrs.get("alpha", 1.0)
    return Operator(lambda x: torch.where(x > alpha, x, torch.zeros_like(x)), view.inputs)


def _hard_sigmoid(view: NodeView) -> Operator:
    alpha, beta = view.attrs.get("alpha", 0.2), view.attrs.get("beta", 0.5)
    return Operator(lambda x: clamp(alpha * x + beta, 0.0, 1.0), view.inputs)


def _shrink(view: NodeView) -> Operator:
    bias, lambd = view.attrs.get("bias", 0.0), view.attrs.get("lambd", 0.5)

    def call(x: torch.Tensor) -> torch.Tensor:
        y = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))
        return y.to(x.dtype)

    return Operator(call, view.inputs)


def _gelu(view: NodeView) -> Operator:
    approximate = view.attrs.get("approximate", "none")
    return Operator(lambda x: F.gelu(x, approximate=approximate), view.inputs)


def _swish(view: NodeView) -> Operator:
    alpha = view.attrs.get("alpha", 1.0)
    return Operator(lambda x: F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x), view.inputs)


def _swiglu(view: NodeView) -> Operator:
    alpha = view.attrs.get("alpha", 1.0)
    return Operator(lambda gate, value: gate * torch.sigmoid(alpha * gate) * value, view.inputs)


def softmax(view: NodeView) -> Operator:
    """Softmax, LogSoftmax and Hardmax over one axis or, before opset 13, over all axes from `axis` on taken as one."""
    function = {"Softmax": torch.softmax, "LogSoftmax": torch.log_softmax, "Hardmax": _hardmax}[view.proto.op_type]
    axis = view.attrs.get("axis", -1 if view.opset >= 13 else 1)
    if view.opset >= 13:
        return Operator(lambda x: function(x, dim=axis), view.inputs)

    def call(x: torch.Tensor) -> torch.Tensor:
        return function(x.flatten(axis % x.dim()), dim=-1).reshape(x.shape)

    return Operator(call, view.inputs)


def _hardmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.zeros_like(x).scatter(dim, torch.argmax(x, dim=dim, keepdim=True), 1.0)


CONVERTERS: dict[str, Converter] = {
    **plain(_PLAIN),
    "Relu": _relu,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Elu": _elu,
    "Celu": _celu,
    "Selu": _selu,
    "ThresholdedRelu": _thresholded_relu,
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "Swish": _swish,
    "SwiGLU": _swiglu,
    "Shrink": _shrink,
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "Hardmax": softmax,
}
