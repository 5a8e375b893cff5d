"""Outputs that are no plain float arrays: infinite numbers, strings, sequences, maps from class to score, constants."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from matplotlib.axes import Axes
from onnx import TensorProto

from tests import zoo
from toolchain import kernels, runtime
from toolchain.activations import TorchModel
from toolchain.cli import main
from toolchain.config import Config
from toolchain.import_check import check_import, difference
from toolchain.importing import cut_blocks
from toolchain.noise import sqnr
from toolchain.plot import picture
from toolchain.report import validation_report
from toolchain.run_folder import digest
from toolchain.samples import Samples
from toolchain.source import infer_types, load_source
from toolchain.validation import class_output, parity, validate
from toolchain.wording import headline, worst_sqnr

INF = np.inf
CONFIG = {"target": "ort-cpu", "weight-bits": 4, "activation-bits": 8, "number-format": "int"}


def test_maps_are_rows_of_scores_and_unequal_sequences_flat() -> None:
    np.testing.assert_array_equal(runtime.as_array([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}]), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(runtime.as_array([np.ones((1, 2)), np.zeros(3)]), [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(runtime.as_array([np.ones(2), np.zeros(2)]), [[1, 1], [0, 0]])
    assert runtime.as_array([]).shape == (0,)


def test_noise_of_strings_and_of_unequal_shapes() -> None:
    words = np.array(["cat", "dog", "cow", "cat"], object)
    other = np.array(["cat", "dog", "cow", "dog"], object)
    assert sqnr(words, words) == INF
    assert sqnr(words, other) == pytest.approx(10 * np.log10(4))  # one of four
    assert sqnr(np.ones(3), np.ones(4)) == 0
    found = parity({"a": words, "b": np.ones(3)}, {"a": other, "b": np.ones(4)}, None)
    assert found.sqnr == 0
    assert found.max_difference == 1
    assert class_output({"a": words.reshape(2, 2), "b": np.ones((2, 2))}, 2) == "b"


def test_the_best_of_something_sorted_is_no_scores_of_classes() -> None:
    scores = np.random.default_rng(0).random((6, 5))
    best, places = -np.sort(-scores, axis=1), np.argsort(-scores, axis=1)
    assert class_output({"best": best, "places": places}, 6) is None
    assert class_output({"best": best, "scores": scores}, 6) == "scores"
    assert class_output({"codes": places}, 6) == "codes"  # integers alone: the scores of a model that is quantized


def test_outputs_behind_a_selection_are_told_apart(tmp_path: Path) -> None:
    """Boxes above a threshold: what the file keeps, where the float model keeps more or fewer, and where all operators are right."""
    b = zoo.Builder({"x": ["N", 16]})
    scores = b.op("Sigmoid", b.linear(b.op("Relu", b.linear("x", 16, 16)), 16, 16))
    flat = b.op("Reshape", scores, b.constant("flat", np.array([-1])))
    kept = b.op("Compress", flat, b.op("Greater", flat, b.constant("threshold", np.array(0.5, np.float32))))
    onnx.save(b.model(kept, scores), tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32))
    given = ["--calibration-data", str(tmp_path / "c.npz"), "-p", "w4a4", "--algorithm", "mse", "--device", "cpu", "--json"]
    done = CliRunner().invoke(main, ["quantize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "q.onnx"), *given])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "q.report" / "report.json").read_text())
    assert facts["validation"]["selected"] == [kept]
    assert worst_sqnr(facts["validation"]) == facts["validation"]["sqnr"][scores] > 5
    source = load_source(tmp_path / "m.onnx")
    onnx.save(onnx.utils.Extractor(source.model).extract_model(["x"], [kept]), tmp_path / "one.onnx")
    done = CliRunner().invoke(main, ["quantize", str(tmp_path / "one.onnx"), "-o", str(tmp_path / "q1.onnx"), *given])
    assert done.exit_code == 0, done.output
    verdict = json.loads((tmp_path / "q1.report" / "report.json").read_text())["verdict"]
    assert verdict["ship"] == "unclear"
    assert f"the outputs ({kept}) are selections" in verdict["sentence"]


def test_large_values_are_compared_in_one_forward_pass(tmp_path: Path) -> None:
    """A pass that holds fewer samples than are looked at was held against all of them, and every node seemed wrong."""
    source = zoo.loaded(zoo.tiny_resnet(), tmp_path)
    samples = zoo.images(8)
    types = infer_types(source, samples.shapes, samples.inputs)
    blocks = cut_blocks(source, types, {}, Config())
    worst, strays = check_import(TorchModel.of(source, types, blocks, torch.device("cpu"), size=2), samples)
    assert worst < 1e-5
    assert not strays


def test_equal_infinite_numbers_are_no_difference() -> None:
    a, b = np.array([INF, -INF, np.nan, 1.0]), np.array([INF, -INF, np.nan, 1.5])
    with np.errstate(invalid="raise"):  # inf - inf is not computed
        assert difference(torch.from_numpy(a), a) == 0
        assert difference(torch.from_numpy(b), a) == 0.5
        assert kernels._steps(a, a).max() == 0
        assert (kernels._steps(a, b) > 0).tolist() == [False, False, False, True]


def test_the_digest_of_strings_is_of_what_they_say() -> None:
    a, b, c = (digest({"x": np.array(words, object)}) for words in (["ab", "c"], ["ab", "".join("c")], ["a", "bc"]))
    assert a == b != c


def test_descriptions_of_pictures_are_taken_literally() -> None:
    """Names of a model's values end up in them, and a backslash is no reference to a group."""

    def line(axes: Axes) -> None:
        axes.plot([0, 1])

    drawn = picture("figure", r"the error of \1 and \g<name>", line)
    assert r'aria-label="the error of \1 and \g&lt;name&gt;"' in drawn


