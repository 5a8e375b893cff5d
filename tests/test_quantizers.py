"""One arithmetic, three executions: NumPy, torch and ONNX Runtime give the same codes bit for bit; and the laws of quantizers."""

from typing import Any

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from toolchain import compiled, fake_quant
from toolchain.compiled import Limits
from toolchain.fake_quant import Coins, LearnedStep, fake_quantize, flat, rounding_logits, soft_round
from toolchain.quant_table import QuantSpec, TensorQuant, activation_spec, dequantize, quantize, weight_spec

SCALES = st.floats(2**-20, 2**10, width=32)
ARRAYS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1000, 1000, width=32))


@st.composite
def grids(draw: st.DrawFn) -> TensorQuant:
    """Per-tensor activation grids of 2 to 8 bits."""
    spec = activation_spec(draw(st.integers(2, 8)), draw(st.booleans()))
    zero_point = 0 if spec.symmetric else draw(st.integers(spec.qmin, spec.qmax))
    return TensorQuant(spec, np.float32(draw(SCALES)), np.int32(zero_point))


def runtime_session(storage: str) -> ort.InferenceSession:
    text = f"""<ir_version: 8, opset_import: ["" : 13]>
    g (float[N] x, float s, {storage} z, {storage} lo, {storage} hi) => (float[N] y) {{
        q = QuantizeLinear(x, s, z)
        c = Clip(q, lo, hi)
        y = DequantizeLinear(c, s, z)
    }}"""
    return ort.InferenceSession(onnx.parser.parse_model(text).SerializeToString(), providers=["CPUExecutionProvider"])


SESSIONS = {"uint8": runtime_session("uint8"), "int8": runtime_session("int8")}


@given(ARRAYS, grids())
@settings(deadline=None)
def test_numpy_torch_and_onnxruntime_agree_bit_for_bit(x: np.ndarray, grid: TensorQuant) -> None:
    expected = dequantize(quantize(x, grid), grid)
    assert np.array_equal(fake_quantize(torch.from_numpy(x), grid).numpy(), expected)
    dtype = "int8" if grid.spec.signed else "uint8"
    feeds = {
        "x": x,
        "s": np.asarray(grid.scale),
        **{n: np.array(v, dtype) for n, v in (("z", grid.zero_point), ("lo", grid.spec.qmin), ("hi", grid.spec.qmax))},
    }
    assert np.array_equal(np.asarray(SESSIONS[dtype].run(None, feeds)[0]), expected)


@given(ARRAYS, grids())
def test_quantizing_twice_changes_nothing(x: np.ndarray, grid: TensorQuant) -> None:
    codes = quantize(x, grid)
    assert np.array_equal(quantize(dequantize(codes, grid), grid), codes)


@given(ARRAYS, grids())
def test_quantizing_is_monotone_and_keeps_zero(x: np.ndarray, grid: TensorQuant) -> None:
    codes = quantize(np.sort(x), grid)
    assert (np.diff(codes) >= 0).all()
    assert codes.min() >= grid.spec.qmin
    assert codes.max() <= grid.spec.qmax
    assert dequantize(quantize(np.zeros(1, np.float32), grid), grid)[0] == 0.0


@given(ARRAYS, grids(), st.floats(-100, 100, width=32), st.floats(-100, 100, width=32))
def test_a_clip_on_floats_is_a_clip_on_codes(x: np.ndarray, grid: TensorQuant, a: float, b: float) -> None:
    """What the exporter relies on when it folds Relu and Clip into the integer bounds."""
    low, high = min(a, b), max(a, b)
    bounds = quantize(np.array([low, high], np.float32), grid)
    assert np.array_equal(quantize(np.clip(x, np.float32(low), np.float32(high)), grid), np.clip(quantize(x, grid), *bounds))


def test_ranges_of_specs() -> None:
    assert [(weight_spec(b, 0, True).qmin, weight_spec(b, 0, True).qmax) for b in (2, 4, 8)] == [(-2, 1), (-8, 7), (-127, 127)]
    assert (activation_spec(4, False).qmin, activation_spec(4, False).qmax) == (0, 15)
    assert (activation_spec(4, True).qmin, activation_spec(4, True).qmax) == (-8, 7)


