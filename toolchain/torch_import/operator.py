"""What a converter is told of a node, and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import onnx
import torch

from ..source import ValueTypes

Constants = Mapping[str, np.ndarray]  # the small constants (shapes, axes, pads, bounds) that a converter may read at import


class Refused(Exception):  # noqa: N818  (an answer, which import_block turns into an error of the project)
    """A converter does not cover what the node asks for; the message is the reason."""


@dataclass(frozen=True)
class Operator:
    """A torch callable for one ONNX node and the value names of its tensor arguments, in order ("" for None).

    `host` are the positions of arguments that are read as numbers while the block runs (computed shapes and axes): they stay on the CPU.
    `bounds` are those of an operator that does nothing but hold its only argument between two numbers. `narrows`: it sums products, which
    a device with matrix units computes several times faster in bfloat16.
    """

    call: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: tuple[str, ...]
    host: frozenset[int] = frozenset()
    bounds: tuple[float, float] | None = None
    narrows: bool = False


@dataclass(frozen=True)
class NodeView:
    """One node as a converter sees it at import: attributes, small constants, and what is known of its inputs' types and shapes.

    Inputs are asked for by position. Attributes that became inputs in a later opset are read by both names where a converter wants that.
    """

    proto: onnx.NodeProto
    opset: int
    constants: Constants
    types: ValueTypes
    arrays: Mapping[str, np.ndarray]  # every constant, of any size

    @cached_property
    def attrs(self) -> Mapping[str, Any]:
        """The attributes as Python values; strings are decoded."""
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in self.proto.attribute}
        return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.proto.input)

    @property
    def outputs(self) -> int:
        """The number of outputs up to the last one that is there."""
        return max((i + 1 for i, name in enumerate(self.proto.output) if name), default=0)

    def has(self, index: int) -> bool:
        """Whether an optional input is there."""
        return len(self.proto.input) > index and self.proto.input[index] != ""

    def has_output(self, index: int) -> bool:
        """Whether an optional output is there."""
        return len(self.proto.output) > index and self.proto.output[index] != ""

    def constant(self, index: int) -> np.ndarray | None:
        """The constant at an input position, or None when it is absent or computed."""
        return self.constants.get(self.proto.input[index]) if self.has(index) else None

    def settled(self, index: int, what: str) -> np.ndarray | None:
        """The constant at an input position, None when it is absent.

        Raises:
            Refused: it is computed.
        """
        value = self.constant(index)
        if value is None and self.has(index):
            self.refuse(f"its {what} are computed, not constant")
        return value

    def dtype(self, index: int) -> int | None:
        """The element type of an input (TensorProto.DataType), None where it is not known or the input is absent."""
        if not self.has(index):
            return None
        name = self.proto.input[index]
        if name in self.arrays:
            return onnx.helper.np_dtype_to_tensor_dtype(self.arrays[name].dtype)
        return self.types.dtypes.get(name) or None

    def shape(self, index: int) -> tuple[int | None, ...] | None:
        """The shape of an input; None in place of the first axis of computed values, and for a shape that is not known."""
        if not self.has(index):
            return None
        name = self.proto.input[index]
        if name in self.arrays:
            return self.arrays[name].shape
        return (None, *self.types.shapes[name]) if name in self.types.shapes else None

    def rank(self, index: int) -> int:
        """The number of axes of an input.

        Raises:
            Refused: it is not known.
        """
        shape = self.shape(index)
        if shape is None:
            self.refuse(f"the rank of its input {self.proto.input[index]!r} is not known")
        return len(shape)

    def refuse(self, reason: str) -> NoReturn:
        raise Refused(reason)


Converter = Callable[[NodeView], Operator]
"""Raises Refused where the node uses something that it does not cover exactly."""


def plain(calls: Mapping[str, Callable[..., torch.Tensor]]) -> dict[str, Converter]:
    """Converters of operators that torch has under another name, without attributes."""
    return {name: lambda view, call=call: Operator(call, view.inputs) for name, call in calls.items()}


def with_numbers(view: NodeView, positions: Sequence[int], call: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]) -> Operator:
    """An operator that takes the inputs at `positions` (shapes, axes, bounds) as flat lists of numbers.

    Constants are read now; computed ones while the block runs, where they are host values in all but odd models; absent ones are None.
    """
    fixed = {i: value.reshape(-1).tolist() for i in positions if (value := view.constant(i)) is not None}
    kept = [i for i in range(len(view.inputs)) if i not in fixed]

    def run(*tensors: torch.Tensor | None) -> torch.Tensor | tuple[torch.Tensor, ...]:
        arguments: list[Any] = [fixed.get(i) for i in range(len(view.inputs))]
        for index, tensor in zip(kept, tensors, strict=True):
            arguments[index] = tensor.reshape(-1).tolist() if tensor is not None and index in positions else tensor
        return call(*arguments)

    host = frozenset(position for position, index in enumerate(kept) if index in positions)
    return Operator(run, tuple(view.inputs[i] for i in kept), host)
