"""Weights that are cut out of others by sizes: constants, where the sizes are the same for any number of samples."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests import zoo
from toolchain import large, runtime
from toolchain.config import Config
from toolchain.pipeline import quantize
from toolchain.samples import Samples
from toolchain.source import load_source

WIDTH = 32
SAMPLES = Samples({"x": np.random.default_rng(0).normal(size=(16, 5, WIDTH)).astype(np.float32)})


def projections(axis: int, width: int | str = WIDTH) -> onnx.ModelProto:
    """One constant cut in two where an axis of a value says, which was repeated for each sample as torch writes it."""
    b = zoo.Builder({"x": ["N", 5, width]})
    for name, numbers in {"zero": [0], "one": [1], "ones": [1, 1], "end": [2**31], "axis": [axis]}.items():
        b.constant(name, np.array(numbers))
    count = b.op("Slice", b.op("Shape", "x"), "zero", "one")
    probe = b.op("Tile", b.constant("probe", np.ones((1, 1, WIDTH), np.float32)), b.op("Concat", count, "ones", axis=0))
    size = b.op("Gather", b.op("Shape", probe if width == WIDTH else "x"), "axis")
    weight = b.weight("projections", (2 * WIDTH, WIDTH), WIDTH)
    first, second = b.op("Slice", weight, "zero", size, "zero"), b.op("Slice", weight, size, "end", "zero")
    query = b.op("MatMul", probe, b.op("Transpose", first, perm=[1, 0]))
    key = b.op("MatMul", "x", b.op("Transpose", second, perm=[1, 0]))
    return b.model(b.op("MatMul", b.op("Add", query, key), b.weight("last", (WIDTH, 4), WIDTH)))


def check(model: onnx.ModelProto, folder: Path) -> Any:
    source = zoo.loaded(model, folder)
    wanted, found = (runtime.run(runtime.session(one), SAMPLES.inputs) for one in (model, source.model))
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    return source


def test_a_weight_that_is_cut_by_a_known_size_is_a_weight(tmp_path: Path) -> None:
    source = check(projections(axis=2), tmp_path)
    assert [source.constants[source.graph.weight(node) or ""].shape for node in source.graph.weighted] == [
        (WIDTH, WIDTH),
        (WIDTH, WIDTH),
        (WIDTH, 4),
    ]
    found = quantize(source, SAMPLES, Config(algorithm="minmax", weight_bits=8, activation_bits=8, device="cpu"))
    assert len(found.placement.weights) == 3
    assert not found.placement.floats


def test_one_that_is_cut_by_a_size_that_is_open_stays(tmp_path: Path) -> None:
    source = check(projections(axis=2, width="width"), tmp_path)
    assert len(source.graph.weighted) == 1


@pytest.mark.parametrize("kind", ["half", "equal", "negative"])
def test_sizes_are_computed_as_onnx_does(kind: str, tmp_path: Path) -> None:
    """ONNX Runtime's symbolic inference divides floats like integers, takes an open axis for another number, and floors for truncating."""
    b = zoo.Builder({"x": ["N", "length", WIDTH + 1]})
    numbers = {"zero": [0], "one": [1], "two": [2], "three": [3], "five": [5], "eight": [8], "many": [16], "end": [2**31]}
    for name, values in numbers.items():
        b.constant(name, np.array(values))
    shape = b.op("Shape", "x")
    width, length = b.op("Gather", shape, "two"), b.op("Gather", shape, "one")
    if kind == "half":
        halved = b.op("Div", b.op("Cast", width, to=1), b.constant("halving", np.array([2], np.float32)))
        size = b.op("Cast", b.op("Mul", halved, b.constant("threefold", np.array([3], np.float32))), to=7)
    elif kind == "equal":
        size = b.op("Where", b.op("Equal", length, "five"), "eight", "many")
    else:
        size = b.op("Neg", b.op("Div", b.op("Sub", "eight", width), "two"))
    weight = b.op("Slice", b.weight("all", (WIDTH + 1, 64), WIDTH), "zero", size, "one")
    model = b.model(b.op("Relu", b.op("MatMul", b.op("Relu", b.op("MatMul", "x", b.weight("w", (WIDTH + 1, WIDTH + 1), WIDTH))), weight)))
    source = zoo.loaded(model, tmp_path)
    x = np.random.default_rng(0).normal(size=(2, 5, WIDTH + 1)).astype(np.float32)
    names = [output.name for output in model.graph.output]
    wanted, found = (runtime.execute(runtime.session(one), {"x": x}, names) for one in (model, source.model))
    assert {name: array.shape for name, array in wanted.items()} == {name: array.shape for name, array in found.items()}
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    assert (len(source.graph.weighted) == 2) == (kind != "equal")


def test_weights_outside_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "OUTSIDE", 100)
    path = tmp_path / "model.onnx"
    onnx.save(projections(axis=2), path)
    source = load_source(path)
    folder = large.folder_of(source.model)
    assert folder is not None
    assert [file.name for file in folder.iterdir() if file.suffix == ".weights"] == ["cut.weights"]
    assert len(source.graph.weighted) == 3
    wanted, found = (runtime.run(runtime.session(one), SAMPLES.inputs) for one in (path, source.model))
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
