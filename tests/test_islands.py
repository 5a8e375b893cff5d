"""Nodes that torch cannot run are left to ONNX Runtime, and everything around them is quantized as ever."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from exporters import export_qdq, write_model
from tests import zoo
from toolchain import runtime
from toolchain.activations import Parts, TorchModel
from toolchain.config import Config
from toolchain.importing import cut_blocks
from toolchain.islands import find_islands, island_rows
from toolchain.noise import sqnr
from toolchain.pipeline import Quantized, quantize
from toolchain.quant_table import QuantTable
from toolchain.report import coverage
from toolchain.samples import Samples
from toolchain.simulation import simulate
from toolchain.source import SourceModel, infer_types
from toolchain.torch_import import block as torch_block
from toolchain.torch_import.operator import NodeView, Operator
from toolchain.wording import island_lines

FAST = Config(device="cpu", iterations=20, batch_size=8, weight_bits=8, activation_bits=8, units="none")


def branches(b: zoo.Builder, value: str, channels: int) -> str:
    """`If` on a computed condition: a convolution with weights of its own that captures `value`, or the value doubled."""
    weight = numpy_helper.from_array(np.random.default_rng(3).normal(size=(channels, channels, 1, 1)).astype(np.float32), "inner_w")
    then = helper.make_graph(
        [helper.make_node("Conv", [value, "inner_w"], ["then_y"], "inner_conv")], "then", [], [onnx.ValueInfoProto(name="then_y")], [weight]
    )
    other = helper.make_graph([helper.make_node("Add", [value, value], ["else_y"])], "else", [], [onnx.ValueInfoProto(name="else_y")])
    zero = b.constant("zero", np.array(0.0, np.float32))
    condition = b.op("Greater", b.op("ReduceMax", value, keepdims=0), zero)
    return b.op("If", condition, then_branch=then, else_branch=other)


def control_flow() -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8, act="relu")
    x = b.op("Relu", b.op("Add", branches(b, b.conv(x, 8, 8), 8), x))
    return b.model(b.head(b.conv(x, 8, 8, act="relu"), 8))


def foreign() -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8, act="relu")
    x = b.op("Mul", b.foreign(b.conv(x, 8, 8)), x)
    return b.model(b.head(b.conv(x, 8, 8, act="relu"), 8))


def sequences() -> onnx.ModelProto:
    """A sequence of tensors crosses from one island to another, with a convolution between them."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    parts = b.op("SplitToSequence", b.conv("x", 3, 8, act="relu"), b.constant("four", np.array(4, np.int64)), axis=1)
    first = b.op("SequenceAt", parts, b.constant("first", np.array(0, np.int64)))
    y = b.conv(first, 4, 4, act="relu")
    second = b.op("SequenceAt", parts, b.constant("second", np.array(1, np.int64)))
    return b.model(b.head(b.op("Concat", y, second, axis=1), 8))


def detector() -> onnx.ModelProto:
    """Boxes picked by NonMaxSuppression, whose number follows from the data, and a layer on what was picked."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]}, opset=13)
    features = b.conv(b.conv("x", 3, 8, act="relu"), 8, 4)
    flat = b.op("Reshape", features, b.constant("flat", np.array([0, 4, 64], np.int64)))
    boxes = b.op("Transpose", flat, perm=[0, 2, 1])
    scores = b.op("Sigmoid", b.op("ReduceMax", flat, axes=[1], keepdims=1))
    limits = [b.constant(n, np.array([v], t)) for n, v, t in (("most", 5, np.int64), ("iou", 0.5, np.float32), ("score", 0.6, np.float32))]
    picked = b.op("NonMaxSuppression", boxes, scores, *limits)
    rows = b.op("GatherND", boxes, b.op("Gather", picked, b.constant("columns", np.array([0, 2], np.int64)), axis=1))
    y = b.op("MatMul", rows, b.weight("last_w", (4, 6), 4))
    return b.model(y, boxes)


def microsoft() -> onnx.ModelProto:
    """An operator of a domain that only ONNX Runtime knows."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8, act="relu")
    x = b.conv(b.op("Trilu", x, domain="com.microsoft"), 8, 8, act="relu")
    return b.model(b.head(x, 8))


MODELS = {"if": control_flow, "foreign": foreign, "sequences": sequences, "detector": detector, "microsoft": microsoft}


def learned(model: onnx.ModelProto, folder: Path, config: Config = FAST) -> tuple[SourceModel, Samples, Quantized]:
    source, samples = zoo.loaded(model, folder), zoo.images(16)
    return source, samples, quantize(source, samples, config)


