"""Correlation, entropy, AUROC and their intervals for one score vector: the plain reference forms.

measure.py computes the same quantities for thousands of neurons at once and is tested against these. The
statistics of yes/no answers (detections.py) take arrays, element by element.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, expit, logit, ndtri, stdtrit
from scipy.stats import binom, false_discovery_control, hypergeom, rankdata

Floats = NDArray[np.float64]


class Auroc(NamedTuple):
    """An AUROC in [0, 1], its standard error (NaN where no variance exists) and 95 % interval."""

    auroc: float
    se: float
    low: float
    high: float
    n_positive: int
    n_negative: int


class Bootstrap(NamedTuple):
    """Standard error and 95 % percentile interval over the replicates in which the figure is defined."""

    se: float
    low: float
    high: float
    n_replicates: int


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r of two vectors [n]; NaN where either is constant or empty, which is decided exactly.

    A constant is found by comparing values: its computed variance is often a rounding error above 0.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.size == 0 or np.all(a == a[0]) or np.all(b == b[0]):
        return np.nan
    # Differences of neighbouring floats are exact, their mean is not: subtract a value before the mean.
    a, b = a - a[0], b - b[0]
    a, b = a - a.mean(), b - b.mean()
    # Scaled, the squares of tiny and huge deviations stay in range.
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))


def entropy(r: ArrayLike) -> Floats:
    """Entropy in nats of normalised |r| over the last axis: p = |r| / Σ|r|, H = −Σ p ln p
    (MedSAE, arXiv 2510.26411).

    An undefined r (NaN) never enters the sum. H is in [0, ln(number of defined r)]; it is NaN where no r is
    defined, and where every defined r is 0, because nothing can then be normalised.
    """
    magnitude = np.abs(np.asarray(r, np.float64))
    total = np.nansum(magnitude, axis=-1, keepdims=True)
    p = np.divide(magnitude, total, out=np.full_like(magnitude, np.nan), where=total > 0)
    terms = p * np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.where(total[..., 0] > 0, np.abs(np.nansum(terms, axis=-1)), np.nan)


def auroc(score: ArrayLike, positive: ArrayLike) -> float:
    """Exact area under the ROC curve of score [n] against positive [n] bool, ties counted half.

    NaN where either class is absent. Raises ValueError where a score is not a number.
    """
    values, is_positive = _scores(score, positive)
    m, n = int(is_positive.sum()), int((~is_positive).sum())
    if m == 0 or n == 0:
        return np.nan
    return float((rankdata(values)[is_positive].sum() - m * (m + 1) / 2) / (m * n))


def clustered_delong(score: ArrayLike, positive: ArrayLike, cluster: ArrayLike) -> Auroc:
    """AUROC of score [n] with Obuchowski's variance for clustered data (Biometrics 53:567, 1997).

    `cluster` [n] names the patient of each image. With one image a patient this is DeLong's variance.
    The interval is that of `auroc_interval`; all is NaN only where either class is absent.
    Raises ValueError where a score is not a number.
    """
    values, is_positive = _scores(score, positive)
    _, code = np.unique(np.asarray(cluster), return_inverse=True)
    m, n = int(is_positive.sum()), int((~is_positive).sum())
    area = auroc(values, is_positive)
    if np.isnan(area):
        return Auroc(np.nan, np.nan, np.nan, np.nan, m, n)
    # Placements: the negatives below each positive, and the positives above each negative.
    mid = rankdata(values)
    below = mid[is_positive] - rankdata(values[is_positive])
    above = m - (mid[~is_positive] - rankdata(values[~is_positive]))
    n_clusters = int(code.max()) + 1
    m_k = np.bincount(code[is_positive], minlength=n_clusters)
    n_k = np.bincount(code[~is_positive], minlength=n_clusters)
    x_k = np.bincount(code[is_positive], below - n * area, n_clusters)
    y_k = np.bincount(code[~is_positive], above - m * area, n_clusters)
    i10, i01 = int(np.count_nonzero(m_k)), int(np.count_nonzero(n_k))
    variance = clustered_variance(x_k @ x_k, y_k @ y_k, x_k @ y_k, m, n, i10, i01, n_clusters)
    low, high = auroc_interval(area, variance, min(i10, i01))
    return Auroc(area, float(np.sqrt(variance)), float(low), float(high), m, n)


def clustered_variance(
    ss10: ArrayLike,
    ss01: ArrayLike,
    ss11: ArrayLike,
    m: ArrayLike,
    n: ArrayLike,
    i10: ArrayLike,
    i01: ArrayLike,
    i: ArrayLike,
) -> Floats:
    """Obuchowski's S10/m + S01/n + 2·S11/(m·n), element by element, from sums over clusters.

    `ss10`, `ss01`, `ss11`: sums of squares and products of the centred cluster sums, counted in images of
    the other class (n·(X_k − m_k·AUC) and m·(Y_k − n_k·AUC)). `m`, `n`: positives and negatives. `i10`,
    `i01`, `i`: clusters with a positive, with a negative, with either. NaN where i10 or i01 is below 2.
    """
    squares10, squares01, products11 = (np.asarray(a, np.float64) for a in (ss10, ss01, ss11))
    k10, k01, k = (np.asarray(a, np.float64) for a in (i10, i01, i))
    pairs = np.asarray(m, np.float64) * np.asarray(n, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = k10 / (k10 - 1) * squares10 + k01 / (k01 - 1) * squares01 + 2 * k / (k - 1) * products11
        # products11 can be negative, the sum cannot: k10/(k10−1) and k01/(k01−1) are at least k/(k−1).
        return np.where((k10 > 1) & (k01 > 1), np.maximum(total / pairs**2, 0.0), np.nan)


def auroc_interval(area: ArrayLike, variance: ArrayLike, n_clusters: ArrayLike) -> tuple[Floats, Floats]:
    """95 % interval (low, high) in [0, 1] of an AUROC, element by element; NaN only where the AUROC is.

    `n_clusters` is k, the number of patients of the rarer class. Wald on the logit scale with Student's t of
    k − 1 degrees of freedom: with clustered normal scores of true AUROC 0.98 it covers 91, 93 and 94 % at 20,
    50 and 150 positives, the plain Wald interval 80, 86 and 89 %.

    Where the variance is 0 or unknown (perfect separation, a silent neuron, k = 1) the exact bound of k
    successes out of k stands in: low = AUROC·q, high = 1 − (1 − AUROC)·q with q = 0.025^(1/k). At AUROC 1
    this is Clopper and Pearson's lower bound; elsewhere, what is left if a share 1 − q, unseen, ranks the
    other way.
    """
    a, v, k = (np.asarray(x, np.float64) for x in (area, variance, n_clusters))
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = stdtrit(k - 1, 0.975) * np.sqrt(v) / (a * (1 - a))
        wald = (v > 0) & (a > 0) & (a < 1)
        q = 0.025 ** (1 / np.maximum(k, 1))
        low = np.where(wald, expit(logit(a) - spread), a * q)
        high = np.where(wald, expit(logit(a) + spread), 1 - (1 - a) * q)
    return low, high


def bootstrap_by_patient(
    score: ArrayLike, positive: ArrayLike, patient: ArrayLike, *, n_replicates: int = 1000, seed: int = 0
) -> Bootstrap:
    """Bootstrap of the AUROC of score [n], drawing patients (not images) with replacement.

    Replicates without both classes have no AUROC and are left out; NaN where none has one.
    Raises ValueError where a score is not a number.
    """
    values, is_positive = _scores(score, positive)
    _, code = np.unique(np.asarray(patient), return_inverse=True)
    n_patients = int(code.max(initial=-1)) + 1
    order = np.argsort(values, kind="stable")
    ordered, is_positive, code = values[order], is_positive[order], code[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=np.nan) != 0)
    rng = np.random.default_rng(seed)
    areas = np.full(n_replicates, np.nan)
    for replicate in range(n_replicates if n_patients else 0):
        weight = np.bincount(rng.integers(n_patients, size=n_patients), minlength=n_patients)[code]
        up = np.add.reduceat(weight * is_positive, starts)
        down = np.add.reduceat(weight * ~is_positive, starts)
        pairs = int(up.sum()) * int(down.sum())
        if pairs:
            areas[replicate] = up @ (np.cumsum(down) - down / 2) / pairs
    defined = areas[~np.isnan(areas)]
    if defined.size == 0:
        return Bootstrap(np.nan, np.nan, np.nan, 0)
    low, high = np.quantile(defined, (0.025, 0.975))
    se = float(defined.std(ddof=1)) if defined.size > 1 else np.nan
    return Bootstrap(se, float(low), float(high), defined.size)


def wilson(successes: ArrayLike, n: ArrayLike) -> tuple[Floats, Floats]:
    """Wilson's 95 % score interval (low, high) of successes / n, element by element; NaN where n is 0.

    Wilson, JASA 22:209 (1927), without continuity correction.
    """
    x, total = np.asarray(successes, np.float64), np.asarray(n, np.float64)
    z2 = ndtri(0.975) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = (x + z2 / 2) / (total + z2)
        spread = np.sqrt(z2 * (x * (total - x) / total + z2 / 4)) / (total + z2)
    # At the ends the bounds are 0 and 1 exactly; rounding would leave a trace beyond them.
    low, high = np.maximum(centre - spread, 0.0), np.minimum(centre + spread, 1.0)
    return np.where((x == 0) & (total > 0), 0.0, low), np.where((x == total) & (total > 0), 1.0, high)


def clopper_pearson(successes: ArrayLike, n: ArrayLike) -> tuple[Floats, Floats]:
    """Clopper and Pearson's exact 95 % interval (low, high), element by element; NaN where n is 0."""
    x, total = np.asarray(successes, np.float64), np.asarray(n, np.float64)
    with np.errstate(invalid="ignore"):
        low = np.where(x > 0, betaincinv(x, total - x + 1, 0.025), 0.0)
        high = np.where(x < total, betaincinv(x + 1, total - x, 0.975), 1.0)
    return np.where(total > 0, low, np.nan), np.where(total > 0, high, np.nan)


