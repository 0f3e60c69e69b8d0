"""The experiments' commands on a finished small run: their tables computed again from the SAEs they keep."""

import json
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import medsae, start_medsae, wait_for

from medsae_ray.sae import saelens
from medsae_ray.tables import EXPERIMENT

TABLES = ("radiographs", "embeddings", "positions", "phantoms")
FAST = (
    "--radiographs.phantom_images", "400", "--embed.encoder", "stand-in", "--embed.block_rows", "64",
    "--fit.expansion", "1", "--fit.learning_rate", "2e-3", "--fit.batch_size", "64", "--fit.epochs", "8",
    "--fit.evaluate_every", "8", "--fit.sparsity", "1e-2", "--fit.min_firing", "3",
    "--measure.min_firing", "3", "--measure.min_positives", "5", "--ray.progress", "false",
)  # fmt: skip
ARCHITECTURES = (
    *FAST, "--experiment.architectures", "[relu, topk]", "--experiment.seeds", "[0, 1]",
    "--experiment.sparsities", "[0.03, 0.1]", "--experiment.l0s", "[8, 32]",
)  # fmt: skip


def table_of(run, name):
    return pq.read_table(run / name / "part-00000.parquet", schema=EXPERIMENT).to_pandas()


def split_of(run, name):
    rows = pq.read_table(run / "radiographs").to_pandas().query("split == @name")
    embeddings = pq.read_table(run / "embeddings").to_pandas().set_index("image_id")["embedding"]
    return torch.tensor(np.stack(embeddings[sorted(rows["image_id"])].to_list()))


def assert_figures(run, name):
    """FVE, L0 and dead shares of every row, from the SAE beside the table and the embeddings."""
    test, train = split_of(run, "test"), split_of(run, "train")
    for row in table_of(run, name).to_dict("records"):
        sae = saelens.load(run / name / "saes" / row["sae"])
        with torch.no_grad():
            z = sae.encode(test)
            error = (test - sae.decode(z)).double().square().sum()
        total = (test.double() - test.double().mean(0)).square().sum()
        assert row["fve"] == pytest.approx(1 - float(error / total), abs=1e-5)
        assert row["l0"] == pytest.approx(float((z > 0).sum(1).double().mean()), rel=1e-3)
        assert row["dead"] == pytest.approx(float((z > 0).sum(0).eq(0).double().mean()), abs=2e-3)
        dead = (sae.encode(train) > 0).sum(0).eq(0).double().mean()
        assert row["dead_train"] == pytest.approx(float(dead), abs=2e-3)
        assert row["entropy_low"] < row["entropy"] < row["entropy_high"]


def test_architectures_killed_and_called_again(copy_of, tmp_path):
    run = copy_of(*TABLES)
    kept = run / "_partial" / "architectures" / "saes"
    process = start_medsae("architectures", "--run", str(run), *ARCHITECTURES, log=tmp_path / "log")
    wait_for(lambda: len(list(kept.glob("*/figures.json"))) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in kept.glob("*/figures.json")}
    done = medsae("architectures", "--run", str(run), *ARCHITECTURES)
    for path, written in before.items():
        assert (run / path.relative_to(run / "_partial")).stat().st_mtime_ns == written
        assert f"\n{path.parent.name} " not in done.stdout

    table = table_of(run, "architectures")
    assert {*table["matched"]} == {"path", "l0", "fve"}
    assert len(table) == 4 + 4 + 4
    at_l0 = table.query("matched == 'l0'")
    assert at_l0.groupby("architecture")["seed"].apply(sorted).to_dict() == {"relu": [0, 1], "topk": [0, 1]}
    assert_figures(run, "architectures")
    for text in ("Architectures at L0 32", "The same at the FVE that relu has there"):
        assert text in done.stdout
    assert "STAND-IN MODELS" in done.stdout
    for figure in ("architectures_l0", "architectures_fve"):
        assert (run / "architectures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    again = medsae("architectures", "--run", str(run), *ARCHITECTURES)
    assert "up to date" in again.stdout
    assert "The same at the FVE that relu has there" in again.stdout


def test_expansion_and_replicate(copy_of):
    run = copy_of(*TABLES)
    done = medsae(
        "expansion",
        "--run",
        str(run),
        *FAST,
        "--experiment.expansions",
        "[1, 2]",
        "--experiment.seeds",
        "[3, 4]",
    )
    table = table_of(run, "expansion")
    assert list(zip(table["expansion"], table["seed"], strict=True)) == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert_figures(run, "expansion")
    assert "From 1x to 2x entropy" in done.stdout

    done = medsae("replicate", "--run", str(run), *FAST)
    table = table_of(run, "replicate")
    assert list(table["normalisation"]) == ["unit", "dim"]
    assert_figures(run, "replicate")
    assert "lies nearer to the paper's dead share and FVE" in done.stdout
    manifest = json.loads((run / "replicate" / "_manifest.json").read_text())
    assert manifest["stand_ins"] == ["encoder stand-in"]
    told = medsae("replicate", "--run", str(run), *FAST, "--fit.epochs", "9", code=2).stderr
    assert "made otherwise" in told
