"""The baselines from end to end: files compute what was learned, runs resume, and settings that make no sense are told."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from tests import zoo
from toolchain import comparison, units
from toolchain.cli import main
from toolchain.config import Config
from toolchain.errors import UsageError

ALGORITHMS = ("aciq", "lapq", "adaquant", "bit-split")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    onnx.save(zoo.tiny_resnet(), tmp_path / "net.onnx")
    for name, seed in (("calib", 1), ("eval", 5)):
        np.savez(tmp_path / f"{name}.npz", **zoo.images(48, seed=seed).inputs)  # pyright: ignore[reportArgumentType]
    return tmp_path


def invoke(command: str, place: Path, *extra: object) -> Result:
    data = ["--calibration-data", place / "calib.npz", "--eval-data", place / "eval.npz"]
    arguments = [command, place / "net.onnx", *data, "--iterations", 12, "--device", "cpu", *extra]
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("storage", ["fast", "small"])
def test_files_compute_what_was_learned(storage: str, place: Path) -> None:
    methods = ",".join(ALGORITHMS)
    result = invoke(
        "compare", place, "--methods", methods, "--precisions", "w3a4", "--seeds", 0, "--storage", storage, "-o", place / "o.json"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((place / "o.json").read_text())["rows"]
    assert [row["settings"]["algorithm"] for row in rows] == list(ALGORITHMS)
    assert all(row["simulation_agreement"] == 100.0 for row in rows)
    layers = {row["settings"]["algorithm"]: len(row["learned_units"]) for row in rows}
    assert layers == {"aciq": 0, "lapq": 0, "adaquant": 7, "bit-split": 7}


@pytest.mark.parametrize("algorithm", ["adaquant", "bit-split"])
def test_interrupted_runs_end_with_the_same_bytes(algorithm: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("--algorithm", algorithm, "-o")
    assert invoke("quantize", place, *settings, place / "whole.onnx").exit_code == 0
    original, seen = units.learner, list[int]()

    def interrupted(config: Config) -> object:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return original(config)

    with monkeypatch.context() as patch:
        patch.setattr(units, "learner", interrupted)
        assert invoke("quantize", place, *settings, place / "parts.onnx").exit_code == 130
    resumed = invoke("quantize", place, *settings, place / "parts.onnx", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "resuming after unit 3 of 7" in resumed.output
    assert (place / "parts.onnx").read_bytes() == (place / "whole.onnx").read_bytes()
    check_report(place / "parts.report", {"adaquant": "AdaQuant", "bit-split": "Bit-Split"}[algorithm])


@pytest.mark.parametrize("algorithm", ["aciq", "lapq"])
def test_reports_name_them(algorithm: str, place: Path) -> None:
    result = invoke("quantize", place, "--algorithm", algorithm, "-p", "w3a3", "-o", place / "q.onnx")
    assert result.exit_code == 0, result.output
    check_report(place / "q.report", {"aciq": "ACIQ", "lapq": "LAPQ"}[algorithm])


def check_report(folder: Path, name: str) -> None:
    facts = json.loads((folder / "report.json").read_text())
    assert facts["conventions"]["algorithm"].startswith(name)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    assert ("How each unit was learned" in page) == (name == "AdaQuant")  # bits are split without a curve
    assert "% decided" not in page


def test_what_joins_no_units_is_refused() -> None:
    for text in ("mrecg+aciq", "mrecg+adaquant", "mrecg:loss+mse"):
        with pytest.raises(UsageError, match=r"mrecg\+brecq"):
            comparison.method(text, Config())


def test_refused_by_the_command_line(place: Path) -> None:
    result = invoke("quantize", place, "--algorithm", "bit-split", "--weight-scheme", "asymmetric")
    assert result.exit_code == 2
    assert "add --weight-scheme symmetric" in result.output
    assert not list(place.glob("*w4a4*"))
