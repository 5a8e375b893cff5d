"""Loading: the normalised model gives the source's outputs, keeps its names, and refuses what it cannot take."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.errors import UnsupportedModelError
from toolchain.islands import find_islands
from toolchain.pipeline import quantize
from toolchain.source import infer_types, load_source

SAMPLE = Path(__file__).parent.parent / "sample_models" / "mobilenetv2_x0.5_cifar10.onnx"


def outputs(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return list(runtime.run(runtime.session(model), feeds).values())


def with_batch_norm(opset: int = 17) -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 3, 8, 8]}, opset=opset)
    y = b.conv("x", 3, 8, bias=False)
    parameters = [
        b.constant(f"bn_{name}", np.linspace(low, 1, 8).astype(np.float32)) for name, low in zip("sbmv", (0.5, -1, -1, 0.2), strict=True)
    ]
    y = b.op("Relu", b.op("BatchNormalization", y, *parameters, name="bn_out"))
    # A BatchNormalization behind a Relu cannot be folded backwards.
    z = b.op("BatchNormalization", y, *parameters, name="late_bn")
    return b.model(b.head(z, 8))


def test_batch_norm_is_folded_where_it_is_exact_and_names_survive(tmp_path: Path) -> None:
    model = with_batch_norm()
    source = zoo.loaded(model, tmp_path)
    kinds = [node.op_type for node in source.graph.nodes]
    assert kinds.count("BatchNormalization") == 1
    assert source.graph.nodes[0].op_type == "Conv"
    assert source.graph.nodes[0].outputs == ("bn_out",)  # the folded value keeps the name that its readers use
    assert "conv0_w" in source.constants  # and the weight its own
    x = zoo.images(4).inputs
    np.testing.assert_allclose(outputs(source.model, x)[0], outputs(model, x)[0], atol=1e-5, rtol=0)  # float32 sums in another order


def test_sample_model_survives_normalisation() -> None:
    source = load_source(SAMPLE)
    x = zoo.images(4, (3, 32, 32), name="image").inputs
    np.testing.assert_allclose(outputs(source.model, x)[0], outputs(onnx.load(SAMPLE), x)[0], atol=1e-4, rtol=0)
    original = onnx.load(SAMPLE)
    names = {value for node in original.graph.node for value in node.output}
    new = {value for node in source.graph.nodes for value in node.outputs} - names
    assert new == {"/ReduceMean_output_0_pooled"}  # of a mean that is a pooling and a Flatten
    assert source.model.graph.input == original.graph.input
    assert source.model.graph.output == original.graph.output
    assert [entry.domain for entry in source.model.opset_import] == [entry.domain for entry in original.opset_import]


def test_constants_are_lifted_and_shape_arithmetic_folded(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    b.nodes.append(helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32))))
    b.nodes.append(helper.make_node("Identity", ["w"], ["w2"]))
    y = b.op("Conv", "x", "w2")
    batch = b.op("Gather", b.op("Shape", y), b.constant("zero", np.array(0, np.int64)))  # x.view(x.size(0), -1), as torch exports it
    batch = b.op("Unsqueeze", batch, b.constant("axis", np.array([0], np.int64)))
    shape = b.op("Concat", batch, b.constant("rest", np.array([-1], np.int64)), axis=0)
    model = b.model(b.op("Reshape", y, shape))
    source = zoo.loaded(model, tmp_path)
    assert {node.op_type for node in source.graph.nodes} == {"Conv", "Reshape"}
    assert len(source.graph.weighted) == 1


def test_nodes_get_unique_names(tmp_path: Path) -> None:
    model = zoo.tiny_resnet()
    for index, node in enumerate(model.graph.node):
        node.name = "" if index % 2 else "same"
    source = zoo.loaded(model, tmp_path)
    names = [node.name for node in source.graph.nodes]
    assert len(set(names)) == len(names)
    assert all(names)


def test_two_loads_are_byte_identical(tmp_path: Path) -> None:
    a, b = (zoo.loaded(zoo.tiny_resnet(), tmp_path).model.SerializeToString(deterministic=True) for _ in range(2))
    assert a == b


@pytest.mark.parametrize("opset", [9, 11, 12])
def test_old_opsets_are_raised(opset: int, tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]}, opset=opset, ir_version=4)
    model = b.model(b.head(b.conv("x", 3, 8, act="relu"), 8))
    source = zoo.loaded(model, tmp_path)
    assert source.opset == 13
    x = zoo.images(2).inputs
    np.testing.assert_allclose(outputs(source.model, x)[0], outputs(model, x)[0], atol=1e-5, rtol=0)


def test_initializers_as_graph_inputs(tmp_path: Path) -> None:
    """ir_version 3 files list every weight among the inputs."""
    model = zoo.tiny_resnet()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    source = zoo.loaded(model, tmp_path)
    assert [spec.name for spec in source.inputs] == ["x"]
    assert len(source.graph.weighted) == 7


def test_a_fixed_batch_can_be_run_on_any(tmp_path: Path) -> None:
    b = zoo.Builder({"x": [1, 3, 8, 8]})
    y = b.op("Reshape", b.conv("x", 3, 4, stride=2), b.constant("shape", np.array([1, 64], np.int64)))
    source = zoo.loaded(b.model(b.linear(y, 64, 5)), tmp_path)
    types = infer_types(source, {"x": (3, 8, 8)})
    assert types.shapes[source.graph.outputs[0]] == (5,)
    assert source.graph.outputs[0] in types.batched


def test_a_reshape_that_copies_other_axes_follows_the_batch_too(tmp_path: Path) -> None:
    """As PaddlePaddle writes them: 1 for the batch, 0 for the channels, and what is left."""
    b = zoo.Builder({"x": [1, 3, 8, 8]})
    y = b.op("ReduceMean", b.op("Reshape", b.conv("x", 3, 4), b.constant("shape", np.array([1, 0, -1], np.int64))), axes=[2], keepdims=0)
    assert infer_types(zoo.loaded(b.model(b.linear(y, 4, 5)), tmp_path), {"x": (3, 8, 8)}).batch is None


def test_the_shape_of_a_reshape_that_follows_the_batch_is_its_own(tmp_path: Path) -> None:
    """Though another operator reads what it was given, under the name that it would have."""
    b = zoo.Builder({"x": [1, 4, 4, 4]})
    shape = b.constant("flat_shape", np.array([1, 64]))
    flat = b.op("Reshape", b.conv("x", 4, 4, act="relu"), shape, name="flat")
    b.nodes[-1].name = "flat"
    source = zoo.loaded(
        b.model(b.op("Add", b.linear(flat, 64, 64), b.op("Expand", b.constant("one", np.ones((1, 1), np.float32)), shape))), tmp_path
    )
    samples = zoo.images(3, (4, 4, 4)).inputs["x"]
    session = runtime.session(source.model)
    assert runtime.run(session, {"x": samples})[source.graph.outputs[0]].shape == (3, 64)
    assert len({tensor.name for tensor in source.model.graph.initializer}) == len(source.model.graph.initializer)


def test_layers_that_share_a_bias_have_one_each(tmp_path: Path) -> None:
    """A head over two feature maps: one weight, and a bias whose int32 steps differ with the maps."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    b.constant("w", np.ones((4, 3, 3, 3), np.float32))
    b.constant("b", np.ones(4, np.float32))
    b.constant("b_1", np.ones((4, 3, 3, 3), np.float32))
    small = b.op("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2])
    heads = [b.op("GlobalMaxPool", b.op("Conv", x, weight, "b")) for x, weight in (("x", "w"), (small, "w"), ("x", "b_1"))]
    model = b.model(b.op("Concat", *heads, axis=1))
    source = zoo.loaded(model, tmp_path)
    assert [node.inputs[1:] for node in source.graph.weighted] == [("w", "b"), ("w", "b_2"), ("b_1", "b_3")]
    found = quantize(source, zoo.images(8), Config(algorithm="mse", device="cpu"))
    assert {"b", "b_2", "b_3"} <= found.placement.biases.keys()
    x = zoo.images(2).inputs
    np.testing.assert_array_equal(outputs(source.model, x)[0], outputs(model, x)[0])


def test_a_bias_that_another_operator_reads_too_is_copied_for_every_layer(tmp_path: Path) -> None:
    """torch's exporter joins the zeros of a patch embedding and of the LayerNormalization behind it."""
    b = zoo.Builder({"x": ["N", 4]})
    b.constant("zeros", np.zeros(4, np.float32))
    y = b.op("Gemm", "x", b.constant("w", np.ones((4, 4), np.float32)), "zeros")
    model = b.model(b.op("LayerNormalization", y, b.constant("ones", np.ones(4, np.float32)), "zeros"))
    source = zoo.loaded(model, tmp_path)
    assert [source.graph.bias(node) for node in source.graph.weighted] == ["zeros_1"]
    assert "zeros" in source.constants


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        ({"x": ["N", 3, 8, 8]}, {"x": 0}),
        ({"x": ["seq", "batch_size", 8]}, {"x": 1}),
        ({"x": [None, 40, 8], "h": [2, None, 8]}, {"x": 0, "h": 1}),
        ({"x": ["steps", "n", 8], "h": [2, "n", 8], "rate": []}, {"x": 1, "h": 1, "rate": None}),
        ({"x": [4, 8]}, {"x": 0}),
    ],
)
def test_the_axis_that_is_named_for_samples_counts_them(shapes: Mapping[str, Any], axes: Mapping[str, int | None]) -> None:
    assert runtime.sample_axes(shapes) == axes


