"""How far measured figures can be trusted: confidence intervals of shares, of paired differences, and of correlations. Plain arithmetic."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a share, in percent; it stays within 0 and 100 and works at both ends (Wilson 1927)."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 100 / (1 + z * z / trials)
    return max((centre - spread) * scale, 0.0), min((centre + spread) * scale, 100.0)


def paired_difference(lost: int, won: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Interval of the difference of two shares measured on the same samples, in points of percent: how much the first is larger.

    Only the samples that the two judge differently carry information, so the interval is far narrower than that of either share. Wald's
    interval after half a sample is added to each cell of the 2 x 2 table, which keeps its coverage for small counts (Agresti and Min 2005).

    Args:
        lost: samples that only the first gets right.
        won: samples that only the second gets right.
        trials: all samples.
        z: quantile of the normal distribution.
    """
    b, c, n = lost + 0.5, won + 0.5, trials + 2.0
    difference = (b - c) / n
    spread = z * math.sqrt(max((b + c) - (b - c) ** 2 / n, 0.0)) / n
    return 100 * max(difference - spread, -1.0), 100 * min(difference + spread, 1.0)


def paired_mean(differences: np.ndarray, z: float = Z95) -> tuple[float, float]:
    """Interval of the mean of differences [N] between two values of the same sample each, N > 1: normal, by the central limit theorem."""
    spread = z * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return float(differences.mean()) - spread, float(differences.mean()) + spread


def pearson(x: Sequence[float], y: Sequence[float], z: float = Z95) -> tuple[float, float, float] | None:
    """Correlation with its interval by Fisher's transformation (r, low, high); None below four pairs or without variation."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(a) < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    r = float(np.clip(np.corrcoef(a, b)[0, 1], -1.0, 1.0))
    if abs(r) > 1 - 1e-12:
        return r, r, r
    spread = z / math.sqrt(len(a) - 3)
    return r, math.tanh(math.atanh(r) - spread), math.tanh(math.atanh(r) + spread)


def spearman(x: Sequence[float], y: Sequence[float], z: float = Z95) -> tuple[float, float, float] | None:
    """Rank correlation with its interval: `pearson` on ranks, ties sharing their mean rank."""
    return pearson(_ranks(x), _ranks(y), z)


def _ranks(values: Sequence[float]) -> Sequence[float]:
    array = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse].tolist()
