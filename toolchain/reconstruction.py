"""The optimisation of one unit against its float output: rounding (AdaRound), steps (LSQ, GENIE-M) and biases (BRECQ, QDrop)."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from .activations import Value, constants_of
from .bias_learning import LearnedBiases
from .fake_quant import GAMMA, ZETA, Coins, rounding_logits, soft_round
from .losses import loss_of
from .quant_table import QuantTable, TensorQuant
from .settings import Settings
from .step_learning import LearnedSteps, LearnedWeightSteps, anneal
from .unit import NOT_FINITE, CurvePoint, Learned, Unit, UnitResult, are_finite, is_curve_point, learned_unit

_SMALLEST_FACTOR = 0.01  # of the calibrated step: Adam must not carry a step through zero
_DECIDED = 0.95  # |2h - 1| above which a rounding counts as decided before it is made hard


def reconstruct_unit(unit: Unit) -> tuple[UnitResult, dict[str, Value]]:
    """Learn the rounding of a unit's weights, its biases and the steps of the activations it makes."""
    unit = unit.aiming_at(unit.piece.block.learned_outputs)
    return learned_unit(unit, lambda before: _learn(unit, before))


def _learn(unit: Unit, before: QuantTable) -> Learned:
    piece, table, settings, device = unit.piece, unit.table, unit.settings, unit.device
    draw, given = unit.draw(), unit.given
    weights = {name: given[name] for name in unit.weights}
    scales = LearnedWeightSteps({name: w.shape for name, w in weights.items()} if settings.weight_step_lr > 0 else {}, table, device)
    rounding = _Rounding(weights, table, device, scales if scales.factors else None)
    constants = constants_of(piece.weights, given, None, device)
    biases = LearnedBiases(unit.biases if settings.bias_lr > 0 else {}, unit.floats, table, device)
    made = [value for node in piece.block.nodes for value in node.outputs]
    steps = LearnedSteps(made, table, device, settings.activation_lr > 0, unit.scores)
    weight_optimizer = torch.optim.Adam([rounding.logits], lr=settings.weight_lr, fused=True)
    moving = (
        (steps.parameters, settings.activation_lr),
        (scales.parameters, settings.weight_step_lr),
        (biases.parameters, settings.bias_lr),
    )
    groups = [{"params": parameters, "lr": rate, "first": rate} for parameters, rate in moving if parameters]
    annealed = torch.optim.Adam(groups, fused=True) if groups else None
    coins = Coins(settings.keep_probability, draw.generator, draw.processes) if settings.keep_probability < 1.0 else None
    run = steps.running(piece, coins, unit.is_compiled)
    curve: list[CurvePoint] = []
    for iteration in range(settings.iterations):
        soft, moved, batches = rounding.soft_weights(), biases.tensors(), draw.selections()
        loss = torch.zeros((), device=device)
        for selection in batches:
            fed, targets = draw.batch(selection, coins)
            part = loss_of(run(fed | constants | soft | moved), targets, draw.shares) / draw.parts(selection, batches)
            if part.requires_grad:
                part.backward(retain_graph=selection is not batches[-1])  # the batches share the biases
            loss += part.detach()
        moving_too = [parameter.grad for parameter in (*steps.parameters, *biases.parameters) if parameter.grad is not None]
        draw.processes.sum([loss, rounding.gradient, *moving_too])
        beta = _beta(iteration, settings)
        is_point = is_curve_point(iteration, settings.iterations)
        state = torch.stack([loss, *rounding.state(settings.round_weight, beta)]) if is_point else None
        rounding.set_gradient(settings.round_weight, beta)
        weight_optimizer.step()
        if annealed is not None:
            anneal(annealed, iteration, settings.iterations)
            annealed.step()
            annealed.zero_grad(set_to_none=True)
            steps.keep_above(_SMALLEST_FACTOR)
            scales.keep_above(_SMALLEST_FACTOR)
        if state is not None:
            value, regulariser, decided = state.tolist()  # the only wait for the device
            curve.append(CurvePoint(iteration, value, regulariser, math.nan if beta is None else beta, decided))
            unit.progress(iteration + 1, settings.iterations, value)
            if beta is not None and settings.early_stop is not None and decided >= settings.early_stop:
                break  # a weight at one of its ends has no gradient: what is decided stays
    if not are_finite([rounding.logits, *steps.parameters, *scales.parameters, *biases.parameters]):
        return Learned(before, tuple(curve), None, NOT_FINITE)
    learned = table.updated(scales.applied(rounding.hard_codes(table)) | steps.grids())
    return Learned(unit.finish(learned, biases.arrays()), tuple(curve), rounding.undecided())


def _beta(iteration: int, settings: Settings) -> float | None:
    """The regulariser's exponent: absent during the warm-up, then linear from beta_start to beta_end."""
    start = settings.warmup * settings.iterations
    if iteration < start:
        return None
    progress = (iteration - start) / max(settings.iterations - start, 1)
    return settings.beta_start + (settings.beta_end - settings.beta_start) * progress


