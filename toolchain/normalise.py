"""From an ONNX file to a checked protobuf in the one form that every later stage works on."""

import math
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import inliner, numpy_helper

from . import large, runtime
from .equations import multiply_matrices
from .errors import UnsupportedModelError, first_line
from .folding import fold_channels, fold_numbers
from .gates import join_gates
from .graph import free_name
from .loops import capture_constants
from .means import pool_means
from .products import give_own_biases, join_biases, split_sums, spread_biases
from .protos import defined, inferred_shapes, referenced, rename_values, subgraphs, value_names
from .raising import MIN_OPSET, opset_of, raised
from .sizes import fold_known_sizes
from .unfusing import unfuse
from .workarounds import avoid_defects

# Of the nodes that `exporters.qdq` makes for a value.
_EXPORT_SUFFIXES = ("_QuantizeLinear", "_DequantizeLinear", "_LookupDequantizeLinear", "_Clip", "_Zero", "_Add", "_Scaled", "_Shift")
# ONNX Runtime's MatMulAddFusion names the shapes it makes so, without looking whether a constant has that name, and then refuses the model.
_RUNTIME_NAMES = ("gemm_input_shape", "gemm_output_shape", "gemm_input_reshape", "gemm_output_reshape")


def read(path: Path) -> onnx.ModelProto:
    """Read a file and have ONNX check it.

    Raises:
        UnsupportedModelError: it is missing, cut short, or not valid ONNX.
    """
    if not path.is_file():
        raise UnsupportedModelError(f"{path}: no such file")
    try:
        model = large.load(path)
    except DecodeError:
        raise UnsupportedModelError(f"{path}: not an ONNX file, or cut short (the protobuf cannot be parsed)") from None
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path}: cannot be read: {error}") from error
    if not model.graph.node or not model.opset_import:
        raise UnsupportedModelError(f"{path}: not an ONNX model (no nodes or no operator set)")
    _check_names(model.graph)
    try:
        onnx.checker.check_model(str(path) if large.weight_bytes(model) > large.OUTSIDE else model)
    except onnx.checker.ValidationError as error:
        try:
            runtime.session(model)  # the checker refuses some files that run: outputs without a shape, say
        except UnsupportedModelError:
            raise UnsupportedModelError(f"{path}: is not valid ONNX: {first_line(error)}") from error
    return model


def _check_names(graph: onnx.GraphProto) -> None:
    """Refuse names that are not UTF-8; protobuf hands them out as bytes, or fails on them, depending on where they came from."""
    for node in graph.node:
        for name in (node.name, node.op_type, node.domain, *node.input, *node.output):
            _check_name(name)
        for subgraph in subgraphs(node):
            _check_names(subgraph)
    for value in (*graph.input, *graph.output, *graph.initializer):
        _check_name(value.name)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise UnsupportedModelError(f"has names that are not UTF-8 ({name!r})")


def normalised(model: onnx.ModelProto, path: Path, shelf: Path | None = None) -> onnx.ModelProto:
    """Functions inlined, opset raised to 13, constants lifted and folded, every node named; value names stay.

    With a `shelf`, a folder, the weights are kept in a file there.

    Raises:
        UnsupportedModelError: ONNX cannot raise its opset, or ONNX Runtime does not load it.
    """
    if shelf is not None:
        large.moved_out(model, shelf / "read.weights")
    original_names = {tensor.name for tensor in model.graph.initializer}
    domains = {entry.domain for entry in model.opset_import}
    if model.functions:
        model = inliner.inline_local_functions(model)
    model.ir_version = max(model.ir_version, 4)  # before 4 every initializer had to be a graph input, which blocks constant folding
    if opset_of(model) < MIN_OPSET:
        model = raised(model, path)
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.input if value.name in constants]:
        model.graph.input.remove(value)
    _name_nodes(model.graph)  # ONNX Runtime refuses two nodes of one name
    model = runtime.cleaned(model, shelf)
    if shelf is None and any(node.op_type == "BatchNormalization" for node in model.graph.node):
        model = runtime.cleaned(model)  # what it folded last (an Expand, as current torch writes biases) it could not look behind
    if fold_known_sizes(model):
        model = runtime.cleaned(model, shelf, "cut")
        if shelf is not None:
            (shelf / "cleaned.weights").unlink(missing_ok=True)
    if shelf is not None:
        (shelf / "read.weights").unlink(missing_ok=True)
    used = {node.domain for node in model.graph.node} | {"", "ai.onnx"} | domains
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    _make_dense(model.graph)
    _restore_weight_names(model.graph, original_names)
    _forget_shapes_of_constants(model.graph)
    _free_names(model.graph)
    unfuse(model.graph)
    join_gates(model.graph)
    pool_means(model)
    capture_constants(model.graph)
    fold_channels(model)
    fold_numbers(model.graph)
    multiply_matrices(model)
    if shelf is not None:
        large.moved_out(model, shelf / "laid_out.weights")
    join_biases(model)
    split_sums(model.graph)
    spread_biases(model.graph)
    give_own_biases(model.graph)
    avoid_defects(model)
    _order_initializers(model.graph)
    _name_nodes(model.graph)
    _open_batch(model)
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


