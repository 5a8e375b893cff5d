"""Mixed precision: the fewest layers that need more bits, tried under ONNX Runtime, as settings for `quantize`."""

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result

from tests import zoo
from tests.test_cli import invoke
from toolchain.allocation import Allocation, Goal, Trial, allocate, widened
from toolchain.commands.files import writer
from toolchain.config import Config
from toolchain.errors import UsageError
from toolchain.selection import match_nodes
from toolchain.sensitivity import layers_before
from toolchain.validation import Reference, validate

CALIBRATION, EVALUATION = zoo.images(32), zoo.images(40, seed=5)


def allocated(folder: Path, goal: Goal, wider: str, **settings: Any) -> Allocation:
    source = zoo.loaded(zoo.tiny_resnet(), folder)
    config = Config(algorithm="minmax", device="cpu", first_last_bits="same", **settings)
    return allocate(source, CALIBRATION, EVALUATION, config, wider, goal, writer(source))


@pytest.mark.parametrize("wider", ["w8a8", "float"])
def test_as_few_as_are_needed(wider: str, tmp_path: Path) -> None:
    """One less does not reach the goal, and was tried; more were tried where doubling went beyond."""
    everything = allocated(tmp_path, Goal(min_sqnr=200.0), wider, weight_bits=3, activation_bits=4)
    assert not everything.holds
    assert len(everything.layers) == len(everything.room) - (wider == "float")
    ratios = [trial.sqnr for trial in sorted(everything.trials, key=lambda trial: trial.layers)]
    assert ratios[-1] > ratios[0] + 10
    goal = Goal(min_sqnr=(ratios[0] + ratios[-1]) / 2)
    found = allocated(tmp_path, goal, wider, weight_bits=3, activation_bits=4)
    tried = {trial.layers: trial for trial in found.trials}
    count = len(found.layers)
    assert found.holds
    assert 0 < count < len(found.room)
    assert found.layers == found.room[:count]
    assert goal.holds(tried[count])
    assert not goal.holds(tried[count - 1])
    assert len(found.trials) == len(tried) <= 2 * len(found.room).bit_length() + 1


def test_nothing_is_raised_where_it_holds_already(tmp_path: Path) -> None:
    found = allocated(tmp_path, Goal(min_sqnr=1.0), "float", weight_bits=8, activation_bits=8)
    assert (found.holds, found.layers, [trial.layers for trial in found.trials]) == (True, (), [0])


def test_a_goal_that_holds_needs_no_layer_with_room(tmp_path: Path) -> None:
    assert allocated(tmp_path, Goal(min_sqnr=1.0), "w4a4", weight_bits=8, activation_bits=8).holds


