"""Quantizers as tensor functions: the exact simulation of QuantizeLinear / DequantizeLinear, and the two that learn."""

from typing import Any

import torch

from .quant_table import TensorQuant

ZETA, GAMMA = 1.1, -0.1  # stretch of the rectified sigmoid (AdaRound, Eq. 23)


def fake_quantize(x: torch.Tensor, grid: TensorQuant) -> torch.Tensor:
    """x~ = (clip(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale, per tensor, bit for bit what ONNX defines."""
    # On the device: CUDA divides by a host scalar as a product with its reciprocal, which rounds ties differently.
    scale, zero_point = torch.full((), float(grid.scale), device=x.device), int(grid.zero_point)
    # Clipping before the zero point is added gives the same integers with one pass less.
    return x.div(scale).round_().clamp_(grid.spec.qmin - zero_point, grid.spec.qmax - zero_point).mul_(scale)


class LearnedStep(torch.autograd.Function):
    """Fake quantization with a learnable step size (LSQ) and a fixed zero point, dropped element-wise (QDrop, Eq. 6).

    Gradients: straight through for x inside the range, zero outside; for the step s, round(x/s) - x/s inside and the saturated code minus
    the zero point outside. Where an element is dropped (its quantization left out), x passes unchanged.
    """

    # Masks are floats of 0 and 1: on CPUs selecting with booleans is not vectorised and costs ten times a multiplication. The step is
    # bound by memory, so every line here is one pass over the activation.

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, step: torch.Tensor, low: int, high: int, keep: torch.Tensor | None) -> torch.Tensor:
        """`low`, `high`: code range minus the zero point; `keep`: 0 or 1 [x.shape], 1 where x is quantized, None for everywhere."""
        scaled = x / step
        clipped = scaled.clamp(low, high)
        inside = scaled.eq_(clipped)
        codes = torch.round(clipped)
        slope = torch.addcmul(codes, clipped, inside, value=-1.0)
        out = codes.mul_(step)
        if keep is None:
            ctx.save_for_backward(slope, inside)
            ctx.dropped = False
            return out
        out = torch.addcmul(x, out.sub_(x), keep)
        blocked = torch.addcmul(keep, keep, inside, value=-1.0)
        ctx.save_for_backward(slope.mul_(keep), blocked)
        ctx.dropped = True
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        slope, mask = ctx.saved_tensors
        grad_step = (grad * slope).sum() if ctx.needs_input_grad[1] else None
        grad_x = torch.addcmul(grad, grad, mask, value=-1.0) if ctx.dropped else grad * mask
        return grad_x, grad_step, None, None, None


def soft_round(logits: torch.Tensor) -> torch.Tensor:
    """h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1): the learned rounding, 0 down to 1 up (AdaRound, Eq. 23)."""
    return torch.sigmoid(logits).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0.0, 1.0)


def rounding_logits(fraction: torch.Tensor) -> torch.Tensor:
    """The V with h(V) = fraction, for fractions in [0, 1)."""
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)
