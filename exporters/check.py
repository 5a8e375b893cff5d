"""Does a QDQ file keep to what a runtime's parser documents? Each violation is named with its node, before a device finds it.

The rules are written from public sources: onnx-tensorrt's importer and TensorRT's page on explicit quantization, OpenVINO's ONNX frontend,
Qualcomm's and ONNX Runtime's pages on the QNN execution provider, and, for ONNX Runtime, what its optimiser was seen to do. TensorRT and
QNN themselves were not run.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from toolchain.graph import shape_arithmetic

EFFECTS = ("refused", "inexact", "slow")  # the runtime refuses the file, computes something else, or is slow at the node
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_NAMES = TensorProto.DataType.Name
# Of https://github.com/onnxruntime/onnxruntime-qnn/pull/476 and 477.
_QNN_BLOCKS: Mapping[int, int] = {
    TensorProto.INT2: 16,
    TensorProto.UINT2: 16,
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4), 8),
    TensorProto.INT8: 4,
}
_INT4 = frozenset({TensorProto.INT4, TensorProto.UINT4})
_FLOAT8 = frozenset({TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2FNUZ})


@dataclass(frozen=True)
class Violation:
    """A node that breaks a rule, at one of its values where it matters which, and what follows: `EFFECTS`."""

    node: str
    op_type: str
    rule: str
    effect: str = "refused"
    value: str = ""

    @property
    def is_error(self) -> bool:
        return self.effect == "refused"


@dataclass(frozen=True)
class Pair:
    """One QuantizeLinear or DequantizeLinear node with its parameters. `zero_point` None: left out.

    `codes` are there for constants: those of the file, or the floats that a QuantizeLinear makes them of when it is loaded.
    """

    node: onnx.NodeProto
    kind: int
    scale: np.ndarray | None
    zero_point: np.ndarray | None
    codes: np.ndarray | None
    block: int

    @property
    def quantizes(self) -> bool:
        return self.node.op_type == "QuantizeLinear"

    @property
    def is_constant(self) -> bool:
        return self.codes is not None

    @property
    def per_tensor(self) -> bool:
        return self.scale is not None and self.scale.size == 1


class File:
    """A QDQ file with what the rules ask of it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant":
                self._tensors.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
        self.producer = {value: node for node in model.graph.node for value in node.output if value}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for value in dict.fromkeys(node.input):
                self.readers.setdefault(value, []).append(node)
        self.pairs = [self._pair(node) for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        self._by_output = {pair.node.output[0]: pair for pair in self.pairs}

    def dequantized(self, value: str) -> Pair | None:
        """The DequantizeLinear that makes a value."""
        found = self._by_output.get(value)
        return found if found is not None and not found.quantizes else None

    def pair(self, node: onnx.NodeProto) -> Pair:
        """The parameters of a QuantizeLinear or DequantizeLinear node."""
        return self._by_output[node.output[0]]

    def is_constant(self, value: str) -> bool:
        return value in self._tensors

    def shape(self, value: str) -> tuple[int | None, ...]:
        """The shape that the file notes for a value, None for an open axis; () where it notes none."""
        noted = self._noted.get(value)
        if noted is None:
            return ()
        return tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in noted.type.tensor_type.shape.dim)

    @cached_property
    def _noted(self) -> dict[str, onnx.ValueInfoProto]:
        return {value.name: value for value in (*self.graph.value_info, *self.graph.input, *self.graph.output)}

    @cached_property
    def of_shapes(self) -> set[str]:
        """What is computed from shapes alone."""
        return shape_arithmetic(((node.op_type, node.input, node.output) for node in self.graph.node), self._tensors)

    def weighted(self) -> Iterator[tuple[onnx.NodeProto, Pair]]:
        """Convolutions and matrix products whose weight is a dequantized constant, with that weight."""
        for node in self.graph.node:
            weight = self.dequantized(node.input[1]) if node.op_type in _WEIGHTED and len(node.input) > 1 else None
            if weight is not None and weight.is_constant:
                yield node, weight

    def is_scaled(self, node: onnx.NodeProto) -> bool:
        """Whether a DequantizeLinear multiplies what it makes, for an Add of a number and a quantizer behind it: a HardSigmoid."""
        readers = self.readers.get(node.output[0], [])
        if [reader.op_type for reader in readers] != ["Add"]:
            return False
        others = [self.dequantized(value) for value in readers[0].input if value != node.output[0]]
        behind = [reader.op_type for reader in self.readers.get(readers[0].output[0], [])]
        return len(others) == 1 and others[0] is not None and others[0].is_constant and behind == ["QuantizeLinear"]

    def quantized_behind(self, value: str) -> Pair | None:
        """The quantizer of a value, or of what Relu and Clip make of it, where nothing else reads these."""
        readers = self.readers.get(value, [])
        if len(readers) != 1:
            return None
        if readers[0].op_type in ("Relu", "Clip"):
            return self.quantized_behind(readers[0].output[0])
        return self.pair(readers[0]) if readers[0].op_type == "QuantizeLinear" else None

    def bounds(self, activation: onnx.NodeProto) -> tuple[float, float]:
        """What a Relu or Clip holds values between; nothing is known (infinities the wrong way) where the bounds are computed."""
        if activation.op_type == "Relu":
            return 0.0, math.inf
        attributes = {a.name: a.f for a in activation.attribute}
        ends = [attributes.get("min", -math.inf), attributes.get("max", math.inf)]
        for index, value in enumerate(activation.input[1:3]):
            if value:
                found = self._array(value)
                ends[index] = float(found) if found is not None else (math.inf, -math.inf)[index]
        return ends[0], ends[1]

    def kind_of(self, value: str) -> int:
        """The element type of a quantized value, or 0."""
        tensor = self._tensors.get(value)
        return tensor.data_type if tensor is not None else 0

    def _pair(self, node: onnx.NodeProto) -> Pair:
        scale, zero_point = (self._array(node.input[i]) if len(node.input) > i and node.input[i] else None for i in (1, 2))
        attributes = {a.name: a.i for a in node.attribute}
        kind, made = self.kind_of(node.input[2]) if len(node.input) > 2 and node.input[2] else 0, self.producer.get(node.input[0])
        source = made if node.op_type == "DequantizeLinear" and made is not None and made.op_type == "QuantizeLinear" else None
        if not kind and node.op_type == "QuantizeLinear":
            kind = attributes.get("output_dtype", 0) or TensorProto.UINT8
        elif not kind:  # its own output_dtype is that of the floats
            kind = self._pair(source).kind if source is not None else self.kind_of(node.input[0]) or TensorProto.UINT8
        codes = self._array((source if source is not None else node).input[0])
        return Pair(node, kind, scale, zero_point, codes, attributes.get("block_size", 0))

    def _array(self, name: str) -> np.ndarray | None:
        tensor = self._tensors.get(name)
        return numpy_helper.to_array(tensor) if tensor is not None else None


