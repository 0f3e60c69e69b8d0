"""`detections` against the same figures computed one neuron at a time; nulls, partners, per-class table."""

import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medsae_ray.concepts import canonical
from medsae_ray.config import DetectSettings
from medsae_ray.detections import (
    VERDICT_COLUMNS,
    detections_rows,
    detections_table,
    label_phi,
    per_class_table,
    permuted_null,
    shuffled_null,
    shuffled_partner,
    with_q,
)
from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.measure import LabelPolicy
from medsae_ray.tables import DETECTIONS, VERDICTS

DETECT = DetectSettings()
SCHEMA = pa.schema([VERDICTS.field(name) for name in VERDICT_COLUMNS])


def verdicts_of(
    neurons: np.ndarray,
    rng: np.random.Generator,
    *,
    tpr: np.ndarray,
    tnr: np.ndarray,
    images: int = 20,
    lost: float = 0.0,
    condition: str = "true",
) -> pa.Table:
    """`images` firing and `images` silent radiographs a neuron, answered right at the given rates."""
    u = len(neurons)
    expected = np.tile(np.arange(2 * images) < images, u)
    rate = np.where(expected, np.repeat(tpr, 2 * images), np.repeat(tnr, 2 * images))
    answer = np.where(rng.random(expected.size) < rate, expected, ~expected)
    p_yes = np.clip(np.round(np.where(answer, 0.5, 0.0) + rng.random(expected.size) / 2, 2), 0, 1)
    gone = rng.random(expected.size)
    status = np.where(gone < lost / 2, "unparsed", np.where(gone < lost, "failed", "answered"))
    quantile = np.tile(np.r_[(np.arange(images) + 1) / images, np.zeros(images)], u)
    table = pa.table(
        {
            "neuron": np.repeat(neurons, 2 * images).astype(np.int32),
            "condition": [condition] * expected.size,
            "expected": expected,
            "answer": pa.array(answer, mask=status != "answered"),
            "p_yes": pa.array(p_yes, mask=status != "answered"),
            "status": status,
            "quantile": quantile.astype(np.float32),
        },
        schema=SCHEMA,
    )
    return table.take(rng.permutation(table.num_rows))


def case(seed: int = 0, u: int = 30, lost: float = 0.15) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Verdicts of both conditions, candidates in no order, and which are named (the last one is not)."""
    rng = np.random.default_rng(seed)
    neurons = rng.permutation(500)[:u]
    asked = neurons[:-1]
    true = verdicts_of(asked, rng, tpr=rng.random(u - 1), tnr=rng.random(u - 1), lost=lost)
    half = np.full(u - 1, 0.5)
    shuffled = verdicts_of(asked, rng, tpr=half, tnr=half, lost=lost, condition="shuffled")
    both = pa.concat_tables([true, shuffled])
    return both.take(rng.permutation(both.num_rows)), neurons, np.arange(u) < u - 1


def of_neuron(verdicts: pa.Table, neuron: int, condition: str = "true") -> list[dict[str, object]]:
    rows = verdicts.to_pylist()
    return [row for row in rows if row["neuron"] == neuron and row["condition"] == condition]


# --------------------------------------------------------------------------------------------- the rows


def test_every_figure_is_that_of_the_neuron_alone() -> None:
    verdicts, candidates, named = case()
    table = detections_table(verdicts, candidates, named, DETECT)
    assert table.schema.equals(DETECTIONS)
    assert table["neuron"].to_pylist() == candidates.tolist()
    enough = []
    for row in table.to_pylist()[:-1]:
        asked = of_neuron(verdicts, row["neuron"])
        told = [r for r in asked if r["status"] == "answered"]
        expected = np.array([r["expected"] for r in told])
        answer = np.array([r["answer"] for r in told])
        tp, fn = int((answer & expected).sum()), int((~answer & expected).sum())
        fp, tn = int((answer & ~expected).sum()), int((~answer & ~expected).sum())
        assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(expected, answer))
        assert (row["n_positive"], row["n_negative"]) == (tp + fn, tn + fp)
        assert row["n_unparsed"] == sum(r["status"] == "unparsed" for r in asked)
        assert row["n_failed"] == sum(r["status"] == "failed" for r in asked)
        assert row["n_positive"] + row["n_negative"] + row["n_unparsed"] + row["n_failed"] == 40
        for name, right, n in (("tpr", tp, tp + fn), ("tnr", tn, tn + fp)):
            wilson = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
            assert row[name] == right / n
            assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((wilson.low, wilson.high))
        assert row["p"] == pytest.approx(stats.fisher_exact([[tp, fn], [fp, tn]], "greater").pvalue)
        assert row["auroc"] == pytest.approx(roc_auc_score(expected, [r["p_yes"] for r in told]))
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        other = [r for r in of_neuron(verdicts, row["neuron"], "shuffled") if r["status"] == "answered"]
        assert row["n_shuffled"] == len(other)
        if row["shuffled_balanced_accuracy"] is not None:
            score = balanced_accuracy_score([r["expected"] for r in other], [r["answer"] for r in other])
            assert row["shuffled_balanced_accuracy"] == pytest.approx(score)
        assert row["enough"] == (tp + fn >= 16 and tn + fp >= 16)
        enough.append(row["enough"])
    assert 0 < sum(enough) < len(enough), "the case should hold neurons of both kinds"


def test_a_lost_reply_is_in_no_rate() -> None:
    """Turning answers of either kind into unparsed ones leaves the others' rates what they were."""
    verdicts, candidates, named = case(lost=0.0)
    rng = np.random.default_rng(1)
    gone = rng.random(verdicts.num_rows) < 0.1
    kept = verdicts.filter(pa.array(~gone))
    status = np.where(gone, "unparsed", "answered")
    answer = pa.array(verdicts["answer"].to_numpy(), mask=gone)
    marked = verdicts.set_column(5, "status", pa.array(status)).set_column(3, "answer", answer)
    some = detections_rows(kept, candidates, named, DETECT).to_pylist()
    whole = detections_rows(marked, candidates, named, DETECT).to_pylist()
    for one, other in zip(some, whole, strict=True):
        rates = ("tpr", "tnr", "balanced_accuracy", "auroc", "p", "n_positive", "n_negative")
        assert [one[name] for name in rates] == [other[name] for name in rates]
    assert sum(row["n_unparsed"] for row in whole) == gone[verdicts["condition"].to_numpy() == "true"].sum()


