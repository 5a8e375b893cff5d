"""Where quantizers go, on graphs small enough to read."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests import zoo
from toolchain.errors import UsageError
from toolchain.float_reasons import UNSOUND
from toolchain.flow import edges
from toolchain.placement import Placement, place
from toolchain.scheme import TARGETS, Precision
from toolchain.selection import match_nodes
from toolchain.source import SourceModel, infer_types


def placed(
    model: onnx.ModelProto, folder: Path, *, keep: tuple[str, ...] = (), target: str = "ort-cpu", **bits: Any
) -> tuple[SourceModel, Placement]:
    source = zoo.loaded(model, folder)
    types = infer_types(source, {spec.name: tuple(d if isinstance(d, int) else 12 for d in spec.shape[1:]) for spec in source.inputs})
    return source, place(source, types, TARGETS[target], Precision(**bits), match_nodes(source.graph, keep))


def bits_of(found: Placement) -> dict[str, int]:
    return {name: spec.bits for name, spec in found.activations.items()}


def test_residual_network(tmp_path: Path) -> None:
    source, found = placed(zoo.tiny_resnet(), tmp_path)
    kinds = {value: node.op_type for node in source.graph.nodes for value in node.outputs}
    bits = {(kinds.get(name, "input"), b) for name, b in bits_of(found).items()}
    # The image and what the classifier reads at 8 bits, operands at 4, addends and what is pooled at 8, nothing in front of Relu or Clip.
    assert bits == {("input", 8), ("Relu", 4), ("Relu", 8), ("Clip", 4), ("Conv", 8), ("GlobalAveragePool", 8)}
    pre_activation = {node.inputs[0] for node in source.graph.nodes if node.op_type in ("Relu", "Clip")}
    assert not pre_activation & set(found.activations)
    assert "Add" not in {kinds.get(name) for name in found.activations}  # its result is behind the Relu
    assert [spec.bits for spec in found.weights.values()] == [7, 4, 4, 4, 4, 4, 7]  # 8, and 7 of them where the activations have 8 too
    assert not found.floats
    assert len(found.biases) == 7
    assert source.graph.outputs[0] not in found.activations
    flattened = next(value for value, kind in kinds.items() if kind == "Flatten")
    assert found.tied[flattened] in found.activations


def test_same_bits_everywhere(tmp_path: Path) -> None:
    _, found = placed(zoo.tiny_resnet(), tmp_path, weight_bits=3, activation_bits=4, first_last_bits=None)
    assert {spec.bits for spec in found.weights.values()} == {3}
    assert sorted(set(bits_of(found).values())) == [4, 8]  # 8: the addends


def test_wide_activations_are_never_narrowed_by_the_other_rules(tmp_path: Path) -> None:
    _, found = placed(zoo.tiny_resnet(), tmp_path, activation_bits=16)
    assert set(bits_of(found).values()) == {16}


def test_kept_float_nodes_and_their_report(tmp_path: Path) -> None:
    source, everything = placed(zoo.tiny_resnet(), tmp_path)
    first = source.graph.weighted[0]
    source, found = placed(zoo.tiny_resnet(), tmp_path, keep=(first.name,))
    assert [(row.node, row.reason) for row in found.floats] == [(first.name, "kept float on request")]
    assert set(everything.weights) - set(found.weights) == {first.inputs[1]}
    assert "x" not in found.activations  # nothing on integers reads the image any more


def test_keep_float_patterns(tmp_path: Path) -> None:
    graph = zoo.loaded(zoo.tiny_resnet(), tmp_path).graph
    gemm = next(node.name for node in graph.nodes if node.op_type == "Gemm")
    assert match_nodes(graph, ["Gemm"]) == match_nodes(graph, [gemm]) == match_nodes(graph, [r"node_gemm\d+"]) == {gemm}
    with pytest.raises(UsageError, match=r"'Gem': matches no node name and no operator type \(did you mean 'Gemm'"):
        match_nodes(graph, ["Gem"])
    with pytest.raises(UsageError, match="no regular expression"):
        match_nodes(graph, ["node_("])


def test_edges_follow_the_dataflow(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    stem = b.conv("x", 3, 8, act="relu")
    other = b.conv("x", 3, 8, act="relu")
    trunk = b.conv(b.op("Add", stem, other), 8, 8, act="relu")
    source = zoo.loaded(b.model(b.head(trunk, 8), b.conv(trunk, 8, 2)), tmp_path)
    first, last = edges(source.graph)
    kind = {node.name: node.op_type for node in source.graph.nodes}
    assert sorted(kind[name] for name in first) == ["Conv", "Conv"]
    assert sorted(kind[name] for name in last) == ["Conv", "Gemm"]
    assert not first & last


def test_a_shared_weight_has_one_grid(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 8, 8, 8]})
    w = b.weight("shared", (8, 8, 3, 3), 72)
    x = "x"
    for _ in range(3):
        x = b.op("Relu", b.op("Conv", x, w, pads=[1, 1, 1, 1]))
    _, found = placed(b.model(b.op("GlobalAveragePool", x)), tmp_path)
    assert {name: spec.bits for name, spec in found.weights.items()} == {"shared": 7}  # the first and last layers' 8 wins


def test_biases_that_cannot_be_integers_are_reported(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 6]})
    y = b.op("Gemm", "x", b.weight("w", (6, 4), 6), b.constant("c", np.ones(4, np.float32)), alpha=0.5)
    _, found = placed(b.model(y), tmp_path)
    assert list(found.weights) == ["w"]
    assert not found.biases
    assert [row.reason for row in found.floats] == ["its bias stays float: Gemm scales it (alpha or beta is not 1)"]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_and_biases_without_codes_stay_float(number: float, tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 6]})
    w = np.ones((6, 4), np.float32)
    w[2, 1] = number
    y = b.op("MatMul", b.op("Gemm", "x", b.weight("v", (6, 6), 6), b.constant("c", np.array([number] * 6, np.float32))), b.constant("w", w))
    source, found = placed(b.model(y), tmp_path)
    assert source.unsound == {"w", "c"}
    assert list(found.weights) == ["v"]
    assert not found.biases
    assert {row.reason for row in found.floats} == {f"its weight cannot be on a grid: {UNSOUND}", f"its bias stays float: {UNSOUND}"}


def test_a_weight_that_is_an_output_stays_float(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 6]})
    y = b.op("MatMul", b.op("MatMul", "x", b.weight("w", (6, 6), 6)), b.weight("v", (6, 4), 6))
    source, found = placed(b.model(y, "w"), tmp_path)
    assert source.graph.outputs == (y,)  # nothing computes the other
    assert list(found.weights) == ["v"]
    assert [row.reason for row in found.floats] == ["its weight is an output of the model, too"]


@pytest.mark.parametrize("channels", [4, 6])
def test_the_bias_of_a_transposed_convolution_says_why_it_is_float(channels: int, tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 4, 6, 6]})
    y = b.op("ConvTranspose", "x", b.weight("w", (4, channels // 2, 2, 2), 16), b.weight("c", (channels,), 1), group=2, strides=[2, 2])
    _, found = placed(b.model(y), tmp_path)
    assert [row.reason for row in found.floats] == ["its bias stays float: transposed convolutions run in float"]


def test_products_of_two_activations_are_quantized(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 4, 6]})
    q, k = (b.op("MatMul", "x", b.weight(f"w{i}", (6, 6), 6)) for i in "qk")
    scores = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1])))
    y = b.op("MatMul", scores, "x")
    _, found = placed(b.model(b.op("MatMul", y, b.weight("wo", (6, 6), 6))), tmp_path)
    assert {q, k, scores, y} <= set(found.activations)


@pytest.mark.parametrize(("target", "span"), [("ort-cpu", None), ("openvino", None), ("qnn", (0.0, 1.0))])
def test_a_softmax_has_its_known_range_only_where_the_target_asks_for_it(
    target: str, span: tuple[float, float] | None, tmp_path: Path
) -> None:
    """Attention that spreads over 512 tokens has probabilities near 1/512: half a step of the range 0 to 1."""
    b = zoo.Builder({"x": ["N", 4, 6]})
    scores, gate = b.op("Softmax", b.op("MatMul", "x", b.weight("w", (6, 4), 6))), b.op("Sigmoid", "x")
    source = zoo.loaded(b.model(b.op("MatMul", scores, gate)), tmp_path)
    found = place(source, infer_types(source, {"x": (4, 6)}), TARGETS[target], Precision(), frozenset())
    assert found.activations[scores].span == span
    assert found.activations[gate].span == (0.0, 1.0)


@pytest.mark.parametrize(("target", "is_quantized"), [("ort-cpu", False), ("openvino", False), ("qnn", True)])
def test_scores_are_on_integers_only_where_all_is(target: str, is_quantized: bool, tmp_path: Path) -> None:
    """ONNX Runtime's softmax on integers takes longer than the one on floats."""
    b = zoo.Builder({"x": ["N", 4, 6], "mask": ["N", 4, 4]})
    scores = b.op("Add", b.op("MatMul", "x", b.op("Transpose", "x", perm=[0, 2, 1])), "mask")
    y = b.op("MatMul", b.op("Softmax", scores), "x")
    source = zoo.loaded(b.model(b.op("MatMul", y, b.weight("wo", (6, 6), 6))), tmp_path)
    found = place(source, infer_types(source, {"x": (4, 6), "mask": (4, 4)}), TARGETS[target], Precision(), frozenset())
    assert ({scores, "mask"} <= found.activations.keys()) == is_quantized


def test_padding_with_another_value_than_zero_is_no_data_movement(tmp_path: Path) -> None:
    for value, tied in ((0.0, True), (1.5, False)):
        b = zoo.Builder({"x": ["N", 3, 8, 8]})
        y = b.conv("x", 3, 8, act="relu")
        padded = b.op(
            "Pad",
            y,
            b.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)),
            b.constant("value", np.array(value, np.float32)),
            mode="constant",
        )
        z = b.conv(b.op("Add", padded, padded), 8, 8)
        _, found = placed(b.model(z), tmp_path)
        assert (padded in found.tied) is tied
        assert (padded in found.activations) is not tied
