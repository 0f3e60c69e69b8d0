"""The whole pipeline on phantoms: every figure computed again from the run folder, as an outsider would."""

import json
import re
import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from commands import ROOT, SMALL, medsae, outside_hosts
from safetensors.numpy import load_file
from scipy.stats import entropy, pearsonr
from sklearn.metrics import roc_auc_score

from medsae_ray.labels import LABELS
from medsae_ray.measure import neurons_schema
from medsae_ray.tables import (
    ACTIVATIONS,
    HISTORY,
    QUARANTINE,
    RADIOGRAPHS,
    TRUTH,
    embeddings_schema,
    positions_schema,
)

SCHEMAS = {
    "radiographs": RADIOGRAPHS,
    "truth": TRUTH,
    "embeddings": embeddings_schema(512),
    "positions": positions_schema(512),
    "quarantine/radiographs": QUARANTINE,
    "quarantine/embed": QUARANTINE,
    "activations": ACTIVATIONS,
    "sae/history": HISTORY,
    "neurons": neurons_schema(),
    "dimensions": neurons_schema(),
}


@pytest.fixture(scope="module")
def split(phantom_run):
    """Rows of the test split in image_id order: labels (blank negative, NaN uncertain), x, z."""

    def of(name):
        radiographs = pd.read_parquet(phantom_run.folder / "radiographs").set_index("image_id").sort_index()
        radiographs = radiographs[radiographs["split"] == name]
        embeddings = pd.read_parquet(phantom_run.folder / "embeddings").set_index("image_id")
        activations = pd.read_parquet(phantom_run.folder / "activations").set_index("image_id")
        x = np.stack(embeddings.loc[radiographs.index, "embedding"])
        z = np.zeros((len(x), 1024), np.float32)
        for row, (neurons, values) in enumerate(
            activations.loc[radiographs.index, ["neuron", "value"]].itertuples(index=False)
        ):
            z[row, neurons] = values
        labels = radiographs[list(LABELS)].fillna(0).replace(-1, np.nan)
        return labels, x, z

    return of


@pytest.mark.parametrize("table", SCHEMAS)
def test_tables_stand_as_the_contract_says(phantom_run, table):
    folder = phantom_run.folder / table
    files = sorted(folder.glob("*.parquet"))
    assert files
    for file in files:
        found, wanted = pq.read_schema(file), SCHEMAS[table]
        assert found.names == wanted.names
        assert found.types == wanted.types


def test_every_row_is_accounted_for_and_splits_share_no_patient(phantom_run):
    radiographs = pd.read_parquet(phantom_run.folder / "radiographs")
    embedded = pd.read_parquet(phantom_run.folder / "embeddings", columns=["image_id"])["image_id"]
    assert len(radiographs) >= 400
    assert sorted(embedded) == sorted(radiographs["image_id"])
    assert radiographs.groupby("patient_id")["split"].nunique().max() == 1


