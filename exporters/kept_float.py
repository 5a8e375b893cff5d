"""Layers that stay float between quantized values: ONNX Runtime (1.31.1) would round their weights to 8 bits, one scale for all, by itself.

Its WeightBiasQuantization does so to Conv, ConvTranspose and Gemm (which it makes of MatMul and Add) whose input is dequantized with one
scale and whose result is quantized again, and a layer that was kept in float because it is sensitive then has the worst grid of all (a
depthwise one of MobileNetV2: 15 dB in place of 19). It leaves inputs alone that are dequantized with a scale for each channel. So such a
layer reads one with the same scale as often as there are channels: the same numbers, to the bit. Where no axis is known to be longer than
one, it reads them through a Max with the least float.
"""

from collections.abc import Container, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

import toolchain.large as large
from toolchain.graph import free_name

from .walks import all_nodes, reads, replace_nodes, subgraphs, value_names

_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_MOVES = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "MaxPool"})  # it moves quantizers past these


def guard(model: onnx.ModelProto) -> None:
    """Let such layers read values that are dequantized by channel, in place.

    Where others read a value, or what moves it to the layer, too, the layer has these nodes for itself, `NODE_Operand` behind the codes.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producer = {value: node for node in graph.node for value in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in reads([node]):
            readers.setdefault(value, []).append(node)
    outputs = {output.name for output in graph.output}
    shapes: Mapping[str, list[int]] | None = None
    taken: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        way = _way(node, producer, constants)
        if way and _ends_in_codes(node.output[0], readers, outputs):
            shapes = _shapes(model) if shapes is None else shapes
            channels = _channels(shapes.get(way[0].output[0], []))
            taken = taken or value_names(graph).union(other.name for other in all_nodes(graph.node))
            if channels is None:
                nodes.append(_passed_on(node, graph, taken))
            else:
                if any(len(readers[part.output[0]]) > 1 or part.output[0] in outputs for part in way):
                    way = _copied(way, node, taken)
                    nodes += way
                graph.initializer.extend(_dequantize_by_channel(way[0], node.name, *channels, constants, taken))
        nodes.append(node)
    if taken:
        replace_nodes(graph, nodes)


def _way(node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], constants: Container[str]) -> list[onnx.NodeProto]:
    """From the DequantizeLinear of one scale to a layer of float weights: that node and those that move what it makes; empty if not so."""
    if node.op_type not in _LAYERS or node.domain not in ("", "ai.onnx") or node.input[1] not in constants:
        return []
    way: list[onnx.NodeProto] = []
    made = producer.get(node.input[0])
    while made is not None:
        way.insert(0, made)
        if made.op_type not in _MOVES:
            is_one = made.op_type == "DequantizeLinear" and all(name in constants for name in made.input[1:])
            return way if is_one and not any(attribute.name == "axis" for attribute in made.attribute) else []
        made = producer.get(made.input[0])
    return []


def _ends_in_codes(value: str, readers: Mapping[str, list[onnx.NodeProto]], outputs: Container[str]) -> bool:
    """Whether nothing but a sum with a bias, a Relu, a Clip or what moves stands between a value and the one quantizer that reads it."""
    while value not in outputs and len(behind := readers.get(value, [])) == 1 and not subgraphs(behind[0]):
        if behind[0].op_type == "QuantizeLinear":
            return True
        if behind[0].op_type not in {"Add", "Relu", "Clip", *_MOVES}:
            return False
        value = behind[0].output[0]
    return False


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """What is known of the shapes of values, 0 for an axis that is not."""
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in large.inferred_values(model)}


def _channels(shape: list[int]) -> tuple[int, int] | None:
    """An axis and its length: that of the channels, or another that no scale of one number covers."""
    return next(((axis, size) for axis, size in enumerate(shape) if axis and size > 1), None)


def _passed_on(node: onnx.NodeProto, graph: onnx.GraphProto, taken: set[str]) -> onnx.NodeProto:
    """A Max that a layer reads its input through."""
    least = free_name(f"{node.name}_least", taken)
    graph.initializer.append(numpy_helper.from_array(np.array(np.finfo(np.float32).min), least))
    value, node.input[0] = node.input[0], free_name(f"{node.name}_operand", taken)
    return helper.make_node("Max", [value, least], [node.input[0]], free_name(f"{node.name}_Operand", taken))


def _copied(way: list[onnx.NodeProto], node: onnx.NodeProto, taken: set[str]) -> list[onnx.NodeProto]:
    """The way for a layer alone, which reads its end."""
    copies: list[onnx.NodeProto] = []
    for part in way:
        copy = onnx.NodeProto()
        copy.CopyFrom(part)
        copy.name = free_name(f"{node.name}_Operand", taken)
        copy.output[0] = free_name(f"{node.name}_operand", taken)
        if copies:
            copy.input[0] = copies[-1].output[0]
        copies.append(copy)
    node.input[0] = copies[-1].output[0]
    return copies


def _dequantize_by_channel(
    pair: onnx.NodeProto, name: str, axis: int, size: int, constants: Mapping[str, onnx.TensorProto], taken: set[str]
) -> list[onnx.TensorProto]:
    """Give a DequantizeLinear its scale and zero point `size` times; returns these."""
    made = []
    for place, (key, constant) in enumerate(zip(("scale", "zero_point"), pair.input[1:], strict=False), 1):
        number = numpy_helper.to_array(constants[constant]).reshape(())
        pair.input[place] = free_name(f"{name}_{key}", taken)
        made.append(numpy_helper.from_array(np.full(size, number), pair.input[place]))
    pair.attribute.append(helper.make_attribute("axis", axis))
    return made
