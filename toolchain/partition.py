"""Blocks: the smallest pieces of the graph that are reconstructed on their own (the paper's "modules").

A cut is a place in the execution order where exactly one computed value is alive: it dominates everything that follows. Between two
neighbouring cuts lies an atom, which is either one node or a region of parallel paths. The rules of block reconstruction (BRECQ; MQBench
advanced PTQ) in terms of atoms, with no look at names or architectures:

1. a region whose paths meet in a sum or a concatenation (a residual region) is one block;
2. elsewhere up to `MAX_CHAIN` consecutive weighted layers form a block, ending where a residual region starts;
3. what has no weights joins a neighbour: element-wise nodes, gates (regions that meet in a product: squeeze-excite, swish) and max pooling
   belong to the layer before them, everything else (pooling to a vector, reshapes) to the layer after them;
4. what follows the last layer and is more than its activation (softmax, arg max, box decoding) is a block without weights, so that
   reconstruction sees the logits.
"""

import itertools
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from .graph import Graph, Node, boundary

MAX_CHAIN = 3
_MERGES = frozenset({"Add", "Sum", "Sub", "Concat", "Max", "Mean"})
_ACTIVATIONS = frozenset(
    {"Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "HardSwish", "HardSigmoid", "Mish", "Gelu", "Softplus", "Sigmoid", "Tanh"}
)
_ELEMENTWISE = _ACTIVATIONS | {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "BatchNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "Dropout",
    "Erf",
}
_JOINS_PREVIOUS = _ELEMENTWISE | {"MaxPool"}
# What may follow the last weighted layer and still belong to it.
_TAIL = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "Add", "BatchNormalization"})


@dataclass(frozen=True)
class Block:
    """A contiguous piece of the graph.

    `inputs` and `outputs` are the values that cross its boundary, `weighted` the names of its nodes that carry weights, `is_residual`
    tells a region with a shortcut from a chain of layers. A merge of neighbouring blocks is again a Block, named `first+second`.
    """

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weighted: tuple[str, ...]
    is_residual: bool


@dataclass(frozen=True)
class _Atom:
    nodes: tuple[Node, ...]
    layers: int
    is_residual: bool
    joins_previous: bool


def partition(graph: Graph, batched: AbstractSet[str]) -> tuple[Block, ...]:
    """Partition a graph into blocks; every node is in exactly one, and running them in order is running the graph.

    Args:
        graph: nodes in the order of `graph.schedule`.
        batched: the float values whose first axis is the sample axis; only these may cross a boundary.
    """
    pieces: list[tuple[list[Node], bool]] = []
    layers = 0  # weighted layers in the last piece, when it is a chain
    waiting: list[Node] = []  # nodes without weights that wait for the layer after them
    for atom in _atoms(graph, batched):
        if atom.is_residual:
            pieces.append(([*waiting, *atom.nodes], True))
            waiting = []
        elif atom.layers == 0:
            if pieces and not waiting and atom.joins_previous:
                pieces[-1][0].extend(atom.nodes)
            else:
                waiting.extend(atom.nodes)
        elif pieces and not pieces[-1][1] and layers + atom.layers <= MAX_CHAIN:
            pieces[-1][0].extend([*waiting, *atom.nodes])
            layers, waiting = layers + atom.layers, []
        else:
            pieces.append(([*waiting, *atom.nodes], False))
            layers, waiting = atom.layers, []
    if waiting:
        pieces.append((waiting, False))
    return tuple(_block(graph, f"b{i:02d}", nodes, residual) for i, (nodes, residual) in enumerate(_split_tail(graph, pieces)))


def layers(graph: Graph) -> tuple[Block, ...]:
    """Partition into single weighted layers, each with what follows it up to the next one (the granularity of AdaRound)."""
    starts = [i for i, node in enumerate(graph.nodes) if graph.weight(node) is not None]
    edges = [0, *starts[1:], len(graph.nodes)]
    pieces = [(list(graph.nodes[a:b]), False) for a, b in itertools.pairwise(edges) if a < b]
    return tuple(_block(graph, f"l{i:02d}", nodes, residual) for i, (nodes, residual) in enumerate(_split_tail(graph, pieces)))


def merge(graph: Graph, blocks: Sequence[Block]) -> Block:
    """The block of neighbouring blocks, with the boundary of the whole. Associative."""
    if len(blocks) == 1:
        return blocks[0]
    nodes = [node for block in blocks for node in block.nodes]
    return _block(graph, "+".join(block.name for block in blocks), nodes, any(block.is_residual for block in blocks))


def _block(graph: Graph, name: str, nodes: Sequence[Node], is_residual: bool) -> Block:
    inputs, outputs = boundary(graph, nodes)
    weighted = tuple(node.name for node in nodes if graph.weight(node) is not None)
    return Block(name, tuple(nodes), inputs, outputs, weighted, is_residual)


def _atoms(graph: Graph, batched: AbstractSet[str]) -> Iterator[_Atom]:
    start = 0
    for end in range(1, len(graph.nodes) + 1):
        if end == len(graph.nodes) or _is_cut(graph, end, batched):
            nodes = graph.nodes[start:end]
            count = sum(graph.weight(node) is not None for node in nodes)
            yield _atom(nodes, count)
            start = end


def _atom(nodes: tuple[Node, ...], weighted: int) -> _Atom:
    merges = [node.op_type for node in nodes if node.op_type in _MERGES or node.op_type == "Mul"]
    # A gate acts like an activation of the layer before it: its small layers do not fill the chain.
    is_gate = len(nodes) > 1 and bool(merges) and merges[-1] == "Mul"
    is_residual = len(nodes) > 1 and weighted > 0 and not is_gate
    joins_previous = (is_gate and weighted > 0) or all(node.op_type in _JOINS_PREVIOUS for node in nodes)
    return _Atom(nodes, 0 if is_gate else weighted, is_residual, joins_previous)


def _is_cut(graph: Graph, position: int, batched: AbstractSet[str]) -> bool:
    alive = graph.alive[position] - set(graph.inputs)
    return len(alive) == 1 and alive <= batched


def _split_tail(graph: Graph, pieces: list[tuple[list[Node], bool]]) -> list[tuple[list[Node], bool]]:
    """Move what follows the last weighted layer and its activation into a piece of its own."""
    last = max((i for i, (nodes, _) in enumerate(pieces) if any(graph.weight(n) for n in nodes)), default=None)
    if last is None or pieces[last][1]:
        return pieces
    nodes = pieces[last][0]
    end = 1 + max(i for i, node in enumerate(nodes) if graph.weight(node))
    while end < len(nodes) and nodes[end].op_type in _TAIL:
        end += 1
    tail = [*nodes[end:], *(node for piece, _ in pieces[last + 1 :] for node in piece)]
    return [*pieces[:last], (nodes[:end], False), *([(tail, False)] if tail else [])]
