"""Bit-Split: alternation never raises the error, its optimum is one of single digits, and it works for every kind of weighted node."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import zoo
from toolchain.baselines import bit_split
from toolchain.baselines.bit_split import Moments, alternate
from toolchain.calibration import rows_of
from toolchain.config import Config
from toolchain.errors import UsageError
from toolchain.pipeline import quantize
from toolchain.quant_table import weight_spec


def problem(seed: int, groups: int = 2, inner: int = 5, outer: int = 3, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor, Moments]:
    """Correlated inputs [G, rows, K], float weights [G, K, O], and the moments of their products with a little noise."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, inner, inner, generator=rng, dtype=torch.float64)
    x = torch.randn(groups, rows, inner, generator=rng, dtype=torch.float64) @ mixing
    weights = torch.randn(groups, inner, outer, generator=rng, dtype=torch.float64)
    y = x @ weights + 0.1 * torch.randn(groups, rows, outer, generator=rng, dtype=torch.float64)
    return x, weights, Moments(x.transpose(1, 2) @ x, x.transpose(1, 2) @ y, y.square().sum(1))


def rounded(weights: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rounding to nearest on min-max grids."""
    largest = 2 ** (bits - 1) - 1
    scale = weights.abs().amax(1) / largest
    return (weights / scale.unsqueeze(1)).round().clamp(-largest, largest), scale


@given(st.integers(0, 10_000), st.integers(2, 8))
@settings(deadline=None, max_examples=40)
def test_alternation_never_raises_the_error(seed: int, bits: int) -> None:
    _, weights, moments = problem(seed)
    codes, scale = rounded(weights, bits)
    start = moments.error(codes * scale.unsqueeze(1))
    found, wide = alternate(moments, codes, scale, bits, 0.0 * scale)
    end = moments.error(found * wide.unsqueeze(1))
    assert end <= start * (1 + 1e-9)
    assert torch.equal(found, found.round())
    assert found.abs().max() <= 2 ** (bits - 1) - 1
    again, rescaled = alternate(moments, found, wide, bits, 0.0 * scale)  # digits of the same codes may differ, and leave room
    assert moments.error(again * rescaled.unsqueeze(1)) <= end * (1 + 1e-9)


def test_the_error_is_that_of_the_outputs() -> None:
    x, weights, moments = problem(3)
    codes, scale = rounded(weights, 3)
    approximate = codes * scale.unsqueeze(1)
    y = x @ weights  # moments have noise in y: compare differences, in which its energy cancels
    noise_free = Moments(moments.gram, x.transpose(1, 2) @ y, y.square().sum(1))
    assert noise_free.error(approximate) == pytest.approx(float((x @ approximate - y).square().sum()), rel=1e-9)


@pytest.mark.parametrize("bits", [2, 3])
def test_it_is_near_the_best_of_all_codes(bits: int) -> None:
    """Four weights of two outputs: every code can be tried. Coordinate descent need not find the best, but beats rounding."""
    _, weights, moments = problem(5, groups=1, inner=4, outer=2)
    largest = 2 ** (bits - 1) - 1
    best = []
    for output in range(2):
        part = Moments(moments.gram, moments.cross[:, :, output : output + 1], moments.energy[:, output : output + 1])
        every = torch.tensor(list(itertools.product(range(-largest, largest + 1), repeat=4)), dtype=torch.float64)
        every = every[every.abs().sum(1) > 0]
        power, match = (every @ part.gram[0] * every).sum(1), (every @ part.cross[0, :, 0]).clamp_min(0)
        best.append(float(part.energy) - float((match**2 / power).max()))
    codes, scale = rounded(weights, bits)
    found, wide = alternate(moments, codes, scale, bits, 0.0 * scale)
    error = moments.error(found * wide.unsqueeze(1))
    assert sum(best) <= error * (1 + 1e-9)
    assert error < 0.9 * moments.error(codes * scale.unsqueeze(1))


def conv_transpose() -> zoo.Builder:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8, act="relu")
    weight = b.weight("up_w", (8, 6, 3, 3), 72)
    x = b.op("ConvTranspose", x, weight, b.constant("up_b", np.full(6, 0.1, np.float32)), name="up", strides=[2, 2])
    x = b.op("Relu", x)
    b.op("MatMul", b.op("Flatten", b.op("GlobalAveragePool", x)), b.weight("matmul_w", (6, 10), 6), name="y")
    return b


def depthwise() -> zoo.Builder:
    b = zoo.Builder({"x": ["N", 3, 8, 8]})
    x = b.conv("x", 3, 8, act="relu6")
    x = b.conv(x, 8, 8, stride=2, group=8, act="relu6")
    x = b.conv(x, 8, 12, group=4, act="relu")
    b.op("Identity", b.head(x, 12), name="y")
    return b


@pytest.mark.parametrize("build", [conv_transpose, depthwise])
@pytest.mark.parametrize("bits", [2, 3])
def test_every_kind_of_layer_gains(build: Callable[[], zoo.Builder], bits: int, tmp_path: Path) -> None:
    source = zoo.loaded(build().model("y"), tmp_path)
    found = quantize(source, zoo.images(64), Config(algorithm="bit-split", weight_bits=bits, first_last_bits="same", device="cpu"))
    assert len(found.results) == len(source.graph.weighted)
    assert {result.kept for result in found.results} == {"learned"}
    for result in found.results:
        assert result.loss_after < result.loss_before
    for name, grid in found.table.tensors.items():
        if name in found.placement.weights:
            assert grid.codes is not None
            assert np.abs(grid.codes).max() <= 2 ** (bits - 1) - 1


def test_a_layer_beats_min_max_on_its_own_objective(tmp_path: Path) -> None:
    """The paper's objective, ||Y - X W~||^2 of the layer over its quantized inputs, from a start of min-max grids."""
    source = zoo.loaded(zoo.tiny_resnet(), tmp_path)
    config = Config(algorithm="bit-split", weight_bits=3, weight_range="minmax", activation_range="minmax", device="cpu")
    found = quantize(source, zoo.images(64), config)
    inner = [result for result in found.results if result.unit not in ("l00", "l06")]  # the edges have 8 bits
    assert len(inner) == 5
    assert all(result.loss_after < 0.8 * result.loss_before for result in inner)


def test_what_it_cannot_split_keeps_its_codes(tmp_path: Path) -> None:
    """A stack of matrices is rounded to nearest; the layer behind it is split."""
    b = zoo.Builder({"x": ["N", 4, 3, 6]})
    y = b.op("Relu", b.op("MatMul", "x", b.weight("stack_w", (4, 6, 6), 6)))
    source = zoo.loaded(b.model(b.op("MatMul", y, b.weight("plain_w", (6, 5), 6))), tmp_path)
    found = quantize(source, zoo.images(64, (4, 3, 6)), Config(algorithm="bit-split", weight_bits=3, first_last_bits="same", device="cpu"))
    stack, plain = found.results
    assert (stack.kept, stack.flipped, dict(stack.changes)) == ("initial", 0.0, {})
    assert stack.reason == "not split: its weight has one scale for the whole tensor"
    assert plain.flipped > 0


def test_asymmetric_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="--weight-scheme symmetric"):
        Config(algorithm="bit-split", weight_scheme="asymmetric")
    assert Config(algorithm="bit-split", target="academic", weight_scheme="symmetric").learns


def test_unfolding_gives_the_inputs_back() -> None:
    """The weight of ones and zeros makes a convolution return its patches, in the order of the rows of weights."""
    rng = np.random.default_rng(0)
    weight = torch.tensor(rng.normal(size=(6, 4, 3, 3)), dtype=torch.float32)
    x = torch.tensor(rng.normal(size=(2, 4, 5, 5)), dtype=torch.float32)
    spec = weight_spec(4, 0, True)
    patches = torch.conv2d(x, bit_split._unfolding((6, 4, 3, 3), spec, 1), padding=1)
    rows = torch.tensor(rows_of(weight.numpy(), spec))
    expected = torch.conv2d(x, weight, padding=1)
    torch.testing.assert_close(torch.einsum("nkhw,ok->nohw", patches, rows), expected, atol=1e-4, rtol=0)  # 36 float32 products
