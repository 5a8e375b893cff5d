"""A unit to be learned, whatever learns it: what it reads, what it should make, and which of two tables is the better one."""

import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

from .activations import Passes, Piece, Value, constants_of, run_piece
from .cpu import give_back_freed_memory
from .losses import full_loss
from .minibatch import Draw
from .placement import Bias
from .processes import ALONE, Processes
from .quant_table import BIAS_BITS, QuantTable, TensorQuant
from .settings import Settings
from .torch_import import TorchBlock

_CURVE_POINTS = 40


class Finish(Protocol):
    """Completes a table, given the float biases that were learned, with what follows from it: codes of biases, tied values."""

    def __call__(self, learned: QuantTable, biases: Mapping[str, np.ndarray] = ..., /) -> QuantTable: ...


Progress = Callable[[int, int, float], None]
"""Called now and then with (iteration, iterations, reconstruction loss)."""


class CurvePoint(NamedTuple):
    """The state of a unit's optimisation at one step.

    `loss` is the reconstruction loss of the mini-batch, `regulariser` lambda * sum(1 - |2h - 1|^beta) and `beta` its exponent (both NaN
    during the warm-up, which has none), `decided` the share of weights whose rounding is all but made.
    """

    iteration: int
    loss: float
    regulariser: float
    beta: float
    decided: float


@dataclass(frozen=True)
class UnitResult:
    """What the reconstruction of one unit came to.

    `loss_before` and `loss_after` are hard-quantized losses over all samples: rounding to nearest on the calibrated grids, and the learned
    codes and steps. `kept` says which of the two is in the table, and `reason` why it is not the learned one. `flipped` is the share of
    weights whose code differs from rounding to nearest, `undecided` the share whose soft rounding was still open at the end (None: none was
    soft). `curve` has some 40 points of the optimisation.
    """

    unit: str
    loss_before: float
    loss_after: float
    kept: str
    iterations: int
    batch_size: int
    seconds: float
    flipped: float
    undecided: float | None
    curve: tuple[CurvePoint, ...]
    changes: Mapping[str, TensorQuant]
    reason: str | None = None


