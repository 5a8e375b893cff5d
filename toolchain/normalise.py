"""From an ONNX file to a checked protobuf in the one form that every later stage works on."""

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import helper, inliner, numpy_helper, shape_inference

from . import large, runtime
from .errors import UnsupportedModelError
from .graph import BIAS_INPUT, ONNX_DOMAINS
from .raising import MIN_OPSET, opset_of, raised

# Of `exporters.qdq`.
_EXPORT_SUFFIXES = ("_scale", "_zero_point", "_quantized", "_dequantized", "_clipped", "_qmin", "_qmax", "_float", "_codes")
# ONNX Runtime's MatMulAddFusion names the shapes it makes so, without looking whether a constant has that name, and then refuses the model.
_RUNTIME_NAMES = ("gemm_input_shape", "gemm_output_shape")


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
            raise UnsupportedModelError(f"{path}: is not valid ONNX: {str(error).strip().splitlines()[0]}") from error
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
    if shelf is not None:
        (shelf / "read.weights").unlink()
    used = {node.domain for node in model.graph.node} | {"", "ai.onnx"} | domains
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    _make_dense(model.graph)
    _restore_weight_names(model.graph, original_names)
    _forget_shapes_of_constants(model.graph)
    _free_names(model.graph)
    _join_biases(model)
    _give_own_biases(model.graph)
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


def _give_own_biases(graph: onnx.GraphProto) -> None:
    """A copy of a bias for each layer that shares it but the first: its int32 steps are those of the layer's own input and weight.

    Heads that go over several feature maps share theirs, and exporters join those that are equal (zeros); where another operator, such as
    LayerNormalization, reads it too, the first has a copy as well.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    taken = {*tensors, *(value.name for value in graph.input), *(value for node in graph.node for value in node.output)}
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


def _order_initializers(graph: onnx.GraphProto) -> None:
    """ONNX Runtime writes them in hash order; order of first use makes two runs byte-identical. Unused ones are dropped."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    outputs = [output.name for output in graph.output]
    used = dict.fromkeys(name for name in [*referenced(graph), *outputs] if name in tensors)
    ordered = [tensors[name] for name in used]
    del graph.initializer[:]
    graph.initializer.extend(ordered)


def referenced(graph: onnx.GraphProto) -> list[str]:
    """All value names that nodes read, those in subgraphs (If, Loop, Scan) included."""
    names: list[str] = []
    for node in graph.node:
        names.extend(node.input)
        for subgraph in subgraphs(node):
            names.extend(referenced(subgraph))
    return names


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs that a control-flow node holds in its attributes."""
    return [graph for a in node.attribute for graph in [*a.graphs, *([a.g] if a.HasField("g") else [])]]


def _free_names(graph: onnx.GraphProto) -> None:
    """Rename values whose names are given later: by the exporter to a scale or the codes of another value (`conv` and `conv_scale`), or by
    ONNX Runtime when it optimises the exported file, whose MatMul and Add it joins where it did not in the float model."""
    fixed = {value.name for value in (*graph.input, *graph.output)}
    values = fixed | {tensor.name for tensor in graph.initializer} | {value for node in graph.node for value in node.output}
    renamed: dict[str, str] = {}
    for name in sorted(values - fixed):
        exported = any(name.endswith(suffix) and name.removesuffix(suffix) in values for suffix in _EXPORT_SUFFIXES)
        if exported or name.startswith(_RUNTIME_NAMES):
            new = f"{name}_"
            while new in values:
                new += "_"
            renamed[name] = new
            values.add(new)
    if renamed:
        rename_values(graph, renamed, outputs=True)
        for tensor in graph.initializer:
            tensor.name = renamed.get(tensor.name, tensor.name)
        for info in graph.value_info:
            info.name = renamed.get(info.name, info.name)


def _name_nodes(graph: onnx.GraphProto) -> None:
    taken: set[str] = set()
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


def _join_biases(model: onnx.ModelProto) -> None:
    """MatMul and Add of shapes that are known as the Gemm on rows that ONNX Runtime makes of them, where it leaves them in a float model.

    It leaves the projections of an attention behind LayerNormalization for a fusion that never comes on codes, and makes them a Gemm with
    a float bias in the exported file, which then computes in float.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    readers = Counter([*referenced(graph), *(output.name for output in graph.output)])
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
    shapes = _inferred(model)
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
    nodes = [kept for node in graph.node for kept in (made.get(node.output[0], (node,)) if node.output else (node,))]
    del graph.node[:]
    graph.node.extend(nodes)


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
    shapes = _inferred(model)
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
        name = f"{node.name}_shape"
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
        node.input[1] = name


def _inferred(model: onnx.ModelProto) -> dict[str, list[int]]:
    """What is known of the shapes of a model's values, 0 for an axis that is not."""
    try:
        graph = shape_inference.infer_shapes(large.skeleton(model)).graph
    except shape_inference.InferenceError:
        graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}


def rename_values(graph: onnx.GraphProto, names: dict[str, str], outputs: bool) -> None:
    """Let nodes read a value under another name, and (outputs) make it under that name too."""
    for node in graph.node:
        for index, value in enumerate(node.input):
            node.input[index] = names.get(value, value)
        if outputs:
            for index, value in enumerate(node.output):
                node.output[index] = names.get(value, value)
        for subgraph in subgraphs(node):
            own = {value for inner in subgraph.node for value in inner.output} | {value.name for value in subgraph.input}
            rename_values(subgraph, {old: new for old, new in names.items() if old not in own}, outputs=False)
            for output in subgraph.output:
                if output.name not in own:
                    output.name = names.get(output.name, output.name)
