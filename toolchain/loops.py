"""Loops as they are best read: what a loop only hands through is no state of it."""

from collections import Counter

import onnx

from .graph import ONNX_DOMAINS
from .protos import read_counts, referenced, rename_values, replace_nodes, subgraphs


def capture_constants(graph: onnx.GraphProto) -> None:
    """Let the bodies of loops capture the constants that they hand from step to step as they are.

    Converters write the weights of recurrent layers so (tf2onnx: states that a body gives back by Identity). As a state a weight is a value
    that anything may become of; captured it is the constant that it is.
    """
    constants = {tensor.name for tensor in graph.initializer}
    read = read_counts(graph)
    for node in graph.node:
        if node.domain not in ONNX_DOMAINS or node.op_type not in ("Loop", "Scan"):
            continue
        (body,) = subgraphs(node)
        _capture(node, body, constants, read)


def _capture(node: onnx.NodeProto, body: onnx.GraphProto, constants: set[str], read: Counter[str]) -> None:
    """A Loop has two inputs before its states, its body two inputs and an output; a Scan has none, and what it scans after them."""
    before, first = (2, 1) if node.op_type == "Loop" else (0, 0)
    scanned = next((a.i for a in node.attribute if a.name == "num_scan_inputs"), 0)
    same = {inner.output[0]: inner.input[0] for inner in body.node if inner.op_type == "Identity"}
    for state in reversed(range(len(node.input) - before - scanned)):
        outer, own = node.input[before + state], body.input[before + state].name
        given = body.output[first + state].name
        while given in same and given != own:
            given = same[given]
        output = node.output[state]
        if outer not in constants or given != own or (output and read[output]):
            continue
        del node.input[before + state], node.output[state], body.input[before + state], body.output[first + state]
        rename_values(body, {own: outer}, outputs=False)
    used = {*referenced(body), *(value.name for value in body.output)}
    replace_nodes(body, [inner for inner in body.node if inner.op_type != "Identity" or inner.output[0] in used])
