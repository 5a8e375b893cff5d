"""The learned rounding of a unit's weights (AdaRound, Nagel et al., ICML 2020)."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from .fake_quant import GAMMA, ZETA, rounding_logits, soft_round
from .quant_table import QuantTable, TensorQuant
from .step_learning import LearnedWeightSteps

_DECIDED = 0.95  # |2h - 1| above which a rounding counts as decided before it is made hard


class LearnedRounding:
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
        # On the device, where a step that is recorded once reads what they are at each replay.
        self._strength, self._exponent = torch.zeros((), device=device), torch.ones((), device=device)

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
    def regularise(self, round_weight: float, beta: float) -> None:
        """Set weight and exponent of the regulariser that `set_gradient` adds."""
        self._strength.fill_(2.0 * round_weight * beta)
        self._exponent.fill_(beta - 1.0)

    @torch.no_grad()
    def set_gradient(self, is_regularised: bool) -> None:
        """dL/dV from dL/dw~, plus the gradient of lambda * sum(1 - |2h - 1|^beta) (AdaRound, Eq. 24); and those of the steps."""
        if self._steps is not None:
            self._steps.set_gradients(self._unscaled_views, self._views(self.gradient))
        gradient = self.gradient.mul_(self._span)
        if is_regularised:
            centred = self._soft.mul(2.0).sub_(1.0)
            push = centred.abs().pow_(self._exponent).copysign_(centred)
            gradient.addcmul_(push, self._strength, value=-1.0)
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
