"""Which layers need more bits, or float, for the accuracy to hold: mixed precision by measured sensitivity.

Layers are ordered by the noise that each makes alone, and as few as are needed are taken from the front: their number is doubled until a
file holds, and then halved between the last that did not and the first that did. Each trial is a file that ONNX Runtime runs, rounded to
nearest with biases corrected, which takes seconds; what is learned with such bits afterwards is better than that.
"""

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .config import Config
from .errors import UsageError
from .examination import layer_noise
from .graph import Graph
from .metric import Metric
from .pipeline import Export, Quantized, quantize
from .progress import Progress
from .range_choice import RangeChoice
from .retarget import rounded_to_nearest
from .samples import Samples
from .sensitivity import LayerSensitivity, layers_before
from .source import SourceModel
from .validation import Reference

FLOAT = "float"


@dataclass(frozen=True)
class Goal:
    """What must hold: a drop of at most `max_drop` (see `Reference`), an SQNR of the worst output of at least `min_sqnr` dB, or both."""

    max_drop: float | None = None
    min_sqnr: float | None = None

    def __post_init__(self) -> None:
        if self.max_drop is None and self.min_sqnr is None:
            raise UsageError("--max-drop or --min-sqnr is needed: what the layers are chosen for")
        if self.min_sqnr is not None and not math.isfinite(self.min_sqnr):
            raise UsageError(f"--min-sqnr {self.min_sqnr}: expected a number of dB")

    def holds(self, trial: "Trial") -> bool:
        """Whether a file is good enough.

        Raises:
            UsageError: a drop is limited and none can be measured.
        """
        if self.max_drop is not None and trial.drop is None:
            raise UsageError("--max-drop: the model has no class output [N, C] to compare; give --metric, or --min-sqnr in its place")
        is_close = self.max_drop is None or (trial.drop is not None and trial.drop <= self.max_drop)
        return is_close and (self.min_sqnr is None or trial.sqnr >= self.min_sqnr)


@dataclass(frozen=True)
class Trial:
    """What a file with so many layers of more bits does: the drop (None where none can be measured), and dB of its worst output."""

    layers: int
    drop: float | None
    sqnr: float


@dataclass(frozen=True)
class Allocation:
    """The layers that get more bits, of those with `room` for them, most noise first; `trials` in the order they were made.

    `nodes` are those layers, and in float what is computed on integers from their results up to the next layers. `holds`: the goal is
    reached; if not, `layers` are all that may be taken: in float all but the one with the least noise.
    """

    layers: tuple[str, ...]
    nodes: tuple[str, ...]
    room: tuple[str, ...]
    trials: tuple[Trial, ...]
    holds: bool


def allocate(
    source: SourceModel,
    calibration: Samples,
    evaluation: Samples,
    config: Config,
    wider: str,
    goal: Goal,
    export: Export,
    metric: Metric | None = None,
    progress: Progress = lambda *_: None,
) -> Allocation:
    """Find the fewest layers, most noise first, that must have more bits.

    Args:
        source: the float model.
        calibration: samples to calibrate on.
        evaluation: samples that the goal is measured on.
        config: the settings of all other layers; what it says of learning is left out.
        wider: bits for those layers, as w8a8, or `float`.
        goal: what must hold.
        export: writes a file.
        metric: what measures the drop in place of accuracy.
        progress: called as the work proceeds.

    Raises:
        UsageError: bits that give no layer more than it has, or that the target lacks; a goal that cannot be measured.
        MrecgError: as `pipeline.quantize`.
    """
    plain = rounded_to_nearest(config)
    widened(plain, source.graph, (), wider)  # refuses what the target lacks, before the work
    reference = Reference.of(source.model, evaluation, config.device, metric)
    trials: list[Trial] = []
    ranges: dict[int, RangeChoice] = {}  # that of the first trial; to choose anew takes most of the time
    most = 2 * len(source.graph.weighted).bit_length() + 1  # trials: doubling, and halving

    def tried(layers: Sequence[str], nodes: Sequence[str]) -> tuple[Trial, Quantized]:
        counted = f"{len(layers)} of {len(room)} layers at {wider}" if layers else "rounding all layers"
        progress(counted, len(trials), most, float("nan"))
        one = widened(plain, source.graph, nodes, wider)
        found = quantize(source, calibration, one, known=tuple(ranges.values()))
        ranges.update({choice.bits: choice for choice in found.ranges})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantized.onnx"
            export(found.table, one, path)
            trials.append(Trial(len(layers), *reference.held_against(path, config.scheme.elsewhere)))
        return trials[-1], found

    def first_of(count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        layers = order[:count]
        return layers, tuple(name for layer in layers for name in (layer, *behind.get(layer, ())))

    def holds(count: int) -> bool:
        return goal.holds(tried(*first_of(count))[0])

    room: tuple[str, ...] = ()
    first, base = tried((), ())
    noise = layer_noise(source, base, calibration, progress).layers
    room = tuple(layer.node for layer in sorted(noise, key=_alone) if _has_room(layer, wider))
    order = room[:-1] if wider == FLOAT else room  # with all in float there is nothing to quantize
    behind = _behind(source.graph, base) if wider == FLOAT else {}
    if goal.holds(first):
        return Allocation((), (), room, tuple(trials), True)
    if not order:
        raise UsageError(f"--to {wider}: {'there is one layer only' if room else f'no layer has fewer bits than that; try --to {FLOAT}'}")
    failed, held = 0, 1
    while not holds(held):
        if held == len(order):
            return Allocation(*first_of(held), room, tuple(trials), False)
        failed, held = held, min(2 * held, len(order))
    while held - failed > 1:
        middle = (held + failed) // 2
        failed, held = (failed, middle) if holds(middle) else (middle, held)
    return Allocation(*first_of(held), room, tuple(trials), True)


def _behind(graph: Graph, base: Quantized) -> dict[str, list[str]]:
    """The nodes on integers that no weights are of, by the layer that they are computed from."""
    found: dict[str, list[str]] = {}
    for node, layer in layers_before(graph).items():
        if node in base.placement.met:
            found.setdefault(layer, []).append(node)
    return found


def widened(config: Config, graph: Graph, layers: Sequence[str], wider: str) -> Config:
    """The settings with more bits for some layers, or with these in float.

    Raises:
        UsageError: no such precision, or the target lacks it.
    """
    kinds = {node.op_type for node in graph.nodes}
    patterns = [re.escape(name).join(("(?:", ")")) if name in kinds else name for name in layers]  # a bare type would name all of it
    if wider == FLOAT:
        return replace(config, keep_float=(*config.keep_float, *patterns))
    if re.fullmatch(r"w\d+a\d+", wider) is None:
        raise UsageError(f"--to {wider}: expected w<bits>a<bits>, such as w8a8 or w8a16, or {FLOAT}")
    probe = replace(config, bits=(*config.bits, f".*={wider}"))  # as `patterns` may be none
    return replace(probe, bits=(*config.bits, *(f"{pattern}={wider}" for pattern in patterns)))


def _alone(layer: LayerSensitivity) -> float:
    """What orders layers: dB with it alone quantized; what cannot be compared comes last."""
    return layer.only_quantized if np.isfinite(layer.only_quantized) else float("inf")


def _has_room(layer: LayerSensitivity, wider: str) -> bool:
    if wider == FLOAT:
        return True
    weight, operand = map(int, re.findall(r"\d+", wider))
    weight = 7 if weight == 8 and layer.weight_bits == 7 else weight  # of a reduced range
    return layer.weight_bits < weight or (layer.input_bits is not None and layer.input_bits < operand)
