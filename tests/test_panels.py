"""Panels against pandas, one neuron at a time, and what must hold of every panel."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import assume, given
from hypothesis import settings as checks
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from medsae_ray.config import PanelsSettings
from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.panels import ROLES, Panels, _Split, build_panels, check_panels, gather
from medsae_ray.tables import ACTIVATIONS, CANDIDATES, PANELS

SMALL = PanelsSettings(min_patients=3, name_images=4, detect_images=5, negative_pool=12)


class World(NamedTuple):
    """The three tables a panel is made from."""

    radiographs: pa.Table
    activations: pa.Table
    neurons: pa.Table

    @property
    def dense(self) -> np.ndarray:
        """Values [images, neurons], rows as in `activations`."""
        values = np.zeros((self.activations.num_rows, self.neurons.num_rows), np.float32)
        listed = self.activations.to_pandas()
        for row, neuron, value in zip(values, listed["neuron"], listed["value"], strict=True):
            row[neuron] = value
        return values

    @property
    def long(self) -> pd.DataFrame:
        """A row for each neuron and image, silent ones included, with the columns of `radiographs`."""
        values = pd.DataFrame(self.dense, index=self.activations["image_id"].to_pandas())
        long = values.rename_axis("image_id").melt(ignore_index=False, var_name="neuron").reset_index()
        return long.astype({"neuron": int}).merge(self.radiographs.to_pandas(), on="image_id")

    def build(self, settings: PanelsSettings = SMALL, batch_rows: int = 1000) -> Panels:
        batches = self.activations.to_batches(max_chunksize=batch_rows)
        valid, test = gather(batches, self.radiographs, self.neurons.num_rows)
        return build_panels(valid, test, self.radiographs, self.neurons, settings)


def rows_of(ids: pa.Array, values: np.ndarray) -> pa.Table:
    """Dense values [images, neurons] as the `activations` table."""
    fired = [np.flatnonzero(row) for row in values]
    neuron = pa.array(fired, pa.list_(pa.int32()))
    value = [row[f] for row, f in zip(values, fired, strict=True)]
    return pa.table([ids, neuron, pa.array(value, pa.list_(pa.float32()))], schema=ACTIVATIONS)


def world(values: np.ndarray, patients: list[str], splits: list[str], seed: int = 0) -> World:
    """Dense values [images, neurons]; view, sex and correlations are drawn."""
    rng = np.random.default_rng(seed)
    n, u = values.shape
    # In no order: the position of an image must not stand for its id.
    ids = [f"made-{i:016x}" for i in rng.permutation(n)]
    sexes = {patient: rng.choice(["F", "M"]) for patient in sorted(set(patients))}
    radiographs = pa.table(
        {
            "image_id": ids,
            "patient_id": patients,
            "split": splits,
            "view": pa.array(rng.choice(["AP", "PA", None], n).tolist(), pa.string()),
            "sex": [sexes[patient] for patient in patients],
        }
    )
    r = {f"valid_r_{label}": np.round(rng.normal(size=u), 1) for label in LABELS}
    for column in r.values():
        column[rng.random(u) < 0.2] = np.nan
    neurons = pa.table(
        {
            "neuron": pa.array(np.arange(u), pa.int32()),
            "dead": (values[np.array(splits) == "test"] == 0).all(axis=0),
            "valid_best_label": rng.choice(LABELS, u).tolist(),
            **{name: pa.array(column, from_pandas=True) for name, column in r.items()},
        }
    )
    return World(radiographs, rows_of(pa.array(ids), values), neurons)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """8 neurons from dead to never silent, tied values, patients of 1 to 3 images."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    patients: list[str] = []
    splits: list[str] = []
    for split in ("train", "valid", "test"):
        for patient in range(draw(st.integers(8, 40))):
            images = rng.integers(1, 4)
            patients += [f"{split}-{rng.integers(10**6)}-{patient}"] * images
            splits += [split] * images
    density = np.array([0, 0.05, 0.1, 0.3, 0.5, 0.8, 0.97, 1])
    n = len(patients)
    values = rng.exponential(size=(n, 8)) * (rng.random((n, 8)) < density)
    values[:, ::2] = np.ceil(values[:, ::2] * 3) / 3
    return world(values.astype(np.float32), patients, splits, seed)


def built_or_none(of: World, settings: PanelsSettings) -> Panels | None:
    try:
        return of.build(settings)
    except InputError:
        return None