@pytest.mark.parametrize("name", MODELS)
def test_pieces_around_islands_compute_the_model(name: str, tmp_path: Path) -> None:
    source, samples = zoo.loaded(MODELS[name](), tmp_path), zoo.images(70)  # more than one forward pass
    types = infer_types(source, samples.shapes, samples.inputs)
    islands = find_islands(source, types)
    assert islands
    blocks = cut_blocks(source, types, islands, Config())
    assert [node for block in blocks for node in block.nodes] == list(source.graph.nodes)
    assert {node.name for block in blocks if block.is_island for node in block.nodes} == islands.keys()
    found = simulate(source, QuantTable(), samples, torch.device("cpu"))
    expected = runtime.run(runtime.session(source.model), samples.inputs)
    for output, array in expected.items():
        np.testing.assert_allclose(found[output], array, atol=1e-4, rtol=1e-4)  # float32 sums in another order


@pytest.mark.parametrize("name", MODELS)
def test_models_with_islands_are_quantized_and_load(name: str, tmp_path: Path) -> None:
    source, samples, quantized = learned(MODELS[name](), tmp_path)
    layers = coverage(source, quantized.table)
    assert layers["layers_quantized"] == layers["layers"]
    assert len(quantized.results) > 0
    exported = export_qdq(source.model, quantized.table)
    outputs = runtime.run(runtime.session(exported), samples.inputs)
    simulated = simulate(source, quantized.table, samples, torch.device("cpu"), quantized.islands)
    floats = runtime.run(runtime.session(source.model), samples.inputs)
    for output in source.graph.outputs:
        if len(floats[output]) == samples.count:  # not the boxes that were picked, whose number differs
            assert sqnr(floats[output], outputs[output]) > 15
            assert sqnr(simulated[output], outputs[output]) > 25  # codes on ties


def test_branches_read_quantized_values_by_their_new_names(tmp_path: Path) -> None:
    """The Relu that a branch captures is folded into the quantizer behind it, and its name with it."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8, act="relu")
    y = b.op("Add", branches(b, x, 8), b.conv(x, 8, 8, act="relu"))
    source, samples, quantized = learned(b.model(b.head(y, 8)), tmp_path)
    assert x in quantized.table
    exported = export_qdq(source.model, quantized.table)
    assert x not in {value for node in exported.graph.node for value in node.output}
    simulated = simulate(source, quantized.table, samples, torch.device("cpu"), quantized.islands)
    for name, array in runtime.run(runtime.session(exported), samples.inputs).items():
        assert sqnr(simulated[name], array) > 25  # codes on ties


def test_report_names_nodes_operators_reasons_and_weights(tmp_path: Path) -> None:
    source, _, quantized = learned(control_flow(), tmp_path)
    rows = island_rows(source, [row.block for row in quantized.plan.rows], quantized.islands)
    assert [(row.operators, row.reasons, row.weights) for row in rows] == [(("If",), ("If is control flow",), 64)]
    assert island_lines([{**vars(row)} for row in rows]) == [f"1 node, with 64 weights: If is control flow ({rows[0].block})"]


def test_weights_that_islands_share_are_held_by_the_first(tmp_path: Path) -> None:
    """Two RNN of a kind that torch does not run, with the same weights."""
    b = zoo.Builder({"x": [4, "N", 48]})
    weights = [b.weight(f"w{size}", (1, 32, size), size) for size in (48, 32)]
    kind: dict[str, Any] = {"hidden_size": 32, "activations": ["Affine"], "activation_alpha": [0.5], "activation_beta": [0.1]}
    first, second = (b.op("RNN", x, *weights, **kind) for x in ("x", b.op("Neg", "x")))
    source = zoo.loaded(b.model(b.op("Add", first, second)), tmp_path)
    types = infer_types(source, {"x": (4, 2, 48)})
    reasons = find_islands(source, types)
    rows = island_rows(source, cut_blocks(source, types, reasons, Config()), reasons)
    assert {name for row in rows for name in row.nodes} >= {source.graph.producer[name].name for name in (first, second)}
    assert sum(row.weights for row in rows) == 32 * 48 + 32 * 32


def test_a_wrong_converter_falls_back_to_an_island(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(view: NodeView) -> Operator:
        return Operator(lambda x: 2 * torch.nn.functional.relu(x), (view.proto.input[0],))

    def failing(view: NodeView) -> Operator:
        return Operator(lambda _: torch.zeros(1).view(7, 7), (view.proto.input[0],))

    model = zoo.tiny_resnet()
    for converter, reason in ((doubled, "torch computes this Relu differently"), (failing, "torch fails on this Relu")):
        monkeypatch.setattr(torch_block, "CONVERTERS", {**torch_block.CONVERTERS, ("", "Relu"): converter})
        source, _, quantized = learned(model, tmp_path)
        assert {source.graph.producer[v].op_type for v in source.graph.producer if source.graph.producer[v].name in quantized.islands} == {
            "Relu"
        }
        assert all(why.startswith(reason) for why in quantized.islands.values())
        assert quantized.import_error < 1e-4


def test_an_island_hands_on_what_is_no_tensor(tmp_path: Path) -> None:
    source, samples = zoo.loaded(sequences(), tmp_path), zoo.images(3)
    types = infer_types(source, samples.shapes)
    model = TorchModel.of(source, types, cut_blocks(source, types, find_islands(source, types), Config()), torch.device("cpu"))
    stream = model.stream(samples.inputs)
    sequences_seen = []
    for piece in model.pieces:
        outputs = model.run(piece, stream)
        sequences_seen += [value[0] for name, value in outputs.items() if name in types.others and isinstance(value, Parts)]
        stream.advance(outputs)
    assert [[array.shape for array in sequence] for sequence in sequences_seen] == [[(3, 4, 8, 8)] * 2]


def test_subgraphs_capture_only_what_is_around_them(tmp_path: Path) -> None:
    """A value made inside an outer branch and read in a nested one is nobody else's input."""
    inner = helper.make_graph([helper.make_node("Relu", ["middle"], ["deep"])], "inner", [], [onnx.ValueInfoProto(name="deep")])
    other = helper.make_graph([helper.make_node("Neg", ["middle"], ["flat"])], "other", [], [onnx.ValueInfoProto(name="flat")])
    nested = helper.make_node("If", ["flag"], ["nested_y"], then_branch=inner, else_branch=other)
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    y = b.conv("x", 3, 8)
    flag = b.op("Greater", b.op("ReduceMax", y, keepdims=0), b.constant("zero", np.array(0.0, np.float32)), name="flag")
    then = helper.make_graph([helper.make_node("Abs", [y], ["middle"]), nested], "then", [], [onnx.ValueInfoProto(name="nested_y")])
    relu = helper.make_graph([helper.make_node("Relu", [y], ["else_y"])], "else", [], [onnx.ValueInfoProto(name="else_y")])
    z = b.op("If", flag, then_branch=then, else_branch=relu)
    source = zoo.loaded(b.model(b.head(z, 8)), tmp_path)
    node = next(node for node in source.graph.nodes if node.op_type == "If")
    assert set(node.inputs) == {y, flag}


