"""Models in half or double precision as models in float32, graph inputs and outputs as they were."""

from collections.abc import Set as AbstractSet

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper

from . import runtime
from .errors import UnsupportedModelError
from .graph import free_name
from .protos import defined, rename_values, subgraphs

_HALF = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
_SUFFIX = "_float32"


def in_float32(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A model that computes in float32 wherever this one does in float16, bfloat16 or double, and the names of what it was in.

    Codes of quantized values are exact in float32 and not in float16, CPUs have few 16-bit kernels, and integer kernels make float32 only.
    Doubles beside float32 weights (sizes, times) are left alone. Graph inputs and outputs keep their types: each has a Cast. A model
    without such values is returned as it is.

    Raises:
        UnsupportedModelError: the model is in double precision, and ONNX Runtime does not load it.
    """
    kinds = _kinds(model.graph)
    if not kinds:
        return model, ()
    if model.functions:  # whose types are those of their callers
        model = inliner.inline_local_functions(model)
    if TensorProto.DOUBLE in kinds:
        runtime.session(model)  # few operators have kernels for doubles: what it is compared with must run
    found = {t.data_type for t in _tensors(model.graph)} & kinds
    names = sorted("double" if kind == TensorProto.DOUBLE else TensorProto.DataType.Name(kind).lower() for kind in found)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    _convert(graph, kinds)
    before, after, taken = [], [], set(defined(graph))
    inputs, constants = {value.name for value in graph.input}, {tensor.name: tensor for tensor in graph.initializer}
    for value in graph.input:
        if value.type.tensor_type.elem_type not in kinds:
            continue
        if value.name in constants:  # the default of an input, or a constant as old files list them
            value.type.tensor_type.elem_type = TensorProto.FLOAT
        else:
            single = free_name(value.name + _SUFFIX, taken)
            rename_values(graph, {value.name: single}, outputs=False)
            before.append(helper.make_node("Cast", [value.name], [single], f"{value.name}_Cast", to=TensorProto.FLOAT))
    for value in graph.output:
        kind = value.type.tensor_type.elem_type
        if kind in kinds and (value.name not in inputs or value.name in constants):  # an input that is handed out stays as it came
            single = free_name(value.name + _SUFFIX, taken)
            rename_values(graph, {value.name: single}, outputs=True)
            if value.name in constants:
                constants[value.name].name = single
            after.append(helper.make_node("Cast", [single], [value.name], f"{value.name}_Cast", to=kind))
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    return result, tuple(names) or ("16-bit",)


def _kinds(graph: onnx.GraphProto) -> frozenset[int]:
    """The types that become float32."""
    values, tensors = [*graph.input, *graph.output], _tensors(graph)
    present = {tensor.data_type for tensor in tensors} | {value.type.tensor_type.elem_type for value in values}
    has_double_weights = any(tensor.data_type == TensorProto.DOUBLE and len(tensor.dims) > 1 for tensor in tensors)
    half = _HALF if present & _HALF else frozenset[int]()
    return half | {TensorProto.DOUBLE} if has_double_weights else half


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    found = list(graph.initializer)
    for node in graph.node:
        found += [attribute.t for attribute in node.attribute if attribute.HasField("t")]
        for subgraph in subgraphs(node):
            found += _tensors(subgraph)
    return found


def _convert(graph: onnx.GraphProto, kinds: AbstractSet[int]) -> None:
    """Constants, and the types that nodes name, in place."""
    del graph.value_info[:]
    for tensor in graph.initializer:
        _convert_tensor(tensor, kinds)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _convert_tensor(attribute.t, kinds)
            if attribute.name in ("to", "dtype") and attribute.i in kinds:
                attribute.i = TensorProto.FLOAT
        for subgraph in subgraphs(node):
            _convert(subgraph, kinds)
            for value in (*subgraph.input, *subgraph.output):
                if value.type.tensor_type.elem_type in kinds:
                    value.type.tensor_type.elem_type = TensorProto.FLOAT


def _convert_tensor(tensor: onnx.TensorProto, kinds: AbstractSet[int]) -> None:
    if tensor.data_type not in kinds:
        return
    try:
        array = numpy_helper.to_array(tensor)
    except ValueError as error:  # the checker does not count the numbers of 16-bit tensors
        raise UnsupportedModelError(f"the constant {tensor.name!r} is damaged: {error}") from error
    tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