def test_a_neuron_that_lost_too_much_of_either_side_is_marked_and_not_counted() -> None:
    rng = np.random.default_rng(0)
    ones, neurons = np.ones(4), np.arange(4)
    rows = verdicts_of(neurons, rng, tpr=ones, tnr=ones).to_pylist()
    # Neuron 0 loses 4 of 20 firing ones, neuron 1 loses 5, neuron 2 5 silent ones, neuron 3 all silent ones.
    for neuron, expected, lost in ((0, True, 4), (1, True, 5), (2, False, 5), (3, False, 20)):
        own = [r for r in rows if r["neuron"] == neuron and r["expected"] == expected]
        for row in own[:lost]:
            row |= {"status": "failed", "answer": None, "p_yes": None}
    table = detections_table(pa.Table.from_pylist(rows, SCHEMA), neurons, np.ones(4, bool), DETECT)
    assert table["enough"].to_pylist() == [True, False, False, False]
    assert table["balanced_accuracy"].to_pylist() == [1.0, 1.0, 1.0, None], "raw figures stay"
    assert table["tpr"].to_pylist() == [1.0] * 4
    assert table["p"].to_pylist()[3] is None
    assert table["auroc"].to_pylist()[3] is None
    # The three others are tests that failed: p = 1.
    assert table["q"].to_pylist() == [pytest.approx(4 * table["p"][0].as_py()), None, None, None]


def test_q_is_over_all_candidates_with_p_of_1_for_what_was_not_tested() -> None:
    verdicts, candidates, named = case()
    table = detections_table(verdicts, candidates, named, DETECT)
    p = [row["p"] if row["enough"] else 1.0 for row in table.to_pylist()]
    expected = stats.false_discovery_control(p)
    for row, q in zip(table.to_pylist(), expected, strict=True):
        assert row["q"] == (pytest.approx(q) if row["enough"] else None)
    last = table.to_pylist()[-1]
    assert (last["named"], last["enough"], last["p"], last["n_positive"]) == (False, False, None, 0)


@given(cuts=st.lists(st.integers(0, 30), max_size=3), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=10)
def test_done_in_parts_and_in_any_order_it_is_the_same(cuts: list[int], seed: int) -> None:
    verdicts, candidates, named = case()
    whole = detections_table(verdicts, candidates, named, DETECT)
    verdicts = verdicts.take(np.random.default_rng(seed).permutation(verdicts.num_rows))
    parts = []
    for rows in np.split(np.arange(30), sorted(cuts)):
        own = np.isin(verdicts["neuron"].to_numpy(), candidates[rows])
        parts.append(detections_rows(verdicts.filter(pa.array(own)), candidates[rows], named[rows], DETECT))
    assert with_q(pa.concat_tables(parts)).equals(whole)


