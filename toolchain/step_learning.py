"""The learned step sizes of a unit: of its activations (LSQ), and of its weights beside their rounding (GENIE-M)."""

import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .compiled import Limits
from .fake_quant import Coins, LearnedStep
from .quant_table import QuantTable, TensorQuant
from .torch_import import Narrowed, TorchBlock

_HEAD, _TAIL = 12, 12  # bits of a learned step: what was learned of it, and what follows; together those of a float32
_HASH = 2654435761  # Knuth's multiplier: 2^32 over the golden ratio


class LearnedSteps:
    """The steps of values that have a grid of their own, each a learned factor of the calibrated one.

    So the learning rate means the same for every activation and bit width. Fixed grids stay.
    """

    def __init__(
        self, values: Iterable[str], table: QuantTable, device: torch.device, learns: bool, scores: AbstractSet[str] = frozenset()
    ) -> None:
        """`scores`: those of the values that masks take far below their grids, to the lowest float: gradients would overflow there."""
        self._grids = {name: table[name] for name in values if name in table and table[name].tied_to is None}
        self._scores = scores & self._grids.keys()
        self._calibrated = {name: torch.tensor(float(grid.scale), device=device) for name, grid in self._grids.items()}
        self._factors = {name: torch.ones((), device=device, requires_grad=learns and not grid.fixed) for name, grid in self._grids.items()}

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What an optimiser moves."""
        return [factor for factor in self._factors.values() if factor.requires_grad]

    def running(
        self, piece: TorchBlock, coins: Coins | None, is_compiled: bool, is_narrow: bool = False
    ) -> Callable[[Mapping[str, Any]], dict[str, torch.Tensor]]:
        """A piece that fake-quantizes values under the present steps, its Relu and Clip before these with them.

        Args:
            piece: what makes the values.
            coins: where elements are quantized, None for everywhere.
            is_compiled: whether quantizers are compiled loops.
            is_narrow: whether products are computed in bfloat16.
        """
        bounds = {name: _reach(self._grids[name]) for name in self._scores}
        bounds |= {name: ends for name, ends in piece.bounds.items() if name in self._factors}
        limits = {name: Limits(*_codes_of(grid), *bounds.get(name, ())) for name, grid in self._grids.items()}

        narrowed = piece.narrowed(self._factors.keys(), bounds.keys()) if is_narrow else Narrowed()

        def quantize(name: str, x: torch.Tensor) -> torch.Tensor:
            if name not in self._factors:
                return x
            step = self._calibrated[name] * self._factors[name]
            dtype = torch.bfloat16 if name in narrowed.written else torch.float32
            return LearnedStep.apply(x, step, limits[name], coins, is_compiled, dtype)  # pyright: ignore[reportReturnType]

        return lambda values: piece(values, quantize, bounds.keys(), narrowed)

    @torch.no_grad()
    def keep_above(self, least: float) -> None:
        """Hold the factors at or above a bound."""
        for factor in self.parameters:
            factor.clamp_(min=least)

    def grids(self) -> dict[str, TensorQuant]:
        """The grids with the steps that were learned, by name."""
        return {
            name: replace(self._grids[name], scale=settled((self._calibrated[name] * factor).item()))
            for name, factor in self._factors.items()
            if factor.requires_grad
        }


def _reach(grid: TensorQuant) -> tuple[float, float]:
    """From where values are told from those on a grid, for all that is learned of it: a width of it below, on."""
    low, high = _codes_of(grid)
    return (2 * low - high) * float(grid.scale), math.inf


def _codes_of(grid: TensorQuant) -> tuple[int, int]:
    """The first and the last code of a grid per tensor, less its zero point."""
    return grid.spec.qmin - int(grid.zero_point), grid.spec.qmax - int(grid.zero_point)


class LearnedWeightSteps:
    """The steps of weights, each channel's a learned factor of the calibrated one (GENIE-M, Jeon et al., CVPR 2023, section 3.2).

    Floors stay the codes that they are: only the step that codes are multiplied with moves. Weights in blocks keep their steps.
    """

    def __init__(self, weights: Mapping[str, tuple[int, ...]], table: QuantTable, device: torch.device) -> None:
        """`weights`: shapes of the weights by name."""
        self.factors = {
            name: torch.ones(_along(table[name], shape), device=device).requires_grad_()
            for name, shape in weights.items()
            if table[name].spec.block is None
        }

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What an optimiser moves."""
        return list(self.factors.values())

    @torch.no_grad()
    def scale(self, weights: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> None:
        """Write weights on the calibrated steps as they are on the learned ones."""
        for name, weight in weights.items():
            if name in self.factors:
                torch.mul(weight, self.factors[name], out=into[name])
            else:
                into[name].copy_(weight)

    @torch.no_grad()
    def set_gradients(self, weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]) -> None:
        """The factors' gradients, from those of the scaled weights; these become those of the weights on the calibrated steps."""
        for name, factor in self.factors.items():
            gradient = gradients[name]
            factor.grad = (gradient * weights[name]).sum_to_size(factor.shape)
            gradient.mul_(factor)

    @torch.no_grad()
    def keep_above(self, least: float) -> None:
        """Hold the factors at or above a bound."""
        for factor in self.factors.values():
            factor.clamp_(min=least)

    def applied(self, codes: Mapping[str, TensorQuant]) -> dict[str, TensorQuant]:
        """Grids of learned codes with the steps that were learned. A channel that nothing moved, such as one of zeros, keeps its step."""
        return dict(codes) | {name: replace(codes[name], scale=self._learned(name, codes[name])) for name in self.factors}

    def _learned(self, name: str, grid: TensorQuant) -> np.ndarray | np.float32:
        steps, factors = np.atleast_1d(grid.scale), self.factors[name].detach().cpu().numpy().reshape(-1)
        learned = [step if factor == 1.0 else settled(float(step * factor)) for step, factor in zip(steps, factors, strict=True)]
        return np.array(learned, np.float32).reshape(np.shape(grid.scale)) if np.ndim(grid.scale) else np.float32(learned[0])


def _along(grid: TensorQuant, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a factor for each channel, to broadcast against a weight."""
    return tuple(size if axis == grid.spec.axis and np.ndim(grid.scale) else 1 for axis, size in enumerate(shape))


def settled(step: float) -> np.float32:
    """A learned step off the places where many elements sit on a rounding tie, which a runtime that adds in another order breaks otherwise.

    Gradients straight through rounding draw a step to such places: a ratio s_x * s_w / s_y of 1/18 puts every 18th sum of integers on a
    tie. So the step is rounded to 12 significant bits. Short steps have ties of their own: the sum of two codes times such steps is half a
    third step exactly, once in some thousand sums. So 12 more bits follow from the first in a way that looks random. Both together move
    the end of an 8-bit range by less than an eighth of a code.
    """
    mantissa, exponent = math.frexp(step)
    head = round(mantissa * (1 << _HEAD))
    if head == 1 << _HEAD:
        head, exponent = head // 2, exponent + 1
    tail = (head * _HASH % (1 << 32) >> (32 - _TAIL) | 1) - (1 << (_TAIL - 1))  # odd, around 0
    return np.float32(math.ldexp((head << _TAIL) + tail, exponent - _HEAD - _TAIL))


def anneal(optimizer: torch.optim.Optimizer, iteration: int, iterations: int) -> None:
    """Set the rate of each group to its `first` one on a cosine that ends at 0; one that is a tensor where it is."""
    for group in optimizer.param_groups:
        rate = group["first"] * 0.5 * (1 + math.cos(math.pi * iteration / iterations))
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
