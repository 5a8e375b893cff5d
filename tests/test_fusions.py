"""Matrix products run on integers whatever is behind them."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters import export_qdq
from exporters.diff import compare
from exporters.fusions import joined
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.kernels import check_kernels, check_simulation
from toolchain.pipeline import quantize
from toolchain.scheme import TARGETS
from toolchain.simulation import simulated_values

SAMPLES = zoo.images(16, (5, 12))
BEHIND = {"relu": (None, None), "relu6": (0.0, 6.0), "at_least": (-0.25, None), "at_most": (None, 0.25)}


def mixer(behind: str, is_gemm: bool) -> onnx.ModelProto:
    """A product, what cuts its result off, and Pow, which runs in float, in front of another product."""
    b = zoo.Builder({"x": ("N", 5, 12)})
    x = b.op("Reshape", "x", b.constant("rows", np.array([-1, 12]))) if is_gemm else "x"
    w = b.weight("w", (12, 16), 12)
    y = b.op("Gemm", x, w, b.weight("w_b", (16,), 16), name="product") if is_gemm else b.op("MatMul", x, w, name="product")
    low, high = BEHIND[behind]
    ends = [b.constant(f"end_{key}", np.array(v, np.float32)) if v is not None else "" for key, v in (("low", low), ("high", high))]
    y = b.op("Relu", y) if behind == "relu" else b.op("Clip", y, *(ends if ends[1] else ends[:1]), name="cut")
    y = b.op("Pow", y, b.constant("two", np.array(2, np.float32)))
    return b.model(b.op("MatMul", y, b.weight("w2", (16, 6), 16)))


@pytest.mark.parametrize("is_gemm", [False, True])
@pytest.mark.parametrize("behind", list(BEHIND))
def test_a_relu_that_no_quantizer_takes_over_leaves_its_product_on_integers(behind: str, is_gemm: bool, tmp_path: Path) -> None:
    source = zoo.loaded(mixer(behind, is_gemm), tmp_path)
    config = Config(weight_bits=8, activation_bits=8, algorithm="minmax", device="cpu")
    table = quantize(source, SAMPLES, config).table
    exported = export_qdq(source.model, table)
    onnx.checker.check_model(exported, full_check=True)
    kinds = Counter(node.op_type for node in exported.graph.node)
    assert "Relu" not in kinds
    assert "Clip" not in kinds
    assert kinds["Max"] + kinds["Min"] == sum(end is not None for end in (BEHIND[behind] if behind != "relu" else (0.0, None)))
    onnx.save(exported, tmp_path / "quantized.onnx")
    executed = Counter(node.op_type for node in runtime.optimized(tmp_path / "quantized.onnx", runtime.CPU).node)
    assert executed["MatMulIntegerToFloat"] + executed["QGemm"] == 2
    inputs = dict(SAMPLES.inputs)
    assert check_kernels(exported, inputs).steps <= 1
    assert check_simulation(exported, table, simulated_values(source, table, SAMPLES), inputs).steps <= 1
    assert compare(source.model, exported).changes == ()
    back = joined(source.model.graph, exported)
    assert Counter(node.op_type for node in back.graph.node)["Relu" if behind == "relu" else "Clip"] == 1
    a, b = (runtime.run(runtime.session(model, runtime.CPU, runtime.Optimization.NONE), inputs) for model in (exported, back))
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "ort-cpu"])
def test_other_targets_keep_the_operator(target: str, tmp_path: Path) -> None:
    source = zoo.loaded(mixer("relu", False), tmp_path)
    config = Config(weight_bits=8, activation_bits=8, algorithm="minmax", device="cpu", target=target)
    exported = export_qdq(source.model, quantize(source, SAMPLES, config).table, scheme=config.scheme)
    assert "Max" not in {node.op_type for node in exported.graph.node}


def test_max_and_min_of_the_model_stay(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ("N", 5, 12)})
    zero, one = (b.constant(f"v{value:g}", np.array(value, np.float32)) for value in (0.0, 1.0))
    y = b.op("Min", b.op("Max", b.op("MatMul", "x", b.weight("w", (12, 16), 12)), zero), one)
    source = zoo.loaded(b.model(b.op("MatMul", y, b.weight("w2", (16, 6), 16))), tmp_path)
    config = Config(weight_bits=8, activation_bits=8, algorithm="minmax", device="cpu")
    exported = export_qdq(source.model, quantize(source, SAMPLES, config).table)
    assert joined(source.model.graph, exported) is exported
    assert compare(source.model, exported).changes == ()
