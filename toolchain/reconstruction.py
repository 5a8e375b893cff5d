"""The optimisation of one unit: learned rounding (AdaRound) and step sizes (LSQ) against the float unit's output (BRECQ, QDrop)."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from .activations import laid_out, quantizing, run_piece
from .config import Settings
from .fake_quant import GAMMA, ZETA, LearnedStep, rounding_logits, soft_round
from .quant_table import BIAS_BITS, QuantTable, TensorQuant, along_axis
from .torch_import import TorchBlock

_CURVE_POINTS = 40
_SMALLEST_FACTOR = 0.01  # of the calibrated step: Adam must not carry a step through zero
_DECIDED = 0.95  # |2h - 1| above which a rounding counts as decided before it is made hard

Progress = Callable[[int, int, float], None]
"""Called now and then with (iteration, iterations, reconstruction loss)."""


@dataclass(frozen=True)
class UnitResult:
    """What the reconstruction of one unit came to.

    `loss_before` and `loss_after` are hard-quantized losses over all samples: rounding to nearest on the calibrated grids, and the learned
    codes and steps. `kept` says which of the two is in the table. `flipped` is the share of weights whose code differs from rounding to
    nearest, `undecided` the share whose soft rounding was still open at the end. `curve` has (iteration, loss of its mini-batch).
    """

    unit: str
    loss_before: float
    loss_after: float
    kept: str
    iterations: int
    seconds: float
    flipped: float
    undecided: float
    curve: tuple[tuple[int, float], ...]
    changes: Mapping[str, TensorQuant]


def learned_weights(module: TorchBlock, table: QuantTable) -> list[str]:
    """The weights of a unit whose rounding is learned: those on a grid; biases follow from them."""
    return [name for name in module.weights if name in table and table[name].spec.bits < BIAS_BITS]


def loss_of(outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """L = sum over outputs of mean over batch and space of the sum over channels of squared differences (as MQBench and BRECQ have it).

    The channel axis is 1, but the last for sequences [N, T, C].
    """
    terms = [
        (outputs[name] - target).square_().sum(dim=2 if target.dim() == 3 else min(1, target.dim() - 1)).mean()
        for name, target in targets.items()
    ]
    return torch.stack(terms).sum()


@torch.no_grad()
def full_loss(outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> float:
    """`loss_of` over all samples, a chunk at a time to bound the memory."""
    count = len(next(iter(targets.values())))
    total = 0.0
    for start in range(0, count, 64):
        chunk = {name: target[start : start + 64] for name, target in targets.items()}
        size = len(next(iter(chunk.values())))
        total += float(loss_of({name: outputs[name][start : start + 64] for name in chunk}, chunk)) * size
    return total / count


@torch.no_grad()
def energy(targets: Mapping[str, torch.Tensor]) -> float:
    """The loss of an all-zero output: what the energy-normalised loss divides by."""
    return full_loss({name: torch.zeros_like(target[:1]).expand_as(target) for name, target in targets.items()}, targets)


def reconstruct_unit(
    *,
    piece: TorchBlock,
    floats: Mapping[str, np.ndarray],
    inputs: Mapping[str, torch.Tensor],
    float_inputs: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
    table: QuantTable,
    finish: Callable[[QuantTable], QuantTable],
    settings: Settings,
    seed: int,
    progress: Progress,
) -> tuple[UnitResult, dict[str, torch.Tensor]]:
    """Learn the rounding of a unit's weights and the steps of the activations it makes.

    Args:
        piece: the unit.
        floats: float weights and biases by name.
        inputs: the unit's inputs in the quantized stream [N, ...].
        float_inputs: the same in the float stream; with keep_probability < 1 the two are mixed element-wise.
        targets: the float unit's outputs for `float_inputs`.
        table: grids of the unit's activations and weights, with the codes of rounding to nearest.
        finish: completes a table with what follows from it (biases, tied values).
        settings: hyper-parameters.
        seed: of the mini-batches and the dropping.
        progress: called now and then.

    Returns:
        The result, whose `changes` make the better of the two tables, and the unit's outputs in the quantized stream under that table.
    """
    started = time.perf_counter()
    device = next(iter(inputs.values())).device

    def outcome(candidate: QuantTable) -> tuple[float, dict[str, torch.Tensor]]:
        arrays = {name: candidate[name].dequantized() if name in candidate else floats[name] for name in piece.weights}
        constants = {name: laid_out(torch.tensor(array)).to(device) for name, array in arrays.items()}
        outputs = run_piece(piece, inputs, constants, quantizing(candidate))
        return full_loss(outputs, targets), outputs

    before = finish(table)
    loss_before, outputs_before = outcome(before)
    learned, curve, undecided = _learn(piece, floats, inputs, float_inputs, targets, table, settings, seed, progress)
    after = finish(learned)
    loss_after, outputs_after = outcome(after)
    better = loss_after < loss_before
    best = after if better else before
    weights = learned_weights(piece, table)
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
    return result, outputs_after if better else outputs_before


def _learn(
    piece: TorchBlock,
    floats: Mapping[str, np.ndarray],
    inputs: Mapping[str, torch.Tensor],
    float_inputs: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
    table: QuantTable,
    settings: Settings,
    seed: int,
    progress: Progress,
) -> tuple[QuantTable, tuple[tuple[int, float], ...], float]:
    device = next(iter(inputs.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    rounding = _Rounding({name: floats[name] for name in learned_weights(piece, table)}, table, device)
    constants = {name: laid_out(torch.tensor(floats[name])).to(device) for name in piece.weights}
    made = [value for node in piece.block.nodes for value in node.outputs]
    grids = {name: table[name] for name in made if name in table and table[name].tied_to is None}
    learns_steps = settings.activation_lr > 0 and not all(grid.fixed for grid in grids.values())
    # A step is learned as a factor of the calibrated one, so that its rate means the same for every activation and bit width.
    factors = {name: torch.ones((), device=device, requires_grad=learns_steps and not grid.fixed) for name, grid in grids.items()}
    calibrated = {name: torch.tensor(float(grid.scale), device=device) for name, grid in grids.items()}
    weight_optimizer = torch.optim.Adam([rounding.logits], lr=settings.weight_lr, fused=True)
    moving = [factor for factor in factors.values() if factor.requires_grad]
    step_optimizer = torch.optim.Adam(moving, lr=settings.activation_lr, fused=True) if learns_steps else None
    mixes = settings.keep_probability < 1.0

    def quantize(name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in factors:
            return x
        spec, zero_point = grids[name].spec, int(grids[name].zero_point)
        keep = _coins(x, settings.keep_probability, generator) if mixes else None
        step = calibrated[name] * factors[name]
        return LearnedStep.apply(x, step, spec.qmin - zero_point, spec.qmax - zero_point, keep)  # pyright: ignore[reportReturnType]

    count = len(next(iter(inputs.values())))
    every = max(settings.iterations // _CURVE_POINTS, 1)
    curve: list[tuple[int, float]] = []
    for iteration in range(settings.iterations):
        rows = torch.randperm(count, generator=generator, device=device)[: settings.batch_size]
        fed = {name: _rows(tensor, rows) for name, tensor in inputs.items()}
        if mixes:
            fed = {n: _mixed(tensor, _rows(float_inputs[n], rows), settings.keep_probability, generator) for n, tensor in fed.items()}
        outputs = piece(fed | constants | rounding.soft_weights(), quantize)
        loss = loss_of(outputs, {name: _rows(target, rows) for name, target in targets.items()})
        loss.backward()
        rounding.set_gradient(settings.round_weight, _beta(iteration, settings))
        weight_optimizer.step()
        if step_optimizer is not None:
            step_optimizer.param_groups[0]["lr"] = settings.activation_lr * 0.5 * (1 + math.cos(math.pi * iteration / settings.iterations))
            step_optimizer.step()
            step_optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for factor in moving:
                    factor.clamp_(min=_SMALLEST_FACTOR)
        if iteration % every == 0 or iteration == settings.iterations - 1:
            value = loss.item()
            curve.append((iteration, value))
            progress(iteration + 1, settings.iterations, value)
    changes = rounding.hard_codes(table)
    changes |= {name: replace(grids[name], scale=np.float32((calibrated[name] * factor).item())) for name, factor in factors.items()}
    return table.updated(changes), tuple(curve), rounding.undecided()


def _rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A mini-batch of a cached value, in its layout: whole samples are contiguous in memory, so that this is a copy of rows."""
    order = (0, 2, 3, 1) if tensor.dim() == 4 else tuple(range(tensor.dim()))
    picked = torch.index_select(tensor.permute(order).reshape(len(tensor), -1), 0, rows)
    shape = [tensor.shape[axis] for axis in order[1:]]
    picked = picked.view(len(rows), *shape)
    return picked.permute(0, 3, 1, 2) if tensor.dim() == 4 else picked


