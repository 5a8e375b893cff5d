"""Blocks: the published partitions, and the laws of any partition."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import zoo
from toolchain.graph import Graph, Node, boundary, last_reads, schedule
from toolchain.partition import MAX_CHAIN, MAX_REGION, Block, Rules, layers, merge, partition
from toolchain.source import infer_types


def blocks_of(model: onnx.ModelProto, folder: Path) -> tuple[Block, ...]:
    source = zoo.loaded(model, folder)
    types = infer_types(source, {spec.name: tuple(int(d or 0) for d in spec.shape[1:]) for spec in source.inputs})
    return partition(source.graph, Rules(types.batched, types.shared))


@pytest.mark.parametrize(
    ("model", "count", "residual"),
    [
        (zoo.resnet([2, 2, 2, 2]), 10, 8),  # ResNet-18
        (zoo.resnet([3, 4, 6, 3], bottleneck=True), 18, 16),  # ResNet-50
        (zoo.mobilenet_v2(0.35), 18, 10),
        (zoo.resnet([1, 3, 5, 7], bottleneck=True, groups=4), 18, 16),  # RegNetX-600M
    ],
    ids=["resnet18", "resnet50", "mobilenetv2", "regnetx600m"],
)
def test_published_partitions(model: onnx.ModelProto, count: int, residual: int, tmp_path: Path) -> None:
    blocks = blocks_of(model, tmp_path)
    assert len(blocks) == count
    assert sum(block.is_residual for block in blocks) == residual


def test_mobilenet_blocks_are_those_of_the_paper(tmp_path: Path) -> None:
    blocks = blocks_of(zoo.mobilenet_v2(0.35), tmp_path)
    assert [len(block.weighted) for block in blocks] == [3] * 17 + [2]  # {stem, f1} | f2 .. f17 | {f18, classifier}
    assert [node.op_type for node in blocks[-1].nodes] == ["Conv", "Clip", "GlobalAveragePool", "Flatten", "Gemm"]


def test_stem_takes_its_max_pooling_and_the_head_its_average_pooling(tmp_path: Path) -> None:
    blocks = blocks_of(zoo.resnet([2, 2, 2, 2]), tmp_path)
    assert [node.op_type for node in blocks[0].nodes] == ["Conv", "Relu", "MaxPool"]
    assert [node.op_type for node in blocks[-1].nodes] == ["GlobalAveragePool", "Flatten", "Gemm"]


def test_softmax_belongs_to_the_scores_before_it(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 8]})
    x = "x"
    for _ in range(MAX_CHAIN):
        x = b.linear(x, 8, 8)
    blocks = blocks_of(b.model(b.linear(b.op("Softmax", x), 8, 8)), tmp_path)
    assert [node.op_type for block in blocks for node in block.nodes[-1:]] == ["Softmax", "Gemm"]


def test_a_shape_tells_nothing_of_weights() -> None:
    """A mask that is as long as a layer's result is no result of the layer."""
    nodes = (
        Node("layer", "Gemm", ("x", "w"), ("y",)),
        Node("relu", "Relu", ("y",), ("z",)),
        Node("shape", "Shape", ("y",), ("s",)),
        Node("mask", "ConstantOfShape", ("s",), ("m",)),
    )
    block = Block("b", nodes, ("x",), ("z", "m"), ("layer",), is_residual=False)
    assert block.learned_outputs == ("z",)


def test_squeeze_excite_and_swish_act_like_activations(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8)
    for _ in range(2):
        y = b.conv(x, 8, 16, 1)
        y = b.op("Mul", y, b.op("Sigmoid", y))
        y = b.conv(y, 16, 16, 3, group=16)
        gate = b.conv(b.conv(b.op("GlobalAveragePool", y), 16, 4, 1, act="relu"), 4, 16, 1, act="sigmoid")
        x = b.conv(b.op("Mul", y, gate), 16, 12, 1)
        x = b.conv(x, 12, 8, 1)
    blocks = blocks_of(b.model(b.head(x, 8)), tmp_path)
    # The gate's two layers stay with the depthwise layer they scale, and do not count towards the three of a chain.
    assert [len(block.weighted) for block in blocks] == [5, 3, 5, 1]


