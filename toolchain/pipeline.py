"""The stages in order, from a float model and samples to a quantization table."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from . import partition, runtime
from .activations import TorchModel, quantizing, run_piece
from .calibration import Histogram, calibrate_activation, calibrate_bias, calibrate_weight, fit_bias
from .config import Config
from .errors import UnsupportedModelError, UsageError, near_misses
from .partition import Block
from .placement import Placement, match_nodes, place
from .plan import BlockRow, Plan, block_rows, make_plan, measured
from .quant_table import BIAS_BITS, QuantTable, TensorQuant
from .quant_table import quantize as encode
from .reconstruction import UnitResult, learned_weights, reconstruct_unit
from .run_folder import RunFolder, Stage
from .samples import Samples, check_labels
from .source import SourceModel, infer_types
from .torch_import import import_block

Progress = Callable[[str, int, int, float], None]
"""Called as the work proceeds with (what, steps done, steps in all, loss or NaN)."""

_IMPORT_TOLERANCE = 1e-4  # of a value's largest magnitude; float32 summation order through a whole network stays well below
_IMPORT_SAMPLES = 4
_ASSUMED_AXIS = 224
_CALIBRATED = "calibrated"
# cuDNN would compute convolutions in TF32 by itself, whose 10-bit mantissa moves values across rounding ties and fails the import check.
_full_float32 = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


@dataclass(frozen=True)
class Quantized:
    """What learning hands over: the table, and how it came about.

    `import_error` is the worst difference of torch to ONNX Runtime in float, relative to the value's range.
    """

    table: QuantTable
    placement: Placement
    plan: Plan
    results: tuple[UnitResult, ...]
    import_error: float
    device: str
    samples: int
    seconds: Mapping[str, float]


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
        UnsupportedModelError: an operator cannot be imported to torch, or computes something else there.
        UsageError: a setting names what the model or the machine does not have.
        StorageError: the run folder cannot be written.
    """
    laps = _Laps()
    device = pick_device(config.device)
    samples = samples.chosen(config.calibration_samples, config.seed)
    types = infer_types(source, samples.shapes)
    placement = place(source, types, config.scheme, config.precision, match_nodes(source.graph, config.keep_float))
    rows = survey(source, samples, config)
    model = TorchModel.of(source, types, [row.block for row in rows], device)
    import_error = check_import(model, samples)
    laps.end("import")
    saved = run.load(_CALIBRATED) if run is not None else None
    table = QuantTable(saved.tensors) if saved else calibrate(model, placement, samples.first(config.range_samples), config, progress)
    laps.end("calibrate")
    if saved:
        rows = tuple(replace(row, loss=loss, energy=energy) for row, (loss, energy) in zip(rows, saved.facts["losses"], strict=True))
    elif config.learns:
        rows = measured(rows, model, table, lambda block, t: with_biases(source, placement, block, t), samples.first(config.range_samples))
    if run is not None and config.learns and not saved:
        run.save(_CALIBRATED, Stage(table.tensors, {"losses": [(row.loss, row.energy) for row in rows]}))
    plan = make_plan(source, rows, config)
    laps.end("plan")
    units = TorchModel.of(source, types, plan.units, device)
    if config.learns:
        table, results = reconstruct(units, placement, table, samples, config, progress, run)
    else:
        results = ()
        for unit in plan.units:
            table = with_biases(source, placement, unit, table)
    laps.end("reconstruct")
    return Quantized(table, placement, plan, results, import_error, str(device), samples.count, laps.seconds)


def survey(source: SourceModel, samples: Samples, config: Config) -> tuple[BlockRow, ...]:
    """Partition the model, and refuse settings that name what it does not have: everything that can be said before the work begins."""
    types = infer_types(source, samples.shapes)
    match_nodes(source.graph, config.keep_float)
    blocks = partition.layers(source.graph) if config.algorithm == "adaround" else partition.partition(source.graph, types.batched)
    rows = block_rows(source, types, blocks, config)
    if config.merge:
        make_plan(source, rows, config)
    return rows


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


def inspect(source: SourceModel, shapes: Mapping[str, tuple[int, ...]], config: Config) -> tuple[Plan, list[str]]:
    """The data-free plan for inputs of the given sample shapes, and what of the model cannot be imported to torch."""
    types = infer_types(source, shapes)
    blocks = partition.partition(source.graph, types.batched)
    problems = []
    for block in blocks:
        try:
            import_block(source, types, block)
        except UnsupportedModelError as error:
            problems.append(f"{block.name}: {error}")
    return make_plan(source, block_rows(source, types, blocks, config), config), problems


