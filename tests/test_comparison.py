"""Comparisons and studies: equal terms, resumable, and verdicts that follow the numbers, also against the claim."""

import json
import os
import signal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from tests import zoo
from tests.benchmarks import claims
from toolchain import comparison, study
from toolchain.cli import main
from toolchain.config import Config
from toolchain.errors import UsageError
from toolchain.intervals import paired_difference
from toolchain.outcomes import differing, pack, unpack


@pytest.fixture
def place(tmp_path: Path) -> Path:
    onnx.save(zoo.tiny_resnet(), tmp_path / "net.onnx")
    for name, seed in (("calib", 1), ("eval", 5)):
        x = zoo.images(24, seed=seed).inputs["x"]
        np.savez(tmp_path / f"{name}.npz", x=x, labels=np.arange(24) % 10)
    return tmp_path


def invoke(command: str, place: Path, *extra: object) -> Result:
    data = ["--calibration-data", place / "calib.npz", "--eval-data", place / "eval.npz"]
    arguments = [command, place / "net.onnx", *data, "--iterations", 2, "--device", "cpu", "-o", place / "out.json", *extra]
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_compare_runs_each_row_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("compare", place, "--methods", "mse,mrecg:modcap+qdrop", "--seeds", "0,1")
    assert result.exit_code == 0, result.output
    rows = json.loads((place / "out.json").read_text())["rows"]
    assert [(row["settings"]["algorithm"], row["settings"]["units"], row["seed"]) for row in rows] == [
        ("mse", "none", 0), ("mse", "none", 1), ("qdrop", "modcap", 0), ("qdrop", "modcap", 1),
    ]  # fmt: skip
    assert all(row["calibration_samples"] == 24 and row["samples"] == 24 for row in rows)
    assert "mrecg:modcap+qdrop" in result.output
    assert "±" in result.output
    page = (place / "out.html").read_text(encoding="utf-8")
    assert "mrecg:modcap+qdrop" in page
    (place / "out.html").unlink()
    (place / "pictures").mkdir()
    redrawn = CliRunner().invoke(main, ["report", str(place / "out.json"), "--figures", str(place / "pictures")])
    assert redrawn.exit_code == 0, redrawn.output
    drawn = {path.name: ElementTree.parse(path).getroot() for path in (place / "pictures").iterdir()}
    assert drawn.keys() == {"out-w4a4-top1.svg", "out-w4a4-agreement.svg"}
    assert all(root.get("width") == "860" and "mrecg:modcap+qdrop" in "".join(root.itertext()) for root in drawn.values())
    assert all("--blue: #" in "".join(root.itertext()) for root in drawn.values())  # with their own colours
    assert (place / "out.html").read_text(encoding="utf-8") == page  # from the results file alone
    assert CliRunner().invoke(main, ["report", str(place / "out.json"), "--overlay", str(place / "out.json")]).exit_code == 2
    made: list[Config] = []
    original = comparison.measured
    monkeypatch.setattr(comparison, "measured", lambda *a: made.append(a[3]) or original(*a))
    again = invoke("compare", place, "--methods", "minmax,mse", "--seeds", "1", "--json", "-q")
    assert [config.algorithm for config in made] == ["minmax"]  # what the file has is not run again
    assert [line["method"] for line in json.loads(again.stdout)["summary"]] == ["minmax", "mse"]
    assert json.loads(again.stdout)["summary"] == json.loads((place / "out.json").read_text())["comparison"]["lines"]
    invoke("compare", place, "--methods", "mse", "--seeds", "1", "--weight-range", "minmax")
    assert made[-1].weight_range == "minmax"  # other settings, another row


