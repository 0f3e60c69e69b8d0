"""Bad files are quarantined with their reason; a killed driver or worker loses and repeats nothing."""

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import SMALL, evaluations, medsae, start_medsae, train_workers, wait_for
from PIL import Image


def kill(process):
    """SIGKILL the driver alone, as the kernel would for memory; its Ray dies by itself."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """500 phantoms, of which 5 corrupt, 3 missing, 1 of no bytes and 1 decompression bomb."""
    root = tmp_path_factory.mktemp("spoilt")
    run = root / "run"
    medsae("radiographs", "--run", str(run), "--radiographs.phantom_images", "500")
    table = pd.read_parquet(run / "radiographs").sort_values("image_id")
    listed = [Path(uri) for uri in table["uri"]]
    chosen = np.random.default_rng(0).permutation(len(listed))[:10]
    paths = [listed[i] for i in chosen]
    for path in paths[:5]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for path in paths[5:8]:
        path.unlink()
    paths[8].write_bytes(b"")
    Image.new("L", (12_000, 12_000)).save(paths[9], "PNG")
    return run, list(table["image_id"].iloc[chosen]), len(table)


def test_each_bad_file_is_quarantined_with_its_reason(spoilt, tmp_path):
    source, bad, n = spoilt
    run = tmp_path / "run"
    shutil.copytree(source / "radiographs", run / "radiographs")
    arguments = ("embed", "--run", str(run), "--embed.encoder", "stand-in", "--ray.progress", "false")
    done = medsae(*arguments, "--embed.max_bad_share", "0.01", code=2)
    assert "10 of 500 radiographs cannot be used" in done.stderr
    assert "embed.max_bad_share = 0.01" in done.stderr

    # Raising the share takes up the work that is on disk; the pipeline then ends well.
    small = [*SMALL, "--radiographs.phantom_images", "500", "--radiographs.root", str(source / "phantoms")]
    done = medsae("pipeline", "--run", str(run), *small, "--embed.block_rows", "256")
    assert f"{n - 10} rows, 10 quarantined" in done.stdout
    assert "500 rows, up to date" in done.stdout
    assert "490 radiographs embedded, 10 quarantined" in done.stdout
    assert re.search(r"quarantined +3  missing or unreadable file", done.stdout)
    assert not re.search(r"patient\d{5}", done.stdout + done.stderr)
    quarantine = pd.read_parquet(run / "quarantine" / "embed").set_index("image_id")
    reasons = quarantine["reason"]
    assert sorted(quarantine.index) == sorted(bad)
    assert all("corrupt" in reasons[i] or "truncated" in reasons[i] for i in bad[:5])
    assert set(reasons[bad[5:8]]) == {"missing or unreadable file"}
    assert "empty" in reasons[bad[8]]
    assert "12000 x 12000" in reasons[bad[9]]
    embedded = pd.read_parquet(run / "embeddings", columns=["image_id"])["image_id"]
    assert embedded.nunique() == len(embedded) == n - 10


def test_embed_killed_half_way_goes_on_where_it_was(copy_of, tmp_path):
    run = copy_of("radiographs")
    rows = run / "_partial" / "embeddings" / "_rows"
    arguments = ("embed", "--run", str(run), *SMALL, "--embed.block_rows", "16")
    process = start_medsae(*arguments, log=tmp_path / "first.log")
    wait_for(lambda: len(list(rows.glob("*.parquet"))) >= 4, process)
    kill(process)
    time.sleep(5)
    ids = [
        path.name.removesuffix(".parquet")
        for path in (run / "_partial" / "embeddings" / "_ids").glob("*.parquet")
        if ".pending" not in path.name
    ]
    assert 1 <= len(ids) < 25
    kept = {
        path: path.stat().st_mtime_ns for path in rows.glob("*.parquet") if path.name.startswith(tuple(ids))
    }
    assert kept

    process = start_medsae(*arguments, log=tmp_path / "second.log")
    wait_for(lambda: len(list(rows.glob("*.parquet"))) >= len(kept) + 2, process)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert process.wait() == 0, (tmp_path / "second.log").read_text()[-3000:]
    embedded = pd.read_parquet(run / "embeddings", columns=["image_id"])["image_id"]
    wanted = pd.read_parquet(run / "radiographs", columns=["image_id"])["image_id"]
    assert max(Counter(embedded).values()) == 1
    assert sorted(embedded) == sorted(wanted)
    assert not (run / "_partial" / "embeddings").exists()


def assert_same_fit(sae, undisturbed):
    """Bit for bit, but for the seconds it took."""
    ours, theirs = (pd.read_parquet(f / "history").drop(columns="seconds") for f in (sae, undisturbed))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    for name in ("cfg.json", "sae_weights.safetensors", "normaliser.json"):
        assert (sae / name).read_bytes() == (undisturbed / name).read_bytes()
    chosen = [json.loads((f / "_manifest.json").read_text())["notes"] for f in (sae, undisturbed)]
    for notes in chosen:
        notes["chosen"].pop("seconds")
    assert chosen[0] == chosen[1]


def test_fit_goes_on_after_the_kill_of_a_worker_as_if_undisturbed(phantom_run, copy_of, tmp_path):
    run, log = copy_of("radiographs", "embeddings"), tmp_path / "log"
    # A checkpoint every 3 of 200 steps: the undisturbed run had none between its evaluations.
    process = start_medsae("fit", "--run", str(run), *SMALL, "--fit.checkpoint_every", "3", log=log)
    wait_for(lambda: [epoch for _, epoch in evaluations(log.read_text())] == [10], process)
    (worker,) = train_workers(process.pid)
    os.kill(worker, signal.SIGKILL)
    assert process.wait() == 0, log.read_text()[-3000:]

    told = evaluations(log.read_text())
    # Not from the start again, and by another process. (One killed before its report is told twice.)
    assert [epoch for _, epoch in told if epoch > 10] == [20, 30, 40]
    assert {pid for pid, epoch in told if epoch > 10} != {worker}
    assert worker in {pid for pid, _ in told}
    assert_same_fit(run / "sae", phantom_run.folder / "sae")
    # The two best, and the last; nothing that Ray Train did not know of.
    assert 2 <= len(list((run / "sae" / "checkpoints").glob("*/checkpoint_*/state.pt"))) <= 3


def test_fit_killed_half_way_goes_on_from_its_last_checkpoint(phantom_run, copy_of, tmp_path):
    run, log = copy_of("radiographs", "embeddings"), tmp_path / "log"
    arguments = ("fit", "--run", str(run), *SMALL)
    process = start_medsae(*arguments, "--fit.checkpoint_every", "3", log=log)
    wait_for(lambda: evaluations(log.read_text()), process)
    kill(process)
    time.sleep(5)
    # What Ray Train's controller had registered when it died is what there is to go on from.
    (snapshot,) = (run / "_partial" / "sae" / "checkpoints").glob("*/checkpoint_manager_snapshot.json")
    latest = json.loads(snapshot.read_text())["latest_checkpoint_result"]["checkpoint_dir_name"]
    state = torch.load(snapshot.parent / latest / "state.pt", weights_only=True)
    assert 10 <= state["epoch"] < 40
    told = len(state["history"]) // 2

    done = medsae(*arguments)
    assert [epoch for _, epoch in evaluations(done.stdout + done.stderr)] == [10, 20, 30, 40][told:]
    assert_same_fit(run / "sae", phantom_run.folder / "sae")
    seconds = pd.read_parquet(run / "sae" / "history").query("split == 'valid'")["seconds"]
    assert seconds.is_monotonic_increasing
