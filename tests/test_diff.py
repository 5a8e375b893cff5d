"""The difference of two files: nothing but quantizers and weights in what we write, and every other change by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_static

from exporters import export_qdq, write_model
from exporters.diff import compare, compare_grids
from tests import zoo
from tests.test_exactness import Reader
from toolchain.cli import main
from toolchain.config import Config
from toolchain.pipeline import Quantized, quantize
from toolchain.scheme import TARGETS
from toolchain.source import SourceModel

SAMPLES = zoo.images(8)


def made(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[SourceModel, Quantized, onnx.ModelProto]:
    source = zoo.loaded(model, folder)
    config = Config(**{"algorithm": "mse", "device": "cpu", **options})
    found = quantize(source, SAMPLES, config)
    return source, found, export_qdq(source.model, found.table, {"version": "1"}, config.scheme)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [4, 8])
def test_only_quantizers_and_weights_differ(target: str, bits: int, tmp_path: Path) -> None:
    nearest: dict[str, Any] = {"algorithm": "minmax", "reduce_range": False, "weight_bits": bits, "activation_bits": bits}
    source, found, exported = made(zoo.every_rule(), tmp_path, target=target, **nearest)
    difference = compare(source.model, exported)
    assert not difference.changes
    assert difference.kept + len(set(difference.folded)) >= len(source.graph.nodes)
    assert bool(difference.folded) == (TARGETS[target].saturation == "integer")
    weights = {constant.name: constant for constant in difference.constants}
    assert set(found.placement.weights) <= set(weights)
    for name in found.placement.weights:
        steps = weights[name].steps
        assert steps is not None
        assert steps <= 0.5 + 1e-4  # float32
    origins = {found.table[name].tied_to or name for name in found.placement.activations}
    assert len(difference.values) >= len(origins) - len(found.table.copies)


def test_a_layer_without_its_first_result_is_found_again(tmp_path: Path) -> None:
    source = zoo.loaded(zoo.recurrent(last_only=True), tmp_path)
    found = quantize(source, zoo.images(8, (5, 8)), Config(algorithm="mse", device="cpu"))
    assert not compare(source.model, export_qdq(source.model, found.table)).changes


@pytest.mark.parametrize("options", [{"storage": "small"}, {"activation_bits": 32, "block_size": 16, "storage": "small"}])
def test_a_raised_opset_is_no_change(options: dict[str, Any], tmp_path: Path) -> None:
    source, _, exported = made(zoo.every_rule(), tmp_path, **options)
    assert exported.opset_import[0].version > source.opset
    difference = compare(source.model, exported)
    assert not difference.changes
    assert any(constant.kind == "int4" for constant in difference.constants)


def stride(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Conv").attribute[0].ints[:] = [2, 2, 2, 2]


def another_input(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.name == "node_sum" or "sum" in node.output)
    node.input[1] = node.input[0]


def dropped(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    node.op_type = "Tanh"


def added(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Neg", [model.graph.output[0].name], ["minus"], "own"))


def renamed_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "other"


def small_bias(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "gemm16_b_quantized")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((3,), np.int32), tensor.name))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (stride, "attributes changed"),
        (another_input, "in place of"),
        (dropped, "is gone"),
        (added, "is new"),
        (renamed_output, "graph outputs"),
        (small_bias, "shape of 'gemm16_b' changed"),
    ],
)
def test_every_other_change_is_named(change: Callable[[onnx.ModelProto], None], word: str, tmp_path: Path) -> None:
    source, _, exported = made(zoo.every_rule(), tmp_path)
    change(exported)
    changes = compare(source.model, exported).changes
    assert any(word in line for line in changes), changes


@pytest.mark.filterwarnings("ignore")  # the other quantizer's own
def test_beside_quantize_static(tmp_path: Path) -> None:
    """A file of another tool: nothing else is changed there either, and its integers are ours."""
    source, found, exported = made(
        zoo.tiny_resnet(),
        tmp_path,
        algorithm="minmax",
        weight_bits=8,
        activation_bits=8,
        reduce_range=False,
        bias_correction=False,
    )
    onnx.save(source.model, tmp_path / "normal.onnx")
    types: dict[str, Any] = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    symmetric = {"WeightSymmetric": True, "ActivationSymmetric": False}
    quantize_static(tmp_path / "normal.onnx", tmp_path / "theirs.onnx", Reader(SAMPLES), per_channel=True, extra_options=symmetric, **types)
    theirs = onnx.load(tmp_path / "theirs.onnx")
    assert not compare(source.model, theirs).changes
    both, _, _ = compare_grids(exported, theirs)
    weights = {change.name: change for change in both if change.name in found.placement.weights}
    assert set(weights) == set(found.placement.weights)
    for change in both:
        assert abs(change.scale_ratio - 1) < 1e-5
        assert change.codes_percent is None or (change.codes_percent <= 0.1 and (change.most or 0) <= 1)


def test_on_the_command_line(tmp_path: Path) -> None:
    model = zoo.every_rule()
    _, _, exported = made(model, tmp_path)
    write_model(model, tmp_path / "float.onnx")
    write_model(exported, tmp_path / "ours.onnx")
    run = CliRunner()
    result = run.invoke(main, ["diff", str(tmp_path / "float.onnx"), str(tmp_path / "ours.onnx")])
    assert result.exit_code == 0, result.output
    assert "nodes are unchanged" in result.output
    result = run.invoke(main, ["diff", str(tmp_path / "ours.onnx"), str(tmp_path / "ours.onnx")])
    assert result.exit_code == 0
    assert "11 of 11 constants have the same integers" in result.output
    next(node for node in exported.graph.node if node.op_type == "Gemm").attribute.append(helper.make_attribute("alpha", 0.5))
    write_model(exported, tmp_path / "broken.onnx")
    result = run.invoke(main, ["diff", str(tmp_path / "float.onnx"), str(tmp_path / "broken.onnx")])
    assert result.exit_code == 5
    assert "its attributes changed" in result.output
    result = run.invoke(main, ["diff", str(tmp_path / "ours.onnx"), str(tmp_path / "float.onnx")])
    assert result.exit_code == 2
    assert "give the float model first" in result.output
    result = run.invoke(main, ["diff", str(tmp_path / "float.onnx"), str(tmp_path / "ours.onnx"), "--json"])
    assert '"changes": []' in result.output


def test_a_constant_that_was_all_zeros_has_no_noise_ratio(tmp_path: Path) -> None:
    """Biases often are, until correction or learning moves them."""
    model = zoo.every_rule()
    _, _, exported = made(model, tmp_path)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("_b"))
    bias.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(bias)), bias.name))
    write_model(model, tmp_path / "float.onnx")
    write_model(exported, tmp_path / "ours.onnx")
    result = CliRunner().invoke(main, ["diff", str(tmp_path / "float.onnx"), str(tmp_path / "ours.onnx")])
    assert f"{bias.name}: int32, was all zeros" in result.output
