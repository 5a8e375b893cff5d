"""Layers that stay float between quantized values stay so in ONNX Runtime too."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import exporters.qdq
from exporters import export_qdq
from exporters.diff import compare
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.diagnosis import diagnose
from toolchain.kernels import check_kernels, check_simulation
from toolchain.noise import sqnr
from toolchain.pipeline import quantize
from toolchain.quant_table import QuantTable
from toolchain.runtime import Optimization
from toolchain.samples import Samples
from toolchain.scheme import TARGETS
from toolchain.simulation import simulated_values
from toolchain.source import SourceModel

SAMPLES = zoo.images(16)


def chain(kind: str, is_shared: bool, act: str | None = "relu") -> onnx.ModelProto:
    """A layer of very different channels between two others; `is_shared`: a sum reads its input too."""
    b = zoo.Builder({"x": ("N", 3, 8, 8)})
    x = b.conv("x", 3, 8, act="relu")
    spread = np.geomspace(1e-3, 1, 8).astype(np.float32)
    if kind == "transposed":
        w = b.constant("w", np.random.default_rng(1).normal(size=(8, 8, 1, 1)).astype(np.float32) * spread[:, None, None])
        y = b.activation(b.op("ConvTranspose", x, w, b.constant("w_b", spread), name="middle"), act)
    elif kind == "gemm":
        rows = b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 3, 1]), b.constant("rows", np.array([-1, 8])))
        w = b.constant("w", np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32) * spread[:, None])
        y = b.activation(b.op("Gemm", rows, w, name="middle", transB=1), act)
        y = b.op("Transpose", b.op("Reshape", y, b.constant("back", np.array([-1, 8, 8, 8]))), perm=[0, 3, 1, 2])
    else:
        w = b.constant("w", np.random.default_rng(1).normal(size=(8, 1, 3, 3)).astype(np.float32) * spread[:, None, None, None])
        y = b.activation(b.op("Conv", x, w, b.constant("w_b", spread), name="middle", group=8, pads=[1] * 4), act)
    y = b.conv(b.op("Add", x, y) if is_shared else y, 8, 8, kernel=1)
    return b.model(b.head(y, 8))


@pytest.mark.parametrize("act", ["relu", "relu6", None])
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("kind", ["depthwise", "transposed", "gemm"])
@pytest.mark.parametrize("target", ["ort-cpu", "academic"])
def test_a_layer_that_was_kept_in_float_is(target: str, kind: str, is_shared: bool, act: str | None, tmp_path: Path) -> None:
    source = zoo.loaded(chain(kind, is_shared, act), tmp_path)
    config = Config(weight_bits=8, activation_bits=8, algorithm="minmax", device="cpu", keep_float=("node_middle",), target=target)
    table = quantize(source, SAMPLES, config).table
    assert "w" not in table
    exported = export_qdq(source.model, table, scheme=config.scheme)
    inputs = dict(SAMPLES.inputs)
    assert check_kernels(exported, inputs).steps <= 1
    assert check_simulation(exported, table, simulated_values(source, table, SAMPLES), inputs).steps <= 1
    as_written, deployed = (
        runtime.run(runtime.session(exported, runtime.CPU, level), inputs) for level in (Optimization.NONE, Optimization.DEFAULT)
    )
    for name, value in as_written.items():  # codes on ties move by a step; with weights rounded to one scale it is 10 to 25 dB
        assert sqnr(value, deployed[name]) > 40
    if not (kind == "gemm" and is_shared):  # there it has the Transpose and the Reshape in front for itself
        assert not [change for change in compare(source.model, exported).changes if "middle" in change]
    if target == "ort-cpu":
        assert diagnose(source, exported, SAMPLES, tried=1).worst > 20


def test_what_onnx_runtime_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard it does not compute what the file says. Where this test fails, ONNX Runtime has changed: drop the guard."""
    source = zoo.loaded(chain("depthwise", False), tmp_path)
    config = Config(weight_bits=8, activation_bits=8, algorithm="minmax", device="cpu", keep_float=("node_middle",))
    table = quantize(source, SAMPLES, config).table
    guarded = export_qdq(source.model, table)
    monkeypatch.setattr(exporters.qdq, "guard", lambda model: None)
    plain = export_qdq(source.model, table)
    deployed, kept = (runtime.run(runtime.session(model), dict(SAMPLES.inputs)) for model in (plain, guarded))
    a, b = (runtime.run(runtime.session(model, runtime.CPU, Optimization.NONE), dict(SAMPLES.inputs)) for model in (plain, guarded))
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])
        assert sqnr(value, deployed[name]) < 40 < sqnr(value, kept[name])


