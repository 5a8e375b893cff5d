"""Max and average pooling with every padding convention of ONNX."""

import onnx
import torch
import torch.nn.functional as F

from .operator import Constants, Operator, attributes
from .padding import WindowPads

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def max_pool(node: onnx.NodeProto, constants: Constants) -> Operator | None:
    """MaxPool without the index output."""
    attrs = attributes(node)
    if len([output for output in node.output if output]) > 1 or attrs.get("storage_order", 0):
        return None
    pads = WindowPads.of(attrs, attrs["kernel_shape"])
    ceil = bool(attrs.get("ceil_mode", 0))

    def call(x: torch.Tensor) -> torch.Tensor:
        # torch pads by at most half a window, ONNX by any amount: what torch refuses is padded with -inf beforehand.
        inside = pads.symmetric and all(2 * p <= k for p, k in zip(pads.begin, pads.kernel, strict=True))
        if not inside:
            x = pads.pad(x, value=float("-inf"))
        return _MAX[len(pads.kernel)](x, pads.kernel, pads.strides, pads.begin if inside else 0, pads.dilations, ceil)

    return Operator(call, (node.input[0],))


def average_pool(node: onnx.NodeProto, constants: Constants) -> Operator | None:
    """AveragePool; where torch has no such padding, the mean is a sum over the padded input divided by the count of real elements."""
    attrs = attributes(node)
    pads = WindowPads.of(attrs, attrs["kernel_shape"])
    ceil, include = bool(attrs.get("ceil_mode", 0)), bool(attrs.get("count_include_pad", 0))
    if any(d != 1 for d in pads.dilations):
        return None
    pool = _AVERAGE[len(pads.kernel)]

    def call(x: torch.Tensor) -> torch.Tensor:
        if pads.symmetric and all(2 * p <= k for p, k in zip(pads.begin, pads.kernel, strict=True)):
            return pool(x, pads.kernel, pads.strides, pads.begin, ceil_mode=ceil, count_include_pad=include)
        mean = pool(pads.pad(x), pads.kernel, pads.strides, ceil_mode=ceil)
        if include:
            return mean
        ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
        return mean / pool(pads.pad(ones), pads.kernel, pads.strides, ceil_mode=ceil)

    return Operator(call, (node.input[0],))


def global_max_pool(node: onnx.NodeProto, constants: Constants) -> Operator:
    """GlobalMaxPool over all spatial axes."""
    return Operator(lambda x: torch.amax(x, dim=tuple(range(2, x.dim())), keepdim=True), (node.input[0],))
