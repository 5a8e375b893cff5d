"""What a converter returns, and how it reads a node."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch

Constants = Mapping[str, np.ndarray]  # the small constants (shapes, axes, pads, bounds) that a converter may read at import


@dataclass(frozen=True)
class Operator:
    """A torch callable for one ONNX node and the value names of its tensor arguments, in order ("" for None)."""

    call: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: tuple[str, ...]


Converter = Callable[[onnx.NodeProto, Constants], Operator | None]
"""Returns None where the node uses something that this converter does not cover (then onnx2torch is asked)."""


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values; strings are decoded."""
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def constant_input(node: onnx.NodeProto, index: int, constants: Constants) -> np.ndarray | None:
    """The constant at an input position, or None when it is absent or computed."""
    return constants.get(node.input[index]) if len(node.input) > index else None


def has_input(node: onnx.NodeProto, index: int) -> bool:
    """Whether an optional input is there."""
    return len(node.input) > index and node.input[index] != ""