def mover_balanced_accuracy(
    tpr: ArrayLike,
    tpr_low: ArrayLike,
    tpr_high: ArrayLike,
    tnr: ArrayLike,
    tnr_low: ArrayLike,
    tnr_high: ArrayLike,
) -> tuple[Floats, Floats]:
    """Interval (low, high) in [0, 1] of (TPR + TNR) / 2 from those of TPR and TNR, element by element.

    MOVER, the method of variance estimates recovery (Zou & Donner, Statistics in Medicine 27:1693, 2008):
    the two rates are independent, and each distance to a bound recovers a variance near that bound.
    """
    p, p_low, p_high = (np.asarray(a, np.float64) for a in (tpr, tpr_low, tpr_high))
    q, q_low, q_high = (np.asarray(a, np.float64) for a in (tnr, tnr_low, tnr_high))
    centre = (p + q) / 2
    return centre - np.hypot(p - p_low, q - q_low) / 2, centre + np.hypot(p_high - p, q_high - q) / 2


def fisher_greater(tp: ArrayLike, fn: ArrayLike, fp: ArrayLike, tn: ArrayLike) -> Floats:
    """One-sided p of Fisher's exact test that yes is commoner among positives, element by element.

    The chance, given both margins, of at least `tp` of the yeses falling on the positives; 1 for an empty
    table. Counts are whole numbers ≥ 0.
    """
    a, b, c, d = (np.asarray(x, np.int64) for x in (tp, fn, fp, tn))
    total = a + b + c + d
    p = hypergeom.sf(a - 1, np.maximum(total, 1), a + b, a + c)
    return np.where(total > 0, np.clip(p, 0.0, 1.0), 1.0)