@pytest.mark.parametrize(
    ("size", "mixes", "axis"), [(5, False, 0), (5, True, None), ("tokens", False, 0), ("tokens", True, None), (1, True, 0)]
)
def test_a_doubtful_axis_counts_samples_where_they_change_places_with_their_results(
    size: int | str, mixes: bool, axis: int | None, tmp_path: Path
) -> None:
    b = zoo.Builder({"x": [size, 6]})
    y = b.op("CumSum", "x", b.constant("zero", np.array(0))) if mixes else "x"
    source = zoo.loaded(b.model(b.linear(y, 6, 5)), tmp_path)
    assert [spec.axis for spec in source.inputs] == [axis]
    assert any("no axis" in note for note in source.notes) == (axis is None)


def test_nodes_of_a_graph_are_no_samples(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["nodes", 6], "neighbours": ["nodes", "nodes"]})
    source = zoo.loaded(b.model(b.op("MatMul", "neighbours", b.linear("x", 6, 5))), tmp_path)
    assert source.axes == {"x": None, "neighbours": None}


def test_only_sample_arrays_are_batched(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    y = b.conv("x", 3, 4)
    swapped = b.op("Transpose", y, perm=[1, 0, 2, 3])
    shape = b.op("Shape", y)
    back = b.op("Transpose", b.op("Sigmoid", swapped), perm=[1, 0, 2, 3])
    model = b.model(b.op("Reshape", back, shape))
    types = infer_types(zoo.loaded(model, tmp_path), {"x": (3, 8, 8)})
    assert y in types.batched
    assert swapped not in types.batched
    assert shape not in types.batched


def test_windows_folded_into_a_fixed_batch_follow_the_number_of_samples(tmp_path: Path) -> None:
    """[2, 3, 8, 8] in four windows each is [8, 3, 4, 4]: the reshape behind them says 2, and its first axis is no copy of 8."""
    b = zoo.Builder({"x": [2, 3, 8, 8]})
    split = b.op("Reshape", "x", b.constant("split", np.array([8, 3, 4, 4], np.int64)))
    y = b.op("Reshape", b.conv(split, 3, 3), b.constant("back", np.array([2, 192], np.int64)))
    model = b.model(b.linear(y, 192, 5))
    x = zoo.images(2).inputs
    source = zoo.loaded(model, tmp_path)
    found = outputs(source.model, x)[0]
    np.testing.assert_allclose(found, outputs(model, x)[0], atol=1e-5, rtol=0)  # float32 sums in another order
    assert infer_types(source, {"x": (3, 8, 8)}).batch is None


def tokens() -> onnx.ModelProto:
    """What torch exports for one sample: [1, 4, 6] by a linear layer over three axes, then flat, with `allowzero` as it always sets it."""
    b = zoo.Builder({"x": [1, 4, 6]})
    y = b.op("MatMul", "x", b.constant("w", np.linspace(-1, 1, 48).reshape(6, 8).astype(np.float32)))
    y = b.op("Add", y, b.constant("bias", np.ones(8, np.float32)))
    y = b.op("Reshape", b.op("Relu", y), b.constant("flat", np.array([1, 32], np.int64)), allowzero=1)
    return b.model(b.linear(y, 32, 5))


def test_a_model_exported_for_one_sample_runs_on_many_at_a_time(tmp_path: Path) -> None:
    source = zoo.loaded(tokens(), tmp_path)
    assert infer_types(source, {"x": (4, 6)}).batch is None


def test_constants_have_no_declared_shapes_beside_their_own(tmp_path: Path) -> None:
    """What is added as [4, 1, 1] becomes a Conv's bias [4]; shape inference stops at the shape that torch declared for it."""
    b = zoo.Builder({"x": [1, 3, 8, 8]})
    y = b.op("Add", b.conv("x", 3, 4, bias=False), b.constant("bias", np.ones((4, 1, 1), np.float32)))
    model = b.model(b.head(y, 4))
    model.graph.value_info.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, [4, 1, 1]))
    source = zoo.loaded(model, tmp_path)
    assert source.constants["bias"].shape == (4,)
    assert not source.constants.keys() & {info.name for info in source.model.graph.value_info}


