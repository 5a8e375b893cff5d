"""The grids of a whole model: observed ranges to scales and zero points, biases whose scales follow, and values that repeat another's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch

from .activations import TorchModel, observed
from .baselines import aciq, lapq
from .calibration import NORM, Histogram, calibrate_activation, calibrate_bias, calibrate_weight, fit_bias
from .config import Config
from .float_reasons import float_bias_reason
from .flow import Flow
from .partition import Block
from .placement import Bias, Placement, without
from .progress import Progress
from .quant_table import BIAS_BITS, QuantSpec, QuantTable, TensorQuant
from .quant_table import quantize as encode
from .range_choice import RangeChoice, RangeMethod, choose_ranges
from .samples import Samples
from .saturation import fitted, settled
from .scheme import Scheme
from .source import SourceModel


@dataclass(frozen=True)
class Calibration:
    """Grids of all activations and weights with the codes of rounding to nearest, and how the ranges of activations were chosen."""

    table: QuantTable
    ranges: tuple[RangeChoice, ...] = ()


def calibrate(
    model: TorchModel,
    placement: Placement,
    samples: Samples,
    config: Config,
    progress: Progress = lambda *_: None,
    known: Sequence[RangeChoice] = (),
) -> Calibration:
    """Grids of all activations, from the float stream, and of all weights.

    Activations that have no range (never made, empty, or not finite) get none. `known` are methods that were chosen before, which are taken
    for the activations of their bit width.
    """
    seen = observe(model, placement, samples, progress)
    placement = without(placement, placement.activations.keys() - seen.keys())
    if config.algorithm == "lapq":
        table = lapq.calibrate_jointly(
            model,
            placement,
            samples,
            config.unit_iterations,
            lambda norm: grids_of(model.source, placement, seen, methods(config, norm)),
            lambda position, table: with_biases(model.source, placement, model.pieces[position].block, table),
            progress,
        )
        return Calibration(table)
    chosen: tuple[RangeChoice, ...] = ()
    if config.chooses_ranges:
        widths = {spec.bits for spec in placement.activations.values() if spec.span is None}

        def grids(bits: int, method: RangeMethod) -> QuantTable:
            some = without(placement, {name for name, spec in placement.activations.items() if spec.bits != bits})
            return QuantTable(activation_grids(some, seen, by(method, config.percentile)))

        taken = tuple(choice for choice in known if choice.bits in widths)
        open_ = widths - {choice.bits for choice in taken}
        chosen = (*taken, *(choose_ranges(model, samples, open_, grids, progress) if open_ else ()))
    return Calibration(grids_of(model.source, placement, seen, methods(config, chosen=chosen)), chosen)


def observe(model: TorchModel, placement: Placement, samples: Samples, progress: Progress = lambda *_: None) -> dict[str, Histogram]:
    """What the float stream shows of each activation; nothing of those that are never made, empty, or not finite.

    What ends up in Softmax alone is seen as far down as it tells there.
    """
    histograms: dict[str, Histogram] = {}
    endless: set[str] = set()
    bits = {name: spec.bits for name, spec in placement.activations.items()}

    def look(name: str, tensor: torch.Tensor) -> torch.Tensor:
        found = placement.scores.shown(name, tensor, bits) if tensor.numel() else None
        if found is None or found[0] in endless:
            return tensor
        value, shown = found
        low, high = torch.aminmax(tensor)
        if not torch.isfinite(high - low):
            endless.add(value)
            return tensor
        seen = Histogram.of(shown)
        histograms[value] = histograms[value].merged(seen) if value in histograms else seen
        return tensor

    stream = model.stream(samples.inputs)
    for name, value in stream.of(model.source.graph.inputs).items():
        observed(name, value, look)
    for position, piece in enumerate(model.pieces):
        progress("calibrating", position, len(model.pieces), float("nan"))
        stream.advance(model.run(piece, stream, observe=look))
    return placement.scores.limited({name: histogram for name, histogram in histograms.items() if name not in endless})


@dataclass(frozen=True)
class Methods:
    """How the grid of an activation is found from what was seen of it, and that of a weight from its numbers.

    `finish` is applied to a weight and its grid once it has codes.
    """

    activation: Callable[[Histogram, QuantSpec], TensorQuant]
    weight: Callable[[np.ndarray, QuantSpec], TensorQuant]
    finish: Callable[[np.ndarray, TensorQuant], TensorQuant] = lambda _, found: found


def by(method: RangeMethod, percentile: float) -> Callable[[Histogram, QuantSpec], TensorQuant]:
    """How a method finds the grid of an activation."""
    return lambda histogram, spec: calibrate_activation(histogram, spec, method.kind, percentile, method.norm)


def methods(config: Config, norm: float = NORM, chosen: Sequence[RangeChoice] = ()) -> Methods:
    """The methods that a configuration asks for; `norm` is that of the errors that `mse` compares, `chosen` what goes before it."""
    if config.algorithm == "aciq":
        return Methods(aciq.calibrate_clipped, aciq.calibrate_allocated, aciq.with_norms)
    activations, weights = config.activation_range, config.weight_range
    if config.algorithm in ("minmax", "lapq"):
        activations = weights = {"minmax": "minmax", "lapq": "mse"}[config.algorithm]
    asked = RangeMethod("mse" if activations == "auto" else activations, norm)
    own = {choice.bits: choice.method for choice in chosen}
    return Methods(
        lambda histogram, spec: by(own.get(spec.bits, asked), config.percentile)(histogram, spec),
        lambda weight, spec: calibrate_weight(weight, spec, weights, config.percentile, norm),
    )


def grids_of(source: SourceModel, placement: Placement, seen: Mapping[str, Histogram], how: Methods) -> QuantTable:
    """The grids of activations whose histograms are given and of all weights, with the codes of rounding to nearest."""
    table = activation_grids(placement, seen, how.activation)
    for name, spec in placement.weights.items():
        table[name] = how.weight(source.constants[name], spec)
    for name, bias in placement.biases.items():
        table[bias.weight] = fit_bias(table[bias.weight], source.constants[name], table[bias.input].scale)
    for name in placement.weights:
        weight = source.constants[name]
        table[name] = fitted(weight, table[name])
        table[name] = how.finish(weight, replace(table[name], codes=encode(weight, table[name])))
    return QuantTable(table | stored_grids(source, placement, how))


def activation_grids(
    placement: Placement, seen: Mapping[str, Histogram], activation: Callable[[Histogram, QuantSpec], TensorQuant]
) -> dict[str, TensorQuant]:
    """The grids of activations whose histograms are given, of those that share one, and of those that repeat one."""
    table = {name: activation(seen[name], spec) for name, spec in placement.activations.items()}
    table |= shared_grids(placement, seen, activation)
    table |= {name: replace(table[name], copy=copy) for name, copy in placement.copies.items() if name in table}
    return table | {name: replace(table[origin], tied_to=origin) for name, origin in placement.tied.items()}


def stored_grids(source: SourceModel, placement: Placement, how: Methods) -> dict[str, TensorQuant]:
    """Grids and codes of the weights that are only stored.

    At 8 bits their range is min-max: a search gains nothing there, and tables are large.
    """
    found = {}
    for name, spec in placement.stored.items():
        array = source.constants[name]
        grid = calibrate_weight(array, spec, "minmax", 100.0) if spec.bits >= 8 else how.weight(array, spec)
        found[name] = replace(grid, codes=encode(array, grid), fixed=True)
    return found


def shared_grids(
    placement: Placement, histograms: Mapping[str, Histogram], activation: Callable[[Histogram, QuantSpec], TensorQuant]
) -> dict[str, TensorQuant]:
    """One grid for all values that share one, from all that was seen of them."""
    seen: dict[str, Histogram] = {}
    for name, leader in placement.shared.items():
        seen[leader] = seen[leader].merged(histograms[name]) if leader in seen else histograms[name]
    grids = {name: activation(found, placement.activations[name]) for name, found in seen.items()}
    return {name: replace(grids[leader], fixed=True) for name, leader in placement.shared.items()}


def biases_of(placement: Placement, block: Block) -> dict[str, Bias]:
    """The quantized biases that a block's nodes add."""
    inside = {node.name for node in block.nodes}
    return {name: bias for name, bias in placement.biases.items() if bias.node in inside}


