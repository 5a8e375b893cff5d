"""Matrix products and what is added to them, in the form that integer kernels take: a vector that is constant, or an Add of its own."""

import itertools
import math
from collections import Counter
from collections.abc import Set as AbstractSet

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import large
from .graph import BIAS_INPUT, ONNX_DOMAINS
from .protos import inferred_shapes, read_counts, referenced, replace_nodes, value_names


def join_biases(model: onnx.ModelProto) -> None:
    """MatMul and Add of shapes that are known as the Gemm on rows that ONNX Runtime makes of them, where it leaves them in a float model.

    It leaves the projections of an attention behind LayerNormalization for a fusion that never comes on codes, and makes them a Gemm with
    a float bias in the exported file, which then computes in float.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    readers = read_counts(graph)
    adds = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    found: list[tuple[onnx.NodeProto, onnx.NodeProto, str, int]] = []
    for node in graph.node:
        if node.op_type != "MatMul" or node.domain not in ONNX_DOMAINS:
            continue
        weight, add = tensors.get(node.input[1]), adds.get(node.output[0])
        if weight is None or len(weight.dims) != 2 or add is None or readers[node.output[0]] > 1:
            continue
        bias = next((name for name in add.input if name in tensors), "")
        if bias and list(tensors[bias].dims) == [weight.dims[1]]:
            found.append((node, add, bias, weight.dims[1]))
    if not found:
        return
    shapes = inferred_shapes(model)
    taken = {*tensors, *shapes, *(value for node in graph.node for value in node.output)}
    made: dict[str, tuple[onnx.NodeProto, ...]] = {}  # what stands in the place of the nodes that make these values
    for node, add, bias, width in found:
        given, rows, product = shapes.get(node.input[0], []), f"{node.output[0]}_rows", f"{node.output[0]}_product"
        if len(given) < 3 or 0 in given or taken & {rows, product, f"{rows}_shape", f"{product}_shape"}:
            continue
        for name, shape in ((f"{rows}_shape", [math.prod(given[:-1]), given[-1]]), (f"{product}_shape", [*given[:-1], width])):
            graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
        made[add.output[0]] = ()
        made[node.output[0]] = (
            helper.make_node("Reshape", [node.input[0], f"{rows}_shape"], [rows], f"{node.name}_rows"),
            helper.make_node("Gemm", [rows, node.input[1], bias], [product], node.name),
            helper.make_node("Reshape", [product, f"{product}_shape"], list(add.output), f"{add.name}_product"),
        )
    replace_nodes(graph, [kept for node in graph.node for kept in (made.get(node.output[0], (node,)) if node.output else (node,))])


def split_sums(graph: onnx.GraphProto) -> None:
    """A Gemm that adds something computed, which integer kernels do not, as the Gemm without it and an Add.

    ONNX Runtime makes such of a MatMul with a residual added, files have them as they are.
    """
    constants = {tensor.name for tensor in graph.initializer}
    taken = value_names(graph)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if not _is_layer(node, constants) or len(node.input) < 3 or not node.input[2] or node.input[2] in constants:
            continue
        product, added = f"{node.output[0]}_product", node.input[2]
        if _beta(node) != 1.0 or product in taken:
            continue
        nodes.append(helper.make_node("Add", [product, added], list(node.output), f"{node.name}_Add"))
        node.output[0] = product
        del node.input[2]
    replace_nodes(graph, nodes)


def spread_biases(graph: onnx.GraphProto) -> None:
    """The constant that a Gemm adds as one number for each channel, not scaled: integer kernels know no other.

    Exporters write a single number, or a factor `beta`, of 0 where nothing is to be added.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    taken = value_names(graph)
    for node in graph.node:
        bias = tensors.get(node.input[2]) if _is_layer(node, tensors.keys()) and len(node.input) > 2 else None
        if bias is None or bias.data_type != TensorProto.FLOAT:
            continue
        beta, size, name = _beta(node), math.prod(bias.dims), f"{node.output[0]}_bias"
        width = tensors[node.input[1]].dims[0 if any(a.name == "transB" and a.i for a in node.attribute) else 1]
        if beta == 0.0:
            del node.input[2]
        elif (beta != 1.0 or (size == 1 and list(bias.dims) != [width])) and name not in taken:
            spread = np.float32(beta) * large.array(bias)
            graph.initializer.append(numpy_helper.from_array(np.full(width, spread, np.float32) if size == 1 else spread, name))
            node.input[2] = name
        else:
            continue
        kept = [attribute for attribute in node.attribute if attribute.name != "beta"]
        del node.attribute[:]
        node.attribute.extend(kept)


def give_own_biases(graph: onnx.GraphProto) -> None:
    """A copy of a bias for each layer that shares it but the first: its int32 steps are those of the layer's own input and weight.

    Heads that go over several feature maps share theirs, and exporters join those that are equal (zeros); where another operator, such as
    LayerNormalization, reads it too, the first has a copy as well.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    taken = value_names(graph)
    layers = [(node, BIAS_INPUT[node.op_type]) for node in graph.node if node.op_type in BIAS_INPUT and node.domain in ONNX_DOMAINS]
    layers = [(node, index) for node, index in layers if index < len(node.input) and node.input[index] in tensors]
    elsewhere = Counter(referenced(graph)) - Counter(node.input[index] for node, index in layers)
    seen = {*elsewhere, *(output.name for output in graph.output)}
    for node, index in layers:
        bias = node.input[index]
        if bias in seen:
            name = next(name for number in itertools.count(1) if (name := f"{bias}_{number}") not in taken)
            taken.add(name)
            node.input[index] = name
            own = graph.initializer.add()
            own.CopyFrom(tensors[bias])
            own.name = name
        seen.add(bias)


def _is_layer(node: onnx.NodeProto, constants: AbstractSet[str]) -> bool:
    """Whether a node is a Gemm with a constant weight."""
    return node.op_type == "Gemm" and node.domain in ONNX_DOMAINS and node.input[0] not in constants and node.input[1] in constants


def _beta(node: onnx.NodeProto) -> float:
    """What a Gemm multiplies with what it adds."""
    return next((a.f for a in node.attribute if a.name == "beta"), 1.0)
