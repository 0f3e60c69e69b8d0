"""Controls against NumPy, SciPy and what must hold of them; and SAE-like units for them to judge."""

import warnings
import xml.etree.ElementTree as ET
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from medsae_ray import controls
from medsae_ray.controls import (
    CONTROLS,
    OF_EMBEDDING,
    controls_schema,
    controls_table,
    drawn,
    independent_components,
    leading,
    principal_components,
    rotation,
    shuffled,
    untrained,
)
from medsae_ray.controls_summary import FIGURES, NAMES, controls_text, verdict
from medsae_ray.measure import (
    Activations,
    chosen_neurons,
    claim,
    entropy_means,
    measure_units,
    neurons_schema,
    neurons_table,
)
from medsae_ray.report.controls_figure import controls_figure
from medsae_ray.report.style import figure_bytes


def ids_of(n: int) -> pa.Array:
    return pa.array([f"made-{i:016x}" for i in range(n)])


def embeddings(n: int = 300, d: int = 12, seed: int = 0) -> np.ndarray:
    """Correlated and far off the origin."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3).astype(np.float32)


# ---------------------------------------------------------------------------------------------- untrained


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_an_untrained_sae_has_each_density_of_the_fitted_one(data: st.DataObject) -> None:
    n, d = data.draw(st.integers(2, 60)), data.draw(st.integers(1, 9))
    counts = np.array(data.draw(st.lists(st.integers(0, n), min_size=1, max_size=40)))
    x = embeddings(n, d, seed=data.draw(st.integers(0, 99)))
    sae = untrained(x - x.mean(axis=0), counts, seed=data.draw(st.integers(0, 99)))
    z = sae.encode(x - x.mean(axis=0))
    assert z.shape == (n, len(counts))
    assert (z.data > 0).all()
    fired = np.bincount(z.indices, minlength=len(counts))
    assert np.abs(fired - counts).max() <= 1
    assert (fired[counts == 0] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(sae.encoder, axis=1), 1, rtol=1e-6)


def test_an_untrained_sae_fires_alike_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = embeddings(500, 16) - 3
    counts = np.random.default_rng(0).integers(0, 501, 64)
    whole = untrained(x, counts, seed=3)
    monkeypatch.setattr(controls, "_BLOCK_NUMBERS", 1000)
    parts = untrained(x, counts, seed=3)
    np.testing.assert_allclose(parts.threshold, whole.threshold, rtol=1e-5)
    fired = np.bincount(whole.encode(x).indices, minlength=64)
    assert fired.tolist() == counts.tolist()
    np.testing.assert_allclose(whole.encode(x).toarray(), parts.encode(x).toarray(), atol=1e-4)
    far = 1e3 * np.ones((1, 16), np.float32)
    assert not whole.encode(far).toarray()[:, counts == 0].any(), "what is dead stays dead"
    assert whole.encode(x[:0]).shape == (0, 64)


# --------------------------------------------------------------------------------------- linear maps


def test_a_rotation_keeps_norms_distances_and_variance() -> None:
    x = embeddings()
    basis = rotation(x, seed=5)
    values = basis.project(x).astype(np.float64)
    np.testing.assert_allclose(basis.directions @ basis.directions.T, np.eye(12), atol=1e-12)
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), np.linalg.norm(centred, axis=1), rtol=1e-5)
    # All of the variance is there: FVE 1.
    np.testing.assert_allclose(values @ basis.directions, centred, atol=1e-4)
    assert not np.allclose(rotation(x, seed=6).directions, basis.directions)


def test_principal_components_are_those_of_numpy_up_to_sign() -> None:
    x = embeddings()
    basis = principal_components(x)
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs((basis.directions * components).sum(axis=1)), 1, atol=1e-9)
    np.testing.assert_allclose(basis.project(x), centred @ basis.directions.T, atol=1e-4)


@pytest.mark.parametrize(("n", "rank"), [(300, 5), (4, 3)])
def test_components_end_at_the_numerical_rank(n: int, rank: int) -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((n, rank)) @ rng.standard_normal((rank, 40)) + 1).astype(np.float32)
    basis = principal_components(x / np.linalg.norm(x, axis=1, keepdims=True))
    # A unit norm bends the plane: one dimension more, where there are images enough.
    assert len(basis.directions) == min(rank + 1, n - 1)


def test_independent_components_are_the_planted_sources() -> None:
    rng = np.random.default_rng(2)
    sources = rng.laplace(size=(4000, 6))
    x = (sources @ rng.standard_normal((6, 10)) + 2).astype(np.float32)
    found = independent_components(x, 6, seed=0)
    assert found.converged
    assert found.n_rows == 4000
    values = found.basis.project(x)
    likeness = np.abs(np.corrcoef(values.T, sources.T)[:6, 6:])
    assert (likeness.max(axis=0) > 0.98).all()
    assert sorted(likeness.argmax(axis=0)) == list(range(6))
    np.testing.assert_allclose(values.std(axis=0), 1, rtol=1e-3)


def test_ica_that_does_not_converge_is_told_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "ICA_ITERATIONS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = independent_components(embeddings(), 12, seed=0)
    assert (found.converged, found.iterations) == (False, 2)
    assert np.isfinite(found.basis.directions).all()


@pytest.mark.parametrize("n", [2, 5])
def test_ica_of_few_embeddings_has_few_components(n: int) -> None:
    found = independent_components(embeddings(n), 12, seed=0)
    assert found.basis.directions.shape == (n - 1, 12)
    assert np.isfinite(found.basis.directions).all()


def test_components_that_the_rows_can_carry() -> None:
    assert leading(512, 20_000) == 63
    assert 5 * leading(512, 20_000) ** 2 <= 20_000 < 5 * (leading(512, 20_000) + 1) ** 2
    assert leading(10, 20_000) == 10
    assert leading(512, 2) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 45), st.integers(0, 9), st.randoms())
def test_rows_are_drawn_by_their_name(n: int, k: int, seed: int, random: Any) -> None:
    ids = [f"image-{i}" for i in range(n)]
    chosen = {ids[row] for row in drawn(pa.array(ids), k, seed=seed)}
    assert len(chosen) == min(n, k)
    assert chosen <= {ids[row] for row in drawn(pa.array(ids), k + 1, seed=seed)}
    random.shuffle(ids)
    assert {ids[row] for row in drawn(pa.array(ids), k, seed=seed)} == chosen


# --------------------------------------------------------------------------------------------- shuffled


def test_shuffled_images_keep_their_activations_together() -> None:
    rng = np.random.default_rng(0)
    values = csr_array((rng.exponential(size=(200, 30)) * (rng.random((200, 30)) < 0.2)).astype(np.float32))
    before = Activations(ids_of(200), values)
    after = shuffled(before, seed=0)
    assert after.image_ids.equals(before.image_ids)
    rows = [sorted(map(tuple, of.values.toarray().tolist())) for of in (before, after)]
    assert rows[0] == rows[1]
    moved = (before.values.toarray() != after.values.toarray()).any(axis=1)
    assert moved.mean() > 0.9
    assert (shuffled(before, seed=1).values.toarray() != after.values.toarray()).any()


# --------------------------------------------------------------------- what the controls are there to judge


class Planted(NamedTuple):
    """Sparse concepts, more than dimensions, of which 14 are labels."""

    x: np.ndarray
    z: np.ndarray
    y: np.ndarray


@pytest.fixture(scope="module")
def planted() -> dict[str, Planted]:
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((60, 24))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    splits = {}
    for name, n in (("train", 3000), ("valid", 1500), ("test", 1500)):
        z = rng.uniform(0.5, 1.5, (n, 60)) * (rng.random((n, 60)) < 0.08)
        x = (z @ atoms + 0.03 * rng.standard_normal((n, 24))).astype(np.float32)
        splits[name] = Planted(x, z.astype(np.float32), (z[:, :14] > 0).astype(np.float64))
    return splits


def test_units_that_found_the_concepts_beat_every_control(planted: dict[str, Planted]) -> None:
    train = planted["train"]
    mean = train.x.mean(axis=0)
    random = untrained(train.x - mean, (train.z > 0).sum(axis=0), seed=0)
    pca = principal_components(train.x)
    bases = {
        "rotation": rotation(train.x, seed=0),
        "pca": pca,
        "ica": independent_components(train.x, len(pca.directions), seed=0).basis,
        "ica_leading": independent_components(train.x, leading(24, 3000), seed=0).basis,
    }
    figures = {}
    for kind in ("sae", *CONTROLS):
        units = {}
        for split in ("test", "valid"):
            of = planted[split]
            own = Activations(ids_of(len(of.x)), csr_array(of.z))
            if kind in OF_EMBEDDING:
                values = Activations(own.image_ids, bases[kind].project(of.x))
            elif kind == "untrained":
                values = Activations(own.image_ids, random.encode(of.x - mean))
            else:
                values = own if kind == "sae" else shuffled(own, seed=0)
            known = np.ones_like(of.y, bool)
            units[split] = measure_units(values, of.y, known, np.arange(len(of.x)), permutations=2)
        chosen = chosen_neurons(units["test"], units["valid"], min_firing=10, signed=kind in OF_EMBEDDING)
        separated = [claim(row, 50)["separated"] for row in chosen.to_pylist()]
        figures[kind] = entropy_means(units["test"], min_firing=10).living, sum(separated)
        rows = controls_table(kind, neurons_table(units["test"], units["valid"]))
        assert rows.schema.equals(controls_schema())
        assert set(rows["control"].to_pylist()) == {kind}
    ours, n_separated = figures.pop("sae")
    assert n_separated == 14
    for kind, (living, n) in figures.items():
        assert ours.entropy < living.entropy, kind
        assert n < n_separated, kind
    # Without the link to labels nothing but noise is left.
    assert figures["shuffled"][0].entropy == pytest.approx(figures["shuffled"][0].floor, abs=0.03)
    assert figures["shuffled"][1] == 0


def test_the_table_is_that_of_neurons_with_two_names() -> None:
    assert controls_schema().names == ["control", "unit", *neurons_schema().names[1:]]


# ---------------------------------------------------------------------------------- summary and figure


def told(**changed: Any) -> dict[str, Any]:
    """A summary's part; `changed` gives figures of single kinds."""
    kinds = []
    for place, kind in enumerate(NAMES):
        figures = {
            "kind": kind, "n_units": 100, "n_living": 90, "entropy": 2.0 + 0.05 * place,
            "entropy_floor": 2.3, "labels_separated": 9 - place, "best_auroc": 0.95 - 0.01 * place,
            "planted_separated": 8 - place,
        }  # fmt: skip
        kinds.append(figures | changed.get(kind, {}))
    ours = kinds[0]
    not_beaten = {
        name: [k["kind"] for k in kinds[1:] if (k[name] or 9) * sign >= ours[name] * sign]
        for name, (_, sign) in FIGURES.items()
    }
    ica = {"n_rows": 50, "iterations": 100, "converged": False}
    return {
        "stand_ins": ["encoder stand-in"], "kinds": kinds, "n_labels": 11, "planted": ["Edema"] * 10,
        "rank": 12, "ica": {"ica": ica, "ica_leading": {**ica, "converged": True}}, "not_beaten": not_beaten,
    }  # fmt: skip


