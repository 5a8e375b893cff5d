"""Load a float ONNX model, check it, and bring it into the one form that every later stage works on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, inliner, numpy_helper, shape_inference, version_converter

from . import runtime
from .errors import UnsupportedModelError
from .graph import Graph, Node, schedule

MIN_OPSET = 13  # the first with per-channel QuantizeLinear / DequantizeLinear
_QUANTIZED_OPS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
_LARGE = 1024  # elements; shape inference needs the values of shapes and axes, never those of weights


@dataclass(frozen=True)
class InputSpec:
    """A graph input: `shape` has an int for a fixed axis, a name or None for an open one; axis 0 is the sample axis."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}{[d if d is not None else '?' for d in self.shape]}"


@dataclass(frozen=True)
class SourceModel:
    """A checked and normalised float model.

    `model` is the normalised protobuf (treated as frozen): constants are initializers, BatchNorm is folded where that is exact, every node
    has a unique name, opset >= 13. Value names, graph inputs and outputs, metadata and open axes are those of the file.
    """

    path: Path
    sha256: str
    model: onnx.ModelProto
    graph: Graph
    inputs: tuple[InputSpec, ...]

    @cached_property
    def constants(self) -> Mapping[str, np.ndarray]:
        """The initializers as arrays, by name (read only)."""
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}
        for array in arrays.values():
            array.setflags(write=False)
        return MappingProxyType(arrays)

    @cached_property
    def opset(self) -> int:
        return next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))

    @cached_property
    def node_protos(self) -> Mapping[str, onnx.NodeProto]:
        return MappingProxyType({node.name: node for node in self.model.graph.node})


@dataclass(frozen=True)
class ValueTypes:
    """What is known of the values for given input shapes: element type, shape of one sample, and which are arrays of samples.

    `batched` holds the float32 values whose first axis is the sample axis: those that may be cached, quantized and learned on.
    """

    dtypes: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    batched: frozenset[str]


