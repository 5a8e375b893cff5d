"""Weights that operators read in float are codes in the file: tables behind the lookup, recurrent layers, control flow, islands."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from exporters import export_qdq
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.errors import UnsupportedModelError
from toolchain.kernels import check_simulation
from toolchain.noise import sqnr
from toolchain.pipeline import Quantized, quantize
from toolchain.protos import subgraphs
from toolchain.report import coverage
from toolchain.runtime import Optimization
from toolchain.samples import Samples
from toolchain.simulation import simulate, simulated_values
from toolchain.source import SourceModel, load_source

RNG = np.random.default_rng(5)
FAST = Config(device="cpu", algorithm="minmax", weight_bits=8, activation_bits=8)
COUNT = 4


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def embedding(axis: int = 0) -> onnx.ModelProto:
    """Tokens looked up in a table whose columns differ in size by orders of magnitude, then a layer."""
    b = zoo.Builder({"tokens": ["N", 6]})
    b.dtypes["tokens"] = TensorProto.INT64
    table = normal(100, 16) * np.logspace(-2, 2, 16, dtype=np.float32)
    x = b.op("Gather", b.constant("table", table if axis == 0 else np.ascontiguousarray(table.T)), "tokens", axis=axis)
    if axis:
        x = b.op("Transpose", x, perm=[1, 2, 0])
    x = b.op("LayerNormalization", x, b.constant("gain", np.ones(16, np.float32)))
    return b.model(b.op("MatMul", x, b.weight("w", (16, 12), 16)))


def recurrent(kind: str, gates: int) -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 5, 16]})
    w, r = b.weight("rec_w", (1, gates * 32, 16), 16), b.weight("rec_r", (1, gates * 32, 32), 32)
    y = b.op(kind, b.op("Transpose", "x", perm=[1, 0, 2]), w, r, hidden_size=32, outputs=2)
    last = b.op("Gather", y, b.constant("last", np.array(-1, np.int64)))
    return b.model(b.op("MatMul", b.op("Squeeze", last, b.constant("axis", np.array([0], np.int64))), b.weight("w", (32, 12), 32)))


def body(name: str, value: str, output: str, weight: str, extra: list[onnx.NodeProto] | None = None) -> onnx.GraphProto:
    tensor = numpy_helper.from_array(normal(32, 32) / 6, weight)
    nodes = [helper.make_node("MatMul", [value, weight], [output], f"node_{output}"), *(extra or [])]
    return helper.make_graph(nodes, name, [], [onnx.ValueInfoProto(name=output)], [tensor])


def branches(weighted: bool = False) -> onnx.ModelProto:
    """Both branches of an If call their weight the same; without `weighted` there are no others."""
    b = zoo.Builder({"x": ["N", 32]})
    x = b.op("MatMul", "x", b.weight("w", (32, 32), 32)) if weighted else b.op("Relu", "x")
    condition = b.op("Greater", b.op("ReduceSum", x, keepdims=0), b.constant("zero", np.array(0.0, np.float32)))
    return b.model(b.op("If", condition, then_branch=body("then", x, "then_y", "inner"), else_branch=body("else", x, "else_y", "inner")))


def lookups_in_branches() -> onnx.ModelProto:
    """A table of the main graph that both branches look things up in."""
    b = zoo.Builder({"tokens": ["N", 6]})
    b.dtypes["tokens"] = TensorProto.INT64
    table = b.constant("table", normal(100, 16))

    def branch(name: str, axis: int) -> onnx.GraphProto:
        y, output = f"{name}_y", onnx.ValueInfoProto(name=f"{name}_y")
        nodes = [helper.make_node("Gather", [table, "tokens"], [f"{name}_rows"], f"{name}_gather")]
        return helper.make_graph([*nodes, helper.make_node("Softmax", [f"{name}_rows"], [y], axis=axis)], name, [], [output])

    total = b.op("ReduceMax", "tokens", keepdims=0)
    condition = b.op("Greater", total, b.constant("limit", np.array(50, np.int64)))
    x = b.op("If", condition, then_branch=branch("then", 1), else_branch=branch("else", 2))
    return b.model(b.op("MatMul", x, b.weight("w", (16, 12), 16)))


def loop() -> onnx.ModelProto:
    """Three rounds of a layer whose weight the body holds."""
    b = zoo.Builder({"x": ["N", 32]})
    graph = body("body", "state", "product", "inner", [helper.make_node("Tanh", ["product"], ["next"], "tanh")])
    graph.input.extend(
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ]
    )
    graph.node.append(helper.make_node("Identity", ["more"], ["go_on"], "go"))
    del graph.output[:]
    graph.output.extend([onnx.ValueInfoProto(name="go_on"), onnx.ValueInfoProto(name="next")])
    rounds, true = b.constant("rounds", np.array(3, np.int64)), b.constant("true", np.array(True))
    return b.model(b.op("Loop", rounds, true, b.op("Relu", "x"), body=graph))


def products() -> onnx.ModelProto:
    """A weight on the left, one of an Einsum, and one of an operator that ONNX Runtime's optimiser makes."""
    b = zoo.Builder({"x": ["N", 32, 8]})
    x = b.op("MatMul", b.weight("left", (40, 32), 32), "x")
    x = b.op("Einsum", x, b.weight("summed", (40, 48), 40), equation="nij,ik->nk")  # sums over j alone, too: no product
    x = b.op("FusedMatMul", b.op("Tanh", x), b.weight("fused", (48, 32), 48), domain="com.microsoft")
    return b.model(b.op("MatMul", x, b.weight("w", (32, 12), 32)))


