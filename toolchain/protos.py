"""Walks over the protobufs of a graph, through the subgraphs that control flow holds in attributes."""

import math
from collections import Counter
from collections.abc import Sequence

import onnx
from onnx import TensorProto

from . import large


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs that a control-flow node holds in its attributes."""
    return [graph for a in node.attribute for graph in [*a.graphs, *([a.g] if a.HasField("g") else [])]]


def referenced(graph: onnx.GraphProto) -> list[str]:
    """All value names that nodes read, those in subgraphs (If, Loop, Scan) included."""
    names: list[str] = []
    for node in graph.node:
        names.extend(node.input)
        for subgraph in subgraphs(node):
            names.extend(referenced(subgraph))
    return names


def read_counts(graph: onnx.GraphProto) -> Counter[str]:
    """How often each value is read: by nodes, in subgraphs too, and as an output of the graph."""
    return Counter([*referenced(graph), *(output.name for output in graph.output)])


def rename_values(graph: onnx.GraphProto, names: dict[str, str], outputs: bool) -> None:
    """Let nodes read a value under another name, and (outputs) make it under that name too."""
    for node in graph.node:
        for index, value in enumerate(node.input):
            node.input[index] = names.get(value, value)
        if outputs:
            for index, value in enumerate(node.output):
                node.output[index] = names.get(value, value)
        for subgraph in subgraphs(node):
            own = value_names(subgraph)
            rename_values(subgraph, {old: new for old, new in names.items() if old not in own}, outputs=False)
            for output in subgraph.output:
                if output.name not in own:
                    output.name = names.get(output.name, output.name)


def inferred_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """What is known of the shapes of a model's values, 0 for an axis that is not."""
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in large.inferred_values(model)}


def value_names(graph: onnx.GraphProto) -> set[str]:
    """The names of all values of a graph, but those of its subgraphs."""
    given = {value.name for value in (*graph.input, *graph.initializer)}
    return given | {value for node in graph.node for value in node.output}


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """What a file says of itself, by key."""
    return {entry.key: entry.value for entry in model.metadata_props}


def defined(graph: onnx.GraphProto) -> Counter[str]:
    """How often each name stands for a value, in a graph and in those inside it: as an input, a constant or the result of a node."""
    found = Counter(value.name for value in (*graph.input, *graph.initializer))
    for node in graph.node:
        found.update(value for value in node.output if value)
        for subgraph in subgraphs(node):
            found += defined(subgraph)
    return found


def number_in(tensor: onnx.TensorProto | None) -> float | None:
    """The number that a float32 constant of one element is, if it leaves what it is added to or multiplied with its shape."""
    if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) > 1 or math.prod(tensor.dims) != 1:
        return None
    return float(large.array(tensor).reshape(()))


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put other nodes in the place of all; some of them may be the graph's own."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
