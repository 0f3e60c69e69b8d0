"""Verdicts to `detections`: what each neuron's description detects, and two nulls to read it against.

Tables in, tables out, plain NumPy. Shapes: u neurons, k answers of a neuron, L labels. A rate is over the
answered prompts of one side: TPR over images on which the neuron fires, TNR over those on which it is silent
(MedSAE, arXiv 2510.26411, detection). An unparsed or failed prompt is in no rate and never a no.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from medsae_ray.concepts import canonical, is_named
from medsae_ray.config import DetectSettings
from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.measure import LabelPolicy
from medsae_ray.medgemma.replies import STATUSES
from medsae_ray.statistics import (
    above,
    clopper_pearson,
    clustered_delong,
    false_discovery,
    fisher_greater,
    mover_balanced_accuracy,
    wilson,
)
from medsae_ray.tables import DETECTIONS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

VERDICT_COLUMNS = ("neuron", "condition", "expected", "answer", "p_yes", "status", "quantile")
"""What of `verdicts` is needed here: some 30 bytes a row, so that all of a run fits in memory."""
ACCURATE = 0.70
"""The paper counts the neurons whose detection accuracy lies above this."""
UNCORRELATED = 0.1
"""Labels with |φ| below this count as uncorrelated."""

CONDITIONS = ("true", "shuffled")
"""Whose description a panel is asked about: the neuron's own, or another's."""
_OUTCOMES = ("no", "yes", *STATUSES[1:])


def detections_table(
    verdicts: pa.Table, candidates: NDArray[np.integer], named: Bools, settings: DetectSettings
) -> pa.Table:
    """The whole `detections` table: `with_q` of `detections_rows` of all candidates."""
    return with_q(detections_rows(verdicts, candidates, named, settings))


def detections_rows(
    verdicts: pa.Table, candidates: NDArray[np.integer], named: Bools, settings: DetectSettings
) -> pa.Table:
    """Rows of `detections` but for `q`, which needs every candidate's p (`with_q`).

    `verdicts` (`VERDICT_COLUMNS`) holds all rows of these candidates, in any order. `candidates` [u] are
    neurons, each once, `named` [u] tells whether one has a name; the rows keep their order, so a run can be
    done some candidates at a time.

    `enough`: named, an answer on either side, and on either side at most `max_lost_share` of the prompts
    unparsed or failed. p is null without an answer on both sides. An AUROC is null also where an answered
    prompt has no p_yes. A shuffled accuracy is null where either side has no answer or lost too many.
    Raises InputError for a verdict of another neuron, or one that breaks its table's contract.
    """
    rows = _Rows.of(verdicts, np.asarray(candidates, np.int64))
    u = len(candidates)
    shape = (u, len(CONDITIONS), 2, len(_OUTCOMES))
    place = np.ravel_multi_index((rows.unit, rows.shuffled, rows.expected, rows.outcome), shape)
    counts = np.bincount(place, minlength=int(np.prod(shape))).reshape(shape)
    answered, lost = counts[..., :2].sum(axis=-1), counts[..., 2:].sum(axis=-1)
    # [u, condition, expected]: the share answered as expected, silent (TNR) before firing (TPR).
    right = np.stack([counts[:, :, 0, 0], counts[:, :, 1, 1]], axis=-1)
    rate = _ratio(right, answered)
    kept_enough = (answered > 0) & (lost <= settings.max_lost_share * (answered + lost) + 1e-9)
    enough = np.asarray(named, bool) & kept_enough[:, 0].all(axis=-1)
    shuffled = np.where(kept_enough[:, 1].all(axis=-1), rate[:, 1].mean(axis=-1), np.nan)

    interval = clopper_pearson if settings.interval == "clopper-pearson" else wilson
    low, high = interval(right[:, 0], answered[:, 0])
    (tnr, tpr), (tnr_low, tpr_low), (tnr_high, tpr_high) = rate[:, 0].T, low.T, high.T
    accuracy_low, accuracy_high = mover_balanced_accuracy(tpr, tpr_low, tpr_high, tnr, tnr_low, tnr_high)
    true = counts[:, 0]
    p = fisher_greater(true[:, 1, 1], true[:, 1, 0], true[:, 0, 1], true[:, 0, 0])
    auroc, auroc_low, auroc_high = _aurocs(rows, u)
    by_quantile, n_by_quantile = _tpr_by_quantile(rows, u, settings.quantiles)
    columns: dict[str, ArrayLike | pa.Array] = {
        "neuron": np.asarray(candidates),
        "named": np.asarray(named, bool),
        "balanced_accuracy": (tpr + tnr) / 2,
        "balanced_accuracy_low": accuracy_low,
        "balanced_accuracy_high": accuracy_high,
        "tpr": tpr,
        "tpr_low": tpr_low,
        "tpr_high": tpr_high,
        "tnr": tnr,
        "tnr_low": tnr_low,
        "tnr_high": tnr_high,
        "auroc": auroc,
        "auroc_low": auroc_low,
        "auroc_high": auroc_high,
        "p": np.where(np.asarray(named, bool) & (answered[:, 0] > 0).all(axis=-1), p, np.nan),
        "q": np.full(u, np.nan),
        "n_positive": answered[:, 0, 1],
        "n_negative": answered[:, 0, 0],
        "n_unparsed": true[:, :, 2].sum(axis=-1),
        "n_failed": true[:, :, 3].sum(axis=-1),
        "shuffled_balanced_accuracy": shuffled,
        "enough": enough,
        "n_shuffled": answered[:, 1].sum(axis=-1),
        "tpr_by_quantile": _lists(by_quantile),
        "n_by_quantile": _lists(n_by_quantile),
    }
    arrays = [
        value
        if isinstance(value := columns[field.name], pa.Array)
        # from_pandas turns NaN into null.
        else pa.array(value, field.type, from_pandas=True)
        for field in DETECTIONS
    ]
    return pa.Table.from_arrays(arrays, schema=DETECTIONS)


def with_q(detections: pa.Table) -> pa.Table:
    """The table of all candidates with `q`, by Benjamini and Hochberg over ALL of them.

    Every candidate is a test, also one without a name or without enough answers: it enters with p = 1, so
    that leaving neurons out after looking at them cannot lower the q of others. Its own q is null.
    """
    enough = _bools(detections, "enough")
    q = np.where(enough, false_discovery(np.where(enough, _floats(detections, "p"), 1.0)), np.nan)
    column = detections.schema.get_field_index("q")
    return detections.set_column(column, DETECTIONS.field("q"), pa.array(q, from_pandas=True))


class _Rows(NamedTuple):
    """Verdicts, by unit: a unit is a place in `candidates`. All [n]."""

    unit: Ints
    shuffled: Ints
    """1 for condition shuffled."""
    expected: Ints
    outcome: Ints
    """A place in `_OUTCOMES`."""
    p_yes: Floats
    quantile: Floats

    @classmethod
    def of(cls, verdicts: pa.Table, candidates: Ints) -> _Rows:
        if len(np.unique(candidates)) != len(candidates):
            raise ValueError("a candidate neuron comes twice")
        neuron = _floats(verdicts, "neuron").astype(np.int64)
        order = np.argsort(candidates)
        at = np.searchsorted(candidates[order], neuron)
        unit = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(len(neuron), np.int64)
        stray = neuron[candidates[unit] != neuron] if len(order) else neuron
        if stray.size:
            raise InputError(
                f"Table 'verdicts' has a row of neuron {stray[0]}, which is no candidate: run "
                "`medsae detect --overwrite`."
            )
        status = _codes(verdicts, "status", STATUSES)
        shuffled = _codes(verdicts, "condition", CONDITIONS)
        answer = pc.fill_null(verdicts["answer"].cast(pa.int8()), -1).to_numpy().astype(np.int64)
        without = neuron[(status == 0) & (answer < 0)]
        if without.size:
            raise InputError(
                f"Table 'verdicts' has a row of neuron {without[0]} whose status is answered but whose "
                "answer is null: run `medsae detect --overwrite`."
            )
        expected = _bools(verdicts, "expected").astype(np.int64)
        outcome = np.where(status == 0, answer, status + 1)
        return cls(
            unit, shuffled, expected, outcome, _floats(verdicts, "p_yes"), _floats(verdicts, "quantile")
        )

    def where(self, rows: Bools) -> _Rows:
        return _Rows._make(column[rows] for column in self)


def _codes(table: pa.Table, name: str, known: Sequence[str]) -> Ints:
    codes = pc.index_in(table[name], value_set=pa.array(known))
    if codes.null_count:
        raise InputError(
            f"Column {name!r} of table 'verdicts' has a value that is none of {', '.join(known)}: run "
            "`medsae detect --overwrite`."
        )
    return codes.to_numpy().astype(np.int64)


def _aurocs(rows: _Rows, u: int) -> tuple[Floats, Floats, Floats]:
    """AUROC of p_yes against expected, with its interval [u]; each image is of another patient."""
    found = np.full((3, u), np.nan)
    rows = rows.where((rows.shuffled == 0) & (rows.outcome < 2))
    # Sorted to the end, so that the order of the rows changes no rounding.
    order = np.lexsort((rows.p_yes, rows.expected, rows.unit))
    bounds = np.searchsorted(rows.unit[order], np.arange(u + 1))
    for unit in range(u):
        own = order[bounds[unit] : bounds[unit + 1]]
        score = rows.p_yes[own]
        if own.size and not np.isnan(score).any():
            area = clustered_delong(score, rows.expected[own] == 1, np.arange(own.size))
            found[:, unit] = area.auroc, area.low, area.high
    return found[0], found[1], found[2]


def _tpr_by_quantile(rows: _Rows, u: int, quantiles: int) -> tuple[Floats, Ints]:
    """Share of yes and number of answered firing images by part of the activation range [u, quantiles]."""
    rows = rows.where((rows.shuffled == 0) & (rows.outcome < 2) & (rows.expected == 1))
    if not ((rows.quantile > 0) & (rows.quantile <= 1)).all():
        raise InputError(
            "Column 'quantile' of table 'verdicts' has a value outside (0, 1] where the neuron fires: run "
            "`medsae panels --overwrite`."
        )
    # 0.2 in float32 is a little above 0.2, and belongs to the first of five parts all the same.
    part = np.clip(np.ceil(rows.quantile * quantiles - 1e-6).astype(np.int64) - 1, 0, quantiles - 1)
    place, places = rows.unit * quantiles + part, u * quantiles
    n = np.bincount(place, minlength=places).reshape(u, quantiles)
    yes = np.bincount(place[rows.outcome == 1], minlength=places).reshape(u, quantiles)
    return _ratio(yes, n), n


def _ratio(part: Ints, whole: Ints) -> Floats:
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _lists(values: NDArray) -> pa.Array:
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel(), from_pandas=True))


def _floats(table: pa.Table, name: str) -> Floats:
    return table[name].to_numpy().astype(np.float64)


def _bools(table: pa.Table, name: str) -> Bools:
    return table[name].to_numpy().astype(bool)


# ------------------------------------------------------------------------------------------- two nulls


class NullFigures(NamedTuple):
    """Balanced accuracy under a null over `n_neurons` neurons, in [0, 1]; NaN where there is none."""

    n_neurons: int
    mean: float
    se: float
    """Standard error of the mean over these neurons, taken as independent of each other."""
    deciles: tuple[float, ...]
    """The 10th to the 90th percentile."""
    count_above_70: float
    """Neurons above 70 % (for the permuted null the mean over the permutations)."""
    share_above_70: float


def permuted_null(detections: pa.Table, permutations: int, seed: int) -> NullFigures:
    """Balanced accuracy with `expected` permuted within each neuron that has enough answers.

    Which of the answers were yes stays, so the yeses among the positives are a hypergeometric draw. `se` is
    that of one permutation's mean. Its expectation is 0.5 exactly, whatever the answers: another mean would
    be an error of the arithmetic.
    """
    rows = detections.filter(detections["enough"])
    m, n = _floats(rows, "n_positive").astype(np.int64), _floats(rows, "n_negative").astype(np.int64)
    # The rates are ratios of these counts, so rounding gives the whole numbers back.
    yes = np.rint(_floats(rows, "tpr") * m + (1 - _floats(rows, "tnr")) * n).astype(np.int64)
    tp = np.random.default_rng(seed).hypergeometric(m, n, yes, size=(permutations, len(m)))
    return _null_figures((tp / m + 1 - (yes - tp) / n) / 2)


def shuffled_null(detections: pa.Table) -> NullFigures:
    """Balanced accuracy of other neurons' descriptions on the panels of neurons that have enough answers."""
    asked = detections.filter(detections["enough"]).column("shuffled_balanced_accuracy").drop_null()
    return _null_figures(asked.to_numpy()[None])


