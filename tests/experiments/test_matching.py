"""The setting that gives a wanted figure, from laws of which it is known."""

import warnings
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medsae_ray.experiments.matching import is_matched, setting_for


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-40, 30), min_size=2, max_size=6, unique=True),
    st.floats(0.1, 3).flatmap(lambda size: st.sampled_from([size, -size])),
    st.floats(0.1, 100),
    st.floats(0, 1),
    st.randoms(use_true_random=False),
)
def test_a_power_law_is_recovered_within_and_beyond_what_was_tried(
    places: list[int], power: float, factor: float, where: float, random: Random
) -> None:
    tried = [float(np.exp(place / 4)) for place in places]
    # From a factor e below the least setting to a factor e above the largest, in any order.
    low, high = np.log(min(tried)) - 1, np.log(max(tried)) + 1
    target = float(np.exp(low + where * (high - low)))
    wanted = factor * target**power
    figures = [factor * value**power for value in tried]
    pairs = list(zip(tried, figures, strict=True))
    random.shuffle(pairs)
    assume(min(figures) > wanted / 999)
    assert setting_for(*zip(*pairs, strict=True), wanted) == pytest.approx(target, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-40, 30), st.floats(0, 1e4)), min_size=2, max_size=6), st.data())
def test_monotone_figures_give_a_setting_between_the_neighbours_of_the_goal(
    pairs: list[tuple[int, float]], data: st.DataObject
) -> None:
    tried = np.exp(np.unique([place for place, _ in pairs]) / 4)
    figures = np.sort([figure for _, figure in pairs])[: len(tried)]
    assume(len(tried) > 1 and figures[-1] > 1e-3)
    wanted = data.draw(st.floats(max(figures[0], 1e-3), figures[-1]))
    if data.draw(st.booleans()):
        figures = figures[::-1]
    found = setting_for(tried.tolist(), figures.tolist(), wanted)
    # The neighbours that have not the goal itself: where several have it, any of them will do.
    first, second = (figures < wanted, figures > wanted)
    if figures[0] > figures[-1]:
        first, second = second, first
    low = tried[first].max(initial=tried[0])
    high = tried[second].min(initial=tried[-1])
    assert low * (1 - 1e-9) <= found <= high * (1 + 1e-9)


def test_figures_that_turn_give_the_last_crossing() -> None:
    # Crosses 10 between 1 and 2, and again between 4 and 8.
    found = setting_for([1, 2, 4, 8], [20, 5, 5, 20], 10)
    assert found == pytest.approx(4 * 2**0.5)
    assert setting_for([8, 1, 4, 2], [20, 20, 5, 5], 10) == pytest.approx(found)


@pytest.mark.parametrize("wanted", [1e-3, 1.0, 5.0, 1e6])
def test_a_flat_end_gives_a_setting_near_what_was_tried(wanted: float) -> None:
    for figures in ([5.0, 5.0, 5.0], [5.0, 5.0 * (1 + 1e-12), 5.0 * (1 + 2e-12)], [9.0, 5.0, 5.0 - 1e-9]):
        found = setting_for([0.01, 0.1, 1], figures, wanted)
        assert 0.01 * np.exp(-2.001) <= found <= np.exp(2.001)


def test_a_goal_beyond_the_end_goes_on_along_the_nearer_end() -> None:
    # log-log slopes: -1 from 1 to 10, -2 from 10 to 100.
    tried, figures = [1, 10, 100], [1000, 100, 1]
    assert setting_for(tried, figures, 2000) == pytest.approx(0.5)
    assert setting_for(tried, figures, 0.25) == pytest.approx(200)
    assert setting_for(tried, figures, 1e-6) == pytest.approx(300), "at most a factor of 3 beyond"


def test_settings_at_which_no_neuron_is_left_still_give_one_between() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0.03 < setting_for([0.01, 0.03, 0.1], [100, 50, 0], 32) < 0.1
        assert 0.01 * np.exp(-2) <= setting_for([0.01, 0.03, 0.1], [5, 0, 0], 32) < 0.01
        assert 0.01 * np.exp(-2) <= setting_for([0.01, 0.1], [0, 0], 32) <= 0.1


def test_a_match_is_relative_to_what_is_wanted_and_includes_its_ends() -> None:
    assert is_matched(36, 32, 0.125)
    assert is_matched(28, 32, 0.125)
    assert not is_matched(36.1, 32, 0.125)
    assert not is_matched(27.9, 32, 0.125)
    assert not is_matched(float("nan"), 32, 0.125)
