"""Matrix products and what they add: whatever the file writes, each ends up on an integer kernel and computes what it did."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters import export_qdq, write_model
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.pipeline import quantize
from toolchain.samples import Samples
from toolchain.source import SourceModel

SAMPLES = Samples({"x": np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)})


def executed(source: SourceModel, folder: Path) -> set[str]:
    """The operators that ONNX Runtime executes of the quantized model."""
    table = quantize(source, SAMPLES, Config(algorithm="mse", weight_bits=8, activation_bits=8, device="cpu")).table
    write_model(export_qdq(source.model, table), folder / "quantized.onnx")
    return {node.op_type for node in runtime.optimized(folder / "quantized.onnx").node}


def unchanged(model: onnx.ModelProto, source: SourceModel) -> None:
    wanted, found = (runtime.run(runtime.session(one), SAMPLES.inputs) for one in (model, source.model))
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5, rtol=0)  # float32 sums in another order


@pytest.mark.parametrize("as_gemm", [True, False])
def test_a_residual_is_added_by_an_add_of_its_own(as_gemm: bool, tmp_path: Path) -> None:
    """ONNX Runtime makes a Gemm of MatMul and Add, which it has in float only where what is added is computed."""
    b = zoo.Builder({"x": ["N", 16]})
    hidden = b.op("Relu", b.op("MatMul", "x", b.weight("first", (16, 32), 16)))
    weight = b.weight("second", (32, 16), 32)
    y = b.op("Gemm", hidden, weight, "x") if as_gemm else b.op("Add", "x", b.op("MatMul", hidden, weight))
    model = b.model(b.op("MatMul", y, b.weight("last", (16, 4), 16)))
    source = zoo.loaded(model, tmp_path)
    unchanged(model, source)
    assert not {"Gemm", "MatMul", "FusedGemm", "Add"} & executed(source, tmp_path)


@pytest.mark.parametrize("shape", [[], [1], [1, 1], [8], [1, 8]])
@pytest.mark.parametrize(("beta", "trans"), [(1.0, 0), (0.5, 1), (0.0, 0)])
def test_a_bias_is_one_number_for_each_channel(shape: list[int], beta: float, trans: int, tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 16]})
    bias = b.constant("bias", np.linspace(0.5, 1, int(np.prod(shape))).reshape(shape).astype(np.float32))
    weight = b.weight("first", (8, 16) if trans else (16, 8), 16)
    y = b.op("Relu", b.op("Gemm", "x", weight, bias, beta=beta, transB=trans))
    model = b.model(b.op("MatMul", y, b.weight("last", (8, 4), 8)))
    source = zoo.loaded(model, tmp_path)
    unchanged(model, source)
    layer = source.graph.weighted[0]
    found = source.graph.bias(layer)
    assert (found is None) == (beta == 0.0)
    assert found is None or source.constants[found].size == 8
    assert not {"Gemm", "MatMul", "FusedGemm"} & executed(source, tmp_path)


def test_names_that_are_taken_stay(tmp_path: Path) -> None:
    """The product and the bias would be named after the result; where other values have these names, nothing is changed."""
    bias, residual = ("y_bias", np.zeros((), np.float32)), ("y_product", np.ones((1, 16), np.float32))
    for added, taken in ((bias, residual), (residual, bias)):
        b = zoo.Builder({"x": ["N", 16]})
        other = b.constant(*taken)
        weight = b.weight("w", (16, 16), 16)
        y = (
            b.op("Gemm", "x", weight, "x", name="y")
            if added is residual
            else b.op("Gemm", "x", weight, b.constant("c", added[1]), name="y")
        )
        model = b.model(b.op("Add", y, other) if taken is residual else b.op("Mul", y, other))
        unchanged(model, zoo.loaded(model, tmp_path))


def test_what_is_no_layer_keeps_what_it_adds(tmp_path: Path) -> None:
    """A Gemm of two computed matrices, one of a matrix that is added, and one that scales what is computed."""
    b = zoo.Builder({"x": [16, 16]})
    matrix = b.constant("matrix", np.eye(16, dtype=np.float32))
    first = b.op("Gemm", "x", "x", b.constant("one", np.ones((), np.float32)))
    second = b.op("Gemm", first, b.weight("w", (16, 16), 16), matrix)
    third = b.op("Gemm", second, b.weight("v", (16, 16), 16), "x", beta=0.5)
    model = b.model(third)
    source = zoo.loaded(model, tmp_path)
    assert [node.op_type for node in source.graph.nodes] == ["Gemm"] * 3
    assert [len(node.inputs) for node in source.graph.nodes] == [3] * 3
