"""A measure of the user's own: what it is given, what may go wrong in it, and that it decides."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.parser import parse_model

from tests import zoo
from tests.test_cli import invoke, quantize
from tests.test_verdict import validated
from toolchain import intervals, runtime
from toolchain.errors import DataError
from toolchain.metric import Measured, Metric
from toolchain.samples import Samples
from toolchain.validation import judged, validate
from toolchain.verdict import verdict

METRICS = """
import numpy as np

def each(outputs, labels):
    (scores,) = outputs.values()
    return (scores.argmax(1) == labels[:, 0]).astype(float)

def together(outputs, labels):
    return each(outputs, labels).mean()

def lost(outputs, labels):
    raise KeyError("boxes")

def empty(outputs, labels):
    return float("nan")

def ends(outputs, labels):
    raise SystemExit(0)

def in_place(outputs, labels):
    (scores,) = outputs.values()
    scores[:] = scores > 0
    labels[:] = 0
    return scores.mean(1)

def pairs(outputs, labels):
    return np.zeros((len(labels), 2))

nothing = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, samples whose labels are rows [class, 0.5], most of them right, and metrics in a module."""
    onnx.save(zoo.tiny_resnet(), tmp_path / "net.onnx")
    np.savez(tmp_path / "calib.npz", x=zoo.images(32).inputs["x"])
    x = zoo.images(40, seed=5).inputs["x"]
    scores = next(iter(runtime.run(runtime.session(tmp_path / "net.onnx"), {"x": x}).values()))
    classes = np.where(np.arange(40) < 30, scores.argmax(1), 0)
    np.savez(tmp_path / "eval.npz", x=x, labels=np.stack([classes, np.full(40, 0.5)], axis=1))
    (tmp_path / f"metrics_{tmp_path.name}.py").write_text(METRICS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(place: Path, function: str) -> str:
    return f"metrics_{place.name}:{function}"


def test_the_metric_stands_in_for_accuracy(place: Path) -> None:
    """Labels of another kind than classes are for it; the report, the page, the table and the gate speak of it."""
    given = ["--algorithm", "minmax", "--eval-data", place / "eval.npz"]
    result = quantize(place, *given, "--metric", named(place, "each"), "--max-drop", 0.5)
    assert result.exit_code == 0, result.output
    report = json.loads((place / "net.w4a4.report" / "report.json").read_text())
    checked, found = report["validation"], report["validation"]["metric"]
    assert checked["top1_float"] is None
    assert checked["top5_quantized"] is None
    assert found["name"] == "each"
    assert checked["drop"] == pytest.approx(found["float_value"] - found["quantized_value"])
    assert checked["intervals"]["drop"] == [found["low"], found["high"]]
    assert abs(found["quantized_value"] - found["simulated_value"]) <= 1 / 40 + 1e-9  # one sample may sit on a rounding tie
    assert "each" in report["verdict"]["sentence"]
    assert f"each {found['float_value']:.4g} float, {found['quantized_value']:.4g} quantized" in " ".join(result.output.split())
    assert f"float {found['float_value']:.4g}; change" in (place / "net.w4a4.report" / "report.html").read_text(encoding="utf-8")
    for function in ("each", "together"):
        table = invoke(
            "validate", place / "net.onnx", place / "net.w4a4.onnx", "--eval-data", place / "eval.npz", "--metric", named(place, function)
        )
        assert re.search(rf"{function} +{found['float_value']:.4g} +{found['quantized_value']:.4g}", table.output), table.output


def test_the_gate_is_in_the_unit_of_the_metric(place: Path) -> None:
    """The float model's own classes: rounding to 2 bits loses some, by more than a thousandth of all."""
    (place / f"metrics_{place.name}.py").write_text("def sharp(outputs, labels):\n    return -abs(outputs[next(iter(outputs))]).sum(1)\n")
    given = ["-p", "w2a2", "--algorithm", "minmax", "--eval-data", place / "eval.npz", "--metric", named(place, "sharp")]
    checked = quantize(place, *given, "--json")
    drop = json.loads(checked.stdout)["validation"]["drop"]
    limit = max(abs(drop) / 2, 1e-6)
    result = quantize(place, *given, "--max-drop", limit, "--overwrite")
    assert result.exit_code == (6 if drop > limit else 0)
    assert ("sharp dropped by" in result.output) == (drop > limit)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("lost", "KeyError: 'boxes'"),
        ("ends", "SystemExit: 0"),
        ("empty", "returned NaN or an infinite number"),
        ("pairs", "returned shape [40, 2]; expected one number, or one for each of 40 samples"),
        ("nothing", "'nothing' is no function"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_a_metric_that_fails_does_so_before_the_work(function: str, words: str, place: Path) -> None:
    result = quantize(place, "--eval-data", place / "eval.npz", "--metric", named(place, function))
    assert result.exit_code == 4
    assert words in result.output
    assert "calibrating" not in result.output
    assert not (place / "net.w4a4.onnx").exists()


def test_a_metric_may_work_in_place(place: Path) -> None:
    """What else is measured is not of what it leaves behind."""
    given = ["-p", "w8a8", "--algorithm", "minmax", "--eval-data", place / "eval.npz", "--json", "--overwrite"]
    first, second = (json.loads(quantize(place, *given, "--metric", named(place, name)).stdout) for name in ("each", "in_place"))
    assert first["validation"]["sqnr"] == second["validation"]["sqnr"]
    assert first["validation"]["simulation"] == second["validation"]["simulation"]


def test_limits_are_in_the_unit_of_the_metric(place: Path) -> None:
    given = ["--algorithm", "minmax", "--eval-data", place / "eval.npz", "--max-drop", 500]
    assert quantize(place, *given, "--metric", named(place, "each")).exit_code == 0
    result = quantize(place, *given[:2], "--max-drop", 500, "--overwrite")
    assert (result.exit_code, "--max-drop 500.0: must be from 0.0 to 100.0" in result.output) == (2, True)


def test_bad_spellings_and_labels_without_a_metric(place: Path) -> None:
    result = quantize(place, "--metric", "metrics")
    assert (result.exit_code, "--metric metrics: expected module:function" in result.output) == (2, True)
    result = quantize(place, "--eval-data", place / "eval.npz")
    assert (result.exit_code, "labels of another kind are for --metric" in result.output) == (4, True)


def test_outputs_whose_shapes_follow_from_the_data_come_sample_by_sample(tmp_path: Path) -> None:
    """The places of what is above zero: of all samples in one array they could not be told apart."""
    model = parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[N, 6] x) => (int64[a, b] places, float[N, 6] y) '
                        '{ y = Neg (x) zero = Constant <value_float = 0.0> () '
                        'is_above = Greater (x, zero) places = NonZero (is_above) }')  # fmt: skip
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)

    def found(outputs: Any, labels: np.ndarray | None) -> np.ndarray:
        assert labels is None
        assert outputs["y"].shape == (5, 6)
        return np.array([places.shape[1] for places in outputs["places"]])

    np.testing.assert_array_equal(judged(Metric("m:found", found), model, Samples({"x": x})), (x > 0).sum(1))
    onnx.save(model, tmp_path / "same.onnx")
    checked = validate(model, tmp_path / "same.onnx", Samples({"x": x}), 1, metric=Metric("m:found", found))
    assert checked.metric == Measured("found", float((x > 0).sum(1).mean()), float((x > 0).sum(1).mean()), None, 0.0, 0.0)
    assert checked.drop == 0.0