def test_a_gate_goes_with_the_layer_that_it_is_of(tmp_path: Path) -> None:
    """The noise of a hard swish is that of the layer in front, and in float they go together: else its operand would stay on its grid."""
    b = zoo.Builder({"x": ("N", 3, 8, 8)})
    x = b.conv("x", 3, 8)
    x = b.op("Mul", x, b.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    x = b.conv(x, 8, 8, act="relu")
    source = zoo.loaded(b.model(b.head(x, 8)), tmp_path)
    config = Config(weight_bits=8, activation_bits=8, algorithm="minmax", device="cpu")
    found = allocate(source, CALIBRATION, EVALUATION, config, "float", Goal(min_sqnr=200.0), writer(source))
    first = next(node for node in source.graph.nodes if node.op_type == "Conv").name
    gates = {node.name for node in source.graph.nodes if node.op_type in ("Mul", "HardSigmoid")}
    assert gates <= set(found.nodes) if first in found.layers else not gates & set(found.nodes)
    before = layers_before(source.graph)
    assert {before[name] for name in gates} == {first}


def test_goals() -> None:
    good, bad, unknown = Trial(0, 0.5, 20.0), Trial(0, 2.0, 10.0), Trial(0, None, 20.0)
    assert [Goal(max_drop=1.0).holds(trial) for trial in (good, bad)] == [True, False]
    assert [Goal(min_sqnr=15.0).holds(trial) for trial in (good, bad, unknown, Trial(0, None, float("nan")))] == [True, False, True, False]
    assert [Goal(1.0, 25.0).holds(trial) for trial in (good, bad)] == [False, False]
    with pytest.raises(UsageError, match="--metric, or --min-sqnr"):
        Goal(max_drop=1.0).holds(unknown)
    with pytest.raises(UsageError, match="--max-drop or --min-sqnr is needed"):
        Goal()
    with pytest.raises(UsageError, match="--min-sqnr nan: expected a number of dB"):
        Goal(min_sqnr=float("nan"))


def test_a_node_that_is_named_like_an_operator_stands_for_itself(tmp_path: Path) -> None:
    model = zoo.tiny_resnet()
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    convs[1].name = "Conv"
    graph = zoo.loaded(model, tmp_path).graph
    config = widened(Config(), graph, ["Conv"], "w8a8")
    assert [match_nodes(graph, [pattern]) for pattern, _ in config.own_bits] == [{"Conv"}]
    assert match_nodes(graph, widened(Config(), graph, ["Conv"], "float").keep_float) == {"Conv"}


def test_the_drop_is_that_of_a_validation(tmp_path: Path) -> None:
    source = zoo.loaded(zoo.tiny_resnet(), tmp_path)
    changed = zoo.tiny_resnet(seed=1)  # another model: it drops by much
    onnx.save(changed, tmp_path / "other.onnx")
    scores = next(iter(Reference.of(source.model, EVALUATION).outputs.values()))
    for labels in (None, scores.argmax(1)):
        samples = type(EVALUATION)(EVALUATION.inputs, labels)
        drop, ratio = Reference.of(source.model, samples).held_against(tmp_path / "other.onnx")
        checked = validate(source.model, tmp_path / "other.onnx", samples, 1)
        assert drop == pytest.approx(checked.drop)
        assert checked.worst is not None
        assert ratio == pytest.approx(checked.worst[1])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    onnx.save(zoo.tiny_resnet(), tmp_path / "net.onnx")
    np.savez(tmp_path / "calib.npz", x=CALIBRATION.inputs["x"])
    scores = next(iter(Reference.of(tmp_path / "net.onnx", EVALUATION).outputs.values()))
    np.savez(tmp_path / "eval.npz", x=EVALUATION.inputs["x"], labels=scores.argmax(1))
    return tmp_path


def command(place: Path, *extra: object) -> Result:
    data = ["--calibration-data", place / "calib.npz", "--eval-data", place / "eval.npz", "--device", "cpu"]
    return invoke("allocate", place / "net.onnx", *data, *extra)


def test_from_the_command_line_to_a_model(place: Path) -> None:
    result = command(place, "-p", "w2a3", "--min-sqnr", 13.0, "--iterations", 5, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    written = tomllib.loads((place / "net.allocated.toml").read_text())
    assert written["bits"] == [f"{name}=w8a8" for name in facts["layers"]]
    assert facts["layers"]
    assert written["iterations"] == 5
    assert written["algorithm"] == "qdrop"
    again = command(place, "-p", "w2a3", "--min-sqnr", 13.0)
    assert (again.exit_code, "exists; give --overwrite" in again.output) == (2, True)
    made = invoke("quantize", place / "net.onnx", "--config", place / "net.allocated.toml", "--json")
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    assert report["config"]["bits"] == written["bits"]
    assert min(report["validation"]["sqnr"].values()) > 7  # learned in 5 iterations is about as good as rounded to nearest


def test_the_samples_are_not_written_over(place: Path) -> None:
    result = command(place, "-p", "w4a4", "--min-sqnr", 5, "-o", place / "calib.npz", "--overwrite")
    assert (result.exit_code, "has the samples; choose another name" in result.output) == (2, True)
    np.load(place / "calib.npz")


def test_the_table_says_what_was_chosen(place: Path) -> None:
    result = command(place, "-p", "w2a3", "--min-sqnr", 13.0, "-o", place / "mixed.toml")
    assert result.exit_code == 0, result.output
    assert "layers at w8a8" in result.output
    assert result.output.count("chosen") == 1
    assert f"mrecg-onnx quantize {place / 'net.onnx'} --config {place / 'mixed.toml'}" in result.output


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-p", "w4a4"], 2, "--max-drop or --min-sqnr is needed"),
        (["-p", "w4a4", "--min-sqnr", 300], 6, "it does not hold; nothing was written: try --to float"),
        (["-p", "w8a8", "--min-sqnr", 300], 6, "see what diagnose says of a file"),
        (["-p", "w8a8", "--to", "w4a4", "--min-sqnr", 300], 2, "no layer has fewer bits than that; try --to float"),
        (["-p", "w4a4", "--to", "w9a9", "--min-sqnr", 300], 2, "with weights of 2-8 and activations of 2-8 or 16 bits"),
        (["-p", "w4a4", "--to", "8", "--min-sqnr", 300], 2, "--to 8: expected w<bits>a<bits>, such as w8a8 or w8a16, or float"),
        (["-p", "w4a4", "--to", "w8a8", "--min-sqnr", 9, "--eval-data", "nothing.npz"], 4, "no such file"),
    ],
)
def test_what_is_refused(options: list[object], code: int, words: str, place: Path) -> None:
    result = command(place, *options)
    assert (result.exit_code, words in result.output) == (code, True), result.output
    assert not (place / "net.allocated.toml").exists()
