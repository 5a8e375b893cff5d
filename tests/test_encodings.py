"""Tables as files: exact both ways, refused when damaged, and exported again for another target without learning."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from exporters import aimet, export_qdq
from tests import zoo
from toolchain import runtime, validation
from toolchain.cli import main
from toolchain.config import Config
from toolchain.encodings import Encodings, dumps, loads
from toolchain.errors import ExportError, UsageError
from toolchain.float_operators import float_operators
from toolchain.pipeline import quantize
from toolchain.quant_table import QuantSpec, QuantTable, TensorQuant
from toolchain.scheme import TARGETS
from toolchain.source import SourceModel


def same(a: TensorQuant, b: TensorQuant) -> bool:
    arrays = [(a.scale, b.scale), (a.zero_point, b.zero_point), (a.codes, b.codes)]
    equal = all((x is None) == (y is None) and (x is None or np.array_equal(np.asarray(x), np.asarray(y))) for x, y in arrays)
    types = all(np.asarray(x).dtype == np.asarray(y).dtype for x, y in arrays[:2])
    return equal and types and (a.spec, a.tied_to, a.fixed) == (b.spec, b.tied_to, b.fixed)


def learned(folder: Path, model: onnx.ModelProto | None = None, **options: Any) -> tuple[SourceModel, Config, QuantTable]:
    source = zoo.loaded(model or zoo.every_rule(), folder)
    config = Config(**{"algorithm": "mse", "device": "cpu", **options})
    return source, config, quantize(source, zoo.images(8), config).table


@pytest.mark.parametrize("options", [{}, {"target": "qnn", "activation_bits": 16}, {"activation_bits": 32, "block_size": 16}])
def test_a_table_survives_the_file_exactly(options: dict[str, Any], tmp_path: Path) -> None:
    source, config, table = learned(tmp_path, **options)
    text = dumps(Encodings(table, source.sha256, config.target, "words"))
    back = loads(text, "file")
    assert (back.source_sha256, back.target, back.precision) == (source.sha256, config.target, "words")
    assert list(back.table) == list(table)
    assert all(same(back.table[name], table[name]) for name in table)
    assert dumps(back) == text


@given(
    scale=hnp.arrays(np.float32, 5, elements=st.floats(2**-100, 2**100, width=32)),
    codes=hnp.arrays(np.int32, (5, 3), elements=st.integers(-8, 7)),
)
def test_every_float_and_code_survives(scale: np.ndarray, codes: np.ndarray) -> None:
    grid = TensorQuant(QuantSpec(4, signed=True, symmetric=True, axis=0), scale, np.zeros(5, np.int32), codes)
    back = loads(dumps(Encodings(QuantTable({"w": grid}), "", "", "")), "file").table["w"]
    assert same(back, grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "is not a table of encodings"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "version 9; this program reads"),
        (lambda text: text.replace('"scale": [', '"scale": [-'), "scales of 'w' are not positive"),
        (lambda text: text.replace('"bits": 4', '"bits": 2'), "codes of 'w' are off their grid"),
        (lambda text: text.replace('"target"', '"goal"'), "no entry 'target'"),
    ],
)
def test_damaged_tables_are_refused(change: Any, message: str) -> None:
    grid = TensorQuant(
        QuantSpec(4, signed=True, symmetric=True, axis=0), np.ones(2, np.float32), np.zeros(2, np.int32), np.array([[7], [-8]])
    )
    text = dumps(Encodings(QuantTable({"w": grid}), "sha", "ort-cpu", ""))
    with pytest.raises(UsageError, match=message):
        loads(change(text), "file")


def axes_of(source: SourceModel) -> dict[str, int]:
    return {weight: source.channel_axis(node) for node in source.graph.weighted if (weight := source.graph.weight(node)) is not None}


@pytest.mark.parametrize("version", ["1.0.0", "0.6.1"])
def test_aimet_encodings_bring_back_every_grid_and_code(version: str, tmp_path: Path) -> None:
    """Through the pair of files that AIMET writes: encodings, and a float model whose weights round to the learned codes."""
    source, _, table = learned(tmp_path, target="qnn", weight_bits=4, activation_bits=8)
    data = aimet.to_aimet(table)
    rounded = aimet.with_rounded_weights(source.model, table)
    constants = {t.name: numpy_helper.to_array(t) for t in rounded.graph.initializer}
    if version == "0.6.1":
        data = older(data)
    back = aimet.from_aimet(json.loads(json.dumps(data)), constants, axes_of(source), "file")
    expected = {name: grid for name, grid in table.tensors.items() if grid.spec.bits < 32}
    assert back.tensors.keys() == expected.keys()
    for name, grid in expected.items():
        found = back[name]
        assert (found.spec.bits, found.spec.signed) == (grid.spec.bits, grid.spec.signed)
        np.testing.assert_array_equal(found.scale, grid.scale)
        np.testing.assert_array_equal(found.zero_point, grid.zero_point)
        if grid.codes is not None:
            np.testing.assert_array_equal(found.codes, grid.codes)


def older(data: dict[str, Any]) -> dict[str, Any]:
    def rows(entry: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"bitwidth": entry["bw"], "dtype": "int", "is_symmetric": str(entry["is_sym"]), "scale": scale, "offset": offset}
            for scale, offset in zip(entry["scale"], entry["offset"], strict=True)
        ]

    kinds = ("activation_encodings", "param_encodings")
    return {"version": "0.6.1", **{kind: {entry["name"]: rows(entry) for entry in data[kind]} for kind in kinds}}


def test_an_encoding_counts_from_zero() -> None:
    """The arithmetic of QNN: x = (q + offset) * scale with q from 0."""
    unsigned = TensorQuant(QuantSpec(8, signed=False, symmetric=False), np.float32(0.5), np.int32(100))
    signed = TensorQuant(
        QuantSpec(4, signed=True, symmetric=True, axis=0), np.ones(2, np.float32), np.zeros(2, np.int32), np.array([[1], [-8]])
    )
    data = aimet.to_aimet(QuantTable({"a": unsigned, "w": signed}))
    (activation,), (weight,) = data["activation_encodings"], data["param_encodings"]
    assert (activation["offset"], activation["enc_type"], activation["bw"]) == ([-100], "PER_TENSOR", 8)
    assert (weight["offset"], weight["enc_type"], weight["is_sym"]) == ([-8, -8], "PER_CHANNEL", True)


def test_aimet_files_that_do_not_fit(tmp_path: Path) -> None:
    source, _, table = learned(tmp_path)
    data = aimet.to_aimet(table)
    with pytest.raises(UsageError, match=r"version 3.0.0 are not read"):
        aimet.from_aimet({**data, "version": "3.0.0"}, source.constants, axes_of(source), "file")
    with pytest.raises(UsageError, match="made for another model"):
        aimet.from_aimet(data, {}, {}, "file")
    with pytest.raises(UsageError, match="is not a file of AIMET encodings"):
        aimet.from_aimet({"version": "1.0.0"}, source.constants, axes_of(source), "file")
    blocks = learned(tmp_path, activation_bits=32, block_size=16)[2]
    with pytest.raises(ExportError, match="block-wise"):
        aimet.to_aimet(blocks)


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_stored_weights_come_back_from_a_pair(tmp_path: Path) -> None:
    """Those of a recurrent layer have a scale for each channel of an axis of their own."""
    onnx.save(zoo.recurrent(hidden=16), tmp_path / "net.onnx")
    np.savez(tmp_path / "calib.npz", **zoo.images(8, (5, 8)).inputs)  # pyright: ignore[reportArgumentType]
    given = ("--calibration-data", tmp_path / "calib.npz", "--algorithm", "mse", "--device", "cpu", "--encodings", tmp_path / "net.json")
    assert invoke("quantize", tmp_path / "net.onnx", *given).exit_code == 0
    pair = invoke("export", tmp_path / "net.onnx", tmp_path / "net.json", "--format", "aimet", "-o", tmp_path / "pair.onnx")
    assert pair.exit_code == 0, pair.output
    back = invoke("export", tmp_path / "pair.onnx", tmp_path / "pair.encodings", "-o", tmp_path / "back.onnx")
    assert back.exit_code == 0, back.output
    first, second = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / name).graph.initializer} for name in ("net.w4a4.onnx", "back.onnx")
    )
    assert first["rec_r_scale"].size == 64
    np.testing.assert_array_equal(first["rec_r_quantized"], second["rec_r_quantized"])


def test_export_again_from_the_command_line(tmp_path: Path) -> None:
    onnx.save(zoo.tiny_resnet(), tmp_path / "net.onnx")
    np.savez(tmp_path / "calib.npz", **zoo.images(8).inputs)  # pyright: ignore[reportArgumentType]
    table, model = tmp_path / "net.json", tmp_path / "net.onnx"
    done = invoke(
        "quantize", model, "--calibration-data", tmp_path / "calib.npz", "--algorithm", "mse", "--device", "cpu", "--encodings", table, "-q"
    )
    assert done.exit_code == 0, done.output
    again = invoke("export", model, table, "-o", tmp_path / "again.onnx")
    assert again.exit_code == 0, again.output
    first, second = (onnx.load(tmp_path / name) for name in ("net.w4a4.onnx", "again.onnx"))
    assert first.graph == second.graph  # the same file but for its metadata
    ours, theirs = ({entry.key: entry.value for entry in file.metadata_props} for file in (second, first))
    assert ours["mrecg_onnx.config"] == theirs["mrecg_onnx.config"]
    assert ours["mrecg_onnx.source_sha256"] == theirs["mrecg_onnx.source_sha256"]
    other = invoke("export", model, table, "--target", "tensorrt", "-o", tmp_path / "trt.onnx")
    assert "learned for ort-cpu; tensorrt would have learned under other rules:" in other.output
    assert "activation symmetric: False -> True" in other.output
    assert other.exit_code == 9  # written all the same
    assert "but tensorrt refuses it: uint8 is read as int8" in other.output
    assert "give --calibration-data here, or quantize with --target tensorrt instead" in other.output
    assert (tmp_path / "trt.onnx").exists()
    small = invoke("export", model, table, "--storage", "small", "-o", tmp_path / "small.onnx")
    assert small.exit_code == 0, small.output
    assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "again.onnx").stat().st_size
    outputs = [
        next(iter(runtime.run(runtime.session(tmp_path / f"{name}.onnx"), zoo.images(8).inputs).values())) for name in ("again", "small")
    ]
    assert (outputs[0].argmax(1) == outputs[1].argmax(1)).mean() >= 0.75  # 8 samples; integer kernels round elsewhere
    pair = invoke("export", model, table, "--format", "aimet", "-o", tmp_path / "pair.onnx")
    assert pair.exit_code == 0, pair.output
    assert "rounded to nearest" not in pair.output
    unrounded = invoke("export", model, tmp_path / "pair.encodings", "-o", tmp_path / "unrounded.onnx")
    assert "weights of" in unrounded.output
    assert "rounded to nearest. Learned rounding is in the model that was written beside the encodings" in unrounded.output
    assert unrounded.exit_code == 2  # it has no values for the layers that requantize theirs
    assert "encodings go with the model that was written beside them" in unrounded.output
    imported = invoke("export", tmp_path / "pair.onnx", tmp_path / "pair.encodings", "--target", "qnn", "-o", tmp_path / "qnn.onnx")
    assert imported.exit_code == 9, imported.output
    assert "but qnn refuses it: it makes a graph output in float" in imported.output
    quantizers = {node.name for node in onnx.load(tmp_path / "qnn.onnx").graph.node}
    assert {f"{name}_QuantizeLinear" for name in loads(table.read_text(), "").table.copies} <= quantizers
    refused = invoke("export", tmp_path / "pair.onnx", table, "-o", tmp_path / "no.onnx")
    assert refused.exit_code == 2
    assert "was learned on another model" in refused.output
    assert invoke("export", model, table, "--target", "tensorflow", "-o", tmp_path / "no.onnx").exit_code == 2
    assert not (tmp_path / "no.onnx").exists()


@pytest.fixture(scope="module")
def learned_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model (net.onnx), its samples (calib.npz) and a table that was learned for ort-cpu (net.json)."""
    folder = tmp_path_factory.mktemp("learned")
    onnx.save(zoo.every_rule(), folder / "net.onnx")
    np.savez(folder / "calib.npz", **zoo.images(16).inputs)  # pyright: ignore[reportArgumentType]
    given = ["--calibration-data", folder / "calib.npz", "--encodings", folder / "net.json", "-p", "w4a8", "--iterations", "20", "-q"]
    done = invoke("quantize", folder / "net.onnx", *given, "--device", "cpu")
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_a_table_for_another_target_is_calibrated_where_it_must_be(target: str, learned_table: Path, tmp_path: Path) -> None:
    """Every target takes the file; what rounding and biases learned is in it, as far as the target has such weights."""
    model, table, output = learned_table / "net.onnx", learned_table / "net.json", tmp_path / "made.onnx"
    done = invoke("export", model, table, "--target", target, "--calibration-data", learned_table / "calib.npz", "-o", output)
    assert done.exit_code == 0, done.output
    assert "instead" not in done.output
    before, after = loads(table.read_text(), "").table, constants_of(output)
    kept = 0
    for name, grid in before.tensors.items():
        codes = after.get(f"{name}_quantized")
        if grid.codes is not None and grid.spec.bits < 32 and codes is not None:
            kept += np.array_equal(codes, grid.codes)
    most = 7 if target in ("openvino", "portable") else 8  # bits of weights beside 8-bit activations
    weights = sum(grid.codes is not None and grid.spec.bits <= most for grid in before.tensors.values())
    if target != "qnn":  # which has one scale for the weights of a Gemm
        assert kept == weights > 3, done.output
    assert f"kept of the table: {kept} of" in done.output
    floats, made = (next(iter(runtime.run(runtime.session(path), zoo.images(16).inputs).values())) for path in (model, output))
    assert validation.sqnr(floats, made) > 12  # 4-bit weights; a bias or step of another table leaves 0 to 5 dB


