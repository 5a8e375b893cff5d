"""Which values of a model carry a quantizer, and of how many bits: the rules of a target applied to a graph.

Learning and export both read the placement and nothing else. Common to all targets:

* a weighted operator (Conv, ConvTranspose, Gemm, MatMul) reads an *operand*: its activation input has `activation_bits`, its weight
  `weight_bits`. One quantizer belongs to the value, so every reader sees the same tensor; but where an element-wise operator on integers
  reads it too (an identity shortcut), and in more bits, the weighted ones read a copy with a grid of its own (`Precision.requantizes`);
* a result is quantized behind its activation (Relu, Clip), never between the two;
* data movement (MaxPool, Reshape, ...) keeps the grid of what it moves;
* the first and last weighted layers, and what they read, have `first_last_bits`.

What a `Scheme` decides: which element-wise operators run on integers, and so have quantized inputs (of `elementwise_bits`: 8 by default,
which costs nothing where the smallest integer kernels are 8 bits wide); whether both inputs of an Add or the shortcut only; whether results
that nothing on integers reads are quantized; whether a Concat has one grid; and the kind of each grid.
"""

import itertools
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from onnx import TensorProto

from .float_reasons import ON_REQUEST, UNSOUND, FloatRow, float_bias_reason, float_reason, other_constants, reasons_of, with_storage
from .flow import Flow, edges, integer_nodes, is_quantized_result
from .graph import WEIGHT_INPUT, Graph, Node
from .quant_table import Copy, QuantSpec, activation_spec, float8_spec, weight_spec
from .saturation import summed_axes
from .scheme import FLOAT_BITS, KNOWN_RANGES, Precision, Scheme
from .scores import Scores, scores_of
from .source import SourceModel, ValueTypes


@dataclass(frozen=True)
class Bias:
    """A bias that becomes int32 with scale s_x * s_w: the node that adds it, and its weight and input by value name."""

    node: str
    weight: str
    input: str


@dataclass(frozen=True)
class Placement:
    """Where quantizers go.

    `activations` and `weights`: value name -> spec; `stored`: the same for weights that are kept as codes but computed with in float;
    `tied`: value -> the value whose grid it repeats, being on it already; `shared`: value -> the value with which it has one grid, though
    each has a quantizer of its own. `met` names the nodes that read a quantizer, or whose weights are on a grid: those that bits matter to.
    `copies`: the values that copy another for layers. `scores`: those that end up in Softmax and nowhere else.
    """

    activations: Mapping[str, QuantSpec]
    tied: Mapping[str, str]
    shared: Mapping[str, str]
    weights: Mapping[str, QuantSpec]
    stored: Mapping[str, QuantSpec]
    biases: Mapping[str, Bias]
    floats: tuple[FloatRow, ...]
    first: frozenset[str]
    last: frozenset[str]
    met: frozenset[str]
    copies: Mapping[str, Copy] = field(default_factory=dict)
    scores: Scores = field(default_factory=Scores)


def place(
    source: SourceModel,
    types: ValueTypes,
    scheme: Scheme,
    precision: Precision,
    keep_float: AbstractSet[str],
    islands: Mapping[str, str] = MappingProxyType({}),
    own: Mapping[str, Precision] = MappingProxyType({}),
    copies: Mapping[str, Copy] = MappingProxyType({}),
) -> Placement:
    """Apply a scheme to a model.

    Args:
        source: the model.
        types: of its values.
        scheme: the rules of the target.
        precision: bit widths.
        keep_float: names of nodes that are left alone.
        islands: names of nodes that torch cannot run, with the reasons.
        own: names of nodes with bit widths of their own.
        copies: the values that the model has for layers, as `operand_copies` named them.
    """
    graph = source.graph
    ground = _ground(source, types, scheme, precision, keep_float, islands, own, copies.keys())
    flow, integer, weights, floats = ground.flow, ground.integer, ground.weights, list(ground.floats)
    copied = {copy.origin for copy in copies.values()}
    activations: dict[str, QuantSpec] = {}
    tied: dict[str, str] = {}
    for value in dict.fromkeys([*graph.inputs, *(value for node in graph.nodes for value in node.outputs if value)]):
        origin = flow.source(value)
        if origin != value:
            is_read = flow.integer_readers(value, integer) or flow.is_quantized_output(value) or value in copied
            if origin in activations and (is_read or _is_captured(source, value)):
                tied[value] = origin
            continue
        bits = _activation_bits(ground, value)
        if bits is not None:
            activations[value] = activation_spec(bits, scheme.activation_symmetric, _known_range(graph, value, scheme, integer))
    shared = _share_concatenated(flow, integer, activations, tied) if scheme.shared_concat else {}
    if precision.float8:
        activations, weights = ({name: float8_spec(spec) for name, spec in specs.items()} for specs in (activations, weights))
    has_steps = scheme.bias != "float" and precision.activation_bits < FLOAT_BITS and not precision.float8
    biases, float_biases = _biases(source, integer, {*activations, *tied}) if has_steps else ({}, [])
    if scheme.bias == "int32":
        floats += float_biases
    met = {node.name for value in activations for node in flow.integer_readers(value, integer)}
    met |= {node.name for node in graph.weighted if graph.weight(node) in weights}
    met |= {node.name for name in ground.stored for node in graph.readers_of(name)}
    scores = scores_of(flow, activations.keys())
    return Placement(
        activations, tied, shared, weights, ground.stored, biases, tuple(floats), ground.first, ground.last, frozenset(met), copies, scores
    )


