"""Hard cases of exactness: another quantizer's codes for the same ranges, dead channels, constant activations, overflowing biases."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from exporters import export_qdq
from exporters.check import check
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.kernels import KernelCheck, check_kernels, check_simulation
from toolchain.noise import sqnr
from toolchain.pipeline import quantize
from toolchain.quant_table import QuantTable
from toolchain.runtime import Optimization
from toolchain.samples import Samples
from toolchain.simulation import simulate, simulated_values
from toolchain.source import SourceModel


class Reader(CalibrationDataReader):
    def __init__(self, feeds: Samples) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = iter([dict(feeds.inputs)])

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self._feeds, None)


def made(model: onnx.ModelProto, folder: Path, samples: Samples, **options: Any) -> tuple[SourceModel, QuantTable, onnx.ModelProto]:
    source = zoo.loaded(model, folder)
    plain: dict[str, Any] = {"algorithm": "minmax", "device": "cpu", "reduce_range": False, "bias_correction": False}
    config = Config(**{**plain, "weight_bits": 8, "activation_bits": 8, **options})
    table = quantize(source, samples, config).table
    return source, table, export_qdq(source.model, table, scheme=config.scheme)


def exact(source: SourceModel, table: QuantTable, exported: onnx.ModelProto, samples: Samples) -> KernelCheck:
    return check_simulation(exported, table, simulated_values(source, table, samples), samples.inputs)


@pytest.mark.filterwarnings("ignore")  # the other quantizer's own
def test_the_codes_are_those_of_quantize_static(tmp_path: Path) -> None:
    """Same ranges, same scheme: int8 weights around zero per channel, uint8 activations, int32 biases."""
    samples = zoo.images(8)
    source, table, _ = made(zoo.tiny_resnet(), tmp_path, samples)
    onnx.save(source.model, tmp_path / "normal.onnx")
    quantize_static(
        tmp_path / "normal.onnx",
        tmp_path / "theirs.onnx",
        Reader(samples),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
    )
    theirs = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "theirs.onnx").graph.initializer}
    compared = 0
    for name, grid in table.tensors.items():
        if f"{name}_scale" not in theirs or grid.tied_to is not None:
            continue
        np.testing.assert_allclose(np.ravel(theirs[f"{name}_scale"]), np.ravel(grid.scale), rtol=2e-6)  # float32 against float64 on the way
        np.testing.assert_array_equal(np.ravel(theirs[f"{name}_zero_point"]), np.ravel(grid.zero_point))
        if grid.codes is not None:
            difference = np.abs(theirs[f"{name}_quantized"].astype(np.int64).ravel() - grid.codes.ravel())
            assert difference.max() <= 1
            assert (difference > 0).mean() <= 1e-3  # a scale that differs in its last bit moves a weight on a rounding tie
        compared += 1
    assert compared >= 12  # weights and activations of all layers


def test_dead_channels_and_constant_activations(tmp_path: Path) -> None:
    """All-zero weights with and without a bias, tiny weights under a huge bias, and an activation that is always zero."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    w = np.random.default_rng(0).normal(size=(6, 3, 3, 3)).astype(np.float32)
    w[0] = w[1] = 0.0
    w[2] *= 1e-30
    w[3] *= 1e-12
    bias = np.array([0.0, 5.0, 3.0, -4000.0, 0.1, -1e4], np.float32)
    x = b.op("Conv", "x", b.constant("w", w), b.constant("bias", bias), name="first", pads=[1, 1, 1, 1])
    dead = b.op("Relu", b.op("Neg", b.op("Abs", x)))
    y = b.op("Add", b.conv(b.op("Relu", x), 6, 6), b.conv(dead, 6, 6))
    samples = zoo.images(8)
    for bits in (4, 8):
        source, table, exported = made(b.model(b.head(y, 6)), tmp_path, samples, weight_bits=bits, activation_bits=bits)
        for grid in table.tensors.values():
            scale = np.asarray(grid.scale)
            assert np.isfinite(scale).all()
            assert (scale >= np.finfo(np.float32).tiny).all()
        found = exact(source, table, exported, samples)
        assert found.steps <= 1.0
        assert check_kernels(exported, samples.inputs).steps <= 1.0
        values = next(iter(runtime.run(runtime.session(exported), samples.inputs).values()))
        assert np.isfinite(values).all()
    steps = np.abs(table["bias"].dequantized() - bias) / table["bias"].scale
    assert (steps <= 0.5 + 1e-6 * np.abs(bias) / table["bias"].scale).all()  # rounded, never clipped, the huge ones too


@pytest.mark.parametrize("target", ["ort-cpu", "qnn"])
def test_biases_never_overflow(target: str, tmp_path: Path) -> None:
    """|bias| / (s_x * s_w) beyond int32 widens the weight's scale instead of clipping the bias; per channel and per tensor."""
    b = zoo.Builder({"x": ["N", 6]})
    w = np.full((4, 6), 1e-9, np.float32)
    w[1] = 0.5
    y = b.op("Gemm", "x", b.constant("w", w), b.constant("c", np.array([100.0, -7.0, 1e-9, 2e5], np.float32)), transB=1)
    source, table, exported = made(b.model(y), tmp_path, zoo.images(8, (6,)), target=target)
    np.testing.assert_allclose(table["c"].dequantized(), source.constants["c"], rtol=1e-5, atol=0.05 if target == "qnn" else 1e-3)
    assert np.abs(table["c"].codes if table["c"].codes is not None else 0).max() < 2**31 - 1
    assert exact(source, table, exported, zoo.images(8, (6,))).steps <= 1.0


