"""Einsum as the MatMul that it is, between changes of axes: products that an integer kernel can take, on weights that are on grids."""

import math
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import large
from .graph import ONNX_DOMAINS, free_name
from .protos import defined, inferred_shapes, referenced, replace_nodes

_OPERANDS = 2


def multiply_matrices(model: onnx.ModelProto) -> None:
    """Einsum of a value and a constant, or of two values, as MatMul, in place; the constant is laid out for it once.

    Axes of both operands that the result has too (heads, say) are those of a stack of matrices, those that it lacks are summed over. What
    is no product of matrices stays: more than two operands, diagonals, sums of one operand alone, products by element, vectors.
    """
    graph = model.graph
    if not any(_is_candidate(node) for node in graph.node):
        return
    editor = _Editor(model)
    replace_nodes(graph, [made for node in graph.node for made in (editor.nodes(node) if _is_candidate(node) else [node])])
    read = {*referenced(graph), *(output.name for output in graph.output)}
    unread = [tensor for tensor in graph.initializer if tensor.name in editor.replaced and tensor.name not in read]
    for tensor in unread:
        graph.initializer.remove(tensor)


@dataclass(frozen=True)
class Terms:
    """The axes of an Einsum of two operands, one letter each."""

    left: str
    right: str
    result: str

    @property
    def stacked(self) -> str:
        """Of both operands and the result."""
        return "".join(axis for axis in self.left if axis in self.right and axis in self.result)

    @property
    def summed(self) -> str:
        """Of both operands, not of the result."""
        return "".join(axis for axis in self.left if axis in self.right and axis not in self.result)

    @property
    def rows(self) -> str:
        """Of the left operand alone."""
        return "".join(axis for axis in self.left if axis not in self.right)

    @property
    def columns(self) -> str:
        """Of the right operand alone."""
        return "".join(axis for axis in self.right if axis not in self.left)

    @property
    def is_product(self) -> bool:
        """Whether it is a product of matrices: each axis once in an operand, none summed over that one operand alone has."""
        once = all(len(set(axes)) == len(axes) for axes in (self.left, self.right, self.result))
        kept = set(self.rows + self.columns) | set(self.result) == set(self.result)
        known = set(self.result) <= set(self.left + self.right)
        return once and kept and known and all((self.summed, self.rows, self.columns))

    def swapped(self) -> "Terms":
        return Terms(self.right, self.left, self.result)


