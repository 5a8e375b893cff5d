"""LAPQ: the step sizes of all layers are found together, on the loss of the whole network.

Nahshan, Chmiel, Baskin, Zheltonozhskii, Banner, Bronstein, Mendelson, "Loss aware post-training quantization" (2019).

Implemented, in the paper's three steps:

1. every step size is the one with the least L_p error of its own tensor, for several p (section 4.1);
2. a parabola through the network's loss over p gives the p to start from (section 4.2);
3. Powell's method minimises the loss over all step sizes jointly (section 4.3).

The loss is that of the calibration samples: the cross entropy with their labels where they have any, as in the paper; else with the
probabilities of the float model, or, for outputs that are no class scores, the squared error relative to the float outputs' energy.

What differs: the weights of a layer have a step for each channel here. Each is L_p optimal, and Powell's method moves one factor for all of
a layer, so that the number of dimensions is the paper's. Factors are searched on a logarithmic scale. The steps of activations whose grid
is given (shared, or of a known range) stay. Biases are corrected afterwards (section 4.4 and the authors' code).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from ..activations import ActivationCache, Passes, TorchModel, Value, unpacked
from ..losses import learnable
from ..placement import Placement
from ..progress import Progress
from ..quant_table import QuantTable, TensorQuant
from ..quant_table import quantize as encode
from ..samples import Samples
from . import powell

NORMS = np.linspace(2.0, 4.0, 10)
_STEP = 0.1  # first change of a step size, 10 %
_BOUND = float(np.log(4.0))  # of a factor: the int32 codes of biases have room for no more

Finish = Callable[[int, QuantTable], QuantTable]
"""Completes a table with what follows from it in a piece, whose number is given: biases."""


class NetworkLoss:
    """The loss of the calibration samples under step sizes that are factors exp(x) of given ones.

    A change of one layer leaves the layers before it as they are: `settle` holds the stream in front of the first piece that can change,
    and only what follows is run.
    """

    def __init__(
        self, model: TorchModel, placement: Placement, table: QuantTable, samples: Samples, finish: Finish, aim: "Aim | None" = None
    ) -> None:
        self._model, self._placement, self._table, self._samples, self._finish = model, placement, table, samples, finish
        self.aim = aim or Aim.of(model, samples)
        first = {name: position for position, piece in reversed(list(enumerate(model.pieces))) for name in _touched(piece)}
        movable = [
            name
            for name, grid in table.tensors.items()
            if (grid.codes is not None and name in placement.weights) or (grid.codes is None and grid.tied_to is None and not grid.fixed)
        ]
        # In the order of execution; grids of graph inputs act before the first piece.
        self.names = tuple(sorted(movable, key=lambda name: -1 if name in model.source.graph.inputs else first.get(name, 0)))
        self._pieces = [-1 if name in model.source.graph.inputs else first.get(name, 0) for name in self.names]
        self._known: dict[str, tuple[float, TensorQuant]] = {name: (0.0, table[name]) for name in self.names}
        self._base = np.zeros(len(self.names))
        self._at, self._stream = -1, None

    def table(self, x: np.ndarray) -> QuantTable:
        """The grids, weights with codes, under factors exp(x)."""
        for name, value in zip(self.names, x.tolist(), strict=True):
            if self._known[name][0] != value:
                grid = self._table[name]
                found = replace(grid, scale=np.asarray(grid.scale * np.float32(np.exp(value)), np.float32)[()])
                if grid.codes is not None:
                    found = replace(found, codes=encode(self._model.source.constants[name], found))
                self._known[name] = value, found
        changed = {name: found for name, (_, found) in self._known.items()}
        table = self._table.updated(changed)
        return table.updated({name: replace(table[origin], tied_to=origin) for name, origin in self._placement.tied.items()})

    def settle(self, x: np.ndarray, lowest: int) -> None:
        """Hold the stream in front of the first piece that coordinates from `lowest` on can change."""
        place = self._pieces[lowest]
        unchanged = [p for p, (a, b) in zip(self._pieces, zip(x, self._base, strict=True), strict=True) if a != b]
        if self._stream is None or place < self._at or (unchanged and min(unchanged) < self._at):
            self._at, self._stream = -1, None
        self._base = x.copy()
        if place < 0:
            return
        table = self.table(x)
        stream = self._stream or self._model.stream(self._samples.inputs, table)
        for position in range(max(self._at, 0), place):
            self._advance(stream, position, table)
        self._at, self._stream = place, stream

    def __call__(self, x: np.ndarray) -> float:
        table = self.table(x)
        changed = [p for p, (a, b) in zip(self._pieces, zip(x, self._base, strict=True), strict=True) if a != b]
        reusable = self._stream is not None and all(p >= self._at for p in changed)
        stream = self._stream.fork() if reusable and self._stream is not None else self._model.stream(self._samples.inputs, table)
        for position in range(self._at if reusable else 0, len(self._model.pieces)):
            self._advance(stream, position, table)
        return self.aim.loss(stream.of(self._model.source.graph.outputs), stream.passes)

    def _advance(self, stream: ActivationCache, position: int, table: QuantTable) -> None:
        piece = self._model.pieces[position]
        stream.advance(self._model.run(piece, stream, self._finish(position, table)))


def _touched(piece: object) -> list[str]:
    """The values that a piece makes and the weights that it holds."""
    return [*(value for node in piece.block.nodes for value in node.outputs), *piece.weights]  # pyright: ignore[reportAttributeAccessIssue]


class Aim:
    """What the outputs are compared with."""

    def __init__(self, targets: Mapping[str, Value], labels: torch.Tensor | None, scores: str | None) -> None:
        """`scores` names the output of class scores; what it compares is then log probabilities."""
        self._targets, self._labels, self._scores = targets, labels, scores

    @classmethod
    def of(cls, model: TorchModel, samples: Samples) -> "Aim":
        """The float model's outputs over the samples, or their labels."""
        graph, stream = model.source.graph, model.stream(samples.inputs)
        for piece in model.pieces:
            stream.advance(model.run(piece, stream))
        outputs = stream.of(graph.outputs)
        names = learnable(outputs)
        value = outputs[names[0]] if len(names) == 1 else None
        if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.shape[1] < 2:
            return cls({name: outputs[name] for name in names}, None, None)
        producer = graph.producer[names[0]].op_type
        labels = None if samples.labels is None else torch.from_numpy(samples.labels.astype(np.int64)).to(value.device)
        return cls({names[0]: _log_probabilities(value, producer)}, labels, producer)

    @torch.no_grad()
    def loss(self, outputs: Mapping[str, Value], passes: Passes) -> float:
        """Cross entropy, or relative squared error, over all samples."""
        if self._scores is not None:
            ((name, target),) = self._targets.items()
            value = unpacked(outputs[name])
            assert isinstance(value, torch.Tensor)
            assert isinstance(target, torch.Tensor)
            found = _log_probabilities(value, self._scores)
            if self._labels is not None:
                return float(torch.nn.functional.nll_loss(found, self._labels))
            return float(-(target.exp() * found).sum(1).mean())
        error = energy = 0.0
        for name, target in self._targets.items():
            for index, _ in enumerate(passes):
                wanted, found = (passes.part(value, index) for value in (target, outputs[name]))
                if wanted.shape == found.shape:
                    error += float((found - wanted).square().sum())
                    energy += float(wanted.square().sum())
        return error / max(energy, 1e-30)


