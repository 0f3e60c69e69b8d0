"""The trials of a sweep: what is tried, under which names, and what may train together."""

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsae_ray.config import FitSettings, SweepSettings
from medsae_ray.errors import InputError
from medsae_ray.sae.trials import group_name, groups, short, trial_name, trials

FIT = FitSettings(learning_rate=1e-3, expansion=8)


def names(fit=FIT, **sweep):
    return [trial_name(trial) for trial in trials(fit, SweepSettings(**sweep))]


def test_names_tell_what_is_tried():
    found = names(
        architecture=["relu", "topk", "jumprelu"], sparsity=[3e-2], l0=[32], learning_rate=[1e-3, 2.5e-4]
    )
    assert found == [
        "relu-x8-l3e-2-lr1e-3-s0", "relu-x8-l3e-2-lr2.5e-4-s0",
        "topk-x8-k32-lr1e-3-s0", "topk-x8-k32-lr2.5e-4-s0",
        "jumprelu-x8-l3e-2-k32-lr1e-3-s0", "jumprelu-x8-l3e-2-k32-lr2.5e-4-s0",
    ]  # fmt: skip


def test_a_grid_multiplies_only_what_an_architecture_has():
    sparsity, l0, seeds = [1e-3, 1e-2, 1e-1], [16, 32], [0, 1]
    found = trials(
        FIT,
        SweepSettings(
            architecture=["relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"],
            sparsity=sparsity, l0=l0, seeds=seeds,
        ),
    )  # fmt: skip
    count = {name: sum(t.architecture == name for t in found) for name in {t.architecture for t in found}}
    assert count == {
        "relu": 6, "gated": 6, "jumprelu": 12, "topk": 4, "batchtopk": 4, "matryoshka": 4
    }  # fmt: skip
    assert {t.sparsity for t in found if t.architecture == "topk"} == {FIT.sparsity}
    assert {t.l0 for t in found if t.architecture == "relu"} == {None}


def test_what_is_not_searched_is_as_in_fit():
    fit = FitSettings(architecture="batchtopk", epochs=7, batch_size=33, normalisation="dim")
    (one, other) = trials(fit, SweepSettings(seeds=[4, 5]))
    # The default k is written out.
    assert one == dataclasses.replace(fit, seed=4, l0=32)
    assert other == dataclasses.replace(one, seed=5)


def test_repetitions_are_tried_once():
    assert names(seeds=[1, 1, 2]) == ["relu-x8-l3e-4-lr1e-3-s1", "relu-x8-l3e-4-lr1e-3-s2"]


def test_nothing_to_search_is_told():
    with pytest.raises(InputError, match=r"nothing to search: .*sweep.sparsity"):
        trials(FIT, SweepSettings())


def test_random_draws_are_seeded_log_uniform_and_within_their_bounds():
    sweep = SweepSettings(search="random", trials=400, sparsity=[1e-4, 1.0], expansion=[4, 8], seed=3)
    found = trials(FIT, sweep)
    assert found == trials(FIT, sweep)
    assert found != trials(FIT, dataclasses.replace(sweep, seed=4))
    logs = [math.log10(trial.sparsity) for trial in found]
    assert -4 <= min(logs) < -3.8 < -0.2 < max(logs) <= 0
    assert abs(sum(logs) / len(logs) + 2) < 4 * 4 / math.sqrt(12 * len(logs))
    assert abs(sum(t.expansion == 4 for t in found) / len(found) - 0.5) < 0.1


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]),
            st.floats(0, 1e3), st.integers(1, 4096), st.integers(1, 64), st.floats(1e-9, 1),
            st.integers(0, 9),
        ),
        max_size=8,
    )
)  # fmt: skip
def test_names_are_unique_and_fit_for_a_file(drawn):
    """Two trials have one name only where they are one training."""
    found = {}
    for architecture, sparsity, l0, expansion, rate, seed in drawn:
        has_both = architecture == "jumprelu"
        name = trial_name(
            FitSettings(
                architecture=architecture, sparsity=sparsity, l0=l0, expansion=expansion,
                learning_rate=rate, seed=seed,
            )
        )  # fmt: skip
        assert re.fullmatch(r"[a-z0-9.-]+", name)
        sparse = sparsity if has_both or architecture in ("relu", "gated") else None
        k = None if architecture in ("relu", "gated") else l0
        told = architecture, sparse, k, expansion, rate, seed
        assert found.setdefault(name, told) == told


@given(st.floats(0, 1e12))
def test_a_number_told_briefly_is_the_number(value):
    assert float(short(value)) == value


@pytest.mark.parametrize(
    ("value", "told"),
    [(0, "0"), (0.03, "3e-2"), (7e-6, "7e-6"), (1.0, "1"), (0.5, "5e-1"), (250, "250"), (3.16e-3, "3.16e-3")],
)
def test_a_number_is_told_briefly(value, told):
    assert short(value) == told


def test_lambda_paths_of_relu_train_together():
    found = trials(
        FIT,
        SweepSettings(architecture=["relu", "gated"], sparsity=[1e-3, 1e-2, 1e-1], seeds=[0, 1]),
    )
    grouped = groups(found)
    assert sorted(map(len, grouped)) == [1] * 6 + [3, 3]
    assert [one for group in grouped for one in group if one.architecture == "relu"] == [
        t for seed in (0, 1) for t in found if t.architecture == "relu" and t.seed == seed
    ]
    assert sorted(map(trial_name, found)) == sorted(trial_name(t) for group in grouped for t in group)
    assert group_name(grouped[0]) == "relu-x8-l1e-3to1e-1-lr1e-3-s0"
    assert len({group_name(group) for group in grouped}) == len(grouped)
