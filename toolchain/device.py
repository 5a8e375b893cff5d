"""Where torch computes, and how exactly."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import UsageError


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute in float32 where it is asked for.

    cuDNN takes TF32 for convolutions by itself, and cuBLAS for products where the environment says so: its 10-bit mantissa moves values
    across rounding ties and fails the import check.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda` or `cpu` as a torch device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: torch {torch.__version__} finds no CUDA device; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has matrix units for bfloat16: Intel's AMX, tensor cores from compute capability 8.0 on.

    AVX512's instructions for it are none: on a processor held to them, convolutions took 1.2 to 2.1 times as long as in float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported()


def give_back(device: torch.device) -> None:
    """Give back what torch keeps of a device's memory for later: ONNX Runtime takes its own."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