def _log_probabilities(scores: torch.Tensor, producer: str) -> torch.Tensor:
    """Log probabilities [N, C] of an output: logits, or what a Softmax made of them."""
    if producer == "Softmax":
        return scores.clamp_min(1e-12).log()
    return scores if producer == "LogSoftmax" else torch.log_softmax(scores, 1)


def calibrate_jointly(
    model: TorchModel,
    placement: Placement,
    samples: Samples,
    most: int,
    grids: Callable[[float], QuantTable],
    finish: Finish,
    progress: Progress = lambda *_: None,
) -> QuantTable:
    """The jointly optimised grids of a model, with the codes of rounding to nearest.

    Args:
        model: the pieces of the model in order.
        placement: where its grids are.
        samples: calibration samples.
        most: evaluations of the loss.
        grids: the table of the least L_p errors, for a p.
        finish: adds the biases of a piece to a table.
        progress: called with (what, evaluations, most evaluations, loss).
    """
    aim = Aim.of(model, samples)
    done, least = 0, float("inf")

    def counted(loss: NetworkLoss) -> Callable[[np.ndarray], float]:
        def evaluate(x: np.ndarray) -> float:
            nonlocal done, least
            value = loss(x)
            done, least = done + 1, min(least, value)
            progress("LAPQ", min(done, most), most, least)
            return value

        return evaluate

    def at(p: float) -> tuple[float, NetworkLoss]:
        loss = NetworkLoss(model, placement, grids(p), samples, finish, aim)
        return counted(loss)(np.zeros(len(loss.names))), loss

    tried = {float(p): at(float(p)) for p in NORMS}
    p = best_norm(list(tried), [value for value, _ in tried.values()])
    tried[p] = tried.get(p) or at(p)
    start, loss = min(tried.values(), key=lambda pair: pair[0])
    x, _ = powell.minimise(
        counted(loss),
        np.zeros(len(loss.names)),
        start,
        step=_STEP,
        bound=_BOUND,
        evaluations=max(most - done, 0),
        settle=loss.settle,
    )
    return loss.table(x)


def best_norm(norms: list[float], losses: list[float]) -> float:
    """The p at the vertex of the parabola fitted to the losses, within the range of p; the best one tried where it opens downwards."""
    finite = [(p, value) for p, value in zip(norms, losses, strict=True) if np.isfinite(value)]
    best = min(finite, key=lambda pair: pair[1], default=(norms[0], 0.0))[0]
    if len(finite) < 3:
        return best
    square, linear, _ = np.polyfit([p for p, _ in finite], [value for _, value in finite], 2)
    if square <= 0:
        return best
    return float(np.clip(-linear / (2 * square), min(norms), max(norms)))