def _null_figures(accuracy: Floats) -> NullFigures:
    """Figures of balanced accuracies [replicates, neurons]."""
    replicates, n = accuracy.shape
    if n == 0:
        return NullFigures(0, np.nan, np.nan, (np.nan,) * 9, 0.0, np.nan)
    count = float(above(accuracy, ACCURATE).sum() / replicates)
    se = float(np.sqrt(accuracy.var(axis=1, ddof=1).mean() / n)) if n > 1 else np.nan
    deciles = np.quantile(accuracy, np.arange(1, 10) / 10).tolist()
    return NullFigures(n, float(accuracy.mean()), se, tuple(deciles), count, count / n)


def shuffled_partner(
    neurons: NDArray[np.integer],
    concepts: Sequence[str | None],
    best_labels: Sequence[str | None],
    phi: Floats,
    seed: int,
    *,
    labels: Sequence[str] = LABELS,
    share: float = 1.0,
) -> Ints:
    """Of each neuron, the one whose description its panel is asked again with [u]; −1 where there is none.

    A partner is another named neuron of another concept (`canonical`), whose best label is uncorrelated with
    this one's. `concepts` [u] may be None and `best_labels` [u] are those of the validation split (None: not
    eligible), `phi` [L, L] is `label_phi` in the order of `labels`, its NaN not eligible. Of the named
    neurons a `share` in [0, 1] is asked. Each draw depends on the seed and the neuron, not on row order.
    """
    concept = [canonical(c) if c is not None and is_named(c) else "" for c in concepts]
    label = np.array([-1 if b is None else labels.index(b) for b in best_labels], np.int64)
    _, code = np.unique(np.array(concept, str), return_inverse=True)
    eligible = np.array([c != "" for c in concept], bool) & (label >= 0)
    by_neuron = np.argsort(neurons)
    uncorrelated = np.abs(phi) < UNCORRELATED
    partner = np.full(len(neurons), -1, np.int64)
    for row in np.flatnonzero(eligible):
        rng = np.random.default_rng([seed, int(neurons[row])])
        fits = eligible & (code != code[row]) & uncorrelated[label[row], label]
        others = by_neuron[fits[by_neuron]]
        if rng.random() < share and others.size:
            partner[row] = neurons[rng.choice(others)]
    return partner


