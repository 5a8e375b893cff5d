"""What ONNX Runtime (1.31.1) does not fuse, in an equal form that runs as one kernel or leaves one on integers.

It takes a Relu or Clip behind a MatMul or Gemm into account only where a quantizer follows, and leaves the product in float where anything
else does (Relu and Pow in MetaFormers: CAFormer-S18 took 35 ms in place of 22). Max and Min compute the same, and are not looked at.

It fuses the five operators of a GELU into one where they are written as PyTorch does, not as TensorFlow does, and not behind a quantized
value, which it dequantizes for each of its two readers: FastViT-T8 took 7.9 ms in place of 5.9. So the file has its operator.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from toolchain.graph import free_name

from .walks import all_nodes, reads, replace_nodes, value_names

_PRODUCTS = frozenset({"MatMul", "Gemm"})
_MICROSOFT = "com.microsoft"
_EXACT = 1e-4  # of 1 / sqrt 2 and 1 / 2: exporters write them with 5 to 8 digits, ONNX Runtime takes as much


def let_products_fuse(graph: onnx.GraphProto) -> None:
    """Write a Relu or Clip behind a product of dequantized values as Max and Min, in place; where both are needed, `NODE_Max` is first."""
    producer = {value: node for node in graph.node for value in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    taken: set[str] = set()
    zero = ""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        bounds = _bounds(node, producer, constants)
        if bounds is None:
            nodes.append(node)
            continue
        taken = taken or value_names(graph).union(other.name for other in all_nodes(graph.node))
        low, high = bounds
        if node.op_type == "Relu":
            if not zero:
                zero = free_name("relu_zero", taken)
                graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), zero))
            low = zero
        value = node.input[0]
        if low and high:
            value = free_name(f"{node.output[0]}_max", taken)
            nodes.append(helper.make_node("Max", [node.input[0], low], [value], free_name(f"{node.name}_Max", taken)))
        kind, bound = ("Min", high) if high else ("Max", low)
        nodes.append(helper.make_node(kind, [value, bound], list(node.output), node.name))
        nodes[-1].doc_string = node.doc_string
    if taken:
        replace_nodes(graph, nodes)


def join_gelus(model: onnx.ModelProto) -> None:
    """Write each x (1 + erf(x / sqrt 2)) / 2 as the operator Gelu, under the name of its last node; in place."""
    graph = model.graph
    found = dict(_gelus(graph))
    if not found:
        return
    gone = {value for gelu in found.values() for value in gelu.inside}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output and node.output[0] in found:
            gelu = helper.make_node("Gelu", [found[node.output[0]].x], list(node.output), node.name, domain=_MICROSOFT)
            gelu.doc_string = node.doc_string
            nodes.append(gelu)
        elif gone.isdisjoint(node.output):
            nodes.append(node)
    replace_nodes(graph, nodes)
    read = {*reads(graph.node), *(output.name for output in graph.output)}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    if _MICROSOFT not in (entry.domain for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))


def joined(source: onnx.GraphProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a source's Relu, Clip and GELU as they are there, where they were written otherwise; itself where it has none."""
    return _with_cuts(source, _with_gelus(source, model))


def _with_gelus(source: onnx.GraphProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the nodes of a source's GELUs in the place of operators of the same names."""
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "Gelu" and node.domain == _MICROSOFT}
    found = {last: gelu for last, gelu in _gelus(source) if last in made}
    if not found:
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    own = {value: node for node in source.node for value in node.output}
    have, missing = {tensor.name for tensor in changed.graph.initializer}, set[str]()
    nodes: list[onnx.NodeProto] = []
    for node in changed.graph.node:
        gelu = found.get(node.output[0]) if node.op_type == "Gelu" and node.output else None
        if gelu is None:
            nodes.append(node)
            continue
        for value in (*gelu.inside, node.output[0]):
            part = onnx.NodeProto()
            part.CopyFrom(own[value])
            part.input[:] = [node.input[0] if name == gelu.x else name for name in part.input]
            nodes.append(part)
            missing.update(set(part.input) - have)
    changed.graph.initializer.extend(tensor for tensor in source.initializer if tensor.name in missing)
    replace_nodes(changed.graph, nodes)
    return changed


