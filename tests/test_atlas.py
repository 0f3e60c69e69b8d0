"""What a neuron's card shows, against one-liners of SciPy, scikit-learn and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import pearsonr
from sklearn.metrics.pairwise import cosine_similarity

from medsae_ray.atlas import N_BINS, correlations, decoder_plane, directions, histogram, leaf_order, nearest


def sparse(n: int, m: int, density: float, seed: int = 0) -> csr_array:
    rng = np.random.default_rng(seed)
    return csr_array((rng.exponential(size=(n, m)) * (rng.random((n, m)) < density)).astype(np.float32))


def test_correlations_are_scipys():
    rng = np.random.default_rng(1)
    values = sparse(200, 6, 0.3)
    y = np.column_stack([rng.normal(60, 15, 200), rng.random(200) < 0.3, np.ones(200)])
    known = rng.random((200, 3)) < 0.8
    r = correlations(values, y, known)
    dense = values.toarray().astype(np.float64)
    for neuron in range(6):
        for column in range(2):
            rows = known[:, column]
            assert r[neuron, column] == pytest.approx(pearsonr(dense[rows, neuron], y[rows, column])[0])
    assert np.isnan(r[:, 2]).all()
    assert np.isnan(correlations(csr_array((200, 1), dtype=np.float32), y, known)).all()


def test_nearest_neighbours_are_scikit_learns():
    unit = directions(np.random.default_rng(2).normal(size=(40, 8)).astype(np.float32))
    living = np.arange(40) % 5 != 0
    neighbours, cosines = nearest(unit, living, 4)
    similarity = cosine_similarity(unit)
    np.fill_diagonal(similarity, -2)
    similarity[:, ~living] = -2
    for neuron in range(40):
        wanted = np.argsort(-similarity[neuron])[:4] if living[neuron] else []
        assert neighbours[neuron].tolist() == list(wanted)
        np.testing.assert_allclose(cosines[neuron], similarity[neuron, neighbours[neuron]], atol=1e-6)


def test_histogram_is_numpys():
    values = sparse(300, 5, 0.4, seed=3)
    got = histogram(values)
    for neuron in range(5):
        of = values.toarray()[:, neuron].astype(np.float64)
        wanted = np.histogram(of[of > 0], bins=N_BINS, range=(0, of.max()))[0]
        assert got[neuron].sum() == (of > 0).sum()
        assert np.abs(got[neuron] - wanted).sum() <= 2  # A value on an edge may fall on either side of it.


def test_the_plane_is_the_same_twice_and_leaves_the_dead_out():
    unit = directions(np.random.default_rng(4).normal(size=(60, 16)).astype(np.float32))
    living = np.arange(60) != 3
    first, second = (decoder_plane(unit, living, seed=0).xy for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.isnan(first[3]).all()
    assert np.isfinite(first[living]).all()
    few = decoder_plane(unit, np.arange(60) < 3)
    assert few.kl_divergence is None
    assert np.isfinite(few.xy[:3]).all()


def test_leaves_number_the_living_neurons_and_keep_alike_ones_together():
    r = np.repeat(np.eye(3), 5, axis=0) + np.random.default_rng(5).normal(0, 0.01, (15, 3))
    r[2] = np.nan
    leaves = leaf_order(r, np.arange(15) != 7, ("a", "b", "c"))
    assert leaves.labels == ("a", "b", "c")
    assert leaves.leaf[[2, 7]].tolist() == [-1, -1]
    kept = np.setdiff1d(np.arange(15), [2, 7])
    assert sorted(leaves.leaf[kept].tolist()) == list(range(13))
    groups = (kept // 5)[np.argsort(leaves.leaf[kept])]
    assert np.count_nonzero(np.diff(groups)) == 2
