"""Stage `controls` on a finished small run: its table computed again from the run folder, and its caching."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from commands import medsae
from conftest import INPUTS
from scipy.stats import entropy, ortho_group, pearsonr
from sklearn.metrics import roc_auc_score

from medsae_ray.controls import CONTROLS, controls_schema
from medsae_ray.controls_summary import verdict
from medsae_ray.labels import LABELS
from medsae_ray.run import Run
from medsae_ray.status import describe
from medsae_ray.summary import write_summary


@pytest.fixture(scope="module")
def controlled(phantom_run, tmp_path_factory):
    """The run's folder after `medsae controls`, and what that printed."""
    run = tmp_path_factory.mktemp("controlled") / "run"
    for table in (*INPUTS, "truth"):
        shutil.copytree(phantom_run.folder / table, run / table)
    return run, medsae("controls", "--run", str(run)).stdout


@pytest.fixture(scope="module")
def split(controlled):
    """Rows of a split in image_id order: labels (blank negative, NaN uncertain) and embeddings."""

    def of(name):
        rows = pd.read_parquet(controlled[0] / "radiographs").set_index("image_id").sort_index()
        rows = rows[rows["split"] == name]
        x = pd.read_parquet(controlled[0] / "embeddings").set_index("image_id").loc[rows.index, "embedding"]
        return rows[list(LABELS)].fillna(0).replace(-1, np.nan), np.stack(x).astype(np.float64)

    return of


def units(controlled, control):
    table = pd.read_parquet(controlled[0] / "controls")
    return table[table["control"] == control].set_index("unit")


def assert_measured(rows, labels, values, some, *, either_sign=False):
    """r, entropy and AUROC of some units [n, u] are one-liners of SciPy and scikit-learn."""
    for unit in some:
        row, v, strengths = rows.loc[unit], values[:, unit], []
        for label in LABELS:
            known = labels[label].notna().to_numpy()
            y = labels[label].to_numpy()[known]
            if len(set(y)) < 2 or len(set(v[known])) < 2:
                assert pd.isna(row[f"r_{label}"])
                continue
            r, area = pearsonr(v[known], y).statistic, roc_auc_score(y, v[known])
            turn = either_sign and r * row[f"r_{label}"] < 0
            assert row[f"r_{label}"] == pytest.approx(-r if turn else r, abs=1e-5)
            assert row[f"auroc_{label}"] == pytest.approx(1 - area if turn else area, abs=1e-6)
            strengths.append(abs(r))
        assert row["entropy"] == pytest.approx(entropy(strengths), abs=1e-5)
        assert row["n_firing"] == (v != 0).sum()


def test_every_control_is_there_as_the_contract_says(controlled):
    folder, stdout = controlled
    for table in ("controls", "embedding_controls"):
        (file,) = (folder / table).glob("*.parquet")
        assert pq.read_schema(file).equals(controls_schema())
    table = pd.read_parquet(folder / "controls")
    assert tuple(table["control"].unique()) == CONTROLS
    manifest = Run(str(folder)).manifest("controls")
    rank = manifest.notes["rank"]
    n = table["control"].value_counts().to_dict()
    few = n.pop("ica_leading")
    assert n == {"untrained": 1024, "rotation": 512, "pca": rank, "ica": rank, "shuffled": 1024}
    assert 5 * few**2 <= manifest.notes["ica"]["ica_leading"]["n_rows"] < 5 * (few + 1) ** 2
    assert manifest.stand_ins == ["encoder stand-in"]
    assert "untrained SAE" in stdout
    assert "MedSAE summary" not in stdout
    assert (folder / "figures" / "controls.png").read_bytes().startswith(b"\x89PNG")
    assert b"shuffled SAE" in (folder / "figures" / "controls.svg").read_bytes()


def test_rotation_and_components_are_those_of_scipy_and_numpy(controlled, split):
    (_, train), (labels, x) = split("train"), split("test")
    some = np.random.default_rng(0).choice(512, 8, replace=False)
    turned = (x - train.mean(0)) @ ortho_group.rvs(512, random_state=0).T
    assert_measured(units(controlled, "rotation"), labels, turned.astype(np.float32), some)
    components = np.linalg.svd(train - train.mean(0), full_matrices=False)[2]
    projected = ((x - train.mean(0)) @ components.T).astype(np.float32)
    assert_measured(units(controlled, "pca"), labels, projected, range(8), either_sign=True)


