"""Measures of thousands of units at once against one-liners for one unit and one label."""

import warnings

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from medsae_ray import measure
from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.measure import (
    Activations,
    ActivationState,
    EmbeddingState,
    EntropyMean,
    LabelPolicy,
    ReconstructionState,
    UnitMeasures,
    chosen_neurons,
    entropy_means,
    failure_signatures,
    labels_of,
    measure_units,
    neurons_schema,
    neurons_table,
)
from medsae_ray.statistics import clustered_delong, entropy
from medsae_ray.tables import ACTIVATIONS, RADIOGRAPHS, embeddings_schema


def ids_of(n: int) -> pa.Array:
    return pa.array([f"made-{i:016x}" for i in range(n)])


def rows_of(values: np.ndarray, ids: pa.Array) -> pa.Table:
    """Dense activations [n, u] as the `activations` table."""
    fired = [np.flatnonzero(row) for row in values]
    neuron, value = (
        pa.array(fired, pa.list_(pa.int32())),
        [row[f] for row, f in zip(values, fired, strict=True)],
    )
    return pa.table([ids, neuron, pa.array(value, pa.list_(pa.float32()))], schema=ACTIVATIONS)


def sparse(values: np.ndarray) -> Activations:
    return Activations(ids_of(len(values)), csr_array(values.astype(np.float32)))


def hard_case(seed: int = 0, n: int = 150) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Random, tied, dead, constant, nearly constant and nearly separating neurons; awkward labels."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, 14)) < rng.uniform(0.05, 0.6, 14)).astype(np.float64)
    known = rng.random((n, 14)) < 0.8
    y[:, 1], y[:, 2], known[:, 3], known[:, 4] = 0, 1, False, True
    known[:, 5] = np.arange(n) < 6
    y[:6, 5] = [1, 0, 1, 0, 0, 0]
    values = rng.exponential(size=(n, 40)) * (rng.random((n, 40)) < rng.uniform(0.01, 1, 40))
    values[:, 10:20] = np.ceil(values[:, 10:20] * 2) / 2
    values[:, 0] = 0
    values[:, 1] = 0.1
    values[:, 2] = 1e3 + 1e-3 * rng.random(n)
    values[:, 3] = np.where(np.arange(n) == 9, 5.0, 0)
    values[:, 4] = y[:, 4] * (1 + rng.random(n))
    values[:, 5] = 0.25 + (np.arange(n) >= 6) * rng.random(n)
    values[:, 6] = 0.1 + (np.arange(n) == 3) * 1e-6 + (np.arange(n) > 20) * 50
    return values.astype(np.float32), y, known, rng.integers(0, 45, n)


def reference_r(values: np.ndarray, y: np.ndarray, known: np.ndarray) -> np.ndarray:
    """SciPy's r, a constant being what has one distinct value."""
    r = np.full((values.shape[1], y.shape[1]), np.nan)
    for unit, label in np.ndindex(*r.shape):
        a, b = values[known[:, label], unit].astype(np.float64), y[known[:, label], label]
        if len(np.unique(a)) > 1 and len(np.unique(b)) > 1:
            r[unit, label] = stats.pearsonr(a - a.min(), b).statistic
    return r


def assert_same(a: UnitMeasures, b: UnitMeasures, atol: float = 0.0) -> None:
    for name in UnitMeasures.__dataclass_fields__:
        if name not in ("labels", "n_images"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=atol, err_msg=name)


# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    ("uncertain", "blank", "y", "known"),
    [
        ("ignore", "negative", [1, 0, 0, 0], [True, True, False, True]),
        ("zeros", "negative", [1, 0, 0, 0], [True, True, True, True]),
        ("ones", "ignore", [1, 0, 1, 0], [True, True, True, False]),
    ],
)
def test_label_policy(uncertain: str, blank: str, y: list[int], known: list[bool]) -> None:
    values = np.array([[1, np.nan], [0, np.nan], [-1, np.nan], [np.nan, np.nan]], np.float32)
    got_y, got_known = LabelPolicy(uncertain, blank).apply(values)  # type: ignore[arg-type]
    assert got_y[:, 0].tolist() == y
    assert got_known[:, 0].tolist() == known
    assert not got_known[:, 1].any(), "a label never annotated is unknown under either policy"