SETTINGS = st.builds(
    PanelsSettings,
    per_label=st.sampled_from([None, 1, 3]),
    min_patients=st.integers(2, 6),
    name_images=st.integers(1, 9),
    name_from=st.sampled_from(["top", "top+middle"]),
    contrast_images=st.integers(0, 4),
    detect_images=st.integers(1, 9),
    negative_pool=st.integers(1, 40),
    match_acquisition=st.booleans(),
    seed=st.integers(0, 5),
)


@checks(deadline=None, max_examples=60)
@given(worlds(), SETTINGS)
def test_no_panel_breaks_what_detection_rests_on(of, settings):
    built = built_or_none(of, settings)
    assume(built is not None)
    assert built.panels.schema == PANELS
    assert built.candidates.schema == CANDIDATES
    check_panels(built.panels, of.radiographs)

    panels = built.panels.to_pandas().merge(of.long, on=["neuron", "image_id"], suffixes=("", "_again"))
    assert len(panels) == built.panels.num_rows
    np.testing.assert_array_equal(panels["value"], panels["value_again"])
    assert not panels.duplicated(["neuron", "patient_id"]).any()
    named = panels["role"].str.startswith("name")
    assert set(panels.loc[named, "split"]) <= {"valid"}
    assert set(panels.loc[~named, "split"]) <= {"test"}
    firing = panels["role"].isin(["name", "detect_positive"])
    assert (firing == (panels["value"] > 0)).all()

    candidates = built.candidates.to_pandas().set_index("neuron")
    sizes = panels.groupby(["neuron", "role"]).size().unstack(fill_value=0)
    assert list(sizes.index) == list(candidates.index[candidates["candidate"]])
    of_candidate = candidates.loc[sizes.index]
    half = of_candidate[["n_firing_test", "n_silent_test"]].min(axis=1).clip(upper=settings.detect_images)
    np.testing.assert_array_equal(sizes["detect_positive"], half)
    np.testing.assert_array_equal(sizes["detect_negative"], half)
    np.testing.assert_array_equal(
        sizes["name"], of_candidate["n_firing_valid"].clip(upper=settings.name_images)
    )
    assert (candidates["reason"].isna() == candidates["candidate"]).all()
    assert (candidates["label"].notna() == candidates["candidate"]).all()
    assert sum(built.left_out.values()) == (~candidates["candidate"]).sum()
    if settings.match_acquisition:
        cells = panels[~named].fillna({"view": "?"}).groupby(["neuron", "role", "view", "sex"]).size()
        matched = cells.unstack("role", fill_value=0)
        np.testing.assert_array_equal(matched["detect_positive"], matched["detect_negative"])


