"""Files of older opsets compute what they did: the coordinates of Upsample and the first Resize, and Hardmax over several axes."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import zoo
from toolchain import runtime
from toolchain.config import Config
from toolchain.errors import UnsupportedModelError
from toolchain.pipeline import quantize
from toolchain.rewrite_check import check_rewritten


def same_results(model: onnx.ModelProto, folder: Path) -> None:
    source = zoo.loaded(model, folder)
    assert source.opset == 13
    x = zoo.images(2).inputs
    expected, found = (list(runtime.run(runtime.session(m), x).values()) for m in (model, source.model))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5, rtol=0)  # float32 sums in another order


def resized(kind: str, opset: int, scales: list[float], mode: str) -> onnx.ModelProto:
    b = zoo.Builder({"x": ["N", 3, 8, 8]}, opset=opset, ir_version=4)
    x = b.conv("x", 3, 4)
    if opset < 9:
        return b.model(b.conv(b.op(kind, x, mode=mode, scales=scales), 4, 4))
    return b.model(b.conv(b.op(kind, x, b.constant("scales", np.array(scales, np.float32)), mode=mode), 4, 4))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(("kind", "opset"), [("Upsample", 7), ("Upsample", 9), ("Resize", 10)])
def test_enlarging(kind: str, opset: int, mode: str, tmp_path: Path) -> None:
    same_results(resized(kind, opset, [1.0, 1.0, 2.0, 2.0], mode), tmp_path)
    same_results(resized(kind, opset, [1.0, 1.0, 1.5, 2.5], mode), tmp_path)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scale", [0.5, 0.75, 0.3])
def test_shrinking(scale: float, mode: str, tmp_path: Path) -> None:
    same_results(resized("Resize", 10, [1, 1, scale, scale], mode), tmp_path)


def test_rounding_that_later_versions_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"opset 10 cannot be raised to 13: .*enlarges one axis and shrinks another"):
        zoo.loaded(resized("Resize", 10, [1, 1, 2, 0.5], "nearest"), tmp_path)


@pytest.mark.parametrize("axis", [None, 1, 2, 3])
def test_hardmax(axis: int | None, tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]}, opset=11, ir_version=4)
    y = b.op("Hardmax", b.conv("x", 3, 4), **({} if axis is None else {"axis": axis}))  # pyright: ignore[reportArgumentType]
    same_results(b.model(b.conv(y, 4, 4)), tmp_path)


def test_a_raised_model_is_run_beside_its_file(tmp_path: Path) -> None:
    said = check_rewritten(zoo.loaded(resized("Upsample", 9, [1.0, 1.0, 2.0, 2.0], "linear"), tmp_path), zoo.images(5))
    assert said is not None
    assert re.fullmatch(r"the model was raised from opset 9 to 13, and computes what the file says (exactly|to \d+ dB) on 4 samples", said)
    assert check_rewritten(zoo.loaded(zoo.tiny_resnet(), tmp_path), zoo.images(5)) is None


def test_a_raised_model_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.raising._set_coordinates", lambda graph: None)  # ONNX's converter alone
    source = zoo.loaded(resized("Upsample", 9, [1.0, 1.0, 2.0, 2.0], "linear"), tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"raised from opset 9 to 13, and then computes something else: its output .* on 4 samples"
    ):
        quantize(source, zoo.images(8), Config(algorithm="mse", device="cpu"))


def test_a_file_that_gives_other_results_each_time_cannot_be_compared(tmp_path: Path) -> None:
    b = zoo.Builder({"x": ["N", 3, 8, 8]}, opset=9, ir_version=4)
    y = b.op("Softmax", b.conv("x", 3, 4), axis=1)  # three nodes from opset 13 on: those behind it get other seeds
    source = zoo.loaded(b.model(b.conv(b.op("Add", y, b.op("RandomNormalLike", y)), 4, 4)), tmp_path)
    said = check_rewritten(source, zoo.images(4))
    assert said is not None
    assert "was not compared" in said


def test_a_file_whose_results_are_what_rounding_leaves_cannot_be_compared(tmp_path: Path) -> None:
    """A hard swish in two spellings, one taken from the other: what is left depends on the last bit, and is zero in one spelling."""
    b = zoo.Builder({"x": ["N", 3, 8, 8]}, opset=12, ir_version=4)
    x = b.conv("x", 3, 4)
    three, zero, six = (b.constant(f"number{value}", np.array(value, np.float32)) for value in (3, 0, 6))
    spelled = b.op("Div", b.op("Mul", x, b.op("Clip", b.op("Add", x, three), zero, six)), six)
    rest = b.op("Sub", spelled, b.op("Mul", x, b.op("HardSigmoid", x, alpha=1 / 6)))
    source = zoo.loaded(b.model(b.conv(rest, 4, 4, bias=False)), tmp_path)
    said = check_rewritten(source, zoo.images(4))
    assert said is not None
    assert said.endswith("the file itself gives other results when its input moves by the smallest step of its type")
