"""A second runtime, really run: OpenVINO computes on its integer kernels what torch simulated, to float rounding.

Each model has what OpenVINO's low-precision passes rewrite: residual sums of two convolutions, Concat of values that other nodes read too,
gates, pooling. Its CPU plugin is told to compute in float32 what is not on integers: by default it takes bfloat16 where the CPU has it, and
rounds float activations that meet 8-bit weights to 8 bits by itself.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch

from exporters import export_qdq, write_model
from exporters.check import check
from tests import zoo
from toolchain.config import Config
from toolchain.pipeline import quantize
from toolchain.scheme import TARGETS, Scheme
from toolchain.simulation import simulate

ov: Any = pytest.importorskip("openvino", reason="OpenVINO is not installed")
SAMPLES = zoo.images(16, (3, 16, 16))
_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def projected() -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 3, 16, 16]})
    x = b.conv("x", 3, 16, act="relu")
    y = b.op("Relu", b.op("Add", b.conv(b.conv(x, 16, 16, act="relu"), 16, 16), b.conv(x, 16, 16)))
    return b.model(b.head(b.op("Relu", b.op("Add", b.conv(x, 16, 16), b.conv(y, 16, 16))), 16))


def joined() -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 3, 16, 16]})
    x = b.conv("x", 3, 16, act="relu")
    pooled = b.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    y = b.op("Concat", x, b.conv(x, 16, 8, 1, act="relu"), pooled, axis=1)
    y = b.op("Concat", b.conv(y, 40, 16, stride=2, act="relu"), b.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), axis=1)
    return b.model(b.head(b.conv(y, 32, 16, act="relu"), 16))


def gated() -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 3, 16, 16]})
    x = b.conv("x", 3, 16)
    x = b.op("Mul", x, b.op("Sigmoid", x))
    gate = b.op("Sigmoid", b.conv(b.conv(b.op("GlobalAveragePool", x), 16, 8, 1, act="relu"), 8, 16, 1))
    return b.model(b.head(b.conv(b.op("Mul", x, gate), 16, 16, act="relu"), 16))


def smallest_mobilenet() -> onnx.ModelProto:
    return zoo.mobilenet_v2(0.25, image=16)


def detector() -> onnx.ModelProto:
    return zoo.detector(16)


def run(path: Path) -> np.ndarray:
    return ov.Core().compile_model(str(path), "CPU", _FLOAT32)(SAMPLES.inputs["x"])[0]


def differing(model: onnx.ModelProto, target: str, bits: int, folder: Path, **options: Any) -> tuple[float, onnx.ModelProto]:
    """The share of samples whose outputs differ from the simulation by more than float rounding."""
    source = zoo.loaded(model, folder)
    config = Config(**{"weight_bits": bits, "activation_bits": bits, "target": target, "algorithm": "mse", "device": "cpu", **options})
    found = quantize(source, SAMPLES, config)
    exported = export_qdq(source.model, found.table, scheme=config.scheme)
    write_model(exported, folder / "quantized.onnx")
    expected = next(iter(simulate(source, found.table, SAMPLES, torch.device("cpu")).values()))
    difference = np.abs(run(folder / "quantized.onnx") - expected).max(axis=1)
    return float((difference > 1e-4 * np.ptp(expected)).mean()), exported


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("build", [projected, joined, gated, smallest_mobilenet, detector])
def test_openvino_computes_what_was_simulated(build: Any, bits: int, tmp_path: Path) -> None:
    share, exported = differing(build(), "openvino", bits, tmp_path)
    assert share <= 0.1  # a code on a rounding tie falls either way: at most one of 16 samples
    assert not [violation for violation in check(exported, "openvino") if violation.effect != "slow"]


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 4, "storage": "small"},
        {"weight_bits": 8},
        {"weight_bits": 4, "storage": "small", "block_size": 16},
        {"weight_bits": 4, "block_size": 64},  # does not fill the 16 inputs: per channel
        {"weight_bits": 8, "number_format": "fp8"},
    ],
)
def test_weights_alone(options: dict[str, Any], tmp_path: Path) -> None:
    share, exported = differing(projected(), "openvino", 32, tmp_path, **options)
    assert share <= 0.1
    assert not [violation for violation in check(exported, "openvino") if violation.effect != "slow"]


@pytest.mark.parametrize(
    ("build", "target", "rules", "word"),
    [
        (projected, "openvino", {"shortcut_only": False}, "only an Add reads"),
        (projected, "ort-cpu", {}, "only an Add reads"),
        (joined, "openvino", {"shared_concat": False}, "different grids"),
        (joined, "tensorrt", {}, "around zero"),
    ],
)
def test_why_the_target_has_its_rules(
    build: Any, target: str, rules: dict[str, bool], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them OpenVINO computes something else, and the checker says where."""
    monkeypatch.setitem(cast(dict[str, Scheme], TARGETS), target, replace(TARGETS[target], **rules))
    share, exported = differing(build(), target, 4, tmp_path)
    assert share > 0.5
    assert any(word in violation.rule and violation.effect == "inexact" for violation in check(exported, "openvino"))
