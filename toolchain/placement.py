"""Which values of a model carry a quantizer, and of how many bits: the rules of a target applied to a graph.

The rules are written for kernels that compute on integers:

* a weighted operator (Conv, ConvTranspose, Gemm, MatMul) reads an *operand*: its activation input has `activation_bits`, its weight
  `weight_bits`. One quantizer belongs to the value, so every reader, an identity shortcut included, sees the quantized tensor;
* a value that only element-wise integer operators read (the addends of a residual sum) has `elementwise_bits`: 8 by default, which costs
  nothing on hardware whose smallest integer kernels are 8 bits wide, where the papers leave these values in float;
* the quantizer of a convolution's result sits behind its activation (Relu, Clip), which the grid's saturation absorbs;
* data movement (MaxPool, Reshape, ...) keeps the grid of what it moves;
* the first and last weighted layers, and what they read, have `first_last_bits`; graph outputs stay float.
"""

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from onnx import TensorProto

from .errors import UsageError, near_misses
from .graph import WEIGHT_INPUT, Graph, Node
from .quant_table import QuantSpec, activation_spec, weight_spec
from .scheme import Precision, Scheme
from .source import SourceModel, ValueTypes

DATA_MOVEMENT = frozenset(
    {
        "MaxPool",
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Identity",
        "DepthToSpace",
        "SpaceToDepth",
        "Pad",
        "Dropout",
    }
)
FUSED_ACTIVATIONS = frozenset({"Relu", "Clip"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN", "Attention", "EmbedLayerNormalization"})


@dataclass(frozen=True)
class FloatRow:
    """A weighted node that stays float, and why."""

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class Bias:
    """A bias that becomes int32 with scale s_x * s_w: the node that adds it, and its weight and input by value name."""

    node: str
    weight: str
    input: str


@dataclass(frozen=True)
class Placement:
    """Where quantizers go. `activations` and `weights`: value name -> spec; `tied`: value -> the value whose grid it repeats."""

    activations: Mapping[str, QuantSpec]
    tied: Mapping[str, str]
    weights: Mapping[str, QuantSpec]
    biases: Mapping[str, Bias]
    floats: tuple[FloatRow, ...]
    first: frozenset[str]
    last: frozenset[str]


def place(source: SourceModel, types: ValueTypes, scheme: Scheme, precision: Precision, keep_float: AbstractSet[str]) -> Placement:
    """Apply a scheme to a model; `keep_float` names nodes that are left alone."""
    graph = source.graph
    first, last = edges(graph)
    weights, floats = _weight_specs(source, types, scheme, precision, keep_float, first | last)
    flow = _Flow(source, frozenset(value for value, dtype in types.dtypes.items() if dtype == TensorProto.FLOAT), keep_float)
    integer = _integer_nodes(flow, scheme, {node.name for node in graph.weighted} - {row.node for row in floats})
    activations: dict[str, QuantSpec] = {}
    tied: dict[str, str] = {}
    for value in dict.fromkeys([*graph.inputs, *(value for node in graph.nodes for value in node.outputs if value)]):
        origin = flow.source(value)
        if origin != value:
            if origin in activations and flow.integer_readers(value, integer):
                tied[value] = origin
            continue
        bits = _activation_bits(flow, value, integer, precision, first | last)
        if bits is not None:
            activations[value] = activation_spec(bits, scheme.activation_symmetric)
    biases, float_biases = _biases(source, integer, {*activations, *tied})
    return Placement(activations, tied, weights, biases, (*floats, *float_biases), first, last)


def _weight_specs(
    source: SourceModel,
    types: ValueTypes,
    scheme: Scheme,
    precision: Precision,
    keep_float: AbstractSet[str],
    edge_nodes: AbstractSet[str],
) -> tuple[dict[str, QuantSpec], list[FloatRow]]:
    weights: dict[str, QuantSpec] = {}
    floats: list[FloatRow] = []
    for node in source.graph.nodes:
        reason = _float_reason(source, types, node, keep_float)
        weight = source.graph.weight(node)
        if reason is not None:
            floats.append(FloatRow(node.name, node.op_type, reason))
        elif weight is not None:
            spec = weight_spec(precision.weight(node.name in edge_nodes), channel_axis(source, node), scheme.weight_symmetric)
            weights[weight] = _tied_weight_spec(weights.get(weight), spec)
    return weights, floats


def _integer_nodes(flow: "_Flow", scheme: Scheme, weighted: AbstractSet[str]) -> frozenset[str]:
    """The nodes that run on integers: quantized layers, products of two activations, and element-wise operators that lead to those.

    Readers come after producers, so walking backwards knows of each reader already.
    """
    integer = set(weighted)
    for node in reversed(flow.graph.nodes):
        data = flow.graph.data_inputs(node)
        has_constant = len(data) < len([value for value in node.inputs if value])
        if node.name in integer or node.name in flow.keep_float or not node.is_standard or has_constant:
            continue
        leads_on = node.op_type in scheme.elementwise and flow.integer_readers(_result(flow.graph, node), integer)
        if (node.op_type == "MatMul" or leads_on) and set(data) <= flow.quantizable:
            integer.add(node.name)
    return frozenset(integer)


def _activation_bits(
    flow: "_Flow", value: str, integer: AbstractSet[str], precision: Precision, edge_nodes: AbstractSet[str]
) -> int | None:
    """Bits of a value that is computed or fed (not moved); None where it stays float."""
    if value not in flow.quantizable:
        return None
    readers = flow.integer_readers(value, integer)
    operands = [node for node in readers if node.op_type in WEIGHT_INPUT]
    if operands:
        return min(precision.operand(node.name in edge_nodes) for node in operands)
    if readers or (_is_conv_result(flow.graph, value, integer) and value not in flow.graph.outputs):
        return precision.elementwise
    return None


def _biases(source: SourceModel, integer: AbstractSet[str], quantized: AbstractSet[str]) -> tuple[dict[str, Bias], list[FloatRow]]:
    biases: dict[str, Bias] = {}
    floats: list[FloatRow] = []
    for node in source.graph.weighted:
        weight, bias = source.graph.weight(node), source.graph.bias(node)
        if node.name not in integer or weight is None or bias is None:
            continue
        reason = _float_bias_reason(source, node, bias) or (None if node.inputs[0] in quantized else "its input is not quantized")
        if reason is None:
            biases[bias] = Bias(node.name, weight, node.inputs[0])
        else:
            floats.append(FloatRow(node.name, node.op_type, f"its bias stays float: {reason}"))
    return biases, floats


def match_nodes(graph: Graph, patterns: Sequence[str]) -> frozenset[str]:
    """The names of the nodes that `--keep-float` patterns select: a node name, an operator type, or a regular expression of node names.

    Raises:
        UsageError: a pattern that selects nothing, or is no regular expression.
    """
    found: set[str] = set()
    for pattern in patterns:
        selected = {node.name for node in graph.nodes if pattern in (node.name, node.op_type)}
        if not selected:
            try:
                selected = {node.name for node in graph.nodes if re.fullmatch(pattern, node.name)}
            except re.error as error:
                raise UsageError(
                    f"--keep-float {pattern!r}: names no node and no operator, and is no regular expression: {error}"
                ) from error
        if not selected:
            known = {node.name for node in graph.nodes} | {node.op_type for node in graph.nodes}
            raise UsageError(f"--keep-float {pattern!r}: matches no node name and no operator type{near_misses(pattern, known)}")
        found |= selected
    return frozenset(found)


def edges(graph: Graph) -> tuple[frozenset[str], frozenset[str]]:
    """The first weighted layers (no weighted layer before them) and the last (none after them), by dataflow."""
    weighted = {node.name for node in graph.weighted}
    below: set[str] = set()  # values computed from a weighted layer
    first: set[str] = set()
    for node in graph.nodes:
        has_ancestor = any(value in below for value in node.inputs)
        if node.name in weighted and not has_ancestor:
            first.add(node.name)
        if node.name in weighted or has_ancestor:
            below.update(node.outputs)
    above: set[str] = set()  # values that a weighted layer is computed from
    last: set[str] = set()
    for node in reversed(graph.nodes):
        has_descendant = any(value in above for value in node.outputs)
        if node.name in weighted and not has_descendant:
            last.add(node.name)
        if node.name in weighted or has_descendant:
            above.update(graph.data_inputs(node))
    return frozenset(first), frozenset(last)


def channel_axis(source: SourceModel, node: Node) -> int:
    """The output-channel axis of a node's weight in its ONNX layout."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        transposed = any(a.name == "transB" and a.i for a in source.node_protos[node.name].attribute)
        return 0 if transposed else 1
    weight = source.graph.weight(node)
    assert weight is not None
    return source.constants[weight].ndim - 1


def _tied_weight_spec(known: QuantSpec | None, spec: QuantSpec) -> QuantSpec:
    """A weight that several nodes share has one grid: the wider one, per tensor where their channel axes differ."""
    if known is None:
        return spec
    wider = known if known.bits >= spec.bits else spec
    axis = known.axis if known.axis == spec.axis else None
    return QuantSpec(wider.bits, wider.signed, wider.symmetric, axis, wider.narrow)


def _float_reason(source: SourceModel, types: ValueTypes, node: Node, keep_float: AbstractSet[str]) -> str | None:
    """Why a node that has weights stays float; None for quantized nodes and for nodes without weights."""
    graph = source.graph
    weight = graph.weight(node)
    if weight is None:
        if node.op_type in _RECURRENT:
            return "no integer form of this operator is supported"
        return None
    if node.name in keep_float:
        return "kept float on request"
    if source.constants[weight].dtype.name != "float32":
        return f"its weight is {source.constants[weight].dtype.name}, not float32"
    if source.constants[weight].ndim < 2:
        return "its weight is a vector"
    if types.dtypes.get(node.inputs[0]) != TensorProto.FLOAT:
        return "the type of its input is not known to be float32"
    return None


def _float_bias_reason(source: SourceModel, node: Node, bias: str) -> str | None:
    array = source.constants[bias]
    if array.dtype.name != "float32":
        return f"it is {array.dtype.name}"
    if len(source.graph.readers_of(bias)) > 1 or node.inputs.count(bias) > 1:
        return "several nodes share it"
    channels = source.constants[node.inputs[1]].shape[channel_axis(source, node)]
    if array.size != channels or array.shape[-1:] != (channels,):
        return f"its shape {list(array.shape)} is not one value per channel"
    attributes = {a.name: a.f for a in source.node_protos[node.name].attribute}
    if node.op_type == "Gemm" and (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) != (1.0, 1.0):
        return "Gemm scales it (alpha or beta is not 1)"
    if node.op_type == "ConvTranspose":
        return "transposed convolutions run in float"
    return None


def _result(graph: Graph, node: Node) -> str:
    """The value behind a node's activation, where it has one of its own; else the node's output."""
    value = node.outputs[0]
    readers = graph.readers_of(value)
    if len(readers) == 1 and readers[0].op_type in FUSED_ACTIVATIONS and readers[0].inputs[0] == value and value not in graph.outputs:
        return readers[0].outputs[0]
    return value


def _is_conv_result(graph: Graph, value: str, integer: AbstractSet[str]) -> bool:
    """Convolutions only run on integers when their result is quantized; matrix products may leave floats behind."""
    node = graph.producer.get(value)
    if node is not None and node.op_type in FUSED_ACTIVATIONS:
        node = graph.producer.get(node.inputs[0])
    return node is not None and node.op_type == "Conv" and node.name in integer and _result(graph, node) == value


@dataclass(frozen=True)
class _Flow:
    """The graph with data movement looked through."""

    model: SourceModel
    quantizable: AbstractSet[str]
    keep_float: AbstractSet[str]

    @property
    def graph(self) -> Graph:
        return self.model.graph

    def moves(self, node: Node) -> bool:
        return (
            node.op_type in DATA_MOVEMENT
            and node.is_standard
            and node.name not in self.keep_float
            and len([v for v in node.outputs if v]) == 1
            and node.outputs[0] in self.quantizable
            and (node.op_type != "Pad" or self._pads_with_zero(node))
        )

    def _pads_with_zero(self, node: Node) -> bool:
        """Zero is on every grid; another constant need not be."""
        if len(node.inputs) < 3 or not node.inputs[2]:
            return True
        return node.inputs[2] in self.model.constants and not self.model.constants[node.inputs[2]].any()

    def source(self, value: str) -> str:
        """The value that this one is a rearrangement of (itself, if it is computed)."""
        node = self.graph.producer.get(value)
        while node is not None and self.moves(node):
            value = node.inputs[0]
            node = self.graph.producer.get(value)
        return value

    def integer_readers(self, value: str, integer: AbstractSet[str]) -> list[Node]:
        """The integer operators that read a value, directly or rearranged."""
        found: list[Node] = []
        for node in self.graph.readers_of(value):
            if node.name in integer and value in self._quantized_inputs(node):
                found.append(node)
            elif node.name not in integer and self.moves(node) and node.inputs[0] == value:
                found += self.integer_readers(node.outputs[0], integer)
        return found

    def _quantized_inputs(self, node: Node) -> tuple[str, ...]:
        """Of a weighted node only the activation (input 0) is an operand: a computed bias stays float."""
        return node.inputs[:1] if self.graph.weight(node) is not None else node.inputs
