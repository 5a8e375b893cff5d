"""The stages in order, from a float model and samples to a quantization table."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from . import partition, runtime
from .activations import CHUNK, Parts, Piece, TorchModel, Value, observed, quantizing, run_piece
from .bias_correction import correct_biases
from .calibration import Histogram, calibrate_activation, calibrate_bias, calibrate_weight, fit_bias
from .config import Config
from .errors import UsageError, near_misses
from .fit import GridFit, activation_fits, weight_fits
from .import_check import check_import
from .islands import IslandRow, find_islands, island_rows
from .memory import Demand, Room, demand
from .partition import Block, Rules
from .placement import Placement, match_nodes, own_precisions, place, without
from .plan import BlockRow, Plan, block_rows, make_plan, measured
from .quant_table import BIAS_BITS, QuantTable, TensorQuant
from .quant_table import quantize as encode
from .reconstruction import CurvePoint, UnitResult, learned_weights, reconstruct_unit
from .run_folder import RunFolder, Stage
from .samples import Samples, check_labels
from .sensitivity import SAMPLES, Sensitivity, sensitivity
from .source import SourceModel, ValueTypes, infer_types
from .torch_import import TorchBlock

Progress = Callable[[str, int, int, float], None]
"""Called as the work proceeds with (what, steps done, steps in all, loss or NaN)."""

_ASSUMED_AXIS = 224
_CALIBRATED = "calibrated"
# cuDNN would compute convolutions in TF32 by itself, whose 10-bit mantissa moves values across rounding ties and fails the import check.
_full_float32 = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


@dataclass(frozen=True)
class Quantized:
    """What learning hands over: the table, and how it came about.

    `import_error` is the worst difference of torch to ONNX Runtime in float, relative to the value's range; `islands` names the nodes that
    are left to ONNX Runtime, with the reasons.
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


@_full_float32
def quantize(
    source: SourceModel, samples: Samples, config: Config, progress: Progress = lambda *_: None, run: RunFolder | None = None
) -> Quantized:
    """Quantize a float model: partition, calibrate, plan, reconstruct.

    Args:
        source: the normalised model.
        samples: calibration samples, checked against the model's inputs.
        config: all settings.
        progress: called as the work proceeds.
        run: where finished stages are kept, and taken from.

    Raises:
        UnsupportedModelError: ONNX Runtime cannot run the model on these samples.
        UsageError: a setting names what the model or the machine does not have.
        StorageError: the run folder cannot be written.
    """
    laps = _Laps()
    device = pick_device(config.device)
    rows = survey(source, samples, config)
    room = Room(expected_memory(source, samples, rows, config).room_in(config.memory), run and run.path)
    samples = samples.chosen(config.calibration_samples, config.seed)
    types = infer_types(source, samples.shapes, samples.inputs)
    samples = samples.whole(types.batch)
    model, islands, import_error = imported(source, types, samples, config, device)
    rows = block_rows(source, types, [piece.block for piece in model.pieces], config)
    if config.merge:
        make_plan(source, rows, config)  # refuses names of blocks that there are none of, before the work begins
    own = own_precisions(source.graph, config.own_bits)
    placement = place(source, types, config.scheme, config.precision, match_nodes(source.graph, config.keep_float), islands, own)
    model = replace(model, room=room)
    laps.end("import")
    few = samples.first(config.range_samples).whole(types.batch)
    saved = run.load(_CALIBRATED) if run is not None else None
    table = QuantTable(saved.tensors) if saved else calibrate(model, placement, few, config, progress)
    placement = without(placement, placement.activations.keys() - table.tensors.keys())
    laps.end("calibrate")
    if saved:
        rows = tuple(replace(row, loss=loss, energy=energy) for row, (loss, energy) in zip(rows, saved.facts["losses"], strict=True))
    elif config.learns:
        rows = measured(rows, model, table, lambda block, t: with_biases(source, placement, block, t), few)
    if run is not None and config.learns and not saved:
        run.save(_CALIBRATED, Stage(table.tensors, {"losses": [(row.loss, row.energy) for row in rows]}))
    plan = make_plan(source, rows, config)
    laps.end("plan")
    units = replace(TorchModel.of(source, types, plan.units, device, _pass_size(types, plan.units, config)), room=room)
    if config.learns:
        table, results = reconstruct(units, placement, table, samples, config, progress, run)
    else:
        results = ()
        for unit in plan.units:
            table = with_biases(source, placement, unit, table)
        if config.bias_correction:
            table = correct_biases(units, placement, table, samples)
    laps.end("reconstruct")
    return Quantized(table, placement, plan, results, import_error, str(device), samples.count, laps.seconds, islands)


