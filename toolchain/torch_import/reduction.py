"""Reductions whose axes are an attribute (before opset 18; ReduceSum before 13) or a constant input."""

import onnx
import torch

from .operator import Constants, Converter, Operator, attributes, constant_input, has_input

_REDUCTIONS = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL1": lambda x, dim, keepdim: x.abs().sum(dim=dim, keepdim=keepdim),
    "ReduceL2": lambda x, dim, keepdim: x.square().sum(dim=dim, keepdim=keepdim).sqrt(),
    "ReduceSumSquare": lambda x, dim, keepdim: x.square().sum(dim=dim, keepdim=keepdim),
    "ReduceLogSumExp": torch.logsumexp,
}


def reduce(node: onnx.NodeProto, constants: Constants) -> Operator | None:
    """A Reduce* operator over constant axes; no axes means all, or none with `noop_with_empty_axes`."""
    attrs = attributes(node)
    given = constant_input(node, 1, constants)
    if has_input(node, 1) and given is None:
        return None
    axes = tuple(int(a) for a in given.reshape(-1)) if given is not None else tuple(attrs.get("axes", ()))
    keepdims = bool(attrs.get("keepdims", 1))
    function = _REDUCTIONS[node.op_type]
    if not axes and attrs.get("noop_with_empty_axes", 0):
        return Operator(lambda x: x, (node.input[0],))
    return Operator(lambda x: function(x, dim=axes or tuple(range(x.dim())), keepdim=keepdims), (node.input[0],))


CONVERTERS: dict[str, Converter] = dict.fromkeys(_REDUCTIONS, reduce)
