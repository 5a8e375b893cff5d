"""Depthwise convolutions that make several channels of each: one channel of each for ONNX Runtime's integer kernels, and the same codes."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters import export_qdq
from exporters.diff import compare
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.diagnosis import diagnose
from toolchain.kernels import check_kernels, check_simulation
from toolchain.pipeline import quantize
from toolchain.quant_table import QuantTable
from toolchain.repeats import repeat_channels, without_repeats
from toolchain.runtime import Optimization
from toolchain.scheme import TARGETS
from toolchain.simulation import simulated_values
from toolchain.source import SourceModel

SAMPLES = zoo.images(16)


def widening(times: int = 2, is_shared: bool = False, channels: int = 6) -> onnx.ModelProto:
    """A convolution that makes `times` channels of each between two that mix them; `is_shared`: a shortcut reads its input too."""
    b = zoo.Builder({"x": ("N", 3, 8, 8)}, seed=times)
    x = b.conv("x", 3, channels, act="relu")
    y = b.conv(x, channels, times * channels, kernel=5, group=channels, act="relu")
    y = b.conv(y, times * channels, channels, kernel=1)
    return b.model(b.head(b.op("Add", x, y) if is_shared else y, channels))


def learned(model: onnx.ModelProto, folder: Path, target: str = "ort-cpu", bits: int = 8) -> tuple[SourceModel, QuantTable]:
    source = zoo.loaded(model, folder)
    config = Config(weight_bits=bits, activation_bits=bits, algorithm="minmax", device="cpu", target=target)
    return source, quantize(source, SAMPLES, config).table


def groups(model: onnx.ModelProto) -> list[int]:
    return [a.i for node in model.graph.node if node.op_type == "Conv" for a in node.attribute if a.name == "group"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("times", [2, 3])
def test_a_channel_is_read_as_often_as_it_is_used(times: int, is_shared: bool, bits: int, tmp_path: Path) -> None:
    source, table = learned(widening(times, is_shared), tmp_path, bits=bits)
    exported = export_qdq(source.model, table)
    assert groups(exported) == [1, 6 * times, 1]
    assert Counter(node.op_type for node in exported.graph.node)["Gather"] == 1
    onnx.checker.check_model(exported, full_check=True)
    onnx.save(exported, tmp_path / "quantized.onnx")
    found = runtime.optimized(tmp_path / "quantized.onnx", runtime.CPU)
    executed = Counter(node.op_type for node in found.node)
    assert executed["QLinearConv"] == 3
    assert "Conv" not in executed
    plain = without_repeats(exported)
    assert groups(plain) == [1, 6, 1]
    assert "Gather" not in {node.op_type for node in plain.graph.node}
    inputs = dict(SAMPLES.inputs)
    for level in (Optimization.NONE, Optimization.DEFAULT):  # the same products, added in the same order or on integers
        a, b = (runtime.run(runtime.session(model, runtime.CPU, level), inputs) for model in (exported, plain))
        for name, value in a.items():
            np.testing.assert_array_equal(value, b[name])
    assert check_kernels(exported, inputs).steps <= 1
    values = simulated_values(source, table, SAMPLES)
    checked = check_simulation(exported, table, values, inputs)
    assert checked.steps <= 1
    assert checked.values >= sum(grid.codes is None for grid in table.tensors.values())
    difference = compare(source.model, exported)
    assert difference.changes == ()
    assert len(diagnose(source, exported, SAMPLES, tried=1).layers) == 4


def test_a_wrong_repetition_is_found(tmp_path: Path) -> None:
    """The channels in another order: every operator for itself is right, and the file is not what was learned."""
    source, table = learned(widening(2), tmp_path)
    exported = export_qdq(source.model, table)
    order = next(t for t in exported.graph.initializer if t.name.endswith("_channels"))
    order.CopyFrom(onnx.numpy_helper.from_array(np.tile(np.arange(6), 2), order.name))
    found = check_simulation(exported, table, simulated_values(source, table, SAMPLES), dict(SAMPLES.inputs))
    assert found.steps > 2


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "ort-cpu"])
def test_other_targets_have_their_own_kernels(target: str, tmp_path: Path) -> None:
    source, table = learned(widening(2), tmp_path, target)
    exported = export_qdq(source.model, table, scheme=TARGETS[target])
    assert groups(exported) == [1, 6, 1]


def test_what_runs_in_float_is_left(tmp_path: Path) -> None:
    source = zoo.loaded(widening(2), tmp_path)
    name = next(node.name for node in source.graph.nodes if node.op_type == "Conv" and "conv2" in node.name)
    for config in (Config(algorithm="minmax", device="cpu", keep_float=(name,)), Config(algorithm="minmax", activation_bits=16)):
        exported = export_qdq(source.model, quantize(source, SAMPLES, config).table)
        assert groups(exported) == [1, 6, 1]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_there_and_back(channels: int, times: int, width: int, is_signed: bool) -> None:
    """Whatever the groups: the file is the same again, and only convolutions of one channel a group are changed."""
    b = zoo.Builder({"x": ("N", channels * width, 4, 4)})
    kind = np.int8 if is_signed else np.uint8
    scale, zero = b.constant("s", np.array(0.1, np.float32)), b.constant("z", np.array(3, kind))
    x = b.op("DequantizeLinear", b.op("QuantizeLinear", "x", scale, zero), scale, zero)
    codes = b.constant("w", np.arange(channels * times * width * 9).reshape(-1, width, 3, 3).astype(np.int8))
    weight = b.op(
        "DequantizeLinear", codes, b.constant("ws", np.array(0.00371, np.float32)), b.constant("wz", np.array(0, np.int8))
    )  # no ties
    y = b.op("Conv", x, weight, group=channels, pads=[1] * 4)
    model = b.model(b.op("DequantizeLinear", b.op("QuantizeLinear", y, scale, zero), scale, zero))
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    repeat_channels(changed.graph)
    assert (changed != model) == (channels > 1 and times > 1 and width == 1)
    back = without_repeats(changed)
    assert back.graph.node == model.graph.node
    assert {t.name for t in back.graph.initializer} == {t.name for t in model.graph.initializer}
    data = {"x": np.random.default_rng(0).normal(size=(2, channels * width, 4, 4)).astype(np.float32)}
    a, c = (runtime.run(runtime.session(one), data) for one in (model, changed))
    for name, value in a.items():
        np.testing.assert_array_equal(value, c[name])
