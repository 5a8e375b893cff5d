"""What ONNX Runtime (1.31.1) does not run on integers for what stands behind it, in an equal form.

It takes a Relu or Clip behind a MatMul or Gemm into account only where a quantizer follows, and leaves the product in float where anything
else does (Relu and Pow in MetaFormers: CAFormer-S18 took 35 ms in place of 22). Max and Min compute the same, and are not looked at.
"""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from toolchain.graph import free_name

from .walks import all_nodes, replace_nodes, value_names

_PRODUCTS = frozenset({"MatMul", "Gemm"})


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


def joined(source: onnx.GraphProto, model: onnx.ModelProto) -> onnx.ModelProto:
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
        front, low, high = producer.get(node.input[0]), "", ""
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
