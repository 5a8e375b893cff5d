"""What a Softmax tells of its input: scores far below the largest of their row come out as zero, wherever they are.

Masked scores are such: where nothing is to be attended to, -10000 or the lowest float is added. A grid that had to hold them would have no
steps left for the others. On one that ends where scores no longer tell, they have its lowest code and still come out as zero; and what is
added to scores need not reach further than that code either.
"""

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch

from .calibration import Histogram
from .flow import Flow
from .graph import Node

# So far below the largest, a score is masked: no grid tells it from another and has steps for the rest.
_MASKED = 1000.0


@dataclass(frozen=True)
class Row:
    """A value as a Softmax reads it: its axis there, and the value that it is, or is a rearrangement of."""

    origin: str
    axis: int


@dataclass(frozen=True)
class Sum:
    """A sum that is scores, or is added to them, and what else is added in it."""

    value: str
    other: str


@dataclass(frozen=True)
class Scores:
    """The quantized values of a model that end up in Softmax and nowhere else.

    `rows`: what Softmax reads, by the name under which it does. `addends`: what is added up to scores, sums before what they are made of.
    """

    rows: Mapping[str, Row] = field(default_factory=dict)
    addends: Mapping[str, tuple[Sum, ...]] = field(default_factory=dict)

    @property
    def values(self) -> frozenset[str]:
        """The quantized values, by name."""
        return frozenset({*(row.origin for row in self.rows.values()), *self.addends})

    def shown(self, name: str, tensor: torch.Tensor, bits: Mapping[str, int]) -> tuple[str, torch.Tensor] | None:
        """The value that a tensor shows something of, and what it shows.

        Args:
            name: of the tensor.
            tensor: any shape, not empty.
            bits: of the quantized values.

        Returns:
            None where it shows nothing: it is not quantized, or is to be seen as it is rearranged.
        """
        row = self.rows.get(name)
        if row is not None:
            return row.origin, _telling(tensor, row.axis, bits[row.origin])
        if name not in bits or any(row.origin == name for row in self.rows.values()):
            return None
        return name, tensor.maximum(tensor.max() - _MASKED) if name in self.addends else tensor

    def limited(self, seen: Mapping[str, Histogram]) -> dict[str, Histogram]:
        """Addends no lower than where their sum, whatever else is added, is below all that was seen of it."""
        found = dict(seen)
        for value, sums in self.addends.items():
            if value in found and all(at.value in found and at.other in found for at in sums):
                found[value] = found[value].above(min(found[at.value].low - found[at.other].high for at in sums))
        return found


def scores_of(flow: Flow, values: AbstractSet[str]) -> Scores:
    """What of some values ends up in Softmax and nowhere else."""
    rows: dict[str, Row] = {}
    sums: set[str] = set()
    addends: dict[str, tuple[Sum, ...]] = {}
    for value in [*reversed([value for node in flow.graph.nodes for value in node.outputs]), *flow.graph.inputs]:
        readers = _readers(flow, value) if value in values else None
        if not readers:
            continue
        read = {name: Row(value, _axis(flow, node)) for node, name in readers}
        if all(node.op_type == "Softmax" and node.is_standard and read[name].axis == _axis(flow, node) for node, name in readers):
            rows |= read
            sums.add(value)
        elif all(node.op_type == "Add" and node.is_standard and node.outputs[0] in sums for node, _ in readers):
            addends[value] = tuple(Sum(node.outputs[0], flow.source(_other(node, name))) for node, name in readers)
            sums.add(value)
    return Scores(rows, addends)


def _telling(scores: torch.Tensor, axis: int, bits: int) -> torch.Tensor:
    """Scores no lower than where they tell something, without the rows that are masked as a whole.

    In a row of D, all that lies ln(2^(bits + 1) D) below the largest comes out as less than half a step of `bits` bits, taken together.
    """
    largest = scores.amax(axis, keepdim=True)
    held = scores.maximum(largest - math.log(2.0 ** (bits + 1) * scores.shape[axis]))
    is_read = largest >= largest.max() - _MASKED
    return held if is_read.all() else held[is_read.expand_as(held)]


def _readers(flow: Flow, value: str) -> list[tuple[Node, str]] | None:
    """The nodes that compute with a value, itself or rearranged, and its name there; None where it is also handed out."""
    if value in flow.graph.outputs or value in flow.copies:
        return None
    found: list[tuple[Node, str]] = []
    for node in flow.graph.readers_of(value):
        if not flow.moves(node):
            found.append((node, value))
            continue
        for output in filter(None, node.outputs):
            below = _readers(flow, output)
            if below is None:
                return None
            found += below
    return found


def _axis(flow: Flow, softmax: Node) -> int:
    return next((a.i for a in flow.model.node_protos[softmax.name].attribute if a.name == "axis"), -1)


def _other(add: Node, value: str) -> str:
    return add.inputs[1] if add.inputs[0] == value else add.inputs[0]
