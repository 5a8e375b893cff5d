"""Weights outside the protobuf: mapped where they are, never held twice, and written beside the graph where one protobuf is too small."""

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from exporters import export_qdq, write_model
from tests import zoo
from toolchain import large, runtime
from toolchain.config import Config
from toolchain.errors import ExportError, UnsupportedModelError
from toolchain.pipeline import quantize
from toolchain.source import load_source
from toolchain.validation import validate

CONFIG = Config(device="cpu", algorithm="minmax", weight_bits=8, activation_bits=8)


def external(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "outside.onnx"
    onnx.save(model, path, save_as_external_data=True, location="outside.bin", size_threshold=64)
    return path


def inside(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "inside.onnx"
    onnx.save(model, path)
    return path


def exported_from(path: Path) -> onnx.ModelProto:
    source = load_source(path)
    model = export_qdq(source.model, quantize(source, zoo.images(8), CONFIG).table)
    large.brought_in(model)  # the file of its weights goes with the source
    return model


@pytest.mark.parametrize("outside", [True, False], ids=["mapped", "read"])
def test_where_weights_are_makes_no_difference(outside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.tiny_resnet()
    expected = exported_from(inside(model, tmp_path)).graph
    monkeypatch.setattr(large, "OUTSIDE", 1000 if outside else large.OUTSIDE)
    for path in (external(model, tmp_path), inside(model, tmp_path)):
        source = load_source(path)
        assert (large.folder_of(source.model) is not None) is outside
        found = exported_from(path).graph  # ONNX Runtime writes out default attributes when weights are outside
        assert list(found.initializer) == list(expected.initializer)
        assert [(n.name, n.op_type, *n.input, *n.output) for n in found.node] == [
            (n.name, n.op_type, *n.input, *n.output) for n in expected.node
        ]


def test_weights_that_nodes_make_are_moved_out_once_they_are_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, 8, 8] x) => (float[N, 20, 6, 6] y)
        <int64[4] shape = {20, 3, 3, 3}> { w = ConstantOfShape <value: tensor = float[1] {0.5}> (shape)  y = Conv(x, w) }
    """)
    path = inside(model, tmp_path)
    expected = exported_from(path)
    monkeypatch.setattr(large, "OUTSIDE", 1000)
    source = load_source(path)
    assert path.stat().st_size < 1000 <= large.weight_bytes(source.model)
    assert large.folder_of(source.model) is not None
    assert np.array_equal(source.constants["w"], np.full((20, 3, 3, 3), 0.5, np.float32))
    assert list(exported_from(path).graph.initializer) == list(expected.graph.initializer)


def test_the_folder_of_mapped_weights_lives_as_long_as_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "OUTSIDE", 1000)
    source = load_source(external(zoo.tiny_resnet(), tmp_path))
    folder = large.folder_of(source.model)
    assert folder is not None
    assert [file.name for file in folder.iterdir() if file.suffix == ".weights"] == ["cleaned.weights"]
    del source
    assert not folder.exists()


@pytest.mark.parametrize("limit", [1000, large.LIMIT], ids=["beyond the limit", "within"])
def test_a_large_result_is_two_files(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "OUTSIDE", 1000)
    monkeypatch.setattr(large, "LIMIT", limit)
    path, output, samples = external(zoo.tiny_resnet(), tmp_path), tmp_path / "made.onnx", zoo.images(8)
    source = load_source(path)
    found = quantize(source, samples, Config(device="cpu", algorithm="minmax", keep_float=(source.graph.weighted[3].name,)))
    write_model(export_qdq(source.model, found.table), output)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"outside.onnx", "outside.bin", "made.onnx", *(["made.onnx.data"] if limit == 1000 else [])}
    onnx.checker.check_model(str(output))
    checked = validate(path, output, samples, large.file_bytes(path), "cpu")
    assert checked.float_bytes > checked.quantized_bytes == sum(file.stat().st_size for file in tmp_path.glob("made.*"))
    assert checked.integer_arithmetic.steps <= 1


def test_nothing_is_left_of_a_result_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LIMIT", 1000)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(large, "_written", full)
    with pytest.raises(ExportError, match="No space left"):
        write_model(zoo.tiny_resnet(), tmp_path / "made.onnx")
    assert not list(tmp_path.iterdir())


def test_storing_leaves_the_model_alone_and_loses_nothing(tmp_path: Path) -> None:
    model = zoo.tiny_resnet()
    before = model.SerializeToString()
    large.stored(model, tmp_path / "model.onnx")
    assert model.SerializeToString() == before
    loaded = onnx.load(tmp_path / "model.onnx")
    for tensor in loaded.graph.initializer:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    assert [t.SerializeToString() for t in loaded.graph.initializer] == [t.SerializeToString() for t in model.graph.initializer]
    assert loaded.graph.node == model.graph.node


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, tensor: (folder / "outside.bin").unlink(), "not in a file beside it|outside.bin"),
        (lambda folder, tensor: (folder / "outside.bin").write_bytes(b"short"), "is 5 bytes long|5"),
        (lambda folder, tensor: large._keep_entries(tensor, {"location": "../elsewhere.bin"}), "elsewhere"),
        (lambda folder, tensor: large._keep_entries(tensor, {"location": "outside.bin", "offset": "-8"}), "outside.bin|-8"),
        (lambda folder, tensor: tensor.dims.append(1 << 40), "outside.bin|bytes"),
    ],
    ids=["missing", "short", "elsewhere", "before the start", "huge"],
)
@pytest.mark.parametrize("limit", [1000, large.OUTSIDE], ids=["mapped", "read"])
def test_damaged_external_data_is_named(damage: object, message: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(damage)
    monkeypatch.setattr(large, "OUTSIDE", limit)
    path = external(zoo.tiny_resnet(), tmp_path)
    (tmp_path.parent / "elsewhere.bin").write_bytes(b"\0" * 100_000)
    model = onnx.load(path, load_external_data=False)
    damage(tmp_path, next(t for t in model.graph.initializer if t.external_data))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        load_source(path)
    assert str(caught.value).startswith(str(path))


def test_mapped_weights_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 layers of 1 MB: none but the one in hand may be in memory (as Python sees it; ONNX Runtime maps the same file)."""
    monkeypatch.setattr(large, "OUTSIDE", 1000)
    b = zoo.Builder({"x": ["N", 512]})
    x = "x"
    for i in range(8):
        x = b.op("Tanh", b.op("MatMul", x, b.weight(f"w{i}", (512, 512), 512)))
    path = external(b.model(x), tmp_path)
    size = large.file_bytes(path)
    del b
    tracemalloc.start()
    source = load_source(path)
    _, peak = tracemalloc.get_traced_memory()
    assert peak < size / 8
    session = runtime.exposing(source.model, [source.graph.nodes[3].outputs[0]])
    assert len(session.run(None, {"x": np.ones((2, 512), np.float32)})) == 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 8


def test_opsets_are_raised_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "OUTSIDE", 1000)
    model = zoo.tiny_resnet()
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 11))
    source = load_source(external(model, tmp_path))
    assert source.opset == 13
    found = quantize(source, zoo.images(8), Config(device="cpu", algorithm="minmax", weight_bits=4, activation_bits=16))
    exported = export_qdq(source.model, found.table, scheme=Config(activation_bits=16).scheme)  # 16 bits need opset 21
    written = runtime.run(runtime.session(exported), zoo.images(8).inputs)
    floats = runtime.run(runtime.session(source.model), zoo.images(8).inputs)
    for name, array in floats.items():
        assert np.corrcoef(array.ravel(), written[name].ravel())[0, 1] > 0.9