Rule = Callable[[File], Iterator[Violation]]


def check(model: onnx.ModelProto, target: str) -> tuple[Violation, ...]:
    """The violations of a target's rules, worst first, in the order of the graph."""
    file = File(model)
    found = [violation for rule in (_sound, *_RULES[target]) for violation in rule(file)]
    return tuple(sorted(found, key=lambda violation: EFFECTS.index(violation.effect)))


def _at(node: onnx.NodeProto, rule: str, effect: str = "refused", value: str = "") -> Violation:
    return Violation(node.name or node.output[0], node.op_type, rule, effect, value)


def _sound(file: File) -> Iterator[Violation]:
    """What every runtime needs: constant, positive, normal scales; parameters that fit each other; a grid at all."""
    if not file.pairs:
        yield Violation("", "", "the file has no QuantizeLinear or DequantizeLinear: it is not a QDQ file")
    for pair in file.pairs:
        if pair.scale is None:
            yield _at(pair.node, "its scale is not a constant")
            continue
        if not (np.isfinite(pair.scale).all() and (pair.scale >= np.finfo(np.float32).tiny).all()):
            yield _at(pair.node, "its scale has zeros, infinities or denormal numbers")
        if pair.zero_point is not None and pair.zero_point.size != pair.scale.size:
            yield _at(pair.node, "scale and zero point have different sizes")
        source = file.producer.get(pair.node.input[0])
        if not pair.quantizes and source is not None and source.op_type == "QuantizeLinear":
            made = file._by_output[source.output[0]]
            if made.scale is not None and not np.array_equal(made.scale, pair.scale) and not file.is_scaled(pair.node):
                yield _at(pair.node, "its scale differs from that of the QuantizeLinear in front of it", value=pair.node.input[0])