class _Rounding:
    """The rounding of all weights of a unit, held flat so that a step costs a handful of kernels however many layers there are.

    A weight is w~ = (base + h(V) * free) * scale, where base is its floor code within the grid and free is 0 for weights beyond the grid's
    ends; where steps are learned too, times the factor of its channel. Gradients of V are written by hand: autograd would keep six
    temporaries per weight for the same product.
    """

    def __init__(
        self, weights: Mapping[str, np.ndarray], table: QuantTable, device: torch.device, steps: LearnedWeightSteps | None = None
    ) -> None:
        self._shapes = {name: tuple(array.shape) for name, array in weights.items()}
        size = sum(array.size for array in weights.values())
        fraction = torch.empty(size)
        self._fixed, self._span = torch.empty(size), torch.empty(size)
        views = [self._views(flat) for flat in (fraction, self._fixed, self._span)]
        for name, array in weights.items():
            grid = table[name]
            scale, zero_point = (torch.from_numpy(parameter) for parameter in grid.expanded(array.shape))
            scaled = torch.tensor(array) / scale
            floor = torch.floor(scaled)
            low, high = grid.spec.qmin - zero_point, grid.spec.qmax - zero_point
            free = (floor >= low) & (floor < high)
            views[0][name].copy_(scaled - floor)
            views[1][name].copy_(torch.minimum(torch.maximum(floor, low), high) * scale)
            views[2][name].copy_(scale * free)
        self.logits = rounding_logits(fraction).to(device).requires_grad_()
        self._fixed, self._span = self._fixed.to(device), self._span.to(device)
        self._weights = torch.empty(size, device=device)
        self.gradient = torch.zeros(size, device=device)
        self._leaves = self._views(self._weights)
        self._steps = steps
        if steps is not None:
            self._unscaled = torch.empty(size, device=device)
            self._scaled_views, self._unscaled_views = self._views(self._weights), self._views(self._unscaled)
        for name, gradient in self._views(self.gradient).items():
            self._leaves[name].requires_grad_()
            self._leaves[name].grad = gradient  # backward accumulates into the flat buffer
        self._sigmoid = torch.empty(size, device=device)
        self._soft = torch.empty(size, device=device)

    def soft_weights(self) -> dict[str, torch.Tensor]:
        """The weights under the present soft rounding, as leaves whose gradients land in one flat buffer."""
        with torch.no_grad():
            torch.sigmoid(self.logits, out=self._sigmoid)
            torch.mul(self._sigmoid, ZETA - GAMMA, out=self._soft).add_(GAMMA).clamp_(0.0, 1.0)
            torch.addcmul(self._fixed, self._soft, self._span, out=self._weights if self._steps is None else self._unscaled)
            if self._steps is not None:
                self._steps.scale(self._unscaled_views, self._scaled_views)
        self.gradient.zero_()
        return self._leaves

    @torch.no_grad()
    def state(self, round_weight: float, beta: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The regulariser (NaN where there is none yet) and the share of decided weights, under the present soft rounding."""
        sharpness = self._soft.mul(2.0).sub_(1.0).abs_()
        decided = ((sharpness >= _DECIDED) | (self._span == 0)).float().mean()
        if beta is None:
            return torch.full_like(decided, math.nan), decided
        return (1.0 - sharpness.pow_(beta)).sum().mul_(round_weight), decided

    @torch.no_grad()
    def set_gradient(self, round_weight: float, beta: float | None) -> None:
        """dL/dV from dL/dw~, plus the gradient of lambda * sum(1 - |2h - 1|^beta) (AdaRound, Eq. 24); and those of the steps."""
        if self._steps is not None:
            self._steps.set_gradients(self._unscaled_views, self._views(self.gradient))
        gradient = self.gradient.mul_(self._span)
        if beta is not None:
            centred = self._soft.mul(2.0).sub_(1.0)
            push = centred.abs().pow_(beta - 1.0).copysign_(centred)
            gradient.sub_(push, alpha=2.0 * round_weight * beta)
        slope = torch.addcmul(self._sigmoid, self._sigmoid, self._sigmoid, value=-1.0).mul_(ZETA - GAMMA)
        moving = (self._soft > 0.0) & (self._soft < 1.0)
        self.logits.grad = gradient.mul_(slope).mul_(moving).clone()

    @torch.no_grad()
    def hard_codes(self, table: QuantTable) -> dict[str, TensorQuant]:
        """floor + [V >= 0], as codes in each weight's layout."""
        up = self._views(((self.logits >= 0).float() * self._span + self._fixed).cpu())
        changes = {}
        for name, weight in up.items():
            grid = table[name]
            scale, zero_point = grid.expanded(tuple(weight.shape))
            codes = np.rint(weight.numpy() / scale).astype(np.int32) + zero_point
            changes[name] = replace(grid, codes=np.ascontiguousarray(codes))
        return changes

    @torch.no_grad()
    def undecided(self) -> float:
        soft = soft_round(self.logits)
        open_ = ((2.0 * soft - 1.0).abs() < _DECIDED) & (self._span > 0)
        return float(open_.float().mean())

    def _views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each weight as a view of its stretch of a flat buffer, in its ONNX shape; 4-d weights channels last."""
        views, start = {}, 0
        for name, shape in self._shapes.items():
            stretch = flat[start : start + math.prod(shape)]
            start += math.prod(shape)
            if len(shape) == 4:
                outer, inner, height, width = shape
                views[name] = stretch.view(outer, height, width, inner).permute(0, 3, 1, 2)
            else:
                views[name] = stretch.view(shape)
        return views
