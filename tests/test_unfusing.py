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
from toolchain.samples import Samples
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


def unchanged(model: onnx.ModelProto, folder: Path, inputs: Mapping[str, np.ndarray], left: str = "") -> SourceModel:
    """The loaded model, which computes what the file does, of standard operators and one kind that is left."""
    source = zoo.loaded(model, folder)
    assert {node.op_type for node in source.model.graph.node if node.domain} == ({left} if left else set())
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


def encoder(b: zoo.Builder, mask: str, **attributes: Any) -> str:
    """Attention over a layer of embeddings, and a layer behind it."""
    weight, bias = b.weight("qkv", (8, 24), 8), b.constant("qkv_bias", np.linspace(-1, 1, 24).astype(np.float32))
    y = b.op("Attention", "x", weight, bias, mask, num_heads=2, **attributes, **FUSED)
    return b.op("MatMul", y, b.weight("out", (8, 5), 8))


@pytest.mark.parametrize("attributes", [{}, {"unidirectional": 1}, {"scale": 0.2}, {"qkv_hidden_sizes": [8, 8, 8]}])
@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_begins_with_a_projection(attributes: dict[str, Any], is_masked: bool, tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 6, 8], "mask": ["N", 6]} if is_masked else {"x": ["N", 6, 8]})
    b.dtypes["mask"] = TensorProto.INT32
    model = b.model(encoder(b, "mask" if is_masked else "", **attributes))
    rng = np.random.default_rng(0)
    inputs = {"x": rng.normal(size=(4, 6, 8)).astype(np.float32)}
    inputs |= {"mask": (np.arange(6) < np.array([[6], [3], [1], [5]])).astype(np.int32)} if is_masked else {}
    source = unchanged(model, tmp_path, inputs, "MultiHeadAttention")
    assert [node.op_type for node in source.graph.weighted] == ["MatMul", "MatMul"]
    # What torch makes of it was held against ONNX Runtime while it was imported, and is left to it where it cannot.
    found = quantize(source, Samples(inputs), Config(algorithm="mse", weight_bits=8, activation_bits=8, device="cpu"))
    assert bool(found.islands) == ("unidirectional" in attributes)


@pytest.mark.parametrize(("has_segments", "has_places"), [(True, False), (False, True)])
def test_embeddings_are_looked_up_and_lengths_mask(has_segments: bool, has_places: bool, tmp_path: Path) -> None:
    """What the optimizer for transformers makes of BERT: the mask counted to lengths, which Attention reads."""
    rng = np.random.default_rng(0)
    inputs = {"ids": rng.integers(0, 40, (4, 6)).astype(np.int32), "mask": (np.arange(6) < np.array([[6], [3], [1], [5]])).astype(np.int32)}
    inputs |= {"segments": rng.integers(0, 2, (4, 6)).astype(np.int32)} if has_segments else {}
    inputs |= {"places": rng.integers(0, 12, (4, 6)).astype(np.int32)} if has_places else {}
    b = zoo.Builder({name: ["N", 6] for name in inputs})
    b.dtypes |= dict.fromkeys(inputs, TensorProto.INT32)
    tables = [b.weight("words", (40, 8), 8), b.weight("positions", (12, 8), 8), b.weight("types", (2, 8), 8) if has_segments else ""]
    scales = [b.constant(name, np.linspace(low, 1, 8).astype(np.float32)) for name, low in (("scale", 0.5), ("shift", -1))]
    given = ["ids", "segments" if has_segments else "", *tables, *scales, "mask", *(["places"] if has_places else [])]
    b.op("EmbedLayerNormalization", *given, name="embedded", outputs=2, **FUSED)
    b.nodes[-1].output[0] = "x"  # what the encoder reads
    model = b.model(encoder(b, "embedded_1"))
    source = unchanged(model, tmp_path, inputs, "MultiHeadAttention")
    found = quantize(source, Samples(inputs), Config(algorithm="mse", weight_bits=8, activation_bits=8, device="cpu"))
    assert not found.islands


def test_attention_with_a_mask_of_another_kind_is_left(tmp_path: Path) -> None:
    """Ends and starts of samples, [2N], are no lengths."""
    b = zoo.Builder({"x": ["N", 6, 8], "mask": ["M"]})
    b.dtypes["mask"] = TensorProto.INT32
    source = zoo.loaded(b.model(encoder(b, "mask")), tmp_path)
    assert [node.op_type for node in source.graph.nodes] == ["Attention", "MatMul"]


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