def _tensorrt(file: File) -> Iterator[Violation]:
    allowed = {TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN}
    for pair in file.pairs:
        name = _NAMES(pair.kind)
        if pair.kind == TensorProto.INT32:
            yield _at(pair.node, "int32 is not dequantized: biases must be float")
        elif pair.kind == TensorProto.UINT8:
            yield _at(pair.node, "uint8 is read as int8: use int8 around zero")
        elif pair.kind not in allowed:
            yield _at(pair.node, f"{name} is not supported: int8, int4 and float8e4m3fn are")
        if pair.zero_point is not None and np.asarray(pair.zero_point, np.float32).any():
            yield _at(pair.node, "zero points must be 0")
        if not pair.is_constant and not pair.per_tensor:
            yield _at(pair.node, "activations have one scale for the tensor")
        ends = {end.op_type for end in file.readers.get(pair.node.output[0], [])}
        if pair.kind == TensorProto.INT4 and not (pair.is_constant and pair.block and ends <= {"MatMul", "Gemm", "DequantizeLinear"}):
            yield _at(pair.node, "int4 is for block-wise weights of matrix products only")
        elif pair.block and pair.kind != TensorProto.INT4:
            yield _at(pair.node, f"blocks are for int4 weights only, and these are {name}")
        source = file.producer.get(pair.node.input[0])
        if not pair.quantizes and not pair.is_constant and (source is None or source.op_type != "QuantizeLinear"):
            yield _at(pair.node, "nothing may stand between QuantizeLinear and DequantizeLinear")
    for node, _ in file.weighted():
        if node.op_type == "Conv" and len(node.input) > 2 and node.input[2] and not file.is_constant(node.input[2]):
            yield _at(node, "its bias is not a float constant")
        made = file.producer.get(node.input[0])
        if made is None or made.op_type != "DequantizeLinear":
            yield _at(node, "its weight is quantized and its input is not: it runs in float", "slow")
    for pair in file.pairs:
        source = file.producer.get(pair.node.input[0])
        readers = file.readers.get(pair.node.output[0], [])
        if pair.quantizes and source is not None and source.op_type in ("Conv", "ConvTranspose"):
            ends = [reader for dq in readers for reader in file.readers.get(dq.output[0], [])]
            if any(end.op_type in ("Relu", "Clip") for end in ends):
                yield _at(pair.node, f"it stands between {source.op_type} and its activation, which are then not fused", "slow")


