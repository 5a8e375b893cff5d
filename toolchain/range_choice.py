"""Which activation ranges suit a model: each method is tried on the activations alone, and judged by what it does to the outputs.

The error that a range should minimise is the network's, which no norm of the activations' own errors stands for on every model: a range
that clips hard is right where a few outliers carry little (keyword spotting with 4-bit activations), one that hardly clips where they
carry the answer (residual streams with 8 bits). LAPQ (Nahshan et al., 2020) makes the same observation and starts from the best norm.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

from .activations import Piece, TorchModel, Value
from .calibration import NORM
from .losses import energy, full_loss
from .progress import Progress
from .quant_table import QuantTable
from .samples import Samples


class RangeMethod(NamedTuple):
    """A method of `calibration`: minmax, percentile, or mse in a norm."""

    kind: str
    norm: float = NORM

    @property
    def label(self) -> str:
        return f"L{self.norm:g}" if self.kind == "mse" else self.kind


# The papers' first: it stays where nothing is better.
CANDIDATES = (
    RangeMethod("mse", NORM),
    RangeMethod("mse", 2.0),
    RangeMethod("mse", 1.5),
    RangeMethod("mse", 1.0),
    RangeMethod("percentile"),
    RangeMethod("minmax"),
)
SAMPLES = 64  # enough to tell methods apart: their errors differ by factors


@dataclass(frozen=True)
class RangeChoice:
    """The method chosen for the activations of one bit width.

    `errors` has for each candidate the squared error of the model's outputs relative to their energy, where these activations alone are
    quantized; None where no output compares.
    """

    bits: int
    method: RangeMethod
    errors: Mapping[str, float | None]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "RangeChoice":
        """From `asdict`, after a way through JSON."""
        return cls(facts["bits"], RangeMethod(*facts["method"]), facts["errors"])


def choose_ranges(
    model: TorchModel,
    samples: Samples,
    widths: AbstractSet[int],
    grids: Callable[[int, RangeMethod], QuantTable],
    progress: Progress = lambda *_: None,
) -> tuple[RangeChoice, ...]:
    """The best method for the activations of each bit width, all else in float.

    Args:
        model: the imported blocks.
        samples: calibration samples; the first few are run once for each candidate.
        widths: the bit widths.
        grids: the activation grids of one bit width under a method, without any other.
        progress: called for each candidate.
    """
    judge = Judge(model, samples)
    found = []
    for turn, bits in enumerate(sorted(widths)):
        errors: dict[RangeMethod, float | None] = {}
        for index, candidate in enumerate(CANDIDATES):
            progress("choosing ranges", turn * len(CANDIDATES) + index, len(widths) * len(CANDIDATES), float("nan"))
            errors[candidate] = judge.error(grids(bits, candidate))
        best = min(CANDIDATES, key=lambda candidate: math.inf if (error := errors[candidate]) is None else error)
        found.append(RangeChoice(bits, best, {candidate.label: error for candidate, error in errors.items()}))
    return tuple(found)


class Judge:
    """Runs a model under tables of activation grids, its weights in float, against its float outputs.

    Outputs are those of the last weighted blocks: what follows them, such as the selection of boxes, may jump with the smallest error.
    """

    def __init__(self, model: TorchModel, samples: Samples) -> None:
        self._model = model
        self._samples = samples.first(SAMPLES).whole(model.types.batch)
        self._passes = model.stream(self._samples.inputs).passes
        self._heads = heads(model.pieces)
        self._targets = self._run(None)
        self._energies = {position: energy(targets, self._passes) for position, targets in self._targets.items()}

    def error(self, table: QuantTable) -> float | None:
        """The relative squared error, summed over the heads; None where there is nothing to compare."""
        made = self._run(table)
        errors = [full_loss(made[at], self._targets[at], self._passes) / size for at, size in self._energies.items() if size > 0]
        total = sum(errors)
        return total if errors and math.isfinite(total) else None

    def _run(self, table: QuantTable | None) -> dict[int, dict[str, Value]]:
        stream = self._model.stream(self._samples.inputs, table)
        kept = {}
        for position, piece in enumerate(self._model.pieces[: max(self._heads, default=-1) + 1]):
            outputs = self._model.run(piece, stream, table)
            if position in self._heads:
                kept[position] = {name: outputs[name] for name in piece.block.learned_outputs}
            stream.advance(outputs)
        return kept


def heads(pieces: Sequence[Piece]) -> frozenset[int]:
    """Positions of the weighted pieces whose outputs no weighted piece reads, not even through others."""
    found, leading = set(), set()
    for position, piece in reversed(list(enumerate(pieces))):
        leads = not leading.isdisjoint(piece.block.outputs)
        if piece.block.weighted and not leads:
            found.add(position)
        if leads or position in found:
            leading.update(piece.block.inputs)
    return frozenset(found)
