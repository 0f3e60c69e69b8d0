"""The Pareto front and the ranking of a sweep's trials."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medsae_ray.sae.pareto import costs, pareto_front, ranking

# Few different values, so that there are ties in one figure and in all.
TRIALS = st.integers(0, 12).flatmap(
    lambda n: arrays(np.float64, (n, 4), elements=st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan, math.inf]))
)


def dominates(one, other):
    """By the definition, figure for figure."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(
        a < b for a, b in zip(one, other, strict=True)
    )


@given(TRIALS)
def test_no_member_is_dominated_and_every_other_is(costs):
    front = pareto_front(costs)
    usable = np.isfinite(costs).all(axis=1)
    assert not front[~usable].any()
    for i in np.flatnonzero(usable):
        beaten = any(dominates(costs[j], costs[i]) for j in np.flatnonzero(usable))
        by_a_member = any(dominates(costs[j], costs[i]) for j in np.flatnonzero(front))
        assert front[i] == (not beaten) == (not by_a_member)


@given(TRIALS, st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order(costs, random):
    order = list(range(len(costs)))
    random.shuffle(order)
    assert np.array_equal(pareto_front(costs[order]), pareto_front(costs)[order])


@given(TRIALS)
def test_ties_stay_together(costs):
    doubled = np.concatenate([costs, costs])
    front = pareto_front(doubled)
    assert np.array_equal(front[: len(costs)], pareto_front(costs))
    assert np.array_equal(front[: len(costs)], front[len(costs) :])


def test_fve_counts_upwards_and_the_others_downwards():
    told = [
        {"fve": 0.97, "l0": 40.0, "dead": 0.1, "entropy": 2.0},
        {"fve": 0.96, "l0": 40.0, "dead": 0.1, "entropy": 2.0},  # lower FVE alone
        {"fve": 0.97, "l0": 41.0, "dead": 0.1, "entropy": 2.0},  # higher L0 alone
        {"fve": 0.97, "l0": 40.0, "dead": 0.2, "entropy": 2.0},
        {"fve": 0.97, "l0": 40.0, "dead": 0.1, "entropy": 2.1},
        {"fve": 0.50, "l0": 1.0, "dead": 0.9, "entropy": 2.5},  # sparsest
        {"fve": math.nan, "l0": 0.0, "dead": 0.0, "entropy": 0.0},  # diverged
    ]
    assert pareto_front(costs(told)).tolist() == [True, False, False, False, False, True, False]


@pytest.mark.parametrize(
    ("selection", "order"),
    [([], []), ([2.0, 10.1, 1.0], [2, 0, 1]), ([2.0, 1.0, 2.0, 1.0], [1, 3, 0, 2])],
)
def test_ranked_by_selection_score_ties_in_their_order(selection, order):
    assert ranking(selection) == order


def test_what_is_undefined_ranks_last():
    assert ranking([math.nan, math.inf, 11.0]) == [2, 0, 1]