def test_samples_without_a_result_are_counted(tmp_path: Path) -> None:
    """The logarithm of a negative number is NaN in both models, which would count as agreement."""
    b = zoo.Builder({"x": ["N", 4]})
    path = tmp_path / "model.onnx"
    onnx.save(b.model(b.op("Log", "x")), path)
    inputs = np.ones((5, 4), np.float32)
    inputs[[1, 3], 2] = -1
    checked = validate(path, path, Samples({"x": inputs}), float_bytes=1)
    assert checked.nan_samples == 2
    facts: dict[str, Any] = {"validation": {**validation_report(checked), "evaluated_on": "data"}, "config": CONFIG}
    line = dict(headline(facts | {"coverage": {"weights_quantized": 0}}))
    assert line["accuracy"].endswith("; 5 samples of data, of which the float model makes NaN on 2")


def classifying(*outputs: str) -> onnx.ModelProto:
    """A layer, the class that it scores highest, and its scores."""
    b = zoo.Builder({"x": ["N", 6]})
    scores = b.linear("x", 6, 4)
    made = {"scores": scores, "class": b.op("ArgMax", scores, axis=1, keepdims=0), "row": b.op("ArgMax", scores, axis=1)}
    model = b.model(*(made[name] for name in outputs))
    for value, name in zip(model.graph.output, outputs, strict=True):
        value.type.tensor_type.elem_type = TensorProto.FLOAT if name == "scores" else TensorProto.INT64
    return model


@pytest.mark.parametrize("outputs", [["class"], ["row"], ["class", "scores"]])
def test_outputs_that_name_classes_have_an_accuracy(outputs: list[str], tmp_path: Path) -> None:
    """Scores go before them where there are any."""
    path = tmp_path / "model.onnx"
    onnx.save(classifying(*outputs), path)
    inputs = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    right = runtime.run(runtime.session(classifying("class")), {"x": inputs}).popitem()[1]
    labels = np.where(np.arange(40) % 4 == 0, (right + 1) % 4, right)
    checked = validate(path, path, Samples({"x": inputs}, labels), float_bytes=1)
    assert (checked.top1_float, checked.top1_quantized, checked.agreement, checked.lost) == (75.0, 75.0, 100.0, 0)


def test_labels_that_no_output_has_a_use_for_are_said_to_be_unused(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 6]})
    path = tmp_path / "model.onnx"
    onnx.save(b.model(b.op("Reshape", b.linear("x", 6, 4), b.constant("shape", np.array([0, 2, 2], np.int64)))), path)
    checked = validate(path, path, Samples({"x": np.ones((3, 6), np.float32)}, np.zeros(3, np.int64)), float_bytes=1)
    facts: dict[str, Any] = {"validation": {**validation_report(checked), "evaluated_on": "data"}, "config": CONFIG}
    line = dict(headline(facts | {"coverage": {"weights_quantized": 0}}))
    assert line["accuracy"].endswith("3 samples of data; labels not used: no output scores or names classes")


def test_signal_to_noise_of_what_is_no_number() -> None:
    """Masks of minus infinity on both sides are alike; NaN on one side is no exact result."""
    signal = np.array([[1.0, -np.inf, np.nan, 2.0]])
    assert sqnr(signal, signal) == float("inf")
    assert sqnr(signal, signal + np.array([[0.1, 0, 0, 0]])) == pytest.approx(10 * np.log10(5 / 0.01))
    assert sqnr(signal, np.array([[np.nan, -np.inf, np.nan, 2.0]])) == 0.0
