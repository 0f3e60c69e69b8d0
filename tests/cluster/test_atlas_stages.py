"""Stages `panels`, `atlas`, `localise` on a finished small run; tables recomputed as an outsider would."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from commands import LABELLING, SMALL, medsae
from safetensors.numpy import load_file
from scipy.stats import pearsonr

NEEDED = ("radiographs", "truth", "embeddings", "positions", "sae", "activations", "neurons", "dimensions")


@pytest.fixture(scope="module")
def atlas_run(phantom_run, tmp_path_factory):
    """A run with the tables of the three stages."""
    import shutil

    run = tmp_path_factory.mktemp("atlas") / "run"
    for table in NEEDED:
        shutil.copytree(phantom_run.folder / table, run / table)
    medsae("panels", "--run", str(run), *LABELLING)
    medsae("atlas", "--run", str(run))
    embed = SMALL[SMALL.index("--embed.encoder") : SMALL.index("--fit.expansion")]
    medsae("localise", "--run", str(run), *embed, "--ray.progress", "false")
    return run


def read(run, table):
    return pd.read_parquet(run / table)


def test_a_card_shows_each_patient_once_with_its_own_activations(atlas_run):
    gallery = read(atlas_run, "gallery")
    radiographs = read(atlas_run, "radiographs").set_index("image_id")
    activations = read(atlas_run, "activations").set_index("image_id")
    value = {
        (n, i): v
        for i, row in activations.iterrows()
        for n, v in zip(row["neuron"], row["value"], strict=True)
    }
    told = [value.get(pair, 0.0) for pair in zip(gallery["neuron"], gallery["image_id"], strict=True)]
    np.testing.assert_array_equal(gallery["value"], np.float32(told))
    gallery["patient"] = radiographs.loc[gallery["image_id"], "patient_id"].to_numpy()
    assert not gallery.duplicated(["neuron", "role", "patient"]).any()
    split = radiographs.loc[gallery["image_id"], "split"].to_numpy()
    assert (split == np.where(gallery["role"] == "top", "valid", "test")).all()
    assert ((gallery["value"] == 0) == (gallery["role"] == "silent")).all()
    firing = {n for (n, i) in value if radiographs.loc[i, "split"] in ("valid", "test")}
    assert set(gallery["neuron"]) == firing
    # The first of `top` is the neuron's highest on validation.
    valid = pd.Series({k: v for k, v in value.items() if radiographs.loc[k[1], "split"] == "valid"})
    tops = gallery[gallery["role"] == "top"].groupby("neuron")["value"].max()
    pd.testing.assert_series_equal(tops, valid.groupby(level=0).max(), check_names=False, check_dtype=False)


def test_acquisition_and_shortcuts_are_scipys(atlas_run):
    atlas, neurons = read(atlas_run, "atlas"), read(atlas_run, "neurons")
    radiographs = read(atlas_run, "radiographs")
    activations = read(atlas_run, "activations").set_index("image_id")
    test = radiographs[(radiographs["split"] == "test") & radiographs["image_id"].isin(activations.index)]
    dense = np.zeros((len(test), len(neurons)))
    for row, image_id in enumerate(test["image_id"]):
        dense[row, activations.loc[image_id, "neuron"]] = activations.loc[image_id, "value"]
    checked = 0
    for neuron in np.flatnonzero(~neurons["dead"])[::25]:
        for name, y, known in (
            ("AP", test["view"] == "AP", test["view"].isin(["AP", "PA"])),
            ("male", test["sex"] == "M", test["sex"].isin(["M", "F"])),
            ("age", test["age"], test["age"].notna()),
        ):
            x = dense[known.to_numpy(), neuron]
            if np.ptp(x) > 0:
                r = pearsonr(x, y[known].to_numpy(float))[0]
                assert atlas.loc[neuron, f"r_{name}"] == pytest.approx(r, abs=1e-9)
                checked += 1
    assert checked > 30
    for _, row in atlas.iterrows():
        for name in ("AP", "lateral", "male", "age", "site"):
            both = row[f"r_{name}"], row[f"valid_r_{name}"]
            follows = min(map(abs, both)) > 0.2 and both[0] * both[1] > 0
            assert (name in row["shortcuts"]) == follows


def test_maps_sum_to_the_pre_activation_of_the_stored_embedding(atlas_run):
    maps = read(atlas_run, "maps")
    weights = load_file(atlas_run / "sae" / "sae_weights.safetensors")
    embeddings = read(atlas_run, "embeddings").set_index("image_id")["embedding"]
    for _, row in maps.sample(100, random_state=0).iterrows():
        e, n = embeddings[row["image_id"]].astype(np.float64), row["neuron"]
        pre = (e - weights["b_dec"]) @ weights["W_enc"][:, n] + weights["b_enc"][n]
        assert row["map"].sum(dtype=np.float64) + row["constant"] == pytest.approx(pre, abs=1e-4)
        assert row["pre_activation"] == pytest.approx(pre, abs=1e-5)
    gallery = read(atlas_run, "gallery")
    wanted = set(zip(gallery["neuron"], gallery["image_id"], strict=True))
    assert wanted <= set(zip(maps["neuron"], maps["image_id"], strict=True))
    assert not maps.duplicated(["neuron", "image_id"]).any()


def test_the_pointing_game_follows_from_the_tables(atlas_run):
    """Brute force on 112 x 112 points: the map, bilinear between the centres of its 7 x 7 cells."""
    pointing, boxes = read(atlas_run, "pointing"), read(atlas_run, "boxes")
    maps = read(atlas_run, "maps").set_index(["neuron", "image_id"])["map"]
    truth, radiographs = read(atlas_run, "truth"), read(atlas_run, "radiographs").set_index("image_id")
    of_test = truth[truth["image_id"].map(radiographs["split"]) == "test"]
    # Phantoms of 224 pixels fill the encoder's square.
    merged = boxes.sort_values(["image_id", "finding", "x0", "y0"]).reset_index(drop=True)
    wanted = of_test.sort_values(["image_id", "finding", "x0", "y0"]).reset_index(drop=True)
    np.testing.assert_allclose(
        merged[["x0", "y0", "x1", "y1"]], wanted[["x0", "y0", "x1", "y1"]].clip(0, 224) / 224, atol=1e-6
    )
    centres = (np.arange(112) + 0.5) / 112
    place = np.clip(centres * 7 - 0.5, 0, 6)

    def judge(values, inside):
        along = np.array([np.interp(place, range(7), column) for column in values.reshape(7, 7).T]).T
        whole = np.array([np.interp(place, range(7), row) for row in along])
        region = (whole >= whole.max() / 2) & (whole > 0)
        y, x = np.unravel_index(whole.argmax(), whole.shape)
        return inside[y, x], (region & inside).sum() / (region | inside).sum()

    assert len(pointing) > 30
    best = read(atlas_run, "neurons").set_index("neuron")["valid_best_label"]
    for _, row in pointing.iterrows():
        inside = np.zeros((112, 112), bool)
        mine = boxes[(boxes["image_id"] == row["image_id"]) & (boxes["finding"] == row["finding"])]
        for box in mine.itertuples():
            inside |= ((centres >= box.y0) & (centres <= box.y1))[:, None] & (
                (centres >= box.x0) & (centres <= box.x1)
            )
        hit, iou = judge(maps[row["neuron"], row["image_id"]], inside)
        assert (row["hit"], row["iou"]) == (hit, pytest.approx(iou, abs=0.01))
        assert row["box_share"] == pytest.approx(inside.mean())
        others = [judge(maps[n, row["image_id"]], inside) for n in row["others"]]
        assert row["other_hits"] == pytest.approx(np.mean([h for h, _ in others]))
        assert (best[list(row["others"])] != row["finding"]).all()
    told = read(atlas_run, "localisation").set_index("finding")
    summed = pointing.groupby("finding").agg({"hit": "mean", "iou": "mean", "box_share": "mean"})
    pd.testing.assert_frame_equal(
        told.loc[summed.index, ["hit_rate", "iou", "box_share"]],
        summed.rename(columns={"hit": "hit_rate"}),
        check_names=False,
    )
    some = told[told["n"] > 0]
    above = some["hit_rate_low"] > some[["box_share", "other_hit_rate"]].max(axis=1)
    assert (some["above_chance"].astype(bool) == above).all()


def test_another_encoder_is_refused_and_what_is_done_is_left(atlas_run):
    done = medsae("localise", "--run", str(atlas_run), "--embed.encoder", "stand-in")
    assert "up to date" in done.stdout
    assert json.loads((atlas_run / "maps" / "_manifest.json").read_text())["notes"]["largest_error"] < 1e-4
    refused = medsae("localise", "--run", str(atlas_run), code=2)
    assert "needs a weight file" in refused.stderr
