"""The command line as its user meets it: what it prints, what it writes, and how it fails."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from tests import zoo
from toolchain import runtime
from toolchain.cli import main


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, calibration samples, and evaluation samples labelled by the float model itself."""
    onnx.save(zoo.tiny_resnet(), tmp_path / "net.onnx")
    np.savez(tmp_path / "calib.npz", **zoo.images(32).inputs)  # pyright: ignore[reportArgumentType]
    x = zoo.images(40, seed=5).inputs["x"]
    scores = next(iter(runtime.run(runtime.session(tmp_path / "net.onnx"), {"x": x}).values()))
    np.savez(tmp_path / "eval.npz", x=x, labels=scores.argmax(1))
    return tmp_path


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def quantize(place: Path, *extra: object, model: str = "net.onnx", data: str | None = "calib.npz") -> Result:
    given = ["--calibration-data", place / data] if data is not None else []
    return invoke("quantize", place / model, *given, "--device", "cpu", "--iterations", 5, *extra)


def test_the_whole_path(place: Path) -> None:
    result = quantize(place, "--eval-data", place / "eval.npz", "-v", "--sensitivity")
    assert result.exit_code == 0, result.output
    output = place / "net.w4a4.onnx"
    assert f"wrote {output}" in result.output.replace("\n", "")
    runtime.session(output)
    report = json.loads((place / "net.w4a4.report" / "report.json").read_text())
    checked = report["validation"]
    assert checked["top1_float"] == 100.0
    assert checked["top1_quantized"] == checked["agreement"]
    assert checked["samples"] == 40
    assert checked["simulation"]["agreement"] >= 97.5  # one of 40 samples may sit on a rounding tie
    assert report["config"]["iterations"] == 5
    assert [unit["unit"] for unit in report["units"]] == report["plan"]["units"]
    assert all(unit["loss_before"] > 0 and unit["seconds"] > 0 for unit in report["units"])
    assert report["coverage"]["weights_quantized"] == report["coverage"]["weights"]
    assert set(report["oscillation"]) == {"blocks_calibrated", "units_before", "units_after"}
    assert {"torch", "onnx", "onnx2torch", "numpy"} <= set(report["environment"]["versions"])
    assert report["memory_peak_bytes"] > 0
    assert report["seconds"]["best_preset_estimate"] > 0
    assert report["verdict"]["ship"] in ("yes", "no", "unclear")
    assert len(report["sensitivity"]["layers"]) == report["coverage"]["layers"]
    assert all("sqnr" in row for row in report["grids"].values() if row["tied_to"] is None)
    page = (place / "net.w4a4.report" / "report.html").read_text(encoding="utf-8")
    assert f"{checked['top1_quantized']:.2f} %" in page
    metadata = {entry.key: entry.value for entry in onnx.load(output).metadata_props}
    assert metadata["mrecg_onnx.source_sha256"] == report["model"]["sha256"]
    assert str(place) not in metadata["mrecg_onnx.config"]


def test_without_evaluation_data_it_says_what_it_measured_on(place: Path) -> None:
    result = quantize(place, "--algorithm", "mse", "-p", "w8a8")
    assert result.exit_code == 0
    assert "the calibration samples" in result.output.replace("\n", " ")
    assert "the same prediction as float" in " ".join(result.output.split())
    assert "unclear" in result.output  # on its own calibration samples it cannot know
    assert "top-1" not in result.output
    assert (place / "net.w8a8.onnx").is_file()


def test_quiet_prints_nothing(place: Path) -> None:
    result = quantize(place, "--algorithm", "mse", "-q")
    assert (result.exit_code, result.output) == (0, "")


def test_dry_run_shows_the_plan_and_writes_nothing(place: Path) -> None:
    before = sorted(place.iterdir())
    result = quantize(place, "--dry-run", "--units", "transitions")
    assert result.exit_code == 0
    assert "b01" in result.output
    assert "dry run" in result.output
    assert sorted(place.iterdir()) == before


def test_configuration_file_and_flags(place: Path) -> None:
    saved = place / "saved.toml"
    (place / "run.toml").write_text(f"precision = 'w3a4'\nalgorithm = 'mse'\ncalibration-data = '{place / 'calib.npz'}'\n")
    result = quantize(place, "--config", place / "run.toml", "--weight-bits", 2, "--save-config", saved, data=None)
    assert result.exit_code == 0, result.output
    assert (place / "net.w2a4.onnx").is_file()  # the flag wins over the file
    again = invoke("quantize", place / "net.onnx", "--config", saved, "-o", place / "again.onnx")
    assert again.exit_code == 0
    first, second = (onnx.load(place / name) for name in ("net.w2a4.onnx", "again.onnx"))
    assert first.graph == second.graph


