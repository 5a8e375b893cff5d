"""The exported file: golden graph, exactness in three executions, and nothing else changed."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.printer
import pytest
import torch

from exporters import export_qdq, write_model
from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.errors import ExportError
from toolchain.pipeline import Quantized, quantize
from toolchain.protos import rename_values
from toolchain.runtime import Optimization
from toolchain.samples import Samples
from toolchain.scheme import TARGETS
from toolchain.simulation import simulate
from toolchain.source import SourceModel

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")


def quantized(model: onnx.ModelProto, folder: Path, samples: Samples, **options: Any) -> tuple[SourceModel, Quantized]:
    source = zoo.loaded(model, folder)
    settings: dict[str, Any] = {"algorithm": "mse", "device": "cpu", **options}
    return source, quantize(source, samples, Config(**settings))


def executions(source: SourceModel, found: Quantized, samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(torch simulation, ONNX Runtime as the file says, ONNX Runtime by default)."""
    exported = export_qdq(source.model, found.table)
    name = source.graph.outputs[0]
    by_file, default = (
        runtime.run(runtime.session(exported, optimization=o), samples.inputs)[name] for o in (Optimization.NONE, Optimization.DEFAULT)
    )
    return simulate(source, found.table, samples, CPU)[name], by_file, default


BITS = [(w, a) for w, a in itertools.product((2, 3, 4, 8), (2, 4, 8, 16)) if (w, a) != (8, 2)]


@pytest.mark.parametrize(("weight_bits", "activation_bits"), BITS)
@pytest.mark.parametrize("schemes", [("symmetric", "asymmetric"), ("asymmetric", "asymmetric"), ("symmetric", "symmetric")])
def test_three_executions_agree(weight_bits: int, activation_bits: int, schemes: tuple[str, str], tmp_path: Path) -> None:
    samples = zoo.images(64)
    options = {"weight_bits": weight_bits, "activation_bits": activation_bits, "weight_scheme": schemes[0], "activation_scheme": schemes[1]}
    source, found = quantized(zoo.tiny_resnet(), tmp_path, samples, **options)
    simulated, by_file, default = executions(source, found, samples)
    # A code flips where two float sums straddle a rounding tie; it moves few samples, and those by few steps.
    for other in (by_file, default):
        close = np.abs(other - simulated).max(axis=1) <= 1e-4 * np.abs(simulated).max()
        assert close.mean() >= 0.9
        assert (other.argmax(1) == simulated.argmax(1)).mean() >= 0.95


def test_intermediate_values_agree_by_name(tmp_path: Path) -> None:
    samples = zoo.images(16)
    source, found = quantized(zoo.tiny_resnet(), tmp_path, samples)
    exported = export_qdq(source.model, found.table)
    names = [name for name, grid in found.table.tensors.items() if grid.codes is None]
    values = runtime.run_exposed(exported, samples.inputs, [f"{name}_dequantized" for name in names])
    origins = {name: copy.origin for name, copy in found.table.copies.items()}
    floats = runtime.run_exposed(source.model, samples.inputs, [name for name in names if name not in origins])
    for name in names:
        grid = found.table[name]
        codes = values[f"{name}_dequantized"] / grid.scale + grid.zero_point
        np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3, rtol=0)  # every value lies on its grid
        assert codes.min() >= grid.spec.qmin - 1e-3
        assert codes.max() <= grid.spec.qmax + 1e-3
        assert np.corrcoef(values[f"{name}_dequantized"].ravel(), floats[origins.get(name, name)].ravel())[0, 1] > 0.8


