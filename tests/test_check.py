"""The checker: what the exporter writes for a target passes that target's rules, and each rule names what breaks it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from exporters import export_qdq
from exporters.check import CHECKED, File, check
from tests import zoo
from toolchain.cli import main
from toolchain.config import Config
from toolchain.errors import UsageError
from toolchain.pipeline import quantize
from toolchain.wording import unnamed

SAMPLES = zoo.images(8)


def exported(target: str, folder: Path, **options: object) -> onnx.ModelProto:
    source = zoo.loaded(zoo.every_rule(), folder)
    config = Config(**{"target": target, "algorithm": "minmax", "device": "cpu", **options})  # pyright: ignore[reportArgumentType]
    return export_qdq(source.model, quantize(source, SAMPLES, config).table, scheme=config.scheme)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", CHECKED)
def test_what_we_write_for_a_target_passes_its_rules(target: str, bits: int, tmp_path: Path) -> None:
    found = check(exported(target, tmp_path, weight_bits=bits, activation_bits=bits), target)
    assert not [violation for violation in found if violation.is_error]
    if target == "ort-cpu":
        assert not found


def test_tensorrt_names_what_it_cannot_take(tmp_path: Path) -> None:
    rules = {v.rule for v in check(exported("ort-cpu", tmp_path), "tensorrt") if v.is_error}
    assert "int32 is not dequantized: biases must be float" in rules
    assert "uint8 is read as int8: use int8 around zero" in rules
    assert "zero points must be 0" in rules
    assert "nothing may stand between QuantizeLinear and DequantizeLinear" in rules  # the integer Clip
    nodes = {v.node for v in check(exported("ort-cpu", tmp_path), "tensorrt") if v.rule == "zero points must be 0"}
    assert "x_QuantizeLinear" in nodes


def test_qnn_wants_everything_quantized(tmp_path: Path) -> None:
    rules = {(v.op_type, v.rule) for v in check(exported("academic", tmp_path), "qnn")}
    assert ("Conv", "its bias is float: ONNX Runtime rounds it to int32 with scale s_x * s_w by itself") in rules
    assert any(kind == "MatMul" and rule.startswith("a scale for each channel of a matrix product") for kind, rule in rules)
    assert any(rule == "it reads a float value: the HTP runs quantized operators only" for _, rule in rules)
    assert any(rule.startswith("it makes a graph output in float") for _, rule in rules)


def test_qnn_leaves_arithmetic_on_shapes_alone_but_wants_fixed_ones(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    y = b.conv("x", 3, 8, act="relu")
    count = b.op("Gather", b.op("Shape", y), b.constant("first", np.array([0])))
    rows = b.op("Div", count, b.constant("two", np.array([2])))  # no axis of the result can be told ahead
    flat = b.op("Reshape", y, b.op("Concat", b.op("Mul", rows, "two"), b.constant("rest", np.array([-1])), axis=0))
    model = b.model(b.linear(flat, 512, 5))
    source = zoo.loaded(model, tmp_path)
    config = Config(target="qnn", algorithm="minmax", device="cpu")
    exported = export_qdq(source.model, quantize(source, SAMPLES, config).table, scheme=config.scheme)
    assert {"Div", "Mul"} <= {node.op_type for node in exported.graph.node}
    assert [(v.node, v.effect, v.rule.split(":")[0]) for v in check(exported, "qnn") if v.op_type != "Gemm"] == [("x", "slow", "open axes")]
    exported.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    assert not [v for v in check(exported, "qnn") if v.node == "x"]


def changed(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    next(t for t in model.graph.initializer if t.name == name).CopyFrom(numpy_helper.from_array(array, name))


def layer(kind: int, weight: tuple[int, ...] = (4, 4), block: int = 0, op_type: str = "MatMul") -> onnx.ModelProto:
    """A layer whose weight is dequantized from codes of a kind, in blocks or not."""
    shape = (weight[0] // block, *weight[1:]) if block else ()
    scale = numpy_helper.from_array(np.full(shape, 0.5, np.float32), "scale")
    codes = onnx.helper.make_tensor("codes", kind, weight, np.zeros(weight, np.int8).ravel())
    blocks: dict[str, Any] = {"axis": 0, "block_size": block} if block else {}
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], "weight", **blocks),
        onnx.helper.make_node(op_type, ["x", "w"], ["y"], "layer"),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y")]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [codes, scale]))


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (layer(onnx.TensorProto.INT4, block=2), None),
        (layer(onnx.TensorProto.INT4), "int4 is for block-wise weights of matrix products only"),
        (layer(onnx.TensorProto.INT4, (4, 4, 1, 1), 2, "Conv"), "int4 is for block-wise weights of matrix products only"),
        (layer(onnx.TensorProto.INT8, block=2), "blocks are for int4 weights only, and these are INT8"),
        (layer(onnx.TensorProto.UINT4, block=2), "UINT4 is not supported: int8, int4 and float8e4m3fn are"),
    ],
    ids=["blocks", "channel", "convolution", "bytes", "unsigned"],
)
def test_what_tensorrt_takes_in_blocks(model: onnx.ModelProto, rule: str | None) -> None:
    assert {v.rule for v in check(model, "tensorrt") if v.is_error} >= ({rule} if rule else set())
    assert bool([v for v in check(model, "tensorrt") if v.is_error]) == (rule is not None)


def test_blocks_for_tensorrt_leave_the_rest_in_bytes(tmp_path: Path) -> None:
    """Convolutions, the 8-bit ends, and products that blocks do not fill."""
    model = exported("tensorrt", tmp_path, weight_bits=4, activation_bits=32, block_size=16, storage="small")
    assert not [v for v in check(model, "tensorrt") if v.is_error]
    kinds = {t.data_type for t in model.graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    same = exported("tensorrt", tmp_path, weight_bits=4, activation_bits=32, block_size=16, storage="small", first_last_bits="same")
    assert onnx.TensorProto.INT4 in {t.data_type for t in same.graph.initializer}
    assert not [v for v in check(same, "tensorrt") if v.is_error]
    refused: tuple[dict[str, Any], ...] = ({"weight_bits": 4}, {"weight_bits": 8, "storage": "small"})
    for options in refused:
        with pytest.raises(UsageError, match="TensorRT takes blocks of int4 weights only"):
            exported("tensorrt", tmp_path, activation_bits=32, block_size=16, **options)


def test_other_tools_files_are_read_as_runtimes_read_them(tmp_path: Path) -> None:
    """Parameters in Constant nodes, DequantizeLinear without zero points, and weights that are quantized when the file is loaded."""
    model = exported("tensorrt", tmp_path, weight_bits=8, activation_bits=8)
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:  # a weight: from floats
            codes, scale = (numpy_helper.to_array(tensors[name]) for name in node.input[:2])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            floats = codes * scale.reshape([-1 if i == axis else 1 for i in range(codes.ndim)] if scale.ndim else [])
            changed(model, node.input[0], floats.astype(np.float32))
            made = onnx.helper.make_node("QuantizeLinear", list(node.input), [f"{node.output[0]}_made"], f"{node.name}_made")
            made.attribute.extend(node.attribute)
            node.input[0] = made.output[0]
            graph.node.insert(0, made)
        if node.op_type == "DequantizeLinear":
            del node.input[2:]  # the kind is that of the QuantizeLinear in front
    scales = [tensor for name, tensor in tensors.items() if name.endswith(("_scale", "_zero_point"))]
    for tensor in scales:
        graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
        graph.initializer.remove(tensor)
    for target in ("tensorrt", "openvino"):
        assert not [v for v in check(model, target) if v.is_error]
    weight = next(node for node in graph.node if node.name.endswith("_made"))
    weight.input[1] = next(scale.name for scale in scales if scale.name.endswith("_scale") and scale.name != weight.input[1])
    assert any("differs from that of the QuantizeLinear in front" in v.rule for v in check(model, "tensorrt") if v.is_error)
    assert len(list(File(model).weighted())) == len(list(File(exported("tensorrt", tmp_path, weight_bits=8, activation_bits=8)).weighted()))


def test_qnn_says_what_it_computes_otherwise(tmp_path: Path) -> None:
    model = exported("qnn", tmp_path, weight_bits=8, activation_bits=8)
    assert not [v for v in check(model, "qnn") if v.effect == "inexact"]
    assert not [v for v in check(model, "qnn") if "more than one activation" in v.rule]
    biases = [t.name for t in model.graph.initializer if t.name.endswith("_b_scale")]
    changed(model, biases[0], 2 * numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == biases[0])))
    assert [v.rule for v in check(model, "qnn") if v.effect == "inexact"] == [
        "the scale of its bias is not s_x * s_w: the HTP takes that one instead"
    ]
    source, config = zoo.loaded(zoo.tiny_resnet(), tmp_path), Config(target="qnn", algorithm="minmax", device="cpu")
    low = export_qdq(source.model, quantize(source, SAMPLES, config).table, scheme=config.scheme)
    found = [v for v in check(low, "qnn") if "more than one activation" in v.rule]
    assert {(v.op_type, v.effect) for v in found} == {("Conv", "slow")}  # a Clip to 4 bits behind the Relu


def test_packed_formats(tmp_path: Path) -> None:
    small = exported("ort-cpu", tmp_path, weight_bits=2, activation_bits=16, storage="small", first_last_bits="same")
    assert any(v.rule == "DequantizeLinear of INT2 is not supported" and v.is_error for v in check(small, "openvino"))
    assert any("INT2 constants are not supported" in v.rule for v in check(small, "qnn"))
    assert not [v for v in check(small, "ort-cpu") if v.is_error]  # beside 16-bit activations it loads
    for tensor in small.graph.initializer:
        if tensor.data_type == onnx.TensorProto.UINT16:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.uint8), tensor.name))
    assert any("fuse into a kernel that does not exist" in v.rule for v in check(small, "ort-cpu") if v.is_error)


def test_block_wise_weights_on_the_htp(tmp_path: Path) -> None:
    """Refused beside floats; beside 16 bits by the size of the block."""
    source = zoo.loaded(zoo.every_rule(), tmp_path)
    tables = [
        quantize(source, SAMPLES, Config(algorithm="minmax", device="cpu", weight_bits=4, **options)).table  # pyright: ignore[reportArgumentType]
        for options in ({"activation_bits": 32, "block_size": 16}, {"activation_bits": 16})
    ]
    rules = {v.rule for v in check(export_qdq(source.model, tables[0]), "qnn") if v.is_error}
    assert "block-wise weights need activations of 16 bits (and version 2.4 of the execution provider)" in rules
    blocks = {name: grid for name, grid in tables[0].tensors.items() if grid.spec.block is not None}
    mixed = export_qdq(source.model, tables[1].updated(blocks))
    assert not [v for v in check(mixed, "qnn") if "block" in v.rule]
    for node in mixed.graph.node:
        for attribute in node.attribute:
            if attribute.name == "block_size":
                attribute.i = 18
    assert any(v.rule.endswith("must be a multiple of 4") for v in check(mixed, "qnn") if v.is_error)


def test_speed_is_lost_where_a_result_is_not_quantized(tmp_path: Path) -> None:
    found = check(exported("academic", tmp_path, weight_bits=8, activation_bits=8), "ort-cpu")
    slow = [v for v in found if v.rule.startswith("its result is not quantized")]
    assert slow
    assert not any(v.is_error for v in slow)


@pytest.mark.parametrize("value", [0.0, np.inf, 1e-42])
def test_unsound_scales(value: float, tmp_path: Path) -> None:
    model = exported("portable", tmp_path)
    tensor = next(t for t in model.graph.initializer if t.name == "x_scale")
    tensor.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), "x_scale"))
    found = check(model, "openvino")
    assert {v.node for v in found if "zeros, infinities or denormal" in v.rule} == {"x_QuantizeLinear", "x_DequantizeLinear"}


def test_a_float_file_is_no_qdq_file() -> None:
    assert [v.rule for v in check(zoo.tiny_resnet(), "tensorrt")] == [
        "the file has no QuantizeLinear or DequantizeLinear: it is not a QDQ file"
    ]


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "160"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_command(tmp_path: Path) -> None:
    onnx.save(exported("portable", tmp_path), tmp_path / "q.onnx")
    passed = invoke("check", tmp_path / "q.onnx", "--target", "tensorrt")
    assert passed.exit_code == 0, passed.output
    assert "q.onnx keeps to the rules of tensorrt" in passed.output
    onnx.save(exported("ort-cpu", tmp_path), tmp_path / "q.onnx")
    failed = invoke("check", tmp_path / "q.onnx", "--target", "tensorrt")
    assert failed.exit_code == 9
    assert "x_QuantizeLinear" in failed.output
    assert "breaks the rules of tensorrt" in failed.output
    assert invoke("check", tmp_path / "q.onnx", "--target", "coreml").exit_code == 2
    assert invoke("check", tmp_path / "nothing.onnx", "--target", "qnn").exit_code == 2
    (tmp_path / "text.onnx").write_text("no model")
    assert invoke("check", tmp_path / "text.onnx", "--target", "qnn").exit_code == 3


def test_alike_nodes_are_one_line_and_the_runtime_is_asked(tmp_path: Path) -> None:
    model = exported("academic", tmp_path, weight_bits=8, activation_bits=8)
    onnx.save(model, tmp_path / "q.onnx")
    few, whole = (invoke("check", tmp_path / "q.onnx", "--target", "ort-cpu", *flags).output for flags in ((), ("-v",)))
    weights = [v.node for v in check(model, "ort-cpu") if v.rule.startswith("weights with zero points")]
    assert f"slow: {len(weights)} DequantizeLinear: weights with zero points" in few
    assert [f"    {name}" in few for name in weights] == [True] * 3 + [False] * (len(weights) - 3)
    assert f"and {len(weights) - 3} more" in few
    assert all(f"    {name}" in whole for name in weights)
    assert "runs in float: " in few  # of operators that no written rule is about
    assert few.splitlines()[-1].endswith("nodes at the cost of speed")


def test_a_file_that_the_runtime_refuses(tmp_path: Path) -> None:
    model = exported("ort-cpu", tmp_path)
    next(node for node in model.graph.node if node.op_type == "Conv").domain = "unknown.domain"
    model.opset_import.append(onnx.helper.make_opsetid("unknown.domain", 1))
    onnx.save(model, tmp_path / "q.onnx")
    refused = invoke("check", tmp_path / "q.onnx", "--target", "ort-cpu")
    assert refused.exit_code == 9
    assert "cannot load the model" in refused.output


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("it reads 'a b' in float", ("it reads a value in float", "a b")),
        ("its result 'y' is read in float", ("its result is read in float", "y")),
        ("ONNX Runtime did not fuse it", ("ONNX Runtime did not fuse it", "")),
    ],
)
def test_reasons_are_counted_without_the_value_they_name(reason: str, expected: tuple[str, str]) -> None:
    assert unnamed(reason) == expected


def test_what_runtimes_take_is_not_refused() -> None:
    """Blocks of packed weights on the HTP, beside 16 bits; E5M2 weights in OpenVINO; a zero point [1] of a scale []."""
    packed = layer(onnx.TensorProto.UINT4, block=2)
    assert not any("constants are not supported" in v.rule for v in check(packed, "qnn"))
    assert any("constants are not supported" in v.rule for v in check(layer(onnx.TensorProto.UINT4), "qnn"))
    assert not [v for v in check(layer(onnx.TensorProto.FLOAT8E5M2), "openvino") if v.is_error]
    assert [v for v in check(layer(onnx.TensorProto.FLOAT8E5M2FNUZ), "openvino") if v.is_error]
    model = layer(onnx.TensorProto.INT8)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int8), "zero"))
    model.graph.node[0].input.append("zero")
    assert not [v for v in check(model, "openvino") if v.is_error]
