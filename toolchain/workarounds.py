"""What ONNX Runtime gets wrong in a quantized graph though not in the float one (1.31.1), written in another way that means the same."""

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .graph import ONNX_DOMAINS
from .protos import defined, free_name, inferred_shapes, replace_nodes


def avoid_defects(model: onnx.ModelProto) -> None:
    """Give Pad and Resize all axes, and AveragePool no padding to count where there is none; in place.

    Beside convolutions on integers, which it runs channels last, ONNX Runtime permutes the pads, scales and sizes of `axes` as if they were
    those of all axes. Its QLinearAveragePool divides by the whole window where one reaches over the end (`ceil_mode`) if padding counts.
    """
    graph = model.graph
    nodes = [node for node in graph.node if node.domain in ONNX_DOMAINS]
    for node in nodes:
        if node.op_type == "AveragePool":
            _forget_no_padding(node)
    with_axes = [node for node in nodes if _names_axes(node)]
    if not with_axes:
        return
    spread = _Spread(model)
    before = {node.output[0]: spread.nodes(node) for node in with_axes}
    replace_nodes(graph, [made for node in graph.node for made in (*before.get(next(iter(node.output), ""), ()), node)])


def _forget_no_padding(node: onnx.NodeProto) -> None:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    is_padded = any(attributes.get("pads", [])) or attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    if attributes.get("count_include_pad") and not is_padded:
        _remove(node, "count_include_pad")


def _names_axes(node: onnx.NodeProto) -> bool:
    if node.op_type == "Pad":
        return len(node.input) > 3 and node.input[3] != ""
    return node.op_type == "Resize" and any(attribute.name == "axes" for attribute in node.attribute)


def _remove(node: onnx.NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


class _Spread:
    """Brings nodes of one model to all axes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._shapes, self._taken = inferred_shapes(model), set(defined(model.graph))
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def nodes(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that this one, which is changed, needs in front of it; one whose rank or numbers are not known stays as it is."""
        rank = len(self._shapes.get(node.input[0], []))
        if rank == 0:
            return []
        if node.op_type == "Pad":
            self._pad(node, rank)
            return []
        return self._resize(node, rank)

    def _pad(self, node: onnx.NodeProto, rank: int) -> None:
        pads, axes = (self._array(node.input[index]) for index in (1, 3))
        if pads is None or axes is None:
            return
        whole = np.zeros((2, rank), np.int64)
        whole[:, axes] = pads.reshape(2, -1)
        node.input[1] = self._constant(f"{node.output[0]}_pads", whole.reshape(-1))
        del node.input[3:]
        if node.input[-1] == "":
            del node.input[-1]

    def _resize(self, node: onnx.NodeProto, rank: int) -> list[onnx.NodeProto]:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        axes = [axis % rank for axis in attributes["axes"]]
        roi, scales, sizes = [*node.input[1:], "", "", ""][:3]
        if roi and math.prod(self._constants[roi].dims if roi in self._constants else [1]):
            return []
        if scales:
            factors = self._array(scales)
            if factors is None:
                return []
            whole = np.ones(rank, np.float32)
            whole[axes] = factors
            node.input[2] = self._constant(f"{node.output[0]}_scales", whole)
            _remove(node, "axes")
            return []
        is_trailing = axes == list(range(rank - len(axes), rank))
        if not sizes or not is_trailing or attributes.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
            return []
        kept, whole = (free_name(f"{node.output[0]}_{what}", self._taken) for what in ("kept_sizes", "sizes"))
        node.input[3] = whole
        _remove(node, "axes")
        return [
            helper.make_node("Shape", [node.input[0]], [kept], kept, start=0, end=rank - len(axes)),
            helper.make_node("Concat", [kept, sizes], [whole], whole, axis=0),
        ]

    def _array(self, name: str) -> np.ndarray | None:
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def _constant(self, name: str, array: np.ndarray) -> str:
        name = free_name(name, self._taken)
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name