def test_a_table_for_its_own_target_stays(learned_table: Path, tmp_path: Path) -> None:
    again, made = tmp_path / "again.onnx", tmp_path / "made.onnx"
    model, table = learned_table / "net.onnx", learned_table / "net.json"
    assert invoke("export", model, table, "-o", again).exit_code == 0
    done = invoke("export", model, table, "--calibration-data", learned_table / "calib.npz", "-o", made)
    assert done.exit_code == 0, done.output
    ours, theirs = constants_of(made), constants_of(again)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, name)


def test_samples_are_refused_where_nothing_says_how_a_table_was_made(learned_table: Path, tmp_path: Path) -> None:
    facts = json.loads((learned_table / "net.json").read_text())
    del facts["config"]  # as earlier versions wrote it
    (tmp_path / "old.json").write_text(json.dumps(facts))
    given = ["--calibration-data", learned_table / "calib.npz", "-o", tmp_path / "no.onnx"]
    done = invoke("export", learned_table / "net.onnx", tmp_path / "old.json", "--target", "qnn", *given)
    assert done.exit_code == 2
    assert "does not say with which settings it was learned" in done.output
    wide = invoke("export", learned_table / "net.onnx", learned_table / "net.json", "--image-size", "8", "-o", tmp_path / "no.onnx")
    assert wide.exit_code == 2
    assert "add --calibration-data" in wide.output
    assert not (tmp_path / "no.onnx").exists()


