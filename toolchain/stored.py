"""Weights that no integer kernel computes with, but that a file may hold as integers all the same.

Tables that are looked up (embeddings), the weights of recurrent layers, weights on the left of a product, and what the bodies of control
flow (If, Loop, Scan) multiply with are most of some models. Their operators run in float; the weights are kept as codes and dequantized
where they are read: a table behind the lookup, so that only the rows that were asked for are dequantized, everything else in front of its
reader.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from .graph import ONNX_DOMAINS, WEIGHT_INPUT, Graph, channel_axis, free_name
from .protos import defined, rename_values, subgraphs, value_names

CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
# Operators that ONNX Runtime's own optimiser makes: where their weight is.
_FUSED_WEIGHT = {"Attention": 1, "FusedMatMul": 1, "FusedGemm": 1, "FusedConv": 1}
_SMALLEST = 1024  # numbers: scales and names of fewer eat up what their codes save
_COMPUTED = -1  # no channel axis: the reader does something with the value that codes are not good for


@dataclass(frozen=True)
class Read:
    """A node that reads a constant at an input position; `outer` is the node of the main graph that it is, or that holds it."""

    node: onnx.NodeProto
    index: int
    outer: str
    is_inside: bool

    @property
    def looks_up(self) -> bool:
        """Whether it takes whole slices of the constant by their index."""
        return self.node.op_type == "Gather" and self.node.domain in ONNX_DOMAINS and self.index == 0


@dataclass(frozen=True)
class StoredWeight:
    """A constant that only readers of this kind have.

    `nodes` are the nodes of the main graph that read it, or hold a reader, `operators` the types of the readers. `axis` is its channel axis
    (None: one scale for the tensor), `is_table` says that it is only looked up.
    """

    nodes: tuple[str, ...]
    operators: tuple[str, ...]
    axis: int | None
    is_table: bool


def find_stored(model: onnx.ModelProto, graph: Graph) -> Mapping[str, StoredWeight]:
    """The constants of a model that may be stored as codes though no weighted node of its main graph reads them, in order of first use."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    found: dict[str, StoredWeight] = {}
    for name, readers in reads(model.graph).items():
        tensor = tensors.get(name)
        if tensor is None or name in outputs or tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < _SMALLEST:
            continue
        axes = [_axis(read, len(tensor.dims)) for read in readers]
        if any(axis == _COMPUTED for axis in axes) or len({read.looks_up for read in readers}) > 1:
            continue
        nodes, operators = (tuple(dict.fromkeys(words)) for words in zip(*((r.outer, r.node.op_type) for r in readers), strict=True))
        axis = axes[0] if len(set(axes)) == 1 else None
        found[name] = StoredWeight(nodes, operators, axis, readers[0].looks_up)
    return found


def reads(graph: onnx.GraphProto) -> dict[str, list[Read]]:
    """Who reads each value, in this graph and in the subgraphs of its nodes; a subgraph that gives a value back reads it too."""
    found: dict[str, list[Read]] = {}
    for node in graph.node:
        for name, read in _reads_of(node, node.name, is_inside=False):
            found.setdefault(name, []).append(read)
    return found


def lift_weights(graph: onnx.GraphProto) -> None:
    """Move the weights that the subgraphs of control flow hold into the main graph, from where they are captured, each under its own name.

    Only what may be stored as codes is moved; a body that a Loop runs many times then shares what is dequantized once.
    """
    taken = value_names(graph) | {name for name, count in defined(graph).items() if count > 1}  # branches may use the same names
    for node in graph.node:
        for subgraph in subgraphs(node):
            _lift(subgraph, graph, taken, node.name)


def _axis(read: Read, rank: int) -> int | None:
    node, index = read.node, read.index
    attributes = {a.name: a.i for a in node.attribute}
    if node.domain == "com.microsoft" and _FUSED_WEIGHT.get(node.op_type) == index and rank > 1:
        kind = node.op_type.removeprefix("Fused")
        return rank - 2 if kind == "MatMul" and attributes.get("transB", 0) else channel_axis(kind, rank, bool(attributes.get("transB", 0)))
    if node.domain not in ONNX_DOMAINS:
        return _COMPUTED
    if read.looks_up:
        axis = attributes.get("axis", 0) % max(rank, 1)
        return rank - 1 if axis != rank - 1 else None  # the last axis is the last one of what is looked up, too
    if node.op_type in RECURRENT and index in (1, 2):
        return 1  # [directions, gates * hidden, ...]
    if node.op_type == "Einsum" and rank > 1:
        return rank - 1
    if node.op_type in ("MatMul", "Gemm") and index == 0 and rank > 1:  # a weight on the left: its rows are the channels
        return rank - 1 if attributes.get("transA", 0) else rank - 2
    if read.is_inside and WEIGHT_INPUT.get(node.op_type) == index and rank > 1:
        return channel_axis(node.op_type, rank, bool(attributes.get("transB", 0)))
    return _COMPUTED


def _reads_of(node: onnx.NodeProto, outer: str, is_inside: bool) -> Iterator[tuple[str, Read]]:
    for index, name in enumerate(node.input):
        if name:
            yield name, Read(node, index, outer, is_inside)
    for subgraph in subgraphs(node):
        own = {value.name for value in subgraph.input} | {tensor.name for tensor in subgraph.initializer}
        own |= {value for inner in subgraph.node for value in inner.output}
        for inner in subgraph.node:
            yield from ((name, read) for name, read in _reads_of(inner, outer, is_inside=True) if name not in own)
        for position, output in enumerate(subgraph.output):
            if output.name not in own:
                yield output.name, Read(node, -1 - position, outer, is_inside=True)


def _lift(subgraph: onnx.GraphProto, top: onnx.GraphProto, taken: set[str], outer: str) -> None:
    readers, outputs = reads(subgraph), {output.name for output in subgraph.output}
    for tensor in list(subgraph.initializer):
        size = int(np.prod(tensor.dims))
        inside = [Read(read.node, read.index, outer, is_inside=True) for read in readers.get(tensor.name, [])]
        if tensor.data_type != TensorProto.FLOAT or size < _SMALLEST or tensor.name in outputs or not inside:
            continue
        if any(_axis(read, len(tensor.dims)) == _COMPUTED for read in inside):
            continue
        old, name = tensor.name, free_name(tensor.name, taken)
        lifted = top.initializer.add()
        lifted.CopyFrom(tensor)
        lifted.name = name
        subgraph.initializer.remove(tensor)
        if name != old:
            rename_values(subgraph, {old: name}, outputs=False)
    for node in subgraph.node:
        for inner in subgraphs(node):
            _lift(inner, top, taken, outer)