def test_a_mask_taken_from_the_first_sample_keeps_the_model_to_one_at_a_time(tmp_path: Path) -> None:
    """Exported for one sample, a model may look at sample 0 by its number; only samples with another mask tell."""
    b = zoo.Builder({"x": [1, 6], "mask": [1, 6]})
    first = b.op("Gather", "mask", b.constant("zero", np.array([0], np.int64)), axis=0)
    source = zoo.loaded(b.model(b.linear(b.op("Mul", "x", first), 6, 5)), tmp_path)
    x, mask = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32), np.ones((64, 6), np.float32)
    mask[37, 4:] = 0
    assert infer_types(source, {"x": (6,), "mask": (6,)}, {"x": x, "mask": mask}).batch == 1
    assert infer_types(source, {"x": (6,), "mask": (6,)}, {"x": x, "mask": np.ones_like(mask)}).batch is None  # then it makes no difference


def test_what_the_runtime_fused_leaves_it_the_names_to_fuse_again(tmp_path: Path) -> None:
    """It names the shapes around a Gemm that it makes of MatMul and Add without looking, and refuses a model that has them already."""
    model = onnx.ModelProto()
    model.CopyFrom(zoo.loaded(tokens(), tmp_path).model)
    assert any(node.op_type == "Reshape" and "gemm_" in node.name for node in model.graph.node)  # it did fuse
    weight = next(tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [6, 8])
    model.graph.node.extend([helper.make_node("MatMul", ["x", weight], ["again"]), helper.make_node("Add", ["again", "bias"], ["sum"])])
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1, 4, 8]))
    assert [array.shape for array in outputs(model, {"x": np.ones((1, 4, 6), np.float32)})] == [(1, 5), (1, 4, 8)]


