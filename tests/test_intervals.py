"""Confidence intervals: known values, and that they cover what they claim."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain import intervals


def test_wilson_known_values() -> None:
    """Newcombe (1998), table I: 81 of 263 and 1 of 29 by the score method without continuity correction."""
    assert intervals.wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert intervals.wilson(1, 29) == pytest.approx((0.61, 17.18), abs=0.01)
    assert intervals.wilson(0, 20) == pytest.approx((0.0, 16.11), abs=0.01)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = intervals.wilson(successes, trials)
    assert 0 <= low <= 100 * successes / trials + 1e-9
    assert 100 * successes / trials - 1e-9 <= high <= 100


def test_paired_difference_covers_the_truth() -> None:
    """A 95 % interval holds the true difference in about 95 % of trials; 2,000 trials have a standard error of 0.5 points."""
    rng = np.random.default_rng(0)
    only_first, only_second, n = 0.05, 0.03, 400
    hits = 0
    for _ in range(2000):
        lost, won, _ = rng.multinomial(n, [only_first, only_second, 1 - only_first - only_second])
        low, high = intervals.paired_difference(int(lost), int(won), n)
        hits += low <= 100 * (only_first - only_second) <= high
    assert 0.935 <= hits / 2000 <= 0.975


def test_pairing_narrows_the_interval() -> None:
    """20 of 1,000 judged differently: each accuracy is known to about 2.2 points, their difference to less than one."""
    low, high = intervals.paired_difference(12, 8, 1000)
    assert low < 0.4 < high
    assert high - low < 2 < np.ptp(intervals.wilson(860, 1000))


def test_correlations() -> None:
    x = list(range(10))
    assert intervals.pearson(x, [2 * v + 1 for v in x]) == pytest.approx((1.0, 1.0, 1.0))
    assert intervals.spearman(x, [np.exp(v) for v in x]) == pytest.approx((1.0, 1.0, 1.0))
    found = intervals.pearson([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])
    assert found is not None
    assert found[0] == pytest.approx(0.8)
    assert found[1:] == pytest.approx((-0.2796, 0.9861), abs=1e-3)  # tanh(atanh(0.8) -+ 1.96 / sqrt(2))
    assert intervals.pearson([1, 1, 1, 1], [1, 2, 3, 4]) is None
    assert intervals.pearson([1, 2, 3], [1, 2, 3]) is None
    tied = intervals.spearman([1, 2, 2, 3], [1, 2, 2, 3])
    assert tied is not None
    assert tied[0] == pytest.approx(1.0)
