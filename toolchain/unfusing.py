"""What ONNX Runtime's optimizer made of a float model, as the standard operators it was made of: those have integer kernels."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .protos import replace_nodes, value_names

_FUSED = "com.microsoft"
_NCHWC = "com.microsoft.nchwc"
# What the parameters of a fused activation are called in the operator itself; Clip has them as inputs.
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}
_GEMM_PARAMETERS = ("activation_alpha", "activation_beta")


def unfuse(graph: onnx.GraphProto) -> None:
    """FusedConv and FusedGemm as Conv and Gemm with an Add and an activation behind them, FusedMatMul with a constant as MatMul.

    Files that were saved with extended optimisations hold them.
    """
    taken = value_names(graph)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute} if node.domain == _FUSED else {}
        parts: list[onnx.NodeProto] | None = None
        if node.domain == _FUSED and node.op_type in ("FusedConv", "FusedGemm"):
            parts = _activated(node, attributes, graph, taken)
        elif node.domain == _FUSED and node.op_type == "FusedMatMul" and node.input[1] in constants:
            parts = _product(node, attributes, graph, constants[node.input[1]], taken)
        nodes += [node] if parts is None else parts
    replace_nodes(graph, nodes)


def is_for_one_cpu(graph: onnx.GraphProto) -> bool:
    """Whether convolutions were laid out for the vector registers of the CPU that optimised the model: that cannot be undone."""
    return any(node.domain == _NCHWC for node in graph.node)


def _activated(node: onnx.NodeProto, attributes: dict[str, Any], graph: onnx.GraphProto, taken: set[str]) -> list[onnx.NodeProto] | None:
    """A layer, the Add of its fourth input and the activation; None for one that is not known, or where names are taken."""
    kind, output = attributes.pop("activation", b"").decode(), node.output[0]
    given: Sequence[float] = attributes.pop("activation_params", ())
    named = [attributes.pop(name) for name in _GEMM_PARAMETERS if name in attributes]
    attributes.pop("activation_gamma", None)
    names = _PARAMETERS.get(kind)
    parameters = [*given, *named][: len(names or ())]
    made = list(_new_names(output, ("layer", "sum"), taken)) if names is not None and len(parameters) == len(names) else []
    if not made or names is None:
        return None
    inputs, value, layer = list(node.input[:3]), made[0], node.op_type.removeprefix("Fused")
    parts = [helper.make_node(layer, inputs, [value], node.name, **attributes)]
    if len(node.input) > 3 and node.input[3]:
        parts.append(helper.make_node("Add", [value, node.input[3]], [made[1]], f"{node.name}_Add"))
        value = made[1]
    if kind == "Clip":
        bounds = [f"{output}_{name}" for name in names]
        graph.initializer.extend(numpy_helper.from_array(np.array(b, np.float32), n) for b, n in zip(parameters, bounds, strict=True))
        parts.append(helper.make_node(kind, [value, *bounds], [output], f"{node.name}_{kind}"))
    else:
        own = dict(zip(names, parameters, strict=True))
        parts.append(helper.make_node(kind, [value], [output], f"{node.name}_{kind}", **own))
    return parts


def _product(
    node: onnx.NodeProto, attributes: dict[str, Any], graph: onnx.GraphProto, tensor: onnx.TensorProto, taken: set[str]
) -> list[onnx.NodeProto] | None:
    """A MatMul with a constant that is transposed and scaled already; None where the other operand is transposed, or names are taken."""
    if any(attributes.get(name, 0) for name in ("transA", "transBatchA", "transBatchB")) or len(tensor.dims) < 2:
        return None
    names = list(_new_names(node.output[0], ("weight",), taken))
    if not names:
        return None
    weight = numpy_helper.to_array(tensor)
    weight = weight.swapaxes(-1, -2) if attributes.get("transB", 0) else weight
    graph.initializer.append(
        numpy_helper.from_array(np.ascontiguousarray(weight * weight.dtype.type(attributes.get("alpha", 1.0))), names[0])
    )
    return [helper.make_node("MatMul", [node.input[0], names[0]], list(node.output), node.name)]


def _new_names(output: str, endings: Sequence[str], taken: set[str]) -> Iterator[str]:
    """Names of values around another; none where one of them is taken."""
    names = [f"{output}_{ending}" for ending in endings]
    if taken.isdisjoint(names):
        taken.update(names)
        yield from names
