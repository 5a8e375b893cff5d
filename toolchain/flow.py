"""The dataflow of a model as quantizers see it: data movement looked through, and which operators run on integers."""

import itertools
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

from onnx import TensorProto

from .graph import Graph, Node
from .scheme import Scheme
from .source import SourceModel

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
        "Split",
        "Resize",  # to the nearest: others compute
    }
)
FUSED_ACTIVATIONS = frozenset({"Relu", "Clip"})
_GATES = frozenset({"Sigmoid", "HardSigmoid"})
_BELLS = frozenset({"Erf", "Tanh"})
_POLYNOMIAL = frozenset({"Add", "Mul", "Div", "Pow"})  # of x, inside a GELU
_STEPS = 5  # x + 0.044715 x x x, times a number
_PRECISIONS = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})


@dataclass(frozen=True)
class Flow:
    """The graph with data movement looked through."""

    model: SourceModel
    quantizable: AbstractSet[str]
    keep_float: AbstractSet[str]
    scheme: Scheme
    copies: AbstractSet[str] = frozenset()

    @property
    def graph(self) -> Graph:
        return self.model.graph

    @cached_property
    def entrances(self) -> frozenset[str]:
        """The values that come from outside: graph inputs, and what a Cast makes of one in another precision (`single_precision`)."""
        graph = self.graph
        narrow = {value.name for value in self.model.model.graph.input if value.type.tensor_type.elem_type in _PRECISIONS}
        casts = (node for value in graph.inputs if value in narrow for node in graph.readers_of(value) if node.op_type == "Cast")
        return frozenset(graph.inputs) | {node.outputs[0] for node in casts} & self.quantizable

    @cached_property
    def exits(self) -> frozenset[str]:
        """The values that are handed out: graph outputs, and what a Cast makes one of in another precision."""
        graph = self.graph
        narrow = [value.name for value in self.model.model.graph.output if value.type.tensor_type.elem_type in _PRECISIONS]
        casts = (graph.producer[value] for value in narrow if value in graph.producer)
        return frozenset(graph.outputs) | {node.inputs[0] for node in casts if node.op_type == "Cast"} & self.quantizable

    def moves(self, node: Node) -> bool:
        return (
            node.op_type in DATA_MOVEMENT
            and node.is_standard
            and node.name not in self.keep_float
            and all(value in self.quantizable and value not in self.copies for value in node.outputs if value)
            and (node.op_type != "Pad" or self._pads_with_zero(node))
            and (node.op_type != "Resize" or self._repeats(node))
        )

    def _repeats(self, node: Node) -> bool:
        """Whether a Resize only repeats and leaves out, and fills nothing in."""
        attributes = {a.name: a.s for a in self.model.node_protos[node.name].attribute}
        filled = attributes.get("coordinate_transformation_mode") == b"tf_crop_and_resize"
        return attributes.get("mode", b"nearest") == b"nearest" and not filled

    def _pads_with_zero(self, node: Node) -> bool:
        """Zero is on every grid; another constant need not be."""
        if len(node.inputs) < 3 or not node.inputs[2]:
            return True
        return node.inputs[2] in self.model.constants and not self.model.constants[node.inputs[2]].any()

    def is_fused_gate(self, node: Node) -> bool:
        """Whether a node multiplies a value with its own sigmoid, where the target computes that behind a layer."""
        if not self.scheme.fused_gates or node.op_type != "Mul":
            return False
        gates = [(self.graph.producer.get(gate), other) for gate, other in itertools.permutations(node.inputs)]
        return any(gate is not None and gate.op_type in _GATES and gate.inputs[0] == other for gate, other in gates)

    def is_gelu(self, node: Node) -> bool:
        """Whether a node multiplies x with 1 + erf or 1 + tanh of it: a GELU, which runtimes fuse where nothing inside is on a grid."""
        if node.op_type != "Mul":
            return False
        sides = [self._scaled(value) for value in node.inputs]
        return any(self._is_bell(bell, x) for bell, x in itertools.permutations(sides))

    def _scaled(self, value: str) -> str:
        """What a value is a multiple of by a constant; itself where it is none."""
        made = self.graph.producer.get(value)
        others = [name for name in made.inputs if name not in self.model.constants] if made is not None and made.op_type == "Mul" else []
        return others[0] if len(others) == 1 else value

    def _is_bell(self, value: str, x: str) -> bool:
        """Whether a value is a constant added to the error function, or tanh, of what x is made to in a few steps."""
        shifted = self.graph.producer.get(value)
        if shifted is None or shifted.op_type != "Add" or not any(name in self.model.constants for name in shifted.inputs):
            return False
        bells = [made for name in shifted.inputs if (made := self.graph.producer.get(name)) is not None and made.op_type in _BELLS]
        reached = {name for made in bells for name in made.inputs}
        for _ in range(_STEPS):
            makers = [made for name in reached if (made := self.graph.producer.get(name)) is not None and made.op_type in _POLYNOMIAL]
            reached |= {name for made in makers for name in made.inputs}
        return x in reached

    def source(self, value: str) -> str:
        """The value that this one is a rearrangement of (itself, if it is computed)."""
        node = self.graph.producer.get(value)
        while node is not None and self.moves(node):
            value = node.inputs[0]
            node = self.graph.producer.get(value)
        return value

    def direct_readers(self, value: str, integer: AbstractSet[str]) -> list[Node]:
        """The integer operators that read a value itself."""
        return [node for node in self.graph.readers_of(value) if node.name in integer and value in self._quantized_inputs(node)]

    def integer_readers(self, value: str, integer: AbstractSet[str]) -> list[Node]:
        """The integer operators that read a value, directly or rearranged."""
        found: list[Node] = []
        for node in self.graph.readers_of(value):
            if node.name in integer and value in self._quantized_inputs(node):
                found.append(node)
            elif node.name not in integer and self.moves(node) and node.inputs[0] == value:
                found += [reader for output in node.outputs if output for reader in self.integer_readers(output, integer)]
        return found

    def is_quantized_output(self, value: str) -> bool:
        is_made = value not in self.entrances  # an input that is handed out stays as it came
        return is_made and value in self.exits and self.scheme.results == "all"

    def _quantized_inputs(self, node: Node) -> tuple[str, ...]:
        """Of a weighted node only the activation (input 0) is an operand: a computed bias stays float."""
        if self.graph.weight(node) is not None:
            return node.inputs[:1]
        if node.op_type == "Add" and self.scheme.shortcut_only:
            fused = [value for value in node.inputs if self._is_only_read_by(value, node)]
            return tuple(value for value in node.inputs if value not in fused[-1:])
        return node.inputs

    def _is_only_read_by(self, value: str, node: Node) -> bool:
        """Whether a convolution's result goes to this node alone, so that a runtime can compute the node in the convolution."""
        producer = self.graph.producer.get(value)
        made = producer is not None and producer.op_type == "Conv" and self.graph.weight(producer) is not None
        return made and self.graph.readers_of(value) == (node,) and value not in self.graph.outputs


