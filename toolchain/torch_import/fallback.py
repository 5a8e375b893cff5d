"""The operators that are left to onnx2torch, which is imported (seconds, with torchvision) only for a model that has one of them.

It knows many more, but its converters stop at opset 17 and follow ONNX Runtime less closely than this room's. What neither covers exactly
is better left to ONNX Runtime itself.
"""

import warnings
from functools import cache
from types import ModuleType

import numpy as np
import onnx
import torch
from onnx import defs, helper, numpy_helper

from ..errors import InstallationError
from .operator import NodeView, Operator, Refused

OFFERED = frozenset({("", "RoiAlign")})


def convert(view: NodeView) -> Operator:
    """Convert a node with onnx2torch.

    Raises:
        Refused: no converter for the operator, this version of it, or what the node asks of it.
    """
    if ("" if view.proto.domain == "ai.onnx" else view.proto.domain, view.proto.op_type) not in OFFERED:
        view.refuse("Converter is not implemented")
    library = _onnx2torch()
    node = view.proto
    version = _registered_version(node, view.opset)
    graph = library.onnx_graph.OnnxGraph(_alone(view))
    wrapped = next(iter(graph.nodes.values()))
    try:
        result = library.node_converters.get_converter(node.op_type, version, node.domain)(wrapped, graph)
    except Exception as error:  # converters raise what they please on attributes that they do not expect
        raise Refused(str(error) or type(error).__name__) from error
    return Operator(result.torch_module, tuple(result.onnx_mapping.inputs))


def _alone(view: NodeView) -> onnx.GraphProto:
    """The node as a graph of its own, as onnx2torch wants to see it: declared values and its constants."""
    node = view.proto

    def info(name: str) -> onnx.ValueInfoProto:
        shape, dtype = view.types.shapes.get(name), view.types.dtypes.get(name)
        return helper.make_tensor_value_info(name, dtype, ["N", *shape]) if shape is not None and dtype else onnx.ValueInfoProto(name=name)

    read = dict.fromkeys(name for name in node.input if name)
    tensors = [numpy_helper.from_array(np.asarray(view.arrays[name], order="C"), name) for name in read if name in view.arrays]
    inputs = [info(name) for name in read if name not in view.arrays]
    return helper.make_graph([node], "node", inputs, [info(name) for name in node.output if name], tensors)


def _registered_version(node: onnx.NodeProto, opset: int) -> int:
    """The newest version that onnx2torch has and whose interface covers what the node uses.

    onnx2torch 1.5.15 registers versions up to about opset 17. Most newer schemas only admit more types; those that add attributes or
    inputs are the same operator as long as the node does not use them.
    """
    try:
        schema = defs.get_schema(node.op_type, max_inclusive_version=opset, domain=node.domain)
    except defs.SchemaError:
        return opset
    registry = _onnx2torch().node_converters.registry
    wanted = schema.since_version
    while True:
        try:
            registry.get_converter(node.op_type, schema.since_version, node.domain)
            return schema.since_version
        except NotImplementedError:
            if schema.since_version <= 1:
                return wanted
        older = defs.get_schema(node.op_type, max_inclusive_version=schema.since_version - 1, domain=node.domain)
        if older.since_version == schema.since_version or not _same_interface(node, schema, older):
            return wanted
        schema = older


def _same_interface(node: onnx.NodeProto, newer: defs.OpSchema, older: defs.OpSchema) -> bool:
    used = {attribute.name for attribute in node.attribute}
    if not used <= set(older.attributes) or len(node.input) > older.max_input:
        return False
    if set(older.attributes) - set(newer.attributes):  # an attribute became an input: another meaning
        return False
    return [i.name for i in older.inputs] == [i.name for i in newer.inputs][: len(older.inputs)]


@cache
def _onnx2torch() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import onnx2torch
            import onnx2torch.node_converters.registry
            import onnx2torch.onnx_graph
    except (ImportError, RuntimeError, AttributeError) as error:
        raise InstallationError(
            f"onnx2torch cannot be imported with torch {torch.__version__}: {error}. It needs a torchvision built for the installed "
            "torch: install both together (`pip install --upgrade torch torchvision`); the CPU-only torch wheel does not match the "
            "default torchvision."
        ) from error
    return onnx2torch
