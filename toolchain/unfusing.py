"""What ONNX Runtime's optimizer made of a float model, as the standard operators it was made of: those have integer kernels.

Files that were saved with extended optimisations hold it, and those that the optimizer for transformers wrote.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import large
from .graph import BLOCKED_DOMAIN
from .protos import read_counts, replace_nodes, value_names

_FUSED = "com.microsoft"
# What the parameters of a fused activation are called in the operator itself; Clip has them as inputs.
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}
_GEMM_PARAMETERS = ("activation_alpha", "activation_beta", "activation_gamma")
_OF_HEADS = ("num_heads", "scale", "unidirectional", "mask_filter_value")

Parts = list[onnx.NodeProto]


def unfuse(graph: onnx.GraphProto) -> None:
    """Fused convolutions and products with what was fused into them behind them, Attention with its projection before it, embeddings as
    lookups. What is of a kind that is not known, or would make names that are taken, stays."""
    if not any(node.domain == _FUSED for node in graph.node):
        return
    editor = _Editor(graph)
    parts = [editor.parts_of(node) if node.domain == _FUSED else None for node in graph.node]
    replace_nodes(graph, [one for node, some in zip(graph.node, parts, strict=True) for one in ([node] if some is None else some)])


def is_for_one_cpu(graph: onnx.GraphProto) -> bool:
    """Whether convolutions were laid out for the vector registers of the CPU that optimised the model: that cannot be undone."""
    return any(node.domain == BLOCKED_DOMAIN for node in graph.node)


class _Editor:
    """What stands in the place of a fused node; constants that this needs are added to the graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._taken = value_names(graph)
        self._read = read_counts(graph).keys()
        self._ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.value_info)}
        embeddings = [node for node in graph.node if node.op_type == "EmbedLayerNormalization" and len(node.output) > 1]
        self._lengths = {node.output[1] for node in embeddings}

    def parts_of(self, node: onnx.NodeProto) -> Parts | None:
        """The nodes that compute what a fused one does; None where it stays."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        kinds = {
            "FusedConv": self._activated,
            "FusedGemm": self._activated,
            "FusedMatMul": self._product,
            "Attention": self._projected,
            "EmbedLayerNormalization": self._embedded,
        }
        return kinds[node.op_type](node, attributes) if node.op_type in kinds else None

    def _activated(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Parts | None:
        """A layer, the Add of its fourth input and the activation."""
        kind = attributes.pop("activation", b"").decode()
        found = [*attributes.pop("activation_params", ()), *(attributes.pop(name) for name in _GEMM_PARAMETERS if name in attributes)]
        parameters = _PARAMETERS.get(kind)
        names = self._names(node, "layer", "sum", "min", "max") if parameters is not None and len(found) >= len(parameters) else {}
        if parameters is None or not names:
            return None
        value = names["layer"]
        parts = [helper.make_node(node.op_type.removeprefix("Fused"), node.input[:3], [value], node.name, **attributes)]
        if len(node.input) > 3 and node.input[3]:
            parts.append(helper.make_node("Add", [value, node.input[3]], [names["sum"]], f"{node.name}_Add"))
            value = names["sum"]
        own = dict(zip(parameters, found, strict=False))
        bounds = [self._constant(names[key], np.array(own.pop(key), np.float32)) for key in ("min", "max") if key in own]
        return [*parts, helper.make_node(kind, [value, *bounds], node.output, f"{node.name}_{kind}", **own)]

    def _product(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Parts | None:
        """A MatMul with a constant that is transposed and scaled already."""
        tensor = self._constants.get(node.input[1])
        is_turned = any(attributes.get(name, 0) for name in ("transA", "transBatchA", "transBatchB"))
        names = self._names(node, "weight") if tensor is not None and len(tensor.dims) > 1 and not is_turned else {}
        if tensor is None or not names:
            return None
        weight = large.array(tensor)
        weight = weight.swapaxes(-1, -2) if attributes.get("transB", 0) else weight
        scaled = self._constant(names["weight"], np.ascontiguousarray(weight * weight.dtype.type(attributes.get("alpha", 1.0))))
        return [helper.make_node("MatMul", [node.input[0], scaled], node.output, node.name)]

    def _projected(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Parts | None:
        """Query, key and value as one product, split, and the attention over them; not where there is a cache.

        A mask must hold the length of each sample, as EmbedLayerNormalization counts it, or be declared [N, keys]: those are the kinds that
        MultiHeadAttention takes alike.
        """
        x, weight, bias, mask, past, added, shared, *_ = [*node.input, *[""] * 7]
        has_cache = past or shared or len([name for name in node.output if name]) > 1
        if has_cache or attributes.get("do_rotary", 0) or weight not in self._constants:
            return None
        names = self._names(node, "product", "projected", "query", "key", "value", "sizes")
        if not names or (mask and mask not in self._lengths and self._ranks.get(mask) != 2):
            return None
        width = self._constants[weight].dims[1]
        sizes = self._constant(names["sizes"], np.array(attributes.get("qkv_hidden_sizes", [width // 3] * 3), np.int64))
        parts, value = [helper.make_node("MatMul", [x, weight], [names["product"]], node.name)], names["product"]
        if bias:
            parts.append(helper.make_node("Add", [value, bias], [names["projected"]], f"{node.name}_Add"))
            value = names["projected"]
        heads = [names[key] for key in ("query", "key", "value")]
        own = {name: value for name, value in attributes.items() if name in _OF_HEADS}
        given = _without_end([*heads, "", mask, added])
        return [
            *parts,
            helper.make_node("Split", [value, sizes], heads, f"{node.name}_Split", axis=2),
            helper.make_node("MultiHeadAttention", given, node.output[:1], f"{node.name}_MultiHeadAttention", domain=_FUSED, **own),
        ]

    def _embedded(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Parts | None:
        """Word, position and segment embeddings, their sum, normalized, and the lengths that are in a mask."""
        ids, segments, words, places, kinds, scale, shift, mask, at, *_ = [*node.input, *[""] * 9]
        output, lengths, total, *_ = [*node.output, "", ""]
        counts = lengths in self._read
        if bool(segments) != bool(kinds) or (counts and not (mask and attributes.get("mask_index_type", 1))):
            return None
        keys = ("words", "shape", "length", "zero", "one", "positions", "placed", "segments", "first", "sum", "axes", "count")
        names = self._names(node, *keys)
        if not names:
            return None
        total, parts = total or names["sum"], Parts()

        def make(kind: str, given: Sequence[str], made: str, **own: Any) -> str:
            parts.append(helper.make_node(kind, given, [made], f"{node.name}_{len(parts)}", **own))
            return made

        if not at:
            zero, one = (self._constant(names[key], np.array(value, np.int64)) for value, key in enumerate(("zero", "one")))
            length = make("Gather", [make("Shape", [ids], names["shape"]), one], names["length"])
            at = make("Range", [zero, length, one], names["positions"])
        looked_up = [make("Gather", [words, ids], names["words"]), make("Gather", [places, at], names["placed"])]
        make("Add", looked_up, names["first"] if segments else total)
        if segments:
            make("Add", [names["first"], make("Gather", [kinds, segments], names["segments"])], total)
        make("LayerNormalization", [total, scale, shift], output, epsilon=attributes.get("epsilon", 1e-12), axis=-1)
        if counts:
            axes = self._constant(names["axes"], np.array([1], np.int64))
            make("Cast", [make("ReduceSum", [mask, axes], names["count"], keepdims=0)], lengths, to=TensorProto.INT32)
        return parts

    def _names(self, node: onnx.NodeProto, *endings: str) -> dict[str, str]:
        """Names around that of the node's result, by their endings; none where one of them is taken."""
        names = {ending: f"{node.output[0]}_{ending}" for ending in endings}
        if not self._taken.isdisjoint(names.values()):
            return {}
        self._taken.update(names.values())
        return names

    def _constant(self, name: str, array: np.ndarray) -> str:
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name


def _without_end(inputs: list[str]) -> list[str]:
    """Inputs without the absent ones at their end."""
    while inputs and not inputs[-1]:
        inputs = inputs[:-1]
    return inputs