def survey(source: SourceModel, samples: Samples, config: Config) -> tuple[BlockRow, ...]:
    """Partition the model, and refuse settings that name what it does not have: everything that can be said before the work begins."""
    types = infer_types(source, samples.shapes, samples.inputs)
    match_nodes(source.graph, config.keep_float)
    own_precisions(source.graph, config.own_bits)
    rows = block_rows(source, types, cut_blocks(source, types, find_islands(source, types), config), config)
    if config.merge:
        make_plan(source, rows, config)
    return rows


def expected_memory(source: SourceModel, samples: Samples, rows: Sequence[BlockRow], config: Config) -> Demand:
    """What a run will take at its peak, from the shapes of the model's values.

    Raises:
        UsageError: more than the memory budget, or a budget where none can be kept.
    """
    if config.memory is not None and pick_device(config.device).type != "cpu":
        raise UsageError("--memory-budget: bounds the memory of the CPU only; leave it out, or give --device cpu")
    types = infer_types(source, samples.shapes, samples.inputs)
    placement = place(source, types, config.scheme, config.precision, match_nodes(source.graph, config.keep_float))
    blocks = [row.block for row in rows]
    size, count = types.batch or _pass_size(types, blocks, config), min(samples.count, config.calibration_samples)
    found = demand(source, types, blocks, placement.activations.keys(), count, config.batch_size, size)
    found.room_in(config.memory)
    return found


def cut_blocks(source: SourceModel, types: ValueTypes, islands: Mapping[str, str], config: Config) -> tuple[Block, ...]:
    """The blocks of a model around its islands."""
    rules = Rules(types.batched, types.shared, islands.keys(), config.boundary)
    return partition.layers(source.graph, rules) if config.algorithm == "adaround" else partition.partition(source.graph, rules)


def imported(
    source: SourceModel, types: ValueTypes, samples: Samples, config: Config, device: torch.device
) -> tuple[TorchModel, dict[str, str], float]:
    """The blocks in torch, the islands between them, and the worst difference to ONNX Runtime that is left.

    Nodes that torch computes differently, or not at all when it comes to it, become islands too.
    """
    islands = find_islands(source, types)
    while True:
        model = TorchModel.of(source, types, cut_blocks(source, types, islands, config), device)
        error, strays = check_import(model, samples)
        if not strays:
            return model, islands, error
        islands |= strays


def check_classes(source: SourceModel, samples: Samples, where: str) -> None:
    """Refuse labels that are no classes of the model; a model without a class output takes any.

    Raises:
        DataError: saying what range the labels have and what the model.
    """
    if samples.labels is None:
        return
    types = infer_types(source, samples.shapes)
    classes = next((types.shapes[name][0] for name in source.graph.outputs if len(types.shapes.get(name, ())) == 1), 1)
    if classes > 1:
        check_labels(samples.labels, classes, where)


def inspect(source: SourceModel, shapes: Mapping[str, tuple[int, ...]], config: Config) -> tuple[Plan, tuple[IslandRow, ...]]:
    """The data-free plan for inputs of the given sample shapes, and what of the model is left to ONNX Runtime."""
    types = infer_types(source, shapes)
    islands = find_islands(source, types)
    blocks = cut_blocks(source, types, islands, config)
    return make_plan(source, block_rows(source, types, blocks, config), config), island_rows(source, blocks, islands)


