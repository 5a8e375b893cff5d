"""The method of activation ranges is the one that harms the outputs least: outliers that carry nothing are clipped, others are not."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import zoo
from toolchain.config import Config
from toolchain.pipeline import Quantized, quantize
from toolchain.range_choice import CANDIDATES, RangeChoice, heads
from toolchain.report import range_report
from toolchain.samples import Samples
from toolchain.wording import ranges_line

INPUTS = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
WEIGHT = np.random.default_rng(1).normal(size=(32, 6)).astype(np.float32)


def chain(outlier_weight: float) -> onnx.ModelProto:
    """y = tanh(relu(x A + c) B): two of 32 hidden values are seldom active and large then; `outlier_weight` is how much y takes of them."""
    first = 0.4 * np.random.default_rng(2).normal(size=(8, 32)).astype(np.float32)
    first[:, 30:] = 0.0
    first[[0, 1], [30, 31]] = 60.0
    shift = np.zeros(32, np.float32)
    shift[30:] = -90.0
    second = WEIGHT.copy()
    second[30:] *= outlier_weight
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 8] x) => (float[N, 6] y) { h = Gemm (x, a, c) r = Relu (h) s = MatMul (r, b) y = Tanh (s) }
    """
    model = onnx.parser.parse_model(text)
    for name, array in (("a", first), ("c", shift), ("b", second)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def quantized(model: onnx.ModelProto, folder: Path, **settings: object) -> Quantized:
    base = {"algorithm": "mse", "activation_bits": 4, "weight_bits": 8, "first_last_bits": "same", "device": "cpu"}
    return quantize(zoo.loaded(model, folder), Samples({"x": INPUTS}), Config(**(base | settings)))  # pyright: ignore[reportArgumentType]


def step(found: Quantized) -> float:
    return float(found.table["r"].scale)


def test_outliers_are_clipped_where_they_carry_nothing_and_kept_where_they_carry_the_answer(tmp_path: Path) -> None:
    idle, vital = (quantized(chain(weight), tmp_path) for weight in (0.0, 3.0))
    assert step(idle) < 0.5 * step(vital)
    assert step(idle) < 0.5 * step(quantized(chain(0.0), tmp_path, activation_range="mse"))


def test_the_choice_has_the_least_error_of_all(tmp_path: Path) -> None:
    for weight in (0.0, 0.1, 3.0):
        (choice,) = quantized(chain(weight), tmp_path).ranges
        assert set(choice.errors) == {candidate.label for candidate in CANDIDATES}
        assert all(error is not None and error > 0 for error in choice.errors.values())
        assert choice.errors[choice.method.label] == min(choice.errors.values(), key=lambda e: np.inf if e is None else e)


def test_each_bit_width_has_its_own_choice_and_other_settings_none(tmp_path: Path) -> None:
    model = chain(0.0)
    assert [choice.bits for choice in quantized(model, tmp_path, bits=("MatMul=w8a8",)).ranges] == [4, 8]
    assert quantized(model, tmp_path, activation_range="percentile").ranges == ()
    assert quantized(model, tmp_path, algorithm="minmax").ranges == ()
    assert quantized(model, tmp_path, activation_bits=32).ranges == ()


def test_outputs_that_do_not_compare_leave_the_papers_method(tmp_path: Path) -> None:
    """A model whose outputs are all zero: every candidate is as good as another."""
    (choice,) = quantized(silent(), tmp_path).ranges
    assert choice.method == CANDIDATES[0]
    assert set(choice.errors.values()) == {None}


def silent() -> onnx.ModelProto:
    model = chain(1.0)
    (b,) = (tensor for tensor in model.graph.initializer if tensor.name == "b")
    b.CopyFrom(onnx.numpy_helper.from_array(np.zeros((32, 6), np.float32), "b"))
    return model


def test_a_choice_goes_through_json_and_is_said_in_words() -> None:
    choice = RangeChoice(4, CANDIDATES[2], {"L2.4": 0.1, "L1.5": 0.01, "minmax": None})
    assert RangeChoice.of(json.loads(json.dumps(asdict(choice)))) == choice
    assert "4 bits: L1.5 (L2.4 10.0, L1.5 20.0 dB)" in ranges_line([range_report(choice)])


def test_heads_are_the_last_weighted_blocks_of_every_branch(tmp_path: Path) -> None:
    """Two branches that end in a layer each, one of them with arithmetic behind it."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 8] x) => (float[N, 6] y, float[N, 6] z) {
            h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) k = MatMul (r, b) n = Neg (k) z = Exp (n)
        }
    """
    model = onnx.parser.parse_model(text)
    for name, array in (("a", np.eye(8, dtype=np.float32)), ("b", WEIGHT[:8])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    source = zoo.loaded(model, tmp_path)
    found = quantized(model, tmp_path)
    blocks = [row.block for row in found.plan.rows]

    class Piece:
        def __init__(self, block: object) -> None:
            self.block = block

    positions = heads([Piece(block) for block in blocks])  # pyright: ignore[reportArgumentType]
    made = {value for position in positions for node in blocks[position].nodes for value in node.outputs}
    assert {"y", "k"} <= made
    assert source.graph.outputs == ("y", "z")


@pytest.mark.parametrize("algorithm", ["mse", "qdrop"])
def test_learning_algorithms_start_from_the_chosen_ranges(algorithm: str, tmp_path: Path) -> None:
    found = quantized(chain(0.0), tmp_path, algorithm=algorithm, iterations=1, activation_lr=0.0)
    assert found.ranges
    assert step(found) < 0.5 * step(quantized(chain(3.0), tmp_path))
