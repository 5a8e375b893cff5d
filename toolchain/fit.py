"""How well each value sits on its grid: the noise of the grid alone, what it clips, and histograms of the values that it fits worst."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .activations import TorchModel, observed
from .fake_quant import fake_quantize
from .noise import sqnr
from .quant_table import BIAS_BITS, QuantTable, TensorQuant
from .samples import Samples
from .source import SourceModel

_BINS = 96


@dataclass(frozen=True)
class GridFit:
    """One value on its grid, everything before it in float.

    `sqnr` is signal to rounding noise in dB (infinite for a value that the grid holds exactly) and `clipped` the share of elements beyond
    the grid's ends. `counts` is a histogram of the values between `low` and `high`; `grid` has the grid's ends and its step. Activations
    are in their own units, weights in steps of their channel's grid, so that one picture holds all channels.
    """

    name: str
    kind: str
    bits: int
    sqnr: float
    clipped: float
    low: float
    high: float
    counts: tuple[int, ...]
    grid: tuple[float, float, float]


def weight_fits(source: SourceModel, table: QuantTable) -> tuple[GridFit, ...]:
    """All weights of a table, with the rounding that it has."""
    fits = []
    for name, grid in table.tensors.items():
        if grid.codes is None or grid.spec.bits == BIAS_BITS:
            continue
        weight = source.constants[name]
        scale, zero_point = grid.expanded(weight.shape)
        steps = weight / scale + zero_point
        ends = (grid.spec.qmin, grid.spec.qmax)
        fits.append(_fit(name, "weight", grid.spec.bits, sqnr(weight, grid.dequantized()), torch.from_numpy(np.asarray(steps)), ends, 1.0))
    return tuple(fits)


@torch.no_grad()
def activation_fits(model: TorchModel, table: QuantTable, samples: Samples) -> tuple[GridFit, ...]:
    """All activations of a table in the float model, over samples; of what is finite there, and none of values that are so nowhere."""
    fits: dict[str, GridFit] = {}

    def observe(name: str, tensor: torch.Tensor) -> torch.Tensor:
        grid = table.tensors.get(name)
        if grid is not None and grid.codes is None and grid.tied_to is None and name not in fits:
            finite = tensor[torch.isfinite(tensor)]
            if finite.numel():
                fits[name] = _activation_fit(name, grid, finite)
        return tensor

    stream = model.stream(samples.inputs)
    for name, tensor in stream.of(model.source.graph.inputs).items():
        observed(name, tensor, observe)
    for piece in model.pieces:
        stream.advance(model.run(piece, stream, observe=observe))
    return tuple(fits.values())


def worst(fits: Iterable[GridFit], count: int) -> tuple[GridFit, ...]:
    """Those with the least signal to noise, worst first."""
    return tuple(sorted(fits, key=lambda fit: (fit.sqnr, fit.name))[:count])


def rows(fits: Iterable[GridFit]) -> Mapping[str, dict[str, float]]:
    """Noise and clipping by value name."""
    return {fit.name: {"sqnr": fit.sqnr, "clipped": fit.clipped} for fit in fits}


def _activation_fit(name: str, grid: TensorQuant, tensor: torch.Tensor) -> GridFit:
    noise = (fake_quantize(tensor, grid) - tensor).double().square_().sum().item()
    signal = tensor.double().square().sum().item()
    ratio = 10 * np.log10(max(signal, 1e-300) / noise) if noise > 0 else float("inf")
    scale, zero_point = float(grid.scale), int(grid.zero_point)
    ends = ((grid.spec.qmin - zero_point) * scale, (grid.spec.qmax - zero_point) * scale)
    return _fit(name, "activation", grid.spec.bits, float(ratio), tensor, ends, scale)


def _fit(name: str, kind: str, bits: int, ratio: float, values: torch.Tensor, ends: tuple[float, float], step: float) -> GridFit:
    """Elements within half a step of the ends round to them; only what is beyond counts as clipped."""
    values = values.reshape(-1).float()
    low, high = (float(v) for v in torch.aminmax(values))
    if low == high:
        low, high = low - step, high + step
    counts = torch.histc(values, _BINS, low, high).long().cpu().tolist()
    clipped = float(((values < ends[0] - step / 2) | (values > ends[1] + step / 2)).float().mean())
    return GridFit(name, kind, bits, ratio, clipped, low, high, tuple(counts), (ends[0], ends[1], step))
