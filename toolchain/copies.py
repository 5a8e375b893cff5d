"""Operands of their own: a value that sums read in more bits than layers do is copied for the layers, so that the copy has its own grid.

In a residual network the shortcut carries what all blocks before it made; on the 4-bit grid of the layer beside it, it would be rounded to
4 bits again in every block. The copy is an Identity node in the graph that is learned on; the exported file has a second quantizer.
"""

from collections.abc import Iterator, Mapping

import onnx
from onnx import helper

from .protos import replace_nodes
from .quant_table import Copy


def insert_copies(graph: onnx.GraphProto, copies: Mapping[str, Copy]) -> None:
    """Put an Identity node in front of the first reader of each copy that there is not yet, and let the readers read it; in place."""
    made = {value for node in graph.node for value in node.output}
    copies = {name: copy for name, copy in copies.items() if name not in made}
    if not copies:
        return
    replace_nodes(graph, list(_inserted(list(graph.node), copies)))


def _inserted(nodes: list[onnx.NodeProto], copies: Mapping[str, Copy]) -> Iterator[onnx.NodeProto]:
    of_reader: dict[str, list[str]] = {}
    for name, copy in copies.items():
        for reader in copy.readers:
            of_reader.setdefault(reader, []).append(name)
    placed: set[str] = set()
    for node in nodes:
        for name in of_reader.get(node.name, []):
            if name not in placed:
                placed.add(name)
                yield helper.make_node("Identity", [copies[name].origin], [name], name)
            node.input[:] = [name if value == copies[name].origin else value for value in node.input]
        yield node