def sample_shapes(source: SourceModel, given: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of one sample of each input where there are no samples; open axes that nobody gave are assumed, and those inputs listed."""
    names = [spec.name for spec in source.inputs]
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise UsageError(f"--input-shape: the model has no input {unknown!r}{near_misses(unknown, names)}")
    shapes = {
        spec.name: given.get(spec.name, tuple(axis if isinstance(axis, int) else _ASSUMED_AXIS for axis in spec.shape[1:]))
        for spec in source.inputs
    }
    guessed = [s.name for s in source.inputs if s.name not in given and not all(isinstance(axis, int) for axis in s.shape[1:])]
    return shapes, guessed


def check_import(model: TorchModel, samples: Samples) -> float:
    """Compare torch with ONNX Runtime at every block boundary on a few samples; return the worst difference, relative to the value's range.

    Raises:
        UnsupportedModelError: a block whose outputs differ by more than float32 rounding explains.
    """
    few = samples.first(_IMPORT_SAMPLES)
    expected = runtime.run_exposed(model.source.model, few.inputs, [name for piece in model.pieces for name in piece.block.outputs])
    stream = model.stream(few.inputs)
    worst = 0.0
    for piece in model.pieces:
        outputs = model.run(piece, stream)
        for name, tensor in outputs.items():
            reference = expected[name].astype(np.float64)
            difference = np.abs(tensor.cpu().numpy() - reference).max(initial=0.0)
            error = float(difference / max(np.abs(reference).max(initial=0.0), 1e-12))
            worst = max(worst, error)
            if not error <= _IMPORT_TOLERANCE:
                kinds = ", ".join(sorted({node.op_type for node in piece.block.nodes}))
                raise UnsupportedModelError(
                    f"block {piece.block.name}: value {name!r} differs between torch and ONNX Runtime by {error:.1e} of its range; "
                    f"one of its operators ({kinds}) is imported wrongly"
                )
        stream.advance(outputs)
    return worst


def calibrate(
    model: TorchModel, placement: Placement, samples: Samples, config: Config, progress: Progress = lambda *_: None
) -> QuantTable:
    """Grids of all activations, from the float stream, and of all weights, with the codes of rounding to nearest."""
    histograms: dict[str, Histogram] = {}

    def observe(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in placement.activations:
            seen = Histogram.of(tensor)
            histograms[name] = histograms[name].merged(seen) if name in histograms else seen
        return tensor

    stream = model.stream(samples.inputs)
    for name, tensor in stream.of(model.source.graph.inputs).items():
        observe(name, tensor)
    for position, piece in enumerate(model.pieces):
        progress("calibrating", position, len(model.pieces), float("nan"))
        stream.advance(run_piece(piece, stream.of(piece.block.inputs), model.constants(piece), observe))
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
    total = sum(bool(learned_weights(piece, table)) for piece in units.pieces)
    saved = _finished(run, total)
    results: list[UnitResult] = []
    for position, piece in enumerate(units.pieces):
        if len(results) == total:
            break  # nothing after the last learned weights needs the streams
        name, done = piece.block.name, len(results)
        targets = units.run(piece, floats)
        if learned_weights(piece, table) and done < len(saved):
            progress(f"resuming after {name}", done + 1, len(saved), float("nan"))
            results.append(saved[done])
            table = table.updated(saved[done].changes)
            outputs = units.run(piece, quantized, table)
        elif learned_weights(piece, table):
            result, outputs = reconstruct_unit(
                piece=piece,
                floats=source.constants,
                inputs=quantized.of(piece.block.inputs),
                float_inputs=floats.of(piece.block.inputs),
                targets=targets,
                table=table,
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
        floats.advance(targets)
        quantized.advance(outputs)
    return table, tuple(results)


@_full_float32
def simulate(source: SourceModel, table: QuantTable, samples: Samples, device: torch.device) -> dict[str, np.ndarray]:
    """Run the quantized model in torch: the graph outputs under the table [N, ...], by name."""
    types = infer_types(source, samples.shapes)
    model = TorchModel.of(source, types, partition.partition(source.graph, types.batched), device)
    stream = model.stream(samples.inputs, table)
    for piece in model.pieces:
        stream.advance(model.run(piece, stream, table))
    return {name: tensor.cpu().numpy() for name, tensor in stream.of(source.graph.outputs).items()}


@_full_float32
def simulated_values(source: SourceModel, table: QuantTable, samples: Samples) -> dict[str, np.ndarray]:
    """Every value of the quantized model in torch on the CPU, graph inputs included, by name [N, ...]; all are held, so for few samples."""
    types = infer_types(source, samples.shapes)
    model = TorchModel.of(source, types, partition.partition(source.graph, types.batched), torch.device("cpu"))
    stream = model.stream(samples.inputs, table)
    values = {name: [tensor.numpy().copy()] for name, tensor in stream.of(source.graph.inputs).items()}

    def observe(name: str, tensor: torch.Tensor) -> torch.Tensor:
        found = quantizing(table)(name, tensor)
        values.setdefault(name, []).append(found.numpy().copy())
        return found

    for piece in model.pieces:
        stream.advance(run_piece(piece, stream.of(piece.block.inputs), model.constants(piece, table), observe))
    return {name: np.concatenate(chunks) for name, chunks in values.items() if chunks[0].ndim}


def few_samples(source: SourceModel, samples: Samples, count: int) -> Samples:
    """The first samples: `count` of them, or as many as the model's fixed batch, going round where there are fewer."""
    fixed = next((spec.shape[0] for spec in source.inputs if spec.shape and isinstance(spec.shape[0], int)), None)
    return samples.taken(np.arange(fixed or min(count, samples.count)) % samples.count)


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
    return [UnitResult(**_frozen(stage.facts), changes=stage.tensors) for stage in stages if stage is not None]


def _stage(result: UnitResult) -> Stage:
    return Stage(result.changes, {f.name: getattr(result, f.name) for f in fields(result) if f.name != "changes"})


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


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