def test_projections_of_an_attention_are_layers_with_a_bias_as_other_linear_layers_are(tmp_path: Path) -> None:
    """ONNX Runtime leaves the projections of a float model as MatMul and Add, and makes them a Gemm in float where they read codes."""
    b = zoo.Builder({"x": [1, 4, 6]})
    scale, bias = b.constant("scale", np.ones(6, np.float32)), b.constant("bias", np.linspace(-1, 1, 6).astype(np.float32))

    def projected(x: str) -> str:
        return b.op("Add", b.op("MatMul", x, b.weight(f"w{len(b.nodes)}", (6, 6), 6)), bias)

    normed = b.op("LayerNormalization", "x", scale, bias)
    query, key, value = (projected(normed) for _ in range(3))
    weights = b.op("Softmax", b.op("MatMul", query, b.op("Transpose", key, perm=[0, 2, 1])))
    added = b.op("Add", projected(b.op("MatMul", weights, value)), normed)
    model = b.model(b.op("LayerNormalization", added, scale, bias))
    source = zoo.loaded(model, tmp_path)
    assert [node.op_type for node in source.graph.weighted] == ["Gemm"] * 4
    assert len({node.inputs[2] for node in source.graph.weighted}) == 4  # each has int32 steps of its own
    x = {"x": np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float32)}
    np.testing.assert_allclose(outputs(source.model, x)[0], outputs(model, x)[0], atol=1e-5, rtol=0)  # float32 sums in another order
    assert infer_types(source, {"x": (4, 6)}).batch is None


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_weights_are_made_dense(flat: bool, tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 6]})
    y = b.op("MatMul", "x", "w")
    model = b.model(b.linear(y, 4, 5))
    dense = np.zeros((6, 4), np.float32)
    dense[[0, 2, 5], [1, 3, 0]] = [0.5, -1.0, 2.0]
    places = np.flatnonzero(dense) if flat else np.argwhere(dense)
    values = numpy_helper.from_array(dense[dense != 0], "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(places.astype(np.int64), "w_places"), dense.shape)
    model.graph.sparse_initializer.append(sparse)
    source = zoo.loaded(model, tmp_path)
    np.testing.assert_array_equal(source.constants["w"], dense)
    assert len(source.graph.weighted) == 2
    x = zoo.images(3, (6,)).inputs
    np.testing.assert_allclose(outputs(source.model, x)[0], outputs(model, x)[0], atol=1e-5, rtol=0)  # float32 sums in another order


def quantized() -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 6]})
    b.op("DynamicQuantizeLinear", "x", name="q", outputs=3)
    y = b.op("MatMulInteger", "q_0", b.constant("w", np.ones((6, 4), np.int8)), "q_2")
    return b.model(b.op("Cast", y, to=TensorProto.FLOAT))


