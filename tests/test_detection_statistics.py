"""Statistics of yes/no answers against SciPy and scikit-learn; coverage by enumeration and by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medsae_ray.statistics import (
    above,
    chance_above,
    clopper_pearson,
    false_discovery,
    fisher_greater,
    mover_balanced_accuracy,
    wilson,
)

COUNT = st.integers(0, 40)


@pytest.mark.parametrize(("interval", "method"), [(wilson, "wilson"), (clopper_pearson, "exact")])
@given(pairs=st.lists(st.tuples(COUNT, COUNT), min_size=1, max_size=8))
@settings(deadline=None)
def test_intervals_of_a_rate_are_scipys(interval: object, method: str, pairs: list[tuple[int, int]]) -> None:
    x, n = np.array([(min(p), max(p)) for p in pairs]).T
    low, high = interval(x, n)  # type: ignore[operator]
    for i in range(len(pairs)):
        if n[i] == 0:
            assert np.isnan([low[i], high[i]]).all()
            continue
        expected = stats.binomtest(int(x[i]), int(n[i])).proportion_ci(0.95, method)
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0 <= low[i] <= x[i] / n[i] <= high[i] <= 1


@given(tables=st.lists(st.tuples(COUNT, COUNT, COUNT, COUNT), min_size=1, max_size=8))
@settings(deadline=None)
def test_fisher_is_scipys(tables: list[tuple[int, int, int, int]]) -> None:
    tp, fn, fp, tn = np.array(tables).T
    expected = [stats.fisher_exact([[a, b], [c, d]], alternative="greater").pvalue for a, b, c, d in tables]
    np.testing.assert_allclose(fisher_greater(tp, fn, fp, tn), expected, rtol=1e-9, atol=1e-14)


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=30), holes=st.data())
def test_q_is_scipys_over_the_tests_that_were_made(p: list[float], holes: st.DataObject) -> None:
    untested = np.array(holes.draw(st.lists(st.booleans(), min_size=len(p), max_size=len(p))))
    q = false_discovery(np.where(untested, np.nan, p))
    np.testing.assert_array_equal(np.isnan(q), untested)
    if not untested.all():
        np.testing.assert_allclose(q[~untested], stats.false_discovery_control(np.array(p)[~untested]))


def test_no_test_has_no_q() -> None:
    assert np.isnan(false_discovery([np.nan, np.nan])).all()
    assert false_discovery([]).shape == (0,)


# ------------------------------------------------------------------------------------- balanced accuracy


def mover(x: np.ndarray, m: int, y: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Interval of (TPR + TNR) / 2 from x of m and y of n answered as expected."""
    (low_x, high_x), (low_y, high_y) = wilson(x, m), wilson(y, n)
    return mover_balanced_accuracy(x / m, low_x, high_x, y / n, low_y, high_y)


def coverage(m: int, n: int, tpr: float, tnr: float) -> float:
    """How often the interval holds the truth: exact, over every outcome of the two binomials."""
    x, y = np.arange(m + 1)[:, None], np.arange(n + 1)[None]
    low, high = mover(x, m, y, n)
    holds = (low <= (tpr + tnr) / 2) & ((tpr + tnr) / 2 <= high)
    return float(stats.binom.pmf(x, m, tpr)[:, 0] @ holds @ stats.binom.pmf(y, n, tnr)[0])


TRUE_RATES = np.arange(0.30, 0.96, 0.05)


@pytest.mark.parametrize(("m", "n"), [(20, 20), (20, 8), (8, 20)])
def test_mover_covers_as_often_as_it_says(m: int, n: int) -> None:
    covered = np.array([[coverage(m, n, tpr, tnr) for tnr in TRUE_RATES] for tpr in TRUE_RATES])
    assert 0.94 < covered.mean() < 0.97
    # The lowest of single pairs, at rates such as 0.95, where few outcomes are likely.
    assert covered.min() > 0.90


@pytest.mark.parametrize(("m", "n"), [(20, 20), (20, 8)])
def test_mover_covers_simulated_answers(m: int, n: int) -> None:
    rng = np.random.default_rng(0)
    tpr, tnr = rng.choice(TRUE_RATES, (2, 40_000))
    low, high = mover(rng.binomial(m, tpr), m, rng.binomial(n, tnr), n)
    held = (low <= (tpr + tnr) / 2) & ((tpr + tnr) / 2 <= high)
    assert 0.94 < held.mean() < 0.97


@given(x=COUNT, y=COUNT, m=st.integers(1, 40), n=st.integers(1, 40))
def test_mover_holds_its_estimate_and_is_symmetric(x: int, y: int, m: int, n: int) -> None:
    x, y = min(x, m), min(y, n)
    low, high = mover(np.array(x), m, np.array(y), n)
    assert low + 1e-15 >= 0
    assert low <= (x / m + y / n) / 2 <= high <= 1 + 1e-15
    assert (low, high) == pytest.approx(mover(np.array(y), n, np.array(x), m))
    # Counting the wrong answers instead of the right ones mirrors it.
    assert (low, high) == pytest.approx([1 - b for b in mover(np.array(m - x), m, np.array(n - y), n)][::-1])


def test_mover_without_a_side_is_undefined() -> None:
    empty = wilson(0, 0)
    low, high = mover_balanced_accuracy(0.5, 0.3, 0.7, np.nan, *empty)
    assert np.isnan([low, high]).all()


# ------------------------------------------------------------------------------------------------ chance


def test_chance_at_20_and_20_is_that_of_29_heads_of_40() -> None:
    chance = chance_above(0.7, np.full(8192, 20), np.full(8192, 20))
    assert chance[0] == pytest.approx(stats.binom.sf(28, 40, 0.5))
    assert chance.sum() == pytest.approx(26.3, abs=0.1)


@given(m=st.integers(0, 25), n=st.integers(0, 25), threshold=st.sampled_from([0.5, 0.6, 0.7, 0.75]))
@settings(deadline=None)
def test_chance_is_the_count_of_coin_outcomes(m: int, n: int, threshold: float) -> None:
    chance = chance_above(threshold, [m, m], [n, n])
    if m == 0 or n == 0:
        assert np.isnan(chance).all()
        return
    # In whole numbers, so that a tie with the threshold is one: x/m + y/n > 2 t.
    percent = round(100 * threshold)
    ways = sum(
        stats.binom.pmf(x, m, 0.5) * stats.binom.pmf(y, n, 0.5)
        for x in range(m + 1)
        for y in range(n + 1)
        if 100 * (x * n + y * m) > 2 * percent * m * n
    )
    np.testing.assert_allclose(chance, ways, atol=1e-12)


def test_above_is_strict_whatever_the_rounding() -> None:
    x = np.arange(21)
    share = (x[:, None] / 20 + x / 20) / 2
    np.testing.assert_array_equal(above(share, 0.7), x[:, None] + x > 28)
    assert not above(np.nan, 0.7)