def test_integer_kernels_execute_every_layer(tmp_path: Path) -> None:
    samples = zoo.images(8)
    source, found = quantized(zoo.tiny_resnet(), tmp_path, samples)
    path = tmp_path / "q.onnx"
    write_model(export_qdq(source.model, found.table), path)
    kinds = runtime.kernel_counts(path)
    assert kinds["QLinearConv"] == 6
    assert kinds["QLinearAdd"] == 3  # two sums, and a copy on another grid
    assert kinds["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "Add", "Relu"} & set(kinds)


def test_only_quantizers_and_weights_change(tmp_path: Path) -> None:
    model = zoo.tiny_resnet()
    model.metadata_props.add(key="author", value="somebody")
    model.doc_string = "a model"
    source, found = quantized(model, tmp_path, zoo.images(8))
    exported = export_qdq(source.model, found.table, {"version": "1"})
    assert exported.graph.input == source.model.graph.input
    assert exported.graph.output == source.model.graph.output
    assert exported.opset_import == source.model.opset_import
    assert exported.doc_string == "a model"
    assert {p.key: p.value for p in exported.metadata_props} == {"author": "somebody", "mrecg_onnx.version": "1"}
    kept = {
        node.name: node
        for node in exported.graph.node
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") and not node.name.endswith(("_Clip", "_operand_Add"))
    }
    absorbed = {node.name for node in source.graph.nodes if node.op_type in ("Relu", "Clip")}
    assert set(kept) == {node.name for node in source.graph.nodes} - absorbed
    origins = {name: copy.origin for name, copy in found.table.copies.items()}
    for name, node in kept.items():
        before = source.node_protos[name]
        assert node.op_type == before.op_type
        assert node.attribute == before.attribute
        assert node.output == before.output
        read = [value.removesuffix("_dequantized") for value in node.input]
        assert [origins.get(value, value) for value in read] == list(before.input)
    floats = [t.name for t in exported.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and not t.name.endswith("_scale")]
    assert not floats
    onnx.checker.check_model(exported, full_check=True)


def test_an_activation_that_is_also_an_output_stays(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    y = b.conv("x", 3, 8, act="relu")
    model = b.model(b.head(b.conv(y, 8, 8, act="relu"), 8), y)
    source, found = quantized(model, tmp_path, zoo.images(8))
    exported = export_qdq(source.model, found.table)
    relus = [node for node in exported.graph.node if node.op_type == "Relu"]
    assert [node.output[0] for node in relus] == [y]
    values = runtime.run(runtime.session(exported), zoo.images(8).inputs)
    assert len(np.unique(values[y])) > 16  # the output itself is not on the 4-bit grid


def test_16_bits_raise_the_opset_and_8_do_not(tmp_path: Path) -> None:
    samples = zoo.images(8)
    for bits, opset in ((8, 17), (16, 21)):
        source, found = quantized(zoo.tiny_resnet(), tmp_path, samples, activation_bits=bits)
        exported = export_qdq(source.model, found.table)
        assert exported.opset_import[0].version == opset
        runtime.session(exported)


@pytest.mark.parametrize(("target", "golden"), [("ort-cpu", "small_w4a4"), ("tensorrt", "small_w4a4_tensorrt"), ("qnn", "small_w4a4_qnn")])
def test_golden_graph(target: str, golden: str, tmp_path: Path) -> None:
    """The exact file for a small model, as text. To renew it after a wanted change: delete it, run the test, read the difference."""
    b = zoo.Builder({"x": ["N", 2, 4, 4]})
    x = b.conv("x", 2, 2, act="relu6")
    x = b.op("Add", b.conv(x, 2, 2), x, name="sum")
    source, found = quantized(b.model(b.head(x, 2, 2)), tmp_path, zoo.images(4, (2, 4, 4)), target=target)
    exported = export_qdq(source.model, found.table, scheme=TARGETS[target])
    del exported.graph.initializer[:]  # their names are in the nodes; their values depend on the machine's last bit
    text = onnx.printer.to_text(exported) + "\n"
    path = GOLDEN / f"{golden}.onnx.txt"
    if not path.exists():
        path.write_text(text, encoding="utf-8")
        pytest.fail(f"{path.name} was written anew; run again")
    assert text == path.read_text(encoding="utf-8")


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = zoo.tiny_resnet(), tmp_path / "out.onnx"
    path.write_bytes(b"old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full_disk)
        with pytest.raises(ExportError, match="No space left"):
            write_model(model, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_model(model, path)
    assert onnx.load(path) == model
    assert path.stat().st_mode & 0o444 == 0o444  # readable like any other new file


def test_long_names_are_not_repeated(tmp_path: Path) -> None:
    """Some converters join the names of all that was fused; around such a value there are a dozen others."""
    plain, joined = zoo.tiny_resnet(), zoo.tiny_resnet()
    kept = {output.name for output in plain.graph.output}
    fused = "fused/BatchNorm;" * 5
    rename_values(joined.graph, {v: f"{fused}{v};{fused}" for n in plain.graph.node for v in n.output if v not in kept}, outputs=True)
    del joined.graph.value_info[:]
    samples, outputs = zoo.images(8), []
    for model in (plain, joined):
        source, found = quantized(model, tmp_path, samples)
        exported = export_qdq(source.model, found.table)
        given = {*source.constants, *(value for node in source.graph.nodes for value in node.outputs)}
        new = {t.name for t in exported.graph.initializer} | {value for node in exported.graph.node for value in node.output}
        assert max(map(len, new - given)) <= 32 + len("_dequantized") + len(".99")
        outputs.append(*runtime.run(runtime.session(exported), samples.inputs).values())
    np.testing.assert_array_equal(*outputs)