def partly_quantized() -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    q = b.op("QuantizeLinear", "x", b.constant("s", np.array(0.1, np.float32)), b.constant("z", np.array(0, np.uint8)))
    return b.model(b.conv(b.op("DequantizeLinear", q, "s", "z"), 3, 4))


def test_what_is_quantized_already_is_left_alone(tmp_path: Path) -> None:
    source = zoo.loaded(partly_quantized(), tmp_path)
    reasons = find_islands(source, infer_types(source, {"x": (3, 8, 8)}))
    assert set(reasons.values()) == {"QuantizeLinear is quantized already", "DequantizeLinear is quantized already"}


def without_weights() -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    return b.model(b.op("Relu", "x"))


def unknown_operator() -> onnx.ModelProto:
    node = helper.make_node("Mystery", ["x"], ["y"], "n", domain="nowhere")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("nowhere", 1)], ir_version=8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (quantized(), "quantized already"),
        (without_weights(), "it is made of .*; there is nothing to quantize"),
        (unknown_operator(), "cannot load"),
    ],
    ids=["quantized", "without weights", "unknown operator"],
)
def test_unsupported_models(model: onnx.ModelProto, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        zoo.loaded(model, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an onnx file at all", b"\x00" * 64, zoo.tiny_resnet().SerializeToString()[:-100]])
def test_broken_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=r"broken\.onnx: "):
        load_source(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no such file"):
        load_source(tmp_path / "none.onnx")
