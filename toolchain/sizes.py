"""Sizes that are known though the number of samples is not, as constants where weights are cut out of others by them.

An attention whose queries and keys are different values has one constant for its projections, and exporters cut it up at what they read
from the shape of the queries. ONNX Runtime folds what follows from a shape that is known as a whole; of this one the last axis is.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from . import large, runtime
from .graph import BIAS_INPUT, ONNX_DOMAINS, WEIGHT_INPUT, shape_arithmetic
from .protos import replace_nodes
from .raising import opset_of

_OPEN = -(1 << 40)  # stands for an open axis
_MOST = 1024  # elements of a value that sizes are computed from
_MOVES = frozenset({"Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Identity", "Reshape", "Flatten", "Transpose", "Split"})


def fold_known_sizes(model: onnx.ModelProto) -> bool:
    """Replace the sizes by which weights are cut out by the numbers that they always are, in place; whether there were any."""
    graph = model.graph
    producer = {value: node for node in graph.node for value in node.output if value}
    wanted = list(_computed_weights(graph, producer))
    if not wanted:
        return False
    known = _known(model)
    found: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    while wanted:
        value = wanted.pop()
        if value in seen or value not in producer:
            continue
        seen.add(value)
        if value in known:
            found[value] = known[value]
        else:
            wanted += producer[value].input
    if not found:
        return False
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in found.items())
    replace_nodes(graph, [node for node in graph.node if found.keys().isdisjoint(node.output)])
    return True


def _computed_weights(graph: onnx.GraphProto, producer: Mapping[str, onnx.NodeProto]) -> Iterator[str]:
    """What layers read as a weight or bias, where it is made of constants and of sizes."""
    constants = {tensor.name for tensor in graph.initializer}
    fixed = shape_arithmetic(((node.op_type, node.input, node.output) for node in graph.node), constants)
    for node in graph.node:
        if node.domain not in ONNX_DOMAINS or node.op_type not in WEIGHT_INPUT or fixed.issuperset(node.output):
            continue
        for index in (WEIGHT_INPUT[node.op_type], BIAS_INPUT.get(node.op_type, -1)):
            name = node.input[index] if 0 <= index < len(node.input) else ""
            if name in fixed and name in producer:
                yield name


def _known(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The computed integers that are the same for inputs of any size: axes of shapes, and what follows from these.

    Axes that are open stand as numbers that no size has, which may be moved about, but not computed with.
    """
    shapes = runtime.known_shapes(large.skeleton(model))
    values = {tensor.name: large.array(tensor) for tensor in model.graph.initializer if math.prod(tensor.dims) <= _MOST}
    found: dict[str, np.ndarray] = {}
    opset = opset_of(model)
    for node in model.graph.node:
        if node.op_type in ("Shape", "Size") and node.domain in ONNX_DOMAINS:
            shape = shapes.get(node.input[0])
            if shape is None or (node.op_type == "Size" and None in shape):
                continue
            attributes = {a.name: a.i for a in node.attribute}
            sizes = np.array([_OPEN if size is None else size for size in shape], np.int64)
            made = [sizes[attributes.get("start") : attributes.get("end")] if node.op_type == "Shape" else np.array(sizes.prod())]
        else:
            made = _computed(node, values, opset)
        for name, array in zip(node.output, made, strict=False):
            if array.dtype.kind not in "iufb" or array.size > _MOST:
                continue
            values[name] = array
            if array.dtype.kind == "i" and array.ndim < 2 and (array != _OPEN).all():
                found[name] = array
    return found


def _computed(node: onnx.NodeProto, values: Mapping[str, np.ndarray], opset: int) -> list[np.ndarray]:
    """What a node makes of known values, as ONNX's own reference has it; nothing where that cannot be told."""
    given = [values.get(name) for name in node.input if name]
    if node.domain not in ONNX_DOMAINS or not given or any(array is None for array in given):
        return []
    arrays = [array for array in given if array is not None]
    moved = arrays if node.op_type == "Concat" else arrays[:1] if node.op_type in _MOVES else []
    if any(array.dtype.kind == "i" and (array == _OPEN).any() for array in arrays[len(moved) :]):
        return []
    try:
        evaluator, names = ReferenceEvaluator(node, opsets={"": opset}), filter(None, node.input)
        return [np.asarray(array) for array in evaluator.run(None, dict(zip(names, arrays, strict=True)))]
    except Exception:  # an operator that the reference lacks, or the numbers that stand for open axes, out of range
        return []