def test_the_exported_sae_gives_the_activations_and_the_summary_its_fve(phantom_run, split):
    _, x, z = split("test")
    sae = load_file(phantom_run.folder / "sae" / "sae_weights.safetensors")
    again = np.maximum((x - sae["b_dec"]) @ sae["W_enc"] + sae["b_enc"], 0)
    np.testing.assert_allclose(again, z, atol=1e-4)
    rebuilt = z.astype(np.float64) @ sae["W_dec"] + sae["b_dec"]
    fve = 1 - ((x - rebuilt) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    figures = {f["name"]: f for f in json.loads((phantom_run.folder / "summary.json").read_text())["figures"]}
    assert figures["fve"]["value"] == pytest.approx(fve, abs=1e-6)
    assert figures["fve"]["n"] == len(x)
    assert figures["l0"]["value"] == pytest.approx((z > 0).sum(1).mean())
    assert figures["dead"]["value"] == pytest.approx((z == 0).all(0).mean())


@pytest.mark.parametrize(("table", "prefix"), [("neurons", ""), ("dimensions", ""), ("neurons", "valid_")])
def test_measures_are_one_liners_of_scipy_and_sklearn(phantom_run, split, table, prefix):
    labels, x, z = split("valid" if prefix else "test")
    values = z if table == "neurons" else x
    rows = pd.read_parquet(phantom_run.folder / table)
    living = np.flatnonzero((values != 0).sum(0) >= 3)
    for unit in np.random.default_rng(0).choice(living, 15, replace=False):
        row = rows.loc[unit]
        strengths = []
        for label in LABELS:
            known = labels[label].notna().to_numpy()
            y, v = labels[label].to_numpy()[known], values[known, unit]
            if len(set(y)) < 2 or len(set(v)) < 2:
                assert pd.isna(row[f"{prefix}r_{label}"])
                continue
            r = pearsonr(v.astype(np.float64), y).statistic
            strengths.append(abs(r))
            assert row[f"{prefix}r_{label}"] == pytest.approx(r, abs=1e-6)
            assert row[f"{prefix}auroc_{label}"] == pytest.approx(roc_auc_score(y, v), abs=1e-6)
            if not prefix:
                assert row[f"n_{label}"] == known.sum()
                assert row[f"auroc_{label}_low"] < row[f"auroc_{label}"] + 1e-12
        if not prefix:
            assert row["entropy"] == pytest.approx(entropy(strengths), abs=1e-6)
            assert row["n_labels"] == len(strengths)
            assert row["best_r"] == pytest.approx(row[f"r_{row['best_label']}"])
            assert row["n_firing"] == (values[:, unit] != 0).sum()


def test_the_mean_position_shares_sum_to_the_mean_training_embedding(phantom_run, split):
    _, x, _ = split("train")
    positions = pd.read_parquet(phantom_run.folder / "positions")
    shares = np.stack(positions["share"])
    assert list(positions["position"]) == list(range(49))
    assert shares.std(0).max() > 0
    np.testing.assert_allclose(shares.sum(0), x.mean(0, dtype=np.float64), atol=1e-5)


def test_the_checkpoint_kept_has_the_lowest_selection_score(phantom_run):
    history = pd.read_parquet(phantom_run.folder / "sae" / "history")
    valid = history[history["split"] == "valid"]
    manifest = json.loads((phantom_run.folder / "sae" / "_manifest.json").read_text())
    assert manifest["notes"]["chosen"]["epoch"] == valid.loc[valid["selection"].idxmin(), "epoch"]
    assert list(valid["epoch"]) == [10, 20, 30, 40]
    above = valid["fve"] > 0.95
    np.testing.assert_allclose(valid["selection"], np.where(above, valid["entropy"], 11 - valid["fve"]))
    assert list((phantom_run.folder / "sae" / "tensorboard").iterdir())


def test_stand_ins_are_named_in_every_table_that_used_them(phantom_run):
    for table in ("embeddings", "positions", "sae", "activations", "neurons", "dimensions"):
        manifest = json.loads((phantom_run.folder / table / "_manifest.json").read_text())
        assert manifest["stand_ins"] == ["encoder stand-in"]
    assert "STAND-IN MODELS (encoder stand-in)" in phantom_run.stdout
    assert "SYNTHETIC RADIOGRAPHS" in phantom_run.stdout


def test_a_second_call_does_nothing_quickly_and_says_so(phantom_run):
    started = time.monotonic()
    done = medsae("pipeline", "--run", str(phantom_run.folder), *SMALL)
    assert time.monotonic() - started < 15
    assert done.stdout.count("up to date") == 5
    assert "MedSAE summary" in done.stdout


def test_other_settings_are_refused_by_name(phantom_run):
    done = medsae("fit", "--run", str(phantom_run.folder), *SMALL, "--fit.expansion", "4", code=2)
    assert "fit: expansion was 2, now 4" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_tells_rows_and_state(phantom_run):
    told = medsae("status", str(phantom_run.folder)).stdout
    assert re.search(r"neurons +measure +1,024 +0 .*fresh", told)
    assert "stand-in" in told.lower()


def test_no_connection_leaves_this_machine(phantom_run):
    if phantom_run.connects is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    assert outside_hosts(phantom_run.connects) == set()


def test_an_sae_of_another_width_is_refused(copy_of):
    run = copy_of("radiographs", "embeddings", "sae")
    cfg = json.loads((run / "sae" / "cfg.json").read_text())
    weights = load_file(run / "sae" / "sae_weights.safetensors")
    from safetensors.numpy import save_file

    narrow = {
        "W_enc": weights["W_enc"][:256], "b_enc": weights["b_enc"], "W_dec": weights["W_dec"][:, :256],
        "b_dec": weights["b_dec"][:256],
    }  # fmt: skip
    save_file(
        {k: np.ascontiguousarray(v) for k, v in narrow.items()}, run / "sae" / "sae_weights.safetensors"
    )
    (run / "sae" / "cfg.json").write_text(json.dumps({**cfg, "d_in": 256}))
    done = medsae("encode", "--run", str(run), code=2)
    assert re.search(r"medsae: .*256 dimensions but these have 512", done.stderr)


def test_the_real_radiographs_all_are_accounted_for(tmp_path):
    root = ROOT.parent / "shared" / "radiographs" / "nih"
    if not root.is_dir():
        pytest.skip("the real radiographs (../shared/radiographs) are absent")
    run = tmp_path / "run"
    done = medsae(
        "pipeline", "--config", str(ROOT / "jobs" / "nih.yaml"), "--radiographs.root", str(root),
        "--run", str(run), "--ray.progress", "false", "--fit.epochs", "20",
    )  # fmt: skip
    embedded = pd.read_parquet(run / "embeddings", columns=["image_id"])["image_id"]
    quarantined = pd.read_parquet(run / "quarantine" / "embed")["image_id"]
    assert embedded.nunique() == len(embedded)
    assert len(embedded) + len(quarantined) == 720
    assert "are not comparable" in done.stdout  # eleven labels, not fourteen


def test_no_patient_is_named_in_the_output(phantom_run):
    radiographs = pd.read_parquet(phantom_run.folder / "radiographs")
    assert not re.search(r"patient\d{5}", phantom_run.stdout + phantom_run.stderr)
    assert radiographs["uri"].str.contains(r"patient\d{5}").all()
