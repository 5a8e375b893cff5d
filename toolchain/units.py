"""The units of a plan, reconstructed one after another on the two streams of activations."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from . import compiled
from .activations import Parts, Piece, TorchModel, Value
from .baselines.adaquant import adaquant_unit
from .baselines.bit_split import split_unit
from .config import Config
from .cpu import give_back_freed_memory
from .device import multiplies_bfloat16
from .errors import UsageError
from .grids import biases_of, retied, with_biases
from .partition import Block
from .placement import Placement
from .processes import ALONE, Processes
from .progress import Progress
from .quant_table import QuantTable
from .reconstruction import reconstruct_unit
from .recording import NotCapturedError
from .run_folder import RunFolder, Stage
from .samples import Samples
from .source import SourceModel
from .torch_import import TorchBlock
from .unit import CurvePoint, Unit, UnitResult, learned_weights

Learner = Callable[[Unit], tuple[UnitResult, dict[str, Value]]]


def reconstruct(
    units: TorchModel,
    placement: Placement,
    table: QuantTable,
    samples: Samples,
    config: Config,
    progress: Progress = lambda *_: None,
    run: RunFolder | None = None,
    processes: Processes = ALONE,
    parts: Mapping[str, int] = MappingProxyType({}),
) -> tuple[QuantTable, tuple[UnitResult, ...]]:
    """Reconstruct the units in order: each reads the quantized outputs of those before it and aims at its own float output.

    Units that a run folder holds are not learned again: the streams pass through them as they were left. `parts`: of the mini-batches of
    units, by name, whose work would not be within the memory budget otherwise.
    """
    source = units.source
    floats, quantized = units.stream(samples.inputs), units.stream(samples.inputs, table)
    total, learnt = len(_learning(units.pieces, table)), set[str]()
    saved = processes.first(_finished(run, total))
    is_compiled = len(saved) < total and compiles(units, table, config)
    is_narrow = len(saved) < total and narrows(units, config, is_compiled)
    results: list[UnitResult] = []
    for position, piece in enumerate(units.pieces):
        if len(results) == total:
            break  # nothing after the last learned weights needs the streams
        name, done = piece.block.name, len(results)
        give_back_freed_memory()
        made = units.run(piece, floats)
        weights = learned_weights(piece, table, learnt)
        if weights and done < len(saved):
            progress(f"resuming after {name}", done + 1, total, float("nan"))
            results.append(saved[done])
            table = table.updated(saved[done].changes)
            outputs = units.run(piece, quantized, table)
        elif weights:
            assert isinstance(piece, TorchBlock)
            # Processes share what they were checked for to divide among them: the whole mini-batch.
            size = units.types.largest(piece.block.values) if processes.count == 1 else 1
            inputs, float_inputs, targets = quantized.of(piece.block.inputs), floats.of(piece.block.inputs), made
            if not _alike(inputs, float_inputs):  # shapes that follow from data: aim at what the float unit makes of the same inputs
                float_inputs, targets = inputs, units.run(piece, quantized)
            unit = Unit(
                piece=piece,
                weights=weights,
                biases=biases_of(placement, piece.block),
                scores=placement.scores.values,
                floats=source.constants,
                inputs=inputs,
                float_inputs=float_inputs,
                targets=targets,
                passes=quantized.passes,
                device=units.device,
                table=table,
                finish=lambda learned, biases=MappingProxyType({}), block=piece.block: with_biases(
                    source, placement, block, retied(placement, learned), biases
                ),
                settings=config.settings(has_depthwise(source, piece.block), size),
                seed=int(np.random.SeedSequence([config.seed, position]).generate_state(1)[0]),
                progress=_unit_progress(progress, name, done, total),
                processes=processes,
                splits=parts.get(name, 1),
                is_compiled=is_compiled,
                is_recorded=units.device.type == "cuda" and config.cuda_graphs == "auto",
                is_narrow=is_narrow,
            )
            result, outputs = _learned(unit, learner(config))
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


def _learned(unit: Unit, learn: Learner) -> tuple[UnitResult, dict[str, Value]]:
    """Learn a unit; once more from the start where the device cannot as it is.

    That is, with parts of half the size where its memory does not hold a mini-batch, and step by step where it cannot capture a step.
    """
    name, note = unit.piece.block.name, unit.passes.room.note
    while True:
        try:
            return learn(unit)
        except torch.OutOfMemoryError:
            splits = 2 * unit.splits
            if splits > min(unit.settings.batch_size, unit.passes.count) or unit.processes.count > 1:
                raise
            unit = replace(unit, splits=splits)
            note(f"unit {name}: a mini-batch did not fit the device's memory: it was learned from in {splits} parts")
        except NotCapturedError as error:
            unit = replace(unit, is_recorded=False)
            note(f"unit {name}: learned without a CUDA graph, which takes longer: {error}")


def compiles(units: TorchModel, table: QuantTable, config: Config) -> bool:
    """Whether the quantizers are compiled, as `config.compile` says; where it leaves that open, whether it pays and can be done.

    Raises:
        UsageError: it was asked for, and cannot be done.
    """
    if config.compile == "off" or config.algorithm == "bit-split":  # it has no quantizers that learn
        return False
    values = {name for piece in _learning(units.pieces, table) for node in piece.block.nodes for name in node.outputs if name in table}
    elements = sum(math.prod(units.types.shapes[name]) for name in values if name in units.types.shapes)
    settings = config.settings(has_depthwise=False, largest=units.types.largest(values))
    if config.compile == "auto" and not compiled.is_worth(settings.iterations, settings.batch_size * elements, units.device):
        return False
    refused = compiled.refusal(units.device)
    if refused is None:
        return True
    if config.compile == "on":
        needed = "a C++ compiler (g++)" if units.device.type == "cpu" else "a C compiler (gcc) and Python's headers, for Triton"
        raise UsageError(f"--compile on: torch could not compile: {refused}; install {needed}, or use --compile off")
    units.room.note(f"quantizers ran as single operations, which takes longer: torch could not compile: {refused}")
    return False


def narrows(units: TorchModel, config: Config, is_compiled: bool) -> bool:
    """Whether products are computed in bfloat16 while learning, as `config.amp` says; where it leaves that open, whether it pays."""
    pays = config.amp == "on" or (config.amp == "auto" and is_compiled and multiplies_bfloat16(units.device))
    if not pays or config.algorithm == "bit-split":  # it learns without gradients
        return False
    units.room.note("products were computed in bfloat16 while units were learned, all else in float32 (--amp off: all in float32)")
    return True


def learner(config: Config) -> Learner:
    """What learns a unit."""
    return {"adaquant": adaquant_unit, "bit-split": split_unit}.get(config.algorithm, reconstruct_unit)


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


def has_depthwise(source: SourceModel, block: Block) -> bool:
    """Whether a block has a convolution with one input channel per group."""
    weights = [(node, source.graph.weight(node)) for node in block.nodes if node.op_type == "Conv"]
    groups = {node.name: [a.i for a in source.node_protos[node.name].attribute if a.name == "group"] for node, _ in weights}
    return any(w is not None and source.constants[w].shape[1] == 1 and max(groups[node.name], default=1) > 1 for node, w in weights)


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


def _unit_progress(progress: Progress, name: str, done: int, total: int) -> Callable[[int, int, float], None]:
    return lambda step, steps, loss: progress(f"reconstructing {name}", done * steps + step, total * steps, loss)
