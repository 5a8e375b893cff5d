"""E4M3 grids: the same numbers in NumPy, torch and ONNX Runtime; files for those targets that take them; refusals for the others."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from exporters import aimet, export_qdq, write_model
from exporters.check import CHECKED, check
from tests import zoo
from toolchain import encodings, runtime
from toolchain.calibration import calibrate_weight
from toolchain.cli import main
from toolchain.config import Config
from toolchain.config_file import parse_precision
from toolchain.errors import ExportError, UsageError
from toolchain.fake_quant import fake_quantize
from toolchain.kernels import check_kernels, check_simulation
from toolchain.pipeline import Quantized, quantize
from toolchain.quant_table import FLOAT8, FLOAT8_MAX, FLOAT8_UNIT, TensorQuant, activation_spec, dequantize, float8_spec, weight_spec
from toolchain.quant_table import quantize as encode
from toolchain.scheme import TARGETS
from toolchain.simulation import simulated_values
from toolchain.source import SourceModel

SAMPLES = zoo.images(8)
FINITE = st.floats(-3e4, 3e4, width=32, allow_subnormal=False)


def made(folder: Path, **options: Any) -> tuple[SourceModel, Config, Quantized]:
    source = zoo.loaded(zoo.every_rule(), folder)
    config = Config(**{**parse_precision("fp8"), "algorithm": "mse", "device": "cpu", "target": "tensorrt", **options})
    return source, config, quantize(source, SAMPLES, config)


def onnx_runtime(x: np.ndarray, scale: np.float32) -> np.ndarray:
    tensors = [numpy_helper.from_array(np.asarray(scale), "s"), numpy_helper.from_array(np.zeros((), FLOAT8), "z")]
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    x_info, y_info = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in "xy")
    model = helper.make_model(helper.make_graph(nodes, "g", [x_info], [y_info], tensors), opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = 9
    return runtime.run(runtime.session(model), {"x": x})["y"]


@given(arrays.arrays(np.float32, st.integers(1, 40), elements=FINITE), st.floats(2.0**-16, 8.0, width=32))
def test_numpy_torch_and_onnx_runtime_round_alike(x: np.ndarray, scale: float) -> None:
    grid = TensorQuant(float8_spec(activation_spec(8, symmetric=True)), np.float32(scale) / np.float32(FLOAT8_UNIT), np.int32(0))
    ours = dequantize(encode(x, grid), grid)
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(x), grid).numpy(), ours)
    np.testing.assert_array_equal(onnx_runtime(x, np.float32(scale)), ours)
    inside = np.abs(x) <= FLOAT8_MAX * np.float32(scale)
    relative = np.abs(ours - x)[inside] - np.abs(x)[inside] / 16  # 3 bits of mantissa: half of 1/8
    assert (relative <= scale * 2.0**-10 * 1.001).all()  # half of the smallest number, where mantissas end


def test_every_number_is_a_whole_code() -> None:
    numbers = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    grid = TensorQuant(float8_spec(weight_spec(8, None, True)), np.float32(1 / FLOAT8_UNIT), np.int32(0))
    codes = encode(numbers, grid)
    np.testing.assert_array_equal(codes / FLOAT8_UNIT, numbers)
    assert (codes.min(), codes.max()) == (grid.spec.qmin, grid.spec.qmax)


def test_a_searched_range_is_no_worse() -> None:
    weight = np.random.default_rng(0).standard_t(3, size=(8, 64)).astype(np.float32)
    spec = float8_spec(weight_spec(8, 0, True))
    errors = []
    for method in ("minmax", "mse"):
        grid = calibrate_weight(weight, spec, method, 100.0)
        errors.append((np.abs(dequantize(encode(weight, grid), grid) - weight) ** 2.4).sum(axis=1))
    assert (errors[1] <= errors[0] * 1.0001).all()


@pytest.mark.parametrize(
    ("target", "activations"), [("tensorrt", 8), ("tensorrt", 32), ("openvino", 32), ("ort-cpu", 32), ("ort-cuda", 32), ("academic", 32)]
)
def test_the_file_is_the_simulation(target: str, activations: int, tmp_path: Path) -> None:
    source, config, found = made(tmp_path, target=target, activation_bits=activations)
    exported = export_qdq(source.model, found.table, scheme=config.scheme)
    kinds = {tensor.name: tensor.data_type for tensor in exported.graph.initializer if tensor.name.endswith(("_quantized", "_zero_point"))}
    assert set(kinds.values()) == {TensorProto.FLOAT8E4M3FN}
    assert any(name.startswith("x_") for name in kinds) == (activations == 8)
    check_sim = check_simulation(exported, found.table, simulated_values(source, found.table, SAMPLES), SAMPLES.inputs)
    assert check_sim.values > 10
    assert check_sim.steps <= 1.0
    assert check_sim.share < 0.1
    assert check_kernels(exported, SAMPLES.inputs).steps <= 1.0
    if target in CHECKED:
        assert not [violation for violation in check(exported, target) if violation.is_error]
    expected, values = (next(iter(runtime.run(runtime.session(model), SAMPLES.inputs).values())) for model in (source.model, exported))
    assert 10 * np.log10(np.square(expected).sum() / np.square(values - expected).sum()) > 18.0  # dB: 3 bits of mantissa, a dozen times


def test_files_with_fp8_activations_load_by_default_nowhere_but_in_tensorrt(tmp_path: Path) -> None:
    source, _, found = made(tmp_path)
    for target in set(TARGETS) - {"tensorrt"}:
        with pytest.raises(ExportError, match="has no fp8"):
            export_qdq(source.model, found.table, scheme=TARGETS[target])
    exported = export_qdq(source.model, found.table, scheme=TARGETS["tensorrt"])
    assert any("do not exist" in v.rule or "does not exist" in v.rule for v in check(exported, "ort-cpu") if v.is_error)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"target": "ort-cpu"}, "integer kernels that do not exist"),
        ({"target": "qnn"}, "qnn has no fp8"),
        ({"target": "portable", "activation_bits": 32}, "portable has no fp8"),
        ({"target": "openvino"}, "rounds fp8 activations otherwise"),
        ({"weight_bits": 4}, "has 8 bits"),
        ({"activation_bits": 32, "block_size": 32}, "block-wise"),
        ({"algorithm": "qdrop"}, "use --algorithm mse"),
        ({"bits": ("Gemm=w4a8",)}, "leave it out"),
    ],
)
def test_refusals(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Config(**{**parse_precision("fp8"), "algorithm": "mse", "target": "tensorrt", **options})


def test_the_table_is_saved_and_read(tmp_path: Path) -> None:
    _, config, found = made(tmp_path)
    text = encodings.dumps(encodings.Encodings(found.table, "0" * 64, config.target, config.precision.convention))
    read = encodings.loads(text, "table").table
    for name, grid in found.table.tensors.items():
        assert read[name].spec == grid.spec
        np.testing.assert_array_equal(read[name].scale, grid.scale)
        np.testing.assert_array_equal(read[name].codes, grid.codes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ExportError, match="integer grids"):
        aimet.to_aimet(found.table)


def test_on_the_command_line(tmp_path: Path) -> None:
    write_model(zoo.every_rule(), tmp_path / "net.onnx")
    np.savez(tmp_path / "calib.npz", x=SAMPLES.inputs["x"])
    arguments = ["quantize", str(tmp_path / "net.onnx"), "-p", "fp8", "--target", "tensorrt", "--algorithm", "mse", "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--calibration-data", str(tmp_path / "calib.npz"), "-v"])
    assert result.exit_code == 0, result.output
    onnx.checker.check_model(onnx.load(tmp_path / "net.fp8.onnx"))