def with_biases(
    source: SourceModel, placement: Placement, block: Block, table: QuantTable, learned: Mapping[str, np.ndarray] = MappingProxyType({})
) -> QuantTable:
    """Add the int32 codes of a block's biases (the float ones, or what was learned), whose scales follow from inputs' and weights'.

    Codes of weights are brought to what does not saturate, where learning moved them.
    """
    weights = {name for node in block.nodes if (name := source.graph.weight(node)) is not None and name in table}
    table = table.updated({name: settled(table[name]) for name in weights})
    return table.updated(
        {
            name: calibrate_bias(learned.get(name, source.constants[name]), table[bias.weight], table[bias.input].scale, BIAS_BITS)
            for name, bias in biases_of(placement, block).items()
        }
    )


def completed(source: SourceModel, table: QuantTable, scheme: Scheme) -> QuantTable:
    """What other tools leave unsaid: values that are moved only repeat the grid of their origin, and biases follow from inputs and weights.

    Biases become int32 codes, except of more than 2^31 steps, and where the target has them in float.
    """
    graph = source.with_copies(table.copies).graph
    values = frozenset(value for node in graph.nodes for value in node.outputs)
    flow = Flow(source, values, frozenset(), scheme, frozenset(table.copies))
    found = dict(table.tensors)
    for node in graph.nodes:
        if flow.moves(node) and (origin := found.get(node.inputs[0])) is not None:
            moved = replace(origin, tied_to=origin.tied_to or node.inputs[0], copy=None)
            found |= {value: moved for value in node.outputs if value and value not in {*found, *graph.outputs}}
    for node in graph.weighted if scheme.bias != "float" else ():
        weight, bias = graph.weight(node), graph.bias(node)
        if weight is None or bias is None or bias in found or not {weight, node.inputs[0]} <= found.keys():
            continue
        if float_bias_reason(source, node, bias) is None:
            grid = calibrate_bias(source.constants[bias], found[weight], np.float32(found[node.inputs[0]].scale), BIAS_BITS)
            assert grid.codes is not None
            if np.abs(grid.codes).max(initial=0) < grid.spec.qmax:
                found[bias] = grid
    return QuantTable(found)


def retied(placement: Placement, table: QuantTable) -> QuantTable:
    """Let tied values follow the grid that they repeat."""
    return table.updated({name: replace(table[origin], tied_to=origin) for name, origin in placement.tied.items()})
