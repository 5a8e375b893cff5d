"""Quantizers as tensor functions: the exact simulation of QuantizeLinear / DequantizeLinear, and the two that learn."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from . import compiled
from .compiled import Limits
from .processes import ALONE, Processes
from .quant_table import FLOAT8_MAX, FLOAT8_UNIT, QuantSpec, TensorQuant

# Elements for each thread: operations go parallel in shares of 32768, and with four times that, calling one is cheap beside doing it.
_TILE = 131072
ZETA, GAMMA = 1.1, -0.1  # stretch of the rectified sigmoid (AdaRound, Eq. 23)


def fake_quantize(x: torch.Tensor, grid: TensorQuant) -> torch.Tensor:
    """x~ = (clip(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale, per tensor, bit for bit what ONNX defines."""
    # On the device: CUDA divides by a host scalar as a product with its reciprocal, which rounds ties differently.
    scale, zero_point = torch.full((), float(grid.scale), device=x.device), int(grid.zero_point)
    if grid.spec.float8:
        return _float8(x.div(scale * FLOAT8_UNIT)).mul_(scale * FLOAT8_UNIT)
    # Clipping before the zero point is added gives the same integers with one pass less.
    return x.div(scale).round_().clamp_(grid.spec.qmin - zero_point, grid.spec.qmax - zero_point).mul_(scale)


def nearest_codes(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Codes of rounding to nearest, as floats; `scale` and `zero_point` broadcast against x."""
    if spec.float8:
        return _float8(x / (scale * FLOAT8_UNIT)).mul_(FLOAT8_UNIT)
    return torch.clamp(torch.round(x / scale) + zero_point, spec.qmin, spec.qmax)


def _float8(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of E4M3; what is beyond its range becomes its end (the cast alone would make it NaN)."""
    return x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).float()


class LearnedStep(torch.autograd.Function):
    """Fake quantization with a learnable step size (LSQ) and a fixed zero point, dropped element-wise (QDrop, Eq. 6).

    Gradients: straight through for x inside the range, zero outside; for the step s, round(x/s) - x/s inside and the saturated code minus
    the zero point outside. Where an element is dropped (its quantization left out), x passes unchanged. A Relu or Clip before the quantizer
    is part of it: dropped or not, x is held between its bounds, and has no gradient beyond them.
    """

    # Between inside and outside, kept and dropped, nothing is selected: on CPUs `where` and boolean masks are not vectorised and cost ten
    # times a multiplication. What remains is bound by memory; a tile at a time, only the first read and the last write leave the cache.
    # torch's compiler makes one loop of all of it, where it can be had (compiled.py).

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        step: torch.Tensor,
        limits: Limits,
        coins: "Coins | None",
        is_compiled: bool,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """`coins`: heads where x is quantized, None for everywhere. x: any dense layout, float32 or bfloat16. `dtype`: of the result."""
        x = dense(x)
        coins = coins.over(x) if coins is not None else None
        fallen = coins.fallen(x.numel()) if coins is not None and is_compiled else None
        if is_compiled:
            out = like(x, compiled.quantized(flat(x), step, limits, fallen, dtype))
        else:
            out = _quantized(x.float(), step, limits, coins)
        is_rounded = is_compiled and not x.dtype == dtype == torch.float32
        ctx.save_for_backward(x, None if is_rounded else out, step, fallen if is_rounded else None)
        ctx.limits, ctx.is_dropped, ctx.is_compiled = limits, coins is not None, is_compiled
        return out.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, out, step, fallen = ctx.saved_tensors
        grad = grad_outputs[0]
        if grad.stride() != x.stride():
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        learns_step = ctx.needs_input_grad[1]
        if ctx.is_compiled:
            grad_x, grad_step = compiled.gradients(flat(x), None if out is None else flat(out), step, flat(grad), ctx.limits, fallen)
            return like(x, grad_x), grad_step if learns_step else None, None, None, None, None
        grad_x, grad_step = _gradients(x.float(), out, step, grad.float(), ctx.limits, ctx.is_dropped, learns_step)
        return grad_x.to(x.dtype), grad_step, None, None, None, None


def _quantized(x: torch.Tensor, step: torch.Tensor, limits: Limits, coins: "Coins | None") -> torch.Tensor:
    out = torch.empty_like(x)
    tiles = Tiles(x)
    keep, held = tiles.buffer(), tiles.buffer()
    for origin, made in tiles.of(x, out):
        bounded = _bounded(origin, limits, held)
        torch.div(bounded, step, out=made).clamp_(limits.low, limits.high).round_().mul_(step)
        if coins is not None:
            torch.lerp(bounded, made, coins.toss(keep[: len(made)]), out=made)
    return out


def _gradients(
    x: torch.Tensor, out: torch.Tensor, step: torch.Tensor, grad: torch.Tensor, limits: Limits, is_dropped: bool, learns_step: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    below, above = (float(np.nextafter(np.float32(end), side)) for end, side in zip(limits[:2], (-np.inf, np.inf), strict=True))
    grad_x, total = torch.empty_like(x), torch.zeros((), device=x.device)
    tiles = Tiles(x)
    scaled, moved, held = tiles.buffer(), tiles.buffer(), tiles.buffer()
    for origin, made, given, passed in tiles.of(x, out, grad, grad_x):
        bounded = _bounded(origin, limits, held)
        error = torch.sub(made, bounded, out=moved[: len(made)])  # 0 where dropped, s * (round(x/s) - x/s) where kept inside
        if learns_step:
            total += torch.dot(error, given)
        codes = torch.div(bounded, step, out=scaled[: len(made)])
        _between(given, codes, below, above, passed)
        if is_dropped:
            torch.lerp(passed, given, error.eq_(0.0), out=passed)  # but not where dropped
        if learns_step:
            blocked = torch.sub(given, passed, out=error)
            total += torch.dot(blocked, bounded)  # with the error: s * code where kept outside
        if limits.are_bounded:
            _between(passed, origin, limits.least, limits.most, passed)
    return grad_x, total / step if learns_step else None


def _bounded(x: torch.Tensor, limits: Limits, into: torch.Tensor) -> torch.Tensor:
    return torch.clamp(x, limits.least, limits.most, out=into[: len(x)]) if limits.are_bounded else x


def _between(grad: torch.Tensor, x: torch.Tensor, low: float, high: float, into: torch.Tensor) -> None:
    """The gradient where low < x < high, zero elsewhere."""
    torch.ops.aten.hardtanh_backward.grad_input(grad, x, low, high, grad_input=into)


class Coins:
    """Random choices, heads with a given probability (to 1/256), from a generator.

    Each bit of a random word is a coin: heads with probability 0.d1 d2 ... (binary) takes a word for each digit, joined from the last one
    on by `or` where the digit is 1 and by `and` where it is 0; a fair coin takes a single bit. An order of magnitude cheaper on CPUs than a
    draw for each element. Processes that share a mini-batch toss for all of it, and each keeps the coins of its own samples.
    """

    def __init__(self, probability: float, generator: torch.Generator, processes: Processes = ALONE) -> None:
        threshold = round(probability * 256)
        digits = [bool(threshold >> place & 1) for place in range(8)]
        self._digits = digits[digits.index(True) :] if any(digits) else []
        self._start = -(threshold >> 8)  # all heads or, as a rule, all tails
        self._generator = generator
        self._processes = processes
        self._shifts = torch.arange(8, device=generator.device)

    def over(self, x: torch.Tensor) -> "Coins":
        """The coins to be tossed for the tiles of a dense tensor, samples outermost in memory."""
        if self._processes.count == 1:
            return self
        size = x.numel() * self._processes.count
        return _Tossed(self.fallen(size)[self._processes.share(size)])

    def toss(self, into: torch.Tensor) -> torch.Tensor:
        """Fill a dense float tensor with 1 for heads and 0 for tails, independently for each element; return it."""
        flat(into).copy_(self.fallen(into.numel()))
        return into

    def fallen(self, size: int) -> torch.Tensor:
        """Coins as bytes, 1 for heads, 0 for tails. Those of stretches of 64 each are those of the whole."""
        words = torch.empty(((size + 63) // 64, max(len(self._digits), 1)), dtype=torch.int64, device=self._generator.device)
        words.random_(-(2**63), None, generator=self._generator)
        heads = torch.full_like(words[:, 0], self._start)
        for place, digit in enumerate(self._digits):
            heads = heads.bitwise_or_(words[:, place]) if digit else heads.bitwise_and_(words[:, place])
        spread = torch.bitwise_right_shift(heads[:, None], self._shifts).bitwise_and_(0x0101010101010101)
        return spread.view(torch.uint8).view(-1)[:size]


class _Tossed(Coins):
    """Coins that have fallen, handed out in order."""

    def __init__(self, fallen: torch.Tensor) -> None:
        self._rest = fallen

    def fallen(self, size: int) -> torch.Tensor:
        own, self._rest = self._rest[:size], self._rest[size:]
        return own


class Tiles:
    """Stretches of dense tensors, in the order of memory: on CPUs as long as a few of them fit the cache, else the whole."""

    def __init__(self, like: torch.Tensor) -> None:
        self._device = like.device
        self._size = min(like.numel(), _TILE * torch.get_num_threads()) if like.device.type == "cpu" else like.numel()

    def of(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """The tensors, all of one shape and layout, a tile of each at a time."""
        return zip(*(flat(tensor).split(max(self._size, 1)) for tensor in tensors), strict=True)

    def buffer(self) -> torch.Tensor:
        return torch.empty(self._size, device=self._device)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements in the order of memory, as a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def like(tensor: torch.Tensor, elements: torch.Tensor) -> torch.Tensor:
    """Elements in the order of memory as a tensor of another dense one's shape and layout."""
    return elements.as_strided(tensor.shape, tensor.stride())


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its elements fill a stretch of memory, else a copy."""
    filled = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return tensor if filled else tensor.contiguous()


def soft_round(logits: torch.Tensor) -> torch.Tensor:
    """h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1): the learned rounding, 0 down to 1 up (AdaRound, Eq. 23)."""
    return torch.sigmoid(logits).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0.0, 1.0)


def rounding_logits(fraction: torch.Tensor) -> torch.Tensor:
    """The V with h(V) = fraction, for fractions in [0, 1)."""
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)
