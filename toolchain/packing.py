"""Arrays of samples in fewer bytes than floats: codes of values that lie on a grid, which loses nothing, or a shorter float type."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .quant_table import TensorQuant

FLOAT_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Packing:
    """How floats are kept.

    On a grid, x = (kept + base) * scale, the product that fake quantization ends with: what comes back is that, bit for bit (but for the
    sign of zero, which codes have not, neither here nor in ONNX). Without a grid (`scale` None), x is rounded to the float type.
    """

    dtype: torch.dtype
    scale: float | None = None
    base: int = 0

    @classmethod
    def on(cls, grid: TensorQuant) -> "Packing | None":
        """The codes of a grid; None for those of E4M3 and of constants."""
        size = code_bytes(grid.spec.bits)
        if grid.codes is not None or grid.spec.float8 or size is None:
            return None
        low = grid.spec.qmin - int(grid.zero_point)
        return cls(torch.uint8, float(grid.scale), low) if size == 1 else cls(torch.int16, float(grid.scale), low + (1 << 15))

    def pack(self, x: torch.Tensor) -> torch.Tensor | None:
        """What is kept of x, in its layout; None where x would not come back: it is not on the grid, or beyond the type's range."""
        if self.scale is None:
            kept = x.to(self.dtype)
            return kept if bool(torch.isfinite(kept).all() == torch.isfinite(x).all()) else None
        kept = x.div(self._scale(x)).round_().sub_(self.base).to(self.dtype)
        return kept if torch.equal(self.unpack(kept), x) else None

    def unpack(self, kept: torch.Tensor) -> torch.Tensor:
        """The floats again."""
        x = kept.float()
        if self.scale is None:
            return x
        return (x.add_(self.base) if self.base else x).mul_(self._scale(x))

    def _scale(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((), self.scale or 1.0, device=x.device)


@dataclass(frozen=True)
class Packed:
    """An array of samples [N, ...] as it is kept."""

    kept: torch.Tensor
    packing: Packing

    @property
    def shape(self) -> torch.Size:
        return self.kept.shape

    def floats(self) -> torch.Tensor:
        """All of it unpacked."""
        return self.packing.unpack(self.kept)


def packings(grid: TensorQuant | None, float_type: torch.dtype) -> Sequence[Packing]:
    """The ways to keep a float32 value that may be on a grid, the best first; where none of them holds it, it stays as it is."""
    codes = Packing.on(grid) if grid is not None else None
    floats = Packing(float_type) if float_type != torch.float32 else None
    return [packing for packing in (codes, floats) if packing is not None]


def code_bytes(bits: int) -> int | None:
    """Bytes of a code; None where a float is no longer."""
    return 1 if bits <= 8 else 2 if bits <= 16 else None
