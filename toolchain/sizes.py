"""Sizes that are known though the number of samples is not, as constants where weights are cut out of others by them.

An attention whose queries and keys are different values has one constant for its projections, and exporters cut it up at what they read
from the shape of the queries. ONNX Runtime folds what follows from a shape that is known as a whole; of this one the last axis is.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from . import large, runtime
from .graph import BIAS_INPUT, ONNX_DOMAINS, WEIGHT_INPUT, shape_arithmetic
from .protos import replace_nodes


def fold_known_sizes(model: onnx.ModelProto) -> bool:
    """Replace the sizes by which weights are cut out by the numbers that they always are, in place; whether there were any."""
    graph = model.graph
    producer = {value: node for node in graph.node for value in node.output if value}
    wanted = list(_computed_weights(graph, producer))
    if not wanted:
        return False
    known = runtime.known_integers(large.skeleton(model))
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