def test_per_channel_grids_broadcast_along_their_axis() -> None:
    spec = QuantSpec(8, signed=True, symmetric=True, axis=1)
    grid = TensorQuant(spec, np.array([1.0, 0.5], np.float32), np.zeros(2, np.int32))
    assert np.array_equal(quantize(np.full((3, 2), 2.0, np.float32), grid), [[2, 4]] * 3)


@given(st.floats(0, 1, exclude_max=True, width=32))
def test_soft_rounding_starts_at_the_fraction(fraction: float) -> None:
    logits = rounding_logits(torch.tensor([fraction], dtype=torch.float64))
    assert soft_round(logits).item() == pytest.approx(fraction, abs=1e-6)  # float32 literals of the stretch


def reference(x: torch.Tensor, step: torch.Tensor, limits: Limits, keep: torch.Tensor) -> torch.Tensor:
    """LSQ behind a Clip, written with autograd and detach: round is straight through, clamp is differentiated."""
    low, high, least, most = limits
    x = torch.nn.functional.hardtanh(x, least, most) if limits.are_bounded else x
    scaled = x / step
    clamped = scaled.clamp(low, high)
    quantized = (clamped.round() - clamped).detach() + clamped
    return torch.where(keep > 0, quantized * step, x)


class Given(Coins):
    """Coins that fall as a tensor says, in the order of memory."""

    def __init__(self, keep: torch.Tensor) -> None:
        self._rest = flat(keep)

    def over(self, x: torch.Tensor) -> Coins:
        return self

    def fallen(self, size: int) -> torch.Tensor:
        own, self._rest = self._rest[:size], self._rest[size:]
        return own.to(torch.uint8)


@pytest.fixture
def compiler() -> None:
    refused = compiled.refusal(torch.device("cpu"))
    if refused is not None:
        pytest.skip(f"torch cannot compile here: {refused}")


LIMITS = [Limits(0, 15), Limits(-8, 7), Limits(-3, 12), Limits(0, 15, 0.0), Limits(-8, 7, -1.0, 6.0), Limits(-3, 12, -1.5, 1.5)]


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.usefixtures("compiler")
def test_a_compiled_quantizer_is_the_same_bit_for_bit(limits: Limits, dropped: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 3, 5, 5, generator=generator) * 3).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0] = torch.tensor([0.0, -0.0, limits.high * 0.3, limits.low * 0.3, limits.least if limits.are_bounded else 0.0])
    results = []
    for is_compiled in (False, True):
        leaf, size = x.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        coins = Given((torch.rand(x.numel(), generator=generator.manual_seed(1)) < 0.5).float()) if dropped else None
        out: Any = LearnedStep.apply(leaf, size, limits, coins, is_compiled)
        out.backward(torch.randn(x.shape, generator=generator.manual_seed(2)))
        results.append((out.detach(), leaf.grad, size.grad))
    (out_a, x_a, s_a), (out_b, x_b, s_b) = results
    assert torch.equal(out_a, out_b)
    assert torch.equal(x_a, x_b)
    torch.testing.assert_close(s_b, s_a, atol=1e-4, rtol=1e-5)  # a sum of 300 float32 terms in another order


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("types", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")], ids="-".join)
@pytest.mark.usefixtures("compiler")
def test_a_quantizer_reads_and_writes_bfloat16(types: tuple[str, str], dropped: bool, is_compiled: bool) -> None:
    """Between reading and writing it is float32: the result is that of the same numbers, rounded once, and so are the gradients."""
    limits, (read, written) = Limits(-3, 12, -1.5, 3.9), (getattr(torch, name) for name in types)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 3, 5, 5, generator=generator) * 3).contiguous(memory_format=torch.channels_last).to(read)
    keep = (torch.rand(x.numel(), generator=generator) < 0.5).float()
    grad = torch.randn(x.shape, generator=generator).bfloat16()
    results = []
    for dtype_in, dtype_out in ((torch.float32, torch.float32), (read, written)):
        leaf, size = x.to(dtype_in, copy=True).requires_grad_(), torch.tensor(0.3, requires_grad=True)
        out: Any = LearnedStep.apply(leaf, size, limits, Given(keep) if dropped else None, is_compiled, dtype_out)
        assert out.dtype == dtype_out
        out.backward(grad.to(dtype_out))
        results.append((out.detach(), leaf.grad, size.grad))
    (out_a, x_a, s_a), (out_b, x_b, s_b) = results
    assert torch.equal(out_b, out_a.to(written))
    assert torch.equal(x_b, x_a.to(read))
    torch.testing.assert_close(s_b, s_a, atol=1e-4, rtol=1e-5)  # a sum of 300 float32 terms in another order