@pytest.mark.parametrize(("how", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_an_interruption_keeps_the_runs_that_ended(how: int, code: int, word: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script starts with Ctrl-C ignored
    original = comparison.measured

    def stopped(*arguments: Any) -> dict[str, Any]:
        if arguments[3].seed == 1:
            os.kill(os.getpid(), how)
        return original(*arguments)

    monkeypatch.setattr(comparison, "measured", stopped)
    result = invoke("compare", place, "--methods", "minmax", "--seeds", "0,1")
    assert result.exit_code == code
    assert f"{word}; {place / 'out.json'} has the runs that ended, and the same command goes on from there" in result.output
    assert [row["seed"] for row in json.loads((place / "out.json").read_text())["rows"]] == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "method 'magic'"),
        (["--methods", "mrecg:manual+qdrop"], "method 'mrecg:manual+qdrop'"),
        (["--seeds", "a"], "expected integers"),
        (["--algorithm", "mse"], "--algorithm: is not one setting for all runs"),
        (["--precisions", "four"], "expected w<bits>a<bits>"),
    ],
)
def test_compare_refuses(options: list[str], message: str, place: Path) -> None:
    result = invoke("compare", place, *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not (place / "out.json").exists()


@pytest.mark.parametrize("command", ["compare", "study"])
def test_several_processes_are_refused(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    result = invoke(command, place)
    assert result.exit_code == 2
    assert "torchrun: every process would make all the runs; start one alone" in result.output
    assert not (place / "out.json").exists()


def test_a_page_needs_an_experiment_that_ended(place: Path) -> None:
    path = place / "rows.json"
    path.write_text('{"model": "net.onnx", "rows": [{"settings": {}}]}')
    result = CliRunner().invoke(main, ["report", str(path)])
    assert result.exit_code == 2
    assert "is of runs that did not end" in result.output
    path.write_text('{"model": "net.onnx", "rows": [{"settings": {}}], "study": {}}')
    result = CliRunner().invoke(main, ["report", str(path)])
    assert result.exit_code == 2
    assert "has no 'environment': it was written by another version" in result.output
    assert not (place / "rows.html").exists()


def test_a_file_of_something_else_is_not_overwritten(place: Path) -> None:
    (place / "out.json").write_text("{}")
    result = invoke("compare", place, "--methods", "mse", "--seeds", "0")
    assert result.exit_code == 2
    assert "is not the result of a comparison" in result.output
    assert (place / "out.json").read_text() == "{}"


def test_mean_and_spread() -> None:
    rows = [
        {"precision": "w4a4", "label": label, "top1": t, "agreement": None, "sqnr": 10.0, "units_after": 1.0, "seconds": 2.0,
         "units": ["a"], "top1_float": 90.0, "samples": 1000, "outcomes": outcomes(t)}
        for label, accuracies in (("m", (80.0, 82.0, 84.0)), ("n", (81.0, 81.0, 81.0)))
        for t in accuracies
    ]  # fmt: skip
    best, other = comparison.summary(rows)
    assert (best["top1"], best["top1_spread"], best["seeds"]) == (82.0, 2.0, 3)
    assert (best["agreement"], best["sqnr_spread"]) == (None, 0.0)
    assert (best["behind"], best["behind_margin"]) == (0.0, 0.0)
    assert other["behind"] == pytest.approx(1.0)  # -1, 1 and 3 points
    # Seed by seed 0, 10 and 30 samples only the first gets right and 10, 0 and 0 only the second: 13 and 3 on average.
    low, high = paired_difference(13, 3, 1000)
    assert other["behind_margin"] == pytest.approx((high - low) / 2)


def outcomes(top1: float, samples: int = 1000) -> str:
    """Of a model that gets the first ones right."""
    return pack(np.arange(samples) < top1 / 100 * samples)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_outcomes_survive_packing(right: list[bool]) -> None:
    text = pack(np.array(right))
    assert unpack(text, len(right)).tolist() == right
    assert differing(text, pack(~np.array(right)), len(right)) == (sum(right), len(right) - sum(right))


def test_random_schemes_are_distinct_and_allowed() -> None:
    names = [f"b{i:02d}" for i in range(8)]
    schemes = study.random_schemes(range(1, 6), names, 12, 3, seed=0)
    assert len(set(schemes)) == 12
    assert schemes == study.random_schemes(range(1, 6), names, 12, 3, seed=0)
    for merges in schemes:
        for unit in merges:
            parts = unit.split("+")
            assert 2 <= len(parts) <= 3
            assert {"b00", "b07"}.isdisjoint(parts)


def row(label: str, losses: list[float], group: str = "oscillation", **more: Any) -> dict[str, Any]:
    names = [f"b{i:02d}" for i in range(len(losses))]
    facts: dict[str, Any] = {
        "label": label, "group": group, "units": names, "learned_units": names, "unit_losses": [[x + 1, x] for x in losses],
        "blocks": names,
        "block_layers": [[[4, 4]]] * len(losses), "block_opens": [False] * len(losses), "top1": 80.0, "agreement": 90.0, "samples": 1000,
    }  # fmt: skip
    facts |= more
    return facts | {"outcomes": outcomes(facts["top1"])}


NAMES = ["b00", "b01", "b02", "b03"]


def test_verdicts_follow_the_numbers() -> None:
    rough, smooth = [1.0, 3.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0]
    joined = ["b00", "b01+b02", "b03"]
    for brecq, mrecg, holds, same in (
        ([1.0, 3.0, 2.0, 1.0], [1.0, 1.5, 1.0], True, 1.0),  # 2.0 to 1.0 at the units' ends, then 1.5 to 1.0
        (rough, [1.0, 2.0, 4.0], None, 0.0),  # BRECQ drops between b01 and b02 only, which no unit ends between
        (rough, [5.0, 1.0, 4.0], False, 0.0),
        (smooth, [1.0, 3.0, 4.0], None, 0.0),
    ):
        rows = [row("adaround", rough), row("brecq", brecq), row("mrecg+brecq", mrecg, units=joined, learned_units=joined, blocks=NAMES)]
        found = study.findings(["oscillation"], rows)["oscillation"]
        assert found["holds"] is holds
        assert found["same_places"] == same
        assert found["lines"][2]["places"] == [0.25, 0.75, 1.0]
    alone = [row(label, rough) for label in ("adaround", "brecq", "mrecg+brecq")]
    assert "no blocks are joined" in study.findings(["oscillation"], alone)["oscillation"]["verdict"]
    found = study.findings(["theorem"], [row("brecq", rough)])["theorem"]
    assert found["holds"] is False
    assert "in 2 of 3 pairs" in found["verdict"]
    assert study.findings(["theorem"], [row("brecq", smooth)])["theorem"]["holds"] is True
    apart = row("brecq", smooth, block_layers=[[[4 * i, 4]] for i in range(4)])
    assert study.findings(["theorem"], [apart])["theorem"]["holds"] is None


@pytest.mark.parametrize(("slope", "holds"), [(1.0, True), (-1.0, False), (0.0, None)])
def test_correlation_verdicts(slope: float, holds: bool | None) -> None:
    noise = np.random.default_rng(0).normal(size=20) * 0.1
    peaks = np.linspace(2, 4, 20)
    rows = [row("s", [1.0, p, 1 + slope * (p - 3) / 4 + n / 2 + 1], "schemes") for p, n in zip(peaks.tolist(), noise.tolist(), strict=True)]
    found = study.findings(["final-error"], rows)["final-error"]
    assert found["holds"] is holds, found["verdict"]
    assert len(found["points"]) == 20
    assert found["verdict"].endswith("in 20 of 20 schemes the largest is that of the unit before the last.")
    peaked = [row("s", [p, 1.0, 1 + slope * p + n], "schemes") for p, n in zip(peaks.tolist(), noise.tolist(), strict=True)]
    assert "; in 0 of 20 schemes the largest" in study.findings(["final-error"], peaked)["final-error"]["verdict"]


def test_data_verdict_needs_more_than_noise() -> None:
    def rows(last: float) -> list[dict[str, Any]]:
        batches = [row(f"b{b}", [1.0], "batch", top1=t, settings={"batch-size": b}, sqnr=9.0) for b, t in ((8, 80.0), (128, last))]
        return batches + [row(f"{n}", [1.0], "samples", top1=t, calibration_samples=n, sqnr=9.0) for n, t in ((128, 80.0), (1024, last))]

    assert study.findings(["data"], rows(84.0))["data"]["holds"] is True
    assert study.findings(["data"], rows(76.0))["data"]["holds"] is False
    assert study.findings(["data"], rows(80.1))["data"]["holds"] is None


def test_claims_of_stored_rows() -> None:
    terms = {"model": "net", "precision": "w3a3", "method": "qdrop"}
    joined = ["b00", "b01+b02", "b03"]
    alone = row("qdrop", [1.0, 3.0, 2.0, 1.0], **terms)
    mrecg = row("mrecg+qdrop", [1.0, 1.5, 1.0], units=joined, learned_units=joined, blocks=NAMES, **(terms | {"method": "mrecg+qdrop"}))
    assert claims.line(alone, mrecg) == ("net", "w3a3", "qdrop", "4", "2", "1", "3", "1", "1 of 3", "80.00")
    assert claims.line(mrecg, None) == ("net", "w3a3", "mrecg+qdrop", "3", "0.5", "", "1.5", "1", "", "80.00")


def test_study_from_the_command_line(place: Path) -> None:
    result = invoke("study", place, "--schemes", 4, "--algorithm", "brecq", "-p", "w3a4", "--json", "-q")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert list(facts["findings"]) == list(study.CLAIMS)
    assert all(finding["verdict"].endswith(".") for finding in facts["findings"].values())
    compared = invoke("compare", place, "--methods", "mse", "--precisions", "w3a4", "--seeds", "0")
    assert compared.exit_code == 0, compared.output
    page = (place / "out.html").read_text(encoding="utf-8")  # of both, since both are in the file
    assert "Methods at W3A4" in page
    assert all(finding["verdict"].split(":")[0][:20].replace("&", "&amp;") in page for finding in facts["findings"].values())
    assert invoke("study", place, "--claims", "magic").exit_code == 2
    assert invoke("study", place, "--units", "none").exit_code == 2


def test_unknown_methods_name_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"mrecg:UNITS\+qdrop"):
        comparison.method("mrecg+", Config())