def _openvino(file: File) -> Iterator[Violation]:
    allowed = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, *_INT4, TensorProto.FLOAT8E4M3FN}
    for pair in file.pairs:
        if pair.quantizes and pair.kind not in allowed:
            yield _at(pair.node, f"QuantizeLinear to {_NAMES(pair.kind)} is not supported: 4 and 8-bit integers are")
        elif not pair.quantizes and pair.kind in (TensorProto.INT2, TensorProto.UINT2, *(_FLOAT8 - allowed - {TensorProto.FLOAT8E5M2})):
            yield _at(pair.node, f"DequantizeLinear of {_NAMES(pair.kind)} is not supported")
        if pair.quantizes and pair.kind in (TensorProto.INT16, TensorProto.UINT16):
            yield _at(pair.node, "OpenVINO takes 16-bit quantizers out of the graph", "inexact")
        if pair.quantizes and pair.kind == TensorProto.FLOAT8E4M3FN:
            yield _at(pair.node, "OpenVINO rounds fp8 activations otherwise", "inexact")
        if pair.block and pair.codes is not None and pair.scale is not None:
            axis = next((a.i for a in pair.node.attribute if a.name == "axis"), 1)
            if pair.codes.shape[axis] % pair.block:
                yield _at(pair.node, f"blocks of {pair.block} do not fill an axis of {pair.codes.shape[axis]}")
        if not pair.is_constant and not pair.per_tensor:
            yield _at(pair.node, "activations with a scale for each channel keep the layer in float", "slow")
    for node in file.graph.node:
        if node.op_type == "Add":
            quantized = [pair for value in node.input if (pair := _quantizer(file, value)) is not None]
            if len(quantized) == len(node.input):  # else it is the float one that is computed in the convolution
                yield from (_at(pair.node, _UNROUNDED, "inexact") for pair in quantized if _is_summed_result(file, pair))
        elif node.op_type == "Concat":
            grids = [pair for value in node.input if (pair := _quantizer(file, value)) is not None]
            if len({(str(pair.scale), str(pair.zero_point)) for pair in grids}) > 1:
                yield _at(node, "its inputs have different grids, which OpenVINO puts on one: use --target openvino", "inexact")
            grids += [file.pair(reader) for reader in file.readers.get(node.output[0], []) if reader.op_type == "QuantizeLinear"]
            if any(pair.kind == TensorProto.INT8 for pair in grids):
                yield _at(node, "OpenVINO moves int8 grids around zero that meet in it: use --target openvino", "inexact")
    for node, weight in file.weighted():
        if weight.zero_point is not None and np.asarray(weight.zero_point, np.int32).any():
            yield _at(node, "weights with zero points keep it off the fast integer kernels", "slow")
        if file.dequantized(node.input[0]) is None:
            yield _at(node, "its weight is quantized and its input is not: it runs in float", "slow")


_UNROUNDED = (
    "it quantizes a convolution's result that only an Add reads: OpenVINO adds in the convolution and leaves that rounding out; "
    "use --target openvino"
)


def _quantizer(file: File, value: str) -> Pair | None:
    """The QuantizeLinear right in front of the DequantizeLinear that makes a value."""
    dequantized = file.dequantized(value)
    made = file.producer.get(dequantized.node.input[0]) if dequantized is not None else None
    return file.pair(made) if made is not None and made.op_type == "QuantizeLinear" else None


def _is_summed_result(file: File, quantizer: Pair) -> bool:
    """Whether it quantizes a convolution's result for one reader only."""
    made = file.producer.get(quantizer.node.input[0])
    ends = [end for node in file.readers.get(quantizer.node.output[0], []) for end in file.readers.get(node.output[0], [])]
    return made is not None and made.op_type == "Conv" and len(ends) == 1


