"""The stages in order, from a float model and samples to a quantization table."""

import math
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .activations import TorchModel
from .bias_correction import correct_biases
from .config import Config
from .device import full_float32, give_back, pick_device
from .errors import UnsupportedModelError
from .grids import calibrate, with_biases
from .importing import imported
from .islands import find_islands
from .memory import Room, Work, enough
from .packing import FLOAT_TYPES
from .placement import Placement, operand_copies, place, without
from .plan import Plan, block_rows, make_plan, measured
from .processes import ALONE, Processes
from .progress import Progress
from .quant_table import QuantTable
from .range_choice import RangeChoice
from .rewrite_check import check_rewritten
from .run_folder import RunFolder, Stage
from .samples import Samples
from .selection import match_nodes, own_precisions
from .source import SourceModel, infer_types
from .survey import expected_memory, is_divisible, pass_size, survey
from .unit import UnitResult, learned_weights
from .units import reconstruct

Export = Callable[[QuantTable, Config, Path], None]
"""Writes the quantized model of a table to a path; handed in, since learning knows nothing of exporters."""

_CALIBRATED = "calibrated"


@dataclass(frozen=True)
class Quantized:
    """What learning hands over: the table, and how it came about.

    `import_error` is the worst difference of torch to ONNX Runtime in float, relative to the value's range; `islands` names the nodes that
    are left to ONNX Runtime, with the reasons; `notes` says how a rewritten model agrees with its file, and what was done otherwise than
    planned for lack of memory; `ranges` which method the ranges of activations are from.
    """

    table: QuantTable
    placement: Placement
    plan: Plan
    results: tuple[UnitResult, ...]
    import_error: float
    device: str
    samples: int
    seconds: Mapping[str, float]
    islands: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    notes: tuple[str, ...] = ()
    ranges: tuple[RangeChoice, ...] = ()