def _is_captured(source: SourceModel, value: str) -> bool:
    """Whether the subgraph of a branch or a loop reads a value from around it.

    ONNX Runtime (1.31.1) hands a DequantizeLinear on through what only moves its result, up to the next reader; where that is a subgraph,
    it takes the value for an input of the node that holds it and aborts the process. Behind a pair of its own there is nothing to hand on.
    """
    return any(value not in source.node_protos[node.name].input for node in source.graph.readers_of(value))


def operand_copies(
    source: SourceModel,
    types: ValueTypes,
    scheme: Scheme,
    precision: Precision,
    keep_float: AbstractSet[str],
    islands: Mapping[str, str] = MappingProxyType({}),
    own: Mapping[str, Precision] = MappingProxyType({}),
) -> dict[str, Copy]:
    """The copies that operators on integers need of values, by the name of the copy.

    Layers need one where another operator on integers reads the value in more bits; all do where the value is handed out and stays in
    float: a graph input that is a graph output too, or what a Cast makes a graph output of.

    Arguments are those of `place`, for the model without copies.
    """
    graph = source.graph
    ground = _ground(source, types, scheme, precision, keep_float, islands, own)
    flow, integer = ground.flow, ground.integer
    is_all = scheme.results == "all"
    handed_out = flow.entrances.intersection(flow.exits if is_all else map(flow.source, flow.exits))
    handed_out |= frozenset() if is_all else flow.exits.difference(graph.outputs)
    taken = {*graph.inputs, *graph.constants, *graph.producer}
    copies: dict[str, Copy] = {}
    for value in [*graph.inputs, *graph.producer]:
        readers = flow.direct_readers(value, integer)
        if flow.source(value) not in handed_out:
            readers = _coarser(ground, value, readers) if precision.requantizes else []
        if readers and value in flow.quantizable:
            name = next(name for index in itertools.count() if (name := f"{value}_operand{index or ''}") not in taken)
            copies[name] = Copy(value, tuple(node.name for node in readers))
    return copies


def _coarser(ground: "_Ground", value: str, readers: Sequence[Node]) -> list[Node]:
    """The layers among a value's readers, where they want fewer bits than the others."""
    operands = [node for node in readers if node.op_type in WEIGHT_INPUT]
    others = [node for node in ground.flow.integer_readers(ground.flow.source(value), ground.integer) if node not in operands]
    wanted, kept = (_asked_bits(ground, some) for some in (operands, others))
    return operands if wanted is not None and kept is not None and wanted < kept else []


@dataclass(frozen=True)
class _Ground:
    """What every question about a placement starts from: which nodes run on integers, and the bits that each wants."""

    bits_of: "_BitsOf"
    first: frozenset[str]
    last: frozenset[str]
    weights: Mapping[str, QuantSpec]
    stored: Mapping[str, QuantSpec]
    floats: tuple[FloatRow, ...]
    flow: Flow
    integer: frozenset[str]


def _ground(
    source: SourceModel,
    types: ValueTypes,
    scheme: Scheme,
    precision: Precision,
    keep_float: AbstractSet[str],
    islands: Mapping[str, str],
    own: Mapping[str, Precision],
    copies: AbstractSet[str] = frozenset(),
) -> _Ground:
    bits_of, (first, last), reasons = _BitsOf(precision, own), edges(source.graph), reasons_of(keep_float, islands)
    stored, unstored = _stored_specs(source, scheme, bits_of, keep_float, islands.keys())
    weights, left = _weight_specs(source, types, scheme, bits_of, reasons, first | last)
    floats = (*with_storage(source, left, stored), *unstored, *other_constants(source))
    quantizable = frozenset(value for value, dtype in types.dtypes.items() if dtype == TensorProto.FLOAT)
    flow = Flow(source, quantizable, reasons.keys(), scheme, copies)
    integer = integer_nodes(flow, {node.name for node in source.graph.weighted} - {row.node for row in floats})
    return _Ground(bits_of, first, last, weights, stored, floats, flow, integer)