def sample_shapes(source: SourceModel, given: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of one sample of each input where there are no samples; open axes that nobody gave are assumed, and those inputs listed."""
    names = [spec.name for spec in source.inputs]
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise UsageError(f"--input-shape: the model has no input {unknown!r}{near_misses(unknown, names)}")
    shapes = {
        spec.name: given.get(spec.name, tuple(axis if isinstance(axis, int) else _ASSUMED_AXIS for axis in spec.sample_shape))
        for spec in source.inputs
    }
    guessed = [s.name for s in source.inputs if s.name not in given and not all(isinstance(axis, int) for axis in s.sample_shape)]
    return shapes, guessed


def calibrate(
    model: TorchModel, placement: Placement, samples: Samples, config: Config, progress: Progress = lambda *_: None
) -> QuantTable:
    """Grids of all activations, from the float stream, and of all weights, with the codes of rounding to nearest.

    Activations that have no range (never made, or not finite) get none.
    """
    histograms: dict[str, Histogram] = {}
    endless: set[str] = set()

    def observe(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in placement.activations and name not in endless and tensor.numel():
            if not torch.isfinite(tensor.aminmax()[1] - tensor.aminmax()[0]):
                endless.add(name)
                return tensor
            seen = Histogram.of(tensor)
            histograms[name] = histograms[name].merged(seen) if name in histograms else seen
        return tensor

    stream = model.stream(samples.inputs)
    for name, value in stream.of(model.source.graph.inputs).items():
        observed(name, value, observe)
    for position, piece in enumerate(model.pieces):
        progress("calibrating", position, len(model.pieces), float("nan"))
        stream.advance(run_piece(piece, stream.of(piece.block.inputs), model.constants(piece), stream.passes, observe))
    placement = without(placement, endless | (placement.activations.keys() - histograms.keys()))
    activation_range, weight_range = config.activation_range, config.weight_range
    if config.algorithm == "minmax":
        activation_range = weight_range = "minmax"
    table: dict[str, TensorQuant] = {
        name: calibrate_activation(histograms[name], spec, activation_range, config.percentile)
        for name, spec in placement.activations.items()
    }
    table |= shared_grids(placement, histograms, activation_range, config.percentile)
    for name, origin in placement.tied.items():
        table[name] = replace(table[origin], tied_to=origin)
    for name, spec in placement.weights.items():
        table[name] = calibrate_weight(model.source.constants[name], spec, weight_range, config.percentile)
    for name, bias in placement.biases.items():
        table[bias.weight] = fit_bias(table[bias.weight], model.source.constants[name], table[bias.input].scale)
    for name in placement.weights:
        table[name] = replace(table[name], codes=encode(model.source.constants[name], table[name]))
    return QuantTable(table)


def shared_grids(placement: Placement, histograms: Mapping[str, Histogram], method: str, percentile: float) -> dict[str, TensorQuant]:
    """One grid for all values that share one, from all that was seen of them."""
    seen: dict[str, Histogram] = {}
    for name, leader in placement.shared.items():
        seen[leader] = seen[leader].merged(histograms[name]) if leader in seen else histograms[name]
    grids = {name: calibrate_activation(found, placement.activations[name], method, percentile) for name, found in seen.items()}
    return {name: replace(grids[leader], fixed=True) for name, leader in placement.shared.items()}


def reconstruct(
    units: TorchModel,
    placement: Placement,
    table: QuantTable,
    samples: Samples,
    config: Config,
    progress: Progress = lambda *_: None,
    run: RunFolder | None = None,
) -> tuple[QuantTable, tuple[UnitResult, ...]]:
    """Reconstruct the units in order: each reads the quantized outputs of those before it and aims at its own float output.

    Units that a run folder holds are not learned again: the streams pass through them as they were left.
    """
    source = units.source
    floats, quantized = units.stream(samples.inputs), units.stream(samples.inputs, table)
    total, learnt = len(_learning(units.pieces, table)), set[str]()
    saved = _finished(run, total)
    results: list[UnitResult] = []
    for position, piece in enumerate(units.pieces):
        if len(results) == total:
            break  # nothing after the last learned weights needs the streams
        name, done = piece.block.name, len(results)
        made = units.run(piece, floats)
        weights = learned_weights(piece, table, learnt)
        if weights and done < len(saved):
            progress(f"resuming after {name}", done + 1, len(saved), float("nan"))
            results.append(saved[done])
            table = table.updated(saved[done].changes)
            outputs = units.run(piece, quantized, table)
        elif weights:
            assert isinstance(piece, TorchBlock)
            inputs, float_inputs, targets = quantized.of(piece.block.inputs), floats.of(piece.block.inputs), made
            if not _alike(inputs, float_inputs):  # shapes that follow from data: aim at what the float unit makes of the same inputs
                float_inputs, targets = inputs, units.run(piece, quantized)
            result, outputs = reconstruct_unit(
                piece=piece,
                floats=source.constants,
                inputs=inputs,
                float_inputs=float_inputs,
                targets=targets,
                passes=quantized.passes,
                device=units.device,
                table=table,
                done=learnt,
                finish=lambda learned, block=piece.block: retied(placement, with_biases(source, placement, block, learned)),
                settings=config.settings(has_depthwise(source, piece.block)),
                seed=int(np.random.SeedSequence([config.seed, position]).generate_state(1)[0]),
                progress=_unit_progress(progress, name, done, total),
            )
            table = table.updated(result.changes)
            results.append(result)
            if run is not None:
                run.save(_unit(done), _stage(result))
        else:
            table = with_biases(source, placement, piece.block, table)
            outputs = units.run(piece, quantized, table)
        learnt.update(weights)
        floats.advance(made)
        quantized.advance(outputs)
    return table, tuple(results)


def _learning(pieces: Sequence[Piece], table: QuantTable) -> list[Piece]:
    """The units that learn a weight which none before them has."""
    found, done = [], set[str]()
    for piece in pieces:
        learned = learned_weights(piece, table, done)
        done |= set(learned)
        found += [piece] if learned else []
    return found


def _alike(first: Mapping[str, Value], second: Mapping[str, Value]) -> bool:
    def shapes(value: Value) -> list[Any]:
        return [getattr(part, "shape", None) for part in (value if isinstance(value, Parts) else [value])]

    return all(shapes(value) == shapes(second[name]) for name, value in first.items())


@_full_float32
def simulate(
    source: SourceModel, table: QuantTable, samples: Samples, device: torch.device, islands: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Run the quantized model in torch: the graph outputs under the table by name, as `runtime.run` joins them.

    Args:
        source: the float model.
        table: the grids.
        samples: what to run on.
        device: where.
        islands: nodes left to ONNX Runtime, as `Quantized` names them.
    """
    types = infer_types(source, samples.shapes, samples.inputs)
    islands = find_islands(source, types) if islands is None else islands
    model = TorchModel.of(source, types, cut_blocks(source, types, islands, Config()), device)
    count = samples.count
    if types.batch is not None:
        samples = samples.taken(np.arange(-(-count // types.batch) * types.batch) % count)
    stream = model.stream(samples.inputs, table)
    for piece in model.pieces:
        stream.advance(model.run(piece, stream, table))
    found: dict[str, np.ndarray] = {}
    for name, value in stream.of(source.graph.outputs).items():
        parts = value if isinstance(value, Parts) else [value]
        joined = runtime.joined([part.cpu().numpy() if isinstance(part, torch.Tensor) else np.asarray(part) for part in parts])
        found[name] = joined[:count] if isinstance(value, torch.Tensor) else joined
    return found


@_full_float32
def simulated_values(
    source: SourceModel, table: QuantTable, samples: Samples, islands: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Every value of the quantized model in torch on the CPU, graph inputs included, by name, in one forward pass over few samples."""
    types = infer_types(source, samples.shapes, samples.inputs)
    blocks = cut_blocks(source, types, find_islands(source, types) if islands is None else islands, Config())
    model = TorchModel.of(source, types, blocks, torch.device("cpu"), max(samples.count, CHUNK))
    stream = model.stream(samples.inputs, table)
    fed = {name: stream.passes.part(value, 0) for name, value in stream.of(source.graph.inputs).items()}
    values = {name: tensor.numpy().copy() for name, tensor in fed.items() if isinstance(tensor, torch.Tensor)}

    def observe(name: str, tensor: torch.Tensor) -> torch.Tensor:
        found = quantizing(table)(name, tensor)
        values[name] = found.numpy().copy()
        return found

    for piece in model.pieces:
        stream.advance(run_piece(piece, stream.of(piece.block.inputs), model.constants(piece, table), stream.passes, observe))
    return values


def few_samples(source: SourceModel, samples: Samples, count: int) -> Samples:
    """The first samples that one run takes: `count` of them, or as many as the model's fixed batch, going round where there are fewer."""
    one_by_one = runtime.differing(samples.inputs, {spec.name: spec.axis for spec in source.inputs})
    size = source.batch or (1 if one_by_one else min(count, samples.count))
    return samples.taken(np.arange(size) % samples.count)


@_full_float32
def examine(
    source: SourceModel, quantized: Quantized, samples: Samples, limit: float | None, progress: Progress = lambda *_: None
) -> tuple[tuple[GridFit, ...], Sensitivity]:
    """How each value sits on its grid, and how much each layer hurts, over a few samples.

    Args:
        source: the normalised model.
        quantized: the finished table, and the islands that it leaves.
        samples: the first few are used.
        limit: seconds that the sensitivity may take before it is skipped; 0 skips it, None sets no limit.
        progress: called as the work proceeds.
    """
    few, table = few_samples(source, samples, SAMPLES), quantized.table
    types = infer_types(source, few.shapes, few.inputs)
    device = torch.device(quantized.device)
    model = TorchModel.of(source, types, cut_blocks(source, types, quantized.islands, Config()), device, max(few.count, CHUNK))
    fits = (*weight_fits(source, table), *activation_fits(model, table, few))
    if limit == 0:
        return fits, Sensitivity(0, None, (), 0.0, "--no-sensitivity")
    return fits, sensitivity(model, table, few, limit, lambda done, total: progress("sensitivity of layers", done, total, float("nan")))


def with_biases(source: SourceModel, placement: Placement, block: Block, table: QuantTable) -> QuantTable:
    """Add the int32 codes of a block's biases, whose scales follow from the inputs' and the weights'."""
    inside = {node.name for node in block.nodes}
    return table.updated(
        {
            name: calibrate_bias(source.constants[name], table[bias.weight], table[bias.input].scale, BIAS_BITS)
            for name, bias in placement.biases.items()
            if bias.node in inside
        }
    )


def retied(placement: Placement, table: QuantTable) -> QuantTable:
    """Let tied values follow the grid that they repeat."""
    return table.updated({name: replace(table[origin], tied_to=origin) for name, origin in placement.tied.items()})


def has_depthwise(source: SourceModel, block: Block) -> bool:
    """Whether a block has a convolution with one input channel per group."""
    weights = [(node, source.graph.weight(node)) for node in block.nodes if node.op_type == "Conv"]
    groups = {node.name: [a.i for a in source.node_protos[node.name].attribute if a.name == "group"] for node, _ in weights}
    return any(w is not None and source.constants[w].shape[1] == 1 and max(groups[node.name], default=1) > 1 for node, w in weights)


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda` or `cpu` as a torch device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: torch {torch.__version__} finds no CUDA device; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _unit(number: int) -> str:
    return f"unit-{number:03d}"


def _finished(run: RunFolder | None, total: int) -> list[UnitResult]:
    """The results that a run folder holds, up to the first unit that is missing."""
    if run is None:
        return []
    run.begin_units(total)
    stages = itertools.takewhile(lambda stage: stage is not None, (run.load(_unit(number)) for number in range(total)))
    facts = [(_frozen(stage.facts), stage.tensors) for stage in stages if stage is not None]
    return [UnitResult(**f | {"curve": tuple(CurvePoint(*p) for p in f["curve"])}, changes=tensors) for f, tensors in facts]


def _stage(result: UnitResult) -> Stage:
    return Stage(result.changes, {f.name: getattr(result, f.name) for f in fields(result) if f.name != "changes"})


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _pass_size(types: ValueTypes, blocks: Sequence[Block], config: Config) -> int:
    """Samples in a forward pass: a mini-batch, where mini-batches must be whole passes because not all values are arrays of samples."""
    crossing = {value for block in blocks if block.weighted for value in (*block.inputs, *block.outputs)}
    return CHUNK if crossing <= types.stacked else min(CHUNK, config.batch_size)


def _unit_progress(progress: Progress, name: str, done: int, total: int) -> Callable[[int, int, float], None]:
    return lambda step, steps, loss: progress(f"reconstructing {name}", done * steps + step, total * steps, loss)


class _Laps:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._since, 3)
        self._since = now