def test_of_an_input_whose_axes_are_not_known_to_be_longer_than_one(tmp_path: Path) -> None:
    """One channel, of open height and width: no scale by channel keeps ONNX Runtime away, an operator in between does."""
    b = zoo.Builder({"x": ("N", 3, "h", "w")})
    x = b.conv(b.conv("x", 3, 8), 8, 1, act="relu")
    spread = np.geomspace(1e-3, 1, 8).astype(np.float32)
    w = b.constant("w", np.random.default_rng(1).normal(size=(8, 1, 3, 3)).astype(np.float32) * spread[:, None, None, None])
    y = b.op("Relu", b.op("Conv", x, w, b.constant("w_b", spread), name="middle", pads=[1] * 4))
    exported, table, source = kept(b.model(b.head(b.conv(y, 8, 8, kernel=1), 8)), tmp_path, zoo.images(16))
    assert "Max" in {node.op_type for node in exported.graph.node}
    assert check_simulation(exported, table, simulated_values(source, table, SAMPLES), dict(SAMPLES.inputs)).steps <= 1
    assert compare(source.model, exported).changes == ()


@pytest.mark.parametrize("batch", [1, "N"])
def test_a_product_with_a_bias_is_a_gemm_to_onnx_runtime(batch: int | str, tmp_path: Path) -> None:
    """Where all axes are fixed it makes one of MatMul and Add."""
    b = zoo.Builder({"x": (batch, 6, 16)})
    x = b.op("Relu", b.op("Add", b.op("MatMul", "x", b.weight("w0", (16, 16), 16)), b.weight("b0", (16,), 16)))
    w = b.constant("w", np.random.default_rng(1).normal(size=(16, 12)).astype(np.float32) * np.geomspace(1e-3, 1, 12).astype(np.float32))
    y = b.op("Relu", b.op("Add", b.op("MatMul", x, w, name="middle"), b.weight("w_b", (12,), 12)))
    left = b.op("MatMul", x, b.weight("w1", (16, 4), 16))  # so that x is on a grid
    kept(b.model(b.op("Add", b.op("MatMul", y, b.weight("w2", (12, 4), 12)), left)), tmp_path, zoo.images(16, (6, 16)))


def kept(model: onnx.ModelProto, folder: Path, samples: Samples) -> tuple[onnx.ModelProto, QuantTable, SourceModel]:
    """A model with the layer in the middle in float, as exported, which ONNX Runtime executes as it is written."""
    source = zoo.loaded(model, folder)
    config = Config(weight_bits=8, activation_bits=8, algorithm="minmax", device="cpu", keep_float=(".*middle.*",))
    table = quantize(source, samples, config).table
    exported = export_qdq(source.model, table)
    inputs = dict(samples.inputs)
    as_written, deployed = (
        runtime.run(runtime.session(exported, runtime.CPU, level), inputs) for level in (Optimization.NONE, Optimization.DEFAULT)
    )
    for name, value in as_written.items():
        assert sqnr(value, deployed[name]) > 40
    return exported, table, source


@pytest.mark.parametrize("target", ["openvino", "tensorrt", "qnn", "portable"])
def test_files_for_other_runtimes_have_one_scale_for_each_activation(target: str, tmp_path: Path) -> None:
    source = zoo.loaded(chain("depthwise", False), tmp_path)
    config = Config(weight_bits=8, activation_bits=8, algorithm="minmax", device="cpu", keep_float=("node_middle",), target=target)
    exported = export_qdq(source.model, quantize(source, SAMPLES, config).table, scheme=TARGETS[target])
    sizes = {t.name: numpy_helper.to_array(t).size for t in exported.graph.initializer}
    constants = {t.name for t in exported.graph.initializer}
    pairs = [n for n in exported.graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in constants]
    assert pairs
    assert all(sizes[pair.input[1]] == 1 for pair in pairs)