def _mixed(quantized: torch.Tensor, floats: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Each element from the quantized stream with the given probability, else from the float stream (QDrop). Overwrites `quantized`."""
    if not quantized.is_floating_point():
        return quantized
    return torch.addcmul(floats, quantized.sub_(floats), _coins(quantized, probability, generator))


def _beta(iteration: int, settings: Settings) -> float | None:
    """The regulariser's exponent: absent during the warm-up, then linear from beta_start to beta_end."""
    start = settings.warmup * settings.iterations
    if iteration < start:
        return None
    progress = (iteration - start) / max(settings.iterations - start, 1)
    return settings.beta_start + (settings.beta_end - settings.beta_start) * progress


def _coins(like: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """1 with the given probability (to 1/256), else 0, independently for each element; in the layout and dtype of `like`.

    Eight coins from each random 64-bit word: an order of magnitude cheaper on CPUs than a draw for each element.
    """
    words = torch.empty((like.numel() + 7) // 8, dtype=torch.int64, device=like.device).random_(-(2**63), None, generator=generator)
    coins = torch.empty_like(like)
    coins.copy_(words.view(torch.uint8)[: like.numel()].as_strided(coins.shape, coins.stride()))
    return coins.lt_(round(probability * 256))


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
            scale, zero_point = (torch.from_numpy(along_axis(p, grid.spec.axis, array.ndim)) for p in (grid.scale, grid.zero_point))
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
            scale, zero_point = (along_axis(p, grid.spec.axis, weight.dim()) for p in (grid.scale, grid.zero_point))
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
