"""Powell's method: minimisation without derivatives, along one direction after another.

M. J. D. Powell, "An efficient method for finding the minimum of a function of several variables without calculating derivatives" (1964),
with the test of *Numerical Recipes* (section 10.7) for when a sweep's displacement replaces a direction. Made for functions that cost a
forward pass over a network: line searches are coarse, and the number of evaluations is bounded.
"""

from collections.abc import Callable

import numpy as np

_GROWTH = 1.6  # of a step that goes on improving
_LONGEST = 4  # such steps


class _Counted:
    """A function that knows how often it may still be called."""

    def __init__(self, function: Callable[[np.ndarray], float], most: int) -> None:
        self._function = function
        self.left = most

    def __call__(self, x: np.ndarray) -> float:
        self.left -= 1
        value = self._function(x)
        return value if np.isfinite(value) else np.inf


def minimise(
    function: Callable[[np.ndarray], float],
    start: np.ndarray,
    value: float,
    *,
    step: float,
    bound: float,
    evaluations: int,
    tolerance: float = 1e-3,
    settle: Callable[[np.ndarray, int], None] = lambda *_: None,
) -> tuple[np.ndarray, float]:
    """The best point that was evaluated, and its value: never worse than the start.

    Args:
        function: to minimise; values that are not finite count as infinite.
        start: where to begin [N].
        value: of the function there.
        step: first step along each direction.
        bound: no coordinate leaves -bound .. bound.
        evaluations: most calls of the function.
        tolerance: share of the value that a sweep must gain for another one.
        settle: called before each line search with the point and its lowest coordinate that will change in what is left of the sweep.
    """
    f = _Counted(function, evaluations)
    x, count = np.array(start, float), len(start)
    directions = [np.eye(count)[i] for i in range(count)]
    while f.left > 0:
        begin, at_begin = x, value
        drop, largest = 0.0, 0
        for index, direction in enumerate(directions):
            if f.left <= 0:
                break
            settle(x, min(int(np.flatnonzero(d)[0]) for d in directions[index:]))
            before = value
            x, value = _line(f, x, value, direction, step, bound)
            if before - value > drop:
                drop, largest = before - value, index
        if at_begin - value <= tolerance * abs(at_begin) or f.left <= 0:
            break
        moved = x - begin
        if not moved.any():
            break
        settle(x, 0)
        beyond = f(np.clip(begin + 2 * moved, -bound, bound))
        if beyond < at_begin and 2 * (at_begin - 2 * value + beyond) * (at_begin - value - drop) ** 2 < drop * (at_begin - beyond) ** 2:
            norm = moved / np.abs(moved).max()
            x, value = _line(f, x, value, norm, step, bound)
            directions = [*directions[:largest], *directions[largest + 1 :], norm]
    return x, value


def _line(f: _Counted, x: np.ndarray, value: float, direction: np.ndarray, step: float, bound: float) -> tuple[np.ndarray, float]:
    """The best of a few points on a line: downhill in growing steps, then the vertex of a parabola around the lowest."""
    known = {0.0: value}

    def at(t: float) -> float:
        if t not in known:
            known[t] = f(np.clip(x + t * direction, -bound, bound)) if f.left > 0 else np.inf
        return known[t]

    t = step if at(step) < value else -step
    if at(t) < value:
        for _ in range(_LONGEST):
            if at(t * _GROWTH) >= at(t):
                break
            t *= _GROWTH
    points = sorted(known)
    best = min(points, key=lambda p: known[p])
    place = points.index(best)
    if 0 < place < len(points) - 1:
        a, b, c = points[place - 1 : place + 2]
        left, right = (known[b] - known[c]) * (b - a), (known[b] - known[a]) * (b - c)
        if left != right and np.isfinite(left - right):
            vertex = b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)
            if a < vertex < c and abs(vertex - b) > 0.005 * (c - a):
                at(float(vertex))
    best = min(known, key=lambda p: known[p])
    return (x, value) if best == 0.0 else (np.clip(x + best * direction, -bound, bound), known[best])