MODELS = {
    "products": (products, Samples({"x": normal(COUNT, 32, 8)})),
    "embedding": (lambda: embedding(), Samples({"tokens": RNG.integers(0, 100, (COUNT, 6))})),
    "embedding, columns": (lambda: embedding(1), Samples({"tokens": RNG.integers(0, 100, (COUNT, 6))})),
    "lookups in branches": (lookups_in_branches, Samples({"tokens": RNG.integers(0, 100, (COUNT, 6))})),
    "lstm": (lambda: recurrent("LSTM", 4), Samples({"x": normal(COUNT, 5, 16)})),
    "gru": (lambda: recurrent("GRU", 3), Samples({"x": normal(COUNT, 5, 16)})),
    "if": (lambda: branches(weighted=True), Samples({"x": normal(COUNT, 32)})),
    "if alone": (branches, Samples({"x": normal(COUNT, 32)})),
    "loop": (loop, Samples({"x": normal(COUNT, 32)})),
}


def made(name: str, folder: Path, config: Config = FAST) -> tuple[SourceModel, Samples, Quantized, onnx.ModelProto]:
    build, samples = MODELS[name]
    source = zoo.loaded(build(), folder)
    found = quantize(source, samples, config)
    return source, samples, found, export_qdq(source.model, found.table, scheme=config.scheme)


@pytest.mark.parametrize("name", MODELS)
def test_what_computes_in_float_is_stored_as_codes(name: str, tmp_path: Path) -> None:
    source, samples, found, exported = made(name, tmp_path)
    cover = coverage(source, found.table)
    assert cover["stored"] == cover["stored_quantized"] > 0
    assert not [t.name for t in exported.graph.initializer if t.data_type == TensorProto.FLOAT and t.name in source.stored]
    floats = runtime.run(runtime.session(source.model), samples.inputs)
    written = runtime.run(runtime.session(exported, optimization=Optimization.NONE), samples.inputs)
    deployed = runtime.run(runtime.session(exported), samples.inputs)
    simulated = simulate(source, found.table, samples, torch.device("cpu"), found.islands)
    for output, array in written.items():
        assert sqnr(floats[output], array) > 25
        assert sqnr(floats[output], deployed[output]) > 25
        assert sqnr(simulated[output], array) > 60  # float32 sums in another order; a rounding tie here and there


@pytest.mark.parametrize("name", ["embedding", "lstm"])
def test_every_value_is_the_simulated_one(name: str, tmp_path: Path) -> None:
    source, samples, found, exported = made(name, tmp_path)
    values = simulated_values(source, found.table, samples, found.islands)
    check = check_simulation(exported, found.table, values, samples.inputs)
    assert check.values > 1
    assert check.steps <= 1


def test_lookups_in_branches_take_codes(tmp_path: Path) -> None:
    *_, exported = made("lookups in branches", tmp_path)
    branch = next(node for node in exported.graph.node if node.op_type == "If")
    assert [[node.op_type for node in graph.node] for graph in subgraphs(branch)] == [["Gather", "DequantizeLinear", "Softmax"]] * 2


@pytest.mark.parametrize("storage", ["fast", "small"])
def test_a_table_is_dequantized_behind_the_lookup(storage: str, tmp_path: Path) -> None:
    config = Config(device="cpu", algorithm="minmax", weight_bits=4, activation_bits=8, first_last_bits="same", storage=storage)
    *_, exported = made("embedding", tmp_path, config)
    lookup = next(node for node in exported.graph.node if node.op_type == "Gather")
    behind = next(node for node in exported.graph.node if lookup.output[0] in node.input)
    assert behind.op_type == "DequantizeLinear"
    codes = next(t for t in exported.graph.initializer if t.name == lookup.input[0])
    assert codes.data_type == TensorProto.INT8  # Gather has no kernel for packed integers
    assert np.abs(numpy_helper.to_array(codes)).max() <= 8
    scale = next(t for t in exported.graph.initializer if t.name == behind.input[1])
    assert list(scale.dims) == [16]  # of each column, so that small ones beside large ones survive


