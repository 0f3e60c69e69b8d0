import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import csr_array

from medsae_ray.errors import InputError
from medsae_ray.sae.base import SAEConfig
from medsae_ray.sae.evaluate import (
    EvaluationSums,
    LabelSums,
    evaluate,
    label_entropy,
    selection_score,
)
from medsae_ray.sae.relu import ReLUSAE


def sae_and_x(n=120, d=6, m=30, offset=0.0, norm="unit", reduction="sum"):
    sae = ReLUSAE(SAEConfig(d, m, 0.2, norm, reduction), centre=torch.full((d,), offset), seed=1)
    with torch.no_grad():
        sae.b_enc -= 0.1
        sae.b_enc[:5] -= 100  # dead
    return sae, torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + offset


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("norm", ["unit", "weighted"])
def test_equals_numpy(norm, reduction):
    sae, x = sae_and_x(norm=norm, reduction=reduction)
    ours = evaluate(sae, x, batch_size=17)
    z, rebuilt = sae.encode(x).detach().double().numpy(), sae(x).detach().double().numpy()
    rows = x.double().numpy()
    fve = 1 - np.sum((rows - rebuilt) ** 2) / np.sum((rows - rows.mean(0)) ** 2)
    assert ours.fve == pytest.approx(fve, abs=1e-6)
    assert ours.l0 == pytest.approx((z > 0).sum(1).mean())
    assert ours.dead == np.mean((z > 0).sum(0) == 0) >= 5 / 30
    np.testing.assert_allclose(ours.density, (z > 0).mean(0))
    assert ours.density_histogram.sum() == (z > 0).any(0).sum()
    with torch.no_grad():
        parts = sae.loss(x)
    for name in ("reconstruction", "sparsity", "loss"):
        assert getattr(ours, name) == pytest.approx(float(getattr(parts, name)), rel=1e-5)
    assert math.isnan(ours.entropy)


def test_fve_is_one_ratio_of_sums_even_far_from_the_origin():
    sae, x = sae_and_x(offset=300.0)
    # float32 rounds a row's reconstruction differently in another batch: each is held to its own.
    for batch_size in (1000, 1):
        rows, rebuilt = x.double(), torch.cat([sae(batch).detach() for batch in x.split(batch_size)]).double()
        expected = 1 - float((rows - rebuilt).square().sum() / (rows - rows.mean(0)).square().sum())
        assert evaluate(sae, x, batch_size=batch_size).fve == pytest.approx(expected, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 120), max_size=5), order=st.randoms())
def test_merging_in_any_order_and_split_gives_the_same(cuts, order):
    sae, x = sae_and_x()
    y, known = labels_for(x)
    parts = []
    for rows in np.split(np.arange(len(x)), sorted(cuts)):
        sums, labels = EvaluationSums(sae), LabelSums(30, y.shape[1])
        with torch.no_grad():
            z = sae.encode(x[rows])
        sums.update(sae, x[rows], z)
        labels.update(z, y[rows], known[rows])
        parts.append((sums, labels))
    order.shuffle(parts)
    sums, labels = EvaluationSums(sae), LabelSums(30, y.shape[1])
    for part, label_part in parts:
        sums.merge(part)
        labels.merge(label_part)
    ours, whole = sums.finish(labels.entropy()), evaluate(sae, x, labels=(y, known))
    assert np.array_equal(ours.n_firing, whole.n_firing)
    for name in ("fve", "l0", "reconstruction", "sparsity", "loss", "entropy"):
        assert getattr(ours, name) == pytest.approx(getattr(whole, name), rel=1e-5)


def labels_for(x, n_labels=5, seed=0):
    """Labels with unknown entries; one constant, one never known, and unknown values that must not matter."""
    rng = np.random.default_rng(seed)
    y = (x.numpy() @ rng.normal(size=(x.shape[1], n_labels)) + rng.normal(size=(len(x), n_labels)) > 0) * 1.0
    y[:, 1] = 1.0
    known = rng.uniform(size=y.shape) < 0.7
    known[:, 2] = False
    y[~known] = np.nan
    return torch.from_numpy(y), torch.from_numpy(known)


def entropy_by_scipy(z, y, known, min_firing):
    entropies = []
    for neuron in z.T:
        strengths = []
        for label in range(y.shape[1]):
            rows = known[:, label]
            a, b = neuron[rows].astype(float), y[rows, label]
            if len(a) and np.ptp(a) > 0 and np.ptp(b) > 0:
                strengths.append(abs(stats.pearsonr(a, b)[0]))
        if (neuron > 0).sum() >= min_firing and strengths:
            entropies.append(stats.entropy(strengths))
    return np.mean(entropies)


@pytest.mark.parametrize("min_firing", [1, 20])
def test_label_entropy_equals_scipy(min_firing):
    sae, x = sae_and_x()
    y, known = labels_for(x)
    z = sae.encode(x).detach()
    z[:, 7] = 1.3  # constant: no r at all, although it fires everywhere
    z[:, 8] = 100 + 1e-2 * z[:, 9]  # small spread on a large mean
    expected = entropy_by_scipy(z.numpy(), y.numpy(), known.numpy(), min_firing)
    dense = label_entropy(z, y, known, min_firing, batch_size=50)
    sparse = label_entropy(csr_array(z.numpy()), y, known, min_firing, batch_size=50)
    assert dense == pytest.approx(expected, abs=1e-6)
    assert sparse == pytest.approx(dense, abs=1e-12)


def test_label_entropy_without_anything_defined_is_nan():
    z, y = torch.rand(10, 4), torch.ones(10, 3)
    assert math.isnan(label_entropy(z, y, torch.ones(10, 3, dtype=torch.bool)))
    assert math.isnan(label_entropy(z, y, torch.zeros(10, 3, dtype=torch.bool)))
    assert math.isnan(label_entropy(z, torch.rand(10, 3), torch.ones(10, 3, dtype=torch.bool), min_firing=11))


def test_selection_score():
    # (entropy, FVE), from best to worst.
    ranked = [(1.9, 0.96), (2.4, 0.99), (0.1, 0.95), (0.1, 0.5), (2.0, -3.0), (math.nan, 0.99)]
    scores = [selection_score(*figures) for figures in ranked]
    assert scores == sorted(scores)
    assert len(set(scores)) == len(scores)
    assert scores[2] == pytest.approx(10.05)
    assert selection_score(1.0, math.nan) == math.inf
    assert selection_score(1.9, 0.85, floor=0.8) == 1.9


def test_empty_split_constant_split_and_wrong_width():
    sae, x = sae_and_x()
    with pytest.raises(InputError, match="empty"):
        evaluate(sae, x[:0])
    with pytest.raises(InputError, match="6 dimensions but these have 4"):
        evaluate(sae, x[:, :4])
    assert math.isnan(evaluate(sae, torch.ones(3, 6)).fve)
