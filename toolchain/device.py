"""Where torch computes, and how exactly."""

import torch

from .errors import UsageError

# cuDNN would compute convolutions in TF32 by itself, whose 10-bit mantissa moves values across rounding ties and fails the import check.
full_float32 = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda` or `cpu` as a torch device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: torch {torch.__version__} finds no CUDA device; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
