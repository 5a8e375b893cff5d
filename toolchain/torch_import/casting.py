"""Operators that change the type of a tensor or nothing at all."""

import torch
from onnx import TensorProto

from .operator import Converter, NodeView, Operator

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}
"""The element types that are computed with in torch: those that its kernels cover."""


def type_name(dtype: int) -> str:
    """ONNX's name of an element type, in small letters."""
    return TensorProto.DataType.Name(dtype).lower()


def cast(view: NodeView) -> Operator:
    """Cast to a type that torch computes with."""
    return _to(view, view.attrs["to"], view.inputs)


def cast_like(view: NodeView) -> Operator:
    """CastLike: the type is that of the second input, whose elements do not matter."""
    dtype = view.dtype(1)
    if dtype is None:
        return Operator(lambda x, like: x.to(like.dtype), view.inputs)
    return _to(view, dtype, view.inputs[:1])


def bit_cast(view: NodeView) -> Operator:
    """BitCast: the same bits read as another type of the same width."""
    dtype = _torch_type(view, view.attrs["to"])
    return Operator(lambda x: x.view(dtype), view.inputs)


def identity(view: NodeView) -> Operator:
    """Identity."""
    return Operator(lambda x: x, view.inputs)


def dropout(view: NodeView) -> Operator:
    """Dropout at inference: nothing is dropped, the mask is all true."""
    training = view.settled(2, "training mode")
    if training is not None and training.any():
        ratio = view.settled(1, "ratio")
        if ratio is None or ratio.any():
            view.refuse("it is in training mode")
    with_mask = view.has_output(1)

    def call(x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return (x, torch.ones_like(x, dtype=torch.bool)) if with_mask else x

    return Operator(call, view.inputs[:1])


def _to(view: NodeView, to: int, inputs: tuple[str, ...]) -> Operator:
    dtype = _torch_type(view, to)
    return Operator(lambda x: x.to(dtype), inputs)


def _torch_type(view: NodeView, dtype: int) -> torch.dtype:
    if dtype not in DTYPES:
        view.refuse(f"torch does not compute with {type_name(dtype)}")
    return DTYPES[dtype]


CONVERTERS: dict[str, Converter] = {
    "Cast": cast,
    "CastLike": cast_like,
    "BitCast": bit_cast,
    "Identity": identity,
    "Dropout": dropout,
}