@full_float32()
@enough("the calibration or reconstruction")
def quantize(
    source: SourceModel,
    samples: Samples,
    config: Config,
    progress: Progress = lambda *_: None,
    run: RunFolder | None = None,
    processes: Processes = ALONE,
    known: Sequence[RangeChoice] = (),
) -> Quantized:
    """Quantize a float model: partition, calibrate, plan, reconstruct.

    Args:
        source: the normalised model.
        samples: calibration samples, checked against the model's inputs.
        config: all settings.
        progress: called as the work proceeds.
        run: where finished stages are kept, and taken from.
        processes: this one among those that learn together, each of which calls this; only the first has a run.
        known: methods of ranges that an earlier run on these samples chose; what it has is not chosen again.

    Raises:
        UnsupportedModelError: ONNX Runtime cannot run the model on these samples, or what it was rewritten to computes something else.
        UsageError: a setting names what the model or the machine does not have.
        StorageError: the run folder cannot be written.
        DeviceMemoryError: the device does not hold a single sample.
    """
    laps = _Laps()
    device = pick_device(config.device)
    rewritten = check_rewritten(source, samples)
    expected = expected_memory(source, samples, survey(source, samples, config), config)
    room = Room(expected.room_in(config.memory), run and run.path, math.inf if expected.device is None else expected.device)
    samples = samples.chosen(config.calibration_samples, config.seed)
    types = infer_types(source, samples.shapes, samples.inputs)
    samples = samples.whole(types.batch)
    processes.check(config, samples.count)
    own = own_precisions(source.graph, config.own_bits)
    floats = match_nodes(source.graph, config.keep_float)
    islands = find_islands(source, types)
    copies = operand_copies(source, types, config.scheme, config.precision, floats, islands, own)
    source, types = source.with_copies(copies), types.with_copies(copies)
    model, islands, import_error = imported(source, types, islands, samples, config, device)
    rows = block_rows(source, types, [piece.block for piece in model.pieces], config)
    if config.merge:
        make_plan(source, rows, config)  # refuses names of blocks that there are none of, before the work begins
    placement = place(source, types, config.scheme, config.precision, floats, islands, own, copies)
    if not (placement.activations or placement.weights or placement.stored):
        why = "".join(f": {row.op_type} {row.node} {row.reason}" for row in placement.floats[:1])
        raise UnsupportedModelError(
            f"these settings leave nothing of the model to quantize{why}; use another --target or --precision, or less --keep-float"
        )
    model = replace(model, room=room)
    laps.end("import")
    few = samples.first(config.range_samples).whole(types.batch)
    saved = processes.first(run.load(_CALIBRATED) if run is not None else None)
    if saved:
        table, ranges = QuantTable(saved.tensors), tuple(RangeChoice.of(facts) for facts in saved.facts["ranges"])
    else:
        found = calibrate(model, placement, few, config, progress, known)
        table, ranges = found.table, found.ranges
    unseen = sorted(placement.activations.keys() - table.tensors.keys())
    placement = without(placement, set(unseen))
    table = QuantTable(processes.first(dict(table.tensors)))
    laps.end("calibrate")
    if saved:
        rows = tuple(replace(row, loss=loss, energy=energy) for row, (loss, energy) in zip(rows, saved.facts["losses"], strict=True))
    elif config.learns:
        rows = measured(rows, model, table, lambda block, t: with_biases(source, placement, block, t), few)
    losses = processes.first([(row.loss, row.energy) for row in rows])
    rows = tuple(replace(row, loss=loss, energy=energy) for row, (loss, energy) in zip(rows, losses, strict=True))
    plan = make_plan(source, rows, config)
    together = pass_size(types, plan.units, config)
    # What is in use differs from run to run: one that is resumed takes the same parts.
    parts = saved.facts["parts"] if saved else {}
    if config.memory is not None and config.draws and expected.device is None and not saved:
        work = Work(source, types, placement.activations.keys(), samples.count, config.batch, together, is_divisible(types, plan.units))
        parts = {unit.name: work.parts_within(unit, config.memory - expected.taken) for unit in plan.units}
    parts = processes.first(parts)
    if run is not None and config.learns and not saved:
        run.save(_CALIBRATED, Stage(table.tensors, {"losses": losses, "ranges": [asdict(choice) for choice in ranges], "parts": parts}))
    laps.end("plan")
    units = replace(
        TorchModel.of(source, types, plan.units, device, together),
        room=room,
        float_type=FLOAT_TYPES[config.cache_dtype],
    )
    if config.learns:
        table, results = reconstruct(units, placement, table, samples, config, progress, run, processes, parts)
    else:
        results = ()
        for unit in plan.units:
            table = with_biases(source, placement, unit, table)
        if config.bias_correction:
            table = correct_biases(units, placement, table, samples)
    laps.end("reconstruct")
    give_back(device)
    return Quantized(
        table,
        placement,
        plan,
        results,
        import_error,
        str(device),
        samples.count,
        laps.seconds,
        islands,
        processes.count,
        (
            *([rewritten] if rewritten is not None else []),
            *_without_range(unseen),
            *(_learned_once(units, table) if config.learns else ()),
            *_learned_in_parts(results, parts),
            *room.notes,
        ),
        ranges,
    )


def _without_range(values: Sequence[str]) -> tuple[str, ...]:
    """What is to be said of values that the calibration samples show no range of."""
    if not values:
        return ()
    why = "never made, empty, or not finite (NaN, infinite) on a calibration sample; float there"
    return (f"no range was seen of {values[0]!r}{_others(values)}: {why}",)


def _learned_once(units: TorchModel, table: QuantTable) -> tuple[str, ...]:
    """What is to be said of weights that layers of several units read: their rounding is learned with the first alone."""
    read: dict[str, list[str]] = {}
    for piece in units.pieces:
        for weight in learned_weights(piece, table):
            read.setdefault(weight, []).append(piece.block.name)
    shared = {weight: units for weight, units in read.items() if len(units) > 1}
    if not shared:
        return ()
    weight, (first, second, *_) = next(iter(shared.items()))
    return (f"weights of several units are learned with the first that reads them: {weight!r} with {first}, not {second}{_others(shared)}",)


def _learned_in_parts(results: Sequence[UnitResult], parts: Mapping[str, int]) -> tuple[str, ...]:
    """What is to be said of units that a memory budget has learned from parts of mini-batches."""
    divided = [(result.unit, count) for result in results if (count := parts.get(result.unit, 1)) > 1]
    return tuple(f"unit {unit}: {count} parts of a mini-batch, to stay within --memory-budget" for unit, count in divided)


def _others(named: Sized) -> str:
    """How many there are beside the one that is named."""
    return f" and {len(named) - 1} more" if len(named) > 1 else ""


class _Laps:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._since, 3)
        self._since = now