def test_accuracy_gate(place: Path) -> None:
    gate = ["--eval-data", place / "eval.npz", "--algorithm", "minmax", "-p", "w2a2"]
    result = quantize(place, *gate, "--max-drop", 0.5)
    assert result.exit_code == 6
    assert re.search(r"error: top-1 accuracy dropped by [\d.]+ points, more than --max-drop 0.5", result.output)
    assert (place / "net.w2a2.onnx").is_file()  # the model is there all the same
    assert (place / "net.w2a2.report" / "report.json").is_file()
    assert quantize(place, *gate, "--max-drop", 100, "--overwrite").exit_code == 0


def test_an_opset_that_the_codes_need_is_a_note(place: Path) -> None:
    result = quantize(place, "-p", "w4a8", "--storage", "small", "--algorithm", "minmax", "--json")
    assert result.exit_code == 0, result.output
    assert "opset 17 was raised to 21 in the file, for the types of its codes" in json.loads(result.stdout)["model"]["notes"]
    plain = quantize(place, "-p", "w4a8", "--algorithm", "minmax", "--json", "--overwrite")
    assert not any("raised" in note for note in json.loads(plain.stdout)["model"]["notes"])


def test_validate(place: Path) -> None:
    quantize(place, "--algorithm", "mse")
    pair = [place / "net.onnx", place / "net.w4a4.onnx", "--eval-data", place / "eval.npz"]
    result = invoke("validate", *pair)
    assert result.exit_code == 0
    assert "top-1 accuracy" in result.output
    assert "points (95 %:" in result.output
    facts = json.loads(invoke("validate", *pair, "--json", "--eval-samples", 10).output)
    assert facts["samples"] == 10
    assert facts["simulation"] is None
    assert invoke("validate", *pair, "--max-drop", 0).exit_code in (0, 6)
    assert invoke("validate", place / "net.onnx", place / "none.onnx", "--eval-data", place / "eval.npz").exit_code == 2
    assert invoke("validate", *pair[:2]).exit_code == 2
    refused = invoke("validate", *pair, "--calibration-data", place / "calib.npz")
    assert refused.exit_code == 2
    assert "nothing is calibrated here" in refused.output


@pytest.mark.parametrize(("format_", "start"), [("html", "<!doctype html>"), ("svg", "<svg "), ("json", "{"), ("table", "Blocks")])
def test_inspect_formats_and_output(format_: str, start: str, place: Path) -> None:
    shown = invoke("inspect", place / "net.onnx", "--format", format_)
    assert shown.exit_code == 0
    assert shown.output.startswith(start)
    assert "b01" in shown.output
    written = place / f"net.{format_}"
    assert invoke("inspect", place / "net.onnx", "--format", format_, "-o", written).output == ""
    assert written.read_text(encoding="utf-8").split() == shown.output.split()
    by_ending = place / f"again.{format_}"
    assert invoke("inspect", place / "net.onnx", "-o", by_ending).exit_code == 0
    assert by_ending.read_bytes() == written.read_bytes()
    assert invoke("inspect", place / "net.onnx", "--format", "pdf").exit_code == 2
    assert invoke("inspect", place / "net.onnx", "--format", format_, "-o", place / "none" / "net").exit_code == 2


def test_inspect_draws_pixels(place: Path) -> None:
    assert invoke("inspect", place / "net.onnx", "-o", place / "net.png").output == ""
    found = (place / "net.png").read_bytes()
    assert found.startswith(b"\x89PNG")
    assert invoke("inspect", place / "net.onnx", "--format", "png").stdout_bytes == found


def test_diagnose(place: Path) -> None:
    quantize(place, "--algorithm", "mse", "-p", "w3a4")
    pair = [place / "net.onnx", place / "net.w3a4.onnx", "--data", place / "calib.npz"]
    result = invoke("diagnose", *pair)
    assert result.exit_code == 0, result.output
    assert "node_conv0" in result.output
    assert "try" in result.output
    facts = json.loads(invoke("diagnose", *pair, "--json", "--samples", 5, "--try", 2).stdout)
    assert facts["samples"] == 5
    assert [layer["gain"] is not None for layer in facts["layers"]] == [True, True, *[False] * (len(facts["layers"]) - 2)]
    assert sum(layer["share"] for layer in facts["layers"]) == pytest.approx(1.0)
    for arguments, words in (
        (pair[:2], "--data is missing"),
        ([pair[0], place / "none.onnx", *pair[2:]], "no such file"),
        ([pair[0], pair[0], *pair[2:]], "has no DequantizeLinear"),
        ([*pair, "--samples", 0], "--samples must be at least 1"),
    ):
        refused = invoke("diagnose", *arguments)
        assert refused.exit_code == 2, refused.output
        assert words in refused.output


