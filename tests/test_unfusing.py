"""Files that ONNX Runtime's optimizer wrote are quantized as those that it read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporters import export_qdq
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.pipeline import quantize
from toolchain.source import SourceModel

FUSED: dict[str, Any] = {"domain": "com.microsoft"}
ACTIVATIONS: dict[str, list[float]] = {
    "Relu": [],
    "Sigmoid": [],
    "Tanh": [],
    "LeakyRelu": [0.2],
    "HardSigmoid": [0.3, 0.4],
    "Clip": [-0.5, 1.0],
}


def unchanged(model: onnx.ModelProto, folder: Path, inputs: Mapping[str, np.ndarray]) -> SourceModel:
    """The loaded model, which has standard operators alone and computes what the file does."""
    source = zoo.loaded(model, folder)
    assert {node.domain for node in source.model.graph.node} == {""}
    wanted, found = (runtime.run(runtime.session(one), inputs) for one in (model, source.model))
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5, rtol=0)  # float32 sums in another order
    return source


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("added", [False, True])
def test_fused_convolutions(activation: str, added: bool, tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    weight, bias = b.weight("w", (3, 3, 3, 3), 27), b.constant("b", np.linspace(-1, 1, 3).astype(np.float32))
    extra = ["x"] if added else []
    given: dict[str, Any] = {"activation_params": ACTIVATIONS[activation]} if ACTIVATIONS[activation] else {}
    y = b.op("FusedConv", "x", weight, bias, *extra, activation=activation, pads=[1] * 4, **given, **FUSED)
    source = unchanged(b.model(b.conv(y, 3, 4)), tmp_path, zoo.images(4).inputs)
    assert [node.op_type for node in source.graph.nodes] == ["Conv", *(["Add"] if added else []), activation, "Conv"]


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu"])
def test_fused_products(activation: str, tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 6]})
    given: dict[str, Any] = {"activation_alpha": 0.2} if activation == "LeakyRelu" else {}
    bias = b.constant("b", np.linspace(-1, 1, 5).astype(np.float32))
    y = b.op("FusedGemm", "x", b.weight("w", (5, 6), 6), bias, activation=activation, transB=1, **given, **FUSED)
    y = b.op("FusedMatMul", y, b.weight("v", (4, 5), 5), transB=1, alpha=0.5, **FUSED)
    model = b.model(y)
    source = unchanged(model, tmp_path, {"x": np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)})
    assert [node.op_type for node in source.graph.nodes] == ["Gemm", activation, "MatMul"]


def test_what_is_not_known_or_has_no_names_is_left(tmp_path: Path) -> None:
    """An activation that no standard operator is, a product whose other side is transposed, and names that are taken."""
    b = zoo.Builder({"x": [6, 6]})
    weight = b.weight("w", (6, 6), 6)
    turned = b.op("FusedMatMul", "x", weight, transA=1, **FUSED)
    taken = b.op("FusedMatMul", "x", weight, transB=1, name="taken", **FUSED)
    y = b.op("Add", b.op("Add", turned, taken), b.constant("taken_weight", np.ones(6, np.float32)))
    y = b.op("MatMul", y, b.weight("v", (6, 6), 6))
    source = zoo.loaded(b.model(y), tmp_path)
    assert [node.op_type for node in source.graph.nodes if node.domain] == ["FusedMatMul"] * 2


def test_a_file_of_extended_optimisations_runs_on_integers(tmp_path: Path) -> None:
    """The optimizer's own file, from a session as its users have it."""
    import onnxruntime as ort

    onnx.save(zoo.tiny_resnet(), tmp_path / "plain.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    ort.InferenceSession(str(tmp_path / "plain.onnx"), options, providers=["CPUExecutionProvider"])
    fused = onnx.load(tmp_path / "fused.onnx")
    assert "FusedConv" in {node.op_type for node in fused.graph.node}
    source = unchanged(fused, tmp_path, zoo.images(4).inputs)
    table = quantize(source, zoo.images(8), Config(algorithm="mse", device="cpu")).table
    onnx.save(export_qdq(source.model, table), tmp_path / "quantized.onnx")
    kinds = [node.op_type for node in runtime.optimized(tmp_path / "quantized.onnx").node]
    assert not {"Conv", "FusedConv", "NhwcFusedConv"} & set(kinds)


def test_a_layout_for_one_cpu_is_said_to_be_what_keeps_convolutions_float(tmp_path: Path) -> None:
    b = zoo.Builder({"x": [1, 16, 8, 8]})
    y = b.op("ReorderOutput", b.op("ReorderInput", "x", domain="com.microsoft.nchwc"), channels=16, domain="com.microsoft.nchwc")
    model = b.model(b.head(y, 16))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(model.graph.output[0].name, TensorProto.FLOAT, [1, 10]))
    source = zoo.loaded(model, tmp_path)
    assert any("nchwc" in note and "ORT_ENABLE_BASIC" in note for note in source.notes)
