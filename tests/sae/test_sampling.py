import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from medsae_ray.sae.sampling import epoch_permutation, global_batches, rank_slice


def test_permutation_depends_on_seed_and_epoch_alone():
    first = epoch_permutation(1000, seed=3, epoch=4)
    assert np.array_equal(first, epoch_permutation(1000, 3, 4))
    assert first.dtype == np.int64
    for other in (
        epoch_permutation(1000, 3, 5),
        epoch_permutation(1000, 4, 4),
        epoch_permutation(1000, 4, 3),
    ):
        assert not np.array_equal(first, other)


@given(n=st.integers(0, 500), size=st.integers(1, 90), world=st.integers(1, 7), seed=st.integers(0, 99))
def test_each_row_once_whatever_the_number_of_workers(n, size, world, seed):
    batches = list(global_batches(n, size, seed, epoch=1))
    assert all(len(batch) == size for batch in batches[:-1])
    for batch in batches:
        slices = [rank_slice(batch, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(slices), batch)
        sizes = [len(part) for part in slices]
        assert max(sizes) - min(sizes) <= 1
    rows = np.concatenate(batches) if batches else np.empty(0, int)
    assert np.array_equal(np.sort(rows), np.arange(n))