@pytest.mark.parametrize("tile", [1 << 20, 64])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_learned_step_has_the_gradients_of_lsq(dropped: bool, limits: Limits, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_quant, "_TILE", tile)  # 300 elements: one tile, or five with a short one
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 3, 5, 5, generator=generator) * 3).contiguous(memory_format=torch.channels_last)
    step = torch.tensor(0.3)
    keep = (torch.rand(x.shape, generator=generator) < 0.5).float() if dropped else torch.ones_like(x)
    keep = keep.contiguous(memory_format=torch.channels_last)
    grad = torch.randn(x.shape, generator=generator)
    results = []
    coins = Given(keep) if dropped else None
    for is_reference in (True, False):
        leaf, size = x.clone().requires_grad_(), step.clone().requires_grad_()
        out: Any = reference(leaf, size, limits, keep) if is_reference else LearnedStep.apply(leaf, size, limits, coins, False)
        assert out.stride() == x.stride()
        out.backward(grad)
        results.append((out.detach(), leaf.grad, size.grad))
    (out_a, x_a, s_a), (out_b, x_b, s_b) = results
    torch.testing.assert_close(out_b, out_a, atol=1e-6, rtol=0)
    torch.testing.assert_close(x_b, x_a, atol=1e-6, rtol=0)
    torch.testing.assert_close(s_b, s_a, atol=1e-4, rtol=0)  # a sum of 300 float32 terms


@given(st.floats(2**-10, 2**10, width=32), st.sampled_from([(0, 15), (-8, 7), (0, 255), (-32768, 32767)]), st.integers(-3, 3))
def test_the_gradient_passes_exactly_where_the_code_is_in_range(size: float, ends: tuple[int, int], ulps: int) -> None:
    """Around both ends: x / step as float32 rounds it decides."""
    x = np.array([end * np.float32(size) for end in ends], np.float32)
    for _ in range(abs(ulps)):
        x = np.nextafter(x, np.float32(np.sign(ulps) * np.inf))
    x[np.array(ends) == 0] = ulps * np.float32(size) * 1e-9
    origin = torch.from_numpy(x).requires_grad_()
    step = torch.tensor(size)
    LearnedStep.apply(origin, step, Limits(*ends), None, False).sum().backward()  # pyright: ignore[reportAttributeAccessIssue]
    scaled = origin.detach() / step
    assert origin.grad is not None
    assert torch.equal(origin.grad, ((scaled >= ends[0]) & (scaled <= ends[1])).float())


@pytest.mark.parametrize("shape", [(64, 3, 5, 5), (50, 7)])
def test_coins_are_fair(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    coins, total = Coins(0.25, generator), torch.zeros(shape)
    for _ in range(200):
        tossed = coins.toss(torch.empty(shape))
        assert set(tossed.unique().tolist()) <= {0.0, 1.0}
        total += tossed
    assert total.mean().item() / 200 == pytest.approx(0.25, abs=0.01)  # 70,000 coins: four standard errors are 0.0066
    assert ((total / 200 - 0.25).abs() < 0.2).all()  # every position flips: six standard errors of 200 coins
    assert (Coins(1.0, generator).toss(torch.empty(shape)) == 1).all()