def test_the_verdict_names_what_is_not_beaten() -> None:
    assert verdict(told()) == (
        "In mean entropy (2.000), mean AUROC (0.950), labels separated (9) and planted findings separated "
        "(8) the SAE beats the raw dimensions and every control."
    )
    lines = verdict(told(pca={"labels_separated": 9}, ica={"labels_separated": 10})).splitlines()
    assert lines[1:] == ["In labels separated (9) the SAE does not beat PCA (9) and ICA (10)."]


def test_the_printed_table_has_a_row_a_kind_and_tells_what_is_missing() -> None:
    text = controls_text({"controls": told(sae={"entropy": 2.125}, ica={"entropy": None, "n_living": 0})})
    rows = {line[:18].strip(): line.split() for line in text.splitlines()}
    assert rows["SAE"][1:] == ["100", "90", "2.125", "2.300", "9", "0.950", "80%"]
    assert rows["ICA"][3] == "-"
    assert set(NAMES.values()) <= rows.keys()
    assert "STAND-IN MODELS (encoder stand-in)" in text
    assert "\nICA did not converge in 100 iterations" in text
    assert "leading PCs did not converge" not in text
    assert "one draw each, another with another controls.seed" in text


def test_the_figure_shows_each_kind_in_black_and_grey() -> None:
    summary = {"controls": told(pca={"entropy": 1.9}, ica={"entropy": None, "entropy_floor": None})}
    figure = controls_figure(summary)
    left, middle, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == list(NAMES.values())
    assert "nats" in left.get_xlabel()
    assert "AUROC" in middle.get_xlabel()
    assert right.get_xlabel() == "labels separated (of 11)"
    for panel, expected in (
        (left, [2.0, 2.05, 2.1, 2.15, 1.9, np.nan, 2.3, 2.35]),
        (middle, [0.95, 0.94, 0.93, 0.92, 0.91, 0.90, 0.89, 0.88]),
        (right, [9, 8, 7, 6, 5, 4, 3, 2]),
    ):
        dots = [line for line in panel.lines if line.get_marker() == "o" and line.get_fillstyle() == "full"]
        np.testing.assert_allclose([line.get_xdata()[0] for line in dots], expected)
    rings = [line for line in left.lines if line.get_fillstyle() == "none"]
    assert [line.get_ydata()[0] for line in rings] == [4]
    for line in [*left.lines, *middle.lines, *right.lines]:
        red, green, blue = (int(line.get_color()[i : i + 2], 16) for i in (1, 3, 5))
        assert red == green == blue
    words = "".join(ET.fromstring(figure_bytes(figure, "svg")).itertext())
    assert "untrained SAE" in words
    assert figure_bytes(figure, "png").startswith(b"\x89PNG")
