"""Walks over the nodes of a graph and of the graphs inside it, and other nodes in their place."""

from collections.abc import Iterable, Iterator

import onnx


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs that a control-flow node holds in its attributes."""
    return [graph for a in node.attribute for graph in [*a.graphs, *([a.g] if a.HasField("g") else [])]]


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those in their subgraphs."""
    for node in nodes:
        yield node
        for subgraph in subgraphs(node):
            yield from all_nodes(subgraph.node)


def reads(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """The names that nodes read, and those in their subgraphs."""
    for node in all_nodes(nodes):
        yield from node.input


def value_names(graph: onnx.GraphProto) -> set[str]:
    """The names of all values of a graph, and of what its subgraphs have."""
    found = {value.name for value in (*graph.input, *graph.initializer)}
    for node in all_nodes(graph.node):
        found.update(node.output)
        for inner in subgraphs(node):
            found.update(value.name for value in (*inner.input, *inner.initializer))
    return found


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Put other nodes in the place of all; some of them may be the graph's own."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