@dataclass(frozen=True)
class Unit:
    """A unit and its samples in both streams.

    Attributes:
        piece: the unit.
        weights: those to be learned: on a grid, and in no unit before it.
        biases: its quantized biases.
        scores: values that masks take far below their grids.
        floats: float weights and biases of the model by name.
        inputs: the unit's inputs in the quantized stream.
        float_inputs: the same in the float stream; with keep_probability < 1 the two are mixed element-wise.
        targets: what the float unit makes of `float_inputs`, and the loss is taken of.
        passes: how the samples of these are split.
        device: where they are.
        table: grids of the unit's activations and weights, with the codes of rounding to nearest.
        finish: completes a table.
        settings: hyper-parameters.
        seed: of the mini-batches and the dropping.
        progress: called now and then.
        processes: those that share the mini-batches.
        splits: parts of a mini-batch that are learned from one after the other.
        is_compiled: whether the quantizers that learn are compiled loops.
        is_recorded: whether a step is captured once as a CUDA graph, and replayed from then on.
        is_narrow: whether products are computed in bfloat16 in a step.
    """

    piece: TorchBlock
    weights: tuple[str, ...]
    biases: Mapping[str, Bias]
    scores: AbstractSet[str]
    floats: Mapping[str, np.ndarray]
    inputs: Mapping[str, Value]
    float_inputs: Mapping[str, Value]
    targets: Mapping[str, Value]
    passes: Passes
    device: torch.device
    table: QuantTable
    finish: Finish
    settings: Settings
    seed: int
    progress: Progress
    processes: Processes = ALONE
    splits: int = 1
    is_compiled: bool = False
    is_recorded: bool = False
    is_narrow: bool = False

    def aiming_at(self, outputs: Iterable[str]) -> "Unit":
        """The unit with some of its targets."""
        return replace(self, targets={name: self.targets[name] for name in outputs})

    @property
    def given(self) -> dict[str, np.ndarray]:
        """Weights and biases as they are before learning: in float, but on their grids where they are not learned here."""
        on_grids = {name for name in self.piece.weights if name in self.table and name not in self.weights}
        return {name: self.table[name].dequantized() if name in on_grids else self.floats[name] for name in self.piece.weights}

    def draw(self) -> Draw:
        """Mini-batches, from the start of the unit's random numbers."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return Draw(
            self.inputs, self.float_inputs, self.targets, self.passes, self.settings.batch_size, generator, self.processes, self.splits
        )

    def outcome(self, table: QuantTable) -> tuple[float, dict[str, Value]]:
        """The hard-quantized loss over all samples under a table, and all outputs of the piece."""
        constants = constants_of(self.piece.weights, self.floats, table, self.device)
        outputs = run_piece(self.piece, self.inputs, constants, self.passes, table=table)
        return full_loss(outputs, self.targets, self.passes), outputs


NOT_FINITE = "the loss or its gradients are no finite numbers"


class Learned(NamedTuple):
    """What learning made: a finished table, the curve, the share of roundings left open (None: none was soft), or why it made nothing."""

    table: QuantTable
    curve: tuple[CurvePoint, ...]
    undecided: float | None
    refusal: str | None = None


def learned_unit(unit: Unit, learn: Callable[[QuantTable], Learned]) -> tuple[UnitResult, dict[str, Value]]:
    """Learn a unit, and keep the better of what it had and what it learned.

    Args:
        unit: the unit.
        learn: from the finished table to start with.

    Returns:
        The result, whose `changes` make the better of the two tables, and the unit's outputs in the quantized stream under that table.
    """
    started = time.perf_counter()
    before = unit.finish(unit.table)
    loss_before, _ = unit.outcome(before)  # its outputs are not kept while learning
    give_back_freed_memory()
    after, curve, undecided, refusal = learn(before)
    give_back_freed_memory()
    loss_after, outputs = unit.outcome(after)
    loss_before, loss_after = unit.processes.first((loss_before, loss_after))
    is_better = loss_after < loss_before
    if not is_better:
        del outputs
        _, outputs = unit.outcome(before)
    best = after if is_better else before
    flipped = sum(np.count_nonzero(after[name].codes != before[name].codes) for name in unit.weights)
    result = UnitResult(
        unit=unit.piece.block.name,
        loss_before=loss_before,
        loss_after=loss_after,
        kept="learned" if is_better else "initial",
        iterations=curve[-1].iteration + 1 if curve else 1,
        batch_size=unit.settings.batch_size,
        seconds=time.perf_counter() - started,
        flipped=float(flipped / sum(unit.floats[name].size for name in unit.weights)),
        undecided=undecided,
        curve=curve,
        changes={name: grid for name, grid in best.tensors.items() if name not in unit.table or grid is not unit.table[name]},
        reason=None if is_better else refusal or "learning ended with a larger loss",
    )
    return result, outputs


def are_finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether learned parameters are numbers: values near the end of float32 have losses and gradients that are not."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters)


def is_curve_point(iteration: int, iterations: int) -> bool:
    """Whether the curve has a point at an iteration."""
    return iteration % max(iterations // _CURVE_POINTS, 1) == 0 or iteration == iterations - 1


def learned_weights(module: Piece, table: QuantTable, done: AbstractSet[str] = frozenset()) -> tuple[str, ...]:
    """The weights of a unit whose rounding is learned: those on a grid that no unit before it has (`done`); biases follow from them.

    Fixed grids are those of weights that are only stored.
    """
    grids = {name: table[name] for name in module.weights if name in table and name not in done}
    return tuple(name for name, grid in grids.items() if grid.spec.bits < BIAS_BITS and not grid.fixed)
