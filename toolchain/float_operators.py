"""Which operators of a deployed graph compute in float, by node name, and why.

Read from the graph that ONNX Runtime executes after its optimisations: what it fused is integer, what is left between DequantizeLinear and
QuantizeLinear is not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from .graph import shape_arithmetic

INTEGER_PREFIXES = ("QLinear", "QGemm", "QAttention", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulNBits")
# They move, convert or name values and compute nothing, or their result is no float.
_FREE = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity", "Expand"),
        *("Concat", "Split", "Gather", "Cast", "Shape", "Constant", "ConstantOfShape", "ReorderInput", "ReorderOutput", "Range", "Pad"),
        "NhwcMaxPool",  # for 8-bit integers only
    }
)
_MOVES = frozenset({"MaxPool", "Resize", "ReduceMax"})  # on codes as on floats
_PACKED = frozenset({TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2})
_WIDE = frozenset({TensorProto.INT16, TensorProto.UINT16})
_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv"})
_PRODUCTS = frozenset({"Gemm", "FusedGemm", "MatMul", "FusedMatMul"})


@dataclass(frozen=True)
class FloatOperator:
    """An operator of the executed graph that computes in float, and why."""

    node: str
    op_type: str
    reason: str


def float_operators(graph: onnx.GraphProto) -> tuple[FloatOperator, ...]:
    """The operators of an optimised graph that compute on floats, in its order; those that compute shapes are none."""
    producer = {value: node for node in graph.node for value in node.output if value}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    of_shapes = shape_arithmetic(((node.op_type, node.input, node.output) for node in graph.node), kinds)
    return tuple(
        FloatOperator(node.name or node.output[0], node.op_type, _reason(node, producer, readers, kinds, outputs))
        for node in graph.node
        if node.op_type not in _FREE
        and not of_shapes.issuperset(node.output)
        and not node.op_type.startswith(INTEGER_PREFIXES)
        and not _clips_codes(node, producer, kinds)
        and not (node.op_type in _MOVES and _is_codes(node.input[0], producer))
    )


def _is_codes(value: str, producer: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a value holds integers: what a quantizer or an integer kernel made, perhaps moved since."""
    node = producer.get(value)
    if node is None or not node.input:
        return False
    if node.op_type in _FREE - {"QuantizeLinear", "DequantizeLinear", "Cast"} or node.op_type in (*_MOVES, "Clip"):
        return _is_codes(node.input[0], producer)
    return node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear")


def _clips_codes(node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], kinds: Mapping[str, int]) -> bool:
    """A Clip on integers has integer bounds."""
    return node.op_type == "Clip" and any(kinds.get(value, TensorProto.FLOAT) != TensorProto.FLOAT for value in node.input[1:] if value)


def _reason(
    node: onnx.NodeProto,
    producer: Mapping[str, onnx.NodeProto],
    readers: Mapping[str, list[onnx.NodeProto]],
    kinds: Mapping[str, int],
    outputs: set[str],
) -> str:
    for dequantize in _dequantizers(node, producer):
        kind = kinds.get(dequantize.input[2] if len(dequantize.input) > 2 else dequantize.input[0], 0)
        if kind in _PACKED:
            return f"its weight is stored as {TensorProto.DataType.Name(kind).lower()}, which no integer kernel reads"
        if kind in _WIDE:
            return "it reads 16-bit values, for which there are no integer kernels"
    data = [value for value in node.input if value and value not in kinds]
    floats = [value for value in data if producer.get(value) is None or producer[value].op_type != "DequantizeLinear"]
    if floats:
        return f"it reads {floats[0]!r} in float"
    result = node.output[0]
    if result in outputs:
        return "its result is a graph output and stays float"
    quantized = any(reader.op_type == "QuantizeLinear" for reader in readers.get(result, []))
    if not quantized and node.op_type not in _PRODUCTS:
        return f"its result {result!r} is read in float"
    if node.op_type in _CONVOLUTIONS | _PRODUCTS:
        return "ONNX Runtime did not fuse it"
    return f"ONNX Runtime fuses no integer {node.op_type}"


def _dequantizers(node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for value in node.input:
        made = producer.get(value)
        if made is not None and made.op_type == "DequantizeLinear":
            yield made
