"""The arithmetic of learned quantizers as loops that torch's compiler makes: one pass over memory where single operations take eight.

On CPUs the elements are those of the single operations, bit for bit; the gradient of a step is their sum in another order. Compiling takes
a C++ compiler there, which torch calls as `CXX` or `g++`, and Triton, which comes with torch, on CUDA. What was compiled is kept in torch's
own cache between runs.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .errors import first_line

# Seconds a quantized element and step, forward and backward: on a thread of a CPU of 2023; on a GPU that reads and writes 2 TB/s, for the
# fifteen passes over memory that are saved (from that, not measured).
_SAVED = {"cpu": 1.5e-9, "cuda": 3e-11}
_LOOPS = 64  # of one function
_COST = 8.0  # seconds: what compiling takes, as a rule less (measured: 2 where torch has its cache, up to 15 on a busy machine)


class Limits(NamedTuple):
    """What a learned quantizer stays within: its codes less the zero point, and the values that a Relu or Clip before it lets through."""

    low: float
    high: float
    least: float = -math.inf
    most: float = math.inf

    @property
    def are_bounded(self) -> bool:
        return self.least > -math.inf or self.most < math.inf


def is_worth(steps: int, elements: int, device: torch.device) -> bool:
    """Whether compiling saves more time than it takes: so many steps, each of them quantizing so many elements."""
    return steps * elements * _SAVED.get(device.type, 0.0) > _COST


@functools.cache
def refusal(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device; None where it can be."""
    try:
        x, ends = torch.ones(64, device=device), torch.ones(4, device=device)
        with torch.no_grad():  # as where they are called
            _loop(_dropped)(x, x[0], ends, x.to(torch.uint8), x.dtype)
            _loop(_backward)(x, x.clone(), x[0], x.clone(), ends)
    except Exception as error:  # whatever the compiler, the linker and their folders have to say
        return first_line(error)
    return None


def quantized(x: torch.Tensor, step: torch.Tensor, limits: Limits, coins: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Elements [n] on the grid of a step where coins [n] (bytes) are 1, held between the bounds alone where they are 0.

    They are float32 or bfloat16, and so is what is made (`dtype`); what is between is float32.
    """
    ends = _ends(limits, x.device)
    x, step = x.detach(), step.detach()
    return _loop(_kept)(x, step, ends, dtype) if coins is None else _loop(_dropped)(x, step, ends, coins, dtype)


def gradients(
    x: torch.Tensor, out: torch.Tensor | None, step: torch.Tensor, grad: torch.Tensor, limits: Limits, coins: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the elements [n] and of the step, from what was made of the elements and its gradient.

    In float32 that tells which elements were dropped: they are as they were. Of bfloat16, where it is rounded, `out` is None and made once
    more from the `coins`: the error of a code that bfloat16 does not have would be that of its whole code in the gradient of the step.
    """
    x, step, grad, ends = x.detach(), step.detach(), grad.detach(), _ends(limits, x.device)
    return _loop(_backward_again)(x, step, grad, ends, coins) if out is None else _loop(_backward)(x, out.detach(), step, grad, ends)


@functools.cache
def _loop(function: Callable[..., Any]) -> Callable[..., Any]:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no CUDA, asked or not
    # A loop for each pair of types, and some for ranges of sizes: torch would give up after eight.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _LOOPS)
    # In this process: a pool of compilers takes longer to start than these few loops take.
    return torch.compile(function, dynamic=True, fullgraph=True, options={"compile_threads": 1})


@functools.cache
def _ends(limits: Limits, device: torch.device) -> torch.Tensor:
    return torch.tensor(limits, device=device)


def _bounded(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.clamp(x.float(), ends[2], ends[3])


def _kept(x: torch.Tensor, step: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (torch.clamp(_bounded(x, ends) / step, ends[0], ends[1]).round() * step).to(dtype)


def _dropped(x: torch.Tensor, step: torch.Tensor, ends: torch.Tensor, coins: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Bytes compared as such would keep the whole loop from being vectorised.
    return torch.where(coins.float() > 0.5, _kept(x, step, ends, torch.float32), _bounded(x, ends)).to(dtype)


def _backward(
    x: torch.Tensor, out: torch.Tensor, step: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    bounded = _bounded(x, ends)
    error = out - bounded
    return _gradients(x, bounded, error, error != 0.0, step, grad, ends)


def _backward_again(
    x: torch.Tensor, step: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor, coins: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    bounded = _bounded(x, ends)
    error = _kept(x, step, ends, torch.float32) - bounded
    is_kept = torch.ones_like(error, dtype=torch.bool) if coins is None else coins.float() > 0.5
    return _gradients(x, bounded, torch.where(is_kept, error, 0.0), is_kept, step, grad.float(), ends)


def _gradients(
    x: torch.Tensor,
    bounded: torch.Tensor,
    error: torch.Tensor,
    is_kept: torch.Tensor,
    step: torch.Tensor,
    grad: torch.Tensor,
    ends: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = bounded / step
    is_saturated = ((codes < ends[0]) | (codes > ends[1])) & is_kept
    blocked = torch.where(is_saturated, grad, 0.0)
    passed = torch.where((x > ends[2]) & (x < ends[3]), grad - blocked, 0.0)
    return passed.to(x.dtype), (error * grad + blocked * bounded).sum() / step