def false_discovery(p: ArrayLike) -> Floats:
    """q-values of p [m] by Benjamini and Hochberg (1995); a NaN is no test and stays NaN, uncounted."""
    values = np.asarray(p, np.float64)
    q, tested = np.full(values.shape, np.nan), ~np.isnan(values)
    if tested.any():
        q[tested] = false_discovery_control(values[tested])
    return q


def above(share: ArrayLike, threshold: float) -> NDArray[np.bool_]:
    """Whether a share lies strictly above the threshold, element by element; never for NaN.

    A sum of two rates such as 13/20 and 15/20 may round to just above the 0.7 that it is.
    """
    return np.asarray(share, np.float64) > threshold + 1e-9


def chance_above(threshold: float, n_positive: ArrayLike, n_negative: ArrayLike) -> Floats:
    """Exact probability that a fair coin's answers have a balanced accuracy above `threshold`.

    Element by element, for n_positive and n_negative answers; NaN where either is 0. At 20 + 20 and 0.7 it is
    P(X ≥ 29 of 40) = 0.0032, 26 of 8,192 neurons.
    """
    m, n = np.broadcast_arrays(np.asarray(n_positive, np.int64), np.asarray(n_negative, np.int64))
    chance = np.full(m.shape, np.nan)
    for m_i, n_i in {*zip(m.ravel().tolist(), n.ravel().tolist(), strict=True)}:
        if m_i > 0 and n_i > 0:
            x, y = np.arange(m_i + 1), np.arange(n_i + 1)
            exceeds = above((x[:, None] / m_i + y / n_i) / 2, threshold)
            chance[(m == m_i) & (n == n_i)] = binom.pmf(x, m_i, 0.5) @ exceeds @ binom.pmf(y, n_i, 0.5)
    return chance


def _scores(score: ArrayLike, positive: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    values, is_positive = np.asarray(score, np.float64), np.asarray(positive, bool)
    if values.shape != is_positive.shape or values.ndim != 1:
        raise ValueError(
            f"score {values.shape} and positive {is_positive.shape} must be vectors of one length"
        )
    if np.isnan(values).any():
        raise ValueError("an AUROC needs scores that are numbers; at least one is NaN")
    return values, is_positive
