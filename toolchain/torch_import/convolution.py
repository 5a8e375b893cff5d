"""Conv and ConvTranspose with the weight as an argument in its ONNX layout, so that a quantized weight can take its place."""

from typing import Any

import torch
import torch.nn.functional as F

from .operator import Converter, NodeView, Operator
from .padding import WindowPads, to_torch

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
# Channels in a group from which bfloat16 pays: with AMX it is 1.5 times as fast at 8, as fast at 4, and a depthwise 5x5 is slower.
_FILLING = 8


def conv(view: NodeView) -> Operator:
    """Conv of 1 to 3 spatial axes, any padding."""
    _check_rank(view)
    attrs = view.attrs

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        pads = WindowPads.of(attrs, weight.shape[2:])
        if not pads.symmetric:
            x = pads.pad(x)
        padding = pads.begin if pads.symmetric else 0
        arguments = pads.strides, padding, pads.dilations, attrs.get("group", 1)
        if bias is None or not bias.requires_grad:
            return _CONV[weight.dim() - 2](x, weight, bias, *arguments)
        return _AddedBias.apply(_CONV[weight.dim() - 2](x, weight, bias.detach(), *arguments), bias)  # pyright: ignore[reportReturnType]

    return Operator(call, view.inputs, narrows=_fills_matrices(view))


def conv_transpose(view: NodeView) -> Operator:
    """ConvTranspose with every padding convention: what torch has no argument for is cut out of the unpadded result."""
    _check_rank(view)
    attrs = view.attrs
    group, wanted = attrs.get("group", 1), attrs.get("output_shape")

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rank = weight.dim() - 2
        function = _CONV_TRANSPOSE[rank]
        pads = WindowPads.of(attrs, weight.shape[2:])
        extra = attrs.get("output_padding", [0] * rank)
        if pads.symmetric and wanted is None:
            return function(x, weight, bias, pads.strides, pads.begin, extra, group, pads.dilations)
        full = function(x, weight, None, pads.strides, 0, 0, group, pads.dilations)
        natural = [size + more for size, more in zip(full.shape[2:], extra, strict=True)]
        begin, sizes = _output_window(pads, natural, x.shape[2:], wanted[-rank:] if wanted else None)
        after = [low + size - have for low, size, have in zip(begin, sizes, full.shape[2:], strict=True)]
        y = F.pad(full, to_torch([-low for low in begin], after))
        return y if bias is None else y + bias.reshape(-1, *[1] * rank)

    return Operator(call, view.inputs, narrows=_fills_matrices(view))


class _AddedBias(torch.autograd.Function):
    """The gradient of a bias that a convolution has added: the sum over samples and space.

    oneDNN sums it up to fifty times slower, within the gradient of the weights: a quarter of a step of depthwise layers.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        return grad, grad.sum(dim=list(range(2, grad.dim()))).sum(dim=0)


def _output_window(pads: WindowPads, natural: list[int], spatial: torch.Size, wanted: list[int] | None) -> tuple[list[int], list[int]]:
    """(first index, size) of the result within the unpadded transposed convolution, for each axis."""
    if wanted is None and pads.auto == "NOTSET":
        return list(pads.begin), [n - low - high for n, low, high in zip(natural, pads.begin, pads.end, strict=True)]
    sizes = wanted or [min(n, size * stride) for n, size, stride in zip(natural, spatial, pads.strides, strict=True)]
    totals = [max(n - size, 0) for n, size in zip(natural, sizes, strict=True)]
    return [t // 2 if pads.auto == "SAME_UPPER" else t - t // 2 for t in totals], list(sizes)


def _fills_matrices(view: NodeView) -> bool:
    shape = view.shape(1)
    return view.attrs.get("group", 1) == 1 or (shape is not None and (shape[1] or 0) >= _FILLING)


def _check_rank(view: NodeView) -> None:
    shape = view.shape(1) or view.shape(0)
    if shape is not None and len(shape) - 2 not in _CONV:
        view.refuse(f"it has {len(shape) - 2} spatial axes, torch convolves over 1 to 3")


CONVERTERS: dict[str, Converter] = {"Conv": conv, "ConvTranspose": conv_transpose}
