"""Constants by channel are folded into the convolution that they follow, whatever axes are changed between."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    fold_channels(model.graph)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Squeeze", "Tanh"]