def test_shapes_and_names_stay(tmp_path: Path) -> None:
    model = zoo.every_rule()
    for node in model.graph.node:
        node.doc_string = f"about {node.name}"
    source, table, exported = made(model, tmp_path, zoo.images(4))
    inferred = onnx.shape_inference.infer_shapes(source.model, strict_mode=True)
    known = {info.name: info.type for info in inferred.graph.value_info}
    for info in exported.graph.value_info:
        assert known[info.name] == info.type
    documented = {node.name: node.doc_string for node in exported.graph.node if node.doc_string}
    kept = {node.name for node in exported.graph.node} & {node.name for node in source.model.graph.node}
    assert {name: source.node_protos[name].doc_string for name in kept} == documented
    for name, grid in table.tensors.items():
        made_names = {tensor.name for tensor in exported.graph.initializer}
        origin = grid.tied_to or name
        assert {f"{origin}_scale", f"{origin}_zero_point"} <= made_names
        if grid.codes is None:
            assert f"{name}_QuantizeLinear" in {node.name for node in exported.graph.node}
    onnx.shape_inference.infer_shapes(exported, strict_mode=True)


def test_a_table_of_another_target_that_the_kernel_cannot_sum_is_told(tmp_path: Path) -> None:
    """The rule of `check` finds the overflow that the kernel makes."""
    b = zoo.Builder({"x": ["N", 16, 6]})
    model = b.model(b.op("MatMul", b.op("Softmax", b.op("MatMul", "x", b.weight("w", (6, 16), 10**4))), "x"))
    samples = Samples({"x": np.random.default_rng(0).normal(size=(8, 16, 6)).astype(np.float32)})
    source, table, right = made(model, tmp_path, samples, algorithm="minmax", target="qnn")
    softmax = next(node for node in source.graph.nodes if node.op_type == "Softmax")
    value = softmax.outputs[0]
    fine = replace(table[value], scale=np.float32(1 / (150 * 16)))  # as a table for a runtime with another kernel has it
    wrong = export_qdq(source.model, table.updated({value: fine}))
    for exported, is_told in ((right, False), (wrong, True)):
        told = [v for v in check(exported, "ort-cpu") if v.value == value]
        assert [(v.effect, v.node) for v in told] == ([("inexact", softmax.name)] if is_told else [])
        assert (check_kernels(exported, samples.inputs).steps > 1) == is_told


def test_weights_that_meet_shapes_only_are_on_their_grids(tmp_path: Path) -> None:
    """Positions looked up as far as a text reaches, and projected: no sample has a part in it, but weights have."""
    b = zoo.Builder({"x": ["N", "T", 8]})
    one, zero, step = (b.constant(n, np.array(v, np.int64)) for n, v in (("one", 1), ("zero", 0), ("step", 1)))
    length = b.op("Gather", b.op("Shape", "x"), one)
    places = b.op("Gather", b.weight("positions", (32, 8), 8), b.op("Range", zero, length, step))
    places = b.op("MatMul", places, b.weight("projection", (8, 8), 8), name="places")
    model = b.model(b.op("MatMul", b.op("Relu", b.op("Add", "x", places)), b.weight("last", (8, 4), 8)))
    samples = Samples({"x": np.random.default_rng(0).normal(size=(16, 12, 8)).astype(np.float32)})
    source = zoo.loaded(model, tmp_path)
    options = {"weight_bits": 3, "activation_bits": 8, "first_last_bits": "same"}
    table = quantize(source, samples, Config(device="cpu", algorithm="mse", **options)).table
    assert table["projection"].spec.bits == 3
    exported = export_qdq(source.model, table)
    few = samples.first(8)
    assert check_simulation(exported, table, simulated_values(source, table, few), few.inputs).steps <= 1.0
    output = source.graph.outputs[0]
    by_file = runtime.run(runtime.session(exported, optimization=Optimization.NONE), samples.inputs)[output]
    # The same arithmetic: 22 dB with the projection in float, 60 with a rounding tie or two.
    assert sqnr(simulate(source, table, samples, torch.device("cpu"))[output], by_file) > 60


@pytest.mark.parametrize("target", ["ort-cpu", "qnn"])
def test_outputs_that_layers_read_too_are_compared_as_they_are_handed_out(target: str, tmp_path: Path) -> None:
    """A cache of keys: float in front of its quantizer, or (qnn) on its grid."""
    b = zoo.Builder({"x": ["N", 8]})
    keys = b.op("MatMul", "x", b.weight("k", (8, 8), 8))
    model = b.model(b.op("MatMul", keys, b.weight("v", (8, 4), 8)), keys)
    samples = Samples({"x": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)})
    options: dict[str, Any] = {"weight_bits": 4, "activation_bits": 4, "first_last_bits": "same", "target": target}
    source, table, exported = made(model, tmp_path, samples, **options)
    assert keys in table
    by_file = runtime.run(runtime.session(exported, optimization=Optimization.NONE), samples.inputs)
    simulated = simulate(source, table, samples, torch.device("cpu"), scheme=Config(target=target).scheme)
    # The same arithmetic in another order; the value behind a 4-bit grid is 19 dB away.
    assert all(sqnr(simulated[name], array) > 90 for name, array in by_file.items())
