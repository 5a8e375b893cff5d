"""Attention scores: quantized as far down as a Softmax tells, whatever masks are added to them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporters.qdq import export_qdq
from tests import architectures, zoo
from tests.test_placement import placed
from toolchain import runtime
from toolchain.calibration import Histogram, calibrate_activation
from toolchain.config import Config
from toolchain.noise import sqnr
from toolchain.pipeline import quantize
from toolchain.quant_table import QuantTable, activation_spec
from toolchain.runtime import Optimization
from toolchain.samples import Samples
from toolchain.scheme import TARGETS
from toolchain.scores import Row, Scores, Sum
from toolchain.simulation import simulate
from toolchain.step_learning import LearnedSteps
from toolchain.unit import NOT_FINITE

TOKENS = 12
LOWEST = float(np.finfo(np.float32).min)


def sharp(name: str, shape: Any) -> np.ndarray:
    """Weights under which attention matters: queries and keys that tell tokens apart."""
    rng = np.random.default_rng(sum(map(ord, name)))
    if len(shape) == 1:
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
    scale = 1.0 if "embed" in name else (2.0 if ".query" in name or ".key" in name else 1.0) / np.sqrt(shape[0])
    return (rng.normal(size=shape) * scale).astype(np.float32)


def padded(count: int = 24) -> Samples:
    rng = np.random.default_rng(4)
    lengths = rng.integers(3, TOKENS + 1, count)
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    return Samples({"input_ids": rng.integers(0, 50, (count, TOKENS)), "attention_mask": mask})


def distances(heads: int = 4) -> np.ndarray:
    """ALiBi: the further away, the lower, with a slope for each head."""
    apart = np.abs(np.arange(TOKENS) - np.arange(TOKENS)[:, None])
    return -apart[None, None] * 0.5 ** np.arange(1, heads + 1)[None, :, None, None]


@pytest.mark.parametrize("bias", [None, distances()], ids=["mask", "mask_and_distances"])
@pytest.mark.parametrize("masked", [-1e4, LOWEST])
def test_masks_cost_no_accuracy(masked: float, bias: np.ndarray | None, tmp_path: Path) -> None:
    source, samples = zoo.loaded(architectures.bert(weights=sharp, masked=masked, distances=bias), tmp_path), padded()
    name = source.graph.outputs[0]
    expected = runtime.run(runtime.session(source.model), samples.inputs)[name]
    table = quantize(source, samples, Config(device="cpu", algorithm="mse", target="qnn", weight_bits=8, activation_bits=8)).table
    exported = export_qdq(source.model, table, scheme=TARGETS["qnn"])
    by_file, default = (
        runtime.run(runtime.session(exported, optimization=o), samples.inputs)[name] for o in (Optimization.NONE, Optimization.DEFAULT)
    )
    assert sqnr(expected, default) > 27  # measured: 29.4 and 29.2 dB; where grids hold the masks, 6.7 and 7.1
    # The same numbers, but for a rounding tie here and there: one such step in all outputs is 60 dB.
    assert sqnr(simulate(source, table, samples, torch.device("cpu"), scheme=TARGETS["qnn"])[name], by_file) > 50
    assert sqnr(by_file, default) > 50


def scores_in(model: onnx.ModelProto, folder: Path) -> Scores:
    return placed(model, folder, target="qnn", weight_bits=8, activation_bits=8)[1].scores


def attention(rearranged: bool = False, handed_out: bool = False, axis: int = -1) -> onnx.ModelProto:
    """softmax(x x^T + mask) x W, [N, 6, 4]."""
    b = zoo.Builder({"x": ["N", 6, 4], "mask": ["N", 6, 6]})
    scores = b.op("Add", b.op("MatMul", "x", b.op("Transpose", "x", perm=[0, 2, 1]), name="product"), "mask", name="scores")
    if rearranged:
        scores = b.op("Reshape", scores, b.constant("shape", np.array([-1, 2, 3, 6], np.int64)), name="split")
    chances = b.op("Softmax", scores, name="chances", axis=axis)
    if rearranged:
        chances = b.op("Reshape", chances, b.constant("back", np.array([-1, 6, 6], np.int64)))
    projected = b.op("MatMul", b.op("MatMul", chances, "x"), b.weight("projection", (4, 4), 4))
    return b.model(projected, *(["scores"] if handed_out else []))


def test_scores_and_what_is_added_up_to_them(tmp_path: Path) -> None:
    found = scores_in(attention(), tmp_path)
    assert found.rows == {"scores": Row("scores", -1)}
    assert found.addends == {"product": (Sum("scores", "mask"),), "mask": (Sum("scores", "product"),)}


def test_scores_are_seen_as_softmax_reads_them(tmp_path: Path) -> None:
    found = scores_in(attention(rearranged=True, axis=3), tmp_path)
    assert found.rows == {"split": Row("scores", 3)}
    tensor, bits = torch.zeros(2, 2, 3, 6), {"scores": 8}
    assert found.shown("scores", tensor, bits) is None
    seen = found.shown("split", tensor, bits)
    assert seen is not None
    assert seen[0] == "scores"


def test_scores_that_are_read_elsewhere_keep_their_range(tmp_path: Path) -> None:
    assert scores_in(attention(handed_out=True), tmp_path) == Scores()


def test_a_mask_for_all_layers_is_limited_by_each(tmp_path: Path) -> None:
    source, found = placed(architectures.bert(layers=3), tmp_path, target="qnn", weight_bits=8, activation_bits=8)
    softmax = [node for node in source.graph.nodes if node.op_type == "Softmax"]
    assert [row.origin for row in found.scores.rows.values()] == [node.inputs[0] for node in reversed(softmax)]
    mask = next(name for name in found.scores.addends if source.graph.producer[name].op_type == "Mul")
    assert len(found.scores.addends[mask]) == 3


@given(st.integers(2, 40), st.integers(2, 8), st.floats(0.1, 30), st.floats(0, 0.9), st.sampled_from([-1e4, LOWEST]), st.integers(0, 10**6))
def test_what_is_not_told_is_less_than_half_a_step(size: int, bits: int, spread: float, share: float, mask: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(5, size)) * spread
    masked = rng.random((5, size)) < share
    masked[:, 0] = False  # each row has something to attend to
    tensor = torch.from_numpy((scores + masked * mask).astype(np.float32))
    seen = Scores({"s": Row("s", -1)}).shown("s", tensor, {"s": bits})
    assert seen is not None
    told = torch.softmax(seen[1].double(), -1)
    moved = (told - torch.softmax(tensor.double(), -1)).abs().amax(-1)
    assert float(moved.max()) <= 2.0 ** -(bits + 1) * (1 + 1e-4)  # float32 scores: an ulp of 100 is 8e-6
    assert float(seen[1].min()) >= float(tensor.amax(-1).min()) - np.log(2.0 ** (bits + 1) * size) - 1e-4


def test_rows_that_are_masked_as_a_whole_are_not_seen() -> None:
    tensor = torch.tensor([[1.0, 2.0, 3.0], [LOWEST, LOWEST, LOWEST], [-9999.0, -10000.0, -10001.0]])
    seen = Scores({"s": Row("s", 1)}).shown("s", tensor, {"s": 8})
    assert seen is not None
    assert seen[1].tolist() == [1.0, 2.0, 3.0]


def test_addends_end_where_their_sum_does() -> None:
    scores = Scores(addends={"outer": (Sum("sum", "product"), Sum("sum2", "product2")), "inner": (Sum("outer", "bias"),)})
    ranges = {"sum": (-9, 5), "product": (-5, 5), "sum2": (-3, 5), "product2": (-5, 8), "outer": (-1000, 0), "bias": (-1, 2)}
    seen = {name: Histogram.of(torch.tensor([low, 0.0, high])) for name, (low, high) in (ranges | {"inner": (-1000, 1)}).items()}
    limited = scores.limited(seen)
    assert (limited["outer"].low, limited["outer"].high) == (-14, 0)  # -9 - 5, below -3 - 8
    assert (limited["inner"].low, limited["inner"].high) == (-16, 1)
    assert all(limited[name] == seen[name] for name in ("sum", "product", "bias"))


@given(st.lists(st.floats(-1000, 100, width=32), min_size=1, max_size=50), st.floats(-100, 50, width=32))
def test_a_limited_histogram_holds_the_limited_values(values: list[float], low: float) -> None:
    histogram = Histogram.of(torch.tensor(values))
    limited = histogram.above(low)
    expected = np.maximum(np.array(values, np.float32), np.float32(low))
    assert (limited.low, limited.high) == (expected.min(), expected.max())
    centres, counts = limited.values()
    width, before = 2.0**limited.exponent, 2.0**histogram.exponent
    # Each value is known to half a bin of either histogram.
    found = np.sort(np.repeat(centres, counts))
    assert np.abs(found - np.sort(expected)).max() <= (width + before) / 2 * (1 + 1e-6)


def masked_encoder() -> onnx.ModelProto:
    """Two encoder layers on [N, 6, 8] with a mask [N, 1, 1, 6] that is added to the scores of both."""
    b = zoo.Builder({"x": ["N", 6, 8], "mask": ["N", 1, 1, 6]})
    return b.model(architectures.transformer(b, "x", 2, 8, 2, None, "mask"))


@pytest.mark.parametrize(
    ("target", "compiled", "kept"),
    [("ort-cpu", "on", "float32"), ("ort-cpu", "off", "float32"), ("ort-cpu", "off", "bfloat16"), ("qnn", "off", "float32")],
)
@pytest.mark.parametrize("masked", [-1e4, LOWEST, -np.inf])
def test_masked_attention_is_learned(masked: float, target: str, compiled: str, kept: str, tmp_path: Path) -> None:
    source = zoo.loaded(masked_encoder(), tmp_path)
    rng = np.random.default_rng(0)
    mask = np.where(np.arange(6) < rng.integers(2, 7, 16)[:, None], 0.0, masked).astype(np.float32)[:, None, None]
    samples = Samples({"x": rng.normal(size=(16, 6, 8)).astype(np.float32), "mask": mask})
    options = {"weight_bits": 3, "activation_bits": 8, "target": target, "compile": compiled, "cache_dtype": kept}
    found = quantize(source, samples, Config(device="cpu", iterations=30, batch_size=8, **options))  # pyright: ignore[reportArgumentType]
    assert found.results
    for result in found.results:
        assert result.reason != NOT_FINITE
        assert np.isfinite([result.loss_before, result.loss_after]).all()
    assert sum(result.kept == "learned" for result in found.results) > len(found.results) / 2


class Attention:
    """Stands for an imported piece: y = softmax(s) v."""

    bounds: Mapping[str, tuple[float, float]] = {}

    def __call__(self, values: Mapping[str, torch.Tensor], observe: Any, unbounded: Any, narrowed: Any) -> dict[str, torch.Tensor]:
        return {"y": torch.softmax(observe("s", values["s"]), -1) @ values["v"]}


@pytest.mark.parametrize("masked", [-1e4, LOWEST])
def test_the_step_of_scores_learns_the_same_whatever_the_mask(masked: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, v = torch.randn(4, 6, generator=generator), torch.randn(6, 3, generator=generator)
    grid = calibrate_activation(
        Histogram.of(torch.cat([scores, scores.min() - torch.ones(1, 6) * 3])), activation_spec(8, False), "minmax", 100
    )
    gradients = []
    for mask in (masked, -60.0):  # both beyond the grid's end, and beyond another width of it
        hidden = torch.where(torch.arange(6) < 4, scores, torch.full((), mask))
        steps = LearnedSteps(["s"], QuantTable({"s": grid}), torch.device("cpu"), True, frozenset({"s"}))
        made = steps.running(Attention(), None, False)({"s": hidden, "v": v})  # pyright: ignore[reportArgumentType]
        made["y"].square().sum().backward()
        (factor,) = steps.parameters
        assert factor.grad is not None
        gradients.append(float(factor.grad))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-6)
    assert gradients[0] != 0.0