def test_json_goes_to_standard_output_and_progress_to_standard_error(place: Path) -> None:
    result = quantize(place, "--json", "--no-sensitivity")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts == json.loads((place / "net.w4a4.report" / "report.json").read_text())
    assert facts["sensitivity"]["skipped"] == "--no-sensitivity"
    assert "reconstructing b00" in result.stderr
    assert json.loads(quantize(place, "--json", "--dry-run", "--overwrite").stdout)["plan"]["units"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("quantize --algorithm q", ["plain,qdrop"]),
        ("inspect --format ht", ["plain,html"]),
        ("export --target op", ["plain,openvino"]),
        ("quantize --calibration-data imag", ["file,imag"]),
        ("diagnose --data cal", ["file,cal"]),
        ("repo", ["plain,report"]),
    ],
)
def test_completion_offers_commands_choices_and_files(words: str, offered: list[str]) -> None:
    environment = {"_MRECG_ONNX_COMPLETE": "bash_complete", "COMP_WORDS": f"mrecg-onnx {words}", "COMP_CWORD": str(len(words.split()))}
    result = CliRunner().invoke(main, [], prog_name="mrecg-onnx", env=environment)
    assert result.output.split() == offered


def test_inspect_json_and_open_axes(place: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, "H", "W"]})
    onnx.save(b.model(b.head(b.conv("x", 3, 8, act="relu"), 8)), place / "open.onnx")
    facts = json.loads(invoke("inspect", place / "open.onnx", "--format", "json").output)
    assert facts["guessed_axes"] == ["x"]
    assert facts["islands"] == []
    facts = json.loads(invoke("inspect", place / "open.onnx", "--format", "json", "--input-shape", "x:3x16x16").output)
    assert facts["guessed_axes"] == []
    assert invoke("inspect", place / "open.onnx", "--input-shape", "y:3x16x16").exit_code == 2
    assert invoke("inspect", place / "open.onnx", "--input-shape", "x:big").exit_code == 2


