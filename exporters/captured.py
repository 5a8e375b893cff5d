"""Values that branches and loops capture."""

from collections.abc import Iterator
from dataclasses import replace

import onnx

from toolchain.flow import DATA_MOVEMENT
from toolchain.graph import ONNX_DOMAINS
from toolchain.protos import subgraphs
from toolchain.quant_table import QuantTable, TensorQuant


def with_captured(graph: onnx.GraphProto, table: QuantTable) -> QuantTable:
    """The table with the grids of rearranged values that subgraphs alone read, which are those of what is rearranged.

    ONNX Runtime (1.31.1) hands a DequantizeLinear on through what only moves its result, up to the next reader; where that is a subgraph,
    it takes the reader for an input of the node that holds it and aborts the process. Behind a pair of its own there is nothing to hand on.
    """
    read = {value for node in graph.node for value in node.input} | {output.name for output in graph.output}
    captured = {value for node in graph.node for inner in subgraphs(node) for value in _captured(inner)} - read
    moved: dict[str, TensorQuant] = {}
    for node in graph.node:
        origin = node.input[0] if node.input else ""
        grid = moved.get(origin) or table.tensors.get(origin)
        if grid is None or grid.codes is not None or node.op_type not in DATA_MOVEMENT or node.domain not in ONNX_DOMAINS:
            continue
        tied = replace(grid, tied_to=grid.tied_to or origin, copy=None)
        moved |= {value: tied for value in node.output if value and value not in table}
    return table.updated({value: grid for value, grid in moved.items() if value in captured})


def _captured(graph: onnx.GraphProto) -> Iterator[str]:
    """What a subgraph reads of the graphs around it."""
    own = {value for node in graph.node for value in node.output} | {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        yield from (value for value in node.input if value not in own)
        for inner in subgraphs(node):
            yield from (value for value in _captured(inner) if value not in own)
    yield from (output.name for output in graph.output if output.name not in own)
