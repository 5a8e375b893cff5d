"""Which layers hurt: the output's signal to noise when only one layer is quantized, and when only that one is float."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .activations import Parts, Passes, Piece, TorchModel, Value, run_piece, unpacked
from .graph import Graph, Node
from .noise import sqnr
from .quant_table import QuantTable
from .samples import Samples

SAMPLES = 16  # enough to rank layers: their output noise differs by tens of dB


@dataclass(frozen=True)
class LayerSensitivity:
    """SQNR of the model's worst output, in dB over the same few samples.

    `only_quantized`: this layer's weight, bias and input are on their grids, and what is made of its result up to the next layers (a gate,
    an addend), and all else is float. `only_float`: these are float and all else is on its grid. The input's grid belongs to the value, so
    other readers of it are affected too.
    """

    node: str
    op_type: str
    weight_bits: int
    input_bits: int | None
    only_quantized: float
    only_float: float


@dataclass(frozen=True)
class Sensitivity:
    """The layers in execution order; `all_quantized` is the SQNR to compare `only_float` with. `skipped` says why there are no layers."""

    samples: int
    all_quantized: float | None
    layers: tuple[LayerSensitivity, ...]
    seconds: float
    skipped: str | None = None


@torch.no_grad()
def sensitivity(
    model: TorchModel,
    table: QuantTable,
    samples: Samples,
    limit: float | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Sensitivity:
    """Measure every quantized layer.

    Only what comes after a layer is run again, so the whole costs about one pass over the network for each layer.

    Args:
        model: the imported blocks.
        table: the finished table.
        samples: the samples to measure on; all are used.
        limit: seconds that it may take; where the first two passes tell that more is needed, it is skipped. None: no limit.
        progress: called with (layers done, layers).
    """
    started = time.perf_counter()
    graph = model.source.graph
    layers = [node for node in graph.weighted if graph.weight(node) in table]
    floats, quantized = _boundaries(model, samples, None), _boundaries(model, samples, table)
    seconds = time.perf_counter() - started
    reference = {name: floats[name] for name in graph.outputs}
    whole = _sqnr(reference, {name: quantized[name] for name in graph.outputs})
    estimate = seconds / 2 * len(layers)
    if limit is not None and estimate > limit:
        reason = f"it would take about {estimate:.0f} s, more than a tenth of the run; --sensitivity measures it all the same"
        return Sensitivity(samples.count, whole, (), seconds, reason)
    found = []
    between = _between(model.source.graph, table)
    for position, node in enumerate(layers):
        own = _own(model, node, table) | between.get(node.name, frozenset())
        start = _start(model, node, own)
        alone = QuantTable({name: grid for name, grid in table.tensors.items() if name in own})
        others = QuantTable({name: grid for name, grid in table.tensors.items() if name not in own})
        operand = table.tensors.get(node.inputs[0])
        weight = graph.weight(node)
        assert weight is not None
        found.append(
            LayerSensitivity(
                node.name,
                node.op_type,
                table[weight].spec.bits,
                operand.spec.bits if operand is not None else None,
                _sqnr(reference, _rerun(model, start, samples, floats, alone)),
                _sqnr(reference, _rerun(model, start, samples, quantized, others)),
            )
        )
        progress(position + 1, len(layers))
    return Sensitivity(samples.count, whole, tuple(found), time.perf_counter() - started)


def layers_before(graph: Graph) -> dict[str, str]:
    """The weighted layer that each node, other than these, is computed from; the last of several in execution order."""
    order = {node.name: place for place, node in enumerate(graph.nodes)}
    weighted = {node.name for node in graph.weighted}
    found: dict[str, str] = {}
    for node in graph.nodes:
        makers = [made.name for value in node.inputs if (made := graph.producer.get(value)) is not None]
        before = [name if name in weighted else found[name] for name in makers if name in weighted or name in found]
        if node.name not in weighted and before:
            found[node.name] = max(before, key=lambda name: order[name])
    return found


def _between(graph: Graph, table: QuantTable) -> dict[str, frozenset[str]]:
    """The activations on grids that no layer reads, by the name of the layer that they are made of."""
    read = {node.inputs[0] for node in graph.weighted}
    read |= {table[name].tied_to or name for name in read if name in table}
    weighted, before = {node.name for node in graph.weighted}, layers_before(graph)
    found: dict[str, set[str]] = {}
    for name, grid in table.tensors.items():
        made = graph.producer.get(name)
        if grid.codes is not None or made is None or not read.isdisjoint((name, grid.tied_to)):
            continue
        layer = made.name if made.name in weighted else before.get(made.name)
        if layer is not None:
            found.setdefault(layer, set()).add(name)
    return {layer: frozenset(names) for layer, names in found.items()}


def _own(model: TorchModel, node: Node, table: QuantTable) -> frozenset[str]:
    """The names in a table that belong to a layer: weight, bias, and its input with the value whose grid that repeats."""
    graph = model.source.graph
    operand = node.inputs[0]
    origin = table[operand].tied_to or operand if operand in table else operand
    names = {graph.weight(node), graph.bias(node), operand, origin}
    return frozenset(name for name in names if name is not None and name in table)


def _start(model: TorchModel, node: Node, own: frozenset[str]) -> int:
    """The first piece that makes a value of the layer's own, or holds the layer; -1 where a graph input is among them."""
    if own & set(model.source.graph.inputs):
        return -1
    return next(
        index for index, piece in enumerate(model.pieces) if any(n.name == node.name or own & set(n.outputs) for n in piece.block.nodes)
    )


def _boundaries(model: TorchModel, samples: Samples, table: QuantTable | None) -> dict[str, Value]:
    """All values that cross a boundary between pieces, in the float stream or (with a table) in the quantized one."""
    stream = model.stream(samples.inputs, table)
    values = stream.of(model.source.graph.inputs)
    for piece in model.pieces:
        values |= _run(model, piece, values, table, stream.passes)
    return values


def _rerun(model: TorchModel, start: int, samples: Samples, values: Mapping[str, Value], table: QuantTable) -> dict[str, Value]:
    """The outputs when everything from piece `start` on runs under another table, and what is before it stays."""
    graph = model.source.graph
    stream = model.stream(samples.inputs, table)
    changed = dict(values)
    if start < 0:
        changed |= stream.of(graph.inputs)
    for piece in model.pieces[max(start, 0) :]:
        changed |= _run(model, piece, changed, table, stream.passes)
    return {name: changed[name] for name in graph.outputs}


def _run(model: TorchModel, piece: Piece, values: Mapping[str, Value], table: QuantTable | None, passes: Passes) -> dict[str, Value]:
    inputs = {name: values[name] for name in piece.block.inputs}
    return run_piece(piece, inputs, model.constants(piece, table), passes, table=table)


def _sqnr(reference: Mapping[str, Value], outputs: Mapping[str, Value]) -> float:
    """Of the worst output; NaN where none can be compared because their shapes follow from the data."""
    pairs = [(_flat(value), _flat(outputs[name])) for name, value in reference.items()]
    return min((sqnr(a, b) for a, b in pairs if a.shape == b.shape), default=float("nan"))


def _flat(kept: Value) -> np.ndarray:
    value = unpacked(kept)
    parts = [part for part in (value if isinstance(value, Parts) else [value]) if isinstance(part, torch.Tensor)]
    return np.concatenate([part.cpu().numpy().ravel() for part in parts]) if parts else np.empty(0)
