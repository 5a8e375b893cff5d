"""The dataflow of a model, without its tensors: nodes, values, who makes and who reads them, and what is alive when."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

# Operators that compute with a trained weight: where the weight is among the inputs.
WEIGHT_INPUT: Mapping[str, int] = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
BIAS_INPUT: Mapping[str, int] = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
ONNX_DOMAINS = ("", "ai.onnx")
# Of what ONNX Runtime laid out for the vector registers of one CPU.
BLOCKED_DOMAIN = "com.microsoft.nchwc"


@dataclass(frozen=True)
class Node:
    """One ONNX node: names only. Optional inputs that are absent are empty strings, as in ONNX."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str = ""

    @property
    def is_standard(self) -> bool:
        return self.domain in ONNX_DOMAINS


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order between graph inputs and outputs; `constants` are the initializers' names."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: frozenset[str]

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """The node that makes each value (graph inputs and constants have none)."""
        return {value: node for node in self.nodes for value in node.outputs if value}

    @cached_property
    def readers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read each value, in execution order; a node that reads it twice appears once."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                if value:
                    found.setdefault(value, []).append(node)
        return {value: tuple(nodes) for value, nodes in found.items()}

    @cached_property
    def alive(self) -> tuple[frozenset[str], ...]:
        """At position p, between nodes p-1 and p: the values made before it (or fed) and read at or after it."""
        last = {value: i for i, node in enumerate(self.nodes) for value in self.data_inputs(node)}
        current = {value for value in self.inputs if value in last}
        sets = [frozenset(current)]
        for position, node in enumerate(self.nodes):
            current = {value for value in current if last[value] > position}
            current |= {value for value in node.outputs if value in last}
            sets.append(frozenset(current))
        return tuple(sets)

    def readers_of(self, value: str) -> tuple[Node, ...]:
        return self.readers.get(value, ())

    def data_inputs(self, node: Node) -> tuple[str, ...]:
        """The inputs of a node that are computed or fed, in order: no constants, no absent ones."""
        return tuple(value for value in node.inputs if value and value not in self.constants)

    def weight(self, node: Node) -> str | None:
        """The constant weight of a Conv, ConvTranspose, Gemm or MatMul node, or None."""
        index = WEIGHT_INPUT.get(node.op_type) if node.is_standard else None
        if index is None or len(node.inputs) <= index or node.inputs[index] not in self.constants:
            return None
        return node.inputs[index]

    def bias(self, node: Node) -> str | None:
        """The constant bias of a weighted node, or None."""
        index = BIAS_INPUT.get(node.op_type) if node.is_standard else None
        if index is None or len(node.inputs) <= index or node.inputs[index] not in self.constants:
            return None
        return node.inputs[index]

    @cached_property
    def weighted(self) -> tuple[Node, ...]:
        """The nodes that compute with a constant weight, in execution order."""
        return tuple(node for node in self.nodes if self.weight(node) is not None)


def channel_axis(operator: str, rank: int, is_transposed: bool) -> int:
    """The output-channel axis of a weight in its ONNX layout; `is_transposed` is Gemm's transB."""
    if operator == "Gemm":
        return 0 if is_transposed else 1
    return {"Conv": 0, "ConvTranspose": 1}.get(operator, rank - 1)


def schedule(nodes: Sequence[Node], outputs: Iterable[str]) -> tuple[Node, ...]:
    """Order nodes depth first from the outputs, so that each branch is contiguous and nothing is computed long before its use.

    Exporters emit shape arithmetic and shortcut convolutions wherever the source program had them; a cut through the graph is only small
    if the order keeps them beside their reader. Nodes that no output needs are dropped.
    """
    producer = {value: node for node in nodes for value in node.outputs if value}
    ordered: list[Node] = []
    state: dict[str, bool] = {}  # node name -> False while its inputs are visited, True when placed
    for output in outputs:
        if output not in producer:
            continue
        stack = [producer[output]]
        while stack:
            node = stack[-1]
            if node.name in state:
                stack.pop()
                if not state[node.name]:
                    state[node.name] = True
                    ordered.append(node)
                continue
            state[node.name] = False
            pending = [producer[v] for v in node.inputs if v in producer and producer[v].name not in state]
            stack.extend(reversed(pending))
    return tuple(ordered)


def boundary(graph: Graph, nodes: Sequence[Node]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (inputs, outputs) of a piece of the graph: the values it reads from outside, and those of its own that are read outside.

    Constants belong to whoever reads them and are in neither. Both are in order of first use.
    """
    inside = {node.name for node in nodes}
    made = {value for node in nodes for value in node.outputs if value}
    inputs = dict.fromkeys(v for node in nodes for v in graph.data_inputs(node) if v not in made)
    outputs = [
        value
        for node in nodes
        for value in node.outputs
        if value and (value in graph.outputs or any(reader.name not in inside for reader in graph.readers_of(value)))
    ]
    return tuple(inputs), tuple(outputs)


def last_reads(pieces: Sequence[Sequence[Node]], graph: Graph) -> tuple[frozenset[str], ...]:
    """For each piece, run in order: the values that nothing later reads, so that they can be freed after it. Graph outputs stay."""
    last: dict[str, int] = dict.fromkeys(graph.inputs, 0)
    for index, nodes in enumerate(pieces):
        for node in nodes:
            last.update(dict.fromkeys(graph.data_inputs(node), index))
            for value in node.outputs:
                last.setdefault(value, index)
    return tuple(
        frozenset(v for v, index in last.items() if index == position and v not in graph.outputs) for position in range(len(pieces))
    )


def shape_arithmetic(operators: Iterable[tuple[str, Sequence[str], Sequence[str]]], constants: Container[str]) -> set[str]:
    """The values that follow from shapes and constants alone: numbers of axes and what is made of them, no data.

    Args:
        operators: type, inputs and outputs of each node, in execution order.
        constants: names of the initializers.
    """
    found: set[str] = set()
    for kind, inputs, outputs in operators:
        if kind in ("Shape", "Size", "Constant") or all(not value or value in found or value in constants for value in inputs):
            found.update(outputs)
    return found


def free_name(wanted: str, taken: set[str]) -> str:
    """A name as wanted, lengthened until nothing has it; it is taken from then on."""
    while wanted in taken:
        wanted += "_"
    taken.add(wanted)
    return wanted
