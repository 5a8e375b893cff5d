"""Outputs that are no plain float arrays: infinite numbers, strings, sequences, maps from class to score, constants."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from matplotlib.axes import Axes
from onnx import TensorProto

from tests import zoo
from toolchain import kernels, runtime
from toolchain.import_check import difference
from toolchain.plot import picture
from toolchain.report import validation_report
from toolchain.run_folder import digest
from toolchain.samples import Samples
from toolchain.validation import class_output, parity, sqnr, validate
from toolchain.wording import headline

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