def test_quantiles_are_equal_parts_of_the_range() -> None:
    verdicts, candidates, named = case(lost=0.1)
    rows = detections_rows(verdicts, candidates, named, DETECT).to_pylist()
    for row in rows[:-1]:
        told = [r for r in of_neuron(verdicts, row["neuron"]) if r["expected"] and r["status"] == "answered"]
        parts: list[list[bool]] = [[] for _ in range(5)]
        for r in told:
            # The panel's quantiles are whole twentieths.
            parts[(round(r["quantile"] * 20) - 1) // 4].append(r["answer"])
        assert row["n_by_quantile"] == [len(part) for part in parts]
        assert row["tpr_by_quantile"] == [np.mean(part) if part else None for part in parts]
        assert sum(row["n_by_quantile"]) == row["n_positive"]
    assert rows[-1]["n_by_quantile"] == [0] * 5
    assert rows[-1]["tpr_by_quantile"] == [None] * 5


def test_without_p_yes_there_is_no_auroc_but_the_rates_stay() -> None:
    verdicts, candidates, named = case(lost=0.0)
    rows = verdicts.to_pylist()
    holed = next(row for row in rows if row["condition"] == "true")
    holed["p_yes"] = None
    whole = detections_rows(verdicts, candidates, named, DETECT).to_pylist()
    some = detections_rows(pa.Table.from_pylist(rows, SCHEMA), candidates, named, DETECT).to_pylist()
    for one, other in zip(whole, some, strict=True):
        assert other["auroc"] == (None if one["neuron"] == holed["neuron"] else one["auroc"])
        assert other["tpr"] == one["tpr"]


def test_clopper_pearson_is_a_setting() -> None:
    verdicts, candidates, named = case(lost=0.0)
    row = detections_rows(verdicts, candidates, named, DetectSettings(interval="clopper-pearson")).to_pylist()
    exact = stats.binomtest(round(row[0]["tpr"] * 20), 20).proportion_ci(0.95, "exact")
    assert (row[0]["tpr_low"], row[0]["tpr_high"]) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("neuron", 999, "neuron 999, which is no candidate"),
        ("status", "maybe", "none of answered, unparsed, failed"),
        ("condition", "other", "none of true, shuffled"),
        ("answer", None, "answer is null"),
        ("quantile", 0.0, "outside"),
    ],
)
def test_a_verdict_that_breaks_the_contract_is_refused(column: str, value: object, told: str) -> None:
    verdicts, candidates, named = case(lost=0.0)
    rows = verdicts.to_pylist()
    firing = next(row for row in rows if row["expected"] and row["condition"] == "true")
    firing[column] = value
    with pytest.raises(InputError, match=told):
        detections_rows(pa.Table.from_pylist(rows, SCHEMA), candidates, named, DETECT)


def test_no_candidates_and_no_verdicts_is_an_empty_table() -> None:
    empty = detections_table(SCHEMA.empty_table(), np.empty(0, np.int64), np.empty(0, bool), DETECT)
    assert empty.num_rows == 0
    assert empty.schema.equals(DETECTIONS)
    assert permuted_null(empty, 3, 0).n_neurons == shuffled_null(empty).n_neurons == 0


def test_the_papers_size_takes_seconds_and_its_intervals_cover() -> None:
    """8,192 neurons with 40 prompts of either condition, a tenth lost: 655,360 rows."""
    rng = np.random.default_rng(0)
    neurons, (tpr, tnr) = np.arange(8192), rng.uniform(0.3, 0.95, (2, 8192))
    half = np.full(8192, 0.5)
    verdicts = pa.concat_tables(
        [
            verdicts_of(neurons, rng, tpr=tpr, tnr=tnr, lost=0.1),
            verdicts_of(neurons, rng, tpr=half, tnr=half, lost=0.1, condition="shuffled"),
        ]
    )
    started = time.process_time()
    table = detections_table(verdicts, neurons, np.ones(8192, bool), DETECT)
    assert time.process_time() - started < 40
    truth = (tpr + tnr) / 2
    low = table["balanced_accuracy_low"].to_numpy()
    high = table["balanced_accuracy_high"].to_numpy()
    assert 0.94 < ((low <= truth) & (truth <= high)).mean() < 0.97


