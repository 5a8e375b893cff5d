"""Moving the spread of channels from activations, which have one grid, into weights, which have one for each output channel.

A few channels of what LayerNormalization makes are often ten to a hundred times as large as the rest, which then share a handful of codes.
Dividing each channel j by s_j and multiplying the weights that read it by s_j leaves the products as they are (SmoothQuant, Xiao et al.,
ICML 2023, Eq. 3 and 4: s_j = max|X_j|^a / max|W_j|^(1 - a)). The strength a is chosen for each value by the error that its readers' results
have on grids; leaving the value as it is, is a choice too. What comes out is a float model, equal to the first but for the rounding of
float32, that every other tool takes as any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from . import runtime
from .calibration import Histogram, calibrate_activation, calibrate_weight
from .config import Config
from .copies import insert_copies
from .errors import ExportError
from .graph import WEIGHT_INPUT, Node, channel_axis
from .islands import find_islands
from .placement import Placement, place
from .progress import Progress
from .protos import metadata
from .quant_table import Copy, QuantSpec, TensorQuant, dequantize
from .quant_table import quantize as encode
from .rewrite_check import check_rewritten, worst_output
from .samples import Samples
from .scheme import Scheme
from .selection import check_own_precisions, match_nodes, own_precisions
from .simulation import few_samples
from .source import SourceModel, ValueTypes, infer_types

STRENGTHS = (0.25, 0.5, 0.75)
_VECTORS, _OUTPUTS = 512, 256  # of each value, and of each layer, that errors are measured on
_WORTH = 0.8  # of the error at most is left by a choice that is taken: a decibel, beyond the luck of rounding
_WIDEST = 16.0  # octaves that a factor may be from 1: weights stay normal floats
_COMPARED, _LEAST = 4, 60.0  # samples, and dB: float32 rounds at 140
_MARK = "mrecg_onnx.equalized"  # of the precision, in the metadata
_REARRANGEMENTS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity")
# The inputs of a normalization that scale and shift its result; those of ONNX Runtime's optimizer add what they normalize themselves.
_NORMALIZATIONS = {
    "LayerNormalization": slice(1, 3),
    "RMSNormalization": slice(1, 2),
    "SimplifiedLayerNormalization": slice(1, 2),
    "SkipLayerNormalization": slice(2, 4),
    "SkipSimplifiedLayerNormalization": slice(2, 3),
}


@dataclass(frozen=True)
class Group:
    """A value [..., C] and what reads it: `readers` are weighted nodes, or rearrangements that lead to such alone.

    `weights`: weight -> the axis of it that is summed over. `folded`: the constants [C], of the nodes that make the value, that carry its
    channels; empty where others read the value too, so that these readers get a scaled copy of it.
    """

    value: str
    readers: tuple[str, ...]
    weights: Mapping[str, int]
    folded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What was found for a group.

    `errors`: strength -> energy of the error of all readers' results on grids, relative to that of the results; strength 0 is the value as
    it is. `factors` [C]: what the value is divided by; ones where `strength` is 0.
    """

    group: Group
    errors: Mapping[float, float]
    strength: float
    factors: np.ndarray

    @property
    def changes(self) -> bool:
        return self.strength > 0


@dataclass(frozen=True)
class Equalized:
    """The equal float model, what was chosen for each group, and how its outputs agree with the source's, in dB (infinite: exactly).

    `notes` are those of the source, and how it agrees with its file where it was rewritten.
    """

    model: onnx.ModelProto
    choices: tuple[Choice, ...]
    agreement: float
    notes: tuple[str, ...] = ()