def _qnn(file: File) -> Iterator[Violation]:
    activations = {TensorProto.UINT8, TensorProto.UINT16, TensorProto.INT8, TensorProto.INT16}
    weights = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.INT16, TensorProto.UINT16}
    for pair in file.pairs:
        packed = _QNN_BLOCKS.keys() if pair.block else ()
        if pair.is_constant and pair.kind not in {TensorProto.INT32, *weights, *activations, *packed}:
            yield _at(pair.node, f"{_NAMES(pair.kind)} constants are not supported: int4, int8 and 16 bits are")
        if not pair.is_constant and pair.kind not in activations:
            yield _at(pair.node, f"{_NAMES(pair.kind)} activations are not supported: 8 and 16 bits are")
        if not pair.is_constant and not pair.per_tensor:
            yield _at(pair.node, "activations have one scale for the tensor")
    for node, weight in file.weighted():
        source = file.dequantized(node.input[0])
        least = _QNN_BLOCKS.get(weight.kind, 1)
        if weight.block and (source is None or source.kind not in (TensorProto.UINT16, TensorProto.INT16)):
            yield _at(node, "block-wise weights need activations of 16 bits (and version 2.4 of the execution provider)")
        elif weight.block % least:
            yield _at(node, f"blocks of {_NAMES(weight.kind)} weights must be a multiple of {least}")
        elif node.op_type not in ("Conv", "ConvTranspose") and not weight.per_tensor and not weight.block:
            yield _at(node, "a scale for each channel of a matrix product: older execution providers leave it to the CPU", "slow")
        if not weight.per_tensor and weight.zero_point is not None and np.asarray(weight.zero_point, np.int32).any():
            yield _at(node, "weights with a scale for each channel have no zero points")
        yield from _qnn_bias(file, node, weight, source)
        made = file.quantized_behind(node.output[0])
        if made is not None and source is not None and _WIDTHS.get(made.kind) != _WIDTHS.get(source.kind):
            yield _at(node, "its input and its result have grids of different widths: the provider leaves it in float", "slow")
        if made is not None and not _is_one_activation(file, node, made):
            yield _at(node, "what stands between it and its quantizer is more than one activation that the quantizer implies", "slow")
    for node in file.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Clip", "Relu"):
            continue
        for value in node.input:
            if value in file.producer and file.dequantized(value) is None and value not in file.of_shapes:
                yield _at(node, "it reads a float value: the HTP runs quantized operators only", value=value)
    for value in file.graph.input:
        axes = value.type.tensor_type.shape.dim
        if not file.is_constant(value.name) and any(not axis.dim_value for axis in axes):
            yield Violation(
                value.name,
                "graph input",
                "open axes: the execution provider takes fixed shapes only and leaves the graph to the CPU",
                "slow",
            )
    outputs = [value.name for value in file.graph.output]
    for value in outputs:
        if file.dequantized(value) is None and value in file.producer:
            yield _at(file.producer[value], "it makes a graph output in float: the HTP runs quantized operators only", value=value)


_WIDTHS: Mapping[int, int] = {TensorProto.UINT8: 8, TensorProto.INT8: 8, TensorProto.UINT16: 16, TensorProto.INT16: 16}


def _qnn_bias(file: File, node: onnx.NodeProto, weight: Pair, source: Pair | None) -> Iterator[Violation]:
    if len(node.input) < 3 or not node.input[2]:
        return
    bias = file.dequantized(node.input[2])
    if bias is None and file.is_constant(node.input[2]):
        yield _at(node, "its bias is float: ONNX Runtime rounds it to int32 with scale s_x * s_w by itself", "inexact")
    elif bias is None:
        yield _at(node, "its bias is float: the HTP wants int32 with scale s_x * s_w")
    elif bias.scale is not None and weight.scale is not None and source is not None and source.scale is not None and not weight.block:
        wanted = source.scale * weight.scale.reshape(-1)
        if bias.scale.size not in (1, wanted.size) or not np.allclose(bias.scale.reshape(-1), wanted, rtol=1e-4, atol=0.0):
            yield _at(node, "the scale of its bias is not s_x * s_w: the HTP takes that one instead", "inexact")


def _is_one_activation(file: File, node: onnx.NodeProto, quantizer: Pair) -> bool:
    """Whether nothing, or one Relu or Clip that cuts off no number of the grid behind it, stands between a layer and its quantizer."""
    between = file.readers[node.output[0]][0]
    if between.output[0] == quantizer.node.output[0]:
        return True
    if file.readers[between.output[0]][0].output[0] != quantizer.node.output[0] or quantizer.scale is None:
        return False
    info = np.iinfo(onnx.helper.tensor_dtype_to_np_dtype(quantizer.kind)) if quantizer.kind in _WIDTHS else None
    if info is None:
        return False
    zero, scale = int(0 if quantizer.zero_point is None else quantizer.zero_point.reshape(-1)[0]), float(quantizer.scale.reshape(-1)[0])
    low, high = file.bounds(between)
    return low <= (info.min - zero + 0.5) * scale and high >= (info.max - zero - 0.5) * scale


