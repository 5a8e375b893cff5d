"""Hard sigmoid and hard swish, however a file spells them, as HardSigmoid and Mul, which have a form on integers; Clip and Div have none.

Keras and Paddle write x * clip(x + 3, 0, 6) / 6, PyTorch one operator or two, by opset.
"""

from collections.abc import Iterator, Mapping

import onnx
from onnx import helper

from .graph import ONNX_DOMAINS, free_name
from .protos import defined, number_in, read_counts, replace_nodes

_EXACT = 1e-6  # of a factor that should be the inverse of another, in float32


def join_gates(graph: onnx.GraphProto) -> None:
    """Write clip(a x + b, 0, h) / h as a HardSigmoid, and where a product stands before the division, as one of its factors; in place.

    What is read by others on the way, or is a graph output, keeps the nodes as they are.
    """
    if not any(node.op_type in ("Clip", "HardSwish") for node in graph.node):
        return
    finder = _Finder(graph)
    made: dict[str, list[onnx.NodeProto]] = {}  # by the result of the last node that they stand for
    gone: set[str] = set()
    for node in graph.node:
        if node.domain not in ONNX_DOMAINS:
            continue
        for nodes, replaced in finder.matches(node):
            read, last = {value for one in nodes for value in one.input}, nodes[-1].output[0]
            others = {value for some in made.values() for one in some for value in one.input}
            if (
                last not in made
                and gone.isdisjoint({last, *read, *replaced})
                and others.isdisjoint(replaced)
                and made.keys().isdisjoint(replaced)
            ):
                made[last] = nodes
                gone |= replaced
                break
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        name = node.output[0] if node.output else ""
        kept += made.get(name, [] if name in gone else [node])
    replace_nodes(graph, kept)


class _Finder:
    """Finds the nodes that a gate is made of."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._producer = {value: node for node in graph.node for value in node.output if value}
        self._counts = read_counts(graph)
        self._readers: Mapping[str, onnx.NodeProto] = {value: node for node in graph.node for value in node.input if value}
        self._taken = set(defined(graph))

    def matches(self, node: onnx.NodeProto) -> Iterator[tuple[list[onnx.NodeProto], set[str]]]:
        """What may stand for the nodes around this one, and the values that are then gone: the most of them first."""
        if node.op_type == "HardSwish":  # x * max(0, min(1, x / 6 + 1 / 2)), as ONNX defines it
            yield self._made(node, node.input[0], node.input[0], node.output[0], 1 / 6, 0.5), set()
        elif node.op_type == "Clip":
            for slope in (True, False):
                found = self._gate(node, slope)
                if found is not None:
                    yield found

    def _gate(self, clip: onnx.NodeProto, with_slope: bool) -> tuple[list[onnx.NodeProto], set[str]] | None:
        """What stands for a Clip between 0 and h of a x + b, for the division by h, and for a product between them."""
        low, high = (self._number(clip.input[index]) if index < len(clip.input) else None for index in (1, 2))
        add = self._only_producer(clip.input[0], "Add")
        if low != 0.0 or high is None or high <= 0 or add is None:
            return None
        x, shift = self._with_number(add)
        if x is None or shift is None:
            return None
        replaced, slope = {add.output[0]}, 1.0
        scaled = self._only_producer(x, "Mul") if with_slope else None
        inner, factor = self._with_number(scaled) if scaled is not None else (None, None)
        if inner is not None and factor is not None and factor > 0:
            replaced.add(x)
            x, slope = inner, factor
        if high == 1.0:
            return self._made(clip, x, None, clip.output[0], slope, shift), replaced
        value, other = clip.output[0], None
        replaced.add(value)
        behind = self._only_reader(value)
        if behind is not None and behind.op_type == "Mul" and self._with_number(behind)[1] is None and behind.input[0] != behind.input[1]:
            other = next(name for name in behind.input if name != value)
            value = behind.output[0]
            replaced.add(value)
            behind = self._only_reader(value)
        if behind is None or not self._divides(behind, value, high):
            return None
        return self._made(behind, x, other, behind.output[0], slope / high, shift / high), replaced

    def _made(self, last: onnx.NodeProto, x: str, factor: str | None, result: str, alpha: float, beta: float) -> list[onnx.NodeProto]:
        gate = result if factor is None else free_name(f"{result}_gate", self._taken)
        name = last.name if factor is None else f"{last.name}_gate"
        nodes = [helper.make_node("HardSigmoid", [x], [gate], name, alpha=alpha, beta=beta)]
        if factor is not None:
            nodes.append(helper.make_node("Mul", [factor, gate], [result], last.name))
        return nodes

    def _divides(self, node: onnx.NodeProto, value: str, number: float) -> bool:
        """Whether a node divides a value by a number, or multiplies it with the inverse."""
        other = next((name for name in node.input if name != value), "")
        constant = self._number(other)
        if constant is None or node.domain not in ONNX_DOMAINS:
            return False
        if node.op_type == "Div":
            return node.input[0] == value and abs(constant / number - 1) < _EXACT
        return node.op_type == "Mul" and abs(constant * number - 1) < _EXACT

    def _number(self, name: str) -> float | None:
        return number_in(self._constants.get(name))

    def _with_number(self, node: onnx.NodeProto) -> tuple[str | None, float | None]:
        """The computed operand of an Add or Mul, and the other one where it is a number."""
        number = next((number for name in node.input if (number := self._number(name)) is not None), None)
        return next((name for name in node.input if name not in self._constants), None), number

    def _only_reader(self, value: str) -> onnx.NodeProto | None:
        return self._readers.get(value) if self._counts[value] == 1 else None

    def _only_producer(self, value: str, kind: str) -> onnx.NodeProto | None:
        """The node of a kind that makes a value for one reader alone."""
        node = self._producer.get(value)
        return node if node is not None and node.op_type == kind and node.domain in ONNX_DOMAINS and self._counts[value] == 1 else None