def test_tables_are_learned_around_and_not_learned(tmp_path: Path) -> None:
    config = Config(device="cpu", iterations=100, batch_size=2, weight_bits=3, activation_bits=8, first_last_bits="same", round_weight=0.0)
    source, samples, found, exported = made("embedding", tmp_path, config)
    assert [result.kept for result in found.results] == ["learned"]
    assert all("table" not in result.changes for result in found.results)
    assert np.count_nonzero(found.table["w"].codes != made("embedding", tmp_path, replace(config, algorithm="mse"))[2].table["w"].codes)
    written = runtime.run(runtime.session(exported, optimization=Optimization.NONE), samples.inputs)
    simulated = simulate(source, found.table, samples, torch.device("cpu"))
    for output, array in written.items():
        assert sqnr(simulated[output], array) > 60  # float32 sums in another order


def test_a_weight_of_one_branch_is_dequantized_in_that_branch(tmp_path: Path) -> None:
    source, _, _, exported = made("if", tmp_path)
    assert len({t.name for t in source.model.graph.initializer if t.name.startswith("inner")}) == 2  # each under a name of its own
    branch = next(node for node in exported.graph.node if node.op_type == "If")
    for graph in subgraphs(branch):
        assert [node.op_type for node in graph.node] == ["DequantizeLinear", "MatMul"]


def test_the_weight_of_a_loop_is_dequantized_once(tmp_path: Path) -> None:
    *_, exported = made("loop", tmp_path)
    inner = next(node for node in exported.graph.node if node.op_type == "Loop")
    assert "DequantizeLinear" in [node.op_type for node in exported.graph.node]
    assert "DequantizeLinear" not in [node.op_type for graph in subgraphs(inner) for node in graph.node]


def test_layers_in_islands_are_stored_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain import pipeline

    source, samples = zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(8)
    node = source.graph.weighted[2]
    monkeypatch.setattr(pipeline, "find_islands", lambda *_: {node.name: "for the test"})
    found = quantize(source, samples, FAST)
    weight = source.graph.weight(node)
    assert weight is not None
    assert found.table[weight].fixed
    row = next(row for row in found.placement.floats if row.node == node.name)
    assert row.reason.startswith("in a float island: for the test; its ")
    assert row.reason.endswith("weights are stored as 8-bit codes")
    exported = export_qdq(source.model, found.table)
    written = runtime.run(runtime.session(exported, optimization=Optimization.NONE), samples.inputs)
    simulated = simulate(source, found.table, samples, torch.device("cpu"), found.islands)
    for output, array in written.items():
        assert sqnr(simulated[output], array) > 40


def test_constants_that_are_no_weights_are_named(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 64, 64]})
    x = b.op("Add", b.op("MatMul", "x", b.weight("w", (64, 64), 64)), b.constant("positions", normal(64, 64)))
    source = zoo.loaded(b.model(b.op("Tanh", x)), tmp_path)
    found = quantize(source, Samples({"x": normal(COUNT, 64, 64)}), FAST)
    assert any(row.reason.startswith("'positions', 4,096 numbers: neither an operand") for row in found.placement.floats)


def test_on_request_and_for_targets_without_codes_they_stay_float(tmp_path: Path) -> None:
    asked, target = replace(FAST, keep_float=("Gather",)), replace(FAST, target="tensorrt")
    for config, reason in ((asked, "kept float on request"), (target, "codes of operands only")):
        source, _, found, exported = made("embedding", tmp_path, config)
        assert coverage(source, found.table)["stored_quantized"] == 0
        assert any("'table', 1,600 numbers" in row.reason and reason in row.reason for row in found.placement.floats)
        assert "table" in {t.name for t in exported.graph.initializer}


def test_a_model_with_nothing_to_store_is_refused(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 32]})
    path = tmp_path / "model.onnx"
    onnx.save(b.model(b.op("Relu", "x")), path)
    with pytest.raises(UnsupportedModelError, match="nothing to quantize"):
        load_source(path)


def test_a_model_of_control_flow_alone_has_nothing_to_compare(tmp_path: Path) -> None:
    """As Silero VAD: a network for each sampling rate."""
    b = zoo.Builder({"x": ["N", 32], "rate": []})
    b.dtypes["rate"] = TensorProto.INT64
    condition = b.op("Equal", "rate", b.constant("sixteen", np.array(16, np.int64)))
    model = b.model(b.op("If", condition, then_branch=body("a", "x", "then_y", "first"), else_branch=body("b", "x", "else_y", "second")))
    source = zoo.loaded(model, tmp_path)
    samples = Samples({"x": normal(4, 32), "rate": np.full(4, 16)})
    found = quantize(source, samples, Config(device="cpu", algorithm="mse", weight_bits=8, activation_bits=8))
    values = simulated_values(source, found.table, samples, found.islands)
    check = check_simulation(export_qdq(source.model, found.table), found.table, values, samples.inputs)
    assert (check.values, check.steps) == (0, 0.0)
