"""What a loop hands through unchanged is no state of it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests import zoo
from toolchain import runtime
from toolchain.source import SourceModel

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def given(name: str, kind: int = FLOAT, shape: list[int | str] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def recurrent(kind: str, handed: str, reads_it_after: bool = False) -> onnx.ModelProto:
    """h <- tanh(h W + ...) three times, with W a state that is handed on as `handed` says."""
    b = zoo.Builder({"x": [4, 6]})
    weight = b.weight("w", (6, 6), 6)
    step = [helper.make_node("MatMul", ["h", "state_w"], ["product"]), helper.make_node("Tanh", ["product"], ["next_h"])]
    after = {
        "same": [helper.make_node("Identity", ["state_w"], ["once"]), helper.make_node("Identity", ["once"], ["next_w"])],
        "halved": [helper.make_node("Mul", ["state_w", "half"], ["next_w"])],
    }[handed]
    half = [onnx.numpy_helper.from_array(np.array(0.5, np.float32), "half")]
    states = [given("h", shape=[4, 6]), given("state_w", shape=[6, 6])]
    if kind == "Loop":
        on = helper.make_node("Identity", ["on"], ["still_on"])
        body = helper.make_graph(
            [on, *step, *after],
            "body",
            [given("i", INT, []), given("on", BOOL, []), *states],
            [given("still_on", BOOL, []), given("next_h"), given("next_w")],
            half,
        )
        first, second = b.constant("times", np.array(3)), b.constant("true", np.array(True))
        node = helper.make_node("Loop", [first, second, "x", weight], ["last_h", "last_w"], "loop", body=body)
    else:
        seen = helper.make_node("Add", ["next_h", "row"], ["row_out"])
        outputs = [given("next_h"), given("next_w"), given("row_out", shape=[4, 6])]
        body = helper.make_graph([*step, *after, seen], "body", [*states, given("row", shape=[6])], outputs, half)
        rows = b.constant("rows", np.ones((3, 6), np.float32))
        node = helper.make_node("Scan", ["x", weight, rows], ["last_h", "last_w", "seen"], "loop", body=body, num_scan_inputs=1)
    b.nodes.append(node)
    y = b.op("MatMul", "last_h", b.weight("v", (6, 6), 6))
    return b.model(b.op("MatMul", y, "last_w") if reads_it_after else y)


def states_of(source: SourceModel) -> list[str]:
    (loop,) = [node for node in source.model.graph.node if node.op_type in ("Loop", "Scan")]
    return list(loop.input)


@pytest.mark.parametrize("kind", ["Loop", "Scan"])
def test_weights_that_are_handed_on_unchanged_are_captured(kind: str, tmp_path: Path) -> None:
    model, x = recurrent(kind, "same"), {"x": np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)}
    source = zoo.loaded(model, tmp_path)
    assert "w" not in states_of(source)
    wanted, found = (runtime.execute(runtime.session(one), x, [model.graph.output[0].name]) for one in (model, source.model))
    np.testing.assert_array_equal(*(result[model.graph.output[0].name] for result in (wanted, found)))


@pytest.mark.parametrize("kind", ["Loop", "Scan"])
@pytest.mark.parametrize(("handed", "reads_it_after"), [("halved", False), ("same", True)])
def test_states_that_change_or_are_read_after_the_loop_stay(kind: str, handed: str, reads_it_after: bool, tmp_path: Path) -> None:
    assert "w" in states_of(zoo.loaded(recurrent(kind, handed, reads_it_after), tmp_path))
