"""What workers exchange gives each the answer of one worker that sees the whole global batch."""

import numpy as np
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from medsae_ray.sae.sampling import rank_slice
from medsae_ray.sae.topk import smallest_selected
from medsae_ray.sae.workers import ALONE

# `on_workers` keeps nothing between two examples.
SHARED = [HealthCheck.function_scoped_fixture]


def mine(whole, workers):
    """The worker's slice of a global batch."""
    return whole[rank_slice(np.arange(len(whole)), workers.rank, workers.world)]


@settings(max_examples=30, deadline=None, suppress_health_check=SHARED)
@given(world=st.integers(2, 5), n=st.integers(1, 12), width=st.integers(1, 3), seed=st.integers(0, 1000))
def test_concatenated_slices_are_the_global_batch(on_workers, world, n, width, seed):
    whole = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    for found in on_workers(world, lambda workers: workers.concatenate(mine(whole, workers), n)):
        assert torch.equal(found, whole)
    assert torch.equal(ALONE.concatenate(whole, n), whole)


@settings(max_examples=80, deadline=None, suppress_health_check=SHARED)
@given(
    world=st.integers(2, 4),
    # Whole numbers of a small range: many ties, and often fewer above 0 than are asked for.
    rows=st.integers(1, 4).flatmap(
        lambda m: st.lists(st.lists(st.integers(-3, 4), min_size=m, max_size=m), min_size=1, max_size=9)
    ),
    n_selected=st.integers(1, 40),
)
@example(world=2, rows=[[1, 2], [3, 2]], n_selected=4)
def test_the_smallest_selected_is_that_of_the_global_batch(on_workers, world, rows, n_selected):
    pre = torch.tensor(rows, dtype=torch.float32)
    above = sorted((value for row in rows for value in row if value > 0), reverse=True)
    expected = above[n_selected - 1] if len(above) >= n_selected else 0
    assert smallest_selected(pre, n_selected, ALONE) == expected
    for found in on_workers(
        world, lambda workers: smallest_selected(mine(pre, workers), n_selected, workers)
    ):
        assert found == expected