def constants_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_float_biases_come_back_for_targets_that_want_them(tmp_path: Path) -> None:
    source, _, table = learned(tmp_path, zoo.tiny_resnet())
    exported = export_qdq(source.model, table, scheme=TARGETS["openvino"])
    kinds = {t.data_type for t in exported.graph.initializer if t.name.endswith("_b") or t.name.endswith("_b_quantized")}
    assert kinds == {onnx.TensorProto.FLOAT}


def foreign(data: dict[str, Any], table: QuantTable) -> dict[str, Any]:
    """Encodings as other tools write them: none of biases, or of what is only moved; one of a constant that is folded away."""
    kept = {name for name, grid in table.tensors.items() if grid.tied_to is None and grid.spec.bits < 32}
    groups = {kind: [e for e in data[kind] if e["name"] in kept] for kind in ("activation_encodings", "param_encodings")}
    groups["activation_encodings"].append({**groups["activation_encodings"][0], "name": "folded"})
    return {**data, **groups}


def test_what_other_tools_leave_unsaid_is_completed(tmp_path: Path) -> None:
    """Encodings of layers alone make the file that the whole table makes, with integer kernels and int32 biases."""
    source, _, table = learned(tmp_path, zoo.tiny_resnet(), weight_bits=8, activation_bits=8)
    model = aimet.with_rounded_weights(source.model, table)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "one"))
    model.graph.node.insert(0, onnx.helper.make_node("Neg", ["one"], ["folded"]))
    onnx.save(model, tmp_path / "pair.onnx")
    (tmp_path / "pair.encodings").write_text(json.dumps(foreign(aimet.to_aimet(table), table)))
    done = invoke("export", tmp_path / "pair.onnx", tmp_path / "pair.encodings", "-o", tmp_path / "made.onnx")
    assert done.exit_code == 0, done.output
    assert "loading folds these values away: folded" in done.output
    made, whole = onnx.load(tmp_path / "made.onnx").graph, export_qdq(source.model, table).graph
    assert [node.name for node in made.node] == [node.name for node in whole.node]
    assert not runtime_floats(tmp_path / "made.onnx")
    ours, theirs = ({t.name: numpy_helper.to_array(t) for t in graph.initializer} for graph in (made, whole))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


def runtime_floats(path: Path) -> list[str]:
    return [row.node for row in float_operators(runtime.optimized(path))]


def test_the_grid_of_a_graph_output_is_left_where_the_target_has_it_in_float(tmp_path: Path) -> None:
    source, _, table = learned(tmp_path, zoo.tiny_resnet(), target="qnn", weight_bits=8, activation_bits=8)
    (output,) = source.graph.outputs
    assert output in table
    graph = export_qdq(source.model, table, scheme=TARGETS["ort-cpu"]).graph
    assert f"{output}_QuantizeLinear" not in {node.name for node in graph.node}
    made = {value for node in graph.node for value in node.output}
    assert output in made


def test_constants_that_are_no_weights_get_codes() -> None:
    entry = {"name": "c", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 8, "is_sym": False, "scale": [0.5], "offset": [-2]}
    data = {"version": "1.0.0", "activation_encodings": [entry], "param_encodings": []}
    found = aimet.from_aimet(data, {"c": np.array([0.0, 1.0, 500.0], np.float32)}, {}, "file")["c"]
    assert found.codes is not None
    np.testing.assert_array_equal(found.codes, [2, 4, 255])