def label_phi(labels: NDArray[np.float32], policy: LabelPolicy) -> Floats:
    """φ (Pearson's r of two yes/no labels) of every pair of labels [L, L], over images that know both.

    `labels` [n, L] hold 1, 0, −1 and NaN (null). NaN where either label is constant on those images.
    Raises InputError for another value.
    """
    present, known = policy.apply(labels)
    y, k = np.where(known, present, 0.0), known.astype(np.float64)
    n, both, first = k.T @ k, y.T @ y, y.T @ k
    # Whole numbers throughout, so that a constant label's variance is 0 exactly.
    covariance = n * both - first * first.T
    variance = n * first - first * first
    with np.errstate(divide="ignore", invalid="ignore"):
        phi = covariance / np.sqrt(variance * variance.T)
    return np.where((variance > 0) & (variance.T > 0), phi, np.nan)


# ------------------------------------------------------------------------------------- per-class AUROC

PER_CLASS = pa.schema(
    [
        pa.field("label", pa.string(), nullable=False),
        pa.field("neuron", pa.int32()),
        pa.field("concept", pa.string()),
        pa.field("is_label", pa.bool_()),
        pa.field("valid_r", pa.float64()),
        pa.field("auroc", pa.float64()),
        pa.field("auroc_low", pa.float64()),
        pa.field("auroc_high", pa.float64()),
        pa.field("n_positive", pa.int64(), nullable=False),
        pa.field("balanced_accuracy", pa.float64()),
        pa.field("balanced_accuracy_low", pa.float64()),
        pa.field("balanced_accuracy_high", pa.float64()),
    ]
)
"""A row is a label; `neuron` is null where no accurately named one correlates with it."""


