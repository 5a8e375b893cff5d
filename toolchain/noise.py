"""Signal to quantization noise, of whole arrays or of parts that come one after another."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Noise:
    """Sums over values x and what stands in their place, y: `signal` of x^2, `noise` of (x - y)^2.

    `incomparable` where shapes differ, or one alone is NaN or infinite somewhere.
    """

    signal: float = 0.0
    noise: float = 0.0
    incomparable: bool = False

    @classmethod
    def of(cls, reference: np.ndarray, other: np.ndarray) -> "Noise":
        """Of two arrays. Of strings, those that differ are noise; where both are NaN, or infinite alike, there is none."""
        if reference.shape != other.shape:
            return cls(incomparable=True)
        if reference.dtype.kind in "OSU":
            reference, other = np.ones(reference.shape), reference == other
        reference, other = reference.astype(np.float64), other.astype(np.float64)
        alike = (reference == other) | (np.isnan(reference) & np.isnan(other))
        reference, other = (np.where(alike & ~np.isfinite(array), 0.0, array) for array in (reference, other))
        if not (np.isfinite(reference).all() and np.isfinite(other).all()):
            return cls(incomparable=True)
        return cls(float(np.square(reference).sum()), float(np.square(reference - other).sum()))

    @classmethod
    def together(cls, parts: Iterable["Noise"]) -> "Noise":
        parts = list(parts)
        return cls(sum(one.signal for one in parts), sum(one.noise for one in parts), any(one.incomparable for one in parts))

    @property
    def ratio(self) -> float:
        """10 log10(signal / noise) in dB: infinite without noise, 0 where it cannot be told."""
        if self.incomparable:
            return 0.0
        return float(10 * np.log10(max(self.signal, 1e-300) / self.noise)) if self.noise > 0 else float("inf")


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to quantization noise, 10 log10(sum x^2 / sum (x - y)^2), in dB over all samples; inf for equal arrays.

    Arrays of different shapes (boxes, of which there may be more or fewer) have 0 dB, and so have those of which one alone is NaN or
    infinite somewhere.
    """
    return Noise.of(reference, other).ratio