def _weight_specs(
    source: SourceModel,
    types: ValueTypes,
    scheme: Scheme,
    bits_of: "_BitsOf",
    reasons: Mapping[str, str],
    edge_nodes: AbstractSet[str],
) -> tuple[dict[str, QuantSpec], list[FloatRow]]:
    weights: dict[str, QuantSpec] = {}
    floats: list[FloatRow] = []
    for node in source.graph.nodes:
        reason = float_reason(source, types, node, reasons)
        weight = source.graph.weight(node)
        if reason is not None:
            floats.append(FloatRow(node.name, node.op_type, reason))
        elif weight is not None:
            spec = _weight_spec(source, node, scheme, bits_of(node), node.name in edge_nodes)
            weights[weight] = _tied_weight_spec(weights.get(weight), spec)
    return weights, floats


def _stored_specs(
    source: SourceModel, scheme: Scheme, bits_of: "_BitsOf", keep_float: AbstractSet[str], islands: AbstractSet[str]
) -> tuple[dict[str, QuantSpec], list[FloatRow]]:
    """The weights that are only stored: those that are never operands, and those of layers in islands; and what of these stays float."""
    specs: dict[str, QuantSpec] = {}
    floats: list[FloatRow] = []
    layers = {source.graph.weight(node): node for node in source.graph.weighted if node.name in islands and node.name not in keep_float}
    uses = {name: (weight.nodes, weight.axis) for name, weight in source.stored.items()}
    for name, node in layers.items():
        array = source.constants[name] if name is not None else np.empty(0)
        if name is not None and array.dtype == np.float32 and array.ndim > 1 and source.graph.readers_of(name) == (node,):
            uses[name] = (node.name,), source.channel_axis(node)
    for name, (readers, axis) in uses.items():
        kept = next((node for node in readers if node in keep_float), None)
        if kept is None and scheme.stores and name not in source.unsound:
            bits = max(bits_of.named(node).stored for node in readers)
            specs[name] = weight_spec(bits, axis, scheme.weight_symmetric)
            continue
        why = f"the target {scheme.name} takes codes of operands only" if kept is None else ON_REQUEST
        why = UNSOUND if name in source.unsound else why
        what = f"{name!r}, {source.constants[name].size:,} numbers: {why}"
        floats.append(FloatRow(kept or readers[0], "/".join(source.stored[name].operators) if name in source.stored else "", what))
    return specs, floats


def _activation_bits(ground: _Ground, value: str) -> int | None:
    """Bits of a value that is computed or fed (not moved); None where it stays float."""
    flow, general = ground.flow, ground.bits_of.general
    if value not in flow.quantizable or general.activation_bits >= FLOAT_BITS:
        return None
    bits = _asked_bits(ground, flow.integer_readers(value, ground.integer))
    if bits is None and is_quantized_result(flow, value, ground.integer):
        return general.elementwise
    return bits


def _asked_bits(ground: _Ground, readers: Sequence[Node]) -> int | None:
    """Bits of a quantizer that some operators on integers share; None where there are none.

    What was asked for a reader wins, the most of it where several readers were asked for; else the layers among them decide.
    """
    own, general = ground.bits_of.own, ground.bits_of.general
    asked = [own[node.name].activation_bits for node in readers if node.name in own]
    if asked:
        return max(asked)
    operands = [node for node in readers if node.op_type in WEIGHT_INPUT]
    if operands:
        return min(general.operand(node.name in ground.first | ground.last) for node in operands)
    return general.elementwise if readers else None


def _known_range(graph: Graph, value: str, scheme: Scheme, integer: AbstractSet[str]) -> tuple[float, float] | None:
    """The range of a Sigmoid, which no sample has to tell; a signed grid would waste half of it.

    That of a HardSigmoid on integers has 1 on its grid, where it saturates (`exporters.qdq`); one that stays float must not look like it.
    """
    node = graph.producer.get(value)
    if node is None or not node.is_standard or scheme.activation_symmetric or node.op_type not in scheme.known_ranges:
        return None
    return KNOWN_RANGES["Sigmoid" if node.op_type == "HardSigmoid" and node.name not in integer else node.op_type]