def per_class_table(
    names: pa.Table, detections: pa.Table, neurons: pa.Table, n_positive: Mapping[str, int]
) -> pa.Table:
    """The paper's third experiment (`PER_CLASS`): for each label, the AUROC of a neuron named above 70 %.

    Of the neurons with enough answers and a detection accuracy above 70 % it is the one of the largest
    `valid_r` with that label, if above 0; AUROC, interval and `n_positive` (images, by label) are those of
    the test split. `is_label`: the concept means that label.
    """
    good = detections.filter(
        pa.array(_bools(detections, "enough") & above(_floats(detections, "balanced_accuracy"), ACCURATE))
    )
    concepts = dict(zip(names["neuron"].to_pylist(), names["concept"].to_pylist(), strict=True))
    rows_of = pc.index_in(good["neuron"], value_set=neurons["neuron"].combine_chunks())
    measured = neurons.take(rows_of)
    rows: list[dict[str, object]] = []
    for label, positives in n_positive.items():
        row: dict[str, object] = {"label": label, "n_positive": positives}
        r = np.nan_to_num(_floats(measured, f"valid_r_{label}"), nan=-1.0)
        if r.max(initial=0.0) > 0:
            best = int(r.argmax())
            neuron, own = good["neuron"][best].as_py(), measured.slice(best, 1)
            row |= {"neuron": neuron, "concept": concepts[neuron], "valid_r": r[best]}
            row["is_label"] = canonical(concepts[neuron]) == label
            row |= {f"auroc{end}": own[f"auroc_{label}{end}"][0].as_py() for end in ("", "_low", "_high")}
            accuracy = [f"balanced_accuracy{end}" for end in ("", "_low", "_high")]
            row |= {name: good[name][best].as_py() for name in accuracy}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=PER_CLASS)