# ------------------------------------------------------------------------------------------------ nulls


@pytest.mark.parametrize("bias", [0.05, 0.5, 0.9])
def test_the_permuted_null_is_50_percent_whatever_the_answers(bias: float) -> None:
    rng = np.random.default_rng(0)
    neurons = np.arange(200)
    # Neurons that detect well, by a model that says yes too rarely or too often.
    tpr, tnr = np.full(200, min(1, bias + 0.3)), np.full(200, min(1, 1.3 - bias))
    verdicts = verdicts_of(neurons, rng, tpr=tpr, tnr=tnr, lost=0.1)
    table = detections_table(verdicts, neurons, np.ones(200, bool), DETECT)
    null = permuted_null(table, 100, 0)
    assert null.n_neurons == table["enough"].to_numpy().sum()
    assert null.mean == pytest.approx(0.5, abs=0.003)
    assert null == permuted_null(table, 100, 0)
    assert np.mean(table["balanced_accuracy"].to_numpy()) > 0.6


def test_the_permuted_null_is_what_permuting_gives() -> None:
    """Against shuffling `expected` row by row: the same spread and the same share above 70 %."""
    rng = np.random.default_rng(0)
    neurons, rate = np.arange(300), np.full(300, 0.6)
    verdicts = verdicts_of(neurons, rng, tpr=rate, tnr=rate, images=5)
    table = detections_table(verdicts, neurons, np.ones(300, bool), DETECT)
    by_neuron = verdicts.sort_by("neuron")
    answer = by_neuron["answer"].to_numpy().reshape(300, 10)
    expected = by_neuron["expected"].to_numpy().reshape(300, 10)
    accuracy = []
    for _ in range(200):
        permuted = rng.permuted(expected, axis=1)
        accuracy.append((answer == permuted).mean(axis=1))
    null = permuted_null(table, 200, 0)
    # With as many firing as silent images the balanced accuracy is the plain one.
    assert null.share_above_70 == pytest.approx((np.array(accuracy) > 0.7 + 1e-9).mean(), abs=0.005)
    assert null.se == pytest.approx(np.std(accuracy, axis=1).mean() / np.sqrt(300), rel=0.02)
    np.testing.assert_allclose(null.deciles, np.quantile(accuracy, np.arange(1, 10) / 10), atol=0.01)


def test_the_shuffled_null_is_the_mean_over_neurons_with_enough_answers() -> None:
    verdicts, candidates, named = case(u=200)
    table = detections_table(verdicts, candidates, named, DETECT)
    rows = [r for r in table.to_pylist() if r["enough"] and r["shuffled_balanced_accuracy"] is not None]
    accuracy = [r["shuffled_balanced_accuracy"] for r in rows]
    null = shuffled_null(table)
    assert null.n_neurons == len(accuracy)
    assert (null.mean, null.se) == pytest.approx((np.mean(accuracy), stats.sem(accuracy)))
    assert null.count_above_70 == sum(a > 0.7 + 1e-9 for a in accuracy)


# --------------------------------------------------------------------------------------------- partners

CONCEPTS = ["pleural effusion", "Pleural fluid", "cardiomegaly", "rib fracture", "scoliosis", None, "none"]


