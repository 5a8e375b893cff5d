"""Means over all of space as GlobalAveragePool, which has an integer kernel; ReduceMean has none.

PyTorch's `mean((2, 3))`, as timm writes squeeze-and-excitation, is exported as ReduceMean, its `adaptive_avg_pool2d` as GlobalAveragePool.
"""

import onnx
from onnx import TensorProto, helper, numpy_helper

from . import large
from .graph import ONNX_DOMAINS, free_name
from .protos import defined, replace_nodes

_POOLED = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})
_RANK = 4  # the least: of three axes the last may be features, which a normalization takes the mean of


def pool_means(model: onnx.ModelProto) -> None:
    """Write ReduceMean over every axis behind the second as GlobalAveragePool, and without kept axes a Flatten behind it; in place."""
    graph = model.graph
    if not any(node.op_type == "ReduceMean" for node in graph.node):
        return
    ranks, constants = _ranks(model), {tensor.name: tensor for tensor in graph.initializer}
    taken = set(defined(graph)).union(node.name for node in graph.node)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        rank = ranks.get(node.input[0], 0) if node.op_type == "ReduceMean" and node.domain in ONNX_DOMAINS else 0
        if rank < _RANK or _axes(node, rank, constants) != set(range(2, rank)):
            nodes.append(node)
            continue
        keeps = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
        pooled = node.output[0] if keeps else free_name(f"{node.output[0]}_pooled", taken)
        nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], node.name))
        nodes[-1].doc_string = node.doc_string
        if not keeps:
            nodes.append(helper.make_node("Flatten", [pooled], list(node.output), free_name(f"{node.name}_Flatten", taken), axis=1))
    replace_nodes(graph, nodes)


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """The number of axes of each value of a type that ONNX Runtime pools, as far as it is known."""
    tensors = ((value.name, value.type.tensor_type) for value in large.inferred_values(model))
    return {name: len(tensor.shape.dim) for name, tensor in tensors if tensor.elem_type in _POOLED}


def _axes(node: onnx.NodeProto, rank: int, constants: dict[str, onnx.TensorProto]) -> set[int]:
    """The axes that a reduction takes, an input from opset 18 on; none where they are computed, or all by default."""
    given = [list(attribute.ints) for attribute in node.attribute if attribute.name == "axes"]
    if len(node.input) > 1 and node.input[1] in constants:
        given.append(numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist())
    return {axis % rank for axis in given[0]} if given else set()
