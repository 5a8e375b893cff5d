"""Blocks: the smallest pieces of the graph that are reconstructed on their own (the paper's "modules").

A cut is a place in the execution order where exactly one computed value is alive: it dominates everything that follows. Between two
neighbouring cuts lies an atom, which is either one node or a region of parallel paths. Where a region is larger than any that published
architectures repeat (U-Net, FPN, dense connections: a skip is alive throughout), it is cut again where the fewest values are alive, and so
on.
The rules of block reconstruction (BRECQ; MQBench advanced PTQ) in terms of atoms, with no look at names or architectures:

1. a region whose paths meet in a sum or a concatenation (a residual region) is one block;
2. elsewhere up to `MAX_CHAIN` consecutive weighted layers form a block, ending where a residual region starts;
3. what has no weights joins a neighbour: element-wise nodes, gates (regions that meet in a product: squeeze-excite, swish), max pooling and
   Softmax (masked scores would be all of a loss) belong to the layer before them, everything else (pooling to a vector, reshapes) to the
   layer after them;
4. what follows the last layer and is more than its activation (softmax, arg max, box decoding) is a block without weights, so that
   reconstruction sees the logits.

Nodes that torch cannot run are islands, blocks of their own around which everything is cut, whatever is alive there.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

from .errors import UsageError, near_misses
from .graph import Graph, Node, boundary

MAX_CHAIN = 3
MAX_REGION = 10  # weighted layers of a region that is left whole: Inception-v3's largest module has as many
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
_JOINS_PREVIOUS = _ELEMENTWISE | {"MaxPool", "Softmax"}
_TELLS_NO_NUMBERS = frozenset({"Shape", "Size"})
# What may follow the last weighted layer and still belong to it.
_TAIL = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "Add", "BatchNormalization"})


@dataclass(frozen=True)
class Block:
    """A contiguous piece of the graph.

    `inputs` and `outputs` are the values that cross its boundary, `weighted` the names of its nodes that carry weights, `is_residual`
    tells a region with a shortcut from a chain of layers, `is_island` nodes that ONNX Runtime executes (their weights do not count). A
    merge of neighbouring blocks is again a Block, named `first+second`.
    """

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weighted: tuple[str, ...]
    is_residual: bool
    is_island: bool = False

    @cached_property
    def values(self) -> tuple[str, ...]:
        """What it reads of others and makes itself."""
        return (*self.inputs, *(name for node in self.nodes for name in node.outputs if name))

    @cached_property
    def learned_outputs(self) -> tuple[str, ...]:
        """The outputs that its weights have an influence on: what reconstruction compares."""
        reached: set[str] = set()
        for node in self.nodes:
            if node.name in self.weighted or (node.op_type not in _TELLS_NO_NUMBERS and not reached.isdisjoint(node.inputs)):
                reached.update(node.outputs)
        return tuple(value for value in self.outputs if value in reached)


@dataclass
class _Piece:
    """A block in the making."""

    nodes: list[Node]
    is_residual: bool = False
    is_island: bool = False


@dataclass(frozen=True)
class _Atom:
    nodes: tuple[Node, ...]
    layers: int
    is_residual: bool
    joins_previous: bool


@dataclass(frozen=True)
class Rules:
    """What of a model decides where it may be cut.

    Attributes:
        batched: the float values whose first axis is the sample axis; what else depends on the samples does not cross a boundary that
            could be elsewhere.
        free: values that cross for nothing: shapes, indices, masks that all samples share.
        islands: names of the nodes that torch cannot run.
        boundaries: values after which a block must end.
    """

    batched: AbstractSet[str]
    free: AbstractSet[str] = frozenset()
    islands: AbstractSet[str] = frozenset()
    boundaries: Sequence[str] = ()


def partition(graph: Graph, rules: Rules) -> tuple[Block, ...]:
    """Partition a graph, whose nodes are in the order of `graph.schedule`, into blocks.

    Every node is in exactly one, and running them in order is running the graph.

    Raises:
        UsageError: a boundary that is no computed value.
    """
    pieces: list[_Piece] = []
    for start, end in itertools.pairwise(_sections(graph, rules)):
        if graph.nodes[start].name in rules.islands:
            pieces.append(_Piece(list(graph.nodes[start:end]), is_island=True))
        else:
            pieces += _chained(_atoms(graph, start, end, rules))
    return _blocks(graph, "b", _split_tail(graph, pieces))


def layers(graph: Graph, rules: Rules) -> tuple[Block, ...]:
    """Partition into single weighted layers, each with what follows it up to the next one (the granularity of AdaRound)."""
    pieces: list[_Piece] = []
    for start, end in itertools.pairwise(_sections(graph, rules)):
        if graph.nodes[start].name in rules.islands:
            pieces.append(_Piece(list(graph.nodes[start:end]), is_island=True))
            continue
        starts = [i for i in range(start, end) if graph.weight(graph.nodes[i]) is not None]
        pieces += [_Piece(list(graph.nodes[a:b])) for a, b in itertools.pairwise([start, *starts[1:], end])]
    return _blocks(graph, "l", _split_tail(graph, pieces))


def merge(graph: Graph, blocks: Sequence[Block]) -> Block:
    """The block of neighbouring blocks, with the boundary of the whole. Associative."""
    if len(blocks) == 1:
        return blocks[0]
    nodes = [node for block in blocks for node in block.nodes]
    residual, island = any(block.is_residual for block in blocks), any(block.is_island for block in blocks)
    return _block(graph, "+".join(block.name for block in blocks), _Piece(nodes, residual, island))


def _blocks(graph: Graph, prefix: str, pieces: Sequence[_Piece]) -> tuple[Block, ...]:
    return tuple(_block(graph, f"{prefix}{i:02d}", piece) for i, piece in enumerate(pieces))


def _block(graph: Graph, name: str, piece: _Piece) -> Block:
    inputs, outputs = boundary(graph, piece.nodes)
    weighted = () if piece.is_island else tuple(node.name for node in piece.nodes if graph.weight(node) is not None)
    return Block(name, tuple(piece.nodes), inputs, outputs, weighted, piece.is_residual, piece.is_island)


def _sections(graph: Graph, rules: Rules) -> list[int]:
    """The positions where the graph is cut whatever is alive: both sides of islands, and behind the boundaries asked for."""
    position = {value: i + 1 for i, node in enumerate(graph.nodes) for value in node.outputs if value}
    unknown = next((value for value in rules.boundaries if value not in position), None)
    if unknown is not None:
        raise UsageError(f"--boundary {unknown!r}: is no value that a node of the model computes{near_misses(unknown, position)}")
    inside = [node.name in rules.islands for node in graph.nodes]
    changes = {i for i in range(1, len(inside)) if inside[i] != inside[i - 1]}
    return sorted({0, len(graph.nodes)} | changes | {position[value] for value in rules.boundaries})


def _chained(atoms: Iterable[_Atom]) -> list[_Piece]:
    """Join the atoms of a section into blocks by rules 1 to 3."""
    pieces: list[_Piece] = []
    layers = 0  # weighted layers in the last piece, when it is a chain
    waiting: list[Node] = []  # nodes without weights that wait for the layer after them
    for atom in atoms:
        if atom.is_residual:
            pieces.append(_Piece([*waiting, *atom.nodes], is_residual=True))
            waiting = []
        elif atom.layers == 0:
            if pieces and not waiting and atom.joins_previous:
                pieces[-1].nodes.extend(atom.nodes)
            else:
                waiting.extend(atom.nodes)
        elif pieces and not pieces[-1].is_residual and layers + atom.layers <= MAX_CHAIN:
            pieces[-1].nodes.extend([*waiting, *atom.nodes])
            layers, waiting = layers + atom.layers, []
        else:
            pieces.append(_Piece([*waiting, *atom.nodes]))
            layers, waiting = atom.layers, []
    if waiting:
        pieces.append(_Piece(waiting))
    return pieces


def _atoms(graph: Graph, start: int, end: int, rules: Rules) -> Iterator[_Atom]:
    edges = [start, *(position for position, values in _alive(graph, start, end, rules).items() if len(values) <= 1), end]
    for low, high in itertools.pairwise(edges):
        for a, b in _divided(graph, low, high, rules):
            nodes = graph.nodes[a:b]
            yield _atom(nodes, sum(graph.weight(node) is not None for node in nodes))


def _divided(graph: Graph, start: int, end: int, rules: Rules) -> Iterator[tuple[int, int]]:
    """A region, or the regions that it falls into when cut where few values are alive.

    It is cut where it is too large, and where two or more of those are residual regions themselves: then what kept it together only passes
    by (the attention mask of a transformer, the skip of a U-Net around residual blocks).
    """
    pending = [(start, end)]
    while pending:
        low, high = pending.pop()
        weighted = sum(graph.weight(node) is not None for node in graph.nodes[low:high])
        alive = _alive(graph, low, high, rules) if weighted > 1 else {}
        if not alive and weighted > MAX_REGION:
            alive = _alive(graph, low, high, rules, anything=True)
        parts = list(itertools.pairwise([low, *_cuts(alive), high]))
        if len(parts) > 1 and (weighted > MAX_REGION or sum(_has_shortcut(graph, a, b) for a, b in parts) > 1):
            pending.extend(reversed(parts))
        else:
            yield low, high


def _cuts(alive: Mapping[int, AbstractSet[str]]) -> list[int]:
    """The positions where the fewest values are alive and the one that lives longest of all those is among them: it passes by."""
    fewest = min(map(len, alive.values()), default=0)
    narrow = {position: values for position, values in alive.items() if len(values) == fewest}
    lives = Counter(value for values in alive.values() for value in values)
    longest = max({v for values in narrow.values() for v in values}, key=lambda value: (lives[value], value), default=None)
    return [position for position, values in narrow.items() if longest is None or longest in values]


def _has_shortcut(graph: Graph, start: int, end: int) -> bool:
    """Whether a region with weights ends where two of its paths meet."""
    last = graph.nodes[end - 1]
    is_merge = end - start > 1 and last.op_type in _MERGES and len(graph.data_inputs(last)) > 1
    return is_merge and any(graph.weight(node) is not None for node in graph.nodes[start:end])


def _alive(graph: Graph, start: int, end: int, rules: Rules, anything: bool = False) -> dict[int, AbstractSet[str]]:
    """The values that would cross a cut at each position inside a range where one is allowed.

    Values that are alive at both ends of the range pass it by, and graph inputs and free values cross for nothing. `anything` allows cuts
    through values that are no arrays of samples too.
    """
    ignored = (graph.alive[start] & graph.alive[end]) | set(graph.inputs) | rules.free
    crossing = {position: graph.alive[position] - ignored for position in range(start + 1, end)}
    return {position: values for position, values in crossing.items() if anything or values <= rules.batched}


def _atom(nodes: tuple[Node, ...], weighted: int) -> _Atom:
    merges = [node.op_type for node in nodes if node.op_type in _MERGES or node.op_type == "Mul"]
    # A gate acts like an activation of the layer before it: its small layers do not fill the chain.
    is_gate = len(nodes) > 1 and bool(merges) and merges[-1] == "Mul"
    is_residual = len(nodes) > 1 and weighted > 0 and not is_gate
    joins_previous = (is_gate and weighted > 0) or all(node.op_type in _JOINS_PREVIOUS for node in nodes)
    return _Atom(nodes, 0 if is_gate else weighted, is_residual, joins_previous)


def _split_tail(graph: Graph, pieces: list[_Piece]) -> list[_Piece]:
    """Move what follows the last weighted layer and its activation into a piece of its own."""
    weighted = [any(graph.weight(node) for node in piece.nodes) and not piece.is_island for piece in pieces]
    last = max((i for i, has_weights in enumerate(weighted) if has_weights), default=None)
    if last is None or pieces[last].is_residual:
        return pieces
    nodes, rest = pieces[last].nodes, pieces[last + 1 :]
    end = 1 + max(i for i, node in enumerate(nodes) if graph.weight(node))
    while end < len(nodes) and nodes[end].op_type in _TAIL:
        end += 1
    tail = _Piece(nodes[end:])
    while rest and not rest[0].is_island:
        tail.nodes.extend(rest.pop(0).nodes)
    return [*pieces[:last], _Piece(nodes[:end]), *([tail] if tail.nodes else []), *rest]