def test_what_cannot_be_imported_is_an_island(place: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    y = b.head(b.conv("x", 3, 8, act="relu"), 8)
    onnx.save(b.model(b.foreign(y)), place / "odd.onnx")
    result = invoke("inspect", place / "odd.onnx")
    assert result.exit_code == 0
    assert "float island, left to ONNX Runtime: 1 node: Imputer has no torch converter (b01)" in result.output
    done = quantize(place, model="odd.onnx")
    assert done.exit_code == 0, done.output
    assert "Imputer has no torch converter" in " ".join(done.output.split())
    facts = json.loads((place / "odd.w4a4.report" / "report.json").read_text())
    assert [(row["operators"], row["block"]) for row in facts["islands"]] == [(["Imputer"], "b01")]


def bad(place: Path, name: str, **arrays: np.ndarray) -> list[object]:
    np.savez(place / name, **arrays)  # pyright: ignore[reportArgumentType]
    return ["--calibration-data", place / name]


GOOD = zoo.images(8).inputs["x"]


@pytest.mark.parametrize(
    ("model", "arrays", "options", "code", "message"),
    [
        ("text.onnx", {"x": GOOD}, [], 3, "not an ONNX file"),
        ("truncated.onnx", {"x": GOOD}, [], 3, "cut short"),
        ("none.onnx", {"x": GOOD}, [], 3, "no such file"),
        ("weightless.onnx", {"x": GOOD}, [], 3, "nothing to quantize"),
        ("net.onnx", {"y": GOOD}, [], 4, "no array for the model input 'x'; there is 'y'"),
        ("net.onnx", {"x": GOOD[:, :, :4]}, [], 4, "expects shape [N, 3, 8, 8], got [8, 3, 4, 8]"),
        ("net.onnx", {"x": GOOD.astype(np.float64)}, [], 4, "expects float32, got float64"),
        ("net.onnx", {"x": GOOD[:0]}, [], 4, "has no samples"),
        ("net.onnx", {"x": GOOD * np.float32(np.nan)}, [], 4, "NaN or infinite"),
        ("net.onnx", {"x": GOOD, "labels": np.full(8, 10)}, [], 4, "labels reach from 10 to 10, but the model has 10 classes"),
        ("net.onnx", {"x": GOOD}, ["--algorithm", "magic"], 2, "--algorithm magic: must be one of"),
        ("net.onnx", {"x": GOOD}, ["--algoritm", "mse"], 2, "No such option"),
        ("net.onnx", {"x": GOOD}, ["--weight-bits", "many"], 2, "'many' is not a valid integer"),
        ("net.onnx", {"x": GOOD}, ["-p", "w1a4"], 2, "--weight-bits 1: must be from 2 to 8"),
        ("net.onnx", {"x": GOOD}, ["-p", "w9a9"], 2, "--weight-bits 9"),
        ("net.onnx", {"x": GOOD}, ["-p", "four"], 2, "expected w<bits>a<bits>"),
        ("net.onnx", {"x": GOOD}, ["--keep-float", "Convv"], 2, "did you mean 'Conv'"),
        ("net.onnx", {"x": GOOD}, ["--units", "manual", "--merge", "b01+b09"], 2, "there is no block 'b09'"),
        ("net.onnx", {"x": GOOD}, ["--units", "manual", "--merge", "b00+b02"], 2, "that follow each other"),
        ("net.onnx", {"x": GOOD}, ["-o", "no/such/folder/out.onnx"], 2, "does not exist"),
        ("net.onnx", {"x": GOOD}, ["--config", "none.toml"], 2, "cannot be read"),
        ("net.onnx", {"x": GOOD}, ["--eval-data", "none.npz"], 4, "no such file"),
    ],
)
def test_bad_input(model: str, arrays: dict[str, np.ndarray], options: list[str], code: int, message: str, place: Path) -> None:
    (place / "text.onnx").write_text("hello, I am no model")
    (place / "truncated.onnx").write_bytes((place / "net.onnx").read_bytes()[:-500])
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    onnx.save(b.model(b.op("Relu", "x")), place / "weightless.onnx")
    before = sorted(place.iterdir())
    result = invoke("quantize", place / model, *bad(place, "data.npz", **arrays), "--device", "cpu", *options)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert sorted(place.iterdir()) == sorted([*before, place / "data.npz"])


def test_labels_that_are_no_classes_are_refused_before_the_work(place: Path) -> None:
    np.savez(place / "wrong.npz", x=GOOD, labels=np.full(len(GOOD), 10))
    before = sorted(place.iterdir())
    result = quantize(place, "--eval-data", place / "wrong.npz")
    assert result.exit_code == 4, result.output
    assert f"--eval-data {place / 'wrong.npz'}: labels reach from 10 to 10" in " ".join(result.output.split())
    assert sorted(place.iterdir()) == before


def test_missing_calibration_data_is_an_error(place: Path) -> None:
    result = quantize(place, data=None)
    assert result.exit_code == 2
    assert "--calibration-data is missing" in result.output


def test_existing_output_is_refused(place: Path) -> None:
    output = place / "net.w4a4.onnx"
    output.write_bytes(b"precious")
    result = quantize(place)
    assert result.exit_code == 2
    assert "exists; give --overwrite" in result.output
    assert output.read_bytes() == b"precious"
    assert quantize(place, "-o", place / "net.onnx", "--overwrite").exit_code == 2  # never the source itself


def test_read_only_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / "locked"
    folder.mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder)  # a superuser may write anywhere
    result = quantize(place, "-o", folder / "out.onnx")
    assert result.exit_code == 2
    assert "is not writable" in result.output


def test_no_gpu_is_an_error_when_asked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("quantize", place / "net.onnx", "--calibration-data", place / "calib.npz", "--device", "cuda")
    assert result.exit_code == 2
    assert "finds no CUDA device" in result.output


def test_interruption_leaves_nothing_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("toolchain.pipeline.calibrate", interrupted)
    before = sorted(place.iterdir())
    result = quantize(place)
    assert result.exit_code == 130
    assert sorted(place.iterdir()) == before


def test_a_file_that_does_not_load_is_never_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.qdq.onnx.checker.check_model", lambda *_: None)
    monkeypatch.setattr("exporters.qdq._code_range", lambda *_: (300, 400))  # codes that no 8-bit Clip can hold

    before = sorted(place.iterdir())
    result = CliRunner().invoke(
        main, ["quantize", str(place / "net.onnx"), "--calibration-data", str(place / "calib.npz"), "--algorithm", "mse", "--device", "cpu"]
    )
    assert result.exit_code != 0
    assert sorted(place.iterdir()) == before


def test_help_lists_every_section_and_exit_code() -> None:
    text = invoke("quantize", "--help").output
    for section in ("Precision:", "Method:", "Data:", "Calibration:", "Units (MRECG):", "Reconstruction:", "Exit codes:"):
        assert section in text
    assert invoke("--version").output.startswith("mrecg-onnx, version ")
