"""What ONNX Runtime gets wrong in a quantized graph though not in the float one (1.31.1), written in another way that means the same."""

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .graph import ONNX_DOMAINS, free_name
from .protos import defined, inferred_shapes, replace_nodes


def avoid_defects(model: onnx.ModelProto) -> None:
    """Give Pad and Resize all axes, and keep AveragePool from a kernel on integers that is wrong; in place.

    Beside convolutions on integers, which it runs channels last, ONNX Runtime permutes the pads, scales and sizes of `axes` as if they were
    those of all axes. Its QLinearAveragePool divides by the whole window where one reaches over the end (`ceil_mode`) if padding counts,
    and knows no dilations. Where there is no padding none is counted; else a Max of one value, which the optimizer leaves alone, parts
    AveragePool from the quantizer behind it.
    """
    graph = model.graph
    nodes = [node for node in graph.node if node.domain in ONNX_DOMAINS]
    taken: set[str] = set()
    behind: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        if node.op_type == "AveragePool" and not _pools_right(node):
            taken = taken or set(defined(graph))
            output, node.output[0] = node.output[0], free_name(f"{node.output[0]}_pooled", taken)
            behind[node.output[0]] = helper.make_node("Max", node.output, [output], f"{node.name}_Max")
    with_axes = [node for node in nodes if _names_axes(node)]
    if not with_axes and not behind:
        return
    spread = _Spread(model)
    before = {node.output[0]: spread.nodes(node) for node in with_axes}
    made: list[onnx.NodeProto] = []
    for node in graph.node:
        name = next(iter(node.output), "")
        made += [*before.get(name, ()), node, *([behind[name]] if name in behind else [])]
    replace_nodes(graph, made)


def _pools_right(node: onnx.NodeProto) -> bool:
    """Whether QLinearAveragePool does what a node says, which forgets to count padding that it does not have."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    is_padded = any(attributes.get("pads", [])) or attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    counts = bool(attributes.get("count_include_pad"))
    if counts and not is_padded:
        _remove(node, "count_include_pad")
    is_dilated = any(step != 1 for step in attributes.get("dilations", []))
    return not is_dilated and not (counts and is_padded and attributes.get("ceil_mode"))


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
        """The nodes that this one, which is changed, needs in front of it; one whose rank or axes are not known stays as it is."""
        rank = len(self._shapes.get(node.input[0], []))
        if rank == 0:
            return []
        return self._pad(node, rank) if node.op_type == "Pad" else self._resize(node, rank)

    def _pad(self, node: onnx.NodeProto, rank: int) -> list[onnx.NodeProto]:
        axes = self._array(node.input[3])
        if axes is None:
            return []
        places = {int(axis) % rank: place for place, axis in enumerate(axes)}
        ends = [places[axis] + len(axes) * end if axis in places else 2 * len(axes) for end in range(2) for axis in range(rank)]
        made = self._chosen(node, 1, "pads", ends, np.zeros(1, np.int64))
        del node.input[3:]
        if node.input[-1] == "":
            del node.input[-1]
        return made

    def _resize(self, node: onnx.NodeProto, rank: int) -> list[onnx.NodeProto]:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        places = {axis % rank: place for place, axis in enumerate(attributes["axes"])}
        roi, scales, sizes = [*node.input[1:], "", "", ""][:3]
        is_stretched = attributes.get("keep_aspect_ratio_policy", b"stretch") == b"stretch"
        has_roi = roi and math.prod(self._constants[roi].dims if roi in self._constants else [1])
        if has_roi or (sizes and not is_stretched) or not (scales or sizes):
            return []
        _remove(node, "axes")
        if scales:
            return self._chosen(node, 2, "scales", [places.get(axis, len(places)) for axis in range(rank)], np.ones(1, np.float32))
        chosen = [places.get(axis, len(places) + axis) for axis in range(rank)]
        own = free_name(f"{node.output[0]}_own_sizes", self._taken)
        return [helper.make_node("Shape", [node.input[0]], [own], own), *self._chosen(node, 3, "sizes", chosen, own)]

    def _chosen(self, node: onnx.NodeProto, index: int, what: str, places: list[int], rest: np.ndarray | str) -> list[onnx.NodeProto]:
        """Let an input be what is at `places` of it and then `rest`, a constant or a value: a constant where it is one, else computed."""
        given = self._array(node.input[index])
        if given is not None and not isinstance(rest, str):
            node.input[index] = self._constant(f"{node.output[0]}_{what}", np.concatenate([given, rest])[places])
            return []
        rest = rest if isinstance(rest, str) else self._constant(f"{node.output[0]}_rest", rest)
        chosen = self._constant(f"{node.output[0]}_places", np.array(places, np.int64))
        joined, whole = (free_name(f"{node.output[0]}_{name}", self._taken) for name in (f"joined_{what}", what))
        nodes = [helper.make_node("Concat", [node.input[index], rest], [joined], joined, axis=0)]
        node.input[index] = whole
        return [*nodes, helper.make_node("Gather", [joined, chosen], [whole], whole)]

    def _array(self, name: str) -> np.ndarray | None:
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def _constant(self, name: str, array: np.ndarray) -> str:
        name = free_name(name, self._taken)
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name