def equalize(source: SourceModel, samples: Samples, config: Config, progress: Progress = lambda *_: None) -> Equalized:
    """Find the groups of a model, choose their factors for a precision and target, and apply them.

    Args:
        source: the normalised model.
        samples: calibration samples, checked against the model's inputs.
        config: precision, target, what stays float, how many samples, and the seed that they are drawn with.
        progress: called as the work proceeds.

    Raises:
        UnsupportedModelError: ONNX Runtime cannot run the model on these samples, or what it was rewritten to computes something else.
        UsageError: a setting names what the model does not have.
        ExportError: the result is not equal to the source.
    """
    rewritten = check_rewritten(source, samples)
    samples = samples.chosen(min(config.calibration_samples, config.range_samples), config.seed)
    types = infer_types(source, samples.shapes, samples.inputs)
    samples = samples.whole(types.batch)
    own, floats = own_precisions(source.graph, config.own_bits), match_nodes(source.graph, config.keep_float)
    placement = place(source, types, config.scheme, config.precision, floats, find_islands(source, types), own)
    check_own_precisions(source.graph, config.own_bits, placement.met)
    choices = choose(source, placement, find_groups(source, types, placement, config.scheme), samples, progress)
    model = equalized(source, choices)
    helper.set_model_props(model, metadata(model) | {_MARK: config.label})
    few = few_samples(source, samples, _COMPARED)
    agreement, output = worst_output(*(runtime.run(runtime.session(one), few.inputs) for one in (source.model, model)))
    if agreement < _LEAST and any(choice.changes for choice in choices):
        raise ExportError(
            f"{source.path}: output {output!r} of the equalized model agrees with it to {agreement:.1f} dB only, "
            f"where {_LEAST:.0f} are expected"
        )
    return Equalized(model, choices, agreement, (*source.notes, *([rewritten] if rewritten is not None else [])))


def evenable(source: SourceModel) -> tuple[str, ...]:
    """The weighted nodes that read what a normalization makes, in a model that has not been equalized."""
    if _MARK in metadata(source.model):
        return ()
    return tuple(
        node.name
        for node in source.graph.weighted
        if (weight := source.graph.weight(node)) is not None
        and _summed_axis(source, node, weight) is not None
        and _carriers(source, _origin(source, node.inputs[0]))
    )


def find_groups(source: SourceModel, types: ValueTypes, placement: Placement, scheme: Scheme) -> tuple[Group, ...]:
    """The values on grids of their own that a normalization makes, and the weighted nodes on grids that alone read their weights.

    Rearrangements may lie between the two, where they leave the last axis as it is. A value that is on its grid for others too is left: a
    scaled copy would be made of what is rounded already.
    """
    found = (_group(source, types, placement, scheme, value) for value in placement.activations)
    return tuple(group for group in found if group is not None)


def choose(
    source: SourceModel, placement: Placement, groups: Sequence[Group], samples: Samples, progress: Progress = lambda *_: None
) -> tuple[Choice, ...]:
    """The strength of each group that leaves the least error, from one run of the float model.

    Raises:
        UnsupportedModelError: ONNX Runtime cannot run the model on these samples.
    """
    seen = _seen(source, [group.value for group in groups], samples)
    choices = []
    for position, group in enumerate(groups):
        progress("equalizing", position, len(groups), float("nan"))
        if group.value in seen:
            choices.append(_choice(source, placement, group, *seen[group.value]))
    return tuple(choices)


def equalized(source: SourceModel, choices: Sequence[Choice]) -> onnx.ModelProto:
    """The model with the factors that were chosen in it; every result is that of the source, but for the order of sums.

    Where nothing else reads a value, its factors go into the constants of the node that makes it; else a Mul makes a scaled copy of it,
    `<value>_equalized`, for the readers of the group.
    """
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    scaled: dict[str, Choice] = {}
    for choice in choices:
        if not choice.changes:
            continue
        for weight, axis in choice.group.weights.items():
            _set(tensors[weight], source.constants[weight] * np.expand_dims(choice.factors, 1 - axis))
        for constant in choice.group.folded:
            _set(tensors[constant], source.constants[constant] / choice.factors)
        if not choice.group.folded:
            scaled[f"{choice.group.value}_equalized"] = choice
    insert_copies(model.graph, {name: Copy(choice.group.value, choice.group.readers) for name, choice in scaled.items()})
    for node in model.graph.node:
        if node.name in scaled and node.output[0] == node.name:
            node.op_type = "Mul"
            node.input.append(f"{node.name}_factors")
            model.graph.initializer.append(numpy_helper.from_array(1 / scaled[node.name].factors, node.input[1]))
    return model


def _group(source: SourceModel, types: ValueTypes, placement: Placement, scheme: Scheme, value: str) -> Group | None:
    graph = source.graph
    carriers = _carriers(source, value)
    if not carriers or value in placement.copies:
        return None
    channels = source.constants[carriers[0]].size
    weights: dict[str, int] = {}
    layers: set[Node] = set()
    readers: list[str] = []
    for node in graph.readers_of(value):
        found = _reached(source, types, node, value, channels)
        if found and all(layer.weight in placement.weights for layer in found):
            weights |= {layer.weight: layer.axis for layer in found}
            layers |= {layer.node for layer in found}
            readers.append(node.name)
    if not readers or any(node not in layers for weight in weights for node in graph.readers_of(weight)):
        return None
    others = [node.name for node in graph.readers_of(value) if node.name not in readers]
    alone = value not in graph.outputs and not others
    own = alone and all(len(graph.readers_of(constant)) == 1 for constant in carriers) and not weights.keys() & set(carriers)
    if not own and (scheme.results == "all" or not placement.met.isdisjoint(others)):
        return None
    return Group(value, tuple(readers), MappingProxyType(weights), carriers if own else ())


