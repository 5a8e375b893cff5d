"""Models in half precision have quantizers where the same models in float32 have them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from exporters import export_qdq
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.pipeline import Quantized, quantize
from toolchain.runtime import Optimization
from toolchain.samples import Samples
from toolchain.simulation import simulate
from toolchain.source import SourceModel

SAMPLES = zoo.images(16)
TARGETS = ["ort-cpu", "ort-cuda", "openvino", "qnn", "portable", "academic"]


def handed_out() -> onnx.ModelProto:
    """An input, a convolution's result and a rearranged one that are graph outputs, each read by layers too."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    same = b.op("Identity", "x", name="same")
    first = b.conv("x", 3, 8)
    second = b.conv(first, 8, 8, act="relu")
    pooled = b.op("MaxPool", second, name="pooled", kernel_shape=[2, 2], strides=[2, 2])
    return b.model(same, first, pooled, b.head(b.conv(pooled, 8, 8, act="relu"), 8))


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model in float16."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    del twin.graph.value_info[:]
    for value in (*twin.graph.input, *twin.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in twin.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    return twin


def made(model: onnx.ModelProto, samples: Samples, target: str, folder: Path) -> tuple[SourceModel, Quantized, Mapping[str, np.ndarray]]:
    """The source, what became of it, and the outputs of the exported file, run as it is written."""
    folder.mkdir()
    source = zoo.loaded(model, folder)
    found = quantize(source, samples, Config(algorithm="minmax", device="cpu", target=target))
    exported = export_qdq(source.model, found.table, scheme=Config(target=target).scheme)
    return source, found, runtime.run(runtime.session(exported, optimization=Optimization.NONE), samples.inputs)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_handed_out_is_as_exact_as_in_float32(target: str, tmp_path: Path) -> None:
    narrow = Samples({"x": SAMPLES.inputs["x"].astype(np.float16)})
    wide = Samples({"x": narrow.inputs["x"].astype(np.float32)})  # the same numbers
    twin = half(handed_out())
    single = onnx.ModelProto()
    single.CopyFrom(handed_out())
    for tensor, short in zip(single.graph.initializer, twin.graph.initializer, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(short).astype(np.float32), tensor.name))
    _, _, expected = made(single, wide, target, tmp_path / "single")
    source, found, given = made(twin, narrow, target, tmp_path / "half")
    simulated = simulate(source, found.table, narrow, torch.device("cpu"), found.islands, Config(target=target).scheme)
    for name, array in given.items():
        assert array.dtype == np.float16
        scale = np.abs(expected[name]).max()
        # Half a step of float16 (2^-11 of a number, the largest here); codes on ties may differ in a few places, not on average.
        assert np.abs(array.astype(np.float64) - expected[name]).mean() < scale * 2**-11, name
        assert np.abs(array.astype(np.float64) - simulated[name]).mean() < scale * 2**-11, name
    if target != "qnn":  # where outputs are on grids
        np.testing.assert_array_equal(given["same"], narrow.inputs["x"])