def _share_concatenated(flow: Flow, integer: AbstractSet[str], activations: dict[str, QuantSpec], tied: dict[str, str]) -> dict[str, str]:
    """Give the inputs of each integer Concat one grid, the widest of theirs, and let its output repeat it; returns member -> leader.

    Changes both mappings in place. Inputs that two Concats read join their groups.
    """
    leader: dict[str, str] = {}

    def find(value: str) -> str:
        while leader.get(value, value) != value:
            value = leader[value]
        return value

    for node in flow.graph.nodes:
        if node.op_type != "Concat" or node.name not in integer:
            continue
        origins = [tied.get(origin, origin) for origin in map(flow.source, flow.graph.data_inputs(node))]
        if not all(origin in activations for origin in origins):
            continue
        roots = list(dict.fromkeys(map(find, origins)))
        leader |= dict.fromkeys(roots, roots[0])
        output = node.outputs[0]
        known = [activations[root] for root in roots] + [spec for spec in [activations.pop(output, None)] if spec is not None]
        bits = max(spec.bits for spec in known)
        activations[roots[0]] = activation_spec(bits, flow.scheme.activation_symmetric)
        tied |= {value: roots[0] for value, origin in tied.items() if origin == output} | {output: roots[0]}
    groups = {value: find(value) for value in leader}
    for value, root in groups.items():
        activations[value] = activations[root]
    tied |= {value: find(origin) for value, origin in tied.items()}
    return groups


def _biases(source: SourceModel, integer: AbstractSet[str], quantized: AbstractSet[str]) -> tuple[dict[str, Bias], list[FloatRow]]:
    biases: dict[str, Bias] = {}
    floats: list[FloatRow] = []
    for node in source.graph.weighted:
        weight, bias = source.graph.weight(node), source.graph.bias(node)
        if node.name not in integer or weight is None or bias is None:
            continue
        reason = float_bias_reason(source, node, bias) or (None if node.inputs[0] in quantized else "its input is not quantized")
        if reason is None:
            biases[bias] = Bias(node.name, weight, node.inputs[0])
        else:
            floats.append(FloatRow(node.name, node.op_type, f"its bias stays float: {reason}"))
    return biases, floats


def without(placement: Placement, values: AbstractSet[str]) -> Placement:
    """A placement in which some activations stay float, and with them the biases of the nodes that read them."""
    gone = set(values) | {value for value, leader in placement.shared.items() if leader in values}
    gone |= {value for value, origin in placement.tied.items() if origin in gone}
    return replace(
        placement,
        shared={value: leader for value, leader in placement.shared.items() if value not in gone},
        activations={value: spec for value, spec in placement.activations.items() if value not in gone},
        tied={value: origin for value, origin in placement.tied.items() if value not in gone},
        biases={name: bias for name, bias in placement.biases.items() if bias.input not in gone},
    )


@dataclass(frozen=True)
class _BitsOf:
    """The precision of a node: its own, or the general one."""

    general: Precision
    own: Mapping[str, Precision]

    def __call__(self, node: Node) -> Precision:
        return self.named(node.name)

    def named(self, node: str) -> Precision:
        return self.own.get(node, self.general)


def _weight_spec(source: SourceModel, node: Node, scheme: Scheme, precision: Precision, edge: bool) -> QuantSpec:
    bits, block = precision.weight(edge), precision.block_size
    if block is not None and node.op_type in ("MatMul", "Gemm") and (bits <= 4 or not scheme.packed_blocks):
        shape = source.constants[node.inputs[1]].shape
        summed = 2 * len(shape) - 3 - source.channel_axis(node)  # the other of the last two axes
        if not scheme.whole_blocks or shape[summed] % block == 0:
            return weight_spec(bits, summed, scheme.weight_symmetric, block)
    # ONNX Runtime's integer product of a stack of matrices takes one zero point for all of them, and fails on one for each channel.
    is_stack = node.op_type == "MatMul" and source.constants[node.inputs[1]].ndim > 2 and precision.operand(edge) < FLOAT_BITS
    channels = source.channel_axis(node)
    spec = weight_spec(bits, channels if node.op_type in scheme.per_channel and not is_stack else None, scheme.weight_symmetric)
    if not precision.is_paired(edge):
        return spec
    return replace(spec, summed=summed_axes(node.op_type, source.constants[node.inputs[1]].shape, channels))


def _tied_weight_spec(known: QuantSpec | None, spec: QuantSpec) -> QuantSpec:
    """A weight that several nodes share has one grid: the wider one, per tensor where their channel axes differ.

    Where they sum over other axes, it has 7 bits, which suit any.
    """
    if known is None:
        return spec
    wider = known if known.bits >= spec.bits else spec
    axis = known.axis if (known.axis, known.block) == (spec.axis, spec.block) else None
    if wider.bits == 8 and known.summed != spec.summed:
        wider = weight_spec(7, None, wider.symmetric)
    return replace(wider, axis=axis, block=wider.block if axis is not None else None)
