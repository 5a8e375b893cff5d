"""Constants by channel are folded into the convolution that they follow, whatever axes are changed between."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import helper

from tests import zoo
from toolchain import runtime
from toolchain.folding import fold_channels
from toolchain.source import SourceModel

IMAGES = {"x": np.random.default_rng(0).normal(size=(2, 3, 1, 7)).astype(np.float32)}
CHANNELS = np.linspace(0.5, 2, 4).astype(np.float32)


def sequence(operators: list[str], constants: list[np.ndarray], moves: list[str], bias: bool = True) -> onnx.ModelProto:
    """A convolution over sequences as images with a height of 1, its axes changed, and what is done to its channels."""
    b = zoo.Builder({"x": ["N", 3, 1, 7]})
    y = b.op(
        "Conv", "x", b.weight("w", (4, 3, 1, 3), 9), *([b.constant("b", CHANNELS - 1)] if bias else []), name="conv", pads=[0, 1, 0, 1]
    )
    axis = b.constant("axis", np.array([2], np.int64))
    for move in moves:
        y = b.op(move, y, axis) if move != "Transpose" else b.op(move, y, perm=[0, 2, 1])
    for position, (kind, constant) in enumerate(zip(operators, constants, strict=True)):
        y = b.op(kind, y, b.constant(f"c{position}", constant), name=f"done{position}")
    return b.model(b.op("Tanh", y))


def loaded(model: onnx.ModelProto, folder: Path) -> tuple[SourceModel, list[str]]:
    """The loaded model, which computes what the file does, and its operators."""
    source = zoo.loaded(model, folder)
    wanted, found = (runtime.run(runtime.session(one), IMAGES) for one in (model, source.model))
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5, rtol=0)  # float32: scaled weights round otherwise
    return source, [node.op_type for node in source.graph.nodes]


@settings(max_examples=30, deadline=None)
@given(
    operators=st.lists(st.sampled_from(["Add", "Mul"]), min_size=1, max_size=3),
    turned=st.booleans(),
    whole=st.booleans(),
    bias=st.booleans(),
)
def test_constants_by_channel_are_folded(
    tmp_path_factory: pytest.TempPathFactory, operators: list[str], turned: bool, whole: bool, bias: bool
) -> None:
    """`turned`: the channels are the last axis; `whole`: one number for all channels."""
    constant = np.full((1,), 0.7, np.float32) if whole else CHANNELS if turned else CHANNELS.reshape(1, 4, 1)
    model = sequence(operators, [constant] * len(operators), ["Squeeze", *(["Transpose"] if turned else [])], bias)
    source, kinds = loaded(model, tmp_path_factory.mktemp("law"))
    assert not {"Add", "Mul"} & set(kinds)
    assert f"done{len(operators) - 1}" in source.graph.producer  # the name of what was computed stays


@pytest.mark.parametrize(
    ("constant", "moves"),
    [
        (np.linspace(0, 1, 7).astype(np.float32), ["Squeeze"]),  # along the sequence
        (np.ones((1, 4, 7), np.float32) * np.linspace(0, 1, 7).astype(np.float32), ["Squeeze"]),
        (CHANNELS.reshape(1, 4, 1), ["Squeeze", "Transpose", "Transpose", "Unsqueeze"]),  # rows of an image
        (np.ones((1, 1, 1, 1, 1, 1), np.float32), ["Squeeze"]),  # it adds axes
    ],
)
def test_other_constants_stay(constant: np.ndarray, moves: list[str], tmp_path: Path) -> None:
    _, kinds = loaded(sequence(["Add"], [constant], moves), tmp_path)
    assert "Add" in kinds


@pytest.mark.parametrize("reader", ["weight", "bias", "value"])
def test_what_others_read_stays_as_it_is(reader: str, tmp_path: Path) -> None:
    """Another convolution with the same weight, another reader of the bias, another of the value in between."""
    model = sequence(["Mul"], [CHANNELS.reshape(1, 4, 1)], ["Squeeze"])
    squeezed = next(node.output[0] for node in model.graph.node if node.op_type == "Squeeze")
    other = {
        "weight": onnx.helper.make_node("Conv", ["x", "w"], ["other"], "other"),
        "bias": onnx.helper.make_node("Mul", ["b", "b"], ["other"], "other"),
        "value": onnx.helper.make_node("Sigmoid", [squeezed], ["other"], "other"),
    }[reader]
    model.graph.node.append(other)
    model.graph.output.append(onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, None))
    _, kinds = loaded(model, tmp_path)
    assert ("Mul" in kinds) == (reader == "value")


def test_nodes_without_names_are_told_apart() -> None:
    model = sequence(["Add", "Mul"], [CHANNELS.reshape(1, 4, 1)] * 2, ["Squeeze"])
    for node in model.graph.node:
        node.name = ""
    fold_channels(model)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Squeeze", "Tanh"]


# ---------------------------------------------------------------- one number, in front of layers

NUMBERS = {"x": np.random.default_rng(0).normal(size=(2, 3, 6, 7)).astype(np.float32)}


def kinds_of(b: zoo.Builder, outputs: list[str], folder: Path) -> list[str]:
    """The operators of the loaded model, which computes what the file does."""
    model = b.model(*outputs)
    source = zoo.loaded(model, folder)
    wanted, found = (runtime.run(runtime.session(one), NUMBERS) for one in (model, source.model))
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=2e-5, rtol=2e-5)  # float32: scaled weights round otherwise
    return [node.op_type for node in source.graph.nodes]


def images() -> tuple[zoo.Builder, str]:
    b = zoo.Builder({"x": ["N", 3, 6, 7]})
    return b, b.op("Tanh", b.conv("x", 3, 4))


def numbered(b: zoo.Builder, x: str, *steps: tuple[str, float], shape: tuple[int, ...] = (1,)) -> str:
    for kind, number in steps:
        x = b.op(kind, x, b.constant(f"number{len(b.nodes)}", np.full(shape, number, np.float32)))
    return x


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["Mul", "Div", "Add", "Sub"]), st.sampled_from([-1.5, 0.3, 2.0])), min_size=1, max_size=3),
    kernel=st.sampled_from([1, 3]),
    readers=st.integers(1, 2),
    bias=st.booleans(),
)
@example(steps=[("Add", -1.5), ("Mul", -1.5), ("Mul", -1.5)], kernel=1, readers=1, bias=False)  # behind Tanh: taken for a GELU once
def test_numbers_in_front_of_convolutions(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, float]], kernel: int, readers: int, bias: bool
) -> None:
    """Factors go into the weights; what is added does where nothing is padded."""
    b, x = images()
    y = numbered(b, x, *steps)
    kinds = kinds_of(b, [b.conv(y, 4, 5, kernel, bias=bias) for _ in range(readers)], tmp_path_factory.mktemp("law"))
    turns = sum(one[0] in ("Add", "Sub") and other[0] in ("Mul", "Div") for one, other in itertools.pairwise(steps))
    if turns == 0 or kernel == 1:
        assert not {"Mul", "Div"} & set(kinds)
    if kernel == 1:
        assert not {"Add", "Sub"} & set(kinds)


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_numbers_in_front_of_matrix_products(turned: int, alpha: float, tmp_path: Path) -> None:
    b, x = images()
    y = numbered(b, b.op("Flatten", b.op("GlobalAveragePool", x)), ("Mul", 0.7), ("Add", 0.2))
    weight = b.weight("w", (5, 4) if turned else (4, 5), 4)
    z = b.op("Gemm", y, weight, b.constant("bias", np.ones(5, np.float32)), transB=turned, alpha=alpha)
    last = b.op("MatMul", numbered(b, b.op("Tanh", z), ("Mul", 0.5)), b.weight("v", (5, 3), 5))
    assert not {"Mul", "Add"} & set(kinds_of(b, [last], tmp_path))


def test_what_something_else_reads_keeps_its_number(tmp_path: Path) -> None:
    b, x = images()
    y = numbered(b, x, ("Mul", 0.7))
    assert "Mul" in kinds_of(b, [b.conv(y, 4, 5), b.op("Exp", y)], tmp_path)


def test_a_weight_that_two_layers_share_is_not_scaled_for_one(tmp_path: Path) -> None:
    b, x = images()
    w = b.weight("w", (4, 4, 1, 1), 4)
    assert "Mul" in kinds_of(b, [b.op("Conv", numbered(b, x, ("Mul", 0.7)), w), b.op("Conv", x, w)], tmp_path)


def test_the_number_of_a_gelu_stays_with_it(tmp_path: Path) -> None:
    """ONNX Runtime fuses all five operators, or none."""
    b, x = images()
    inside = numbered(b, b.op("Erf", numbered(b, x, ("Div", 2**0.5))), ("Add", 1.0))
    y = numbered(b, b.op("Mul", x, inside), ("Mul", 0.5))
    assert kinds_of(b, [b.conv(y, 4, 5, 1)], tmp_path).count("Mul") == 2


@pytest.mark.parametrize(("kind", "number"), [("Mul", 0.0), ("Mul", np.inf), ("Mul", 1e-8), ("Div", 1e-40), ("Mul", 3e38)], ids=str)
def test_numbers_that_cannot_be_divided_by_stay(kind: str, number: float, tmp_path: Path) -> None:
    b, x = images()
    y = numbered(b, x, (kind, number), ("Add", 0.5))
    source = zoo.loaded(b.model(b.conv(y, 4, 5)), tmp_path)
    assert kind in [node.op_type for node in source.graph.nodes]


# ---------------------------------------------------------------- behind layers


def test_a_weight_that_is_added_too_stays_a_weight(tmp_path: Path) -> None:
    b, x = images()
    w = b.weight("w", (1, 4), 1)
    product = b.op("Gemm", b.op("ReduceMean", b.op("Flatten", x), axes=[1]), w, w)
    y = b.op("Add", product, b.constant("v", CHANNELS))
    kinds_of(b, [b.op("Tanh", y)], tmp_path)


def test_names_inside_branches_are_not_taken(tmp_path: Path) -> None:
    """A bias that is made has a name of its own."""
    b, x = images()
    y = numbered(b, b.conv(x, 4, 4, bias=False), ("Add", 0.3))
    inner = f"{b.nodes[-2].output[0]}_bias"
    branches: dict[str, Any] = {
        name: helper.make_graph([helper.make_node("Exp", [y], [made])], name, [], [onnx.ValueInfoProto(name=made)])
        for name, made in (("then_branch", inner), ("else_branch", f"{inner}_else"))
    }
    chosen = b.op("If", b.op("Greater", b.op("ReduceMax", x, keepdims=0), b.constant("none", np.array(0, np.float32))), **branches)
    kinds_of(b, [chosen], tmp_path)


def test_one_number_behind_a_convolution(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 6, 7]})
    y = numbered(b, b.conv("x", 3, 4), ("Mul", 0.7), ("Add", -0.2), ("Div", 3.0), ("Sub", 0.1))
    assert kinds_of(b, [b.op("Tanh", y)], tmp_path) == ["Conv", "Tanh"]


@pytest.mark.parametrize("shape", [(5,), (1, 1, 1, 5), (1,)])
def test_a_scale_behind_a_matrix_product_and_its_bias(shape: tuple[int, ...], tmp_path: Path) -> None:
    """As networks scale their branches (ConvNeXt, CaiT)."""
    b, x = images()
    product = b.op("MatMul", b.op("Transpose", x, perm=[0, 2, 3, 1]), b.weight("w", (4, 5), 4))
    y = b.op("Mul", b.op("Add", product, b.constant("bias", np.linspace(1, 2, 5).astype(np.float32))), b.weight("scale", shape, 1))
    assert "Mul" not in kinds_of(b, [b.op("Tanh", y)], tmp_path)


def test_a_scale_that_adds_axes_stays(tmp_path: Path) -> None:
    b, x = images()
    product = b.op("MatMul", b.op("Flatten", b.op("GlobalAveragePool", x)), b.weight("w", (4, 5), 4))
    assert "Mul" in kinds_of(b, [b.op("Tanh", b.op("Mul", product, b.weight("scale", (1, 1, 1, 5), 1)))], tmp_path)


def test_heads_that_share_their_weights_keep_their_scales(tmp_path: Path) -> None:
    b, x = images()
    w = b.weight("w", (4, 4, 1, 1), 4)
    heads = [numbered(b, b.op("Conv", y, w), ("Mul", number)) for y, number in ((x, 0.5), (b.op("Exp", x), 0.7))]
    assert kinds_of(b, heads, tmp_path).count("Mul") == 2