def integer_nodes(flow: Flow, weighted: AbstractSet[str]) -> frozenset[str]:
    """The nodes that run on integers: quantized layers, products of two activations, and element-wise operators that lead to those.

    Readers come after producers, so walking backwards knows of each reader already. A target whose whole graph is on integers takes every
    operator that reads floats only.
    """
    integer = set(weighted)
    for node in reversed(flow.graph.nodes):
        data = flow.graph.data_inputs(node)
        if node.name in integer or node.name in flow.keep_float or not node.is_standard or not data:
            continue
        if not {*data, node.outputs[0]} <= flow.quantizable:
            continue
        if flow.graph.weight(node) is not None or node.op_type in FUSED_ACTIVATIONS or flow.moves(node):
            continue
        if flow.scheme.results == "all":
            integer.add(node.name)
            continue
        has_constant = len(data) < len([value for value in node.inputs if value])
        leads_on = node.op_type in flow.scheme.elementwise and flow.integer_readers(result_of(flow.graph, node), integer)
        if flow.is_fused_gate(node) or flow.is_gelu(node):
            continue
        if not has_constant and (node.op_type == "MatMul" or leads_on):
            integer.add(node.name)
    return frozenset(integer)


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


def result_of(graph: Graph, node: Node) -> str:
    """The value behind a node's activation, where it has one of its own; else the node's output."""
    value = node.outputs[0]
    readers = graph.readers_of(value)
    if len(readers) == 1 and readers[0].op_type in FUSED_ACTIVATIONS and readers[0].inputs[0] == value and value not in graph.outputs:
        return readers[0].outputs[0]
    return value


def is_quantized_result(flow: Flow, value: str, integer: AbstractSet[str]) -> bool:
    """Whether a target quantizes a result that nothing on integers reads.

    Integer convolutions need it: they only run on integers when their result is quantized; matrix products may leave floats behind.
    """
    node = flow.graph.producer.get(value)
    if node is None:
        return flow.scheme.results == "all"
    if node.op_type in FUSED_ACTIVATIONS and (origin := flow.graph.producer.get(node.inputs[0])) is not None:
        node = origin if result_of(flow.graph, origin) == value else node
    if flow.scheme.results == "all":
        return (node.name in integer or node.op_type in FUSED_ACTIVATIONS) and result_of(flow.graph, node) == value
    fuses = flow.scheme.results == "convolutions" and node.op_type == "Conv" and node.name in integer
    return fuses and result_of(flow.graph, node) == value and value not in flow.exits