def _forget_shapes_of_constants(graph: onnx.GraphProto) -> None:
    """What the file declared for a constant is its shape before it was folded, at which inference stops."""
    constants = {tensor.name for tensor in graph.initializer}
    declared = [info for info in graph.value_info if info.name not in constants]
    del graph.value_info[:]
    graph.value_info.extend(declared)


def _order_initializers(graph: onnx.GraphProto) -> None:
    """ONNX Runtime writes them in hash order; order of first use makes two runs byte-identical. Unused ones are dropped."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    outputs = [output.name for output in graph.output]
    used = dict.fromkeys(name for name in [*referenced(graph), *outputs] if name in tensors)
    ordered = [tensors[name] for name in used]
    del graph.initializer[:]
    graph.initializer.extend(ordered)


def _free_names(graph: onnx.GraphProto) -> None:
    """Rename values whose names ONNX Runtime gives when it optimises the exported file, whose MatMul and Add it joins where it did not in
    the float model."""
    fixed = {value.name for value in (*graph.input, *graph.output)}
    taken = set(defined(graph))
    renamed = {name: free_name(name, taken) for name in sorted(value_names(graph) - fixed) if name.startswith(_RUNTIME_NAMES)}
    if renamed:
        rename_values(graph, renamed, outputs=True)
        for tensor in graph.initializer:
            tensor.name = renamed.get(tensor.name, tensor.name)
        for info in graph.value_info:
            info.name = renamed.get(info.name, info.name)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give nodes names of their own, and none that the exporter gives to a quantizer."""
    taken = {f"{value}{suffix}" for value in value_names(graph) for suffix in _EXPORT_SUFFIXES}
    for index, node in enumerate(graph.node):
        base = node.name or f"{node.op_type}_{index}"
        name, suffix = base, 1
        while name in taken:
            name, suffix = f"{base}_{suffix}", suffix + 1
        taken.add(name)
        node.name = name


def _make_dense(graph: onnx.GraphProto) -> None:
    """Sparse constants as dense ones, as ONNX Runtime computes with them."""
    for sparse in graph.sparse_initializer:
        values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        dense = np.zeros(list(sparse.dims), values.dtype)
        dense[np.unravel_index(places, dense.shape) if places.ndim == 1 else tuple(places.T)] = values
        graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]


def _open_batch(model: onnx.ModelProto) -> None:
    """Let reshapes of a fixed-batch model follow the number of samples instead of naming it, so that it can be run on any batch.

    What has the samples first keeps its first axis (0); what has them folded into the first axis, or takes them out of it (windows, the
    matrices of a Gemm), is given the first axis that is left (-1). The declared input shape stays, and so does every result for the
    declared batch; whether another batch gives each sample its own result is for `source.infer_types` to find out.
    """
    graph = model.graph
    batches = {value.type.tensor_type.shape.dim[0].dim_value for value in graph.input if value.type.tensor_type.shape.dim}
    if len(batches) != 1 or 0 in batches:
        return
    batch = batches.pop()
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    shapes, taken = inferred_shapes(model), set(defined(graph))
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] not in tensors or not shapes.get(node.input[0]):
            continue
        shape, given = [int(size) for size in numpy_helper.to_array(tensors[node.input[1]])], shapes[node.input[0]]
        if len(shape) < 2 or shape[0] in (0, -1):  # a first axis that is copied or left over follows by itself
            continue
        if 0 in shape and any(a.name == "allowzero" and a.i for a in node.attribute):
            continue  # an axis without elements
        if shape[0] == batch == given[0]:
            shape[0] = 0
        elif given[0] and 0 not in shape and shape[0] % batch == given[0] % batch == 0 and (-1 not in shape or 0 not in given):
            rest = -math.prod(shape)  # of a shape with -1: all but that
            shape = [-1, *(math.prod(given) // rest if size == -1 else size for size in shape[1:])]
        else:
            continue
        kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]  # torch sets it where no axis is 0 too
        del node.attribute[:]
        node.attribute.extend(kept)
        name = free_name(f"{node.name}_shape", taken)
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
        node.input[1] = name
