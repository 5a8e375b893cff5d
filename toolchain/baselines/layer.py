"""One weighted node as the algorithms that go layer by layer see it: what it reads, what it should make, and how its tables compare."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..activations import Passes, Value, laid_out, quantizing, run_piece
from ..graph import Node
from ..losses import full_loss
from ..quant_table import QuantTable
from ..reconstruction import CurvePoint, Finish, UnitResult
from ..torch_import import TorchBlock


@dataclass(frozen=True)
class Layer:
    """A piece that ends with a weighted node, and its samples in both streams.

    Attributes:
        piece: the node and what leads to it from the layer before: its activation, additions, pooling.
        node: the weighted node.
        floats: weights and biases of the piece by name; those that an earlier layer has learned are on their grids.
        inputs: what the piece reads in the quantized stream.
        targets: the node's output in the float stream, by its name.
        passes: how the samples of these are split.
        device: where they are.
    """

    piece: TorchBlock
    node: Node
    floats: Mapping[str, np.ndarray]
    inputs: Mapping[str, Value]
    targets: Mapping[str, Value]
    passes: Passes
    device: torch.device

    @classmethod
    def of(
        cls,
        piece: TorchBlock,
        table: QuantTable,
        weights: Sequence[str],
        floats: Mapping[str, np.ndarray],
        inputs: Mapping[str, Value],
        made: Mapping[str, Value],
        passes: Passes,
        device: torch.device,
    ) -> "Layer":
        """The layer of a piece whose one learned weight is given, under a table without biases; `made` holds its float outputs."""
        assert len(weights) == 1, "pieces are cut behind each weighted node"
        node = next(node for node in reversed(piece.block.nodes) if weights[0] in node.inputs)
        own = {name: table[name].dequantized() if name in table and name not in weights else floats[name] for name in piece.weights}
        return cls(piece, node, own, inputs, {node.outputs[0]: made[node.outputs[0]]}, passes, device)

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

    def constants(self, table: QuantTable | None = None) -> dict[str, torch.Tensor]:
        """Weights and biases, in float or as a table has them."""
        return {
            name: laid_out(torch.tensor(table[name].dequantized() if table is not None and name in table else array)).to(self.device)
            for name, array in self.floats.items()
        }

    def outcome(self, table: QuantTable) -> tuple[float, dict[str, Value]]:
        """The hard-quantized loss over all samples under a table, and all outputs of the piece."""
        outputs = run_piece(self.piece, self.inputs, self.constants(table), self.passes, quantizing(table))
        return full_loss(outputs, self.targets, self.passes), outputs


def finished(
    layer: Layer,
    table: QuantTable,
    learn: Callable[[QuantTable], tuple[QuantTable, tuple[CurvePoint, ...]]],
    finish: Finish,
    iterations: int,
) -> tuple[UnitResult, dict[str, Value]]:
    """Learn a layer, and keep the better of what it had and what it learned.

    Args:
        layer: the layer.
        table: its grids, with the codes of rounding to nearest.
        learn: makes a finished table from the finished table to start with.
        finish: completes a table with what follows from it (biases, tied values).
        iterations: for the result.
    """
    started = time.perf_counter()
    before = finish(table)
    loss_before, _ = layer.outcome(before)
    after, curve = learn(before)
    loss_after, outputs = layer.outcome(after)
    is_better = loss_after < loss_before
    if not is_better:
        del outputs
        _, outputs = layer.outcome(before)
    best = after if is_better else before
    result = UnitResult(
        unit=layer.piece.block.name,
        loss_before=loss_before,
        loss_after=loss_after,
        kept="learned" if is_better else "initial",
        iterations=iterations,
        seconds=time.perf_counter() - started,
        flipped=float(np.mean(after[layer.weight].codes != before[layer.weight].codes)),
        undecided=None,
        curve=curve,
        changes={name: grid for name, grid in best.tensors.items() if name not in table or grid is not table[name]},
    )
    return result, outputs
