"""Reshape and Slice with constant shapes, read once at import: no tensor is inspected while the block runs."""

import onnx
import torch

from .operator import Constants, Operator, attributes, constant_input


def reshape(node: onnx.NodeProto, constants: Constants) -> Operator | None:
    """Reshape; 0 copies the input's axis unless `allowzero`."""
    shape = constant_input(node, 1, constants)
    if shape is None:
        return None
    sizes = [int(s) for s in shape.reshape(-1)]
    keep = not attributes(node).get("allowzero", 0)

    def call(x: torch.Tensor) -> torch.Tensor:
        return x.reshape([x.shape[i] if s == 0 and keep else s for i, s in enumerate(sizes)])

    return Operator(call, (node.input[0],))


def slice_(node: onnx.NodeProto, constants: Constants) -> Operator | None:
    """Slice with constant starts, ends, axes and positive steps."""
    parts = [constant_input(node, index, constants) for index in range(1, len(node.input))]
    absent = [node.input[index] == "" for index in range(1, len(node.input))]
    if any(part is None and not missing for part, missing in zip(parts, absent, strict=True)) or len(parts) < 2:
        return None
    starts, ends, axes, steps = ([int(v) for v in p.reshape(-1)] if p is not None else None for p in [*parts, None, None][:4])
    assert starts is not None
    assert ends is not None
    axes = axes if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    if min(steps, default=1) < 1:
        return None

    def call(x: torch.Tensor) -> torch.Tensor:
        index = [slice(None)] * x.dim()
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            index[axis] = slice(max(start, -x.shape[axis]), end, step)
        return x[tuple(index)]

    return Operator(call, (node.input[0],))
