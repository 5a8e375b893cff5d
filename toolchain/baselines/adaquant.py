"""AdaQuant: weights, step sizes and bias of a layer are learned together, with rounding passed straight through.

Hubara, Nahshan, Hanani, Banner, Soudry, "Accurate post training quantization with small calibration sets" (ICML 2021; "Improving post
training neural quantization: layer-wise calibration and integer programming", 2020).

Implemented: for one layer after the other (sequential AdaQuant: inputs come from the layers that are quantized already),

    minimise over V, dw, dx, b:   || W x + b_0 - (Q_dw(W + V) Q_dx(x) + b) ||^2       (Eq. 2)

by Adam. A weight may move by any number of steps, unlike with AdaRound. Weight steps are one for each channel, as they are calibrated.

What differs: the rates are in shares of what they move (a step of the weight's grid, a step, the spread of the output), so that they mean
the same at every layer and bit width; the authors' are absolute, for 8 bits. They fall to zero by a cosine. Zero points stay. An activation
that several layers read has one grid, learned with the first of them.

Not implemented: the integer program that gives layers different bits, and the tuning of BatchNorm's statistics (there is none left); biases
are learned instead.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from ..activations import Value, unpacked
from ..losses import loss_of
from ..quant_table import QuantTable, quantize
from ..step_learning import LearnedSteps, anneal
from ..unit import NOT_FINITE, CurvePoint, Learned, Unit, UnitResult, are_finite, is_curve_point, learned_unit
from .layer import Layer

_SMALLEST_FACTOR = 0.25  # of a calibrated step: the int32 codes of biases have room for no more


class _Round(torch.autograd.Function):
    """Rounding whose gradient is that of the identity (straight through)."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, *grad_outputs: torch.Tensor) -> torch.Tensor:
        return grad_outputs[0]


def adaquant_unit(unit: Unit) -> tuple[UnitResult, dict[str, Value]]:
    """Learn a layer."""
    layer = Layer.of(unit)
    return learned_unit(layer.unit, lambda start: _learn(layer, start))


def _learn(layer: Layer, table: QuantTable) -> Learned:
    unit, draw = layer.unit, layer.unit.draw()
    settings, device = unit.settings, unit.device
    grid, float_weight = table[layer.weight], layer.floats[layer.weight]
    scale, zero_point = (torch.tensor(np.array(p)).to(device) for p in grid.expanded(float_weight.shape))
    low, high = grid.spec.qmin - zero_point, grid.spec.qmax - zero_point
    constants = layer.constants()
    scaled = constants[layer.weight] / scale
    moved = torch.zeros_like(scaled, requires_grad=True)  # V in steps of the calibrated grid
    stretch = torch.ones_like(scale, requires_grad=True)  # of the weight's steps
    shift = torch.zeros((), device=device)  # of the bias, in spreads of the output
    spread = torch.ones((), device=device)
    if layer.bias is not None and layer.bias in table:
        target = unpacked(layer.target)
        sample = target if isinstance(target, torch.Tensor) else torch.cat([part.reshape(-1) for part in target])
        spread = sample.std().clamp_min(1e-12)
        shift = torch.zeros_like(constants[layer.bias], requires_grad=True)
    made = (value for node in unit.piece.block.nodes for value in node.outputs if value != layer.output)
    steps = LearnedSteps(made, table, device, settings.activation_lr > 0, unit.scores)
    moving = [*steps.parameters, *([shift] if shift.requires_grad else [])]
    groups = [
        {"params": [moved], "lr": settings.weight_lr, "first": settings.weight_lr},
        {"params": [stretch, *moving], "lr": settings.activation_lr, "first": settings.activation_lr},
    ]
    optimizer = torch.optim.Adam(groups, fused=True)

    run = steps.running(unit.piece, None, unit.is_compiled, unit.is_narrow)
    curve: list[CurvePoint] = []
    for iteration in range(settings.iterations):
        anneal(optimizer, iteration, settings.iterations)
        loss, batches = torch.zeros((), device=device), draw.selections()
        for selection in batches:
            fed, targets = draw.batch(selection, None)
            rounded = _Round.apply((scaled + moved) / stretch)
            own = {layer.weight: torch.minimum(torch.maximum(rounded, low), high) * (scale * stretch)}  # pyright: ignore[reportArgumentType]
            if layer.bias is not None:
                own[layer.bias] = constants[layer.bias] + shift * spread
            part = loss_of(run(fed | constants | own), targets, draw.shares) / draw.parts(selection, batches)
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.keep_above(_SMALLEST_FACTOR)
        with torch.no_grad():
            stretch.clamp_(min=_SMALLEST_FACTOR)
        if is_curve_point(iteration, settings.iterations):
            value = loss.item()
            curve.append(CurvePoint(iteration, value, math.nan, math.nan, math.nan))
            unit.progress(iteration + 1, settings.iterations, value)
    if not are_finite([moved, stretch, *moving]):
        return Learned(table, tuple(curve), None, NOT_FINITE)
    changes = steps.grids()
    with torch.no_grad():
        wide = (scale * stretch).cpu().numpy().reshape(np.shape(grid.scale)).astype(np.float32)[()]
        learned = replace(grid, scale=wide)
        weight = ((scaled + moved) * scale).cpu().numpy()
        changes[layer.weight] = replace(learned, codes=quantize(weight, learned))
        biases: dict[str, np.ndarray] = {}
        if layer.bias is not None and layer.bias in table:
            biases[layer.bias] = (constants[layer.bias] + shift * spread).cpu().numpy()
    return Learned(unit.finish(table.updated(changes), biases), tuple(curve), None)
