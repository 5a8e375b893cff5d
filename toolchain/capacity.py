"""Capacities of blocks, and which neighbouring blocks are reconstructed jointly (MRECG, Ma et al., CVPR 2023). Plain arithmetic on numbers.

The paper's finding: the reconstruction loss oscillates along the network because neighbouring blocks differ in capacity, and the largest
intermediate error decides the final one; joining the neighbours with the largest differences smooths it. A boundary l lies between blocks
l and l+1; a selection is the set of boundaries that are merged away.
"""

import itertools
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class BlockTraits:
    """What the data-free capacity needs to know of a block.

    `layers` has (weight count, bits) for each weighted layer; `is_transition` tells a block whose output differs from its input in
    resolution or channels (the block that opens a stage).
    """

    layers: tuple[tuple[int, int], ...]
    is_transition: bool


def modcap(traits: BlockTraits, alpha: float) -> float:
    """Data-free capacity CM = sum_i params_i * bits_i * alpha_i (Eq. 3), with alpha_i = alpha in a transition block and 1 elsewhere.

    The paper scales stride-2 layers; its constant is not published. Scaling whole transition blocks, with any alpha from 2 to 6, is the
    variant that reproduces the published ModCap grouping of MobileNetV2 at all four widths.
    """
    return sum(float(params) * bits for params, bits in traits.layers) * (alpha if traits.is_transition else 1.0)


def gaps(capacities: Sequence[float]) -> np.ndarray:
    """Squared differences d_l = (CM_l - CM_{l+1})^2 of neighbours [L-1], as used in Eq. 4."""
    return np.diff(np.asarray(capacities, dtype=np.float64)) ** 2


def oscillation(losses: Sequence[float]) -> float:
    """Sum of the positive drops of the loss between neighbours: 0 for a loss that only accumulates (Theorem 1)."""
    return float(np.maximum(-np.diff(np.asarray(losses, dtype=np.float64)), 0.0).sum())


class Merge(NamedTuple):
    """One step of `signed_drop`: the boundary it merges away, and the last block of the group behind it, down to which the loss drops."""

    boundary: int
    end: int


def signed_drop(
    losses: Sequence[float], allowed: AbstractSet[int], *, k: int | None = None, tol: float = 0.05, max_group: int = 3
) -> tuple[Merge, ...]:
    """Merge where the loss drops, largest drop first, until it only rises (greedy isotonic regression).

    A group's value is the loss of its last block. Each round merges the neighbouring groups with the largest drop v[g] - v[g+1]; it stops
    after k merges, or (k None) when the largest drop is below tol * v[g]. Applied to the loss curve published for MobileNetV2 x0.5 this
    gives the released grouping.

    Args:
        losses: reconstruction loss of each block [L].
        allowed: boundaries that may be merged.
        k: number of merges; None leaves the number to `tol`.
        tol: smallest relative drop that counts; unused when k is given.
        max_group: most blocks in one group.

    Returns:
        The merges, in the order in which they were made.
    """
    groups = [[i] for i in range(len(losses))]
    merges: list[Merge] = []
    while k is None or len(merges) < k:
        drops = [
            (losses[a[-1]] - losses[b[-1]], g)
            for g, (a, b) in enumerate(itertools.pairwise(groups))
            if len(a) + len(b) <= max_group and a[-1] in allowed
        ]
        drop, g = max(drops, default=(0.0, 0), key=lambda pair: (pair[0], -pair[1]))
        if drop <= 0 or (k is None and drop < tol * losses[groups[g][-1]]):
            break
        merges.append(Merge(groups[g][-1], groups[g + 1][-1]))
        groups[g : g + 2] = [groups[g] + groups[g + 1]]
    return tuple(merges)


def topk(differences: Sequence[float], allowed: AbstractSet[int], *, k: int, penalty: float, max_group: int = 3) -> frozenset[int]:
    """Eq. 4 in closed form: the m in {0,1}^(L-1) that maximises sum_l d_l m_l - penalty * (sum_l m_l - k)^2.

    The paper prints argmin, which taken literally merges the k smallest differences; its text and figures mean the largest, so this
    maximises. d is divided by its largest allowed entry, which makes `penalty` (the paper's lambda) free of scale; an infinite penalty is
    plain top-k. With the boundaries sorted by d, the n-th is taken iff d_n > penalty * (2 (n - 1 - k) + 1).

    `max_group` (2: pairs only) restricts the choice further; a boundary that would break it is passed over, greedily.
    """
    scale = max((differences[i] for i in allowed), default=0.0)
    order = sorted(allowed, key=lambda i: (-differences[i], i))
    merged: set[int] = set()
    for boundary in order:
        count = len(merged)
        surplus = 2 * (count - k) + 1
        cost = penalty * surplus if np.isfinite(penalty) else (np.inf if surplus > 0 else -np.inf)
        gain = differences[boundary] / scale if scale > 0 else 0.0
        if gain <= cost:
            break
        if _group_size(merged | {boundary}, boundary) <= max_group:
            merged.add(boundary)
    return frozenset(merged)


def transitions(traits: Sequence[BlockTraits], allowed: AbstractSet[int], *, max_group: int = 3) -> frozenset[int]:
    """Merge each block that opens a stage with the block before it."""
    merged: set[int] = set()
    for boundary in range(len(traits) - 1):
        if traits[boundary + 1].is_transition and boundary in allowed and _group_size(merged | {boundary}, boundary) <= max_group:
            merged.add(boundary)
    return frozenset(merged)


def mergeable(traits: Sequence[BlockTraits], *, cross_stage: bool) -> frozenset[int]:
    """The boundaries that may be merged: between blocks with weights, not at the stem or the head (no released scheme merges those).

    With `cross_stage` False also not where a stage opens.
    """
    weighted = [i for i, block in enumerate(traits) if block.layers]
    if len(weighted) < 3:
        return frozenset()
    inner = set(weighted[1:-1])
    return frozenset(i for i in inner if i + 1 in inner and (cross_stage or not traits[i + 1].is_transition))


def groups(count: int, merged: AbstractSet[int]) -> tuple[range, ...]:
    """Turn merged boundaries into runs of block indices that cover 0..count-1 in order."""
    edges = [0, *(i + 1 for i in range(count - 1) if i not in merged), count]
    return tuple(range(a, b) for a, b in itertools.pairwise(edges))


def _group_size(merged: AbstractSet[int], boundary: int) -> int:
    low = boundary
    while low - 1 in merged:
        low -= 1
    high = boundary
    while high + 1 in merged:
        high += 1
    return high - low + 2