class _Layer(NamedTuple):
    """A weighted node, its weight, and the axis of that which it sums over."""

    node: Node
    weight: str
    axis: int


def _reached(source: SourceModel, types: ValueTypes, node: Node, value: str, channels: int) -> list[_Layer]:
    """The layers that read a value's last axis: a reader, or those behind its rearrangement of other axes; none where it does more."""
    graph = source.graph
    if node.inputs.count(value) != 1 or node.inputs[0] != value:
        return []
    weight = graph.weight(node)
    if weight is not None:
        axis = _summed_axis(source, node, weight)
        return [_Layer(node, weight, axis)] if axis is not None and source.constants[weight].shape[axis] == channels else []
    moved = node.outputs[0] if node.outputs else ""
    if not _keeps_last_axis(source, types, node, channels) or moved in graph.outputs or not graph.readers_of(moved):
        return []
    found = [_reached(source, types, reader, moved, channels) for reader in graph.readers_of(moved)]
    return [layer for some in found for layer in some] if all(found) else []


def _keeps_last_axis(source: SourceModel, types: ValueTypes, node: Node, channels: int) -> bool:
    """Whether a node moves whole vectors of a value's last axis."""
    if not node.is_standard or node.op_type not in _REARRANGEMENTS or len(node.outputs) != 1:
        return False
    before, after = (types.shapes.get(name) for name in (node.inputs[0], node.outputs[0]))
    if before is None or after is None or not before or not after or before[-1] != channels or after[-1] != channels:
        return False
    order = next((list(a.ints) for a in source.node_protos[node.name].attribute if a.name == "perm"), [])
    return node.op_type != "Transpose" or (bool(order) and order[-1] == len(order) - 1)


def _origin(source: SourceModel, value: str) -> str:
    """What a value is a rearrangement of, whatever becomes of its axes."""
    while (node := source.graph.producer.get(value)) is not None and node.is_standard and node.op_type in _REARRANGEMENTS:
        value = node.inputs[0]
    return value


def _carriers(source: SourceModel, value: str) -> tuple[str, ...]:
    """The constants [C] of a normalization that scale and shift the last axis of its result; none where it is no such result.

    It is one operator, or the product with a constant vector, to which another may be added, that older exports end with.
    """
    graph = source.graph
    node = graph.producer.get(value)
    if node is None or node.outputs[0] != value:
        return ()
    if node.op_type in _NORMALIZATIONS:
        axis = next((a.i for a in source.node_protos[node.name].attribute if a.name == "axis"), -1)
        constants = tuple(name for name in node.inputs[_NORMALIZATIONS[node.op_type]] if name)
        return constants if axis == -1 and all(_is_vector(source, name) for name in constants) else ()
    shift = _vector(source, node) if node.op_type == "Add" and node.is_standard else None
    if shift is not None:
        (value,) = graph.data_inputs(node)
        node = graph.producer.get(value)
        if node is None or len(graph.readers_of(value)) > 1 or value in graph.outputs:
            return ()
    scale = _vector(source, node) if node.op_type == "Mul" and node.is_standard else None
    if scale is None or (shift is not None and source.constants[shift].size != source.constants[scale].size):
        return ()
    return (scale,) if shift is None else (scale, shift)


def _vector(source: SourceModel, node: Node) -> str | None:
    """The constant [C] that a node of two inputs has beside a computed one."""
    constants = [name for name in node.inputs if name in source.constants]
    return constants[0] if len(constants) == 1 and len(node.inputs) == 2 and _is_vector(source, constants[0]) else None


def _is_vector(source: SourceModel, name: str) -> bool:
    array = source.constants.get(name)
    return array is not None and array.dtype == np.float32 and array.ndim > 0 and 1 < array.size == array.shape[-1]


