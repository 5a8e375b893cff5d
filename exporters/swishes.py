"""Hard swish as OpenVINO knows it, and back: x clip(x + 3, 0, 6) / 6.

Of HardSigmoid and Mul it fuses nothing: a detector with 94 of them took 90 ms in place of 24.
"""

from collections.abc import Callable, Container, Iterable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from toolchain.graph import free_name

from .walks import all_nodes, reads, replace_nodes, subgraphs, value_names

_NUMBERS = {"three": 3.0, "zero": 0.0, "six": 6.0}


def spell_out(graph: onnx.GraphProto, quantized: Container[str]) -> None:
    """Write a value times its own HardSigmoid of 1/6 and 1/2, with nothing of it on a grid, as four nodes; in place.

    Args:
        graph: the graph.
        quantized: the values on grids.
    """
    swishes = {gate.output[0]: (gate, product) for gate, product in _swishes(graph) if gate.output[0] not in quantized}
    if not swishes:
        return
    taken = value_names(graph).union(node.name for node in graph.node)
    names = {key: free_name(f"hard_swish_{key}", taken) for key in _NUMBERS}
    graph.initializer.extend(numpy_helper.from_array(np.array(number, np.float32), names[key]) for key, number in _NUMBERS.items())
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output and node.output[0] in swishes:
            continue
        gate, _ = next((pair for pair in swishes.values() if pair[1] is node), (None, None))
        if gate is None:
            nodes.append(node)
            continue
        x, result = gate.input[0], node.output[0]
        shifted, clipped, product = (free_name(f"{result}_{key}", taken) for key in ("shifted", "gate", "product"))
        nodes += [
            helper.make_node("Add", [x, names["three"]], [shifted], free_name(f"{gate.name}_shifted", taken)),
            helper.make_node("Clip", [shifted, names["zero"], names["six"]], [clipped], gate.name),
            helper.make_node("Mul", [x, clipped], [product], node.name),
            helper.make_node("Div", [product, names["six"]], [result], free_name(f"{node.name}_divided", taken)),
        ]
    replace_nodes(graph, nodes)


def join(source: onnx.GraphProto, graph: onnx.GraphProto, origin: Callable[[str], str]) -> bool:
    """Write what `spell_out` made of a source's hard swishes as they are there, in place; whether there were any.

    Args:
        source: the graph that has them as HardSigmoid and Mul.
        graph: the one to change.
        origin: which value of the source a value of the graph carries.
    """
    producer = {value: node for node in graph.node for value in node.output}
    numbers = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if not tensor.dims}
    joined: dict[int, tuple[onnx.NodeProto, onnx.NodeProto]] = {}
    gone: set[int] = set()
    for gate, product in _swishes(source):
        chain = _chain(producer.get(product.output[0]), producer, numbers)
        if chain and gate.output[0] not in producer and origin(chain[-1].input[0]) == gate.input[0]:
            parts = onnx.NodeProto(), onnx.NodeProto()
            for part, node in zip(parts, (gate, product), strict=True):
                part.CopyFrom(node)
                part.input[:] = [chain[-1].input[0] if value == gate.input[0] else value for value in node.input]
            joined[id(chain[0])] = parts
            gone.update(map(id, chain))
    if not joined:
        return False
    nodes = [part for node in graph.node for part in joined.get(id(node), () if id(node) in gone else (node,))]
    replace_nodes(graph, nodes)
    return True


def _swishes(graph: onnx.GraphProto) -> Iterable[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Each HardSigmoid of 1/6 and 1/2 with the Mul that alone reads it, and its operand."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in reads([node]):
            readers.setdefault(value, []).append(node)
    outputs = {output.name for output in graph.output}
    outputs.update(output.name for node in all_nodes(graph.node) for inner in subgraphs(node) for output in inner.output)
    for gate in graph.node:
        if gate.op_type != "HardSigmoid" or gate.domain not in ("", "ai.onnx") or gate.output[0] in outputs:
            continue
        numbers = {attribute.name: attribute.f for attribute in gate.attribute}
        if not np.allclose((numbers.get("alpha", 0.2), numbers.get("beta", 0.5)), (1 / 6, 0.5), atol=1e-6):
            continue
        found = readers.get(gate.output[0], [])
        if len(found) == 1 and found[0].op_type == "Mul" and sorted(found[0].input) == sorted([gate.input[0], gate.output[0]]):
            yield gate, found[0]


def _chain(last: onnx.NodeProto | None, producer: Mapping[str, onnx.NodeProto], numbers: Mapping[str, np.ndarray]) -> list[onnx.NodeProto]:
    """Div, Mul, Clip and Add of `spell_out`, the last first; empty where a node is something else."""
    nodes: list[onnx.NodeProto] = []
    for kind, place, constants in (("Div", 0, [6.0]), ("Mul", 1, []), ("Clip", 0, [0.0, 6.0]), ("Add", 0, [3.0])):
        if last is None or last.op_type != kind or [float(numbers[name]) for name in last.input if name in numbers] != constants:
            return []
        nodes.append(last)
        last = producer.get(last.input[place])
    return nodes