def load_source(path: str | Path) -> SourceModel:
    """Load a float ONNX file and normalise it.

    Raises:
        UnsupportedModelError: not an ONNX file, fails the checker, is quantized already, or ONNX Runtime does not load it.
    """
    path = Path(path)
    model = _read(path)
    quantized = [n for n in model.graph.node if n.op_type in _QUANTIZED_OPS or n.op_type.startswith("QLinear")]
    if quantized:
        raise UnsupportedModelError(
            f"{path}: is quantized already (node {quantized[0].name!r}, {quantized[0].op_type}); give the float model it was made from"
        )
    model = _normalised(model, path)
    nodes = schedule([_node(proto) for proto in model.graph.node], [output.name for output in model.graph.output])
    if not nodes:
        raise UnsupportedModelError(f"{path}: the graph computes nothing from its inputs; there is nothing to quantize")
    constants = frozenset(tensor.name for tensor in model.graph.initializer)
    protos = {proto.name: proto for proto in model.graph.node}
    ordered = [protos[node.name] for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    inputs = tuple(_input_spec(value) for value in model.graph.input if value.name not in constants)
    graph = Graph(nodes, tuple(spec.name for spec in inputs), tuple(output.name for output in model.graph.output), constants)
    if not graph.weighted:
        raise UnsupportedModelError(
            f"{path}: no Conv, ConvTranspose, Gemm or MatMul node has constant weights; there is nothing to quantize"
        )
    return SourceModel(path, hashlib.sha256(path.read_bytes()).hexdigest(), model, graph, inputs)


def infer_types(source: SourceModel, sample_shapes: Mapping[str, tuple[int, ...]]) -> ValueTypes:
    """Infer types and shapes for inputs of the given shapes (one sample each, without the sample axis).

    Shapes are inferred for two different batch sizes; a value whose first axis follows and whose other axes stay is an array of samples.
    """
    small, large = (_inferred(source, sample_shapes, batch) for batch in (2, 3))
    dtypes = {name: dtype for name, (dtype, _) in small.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    batched: set[str] = set()
    for name, (dtype, shape) in small.items():
        other = large[name][1] if name in large else None
        if not shape or not other or None in shape or None in other:
            continue
        shapes[name] = tuple(d for d in shape[1:] if d is not None)
        if dtype == TensorProto.FLOAT and shape[0] == 2 and other[0] == 3 and shape[1:] == other[1:]:
            batched.add(name)
    return ValueTypes(MappingProxyType(dtypes), MappingProxyType(shapes), frozenset(batched))


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise UnsupportedModelError(f"{path}: no such file")
    try:
        model = onnx.load(path)
    except DecodeError:
        raise UnsupportedModelError(f"{path}: not an ONNX file, or cut short (the protobuf cannot be parsed)") from None
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path}: cannot be read: {error}") from error
    if not model.graph.node or not model.opset_import:
        raise UnsupportedModelError(f"{path}: not an ONNX model (no nodes or no operator set)")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise UnsupportedModelError(f"{path}: is not valid ONNX: {str(error).strip().splitlines()[0]}") from error
    return model


def _normalised(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    original_names = {tensor.name for tensor in model.graph.initializer}
    domains = {entry.domain for entry in model.opset_import}
    if model.functions:
        model = inliner.inline_local_functions(model)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        try:
            model = version_converter.convert_version(model, MIN_OPSET)
        except Exception as error:  # the C++ converter raises bare RuntimeError subclasses
            raise UnsupportedModelError(f"{path}: opset {opset} cannot be raised to {MIN_OPSET}: {error}") from error
    model.ir_version = max(model.ir_version, 4)  # before 4 every initializer had to be a graph input, which blocks constant folding
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.input if value.name in constants]:
        model.graph.input.remove(value)
    _name_nodes(model.graph)  # ONNX Runtime refuses two nodes of one name
    model = runtime.cleaned(model)
    used = {node.domain for node in model.graph.node} | {"", "ai.onnx"} | domains
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    _restore_weight_names(model.graph, original_names)
    _order_initializers(model.graph)
    _name_nodes(model.graph)
    _open_batch(model.graph)
    return model


def _restore_weight_names(graph: onnx.GraphProto, original: set[str]) -> None:
    """Constants that absorbed another come back as `ConvBnFusion_W_<name>`; give them their own name again where it is free."""
    taken = {tensor.name for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        prefix, _, rest = tensor.name.partition("Fusion_")
        parts = rest.split("_") if prefix else []
        name = next((n for n in ("_".join(parts[i:]) for i in range(len(parts))) if n in original and n not in taken), None)
        if name is not None:
            renamed[tensor.name] = name
            taken.add(name)
            tensor.name = name
    for node in graph.node:
        for index, value in enumerate(node.input):
            if value in renamed:
                node.input[index] = renamed[value]


def _order_initializers(graph: onnx.GraphProto) -> None:
    """ONNX Runtime writes them in hash order; order of first use makes two runs byte-identical. Unused ones are dropped."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    outputs = [output.name for output in graph.output]
    used = dict.fromkeys(name for name in [*_referenced(graph), *outputs] if name in tensors)
    ordered = [tensors[name] for name in used]
    del graph.initializer[:]
    graph.initializer.extend(ordered)


def _referenced(graph: onnx.GraphProto) -> list[str]:
    """All value names that nodes read, those in subgraphs (If, Loop, Scan) included."""
    names: list[str] = []
    for node in graph.node:
        names.extend(node.input)
        for attribute in node.attribute:
            for subgraph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                names.extend(_referenced(subgraph))
    return names


def _name_nodes(graph: onnx.GraphProto) -> None:
    taken: set[str] = set()
    for index, node in enumerate(graph.node):
        base = node.name or f"{node.op_type}_{index}"
        name, suffix = base, 1
        while name in taken:
            name, suffix = f"{base}_{suffix}", suffix + 1
        taken.add(name)
        node.name = name


def _open_batch(graph: onnx.GraphProto) -> None:
    """Let reshapes of a fixed-batch model copy their first axis (0) instead of naming it, so that it can be run on any batch.

    The declared input shape stays, and so does every result for the declared batch.
    """
    batches = {value.type.tensor_type.shape.dim[0].dim_value for value in graph.input if value.type.tensor_type.shape.dim}
    if len(batches) != 1 or 0 in batches:
        return
    batch = batches.pop()
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] in tensors and not any(a.name == "allowzero" and a.i for a in node.attribute):
            shape = numpy_helper.to_array(tensors[node.input[1]])
            if len(shape) > 1 and shape[0] == batch:
                name = f"{node.name}_shape"
                graph.initializer.append(numpy_helper.from_array(np.array([0, *shape[1:]], np.int64), name))
                node.input[1] = name


def _inferred(
    source: SourceModel, sample_shapes: Mapping[str, tuple[int, ...]], batch: int
) -> dict[str, tuple[int, tuple[int | None, ...] | None]]:
    """Run ONNX shape inference on the graph without its weights and declared shapes."""
    graph = source.model.graph
    fed = []
    for spec in source.inputs:
        dtype = helper.np_dtype_to_tensor_dtype(spec.dtype)
        fed.append(helper.make_tensor_value_info(spec.name, dtype, [batch, *sample_shapes[spec.name]]))
    large = [t for t in graph.initializer if int(np.prod(t.dims)) > _LARGE]
    fed += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in large]
    kept = {t.name for t in large}
    outputs = [onnx.ValueInfoProto(name=output.name) for output in graph.output]
    skeleton = helper.make_graph(list(graph.node), graph.name, fed, outputs, [t for t in graph.initializer if t.name not in kept])
    model = helper.make_model(skeleton, opset_imports=list(source.model.opset_import), ir_version=source.model.ir_version)
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    found: dict[str, tuple[int, tuple[int | None, ...] | None]] = {}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or value.name in kept:
            continue
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim) if tensor.HasField("shape") else None
        found[value.name] = (tensor.elem_type, shape)
    return found


def _node(proto: onnx.NodeProto) -> Node:
    """Values that subgraphs of a control-flow node capture are inputs too."""
    captured = []
    for attribute in proto.attribute:
        for subgraph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            made = {v for node in subgraph.node for v in node.output} | {v.name for v in subgraph.input}
            captured += [v for v in _referenced(subgraph) if v not in made and v not in {t.name for t in subgraph.initializer}]
    return Node(proto.name, proto.op_type, (*proto.input, *captured), tuple(proto.output), proto.domain)


def _input_spec(value: onnx.ValueInfoProto) -> InputSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape") or not tensor.shape.dim:
        raise UnsupportedModelError(f"input {value.name!r}: only tensors with a sample axis are supported")
    dims = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else (d.dim_param or None) for d in tensor.shape.dim)
    return InputSpec(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), dims)