def _with_cuts(source: onnx.GraphProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the Relu and Clip of a source's nodes that `let_products_fuse` wrote otherwise; itself where it has none."""
    kinds = {node.name: node for node in source.node if node.op_type in ("Relu", "Clip") and node.name}
    found = [node for node in model.graph.node if node.op_type in ("Max", "Min") and node.name in kinds]
    if not found:
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    producer = {value: node for node in changed.graph.node for value in node.output}
    gone: set[str] = set()
    for node in changed.graph.node:
        if node.op_type not in ("Max", "Min") or node.name not in kinds:
            continue
        front = producer.get(node.input[0])
        low, high = (node.input[1], "") if node.op_type == "Max" else ("", node.input[1])
        if high and front is not None and front.op_type == "Max" and front.name.startswith(f"{node.name}_Max"):
            gone.add(front.output[0])
            low, node.input[0] = front.input[1], front.input[0]
        node.op_type = kinds[node.name].op_type
        node.input[:] = [node.input[0]] if node.op_type == "Relu" else [node.input[0], low, high][: 3 if high else 2]
    replace_nodes(changed.graph, [node for node in changed.graph.node if gone.isdisjoint(node.output)])
    return changed


def _bounds(
    node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], constants: Mapping[str, onnx.TensorProto]
) -> tuple[str, str] | None:
    """The names of the bounds of a Relu or Clip behind such a product, "" where it has none; None for any other node."""
    if node.op_type not in ("Relu", "Clip") or node.domain not in ("", "ai.onnx"):
        return None
    product = producer.get(node.input[0])
    if product is None or product.op_type not in _PRODUCTS or product.domain not in ("", "ai.onnx"):
        return None
    operands = [producer.get(value) for value in product.input[:2]]
    if not all(made is not None and made.op_type == "DequantizeLinear" for made in operands):
        return None
    low, high = [*node.input[1:], "", ""][:2]
    if node.op_type == "Clip" and not (low or high):
        return None
    return (low, high) if all(name in constants for name in (low, high) if name) else None


@dataclass(frozen=True)
class _Gelu:
    """The operand of a GELU, and the values between it and its result, in the order they are made."""

    x: str
    inside: tuple[str, ...]


def _gelus(graph: onnx.GraphProto) -> Iterator[tuple[str, _Gelu]]:
    """The results of GELUs of single operators, of which nothing in between is read elsewhere."""
    finder = _Finder(graph)
    for node in graph.node:
        gelu = finder.gelu(node) if node.op_type == "Mul" and node.domain in ("", "ai.onnx") else None
        if gelu is not None:
            yield node.output[0], gelu


class _Finder:
    """Reads the operators of a GELU backwards from the last."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._producer = {value: node for node in graph.node for value in node.output}
        self._order = {value: place for place, node in enumerate(graph.node) for value in node.output}
        self._counts = Counter([*reads(graph.node), *(output.name for output in graph.output)])
        self._numbers = {t.name: float(numpy_helper.to_array(t).reshape(())) for t in graph.initializer if _is_number(t)}

    def gelu(self, last: onnx.NodeProto) -> _Gelu | None:
        """x, 1/2 and 1 + erf(x / sqrt 2) multiplied in any order."""
        number, factors, inside = self._factors(last)
        if len(factors) != 2 or abs(number - 0.5) > _EXACT:
            return None
        for x, other in (factors, factors[::-1]):
            if (found := self._error_function(x, other)) is not None:
                return _Gelu(x, tuple(sorted({*inside, *found}, key=lambda value: self._order[value])))
        return None

    def _factors(self, node: onnx.NodeProto) -> tuple[float, list[str], list[str]]:
        """The number, the other factors, and the inner products of a product of products."""
        number, others, inside = 1.0, list[str](), list[str]()
        for value in node.input:
            if value in self._numbers:
                number *= self._numbers[value]
            elif (product := self._made(value, "Mul")) is not None:
                more = self._factors(product)
                number, others, inside = number * more[0], others + more[1], [*inside, *more[2], value]
            else:
                others.append(value)
        return number, others, inside

    def _error_function(self, x: str, value: str) -> list[str] | None:
        """The values on the way from x to a value that is 1 + erf(x / sqrt 2); None where it is something else."""
        shifted = self._made(value, "Add")
        erf = next((made for one in shifted.input if (made := self._made(one, "Erf")) is not None), None) if shifted is not None else None
        if shifted is None or erf is None or [self._numbers.get(one) for one in shifted.input if one != erf.output[0]] != [1.0]:
            return None
        scaled = self._made(erf.input[0], "Div") or self._made(erf.input[0], "Mul")
        if scaled is None or x not in (scaled.input[:1] if scaled.op_type == "Div" else scaled.input):
            return None
        number = next((self._numbers[one] for one in scaled.input if one in self._numbers), 0.0)
        wanted = math.sqrt(2.0 if scaled.op_type == "Div" else 0.5)
        return [scaled.output[0], erf.output[0], value] if abs(number - wanted) < _EXACT else None

    def _made(self, value: str, kind: str) -> onnx.NodeProto | None:
        """What makes a value, if it is an operator of that kind whose result is read here alone."""
        node = self._producer.get(value)
        is_own = node is not None and node.op_type == kind and node.domain in ("", "ai.onnx") and self._counts[value] == 1
        return node if is_own else None


def _is_number(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) == 1 and len(tensor.dims) <= 1