def test_softmax_is_left_to_a_block_without_weights(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    logits = b.head(b.conv("x", 3, 8, act="relu"), 8)
    blocks = blocks_of(b.model(b.op("Softmax", logits)), tmp_path)
    assert [len(block.weighted) for block in blocks] == [2, 0]
    assert blocks[0].outputs == (logits,)


def test_layers_have_one_weight_each(tmp_path: Path) -> None:
    source = zoo.loaded(zoo.tiny_resnet(), tmp_path)
    pieces = layers(source.graph, Rules(frozenset()))
    assert [len(piece.weighted) for piece in pieces] == [1] * len(source.graph.weighted)
    assert [node for piece in pieces for node in piece.nodes] == list(source.graph.nodes)


@st.composite
def graphs(draw: st.DrawFn, most: int = 14, kinds: Sequence[str] = ("Conv", "Relu", "Add", "Mul", "GlobalAveragePool", "Concat")) -> Graph:
    """Random DAGs of weighted and element-wise nodes; every dangling value is a graph output."""
    count = draw(st.integers(1, most))
    nodes: list[Node] = []
    values = ["x"]
    for i in range(count):
        kind = draw(st.sampled_from(kinds))
        arity = 2 if kind in ("Add", "Mul", "Concat") else 1
        inputs = [draw(st.sampled_from(values[-4:])) for _ in range(arity)]
        nodes.append(Node(f"n{i}", kind, (*inputs, *(["w"] if kind == "Conv" else [])), (f"v{i}",)))
        values.append(f"v{i}")
    read = {value for node in nodes for value in node.inputs}
    outputs = tuple(value for value in values[1:] if value not in read)
    order = draw(st.permutations(nodes))
    return Graph(schedule(order, outputs), ("x",), outputs, frozenset({"w"}))


@given(graphs(), st.data())
@settings(max_examples=300, deadline=None)
def test_partition_laws(graph: Graph, data: st.DataObject) -> None:
    batched = frozenset(value for node in graph.nodes for value in node.outputs if data.draw(st.booleans(), label=value))
    for blocks in (partition(graph, Rules(batched)), layers(graph, Rules(batched))):
        # every node in exactly one block, in order
        assert [node for block in blocks for node in block.nodes] == list(graph.nodes)
        # running blocks in order with freed values gone is running the model
        alive = set(graph.inputs)
        for block, dead in zip(blocks, last_reads([block.nodes for block in blocks], graph), strict=True):
            assert set(block.inputs) <= alive
            assert (block.inputs, block.outputs) == boundary(graph, block.nodes)
            alive = (alive | set(block.outputs)) - dead
        assert alive >= set(graph.outputs)
        # merging is associative
        if len(blocks) >= 3:
            a, b, c = blocks[:3]
            assert merge(graph, [merge(graph, [a, b]), c]) == merge(graph, [a, merge(graph, [b, c])]) == merge(graph, [a, b, c])


@given(graphs(most=40, kinds=("Conv", "Conv", "Relu", "Add", "Concat")))
@settings(max_examples=100, deadline=None)
def test_no_region_is_larger_than_the_limit(graph: Graph) -> None:
    """Where every value is an array of samples there is always a place to cut, whatever is alive there."""
    batched = frozenset(value for node in graph.nodes for value in node.outputs)
    for block in partition(graph, Rules(batched)):
        assert len(block.weighted) <= (MAX_REGION if block.is_residual else MAX_CHAIN)


@given(graphs(), st.data())
@settings(max_examples=150, deadline=None)
def test_islands_and_boundaries_are_cut_out(graph: Graph, data: st.DataObject) -> None:
    batched = frozenset(value for node in graph.nodes for value in node.outputs)
    islands = frozenset(node.name for node in graph.nodes if data.draw(st.booleans(), label=node.name))
    ends = [value for value in batched if data.draw(st.integers(0, 3), label=value) == 0]
    cut = partition(graph, Rules(batched, islands=islands, boundaries=ends))
    for blocks in (cut, layers(graph, Rules(batched, islands=islands))):
        assert [node for block in blocks for node in block.nodes] == list(graph.nodes)
        for block in blocks:
            assert {node.name in islands for node in block.nodes} == {block.is_island}
            assert not (block.is_island and block.weighted)
    last = max((i for i, block in enumerate(cut) if block.weighted), default=-1)
    for block in cut[: last + 1]:
        assert not {value for node in block.nodes[:-1] for value in node.outputs} & set(ends)


@given(graphs())
@settings(max_examples=200, deadline=None)
def test_schedule_is_topological_and_complete(graph: Graph) -> None:
    seen = set(graph.inputs)
    for node in graph.nodes:
        assert set(graph.data_inputs(node)) <= seen
        seen.update(node.outputs)
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)
    assert set(graph.outputs) <= seen