def test_the_interval_of_a_mean_covers_the_truth() -> None:
    """In about 95 % of trials; 2,000 of them have a standard error of 0.5 points, and 60 samples make t 95.5 % of the normal quantile."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = intervals.paired_mean(rng.exponential(1.0, 60) - 0.7)
        hits += low <= 0.3 <= high
    assert 0.91 <= hits / 2000 <= 0.965


@pytest.mark.parametrize(
    ("values", "limit", "held_out", "ship", "words"),
    [
        ((0.70, 0.69, None, 0.0, 0.02), None, True, "unclear", "m is 0.01 lower (95 %: -0.02 to 0); --max-drop says how much"),
        ((0.70, 0.69, None, 0.0, 0.02), 0.03, True, "yes", "within --max-drop 0.03"),
        ((0.70, 0.69, None, 0.0, 0.02), 0.015, True, "unclear", "--max-drop 0.015 lies within the interval; more samples would decide"),
        ((0.70, 0.69, None, 0.0, 0.02), 0.005, True, "no", "the limit is --max-drop 0.005"),
        ((0.70, 0.69, None, 0.0, 0.02), 0.005, False, "no", "even on the samples it was calibrated on"),
        ((0.70, 0.69, None, 0.0, 0.02), 0.03, False, "unclear", "give --eval-data"),
        ((0.70, 0.71, None, None, None), 0.0, True, "yes", "m is 0.01 higher, within --max-drop 0; one number for all samples has no"),
        ((0.70, 0.70, None, None, None), None, True, "unclear", "m is the same; --max-drop says"),
    ],
)
def test_the_verdict_by_a_metric(values: tuple[Any, ...], limit: float | None, held_out: bool, ship: str, words: str) -> None:
    unlabelled = {"top1_float": None, "top1_quantized": None, "lost": None, "won": None}
    found = verdict(validated(metric=Measured("m", *values), **unlabelled), limit, held_out)
    assert (found.ship, words in found.sentence) == (ship, True), found.sentence


@pytest.mark.parametrize("function", [lambda *_: "good", lambda *_: None])
def test_what_is_no_number_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="--metric m:f"):
        Metric("m:f", function).of({}, None, 3)
