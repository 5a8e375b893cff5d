"""Half-precision models in float32: 16-bit weights and values widened, graph inputs and outputs as they were."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .errors import UnsupportedModelError
from .normalise import rename_values, subgraphs

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_SUFFIX = "_float32"


def widened(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A model that computes in float32 wherever this one does in float16 or bfloat16, and what a report should say of it.

    Codes of quantized values are exact in float32 and not in float16, and CPUs have few 16-bit kernels. Graph inputs and outputs keep their
    types: each has a Cast. A model without such values is returned as it is.
    """
    if not _is_narrow(model.graph):
        return model, ()
    kinds = sorted({TensorProto.DataType.Name(t.data_type).lower() for t in _tensors(model.graph) if t.data_type in _NARROW})
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    _widen(graph)
    before, after = [], []
    for value in graph.input:
        if value.type.tensor_type.elem_type in _NARROW:
            rename_values(graph, {value.name: value.name + _SUFFIX}, outputs=False)
            before.append(helper.make_node("Cast", [value.name], [value.name + _SUFFIX], f"{value.name}_Cast", to=TensorProto.FLOAT))
    for value in graph.output:
        kind = value.type.tensor_type.elem_type
        if kind in _NARROW:
            rename_values(graph, {value.name: value.name + _SUFFIX}, outputs=True)
            after.append(helper.make_node("Cast", [value.name + _SUFFIX], [value.name], f"{value.name}_Cast", to=kind))
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    what = " and ".join(kinds) or "16-bit"
    return result, (f"{what} values are computed in float32; graph inputs and outputs keep their types",)


def _is_narrow(graph: onnx.GraphProto) -> bool:
    values = [*graph.input, *graph.output]
    return any(tensor.data_type in _NARROW for tensor in _tensors(graph)) or any(v.type.tensor_type.elem_type in _NARROW for v in values)


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    found = list(graph.initializer)
    for node in graph.node:
        found += [attribute.t for attribute in node.attribute if attribute.HasField("t")]
        for subgraph in subgraphs(node):
            found += _tensors(subgraph)
    return found


def _widen(graph: onnx.GraphProto) -> None:
    """Constants, and the types that nodes name, in place."""
    del graph.value_info[:]
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            if attribute.name in ("to", "dtype") and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
        for subgraph in subgraphs(node):
            _widen(subgraph)
            for value in (*subgraph.input, *subgraph.output):
                if value.type.tensor_type.elem_type in _NARROW:
                    value.type.tensor_type.elem_type = TensorProto.FLOAT


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type not in _NARROW:
        return
    try:
        array = numpy_helper.to_array(tensor)
    except ValueError as error:  # the checker does not count the numbers of 16-bit tensors
        raise UnsupportedModelError(f"the constant {tensor.name!r} is damaged: {error}") from error
    tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
