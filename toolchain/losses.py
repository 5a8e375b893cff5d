"""How far the outputs of a piece of the model are from those of its float original."""

from collections.abc import Mapping
from typing import Any

import torch

from .activations import Parts, Passes, Value
from .packing import Packed


def loss_of(
    outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], shares: Mapping[str, float] | None = None
) -> torch.Tensor:
    """L = sum over outputs of mean over batch and space of the sum over channels of squared differences (as MQBench and BRECQ have it).

    The channel axis is 1, but the last for sequences [N, T, C]. `shares` weighs the outputs, see `output_shares`; 1 each by default.
    """
    terms = [
        _MeanSquares.apply(outputs[name], target, 2 if target.dim() == 3 else min(1, target.dim() - 1))
        * (1.0 if shares is None else shares[name])
        for name, target in targets.items()
    ]
    return torch.stack(terms).sum()


class _MeanSquares(torch.autograd.Function):
    """The mean of the sum over an axis of squared differences.

    Its gradient, 2 (x - target) / M, is one product with a scalar; autograd's is one with a tensor that is broadcast against the layout of
    images, which takes a tenth of the whole step on CPUs, for the same bits.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, target: torch.Tensor, axis: int) -> torch.Tensor:
        difference = x - target
        ctx.save_for_backward(difference)
        sums = difference.square().sum(dim=axis)
        ctx.count = sums.numel()
        return sums.mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (difference,) = ctx.saved_tensors
        return difference * (grad_outputs[0] / ctx.count * 2.0), None, None


def output_shares(targets: Mapping[str, Value], passes: Passes) -> dict[str, float]:
    """The weight of each output in a unit's loss: the mean energy of all outputs over its own, 1 where there is one output only.

    Several outputs that cross a boundary differ in scale by orders of magnitude (a skip of 16 channels, logits of 2): each then counts by
    its relative error, and the loss keeps the magnitude of an output's.
    """
    names = learnable(targets)
    if len(names) == 1:
        return {names[0]: 1.0}
    energies = {name: _mean_loss({name: targets[name]}, None, {name: 1.0}, passes) for name in names}
    mean = sum(energies.values()) / max(len(energies), 1)
    return {name: mean / energy if energy > 0 else 1.0 for name, energy in energies.items()}


def learnable(targets: Mapping[str, Value]) -> list[str]:
    """The outputs that a loss can be taken of: float tensors that are not empty."""
    packed = {name: value.packing.unpack(value.kept[:1]) for name, value in targets.items() if isinstance(value, Packed)}
    first = {name: value[0] if isinstance(value, Parts) else packed.get(name, value) for name, value in targets.items()}
    return [n for n, t in first.items() if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.dim() > 0 and t.numel() > 0]


def full_loss(outputs: Mapping[str, Value], targets: Mapping[str, Value], passes: Passes) -> float:
    """`loss_of` over all samples, a forward pass at a time to bound the memory; 0 where there is nothing to compare."""
    return _mean_loss(targets, outputs, output_shares(targets, passes), passes)


def energy(targets: Mapping[str, Value], passes: Passes) -> float:
    """The loss of an all-zero output: what the energy-normalised loss divides by."""
    return _mean_loss(targets, None, output_shares(targets, passes), passes)


@torch.no_grad()
def _mean_loss(targets: Mapping[str, Value], outputs: Mapping[str, Value] | None, shares: Mapping[str, float], passes: Passes) -> float:
    """The loss over all samples of outputs, or of zeros (None)."""
    total = 0.0
    for index, rows in enumerate(passes):
        chunk = {name: passes.part(targets[name], index) for name in shares}
        made = {name: torch.zeros_like(t) if outputs is None else passes.part(outputs[name], index) for name, t in chunk.items()}
        alike = {name: target for name, target in chunk.items() if made[name].shape == target.shape and target.numel() > 0}
        if alike:
            total += float(loss_of(made, alike, shares)) * (rows.stop - rows.start)
    return total / passes.count