def _ort_cpu(file: File) -> Iterator[Violation]:
    for pair in file.pairs:
        if pair.is_constant and pair.kind == TensorProto.INT8 and pair.zero_point is not None and pair.zero_point.any():
            yield _at(pair.node, "weights with zero points: the kernel has no int8 weights with a zero point for each channel", "slow")
        made = file.producer.get(pair.node.input[0]) if pair.quantizes and pair.kind in _FLOAT8 else None
        if made is not None and made.op_type == "Clip":
            yield _at(pair.node, f"the optimiser fails on a Clip in front of a quantizer to {_NAMES(pair.kind)}")
        elif made is not None and made.op_type == "Relu":
            yield _at(pair.node, f"the optimiser drops a Relu in front of a quantizer to {_NAMES(pair.kind)}", "inexact")
    for node, weight in file.weighted():
        source = file.dequantized(node.input[0])
        if source is None:
            yield _at(node, "its weight is quantized and its input is not: it runs in float", "slow")
            continue
        if weight.kind in (TensorProto.INT2, *_FLOAT8) and source.kind in (TensorProto.UINT8, TensorProto.INT8, *_FLOAT8):
            yield _at(
                node, f"{_NAMES(weight.kind)} weights beside {_NAMES(source.kind)} activations fuse into a kernel that does not exist"
            )
        if (
            weight.kind == TensorProto.INT8
            and source.kind in (*_INT4, TensorProto.INT2, TensorProto.UINT2, *_FLOAT8)
            and node.op_type == "Conv"
        ):
            yield _at(node, f"int8 weights beside {_NAMES(source.kind)} activations fuse into a kernel that does not exist")
        if weight.kind in _INT4:
            yield _at(node, "int4 weights are dequantized and run in float", "slow")
        if node.op_type == "Conv" and file.quantized_behind(node.output[0]) is None:
            yield _at(node, "its result is not quantized, behind its activation if it has one: it runs in float", "slow")
    for node in file.graph.node:
        if node.op_type == "Softmax" and file.dequantized(node.input[0]) is not None and _sums_too_finely(file, node):
            yield _at(node, _TOO_FINE, "inexact", node.output[0])


_TOO_FINE = "its result has a finer scale than 1 / (e^5 D), D the size of its axis: the kernel's 32-bit sum overflows and makes zeros"


def _sums_too_finely(file: File, softmax: onnx.NodeProto) -> bool:
    """Whether ONNX Runtime's QLinearSoftmax (of 1.31.1, as measured) overflows; not told where the size of the axis is not in the file."""
    shape = file.shape(softmax.output[0]) or file.shape(softmax.input[0])
    size = shape[next((a.i for a in softmax.attribute if a.name == "axis"), -1)] if shape else None
    if not size:  # open, or an axis without elements
        return False
    pairs = [file.pair(reader) for reader in file.readers.get(softmax.output[0], []) if reader.op_type == "QuantizeLinear"]
    scales = [pair.scale for pair in pairs if pair.kind in (TensorProto.UINT8, TensorProto.INT8)]
    return any(scale is not None and float(scale.min()) * size < math.exp(-5) for scale in scales)


_RULES: Mapping[str, tuple[Rule, ...]] = {
    "tensorrt": (_tensorrt,),
    "openvino": (_openvino,),
    "qnn": (_qnn,),
    "ort-cpu": (_ort_cpu,),
    "portable": (_ort_cpu, _tensorrt, _openvino),
}
CHECKED = tuple(_RULES)