def test_the_untrained_sae_is_random_directions_at_the_fitted_densities(controlled, split):
    folder, _ = controlled
    (_, train), (labels, x) = split("train"), split("test")
    normaliser = json.loads((folder / "sae" / "normaliser.json").read_text())
    train, x = ((of - normaliser["mu"]) * normaliser["k"] for of in (train, x))
    radiographs = pd.read_parquet(folder / "radiographs").set_index("image_id")["split"]
    activations = pd.read_parquet(folder / "activations").set_index("image_id")["neuron"]
    fired = np.concatenate(activations[radiographs[activations.index] == "train"].to_numpy())
    counts = np.bincount(fired, minlength=1024)
    directions = np.random.default_rng(0).standard_normal((1024, 512))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = units(controlled, "untrained")
    assert (rows["dead_train"].to_numpy(bool) == (counts == 0)).all()
    assert (rows["n_firing"].to_numpy()[counts == 0] == 0).all()
    some = np.random.default_rng(1).choice(np.flatnonzero(counts > 30), 8, replace=False)
    values = np.zeros((len(x), 1024))
    for unit in some:
        ordered = np.sort(train @ directions[unit])[::-1]
        threshold = (ordered[counts[unit] - 1] + ordered[counts[unit]]) / 2
        values[:, unit] = np.maximum(x @ directions[unit] - threshold, 0)
    assert_measured(rows, labels, values, some)


def test_shuffled_neurons_keep_what_does_not_depend_on_the_image(controlled):
    neurons = pd.read_parquet(controlled[0] / "neurons").set_index("neuron")
    rows = units(controlled, "shuffled")
    for name in ("n_firing", "density", "max", "dead", "dead_train"):
        assert (rows[name] == neurons[name]).all()
    np.testing.assert_allclose(rows["mean"], neurons["mean"])
    living = neurons["n_firing"] >= 10
    r = [f"r_{label}" for label in LABELS]
    assert rows.loc[living, r].abs().max().max() < neurons.loc[living, r].abs().max().max()


def test_the_summary_tells_what_the_tables_say(controlled):
    folder, stdout = controlled
    told = json.loads((folder / "summary.json").read_text())["controls"]
    of = {figures["kind"]: figures for figures in told["kinds"]}
    planted = pd.read_parquet(folder / "truth")["finding"].unique()
    assert sorted(planted) == told["planted"]
    for kind, table in (("rotation", units(controlled, "rotation")), ("sae", None)):
        rows = pd.read_parquet(folder / "neurons") if table is None else table
        living = rows[(rows["n_firing"] >= 3) & rows["entropy"].notna()]
        assert of[kind]["entropy"] == pytest.approx(living["entropy"].mean())
        assert (of[kind]["n_units"], of[kind]["n_living"]) == (len(rows), len(living))
        areas = {}
        for label in LABELS:
            # Valid units all fire on 3 images or more of a rotation; of neurons only some do.
            chosen = next(c for c in of[kind]["labels"] if c["label"] == label)
            if chosen["neuron"] is None:
                continue
            row = rows.iloc[chosen["neuron"]]
            if kind == "rotation":
                assert chosen["neuron"] == rows[f"valid_r_{label}"].abs().idxmax()
            area = row[f"auroc_{label}"]
            areas[label] = 1 - area if kind == "rotation" and row[f"valid_r_{label}"] < 0 else area
            told_area = np.nan if chosen["auroc"] is None else chosen["auroc"]
            assert told_area == pytest.approx(areas[label], nan_ok=True)
        assert of[kind]["planted_separated"] == sum(areas.get(name, 0) > 0.8 for name in planted)
        assert of[kind]["best_auroc"] == pytest.approx(np.nanmean(list(areas.values())))
    for kind in told["not_beaten"]["entropy"]:
        assert of[kind]["entropy"] <= of["sae"]["entropy"]
    assert set(of) - {"sae"} - set(told["not_beaten"]["entropy"]) == {
        kind for kind, figures in of.items() if figures["entropy"] > of["sae"]["entropy"]
    }
    assert verdict(told) in stdout


def test_another_sae_leaves_what_rests_on_embeddings_alone(controlled, tmp_path, capsys):
    from medsae_ray.cli import main

    folder = tmp_path / "run"
    shutil.copytree(controlled[0], folder)
    run = Run(str(folder))
    before = run.manifest("embedding_controls")
    first = {name: run.manifest(name).finished for name in ("controls", "embedding_controls")}
    main(["controls", "--run", str(folder)])
    assert "up to date" in capsys.readouterr().out
    # As if `neurons` were of another SAE.
    manifest = folder / "neurons" / "_manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "fingerprint": "another"}))
    assert "stale (neurons changed)" in describe(str(folder))
    assert "controls" not in write_summary(run)
    with pytest.raises(SystemExit):
        main(["controls", "--run", str(folder)])
    assert "its input neurons differs" in capsys.readouterr().err
    main(["controls", "--run", str(folder), "--overwrite"])
    assert run.manifest("controls").finished > first["controls"]
    assert run.manifest("embedding_controls").finished == first["embedding_controls"]
    assert "controls" in json.loads((folder / "summary.json").read_text())
    # Other rows for ICA are other controls.
    main(["controls", "--run", str(folder), "--overwrite", "--controls.ica_rows", "100"])
    again = run.manifest("embedding_controls")
    assert again.finished > before.finished
    assert again.notes["ica"]["ica"]["n_rows"] == 100
    assert len(units((folder, ""), "ica")) == 99
