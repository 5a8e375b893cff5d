"""Old files in opset 13: ONNX's version converter, and what it leaves undone.

It turns Upsample and the first Resize into later ones without the coordinates that those had, and Hardmax over several axes into one over
the last: the file would compute something else.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference, version_converter

from . import large
from .errors import UnsupportedModelError

MIN_OPSET = 13  # the first with per-channel QuantizeLinear / DequantizeLinear
_RESIZE_WITH_COORDINATES = 11


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model is written in; 0 where it names none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def raised(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """A model of an older opset in opset 13.

    Raises:
        UnsupportedModelError: ONNX cannot raise its opset.
    """
    opset = opset_of(model)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    try:
        _flatten_hardmax(changed)
        result = large.with_weights_of(changed, lambda graph: version_converter.convert_version(graph, MIN_OPSET))
        if opset < _RESIZE_WITH_COORDINATES:
            _set_coordinates(result.graph)
    except Exception as error:  # the C++ converter raises bare RuntimeError subclasses
        raise UnsupportedModelError(f"{path}: opset {opset} cannot be raised to {MIN_OPSET}: {error}") from error
    return result


def _set_coordinates(graph: onnx.GraphProto) -> None:
    """Before opset 11, position x of the result was x / scale of what is resized; the nearest was below, or above where it shrinks."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {node.output[0]: a.t for node in graph.node for a in node.attribute if node.op_type == "Constant" and a.HasField("t")}
    for node in graph.node:
        if node.op_type != "Resize" or any(a.name == "coordinate_transformation_mode" for a in node.attribute):
            continue
        scales = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 and node.input[2] in constants else np.ones(1)
        shrinks = bool((scales < 1).any())
        if shrinks and (scales > 1).any() and any(a.name == "mode" and a.s == b"nearest" for a in node.attribute):
            raise ValueError(f"Resize {node.name!r} enlarges one axis and shrinks another, which later versions round otherwise")
        node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
        node.attribute.append(helper.make_attribute("nearest_mode", "ceil" if shrinks else "floor"))


def _flatten_hardmax(model: onnx.ModelProto) -> None:
    """Hardmax over everything from an axis on, as it was before opset 13, in the two axes that both versions treat alike."""
    if not any(node.op_type == "Hardmax" for node in model.graph.node):
        return
    inferred = shape_inference.infer_shapes(large.skeleton(model)).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*inferred.input, *inferred.value_info, *inferred.output)}
    nodes = list[onnx.NodeProto]()
    for node in model.graph.node:
        rank = len(shapes.get(node.input[0], ())) if node.op_type == "Hardmax" else 0
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if node.op_type != "Hardmax" or (rank and axis % rank == rank - 1):
            nodes.append(node)
            continue
        x, y = node.input[0], node.output[0]
        nodes.append(helper.make_node("Shape", [x], [f"{y}_shape"]))
        nodes.append(helper.make_node("Flatten", [x], [f"{y}_rows"], axis=axis % rank if rank else axis))
        nodes.append(helper.make_node("Hardmax", [f"{y}_rows"], [f"{y}_hard"], node.name, axis=1))
        nodes.append(helper.make_node("Reshape", [f"{y}_hard", f"{y}_shape"], [y]))
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