def test_label_policy_refuses_other_values() -> None:
    with pytest.raises(InputError, match="1, 0, -1 or blank"):
        LabelPolicy().apply(np.array([[2.0]], np.float32))


def test_labels_follow_the_images_asked_for() -> None:
    columns: dict[str, list[object]] = {name: [None] * 3 for name in RADIOGRAPHS.names}
    columns |= {"image_id": ["c", "a", "b"], "uri": ["", "", ""], "patient_id": ["p", "q", "p"]}
    columns |= {"split": ["test"] * 3, "Edema": [1.0, -1.0, None]}
    table = pa.table(columns, schema=RADIOGRAPHS)
    values, patients = labels_of(table, pa.array(["a", "b", "c"]))
    np.testing.assert_array_equal(values[:, LABELS.index("Edema")], [-1, np.nan, 1])
    assert patients[1] == patients[2] != patients[0]
    with pytest.raises(InputError, match="Image z has activations but no row"):
        labels_of(table, pa.array(["a", "z"]))


# ------------------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_unit_is_measured_as_one_liners_measure_it(seed: int, dense: bool) -> None:
    values, y, known, patients = hard_case(seed)
    if dense:
        values = values - np.float32(0.3) * (np.arange(40) % 2 == 1)
        values[::2] = np.where(values[::2] == 0, np.float32(-0.0), values[::2])
    activations = Activations(ids_of(len(values)), values) if dense else sparse(values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = measure_units(activations, y, known, patients, permutations=3)
    np.testing.assert_array_equal(got.n_firing, (values != 0).sum(0))
    np.testing.assert_allclose(got.mean, values.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_array_equal(got.max, values.max(0))
    np.testing.assert_array_equal(got.n, known.sum(0))
    np.testing.assert_array_equal(got.n_positive, (known & (y == 1)).sum(0))
    r = reference_r(values, y, known)
    np.testing.assert_allclose(got.r, r, rtol=0, atol=1e-9)
    np.testing.assert_allclose(got.entropy, entropy(r), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(got.n_labels, (~np.isnan(r)).sum(1))
    for unit in range(values.shape[1]):
        if np.isnan(r[unit]).all():
            assert got.best[unit] == -1
        else:
            assert got.best[unit] == np.nanargmax(np.abs(r[unit]))
        for label in range(14):
            rows = known[:, label]
            score, positive = values[rows, unit], y[rows, label] == 1
            one = clustered_delong(score, positive, patients[rows])
            figures = got.auroc[unit, label], got.auroc_low[unit, label], got.auroc_high[unit, label]
            assert figures == pytest.approx((one.auroc, one.low, one.high), rel=1e-9, abs=1e-12, nan_ok=True)
            if 0 < one.n_positive < len(score):
                assert figures[0] == pytest.approx(roc_auc_score(positive, score), abs=1e-12)


def test_constants_are_undefined_and_near_constants_are_not() -> None:
    values, y, known, patients = hard_case()
    got = measure_units(sparse(values), y, known, patients, permutations=0)
    assert np.isnan(got.r[[0, 1]]).all(), "dead or constant neuron"
    assert np.isnan(got.r[:, [1, 2, 3]]).all(), "label without both classes"
    assert np.isnan(got.auroc[:, [1, 2, 3]]).all()
    assert np.isnan(got.r[5, 5]), "constant on the images whose label is known"
    assert not np.isnan(got.r[6, 5]), "one of the known images differs by 1e-6 under values of 50"
    assert not np.isnan(got.r[2, 0]), "varies by 1e-6 of its mean"
    assert (got.auroc[0, 4], got.auroc[4, 4]) == (0.5, 1.0)
    assert 0 < got.auroc_low[4, 4] < 1
    assert not np.isnan(got.auroc_low[0, 4])


def test_dense_and_sparse_agree_bit_for_bit() -> None:
    values, y, known, patients = hard_case()
    one = measure_units(sparse(values), y, known, patients, permutations=4)
    other = measure_units(Activations(ids_of(len(values)), values), y, known, patients, permutations=4)
    assert_same(one, other, atol=1e-12)
    for exact in ("n_firing", "mean", "max", "r", "entropy_floor", "auroc"):
        np.testing.assert_array_equal(getattr(one, exact), getattr(other, exact))


def test_the_size_of_the_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, y, known, patients = hard_case()
    whole = measure_units(sparse(values), y, known, patients, permutations=5)
    monkeypatch.setattr(measure, "_BLOCK_NUMBERS", 3 * len(values))
    monkeypatch.setattr(measure, "_CHUNK_ENTRIES", 100)
    monkeypatch.setattr(measure, "_PERMUTATIONS_AT_ONCE", 2)
    assert_same(whole, measure_units(sparse(values), y, known, patients, permutations=5), atol=1e-12)


def test_all_images_of_one_patient() -> None:
    values, y, known, _ = hard_case()
    got = measure_units(sparse(values), y, known, np.zeros(len(values)), permutations=0)
    defined = ~np.isnan(got.auroc)
    assert (got.auroc_low[defined] <= got.auroc[defined]).all()
    assert (got.auroc_high - got.auroc_low)[defined].min() > 0.9, "no variance: the interval of one patient"


def test_a_patient_too_large_for_packed_sums_is_summed_apart() -> None:
    # Nearly all images are one patient's: its sum, about 1e5 positives over 1e5 negatives, exceeds 32 bits.
    n = 200_000
    rng = np.random.default_rng(0)
    values, y = rng.random((n, 1), dtype=np.float32), (rng.random((n, 1)) < 0.5).astype(np.float64)
    patients = np.where(np.arange(n) < 190_000, 0, np.arange(n))
    got = measure_units(sparse(values), y, np.ones((n, 1), bool), patients, labels=("Edema",), permutations=0)
    one = clustered_delong(values[:, 0], y[:, 0] == 1, patients)
    figures = got.auroc[0, 0], got.auroc_low[0, 0], got.auroc_high[0, 0]
    assert figures == pytest.approx((one.auroc, one.low, one.high), rel=1e-9)


def test_shapes_that_disagree_are_refused() -> None:
    values, y, known, patients = hard_case()
    with pytest.raises(ValueError, match="disagree"):
        measure_units(sparse(values), y, known, patients[:-1])


# --------------------------------------------------------------------------------------------- the floor


@pytest.mark.parametrize(("n_labels", "published"), [(14, 2.37), (12, 2.22), (8, 1.82)])
def test_floor_of_independent_labels_is_the_known_one(n_labels: int, published: float) -> None:
    rng = np.random.default_rng(0)
    y = (rng.random((2000, n_labels)) < 0.3).astype(np.float64)
    values = rng.random((2000, 300)) * (rng.random((2000, 300)) < 0.3)
    got = measure_units(
        sparse(values), y, np.ones_like(y, bool), np.arange(2000), labels=LABELS[:n_labels], with_auroc=False
    )
    assert got.entropy_floor.mean() == pytest.approx(published, abs=0.03)
    # These values do not depend on the labels, so what is measured is the floor.
    assert got.entropy.mean() == pytest.approx(published, abs=0.03)
    assert np.isnan(got.auroc).all()


def test_floor_is_the_mean_entropy_of_scipys_r_under_the_same_permutations() -> None:
    values, y, known, _ = hard_case()
    n = len(values)
    # Patients in the order of the images, so that the rows are permuted as they stand.
    got = measure_units(sparse(values), y, known, np.arange(n), permutations=6, seed=3)
    rng = np.random.default_rng(3)
    y = np.where(known, y, 0)
    orders = [rng.permutation(n) for _ in range(6)]
    expected = [entropy(reference_r(values, y[order], known[order])) for order in orders]
    # Where a handful of known images leaves almost no variance, the floor calls it none.
    safe = [i for i in range(40) if i not in (2, 6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(got.entropy_floor[safe], np.nanmean(expected, axis=0)[safe], atol=1e-6)
    assert_same(got, measure_units(sparse(values), y, known, np.arange(n), permutations=6, seed=3))


def test_a_selective_neuron_lies_below_its_floor() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random((1000, 14)) < 0.2).astype(np.float64)
    got = measure_units(
        sparse(y), y, np.ones_like(y, bool), np.arange(1000), permutations=5, with_auroc=False
    )
    assert (got.entropy < got.entropy_floor - 0.5).all()


# ------------------------------------------------------------------------------------------ merged states


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_order_and_split_of_the_rows_gives_the_same_measures_exactly(data: st.DataObject) -> None:
    values, y, known, patients = hard_case(n=30)
    order = np.array(data.draw(st.permutations(range(30))))
    cuts = sorted(data.draw(st.lists(st.integers(0, 30), max_size=5)))
    table = rows_of(values, ids_of(30))
    states = []
    for rows in np.split(order, cuts):
        state = ActivationState(40)
        # An even piece comes as a record batch, an odd one row by row.
        for batch in [table.take(rows)] if len(rows) % 2 == 0 else [table.take([row]) for row in rows]:
            state.update(batch.combine_chunks().to_batches()[0] if len(batch) else batch)
        states.append(state)
    merged = ActivationState(40)
    for i in data.draw(st.permutations(range(len(states)))):
        merged.merge(states[i])
    whole = ActivationState(40)
    whole.update(table)
    one, other = merged.finish(), whole.finish()
    assert one.image_ids.equals(other.image_ids)
    np.testing.assert_array_equal(one.values.toarray(), values)
    assert_same(
        measure_units(one, y, known, patients, permutations=2),
        measure_units(other, y, known, patients, permutations=2),
    )


def test_embeddings_merge_in_any_order() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 8)).astype(np.float32)
    table = pa.table(
        [ids_of(20), pa.FixedSizeListArray.from_arrays(rows.ravel(), 8)], schema=embeddings_schema(8)
    )
    first, second = EmbeddingState(8), EmbeddingState(8)
    second.update(table.slice(13))
    second.update(table.slice(0, 5))
    first.update(table.slice(5, 8).to_batches()[0])
    first.merge(second)
    assert first.finish().image_ids.equals(ids_of(20))
    np.testing.assert_array_equal(first.finish().values, rows)


def test_states_refuse_what_breaks_the_contract() -> None:
    def state_of(neuron: list[int], value: list[float], image_id: str | None = "made-1") -> ActivationState:
        state = ActivationState(10)
        types = pa.list_(pa.int32()), pa.list_(pa.float32())
        ok = (["ok"], [[1]], [[1.0]])
        ids, neurons, values = ok[0] + [image_id], ok[1] + [neuron], ok[2] + [value]
        state.update(
            pa.table(
                {"image_id": ids, "neuron": pa.array(neurons, types[0]), "value": pa.array(values, types[1])}
            )
        )
        return state

    for neuron, value in [([10], [1.0]), ([-1], [1.0])]:
        with pytest.raises(InputError, match="Image made-1 has a neuron outside 0-9"):
            state_of(neuron, value)
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="Image made-1 has an activation that is not finite and above 0"):
            state_of([2], [bad])
    with pytest.raises(InputError, match="Image made-1 has neurons that are not in ascending order"):
        state_of([2, 2], [1.0, 1.0])
    with pytest.raises(InputError, match="Image made-1 has lists of unequal length"):
        state_of([2, 3], [1.0])
    with pytest.raises(InputError, match="no image_id"):
        state_of([2], [1.0], None)
    twice = state_of([2], [1.0])
    twice.merge(state_of([2], [1.0]))
    with pytest.raises(InputError, match="Image made-1 comes twice"):
        twice.finish()
    with pytest.raises(InputError, match="no image to measure"):
        ActivationState(10).finish()
    with pytest.raises(ValueError, match="do not merge"):
        ActivationState(10).merge(ActivationState(11))


def test_embedding_state_refuses_what_breaks_the_contract() -> None:
    def update(row: list[float]) -> None:
        EmbeddingState(2).update(
            pa.table({"image_id": ["made-1"], "embedding": pa.array([row], pa.list_(pa.float32()))})
        )

    with pytest.raises(InputError, match="Image made-1 has an embedding that has not 2 numbers"):
        update([1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="Image made-1 has an embedding with a number that is not finite"):
        update([1.0, np.nan])
    with pytest.raises(ValueError, match="do not merge"):
        EmbeddingState(2).merge(EmbeddingState(3))


def test_reconstruction_in_pieces_is_one_ratio_over_the_split() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)) + 1e4
    back = x + rng.normal(size=x.shape) * 0.2
    z = rng.random((500, 9)) * (rng.random((500, 9)) < 0.3)
    z[:, 4] = 0
    expected = 1 - ((x - back) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    for cuts in ([], [100, 101, 101, 340]):
        states = []
        for rows in np.split(rng.permutation(500), cuts):
            states.append(ReconstructionState(6, 9))
            states[-1].update(x[rows], back[rows], np.nonzero(z[rows])[1])
        whole = ReconstructionState(6, 9)
        for state in states:
            whole.merge(state)
        assert whole.fve == pytest.approx(expected, rel=1e-10)
        assert whole.l0 == pytest.approx((z > 0).sum() / 500, rel=1e-12)
        np.testing.assert_array_equal(whole.firing, (z > 0).sum(0))
        assert whole.dead.tolist() == [i == 4 for i in range(9)]
        assert whole.n_images == 500


def test_reconstruction_that_is_undefined_or_unusable() -> None:
    state = ReconstructionState(2, 3)
    assert np.isnan(state.fve)
    assert np.isnan(state.l0)
    state.update(np.ones((4, 2)), np.ones((4, 2)), [])
    assert np.isnan(state.fve)
    with pytest.raises(InputError, match="not finite"):
        state.update([[1.0, np.nan]], [[1.0, 1.0]], [])
    with pytest.raises(ValueError, match="must be"):
        state.update(np.ones((1, 3)), np.ones((1, 3)), [])
    with pytest.raises(ValueError, match="do not merge"):
        state.merge(ReconstructionState(2, 4))


# ------------------------------------------------------------------------------------ table and summary


def test_neurons_table_has_the_columns_of_the_contract_and_null_where_undefined() -> None:
    values, y, known, patients = hard_case()
    test, valid = (
        measure_units(sparse(v), y, known, patients, permutations=2) for v in (values, values[::-1])
    )
    table = neurons_table(test, valid, np.arange(40) == 0)
    head = "neuron n_firing density mean max dead dead_train entropy n_labels entropy_floor best_label best_r"
    kinds = ["r_{}", "n_{}", "auroc_{}", "auroc_{}_low", "auroc_{}_high", "valid_r_{}", "valid_auroc_{}"]
    assert table.column_names == [
        *head.split(),
        *(kind.format(label) for kind in kinds for label in LABELS),
        "valid_best_label",
    ]
    assert table.schema.equals(neurons_schema())
    table.validate(full=True)
    for name in table.column_names:
        if pa.types.is_floating(table.schema.field(name).type):
            assert not np.isnan(table[name].drop_null().to_numpy()).any(), name
    dead, alive = table.slice(0, 1).to_pylist()[0], table.slice(7, 1).to_pylist()[0]
    assert (dead["dead"], dead["dead_train"], dead["n_firing"], dead["n_labels"]) == (True, True, 0, 0)
    assert dead["entropy"] is dead["best_label"] is dead["best_r"] is dead["r_Cardiomegaly"] is None
    assert alive["best_label"] == LABELS[test.best[7]]
    assert alive["best_r"] == test.r[7, test.best[7]] == alive[f"r_{alive['best_label']}"]
    assert alive["valid_best_label"] == LABELS[valid.best[7]]
    assert alive["valid_auroc_Edema"] == pytest.approx(valid.auroc[7, LABELS.index("Edema")], nan_ok=True)
    assert alive["n_Edema"] == known[:, LABELS.index("Edema")].sum()
    assert neurons_table(test, valid)["dead_train"].null_count == 40


def made(r: list[list[float]], n_firing: list[int], h: list[float] | None = None) -> UnitMeasures:
    """Measures with these r [u, 2] and the rest made up from them."""
    array = np.array(r, np.float64)
    h_array = entropy(array) if h is None else np.array(h)
    return UnitMeasures(
        labels=("Edema", "Fracture"),
        n_images=100,
        n_firing=np.array(n_firing),
        mean=np.zeros(len(r)),
        max=np.zeros(len(r)),
        r=array,
        n=np.array([100, 100]),
        n_positive=np.array([60, 7]),
        entropy=h_array,
        entropy_floor=h_array + 0.5,
        auroc=0.5 + array / 2,
        auroc_low=array / 2,
        auroc_high=np.ones_like(array),
    )


def test_three_mean_entropies() -> None:
    nan = np.nan
    units = made(
        [[0.9, 0.1], [0.3, 0.5], [-0.8, 0.4], [0.05, 0.1], [0.95, 0.99], [nan, nan], [0.7, nan]],
        [50, 50, 50, 50, 3, 50, 50],
        [0.1, 0.2, 0.3, 0.6, 0.0, nan, 0.05],
    )
    means = entropy_means(units, min_firing=10)
    assert means.living[:3] == pytest.approx((5, 1.25 / 5, 1.25 / 5 + 0.5))
    assert means.selective[:3] == pytest.approx((4, 0.65 / 4, 0.65 / 4 + 0.5))
    assert means.best[:3] == pytest.approx((2, 0.15, 0.65)), "neuron 0 for Edema, neuron 1 for Fracture"
    assert means.best.relative == pytest.approx(0.15 / np.log(2))
    assert means.living.relative == pytest.approx(1.2 / 4 / np.log(2)), (
        "of one label alone ln 1 = 0 is no scale"
    )
    none = entropy_means(made([[nan, nan]], [0]), min_firing=0)
    assert none.living.n_units == none.best.n_units == 0
    assert np.isnan(none.living.entropy)


def test_mean_entropies_of_a_table_are_those_of_its_measures() -> None:
    values, y, known, patients = hard_case()
    units = measure_units(sparse(values), y, known, patients, permutations=2)
    means = entropy_means(units, min_firing=5)
    assert means.living.n_units > means.selective.n_units > 0
    assert entropy_means(neurons_table(units, units), min_firing=5) == means


def test_choice_is_made_on_validation_alone() -> None:
    valid = made([[0.6, 0.1], [0.9, np.nan], [-0.8, np.nan], [0.1, np.nan]], [50, 4, 50, 0])
    test = made([[0.2, 0.1], [0.9, 0.9], [-0.7, 0.1], [0.3, 0.4]], [50, 50, 50, 50])
    edema, fracture = chosen_neurons(test, valid, min_firing=10).to_pylist()
    assert edema == {
        "label": "Edema",
        "neuron": 0,
        "valid_r": 0.6,
        "valid_auroc": 0.8,
        "r": 0.2,
        "auroc": 0.6,
        "auroc_low": 0.1,
        "auroc_high": 1.0,
        "n_positive": 60,
    }
    assert (fracture["neuron"], fracture["n_positive"]) == (0, 7)
    edema, fracture = chosen_neurons(test, valid, min_firing=10, signed=True).to_pylist()
    assert (edema["neuron"], edema["valid_r"], edema["r"]) == (2, 0.8, 0.7)
    assert (edema["valid_auroc"], edema["auroc"]) == pytest.approx((0.9, 0.85))
    assert (edema["auroc_low"], edema["auroc_high"]) == pytest.approx((0.0, 1.35))
    assert (fracture["neuron"], fracture["r"]) == (0, 0.1)
    nobody = chosen_neurons(test, valid, min_firing=60).to_pylist()
    assert [row["neuron"] for row in nobody] == [None, None]
    assert [row["n_positive"] for row in nobody] == [60, 7]


def test_failure_signatures_say_the_figure_and_the_remedy() -> None:
    def of(fve: float = 0.97, dead: float = 0.3, h: float = 1.9) -> list[str]:
        found = failure_signatures(
            fve=fve,
            dead_share=dead,
            entropy=EntropyMean(10, h, 2.3, 0.7),
            embedding={
                "mean_norm": 1.0,
                "variance_mean": 0.0015,
                "variance_min": 0.001,
                "variance_max": 0.003,
                "non_finite_share": 0.0,
                "effective_dimension": 6.96,
            },
        )
        return [str(failure) for failure in found]

    assert of() == []
    (dead,) = of(dead=0.62)
    assert "62%" in dead
    assert "lower the sparsity weight λ" in dead
    (fve,) = of(fve=0.8)
    assert "0.800" in fve
    assert "raise the expansion" in fve
    (high,) = of(h=2.28)
    assert all(
        part in high
        for part in ("2.28", "2.30", "norm is 1", "0.0015, from 0.001 to 0.003", "dimension 7.0", "0.00%")
    )
    assert of(h=np.nan) == []
    assert len(of(0.1, 0.9, 2.5)) == 3
