"""One weighted node as the algorithms that go layer by layer see it: what it reads, what it should make, and how its tables compare."""

from dataclasses import dataclass

import numpy as np
import torch

from ..activations import Value, constants_of
from ..graph import Node
from ..unit import Unit


@dataclass(frozen=True)
class Layer:
    """A unit that ends with a weighted node, and aims at that node's output.

    Attributes:
        unit: the node and what leads to it from the layer before: its activation, additions, pooling.
        node: the weighted node.
        floats: weights and biases of the unit by name; those that an earlier layer has learned are on their grids.
    """

    unit: Unit
    node: Node
    floats: dict[str, np.ndarray]

    @classmethod
    def of(cls, unit: Unit) -> "Layer":
        """The layer of a unit with one learned weight."""
        assert len(unit.weights) == 1, "pieces are cut behind each weighted node"
        node = next(node for node in reversed(unit.piece.block.nodes) if unit.weights[0] in node.inputs)
        return cls(unit.aiming_at(node.outputs[:1]), node, unit.given)

    @property
    def weight(self) -> str:
        return self.node.inputs[1]

    @property
    def bias(self) -> str | None:
        """The name of its constant bias."""
        return next((name for name in self.node.inputs[2:] if name in self.floats), None)

    @property
    def output(self) -> str:
        return self.node.outputs[0]

    @property
    def target(self) -> Value:
        """The node's output in the float stream."""
        return self.unit.targets[self.output]

    def constants(self) -> dict[str, torch.Tensor]:
        """Weights and biases as they are given."""
        return constants_of(self.floats, self.floats, None, self.unit.device)
