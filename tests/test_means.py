"""Means over all of space: one operator, with an integer kernel, and the same numbers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exporters import export_qdq
from tests import zoo
from tests.parity import executed
from toolchain import runtime
from toolchain.config import Config
from toolchain.kernels import check_kernels
from toolchain.normalise import normalised
from toolchain.pipeline import quantize


def squeezed(axes: Sequence[int], keeps: int = 1, opset: int = 17) -> onnx.ModelProto:
    """Squeeze and excitation as timm writes it: a mean, two 1x1 convolutions, and a gate."""
    b = zoo.Builder({"x": ("N", 3, 8, 8)}, opset=opset)
    x = b.conv("x", 3, 8, act="relu")
    if opset < 18:
        mean = b.op("ReduceMean", x, name="mean", axes=list(axes), keepdims=keeps)
    else:
        mean = b.op("ReduceMean", x, b.constant("axes", np.array(axes)), name="mean", keepdims=keeps)
    if not keeps:
        mean = b.op("Reshape", mean, b.constant("back", np.array([0, 0, 1, 1] if tuple(axes) != (1, 2) else [0, 8, 1, 1])))
    gate = b.op("Sigmoid", b.conv(b.conv(mean, 8, 4, kernel=1, act="relu"), 4, 8, kernel=1))
    return b.model(b.head(b.conv(b.op("Mul", x, gate), 8, 8), 8))


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
@pytest.mark.parametrize("keeps", [0, 1])
@pytest.mark.parametrize("axes", [(2, 3), (-1, -2), (3, -2)])
def test_a_mean_over_space_is_a_pooling(axes: tuple[int, ...], keeps: int, opset: int, tmp_path: Path) -> None:
    model = squeezed(axes, keeps, opset)
    source = zoo.loaded(model, tmp_path)
    kinds = Counter(node.op_type for node in source.model.graph.node)
    assert (kinds["ReduceMean"], kinds["GlobalAveragePool"]) == (0, 2)
    assert next(node.op_type for node in source.model.graph.node if node.name == "node_mean") == "GlobalAveragePool"
    inputs = dict(zoo.images(8).inputs)
    a, b = executed(model, inputs), executed(source.model, inputs)
    for name, value in a.items():  # sums of 64 numbers in another order
        np.testing.assert_allclose(b[name], value, rtol=1e-4, atol=1e-5)
    found = quantize(source, zoo.images(16), Config(weight_bits=8, activation_bits=8, algorithm="minmax", device="cpu"))
    exported = export_qdq(source.model, found.table)
    onnx.save(exported, tmp_path / "quantized.onnx")
    counts = Counter(node.op_type for node in runtime.optimized(tmp_path / "quantized.onnx", runtime.CPU).node)
    assert counts["QLinearGlobalAveragePool"] == 2
    assert counts["ReduceMean"] == 0
    assert check_kernels(exported, inputs).steps <= 1


OTHERS: list[tuple[tuple[int, ...], list[int] | None]] = [
    *[((3, 8, 8), axes) for axes in ([1, 2], [3], [1, 2, 3], None)],  # channels last, of features, of all, by default of all
    ((5, 6), [2]),
]


@pytest.mark.parametrize(("shape", "axes"), OTHERS)
def test_other_means_stay(shape: tuple[int, ...], axes: list[int] | None, tmp_path: Path) -> None:
    b = zoo.Builder({"x": ("N", *shape)})
    given: dict[str, Any] = {} if axes is None else {"axes": axes}
    model = normalised(b.model(b.op("Neg", b.op("ReduceMean", b.op("Relu", "x"), name="mean", **given))), tmp_path / "m.onnx")
    assert [node.op_type for node in model.graph.node] == ["Relu", "ReduceMean", "Neg"]


def test_three_axes_of_space(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ("N", 3, 4, 4, 4)})
    model = b.model(b.op("ReduceMean", b.op("Relu", "x"), axes=[2, 3, 4], keepdims=0))
    found = normalised(model, tmp_path / "m.onnx")
    assert [node.op_type for node in found.graph.node] == ["Relu", "GlobalAveragePool", "Flatten"]
    inputs = {"x": np.random.default_rng(0).normal(size=(2, 3, 4, 4, 4)).astype(np.float32)}
    (wanted,), (made,) = executed(model, inputs).values(), executed(found, inputs).values()
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-6)  # sums of 64 numbers in another order


@pytest.mark.parametrize(("kind", "is_pooled"), [("FLOAT16", True), ("DOUBLE", False), ("INT32", False)])
def test_types_that_are_not_pooled_keep_their_mean(kind: str, is_pooled: bool, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider has no GlobalAveragePool of double, and ONNX none of integers."""
    b = zoo.Builder({"x": ("N", 3, 8, 8)})
    x = b.conv("x", 3, 6, act="relu")
    mean = b.op("Cast", b.op("ReduceMean", b.op("Cast", x, to=TensorProto.DataType.Value(kind)), axes=[2, 3]), to=TensorProto.FLOAT)
    source = zoo.loaded(b.model(b.head(b.conv(b.op("Mul", x, mean), 6, 6), 6)), tmp_path)
    assert Counter(node.op_type for node in source.graph.nodes)["GlobalAveragePool"] == 1 + is_pooled
    runtime.session(source.model)