@checks(deadline=None, max_examples=30)
@given(worlds(), SETTINGS, st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_panels_do_not_depend_on_the_layout_of_the_tables(of, settings, batch_rows, seed):
    built = built_or_none(of, settings)
    assume(built is not None)
    rng = np.random.default_rng(seed)
    shuffled = World(*(table.take(rng.permutation(table.num_rows)) for table in of))
    again = shuffled.build(settings, batch_rows)
    assert again.panels.equals(built.panels)
    assert again.candidates.equals(built.candidates)


@checks(deadline=None, max_examples=30)
@given(worlds(), st.integers(0, 7))
def test_a_panel_does_not_depend_on_the_other_neurons(of, at):
    built = built_or_none(of, SMALL)
    assume(built is not None)
    candidates = built.panels["neuron"].unique().to_pylist()
    neuron = candidates[at % len(candidates)]
    alone = rows_of(of.activations["image_id"].combine_chunks(), of.dense * (np.arange(8) == neuron))
    mine = built.panels.filter(pc.equal(built.panels["neuron"], neuron))
    again = of._replace(activations=alone).build(SMALL).panels
    assert again.filter(pc.equal(again["neuron"], neuron)).equals(mine)


@checks(deadline=None, max_examples=30)
@given(worlds(), SETTINGS)
def test_candidates_are_those_that_pandas_finds(of, settings):
    settings = dataclasses.replace(settings, match_acquisition=False)
    built = built_or_none(of, settings)
    assume(built is not None)
    long = of.long.query("split != 'train'")
    patients = (
        long.assign(firing=long["value"] > 0, silent=long["value"] == 0)
        .groupby(["neuron", "split", "patient_id"])[["firing", "silent"]].any()
        .groupby(["neuron", "split"]).sum().unstack()
    )  # fmt: skip
    found = built.candidates.to_pandas().set_index("neuron")
    for does in ("firing", "silent"):
        for split in ("valid", "test"):
            np.testing.assert_array_equal(found[f"n_{does}_{split}"], patients[does, split])

    neurons = of.neurons.to_pandas()
    enough = (patients >= settings.min_patients).all(axis=1) & ~neurons["dead"]
    if settings.per_label is None:
        labels = neurons["valid_best_label"]
    else:
        ranks = pd.DataFrame(
            [
                (rank, -r, order, label, neuron)
                for order, label in enumerate(LABELS)
                for rank, (neuron, r) in enumerate(
                    neurons.loc[enough, f"valid_r_{label}"].dropna()
                    .sort_values(ascending=False, kind="stable").head(settings.per_label).items()
                )
            ],
            columns=["rank", "minus_r", "order", "label", "neuron"],
        )  # fmt: skip
        best = ranks.sort_values(["rank", "minus_r", "order"]).drop_duplicates("neuron").set_index("neuron")
        labels = best["label"]
        enough = enough & enough.index.isin(best.index)
    overlap = found["reason"].fillna("").str.startswith("too few silent patients besides")
    np.testing.assert_array_equal(found["candidate"], enough & ~overlap)
    chosen = found.index[found["candidate"]]
    assert list(found.loc[chosen, "label"]) == list(labels[chosen])
    # It can only come to that where the split has few patients for what is asked.
    assert (
        patients["firing", "test"][overlap]
        < 3 * np.minimum(settings.detect_images, patients["silent", "test"][overlap])
    ).all()


@checks(deadline=None, max_examples=40)
@given(worlds(), SETTINGS)
def test_names_come_from_the_top_and_the_middle_of_the_firing_range(of, settings):
    built = built_or_none(of, settings)
    assume(built is not None)
    panels, long = built.panels.to_pandas(), of.long
    for neuron, rows in panels[panels["role"] == "name"].groupby("neuron"):
        firing = long[(long["neuron"] == neuron) & (long["split"] == "valid") & (long["value"] > 0)]
        best = firing.sort_values(["value", "image_id"], ascending=[False, True]).drop_duplicates(
            "patient_id"
        )
        n = settings.name_images
        if settings.name_from == "top":
            wanted = best.head(n)
        else:
            top, rest = best.head(n - n // 2), best.iloc[n - n // 2 :]
            from_median = (rest["value"].astype(float) - best["value"].astype(float).median()).abs()
            middle = rest.assign(d=from_median).sort_values(["d", "image_id"]).head(n // 2)
            wanted = pd.concat([top, middle]).sort_values(["value", "image_id"], ascending=[False, True])
        assert list(rows["image_id"]) == list(wanted["image_id"])
        shares = [(firing["value"] <= value).mean() for value in rows["value"]]
        np.testing.assert_allclose(rows["quantile"], shares, rtol=1e-6)


@checks(deadline=None, max_examples=40)
@given(worlds(), SETTINGS)
def test_positives_spread_over_the_quantiles_one_from_each_stratum(of, settings):
    built = built_or_none(of, settings)
    assume(built is not None)
    panels, long = built.panels.to_pandas(), of.long
    candidates = built.candidates.to_pandas().set_index("neuron")
    for neuron, rows in panels[panels["role"] == "detect_positive"].groupby("neuron"):
        firing = long[(long["neuron"] == neuron) & (long["split"] == "test") & (long["value"] > 0)]
        shares = [(firing["value"] <= value).mean() for value in rows["value"]]
        np.testing.assert_allclose(rows["quantile"], shares, rtol=1e-6)
        best = firing.sort_values(["value", "image_id"], ascending=[False, True]).drop_duplicates(
            "patient_id"
        )
        if candidates.loc[neuron, "n_silent_test"] < 2 * len(rows):
            assert set(rows["image_id"]) <= set(best["image_id"])
            continue
        m, n = len(best), len(rows)
        positions = np.flatnonzero(best["image_id"].isin(rows["image_id"]))
        strata = [range(i * m // n, (i + 1) * m // n) for i in range(n)]
        assert [sum(p in stratum for p in positions) for stratum in strata] == [1] * n


def plain(n_patients: int, fires: np.ndarray, images: int = 1) -> World:
    """The same `n_patients` x `images` in valid and test; `fires` [patients * images, neurons] of 0 and 1."""
    rng = np.random.default_rng(0)
    both = np.concatenate([fires, fires]) * (0.5 + rng.random((2 * len(fires), fires.shape[1])))
    patients = [f"{split}{i}" for split in "vt" for i in range(n_patients) for _ in range(images)]
    splits = ["valid"] * len(fires) + ["test"] * len(fires)
    return world(both.astype(np.float32), patients, splits)


def test_silent_images_come_from_one_pool_while_it_suffices():
    fires = (np.arange(300)[:, None] % 40 == np.arange(40)).astype(float)
    of = plain(300, fires)
    settings = PanelsSettings(min_patients=3, detect_images=6, negative_pool=25)
    panels = of.build(settings).panels.to_pandas()
    silent = panels[panels["role"] == "detect_negative"]
    assert silent["neuron"].nunique() == 40
    assert silent["image_id"].nunique() <= 25
    # Each neuron draws its own, and another seed draws another pool.
    assert silent.groupby("neuron")["image_id"].agg(frozenset).nunique() == 40
    other = of.build(dataclasses.replace(settings, seed=1)).panels.to_pandas()
    other = other[other["role"] == "detect_negative"]
    assert len(set(silent["image_id"]) & set(other["image_id"])) < 10

    # A pool of 4 does not suffice for 6: the split supplies the rest.
    small = of.build(dataclasses.replace(settings, negative_pool=4)).panels.to_pandas()
    small = small[small["role"] == "detect_negative"]
    assert (small.groupby("neuron").size() == 6).all()
    assert (small["image_id"].value_counts() > 30).sum() == 4


def test_where_few_patients_are_silent_they_are_kept_for_the_silent_side():
    # 30 patients of two images: the neuron fires on all but one image of the first 10 patients.
    fires = np.ones((60, 1))
    fires[:20:2] = 0
    of = plain(30, fires, images=2)
    built = of.build(PanelsSettings(min_patients=10))
    assert built.candidates.to_pylist()[0]["n_silent_test"] == 10
    assert built.candidates.to_pylist()[0]["n_firing_test"] == 30
    panels = built.panels.to_pandas().merge(of.radiographs.to_pandas(), on="image_id")
    few = {f"t{i}" for i in range(10)}
    assert set(panels.loc[panels["role"] == "detect_negative", "patient_id"]) == few
    assert set(panels.loc[panels["role"] == "detect_positive", "patient_id"]).isdisjoint(few)


def test_each_neuron_that_is_left_out_has_its_reason():
    # Of 12 patients with two images each; neuron 4 fires on one image of every patient.
    fires = np.zeros((24, 5))
    fires[:, 1] = np.arange(24) < 2
    fires[:, 2] = 1
    fires[:, 3] = np.arange(24) < 10
    fires[:, 4] = np.arange(24) % 2
    built = plain(12, fires, images=2).build(PanelsSettings(min_patients=4, detect_images=10))
    assert built.candidates["reason"].to_pylist() == [
        "dead",
        "fires on 1 patient of valid, 4 needed",
        "silent on 0 patients of valid, 4 needed",
        None,
        "too few silent patients besides the firing ones: 2 in test, 10 needed",
    ]
    assert built.left_out == {
        "dead": 1,
        "fires on too few patients of valid": 1,
        "silent on too few patients of valid": 1,
        "too few silent patients besides the firing ones": 1,
    }


def test_a_neuron_without_silent_images_of_the_same_acquisition_is_left_out():
    fires = np.zeros((20, 2))
    fires[:8, 0] = 1
    fires[::2, 1] = 1
    of = plain(20, fires)
    views = ["LATERAL" if i < 8 else "PA" for i in range(20)] * 2
    radiographs = of.radiographs.set_column(3, "view", [views]).set_column(4, "sex", [["F"] * 40])
    of = of._replace(radiographs=radiographs)
    settings = PanelsSettings(min_patients=4, detect_images=4)
    assert of.build(settings).candidates["candidate"].to_pylist() == [True, True]
    matched = of.build(dataclasses.replace(settings, match_acquisition=True)).candidates.to_pylist()
    assert matched[1]["candidate"]
    assert matched[0]["reason"] == (
        "too few silent patients with the views and sexes of the firing ones: 0 in test, 4 needed"
    )


@checks(deadline=None, max_examples=60)
@given(worlds(), st.integers(0, 7), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_as_many_silent_images_are_matched_as_can_be(of, neuron, n, seed):
    _, test = gather(of.activations.to_batches(), of.radiographs, 8)
    split = _Split(test, of.radiographs, dataclasses.replace(SMALL, negative_pool=2), matched=True)
    rng = np.random.default_rng(seed)
    beside = rng.permutation(len(split.patient))[:n]
    cells = split.cell[beside]
    drawn = split.draw_silent(neuron, beside, cells, rng)
    assert len(set(split.patient[drawn])) == len(drawn)
    assert not set(split.patient[drawn]) & set(split.patient[beside])
    silent = test.values.toarray()[:, neuron] == 0
    assert silent[drawn].all()
    # A place can be taken by a patient with a silent image of its acquisition.
    allowed = np.zeros((len(cells), split.patient.max() + 1))
    for row in np.flatnonzero(silent & ~np.isin(split.patient, split.patient[beside])):
        allowed[cells == split.cell[row], split.patient[row]] = 1
    places, patients = linear_sum_assignment(allowed, maximize=True)
    assert len(drawn) == allowed[places, patients].sum()
    counts = np.bincount(cells, minlength=20) - np.bincount(split.cell[drawn], minlength=20)
    assert (counts >= 0).all()


def test_without_a_candidate_the_setting_to_lower_is_named():
    fires = np.zeros((20, 3))
    fires[:8, 1:] = 1
    of = plain(20, fires)
    with pytest.raises(InputError) as refused:
        of.build(PanelsSettings(min_patients=10))
    assert str(refused.value) == (
        "None of 3 neurons can have a panel (2 fires on too few patients of valid, 1 dead): "
        "lower panels.min_patients (10 now)."
    )


@pytest.mark.parametrize(
    ("column", "change", "told"),
    [
        ("image_id", lambda p: p["image_id"].where(p.index != 1, p["image_id"][0]), "two images of one"),
        ("role", lambda p: p["role"].replace("name", "detect_positive"), "wrong split"),
        ("role", lambda p: p["role"].replace("name", "title"), "unknown role"),
        ("image_id", lambda p: p["image_id"].where(p.index != 2, "stray"), "no radiograph"),
        ("value", lambda p: p["value"] * 0, "does not fire as its role says"),
        ("quantile", lambda p: p["quantile"] + 1, "quantile out of range"),
        ("role", lambda p: p["role"].replace("detect_negative", "detect_positive"), "does not fire"),
    ],
)
def test_a_spoilt_panel_is_an_error(column, change, told):
    of = plain(30, (np.arange(30)[:, None] % 3 == np.arange(3)).astype(float))
    panels = of.build().panels
    check_panels(panels, of.radiographs)
    pandas = panels.to_pandas()
    spoilt = pa.Table.from_pandas(pandas.assign(**{column: change(pandas)}), PANELS, preserve_index=False)
    with pytest.raises(RuntimeError, match=told):
        check_panels(spoilt, of.radiographs)
    with pytest.raises(RuntimeError, match="more detection images of one kind"):
        check_panels(panels.slice(0, panels.num_rows - 1), of.radiographs)


def test_a_patient_of_both_roles_is_an_error():
    # Splits that share a patient are what the check is for: no other table would tell.
    of = plain(30, (np.arange(30)[:, None] % 3 == np.arange(3)).astype(float))
    panels = of.build().panels
    patients = dict(zip(*(of.radiographs[c].to_pylist() for c in ("image_id", "patient_id")), strict=True))
    rows = [r for r in panels.to_pylist() if r["neuron"] == 1]
    named, detected = (next(r["image_id"] for r in rows if r["role"] == role) for role in ROLES[::2])
    patients[detected] = patients[named]
    shared = of.radiographs.set_column(1, "patient_id", [list(patients.values())])
    with pytest.raises(RuntimeError, match="the panel of neuron 1 has two images of one patient"):
        check_panels(panels, shared)


def test_a_split_without_images_is_refused():
    of = plain(10, np.ones((10, 1)))
    with pytest.raises(InputError, match="no image to measure in this split"):
        gather(of.activations.slice(0, 10).to_batches(), of.radiographs, 1)
