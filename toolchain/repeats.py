"""Depthwise convolutions that make several channels of each: ONNX Runtime has an integer kernel for those that make one.

It cuts any other into groups, rearranges every window and multiplies matrices of one row: 8.0 ms for one patch embedding of FastViT (7 x 7,
two channels of each of 64), 0.9 in float. With the codes of its input repeated, each channel as often as it is read, the convolution makes
one channel of each: the same sums to the bit in 0.4 ms, and on x86 CPUs without VNNI sums that do not saturate.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .graph import free_name
from .protos import defined, read_counts, replace_nodes

_BYTES = (TensorProto.UINT8, TensorProto.INT8)
_OWN = "_Repeated"  # ends the name of a DequantizeLinear that only a convolution of repeated channels reads


def repeat_channels(graph: onnx.GraphProto) -> None:
    """Let such convolutions between 8-bit codes read repeated ones, in place.

    `NODE_Repeat` is the Gather that repeats the codes of what a convolution reads. Where others read that value too, `NODE_Repeated`
    dequantizes them; else the value's own DequantizeLinear does.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producer = {value: node for node in graph.node for value in node.output}
    counts = read_counts(graph)
    quantized = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    taken: set[str] = set()
    before: dict[str, list[onnx.NodeProto]] = {}  # the nodes to put in front of one, by a value that it makes
    for node in graph.node:
        pair, times = producer.get(node.input[0]) if node.input else None, _channels_of_each(node, producer, constants)
        if times < 2 or pair is None or not _is_of_bytes(pair, producer, constants):
            continue
        if node.output[0] not in quantized or counts[node.output[0]] > 1:
            continue  # it runs in float
        taken = taken or set(defined(graph)).union(other.name for other in graph.node)
        channels, repeated = (free_name(f"{node.name}_{ending}", taken) for ending in ("channels", "repeated"))
        group = _group(node)
        graph.initializer.append(numpy_helper.from_array(np.arange(group.i, dtype=np.int64).repeat(times), channels))
        group.i *= times
        repeat = helper.make_node("Gather", [pair.input[0], channels], [repeated], free_name(f"{node.name}_Repeat", taken), axis=1)
        if counts[node.input[0]] == 1:
            before[pair.output[0]], pair.input[0] = [repeat], repeated
            continue
        node.input[0] = free_name(f"{node.name}_operand", taken)
        own = free_name(f"{node.name}{_OWN}", taken)
        before[node.output[0]] = [repeat, helper.make_node("DequantizeLinear", [repeated, *pair.input[1:]], [node.input[0]], own)]
    if before:
        replace_nodes(graph, [part for node in graph.node for part in (*before.get(next(iter(node.output), ""), ()), node)])


def without_repeats(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with convolutions that make several channels of each again; itself where it has none."""
    if not any(True for _ in _repeated(model.graph)):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    gone: set[str] = set()
    pairs = {tuple(node.input): node.output[0] for node in changed.graph.node if node.op_type == "DequantizeLinear"}
    for node, pair, repeat, channels in list(_repeated(changed.graph)):
        _group(node).i = int(channels.max()) + 1
        gone.update((repeat.output[0], repeat.input[1]))
        whole = pairs.get((repeat.input[0], *pair.input[1:])) if pair.name.endswith(_OWN) else None
        if whole is None:
            pair.input[0] = repeat.input[0]
        else:
            node.input[0] = whole
            gone.add(pair.output[0])
    replace_nodes(changed.graph, [node for node in changed.graph.node if gone.isdisjoint(node.output)])
    kept = [tensor for tensor in changed.graph.initializer if tensor.name not in gone]
    del changed.graph.initializer[:]
    changed.graph.initializer.extend(kept)
    return changed


def codes_of(pair: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto]) -> str:
    """The codes that a quantizer made for a DequantizeLinear: those that are repeated for it, where they are."""
    made = producer.get(pair.input[0])
    return made.input[0] if made is not None and made.op_type == "Gather" and made.input[0] in producer else pair.input[0]


def _repeated(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto, np.ndarray]]:
    """The convolutions that read repeated channels, each with its DequantizeLinear, the Gather in front, and the channels that it takes."""
    producer = {value: node for node in graph.node for value in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        pair = producer.get(node.input[0]) if node.op_type == "Conv" else None
        repeat = producer.get(pair.input[0]) if pair is not None and pair.op_type == "DequantizeLinear" else None
        if pair is None or repeat is None or repeat.op_type != "Gather" or repeat.input[1] not in constants:
            continue
        channels = numpy_helper.to_array(constants[repeat.input[1]])
        times = int((channels == 0).sum())
        if times > 1 and np.array_equal(channels, np.arange(channels.size // times).repeat(times)):
            yield node, pair, repeat, channels


def _channels_of_each(node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], constants: Mapping[str, TensorProto]) -> int:
    """How many channels a convolution of 8-bit weights makes of each that it reads; 0 where it mixes channels."""
    if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
        return 0
    weight = producer.get(node.input[1])
    codes = constants.get(weight.input[0]) if weight is not None and weight.op_type == "DequantizeLinear" else None
    group = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    if codes is None or codes.data_type not in _BYTES or group == 1 or codes.dims[1] != 1:
        return 0
    return codes.dims[0] // group


def _is_of_bytes(pair: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], constants: Mapping[str, TensorProto]) -> bool:
    """Whether a node dequantizes computed 8-bit codes with one scale for all channels."""
    if pair.op_type != "DequantizeLinear" or len(pair.input) < 3 or pair.input[0] not in producer:
        return False
    scale, zero_point = (constants.get(name) for name in pair.input[1:])
    return scale is not None and not scale.dims and zero_point is not None and zero_point.data_type in _BYTES


def _group(node: onnx.NodeProto) -> onnx.AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == "group")
