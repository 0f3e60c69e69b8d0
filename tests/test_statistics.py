"""Single-vector statistics against NumPy, SciPy and scikit-learn, textbook DeLong and a bootstrap."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from medsae_ray.statistics import (
    auroc,
    auroc_interval,
    bootstrap_by_patient,
    clustered_delong,
    clustered_variance,
    entropy,
    pearson,
)


def kernel_delong(score: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """DeLong, DeLong & Clarke-Pearson (1988) written out: every positive against every negative."""
    x, y = score[positive][:, None], score[~positive][None, :]
    psi = (x > y) + 0.5 * (x == y)
    return psi.mean(), psi.mean(1).var(ddof=1) / x.size + psi.mean(0).var(ddof=1) / y.size


def kernel_obuchowski(score: np.ndarray, positive: np.ndarray, patient: np.ndarray) -> float:
    """Obuchowski (1997), equations written out: a loop over patients, every pair of images."""
    x, y = np.flatnonzero(positive), np.flatnonzero(~positive)
    psi = (score[x][:, None] > score[y]) + 0.5 * (score[x][:, None] == score[y])
    area, m, n = psi.mean(), len(x), len(y)
    v10, v01 = psi.mean(1), psi.mean(0)
    patients = np.unique(patient)
    s10 = s01 = s11 = 0.0
    i10 = i01 = 0
    for one in patients:
        own_x, own_y = patient[x] == one, patient[y] == one
        i10, i01 = i10 + own_x.any(), i01 + own_y.any()
        dx, dy = v10[own_x].sum() - own_x.sum() * area, v01[own_y].sum() - own_y.sum() * area
        s10, s01, s11 = s10 + dx * dx, s01 + dy * dy, s11 + dx * dy
    i = len(patients)
    s10, s01, s11 = s10 * i10 / ((i10 - 1) * m), s01 * i01 / ((i01 - 1) * n), s11 * i / (i - 1)
    return s10 / m + s01 / n + 2 * s11 / (m * n)


def sample(seed: int, n: int = 120, patients: int = 40, tied: bool = False) -> tuple[np.ndarray, ...]:
    """Scores that share a part within a patient, labels they follow, and patients."""
    rng = np.random.default_rng(seed)
    patient = rng.integers(0, patients, n)
    score = rng.normal(size=n) + rng.normal(size=patients)[patient]
    positive = score + rng.normal(size=n) * 2 > rng.normal()
    positive[:2] = True, False
    return (np.maximum(np.round(score), 0) if tied else score), positive, patient


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e8])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_pearson_is_numpys(scale: float, offset: float) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50) * scale + offset * scale, rng.random(50) < 0.3
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e20, -3.3])
def test_pearson_of_a_constant_is_undefined(constant: float) -> None:
    varying = np.random.default_rng(0).normal(size=37)
    assert np.isnan(pearson(np.full(37, constant), varying))
    assert np.isnan(pearson(varying, np.full(37, constant)))
    assert np.isnan(pearson([], []))
    assert pearson([0.1, 0.1, np.nextafter(0.1, 1)], [0, 0, 1]) == pytest.approx(1.0)


def test_entropy_is_scipys_over_the_defined_labels() -> None:
    r = np.random.default_rng(0).uniform(-1, 1, (30, 14))
    np.testing.assert_allclose(entropy(r), stats.entropy(np.abs(r), axis=1), atol=1e-12)
    gappy = np.insert(r, [0, 3, 14], np.nan, axis=1)
    np.testing.assert_allclose(entropy(gappy), entropy(r), atol=1e-12)
    assert entropy(np.ones(14)) == pytest.approx(np.log(14))
    assert entropy([0.3, 0.0, np.nan]) == 0.0


def test_entropy_without_anything_to_normalise_is_undefined() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(entropy([[np.nan, np.nan], [0.0, 0.0], [0.0, np.nan]])).all()


@pytest.mark.parametrize(
    ("n_labels", "published", "spread"), [(14, 2.37, 0.09), (12, 2.22, 0.10), (8, 1.82, 0.12)]
)
def test_entropy_of_independent_noise_is_the_known_floor(
    n_labels: int, published: float, spread: float
) -> None:
    h = entropy(np.random.default_rng(0).normal(size=(20_000, n_labels)))
    assert h.mean() == pytest.approx(published, abs=0.01)
    assert h.std() == pytest.approx(spread, abs=0.02)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None)
def test_auroc_is_scikit_learns_with_ties(pairs: list[tuple[int, bool]]) -> None:
    score, positive = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    if positive.all() or not positive.any():
        assert np.isnan(auroc(score, positive))
        assert np.isnan(clustered_delong(score, positive, np.arange(len(score))).low)
    else:
        assert auroc(score, positive) == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
        assert auroc(-score, positive) == pytest.approx(1 - auroc(score, positive), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_one_image_a_patient_is_ordinary_delong(seed: int) -> None:
    score, positive, _ = sample(seed, tied=seed % 2 == 1)
    expected, variance = kernel_delong(score, positive)
    # Obuchowski's s11 adds 2·Σ X·Y = 0 for a patient with one image.
    got = clustered_delong(score, positive, np.arange(len(score)))
    assert (got.auroc, got.se**2) == pytest.approx((expected, variance), rel=1e-9)
    assert 0 <= got.low < got.auroc < got.high <= 1


@pytest.mark.parametrize("seed", range(20))
def test_clustered_delong_is_obuchowskis_and_near_a_patient_bootstrap(seed: int) -> None:
    score, positive, patient = sample(seed, n=400, patients=150, tied=seed % 2 == 1)
    got = clustered_delong(score, positive, patient)
    assert got.se**2 == pytest.approx(kernel_obuchowski(score, positive, patient), rel=1e-9)
    boot = bootstrap_by_patient(score, positive, patient, n_replicates=1000, seed=seed)
    assert boot.n_replicates == 1000
    # 1,000 replicates know a standard error to ± 2.2 %.
    assert got.se == pytest.approx(boot.se, rel=0.15)
    assert (got.low, got.high) == pytest.approx((boot.low, boot.high), abs=0.02)


def test_variance_of_duplicated_images_is_not_fooled() -> None:
    score, positive, _ = sample(3)
    once = clustered_delong(score, positive, np.arange(120))
    thrice = clustered_delong(np.tile(score, 3), np.tile(positive, 3), np.tile(np.arange(120), 3))
    assert thrice.auroc == pytest.approx(once.auroc)
    assert thrice.se == pytest.approx(once.se, rel=1e-9)


def test_bootstrap_is_seeded_and_weighs_patients_as_repeats() -> None:
    score, positive, patient = sample(0, tied=True)
    first, same = (bootstrap_by_patient(score, positive, patient, n_replicates=50, seed=4) for _ in range(2))
    assert first == same
    rng = np.random.default_rng(4)
    ids = np.unique(patient)
    areas = []
    for _ in range(50):
        drawn = ids[rng.integers(len(ids), size=len(ids))]
        rows = np.concatenate([np.flatnonzero(patient == one) for one in drawn])
        areas.append(roc_auc_score(positive[rows], score[rows]))
    assert first.se == pytest.approx(np.std(areas, ddof=1), rel=1e-9)
    assert np.isnan(bootstrap_by_patient(score, np.ones(120, bool), patient, n_replicates=5).se)


@pytest.mark.parametrize("k", [1, 10, 50])
def test_perfect_separation_has_clopper_pearsons_bound(k: int) -> None:
    score, positive = np.arange(k + 100) >= 100, np.arange(k + 100) >= 100
    got = clustered_delong(score, positive, np.arange(k + 100))
    bound = stats.binomtest(k, k).proportion_ci(0.95, "exact").low
    assert (got.auroc, got.low, got.high) == (1.0, pytest.approx(bound), 1.0)
    against = clustered_delong(~score, positive, np.arange(k + 100))
    assert (against.auroc, against.low, against.high) == (0.0, 0.0, pytest.approx(1 - bound))


def test_a_constant_score_has_a_wide_interval_not_nan() -> None:
    positive = np.arange(40) < 10
    got = clustered_delong(np.zeros(40), positive, np.arange(40))
    assert got.auroc == 0.5
    assert got.se == 0.0
    assert got.low == pytest.approx(0.5 * 0.025**0.1)
    assert got.high == pytest.approx(1 - got.low)


def test_one_patient_on_a_side_has_no_variance_but_an_interval() -> None:
    score, positive, patient = (
        np.arange(6.0),
        np.array([0, 1, 0, 1, 0, 1], bool),
        np.array([1, 0, 2, 0, 3, 0]),
    )
    got = clustered_delong(score, positive, patient)
    assert np.isnan(got.se)
    assert 0 < got.low < got.auroc < got.high < 1


def test_interval_is_undefined_only_with_its_area() -> None:
    area = np.array([np.nan, 0.0, 0.3, 0.5, 1.0])[:, None]
    variance = np.array([0.0, 0.01, np.nan])[None, :]
    low, high = auroc_interval(area, variance, 12)
    assert np.isnan(low[0]).all()
    assert np.isnan(high[0]).all()
    assert ((low[1:] >= 0) & (low[1:] <= area[1:]) & (area[1:] <= high[1:]) & (high[1:] <= 1)).all()
    assert np.isnan(clustered_variance(0.0, 1.0, 0.0, 3, 5, 1, 5, 5))


def test_interval_covers_near_one() -> None:
    # True AUROC 0.95 of clustered normal scores, 50 positives: see `auroc_interval`'s docstring.
    rng = np.random.default_rng(0)
    shift, hits = stats.norm.ppf(0.95) * np.sqrt(2), 0
    positive = np.arange(250) < 50
    for _ in range(400):
        patient = rng.integers(0, 125, 250)
        score = np.sqrt(0.5) * (rng.normal(size=250) + rng.normal(size=125)[patient]) + shift * positive
        got = clustered_delong(score, positive, patient)
        hits += got.low <= 0.95 <= got.high
    assert hits / 400 > 0.90


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        auroc([0.1, np.nan], [True, False])
    with pytest.raises(ValueError, match="one length"):
        clustered_delong([0.1, 0.2], [True], [0])
