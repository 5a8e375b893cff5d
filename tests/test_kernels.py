"""Integer kernels against the same operators in float: exact for every export, whatever the CPU, and wrong ones are found and named."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.parser import parse_model

from exporters import export_qdq
from tests import zoo
from toolchain import kernels, runtime
from toolchain.config import Config
from toolchain.kernels import check_kernels, simulation_differences
from toolchain.pipeline import quantize
from toolchain.quant_table import QuantTable
from toolchain.samples import Samples


def exported(
    model: onnx.ModelProto, folder: Path, samples: Samples | None = None, **options: object
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    source = zoo.loaded(model, folder)
    samples = samples or zoo.images(16)
    found = quantize(source, samples, Config(algorithm="minmax", device="cpu", **options))  # pyright: ignore[reportArgumentType]
    return export_qdq(source.model, found.table), dict(samples.inputs)


def extreme(model: onnx.ModelProto) -> onnx.ModelProto:
    """All weights at the end of their range, so that products of neighbours add up to the most that the grid allows."""
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, 0.05), tensor.name))
    return model


@pytest.mark.parametrize(("weight_bits", "activation_bits"), list(itertools.product((4, 7, 8), (4, 7, 8))))
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_no_kernel_saturates(weight_bits: int, activation_bits: int, scheme: str, tmp_path: Path) -> None:
    bright = Samples({name: np.full_like(array, 1.0) for name, array in zoo.images(16).inputs.items()}, None)
    model, feeds = exported(
        extreme(zoo.tiny_resnet()), tmp_path, bright, weight_bits=weight_bits, activation_bits=activation_bits, activation_scheme=scheme,
        first_last_bits="same", elementwise_bits=8,
    )  # fmt: skip
    found = check_kernels(model, feeds)
    assert found.values > 5
    assert found.steps <= 1.0  # a float sum and an integer sum may round a tie to either side


def test_a_wrong_kernel_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, feeds = exported(zoo.tiny_resnet(), tmp_path)
    layer = next(node for node in model.graph.node if node.op_type == "Conv")
    cut = kernels._cut

    def broken(model: onnx.ModelProto, codes: dict[str, np.ndarray], outputs: list[str]) -> onnx.ModelProto:
        changed = cut(model, codes, outputs)
        weight = next(t for t in changed.graph.initializer if t.name == f"{layer.input[1]}_quantized")
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
        return changed

    assert check_kernels(model, feeds).steps <= 1.0
    monkeypatch.setattr(kernels, "_cut", broken)
    found = check_kernels(model, feeds)
    assert found.steps > 1.0
    assert found.share > 0.0
    reader = next(node for node in model.graph.node if layer.output[0] in node.input)
    assert found.worst in (*reader.output, *(o for n in model.graph.node if reader.output[0] in n.input for o in n.output))


def test_a_float_model_is_its_own_reference() -> None:
    model = zoo.tiny_resnet()
    found = check_kernels(model, dict(zoo.images(4).inputs))
    assert (found.values, found.steps, found.share) == (1, pytest.approx(0.0, abs=1e-3), 0.0)


@pytest.mark.parametrize(("asked", "threads"), [("1", 1), ("3", 3), ("", 0), ("many", 0)])
def test_sessions_have_the_threads_that_openmp_is_asked_for(asked: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime has a pool of its own, of all cores (0), whatever the environment says."""
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert {level.options().intra_op_num_threads for level in runtime.Optimization} == {threads}


def test_what_only_float_rounding_varies_is_no_difference() -> None:
    """Sums of a Softmax are 1 but for the last bits, in an order of each library's own. A real difference still counts."""
    text = ('<ir_version: 8, opset_import: ["" : 17]> g (float[N, 50] x) => (float[N, 1] s) '
            '{ p = Softmax <axis = 1> (x) axis = Constant <value_ints = [1]> () s = ReduceSum (p, axis) }')  # fmt: skip
    model = parse_model(text)
    x = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32)
    p = np.exp(x.astype(np.float64))
    p = (p / p.sum(1, keepdims=True)).astype(np.float32)
    sums = p[:, ::-1].cumsum(1, dtype=np.float32)[:, -1:]  # one after the other, from the end
    assert 0 < np.abs(sums - 1).max() < 1e-6
    found = {d.name: d for d in simulation_differences(model, QuantTable({}), {"p": p, "s": sums}, {"x": x})}
    assert found["s"].steps < 1
    assert found["p"].steps < 1
    wrong = {d.name: d for d in simulation_differences(model, QuantTable({}), {"p": p * 1.02, "s": sums * 1.02}, {"x": x})}
    assert wrong["s"].steps > 2
