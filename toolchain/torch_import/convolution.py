"""Conv and ConvTranspose with the weight as an argument in its ONNX layout, so that a quantized weight can take its place."""

import onnx
import torch
import torch.nn.functional as F

from .operator import Constants, Operator, attributes
from .padding import WindowPads

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv(node: onnx.NodeProto, constants: Constants) -> Operator:
    """Conv of 1 to 3 spatial axes, any padding."""
    attrs = attributes(node)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        pads = WindowPads.of(attrs, weight.shape[2:])
        if not pads.symmetric:
            x = pads.pad(x)
        padding = pads.begin if pads.symmetric else 0
        return _CONV[weight.dim() - 2](x, weight, bias, pads.strides, padding, pads.dilations, attrs.get("group", 1))

    return Operator(call, tuple(node.input))


def conv_transpose(node: onnx.NodeProto, constants: Constants) -> Operator | None:
    """ConvTranspose with explicit padding; asymmetric pads are cut off the output."""
    attrs = attributes(node)
    if "output_shape" in attrs or attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rank = weight.dim() - 2
        pads = WindowPads.of(attrs, weight.shape[2:])
        extra = attrs.get("output_padding", [0] * rank)
        function = _CONV_TRANSPOSE[rank]
        if pads.symmetric:
            return function(x, weight, bias, pads.strides, pads.begin, extra, attrs.get("group", 1), pads.dilations)
        y = function(x, weight, bias, pads.strides, 0, extra, attrs.get("group", 1), pads.dilations)
        for axis, (low, high) in enumerate(zip(pads.begin, pads.end, strict=True), start=2):
            y = y.narrow(axis, low, y.shape[axis] - low - high)
        return y

    return Operator(call, tuple(node.input))