def test_islands_are_in_the_json_of_a_plan(tmp_path: Path) -> None:
    source, _, quantized = learned(foreign(), tmp_path, Config(device="cpu", algorithm="minmax"))
    rows = [vars(row) for row in island_rows(source, [row.block for row in quantized.plan.rows], quantized.islands)]
    assert json.loads(json.dumps(rows))[0]["operators"] == ["Imputer"]
    assert rows[0]["reasons"] == ("Imputer has no torch converter",)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("kind", ["If", "Loop"])
@pytest.mark.parametrize("moves", [["Transpose"], ["MaxPool"], ["Transpose", "Flatten"]])
def test_what_a_subgraph_reads_rearranged_loads(kind: str, moves: list[str], outside: bool, tmp_path: Path) -> None:
    """ONNX Runtime aborts the process at a DequantizeLinear that is rearranged for a subgraph, hence the other process.

    `outside`: a node of the graph around it reads the value too.
    """
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    y = b.conv("x", 3, 8, act="relu")
    moved = y
    for move in moves:
        moved = b.op(move, moved, kernel_shape=[2, 2]) if move == "MaxPool" else b.op(move, moved)
    inner = helper.make_node("ReduceMax", [moved], ["seen"], keepdims=0)
    given = helper.make_node("Identity", ["seen"], ["given"])
    if kind == "If":
        branch = helper.make_graph([inner, given], "branch", [], [onnx.ValueInfoProto(name="given")])
        least = helper.make_node("ReduceMin", [moved], ["least"], keepdims=0)
        other = helper.make_graph([least], "other", [], [onnx.ValueInfoProto(name="least")])
        whole = b.op("ReduceSum", moved, keepdims=0) if outside else b.op("ReduceMax", y, keepdims=0)
        condition = b.op("Greater", whole, b.constant("zero", np.array(0.0, np.float32)))
        found = b.op("If", condition, then_branch=branch, else_branch=other)
    else:
        body = helper.make_graph(
            [inner, given, helper.make_node("Identity", ["c"], ["again"])],
            "body",
            [helper.make_tensor_value_info(*info) for info in (("i", TensorProto.INT64, []), ("c", TensorProto.BOOL, []))]
            + [onnx.ValueInfoProto(name="state")],
            [onnx.ValueInfoProto(name="again"), onnx.ValueInfoProto(name="given")],
        )
        start = b.op("ReduceSum", moved, keepdims=0) if outside else b.op("ReduceMin", y, keepdims=0)
        found = b.op("Loop", b.constant("times", np.array(2)), b.constant("on", np.array(True)), start, body=body)
    source, _, quantized = learned(b.model(b.op("Add", b.head(b.conv(y, 8, 8, act="relu"), 8), found)), tmp_path)
    write_model(export_qdq(source.model, quantized.table), tmp_path / "q.onnx")
    load = f"import onnxruntime as o; o.InferenceSession({str(tmp_path / 'q.onnx')!r}, providers=['CPUExecutionProvider'])"
    assert subprocess.run([sys.executable, "-c", load], capture_output=True, check=False).returncode == 0