@given(seed=st.integers(0, 2**32 - 1), u=st.integers(1, 25), share=st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None)
def test_a_partner_is_another_concept_with_an_uncorrelated_label(seed: int, u: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    neurons = rng.permutation(1000)[:u]
    concepts = [CONCEPTS[i] for i in rng.integers(len(CONCEPTS), size=u)]
    best = [[*LABELS, None][i] for i in rng.integers(len(LABELS) + 1, size=u)]
    phi = rng.uniform(-0.3, 0.3, (14, 14))
    phi = np.where(rng.random((14, 14)) < 0.1, np.nan, phi)
    phi = (phi + phi.T) / 2
    partner = shuffled_partner(neurons, concepts, best, phi, seed, share=share)
    at = {int(neuron): row for row, neuron in enumerate(neurons)}

    def fits(one: int, other: int) -> bool:
        if concepts[other] in (None, "none") or best[other] is None:
            return False
        apart = canonical(concepts[one]) != canonical(concepts[other])
        return apart and abs(phi[LABELS.index(best[one]), LABELS.index(best[other])]) < 0.1

    for row in range(u):
        if concepts[row] in (None, "none") or best[row] is None:
            assert partner[row] == -1
        elif partner[row] >= 0:
            assert fits(row, at[int(partner[row])])
        elif share == 1:
            assert not any(fits(row, other) for other in range(u))
    if share == 0:
        assert (partner == -1).all()
    order = rng.permutation(u)
    again = shuffled_partner(
        neurons[order], [concepts[i] for i in order], [best[i] for i in order], phi, seed, share=share
    )
    np.testing.assert_array_equal(again, partner[order])


def test_partners_follow_the_seed_and_spread_over_the_eligible() -> None:
    neurons = np.arange(400)
    concepts = ["effusion", "cardiomegaly"] * 200
    best = ["Pleural Effusion", "Cardiomegaly"] * 200
    none_correlated = np.zeros((14, 14))
    one, other = (shuffled_partner(neurons, concepts, best, none_correlated, seed) for seed in (0, 1))
    assert (one >= 0).all()
    assert (one != other).mean() > 0.9
    assert len(np.unique(one)) > 200
    assert (one % 2 != neurons % 2).all()


def test_phi_is_pearsons_over_the_images_that_know_both() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([1, 0, -1, np.nan], (300, 14), p=[0.3, 0.4, 0.1, 0.2]).astype(np.float32)
    labels[:, 3], labels[:, 4] = 0, np.nan
    labels[:, 5] = np.where(labels[:, 6] == 1, 1, -1)
    for policy in (LabelPolicy(), LabelPolicy("ones", "ignore"), LabelPolicy("ignore", "ignore")):
        y, known = policy.apply(labels)
        phi = label_phi(labels, policy)
        np.testing.assert_array_equal(phi, phi.T)
        for i in range(14):
            for j in range(14):
                both = known[:, i] & known[:, j]
                a, b = y[both, i], y[both, j]
                if both.sum() and np.ptp(a) and np.ptp(b):
                    assert phi[i, j] == pytest.approx(np.corrcoef(a, b)[0, 1])
                else:
                    assert np.isnan(phi[i, j])
    assert np.isnan(label_phi(labels, LabelPolicy())[3:5]).all()


# ------------------------------------------------------------------------------------------ per class


def test_per_class_takes_the_accurately_named_neuron_of_largest_validation_r() -> None:
    neurons = np.arange(5)
    detections = pa.table(
        {
            "neuron": pa.array([4, 2, 1, 0], pa.int32()),
            "enough": [True, True, False, True],
            "balanced_accuracy": [0.9, 0.8, 1.0, 0.7],
            "balanced_accuracy_low": [0.8, 0.7, 0.9, 0.6],
            "balanced_accuracy_high": [0.95, 0.9, 1.0, 0.8],
        }
    )
    names = pa.table({"neuron": neurons, "concept": ["effusion", "edema", "rib fracture", None, "oedema"]})
    columns: dict[str, object] = {"neuron": pa.array(neurons, pa.int32())}
    # Neuron 1 has not enough answers, neuron 0 is not above 70 %, neuron 3 is no candidate.
    valid_r = {"Edema": [0.9, 0.8, 0.2, 0.99, 0.5], "Fracture": [0.1, 0.1, 0.3, 0.1, 0.2]}
    valid_r["Pneumonia"] = [0.5, 0.5, -0.1, 0.5, None]
    for label, r in valid_r.items():
        columns[f"valid_r_{label}"] = r
        for i, end in enumerate(("", "_low", "_high")):
            columns[f"auroc_{label}{end}"] = (neurons / 10 + i / 100).tolist()
    counts = {"Edema": 60, "Fracture": 70, "Pneumonia": 8}
    table = per_class_table(names, detections, pa.table(columns), counts).to_pylist()
    edema, fracture, pneumonia = table
    assert (edema["neuron"], edema["concept"], edema["is_label"]) == (4, "oedema", True)
    assert (edema["auroc"], edema["auroc_low"], edema["auroc_high"]) == pytest.approx((0.4, 0.41, 0.42))
    assert (edema["valid_r"], edema["balanced_accuracy"], edema["n_positive"]) == (0.5, 0.9, 60)
    assert (fracture["neuron"], fracture["is_label"], fracture["balanced_accuracy_low"]) == (2, True, 0.7)
    assert pneumonia["neuron"] is None, "no accurately named neuron correlates positively"
    assert pneumonia["n_positive"] == 8
