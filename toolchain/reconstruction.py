"""The optimisation of one unit: rounding (AdaRound), step sizes (LSQ) and biases against the float unit's output (BRECQ, QDrop)."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

from .activations import Passes, Piece, Value, laid_out, quantizing, run_piece
from .bias_learning import LearnedBiases, biases_of
from .config import Settings
from .fake_quant import GAMMA, ZETA, Coins, LearnedStep, rounding_logits, soft_round
from .losses import full_loss, loss_of
from .minibatch import Draw
from .quant_table import BIAS_BITS, QuantTable, TensorQuant
from .torch_import import TorchBlock

_CURVE_POINTS = 40
_STEP_BITS = 12
_SMALLEST_FACTOR = 0.01  # of the calibrated step: Adam must not carry a step through zero
_DECIDED = 0.95  # |2h - 1| above which a rounding counts as decided before it is made hard


class Finish(Protocol):
    """Completes a table, given the float biases that were learned, with what follows from it: codes of biases, tied values."""

    def __call__(self, learned: QuantTable, biases: Mapping[str, np.ndarray] = ..., /) -> QuantTable: ...


Progress = Callable[[int, int, float], None]
"""Called now and then with (iteration, iterations, reconstruction loss)."""


class CurvePoint(NamedTuple):
    """The state of a unit's optimisation at one step.

    `loss` is the reconstruction loss of the mini-batch, `regulariser` lambda * sum(1 - |2h - 1|^beta) and `beta` its exponent (both NaN
    during the warm-up, which has none), `decided` the share of weights whose rounding is all but made.
    """

    iteration: int
    loss: float
    regulariser: float
    beta: float
    decided: float


@dataclass(frozen=True)
class UnitResult:
    """What the reconstruction of one unit came to.

    `loss_before` and `loss_after` are hard-quantized losses over all samples: rounding to nearest on the calibrated grids, and the learned
    codes and steps. `kept` says which of the two is in the table. `flipped` is the share of weights whose code differs from rounding to
    nearest, `undecided` the share whose soft rounding was still open at the end (None: none was
    soft). `curve` has some 40 points of the optimisation.
    """

    unit: str
    loss_before: float
    loss_after: float
    kept: str
    iterations: int
    seconds: float
    flipped: float
    undecided: float | None
    curve: tuple[CurvePoint, ...]
    changes: Mapping[str, TensorQuant]


def learned_weights(module: Piece, table: QuantTable, done: AbstractSet[str] = frozenset()) -> list[str]:
    """The weights of a unit whose rounding is learned: those on a grid that no unit before it has (`done`); biases follow from them.

    Fixed grids are those of weights that are only stored.
    """
    grids = {name: table[name] for name in module.weights if name in table and name not in done}
    return [name for name, grid in grids.items() if grid.spec.bits < BIAS_BITS and not grid.fixed]


def reconstruct_unit(
    *,
    piece: TorchBlock,
    floats: Mapping[str, np.ndarray],
    inputs: Mapping[str, Value],
    float_inputs: Mapping[str, Value],
    targets: Mapping[str, Value],
    passes: Passes,
    device: torch.device,
    table: QuantTable,
    done: AbstractSet[str],
    finish: Finish,
    settings: Settings,
    seed: int,
    progress: Progress,
) -> tuple[UnitResult, dict[str, Value]]:
    """Learn the rounding of a unit's weights, its biases and the steps of the activations it makes.

    Args:
        piece: the unit.
        floats: float weights and biases by name.
        inputs: the unit's inputs in the quantized stream.
        float_inputs: the same in the float stream; with keep_probability < 1 the two are mixed element-wise.
        targets: the float unit's outputs for `float_inputs`.
        passes: how the samples of these are split.
        device: where they are.
        table: grids of the unit's activations and weights, with the codes of rounding to nearest.
        done: weights that an earlier unit shares and has learned; they are left alone.
        finish: completes a table.
        settings: hyper-parameters.
        seed: of the mini-batches and the dropping.
        progress: called now and then.

    Returns:
        The result, whose `changes` make the better of the two tables, and the unit's outputs in the quantized stream under that table.
    """
    started = time.perf_counter()
    targets = {name: targets[name] for name in piece.block.learned_outputs}

    def outcome(candidate: QuantTable) -> tuple[float, dict[str, Value]]:
        arrays = {name: candidate[name].dequantized() if name in candidate else floats[name] for name in piece.weights}
        constants = {name: laid_out(torch.tensor(array)).to(device) for name, array in arrays.items()}
        outputs = run_piece(piece, inputs, constants, passes, quantizing(candidate))
        return full_loss(outputs, targets, passes), outputs

    before = finish(table)
    loss_before, _ = outcome(before)  # its outputs are not kept while learning
    weights = learned_weights(piece, table, done)
    settled = {name for name in piece.weights if name in table and (name in done or table[name].fixed)}
    fixed = {name: table[name].dequantized() if name in settled else floats[name] for name in piece.weights}
    draw = Draw(inputs, float_inputs, targets, passes, settings.batch_size, torch.Generator(device).manual_seed(seed))
    biases = LearnedBiases(biases_of(piece.block.nodes, before) if settings.bias_lr > 0 else [], floats, table, device)
    learned, curve, undecided = _learn(piece, weights, fixed, biases, draw, table, settings, progress)
    after = finish(learned, biases.arrays())
    loss_after, outputs_after = outcome(after)
    better = loss_after < loss_before
    if not better:
        del outputs_after
        _, outputs_after = outcome(before)
    best = after if better else before
    flipped = sum(np.count_nonzero(after[name].codes != before[name].codes) for name in weights)
    result = UnitResult(
        unit=piece.block.name,
        loss_before=loss_before,
        loss_after=loss_after,
        kept="learned" if better else "initial",
        iterations=settings.iterations,
        seconds=time.perf_counter() - started,
        flipped=flipped / sum(floats[name].size for name in weights),
        undecided=undecided,
        curve=curve,
        changes={name: grid for name, grid in best.tensors.items() if name not in table or grid is not table[name]},
    )
    return result, outputs_after


def _learn(
    piece: TorchBlock,
    weights: Sequence[str],
    floats: Mapping[str, np.ndarray],
    biases: LearnedBiases,
    draw: Draw,
    table: QuantTable,
    settings: Settings,
    progress: Progress,
) -> tuple[QuantTable, tuple[CurvePoint, ...], float]:
    device = draw.device
    rounding = _Rounding({name: floats[name] for name in weights}, table, device)
    constants = {name: laid_out(torch.tensor(array)).to(device) for name, array in floats.items()}
    made = [value for node in piece.block.nodes for value in node.outputs]
    grids = {name: table[name] for name in made if name in table and table[name].tied_to is None}
    learns_steps = settings.activation_lr > 0
    # A step is learned as a factor of the calibrated one, so that its rate means the same for every activation and bit width.
    factors = {name: torch.ones((), device=device, requires_grad=learns_steps and not grid.fixed) for name, grid in grids.items()}
    calibrated = {name: torch.tensor(float(grid.scale), device=device) for name, grid in grids.items()}
    weight_optimizer = torch.optim.Adam([rounding.logits], lr=settings.weight_lr, fused=True)
    moving = [factor for factor in factors.values() if factor.requires_grad]
    groups = [
        {"params": ps, "lr": rate, "first": rate} for ps, rate in ((moving, settings.activation_lr), (biases.parameters, settings.bias_lr))
    ]
    groups = [group for group in groups if group["params"]]
    annealed = torch.optim.Adam(groups, fused=True) if groups else None
    coins = Coins(settings.keep_probability, draw.generator) if settings.keep_probability < 1.0 else None

    def quantize(name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in factors:
            return x
        spec, zero_point = grids[name].spec, int(grids[name].zero_point)
        step = calibrated[name] * factors[name]
        return LearnedStep.apply(x, step, spec.qmin - zero_point, spec.qmax - zero_point, coins)  # pyright: ignore[reportReturnType]

    every = max(settings.iterations // _CURVE_POINTS, 1)
    curve: list[CurvePoint] = []
    for iteration in range(settings.iterations):
        soft, moved, batches = rounding.soft_weights(), biases.tensors(), draw.selections()
        loss = torch.zeros((), device=device)
        for selection in batches:
            fed, targets = draw.batch(selection, coins)
            part = loss_of(piece(fed | constants | soft | moved, quantize), targets, draw.shares) / len(batches)
            if part.requires_grad:
                part.backward(retain_graph=selection is not batches[-1])  # the batches share the biases
            loss += part.detach()
        beta = _beta(iteration, settings)
        is_point = iteration % every == 0 or iteration == settings.iterations - 1
        state = torch.stack([loss, *rounding.state(settings.round_weight, beta)]) if is_point else None
        rounding.set_gradient(settings.round_weight, beta)
        weight_optimizer.step()
        if annealed is not None:
            for group in annealed.param_groups:
                group["lr"] = group["first"] * 0.5 * (1 + math.cos(math.pi * iteration / settings.iterations))
            annealed.step()
            annealed.zero_grad(set_to_none=True)
            with torch.no_grad():
                for factor in moving:
                    factor.clamp_(min=_SMALLEST_FACTOR)
        if state is not None:
            value, regulariser, decided = state.tolist()  # the only wait for the device
            curve.append(CurvePoint(iteration, value, regulariser, math.nan if beta is None else beta, decided))
            progress(iteration + 1, settings.iterations, value)
    changes = rounding.hard_codes(table)
    changes |= {
        name: replace(grids[name], scale=settled((calibrated[name] * factor).item()))
        for name, factor in factors.items()
        if factor.requires_grad
    }
    return table.updated(changes), tuple(curve), rounding.undecided()


def settled(step: float) -> np.float32:
    """A learned step, rounded to 12 significant bits.

    Gradients straight through rounding draw a step to where many elements sit on a tie: a ratio s_x * s_w / s_y of 1/18 puts every 18th sum
    of integers on one. A runtime that adds floats in another order then moves those codes, and the file is not what was learned. The
    coarser step is off such places, by less than a thirtieth of a code at 8 bits.
    """
    mantissa, exponent = math.frexp(step)
    return np.float32(math.ldexp(round(mantissa * (1 << _STEP_BITS)), exponent - _STEP_BITS))


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
    ends. Gradients of V are written by hand: autograd would keep six temporaries per weight for the same product.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], table: QuantTable, device: torch.device) -> None:
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
        self._gradient = torch.zeros(size, device=device)
        self._leaves = self._views(self._weights)
        for name, gradient in self._views(self._gradient).items():
            self._leaves[name].requires_grad_()
            self._leaves[name].grad = gradient  # backward accumulates into the flat buffer
        self._sigmoid = torch.empty(size, device=device)
        self._soft = torch.empty(size, device=device)

    def soft_weights(self) -> dict[str, torch.Tensor]:
        """The weights under the present soft rounding, as leaves whose gradients land in one flat buffer."""
        with torch.no_grad():
            torch.sigmoid(self.logits, out=self._sigmoid)
            torch.mul(self._sigmoid, ZETA - GAMMA, out=self._soft).add_(GAMMA).clamp_(0.0, 1.0)
            torch.addcmul(self._fixed, self._soft, self._span, out=self._weights)
        self._gradient.zero_()
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
        """dL/dV from dL/dw~, plus the gradient of lambda * sum(1 - |2h - 1|^beta) (AdaRound, Eq. 24)."""
        gradient = self._gradient.mul_(self._span)
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
