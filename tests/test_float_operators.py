"""What runs in float is listed by name, with the reason that is true for it."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from exporters import export_qdq, write_model
from tests import zoo
from toolchain import runtime
from toolchain.cli import main
from toolchain.config import Config
from toolchain.float_operators import FloatOperator, float_operators
from toolchain.pipeline import quantize


def left(model: onnx.ModelProto, folder: Path, **options: object) -> list[FloatOperator]:
    source = zoo.loaded(model, folder)
    config = Config(**{"algorithm": "minmax", "device": "cpu", **options})  # pyright: ignore[reportArgumentType]
    shape = tuple(int(axis or 0) for axis in source.inputs[0].shape[1:])
    found = quantize(source, zoo.images(4, shape), config)
    write_model(export_qdq(source.model, found.table, scheme=config.scheme), folder / "q.onnx")
    return list(float_operators(runtime.optimized(folder / "q.onnx")))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("make", [zoo.tiny_resnet, zoo.every_rule, zoo.detector])
def test_nothing_of_a_network_for_ort_cpu_runs_in_float(make: Callable[[], onnx.ModelProto], bits: int, tmp_path: Path) -> None:
    assert left(make(), tmp_path, weight_bits=bits, activation_bits=bits) == []


def test_reasons(tmp_path: Path) -> None:
    packed = left(zoo.tiny_resnet(), tmp_path, storage="small", first_last_bits="same")
    assert {row.reason for row in packed if "Conv" in row.op_type} == {"its weight is stored as int4, which no integer kernel reads"}
    assert all(row.node.startswith("node_") for row in packed if "Conv" in row.op_type)
    wide = left(zoo.tiny_resnet(), tmp_path, activation_bits=16)
    assert {row.reason for row in wide if "Conv" in row.op_type} == {"it reads 16-bit values, for which there are no integer kernels"}
    addends = left(zoo.tiny_resnet(), tmp_path, target="academic", weight_scheme="symmetric", weight_bits=8, activation_bits=8)
    assert any(row.op_type == "FusedConv" and row.reason.startswith("it reads 'conv") for row in addends)  # with the Add in it
    assert any("Conv" in row.op_type and row.reason.endswith("is read in float") for row in addends)


def test_what_is_laid_out_in_blocks_has_the_names_of_the_model(tmp_path: Path) -> None:
    """ONNX Runtime makes a convolution of a BatchNormalization between others in float, and calls values `reorder_token_1`."""
    b = zoo.Builder({"x": ["N", 16, 8, 8]})
    first = b.op("Relu", b.conv("x", 16, 16), name="first")
    parameters = [b.constant(name, np.linspace(0.5, 1.5, 16).astype(np.float32)) for name in ("scale", "shift", "mean", "variance")]
    normal = b.op("BatchNormalization", first, *parameters, name="normal")
    last = b.conv(b.op("Relu", normal), 16, 16)
    rows = left(b.model(b.head(b.op("Relu", last), 16)), tmp_path, keep_float=("Conv",))
    assert [(row.node, row.op_type, row.reason) for row in rows] == [
        ("first", "Conv", "it reads 'x' in float"),
        ("normal", "BatchNormalization", "it reads 'first' in float"),
        (last, "Conv", "it reads 'normal' in float"),
    ]


def test_operators_without_an_integer_form(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.op("ReduceL2", b.conv("x", 3, 8, act="relu"), axes=[2, 3], keepdims=0, name="norm")
    (row,) = left(b.model(b.op("Softmax", b.linear(x, 8, 5), name="scores")), tmp_path)[:1]
    assert (row.node, row.op_type, row.reason) == ("node_norm", "ReduceL2", "ONNX Runtime fuses no integer ReduceL2")
    last = left(b.model("scores"), tmp_path)[-1]
    assert (last.node, last.op_type) == ("node_scores", "Softmax")
    assert last.reason.endswith("in float")


def test_the_largest_of_codes_is_a_code(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.op("ReduceMax", b.conv("x", 3, 8, act="relu"), axes=[2, 3], keepdims=0)
    assert not [row for row in left(b.model(b.linear(x, 8, 5)), tmp_path) if row.op_type == "ReduceMax"]


def test_arithmetic_on_shapes_is_none(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    y = b.conv("x", 3, 8, act="relu")
    half = b.op("Div", b.op("Gather", b.op("Shape", y), b.constant("first", np.array([0]))), b.constant("two", np.array([2])))
    flat = b.op("Reshape", y, b.op("Concat", b.op("Mul", half, "two"), b.constant("rest", np.array([-1])), axis=0))
    assert not left(b.model(b.linear(flat, 512, 5)), tmp_path)


def test_a_float_model_reads_floats() -> None:
    found = float_operators(zoo.tiny_resnet().graph)
    assert {row.op_type for row in found} >= {"Conv", "Add", "Gemm"}
    assert found[0].reason == "it reads 'x' in float"
    assert np.unique([row.node for row in found]).size == len(found)


def test_layers_that_are_executed_in_float_have_a_line_of_their_own(tmp_path: Path) -> None:
    """A transposed convolution without a bias, which no other row names, and a convolution that makes the output."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    y = b.op("Relu", b.op("ConvTranspose", b.conv("x", 3, 8, act="relu"), b.weight("up", (8, 8, 2, 2), 8), name="up_y", strides=[2, 2]))
    onnx.save(b.model(b.conv(y, 8, 4)), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=zoo.images(4).inputs["x"])
    arguments = ["quantize", str(tmp_path / "m.onnx"), "--algorithm", "minmax", "--calibration-data", str(tmp_path / "d.npz")]
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "runs in float  ConvTranspose node_up_y: ONNX Runtime fuses no integer ConvTranspose" in result.output
    assert re.search(r"runs in float  Conv node_conv\d: its result is a graph output and stays float", result.output)
    assert "<td>runs in float: ONNX Runtime fuses no integer ConvTranspose" in (tmp_path / "m.w4a4.report" / "report.html").read_text()


def test_a_convolution_that_took_the_name_of_its_normalization_is_one(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 16, 8, 8]})
    first = b.op("Relu", b.conv("x", 16, 16), name="first")
    last = b.op("Relu", b.op("Identity", b.conv(first, 16, 16), name="stage1_bn"), name="last")
    model = b.model(b.head(last, 16))
    rows = left(model, tmp_path, keep_float=("Conv",))
    assert {row.op_type for row in rows} == {"Conv"}