def terms_of(equation: str, ranks: Sequence[int | None]) -> Terms | None:
    """An equation of two operands of these ranks with its ellipses and its result written out; None where it has another form.

    A rank may be None, where it is not known and the operand has no ellipsis.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if len(operands) != len(ranks) or len(operands) != _OPERANDS:
        return None
    fresh = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = ""
    written: list[str] = []
    for operand, rank in zip(operands, ranks, strict=True):
        if "..." in operand:
            count = -1 if rank is None else rank - len(operand.replace("...", ""))
            if not 0 <= count <= len(fresh):
                return None
            axes = "".join(fresh[:count])[::-1]  # the last axes of ellipses are the same ones
            hidden = max(hidden, axes, key=len)
            operand = operand.replace("...", axes)
        written.append(operand)
    if not arrow:
        counts = Counter("".join(operands).replace(".", ""))
        result = "..." + "".join(sorted(axis for axis, count in counts.items() if count == 1))
    return Terms(written[0], written[1], result.replace("...", hidden))


def _is_candidate(node: onnx.NodeProto) -> bool:
    return node.op_type == "Einsum" and node.domain in ONNX_DOMAINS and len(node.input) == _OPERANDS


@dataclass
class _Editor:
    """Writes nodes of one model anew; adds constants to it. `replaced` names the constants that were laid out anew."""

    model: onnx.ModelProto
    replaced: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._shapes: Mapping[str, Sequence[int]] = inferred_shapes(self.model)
        self._taken = set(defined(self.model.graph))
        self._layouts: dict[tuple[str, tuple[int, ...], tuple[int, ...]], str] = {}

    def nodes(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """What computes the same; the node itself where that is no product of matrices."""
        equation = next((a.s.decode() for a in node.attribute if a.name == "equation"), "")
        terms = terms_of(equation, [self._rank(name) for name in node.input])
        values = list(node.input)
        if terms is not None and values[0] in self._tensors:
            terms, values = terms.swapped(), values[::-1]
        if terms is None or not terms.is_product or values[0] in self._tensors or not self._agree(terms, values):
            return [node]
        is_weight = values[1] in self._tensors
        if is_weight and self._tensors[values[1]].data_type != TensorProto.FLOAT:
            return [node]
        if not is_weight and (len(terms.summed) > 1 or (len(terms.rows) > 1 and len(terms.columns) > 1)):
            return [node]
        return self._of_weight(node, terms, *values) if is_weight else self._of_values(node, terms, *values)

    def _rank(self, name: str) -> int | None:
        if name in self._tensors:
            return len(self._tensors[name].dims)
        return len(self._shapes[name]) if self._shapes.get(name) else None

    def _agree(self, terms: Terms, values: Sequence[str]) -> bool:
        """Whether axes that are summed over are as long in both operands, as far as that is known: Einsum may repeat one of length 1."""
        left, right = ([*(self._tensors[name].dims if name in self._tensors else self._shapes.get(name, []))] for name in values)
        for axis in terms.summed:
            sizes = {shape[axes.index(axis)] for shape, axes in ((left, terms.left), (right, terms.right)) if shape} - {0}
            if len(sizes) > 1 or 1 in sizes:
                return False
        return True

    def _of_weight(self, node: onnx.NodeProto, terms: Terms, value: str, weight: str) -> list[onnx.NodeProto]:
        """The rows before the last are further axes of the stack, which the weight is repeated along."""
        stacked, summed, columns = terms.stacked, terms.summed, terms.columns
        sizes = dict(zip(terms.right, self._tensors[weight].dims, strict=True))
        leading = terms.rows[:-1] + stacked + terms.rows[-1] if stacked else terms.rows
        nodes: list[onnx.NodeProto] = []
        value = self._transposed(nodes, node, value, terms.left, leading + summed, "left")
        if len(summed) > 1:
            value = self._reshaped(nodes, node, value, [*[0] * len(leading), math.prod(sizes[axis] for axis in summed)], "rows")
        shape = (*(sizes[axis] for axis in stacked), *(math.prod(sizes[axis] for axis in axes) for axes in (summed, columns)))
        matrix = self._laid_out(weight, tuple(map(terms.right.index, stacked + summed + columns)), shape)
        product = self._named(node, "product")
        nodes.append(helper.make_node("MatMul", [value, matrix], [product], node.name))
        if len(columns) > 1:
            product = self._reshaped(nodes, node, product, [*[0] * len(leading), *(sizes[axis] for axis in columns)], "columns")
        return self._ended(nodes, node, product, leading + columns, terms.result)

    def _of_values(self, node: onnx.NodeProto, terms: Terms, left: str, right: str) -> list[onnx.NodeProto]:
        """Of rows and columns one kind may have more axes than one: these come first, where the other operand is repeated along them."""
        stacked, summed, rows, columns = terms.stacked, terms.summed, terms.rows, terms.columns
        nodes: list[onnx.NodeProto] = []
        left = self._transposed(nodes, node, left, terms.left, rows[:-1] + stacked + rows[-1] + summed, "left")
        right = self._transposed(nodes, node, right, terms.right, columns[:-1] + stacked + summed + columns[-1], "right")
        product = self._named(node, "product")
        nodes.append(helper.make_node("MatMul", [left, right], [product], node.name))
        return self._ended(nodes, node, product, rows[:-1] + columns[:-1] + stacked + rows[-1] + columns[-1], terms.result)

    def _transposed(self, nodes: list[onnx.NodeProto], node: onnx.NodeProto, value: str, given: str, wanted: str, what: str) -> str:
        if given == wanted:
            return value
        made = self._named(node, what)
        nodes.append(helper.make_node("Transpose", [value], [made], f"{node.name}_{what}", perm=[given.index(axis) for axis in wanted]))
        return made

    def _reshaped(self, nodes: list[onnx.NodeProto], node: onnx.NodeProto, value: str, shape: Sequence[int], what: str) -> str:
        name, made = self._named(node, f"{what}_shape"), self._named(node, what)
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
        nodes.append(helper.make_node("Reshape", [value, name], [made], f"{node.name}_{what}"))
        return made

    def _ended(self, nodes: list[onnx.NodeProto], node: onnx.NodeProto, value: str, given: str, wanted: str) -> list[onnx.NodeProto]:
        """The nodes with the last one making the value that the Einsum made."""
        if given != wanted:
            self._transposed(nodes, node, value, given, wanted, "result")
        nodes[-1].output[0] = node.output[0]
        return nodes

    def _laid_out(self, weight: str, order: tuple[int, ...], shape: tuple[int, ...]) -> str:
        """A constant with its axes in this order and then of this shape; the same for each reader that wants it so."""
        tensor = self._tensors[weight]
        if order == tuple(range(len(order))) and shape == tuple(tensor.dims):
            return weight
        key = weight, order, shape
        if key not in self._layouts:
            self._layouts[key] = name = free_name(f"{weight}_matrix", self._taken)
            array = np.ascontiguousarray(large.array(tensor).transpose(order).reshape(shape))
            self.model.graph.initializer.append(numpy_helper.from_array(array, name))
            self.replaced.add(weight)
        return self._layouts[key]

    def _named(self, node: onnx.NodeProto, what: str) -> str:
        return free_name(f"{node.output[0]}_{what}", self._taken)
