"""The stage `panels` on a real run: both tables computed again from the run's, as an outsider would."""

import json

import numpy as np
import pandas as pd
import pytest
from commands import medsae

from medsae_ray.config import PanelsSettings, Settings
from medsae_ray.errors import InputError
from medsae_ray.run import Run
from medsae_ray.stages.panels import panels
from medsae_ray.tables import CANDIDATES, PANELS

CHOSEN = PanelsSettings(min_patients=4, name_images=5, contrast_images=3, detect_images=6, negative_pool=20)


def test_the_tables_are_what_the_runs_tables_give(copy_of):
    folder = copy_of("radiographs", "activations", "neurons")
    run, settings = Run(str(folder)), Settings(run=str(folder), panels=CHOSEN)
    done = panels(run, settings)
    assert done.ran
    assert run.dataset("panels", PANELS).schema.equals(PANELS)
    assert run.dataset("candidates", CANDIDATES).schema.equals(CANDIDATES)
    table, candidates = pd.read_parquet(folder / "panels"), pd.read_parquet(folder / "candidates")

    activations = pd.read_parquet(folder / "activations").set_index("image_id")
    fired = activations.explode(["neuron", "value"]).dropna().astype({"neuron": int, "value": np.float32})
    images = pd.read_parquet(folder / "radiographs").set_index("image_id")
    images = images.loc[activations.index, ["patient_id", "split"]]
    fired = fired.reset_index().join(images, on="image_id")
    neurons = pd.read_parquet(folder / "neurons").set_index("neuron")
    assert list(candidates["neuron"]) == list(neurons.index)

    enough = ~neurons["dead"]
    for split in ("valid", "test"):
        of_split = images[images["split"] == split]
        per_patient = fired[fired["split"] == split].groupby(["neuron", "patient_id"]).size()
        n_firing = per_patient.groupby("neuron").size().reindex(neurons.index, fill_value=0)
        whole = per_patient == of_split.groupby("patient_id").size().reindex(per_patient.index, level=1)
        n_silent = of_split["patient_id"].nunique() - whole.groupby("neuron").sum().reindex(
            neurons.index, fill_value=0
        )
        np.testing.assert_array_equal(candidates[f"n_firing_{split}"], n_firing)
        np.testing.assert_array_equal(candidates[f"n_silent_{split}"], n_silent)
        enough &= (n_firing >= 4) & (n_silent >= 4)
    besides = candidates["reason"].fillna("").str.startswith("too few silent patients besides")
    np.testing.assert_array_equal(candidates["candidate"], enough.to_numpy() & ~besides)
    assert candidates["candidate"].sum() > 20
    labels = neurons["valid_best_label"].to_numpy()
    np.testing.assert_array_equal(
        candidates.loc[candidates["candidate"], "label"], labels[candidates["candidate"]]
    )

    rows = table.join(images, on="image_id").merge(
        fired[["neuron", "image_id", "value"]], on=["neuron", "image_id"], how="left", suffixes=("", "_again")
    )
    np.testing.assert_array_equal(rows["value"], rows["value_again"].fillna(0))
    assert not rows.duplicated(["neuron", "patient_id"]).any()
    assert (rows["split"] == np.where(rows["role"].str.startswith("name"), "valid", "test")).all()
    firing_of = dict(iter(fired.groupby(["neuron", "split"])))
    for (neuron, split), mine in rows[rows["value"] > 0].groupby(["neuron", "split"]):
        firing = firing_of[neuron, split]
        shares = [(firing["value"] <= value).mean() for value in mine["value"]]
        np.testing.assert_allclose(mine["quantile"], shares, rtol=1e-6)
        if split == "valid":
            best = firing.sort_values(["value", "image_id"], ascending=[False, True])
            assert list(mine["image_id"]) == list(best.drop_duplicates("patient_id")["image_id"].head(5))

    notes = done.manifest.notes
    assert notes["n_candidates"] == candidates["candidate"].sum() == table["neuron"].nunique()
    assert {k: n for k, n in notes["rows"].items() if n} == table["role"].value_counts().to_dict()
    named = table["role"].str.startswith("name")
    assert notes["n_naming_images"] == table.loc[named, "image_id"].nunique()
    assert notes["n_detection_images"] == table.loc[~named, "image_id"].nunique()
    assert sum(notes["left_out"].values()) == (~candidates["candidate"]).sum()


def test_what_is_done_is_left_and_half_a_commit_is_made_good(copy_of):
    folder = copy_of("radiographs", "activations", "neurons")
    run, settings = Run(str(folder)), Settings(run=str(folder), panels=CHOSEN)
    first = run.manifest("panels"), panels(run, settings).manifest
    assert first[0] is None
    again = panels(run, settings)
    assert not again.ran
    assert again.manifest == first[1]

    other = Settings(run=str(folder), panels=PanelsSettings(min_patients=3))
    with pytest.raises(InputError, match="min_patients was 4, now 3"):
        panels(run, other)

    # As a driver leaves it that was killed between its two commits.
    manifest = json.loads((folder / "candidates" / "_manifest.json").read_text())
    manifest["fingerprint"] = "of other settings"
    (folder / "candidates" / "_manifest.json").write_text(json.dumps(manifest))
    mended = panels(run, settings)
    assert mended.ran
    assert run.manifest("candidates").fingerprint == mended.manifest.fingerprint == first[1].fingerprint


def test_a_setting_that_leaves_no_candidate_is_one_sentence(copy_of):
    folder = copy_of("radiographs", "activations", "neurons")
    done = medsae("panels", "--run", str(folder), "--panels.min_patients", "5000", code=2)
    assert done.stderr.count("\n") == 1
    assert "None of 1024 neurons can have a panel" in done.stderr
    assert "lower panels.min_patients (5000 now)" in done.stderr


def test_panels_of_a_run_that_was_measured_anew_since_are_stale(copy_of):
    folder = copy_of("radiographs", "activations", "neurons")
    manifest = json.loads((folder / "activations" / "_manifest.json").read_text())
    manifest["fingerprint"] = "of another generation"
    (folder / "activations" / "_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"'neurons' of .* is stale"):
        panels(Run(str(folder)), Settings(run=str(folder), panels=CHOSEN))