def _summed_axis(source: SourceModel, node: Node, weight: str) -> int | None:
    """The axis of a matrix that a node sums over where it reads the last axis of its input; None where it does neither."""
    shape = source.constants[weight].shape
    attributes = {a.name: a.i for a in source.node_protos[node.name].attribute}
    if node.op_type not in ("MatMul", "Gemm") or WEIGHT_INPUT[node.op_type] != 1 or len(shape) != 2 or attributes.get("transA"):
        return None
    return 1 - channel_axis(node.op_type, 2, bool(attributes.get("transB")))


def _seen(source: SourceModel, values: Sequence[str], samples: Samples) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Largest magnitude of each channel [C] over all samples, and some vectors [n, C], evenly from all of them, by value."""
    largest: dict[str, np.ndarray] = {}
    vectors: dict[str, list[np.ndarray]] = {value: [] for value in values}
    if not values:
        return {}
    share = max(_VECTORS // max(samples.count, 1), 1)
    for one in runtime.passes(runtime.exposing(source.model, values), samples.inputs, values):
        for value in values:
            rows = runtime.as_array(one.made[value])
            rows = rows.reshape(-1, rows.shape[-1])
            if not rows.size or not np.isfinite(rows).all():
                continue
            found = np.abs(rows).max(axis=0)
            largest[value] = np.maximum(largest[value], found) if value in largest else found
            step = max(len(rows) // (share * one.count), 1)
            vectors[value].append(rows[step // 2 :: step])
    return {value: (found, np.concatenate(vectors[value])[: 2 * _VECTORS]) for value, found in largest.items()}


def _choice(source: SourceModel, placement: Placement, group: Group, largest: np.ndarray, vectors: np.ndarray) -> Choice:
    """The best strength of a group, by the error of its readers' results where values and weights are rounded to nearest."""
    heaviest = np.max([np.abs(source.constants[name]).max(axis=1 - axis) for name, axis in group.weights.items()], axis=0)
    factors = {0.0: np.ones(len(largest), np.float32)} | {a: _factors(largest, heaviest, a) for a in STRENGTHS}
    weights = {name: _some_outputs(source.constants[name], axis) for name, axis in group.weights.items()}
    exact = {name: vectors @ np.moveaxis(weight, group.weights[name], 0) for name, weight in weights.items()}
    energy = sum(float(np.square(result, dtype=np.float64).sum()) for result in exact.values())
    errors: dict[float, float] = {}
    for strength, divided in factors.items():
        read = _on_grid(vectors / divided, placement.activations[group.value])
        error = 0.0
        for name, axis in group.weights.items():
            scaled = weights[name] * np.expand_dims(divided, 1 - axis)
            rounded = _rounded(scaled, calibrate_weight(scaled, placement.weights[name], "mse", 100.0))
            error += float(np.square(read @ np.moveaxis(rounded, axis, 0) - exact[name], dtype=np.float64).sum())
        errors[strength] = error / energy if energy else 0.0
    best = min(errors, key=lambda strength: (errors[strength], strength))
    if errors[best] > _WORTH * errors[0.0]:
        best = 0.0
    return Choice(group, MappingProxyType(errors), best, factors[best])


def _some_outputs(weight: np.ndarray, axis: int) -> np.ndarray:
    """The part of a matrix that makes some of its outputs, evenly chosen; `axis` is the one that is summed over."""
    outputs = weight.shape[1 - axis]
    return weight.take(np.arange(0, outputs, -(-outputs // _OUTPUTS)), axis=1 - axis)


def _factors(largest: np.ndarray, heaviest: np.ndarray, strength: float) -> np.ndarray:
    """s_j = max|X_j|^a / max|W_j|^(1 - a), around 1; 1 where a channel is nothing, or read by nothing."""
    alive = (largest > 0) & (heaviest > 0)
    exponents = np.zeros(len(largest))
    exponents[alive] = strength * np.log2(largest[alive]) - (1 - strength) * np.log2(heaviest[alive])
    if alive.any():
        exponents[alive] -= np.median(exponents[alive])
    return np.exp2(np.clip(exponents, -_WIDEST, _WIDEST)).astype(np.float32)


def _on_grid(values: np.ndarray, spec: QuantSpec) -> np.ndarray:
    return _rounded(values, calibrate_activation(Histogram.of(torch.from_numpy(values)), spec, "mse", 100.0))


def _rounded(values: np.ndarray, grid: TensorQuant) -> np.ndarray:
    return dequantize(encode(values, grid), grid)


def _set(tensor: onnx.TensorProto, array: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), tensor.name))
