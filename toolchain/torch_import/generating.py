"""Operators that make tensors of numbers: shapes, ranges, fills, triangles. What is computed from shapes alone stays on the CPU."""

import numpy as np
import torch
from onnx import TensorProto, numpy_helper

from .casting import DTYPES
from .operator import Converter, NodeView, Operator


def shape(view: NodeView) -> Operator:
    """Shape, or the part of it from `start` to `end`."""
    part = slice(view.attrs.get("start", 0), view.attrs.get("end"))
    return Operator(lambda x: torch.tensor(x.shape[part], dtype=torch.int64), view.inputs)


def size(view: NodeView) -> Operator:
    """Size: the number of elements."""
    return Operator(lambda x: torch.tensor(x.numel(), dtype=torch.int64), view.inputs)


def constant(view: NodeView) -> Operator:
    """Constant; it is a host value like every other that depends on no input."""
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    kind = next(iter(view.attrs))
    if kind != "value" and kind not in kinds:
        view.refuse(f"its {kind} is no dense tensor of numbers")
    array = numpy_helper.to_array(view.attrs[kind]) if kind == "value" else np.array(view.attrs[kind], kinds[kind])
    tensor = torch.from_numpy(np.array(array))
    return Operator(lambda: tensor, ())


def constant_of_shape(view: NodeView) -> Operator:
    """ConstantOfShape."""
    value = numpy_helper.to_array(view.attrs["value"]).reshape(-1) if "value" in view.attrs else None
    number = value[0].item() if value is not None else 0.0
    dtype = DTYPES.get(view.attrs["value"].data_type if value is not None else TensorProto.FLOAT)
    if dtype is None:
        view.refuse("torch does not compute with the type of its value")
    return Operator(lambda sizes: torch.full(sizes.tolist(), number, dtype=dtype, device=sizes.device), view.inputs, frozenset({0}))


def range_(view: NodeView) -> Operator:
    """Range from `start` to `limit` in steps of `delta`."""

    def call(start: torch.Tensor, limit: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        first, step = start.item(), delta.item()
        count = max(-int(-(limit.item() - first) // step), 0)
        return torch.arange(count, dtype=start.dtype, device=start.device) * step + first

    return Operator(call, view.inputs, frozenset({0, 1, 2}))


def eye_like(view: NodeView) -> Operator:
    """EyeLike: ones on diagonal `k`."""
    k, to = view.attrs.get("k", 0), view.attrs.get("dtype")
    if to is not None and to not in DTYPES:
        view.refuse("torch does not compute with its type")

    def call(x: torch.Tensor) -> torch.Tensor:
        row, column = (torch.arange(n, device=x.device) for n in x.shape)
        return (column == row.unsqueeze(1) + k).to(DTYPES[to] if to is not None else x.dtype)

    return Operator(call, view.inputs)


def trilu(view: NodeView) -> Operator:
    """Trilu: the upper or lower triangle, from diagonal `k` on."""
    function = torch.triu if view.attrs.get("upper", 1) else torch.tril
    if view.has(1) and view.constant(1) is None:
        return Operator(lambda x, k: function(x, int(k)), view.inputs, frozenset({1}))
    given = view.constant(1)
    k = int(given.reshape(-1)[0]) if given is not None else 0
    return Operator(lambda x: function(x, k), view.inputs[:1])


CONVERTERS: dict[str, Converter] = {
    "Constant": constant,
    "Shape": shape,
    "Size": size,
    "ConstantOfShape": constant_of_shape,
    "Range": range_,
    "EyeLike": eye_like,
    "Trilu": trilu,
}
