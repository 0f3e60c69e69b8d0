"""Bad files are quarantined with their reason; a killed driver loses and repeats nothing."""

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
from commands import SMALL, medsae, start_medsae
from PIL import Image


def wait_for(condition, process, seconds=240):
    """Poll until `condition()` holds; fails where the process ends or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.05)


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


def test_fit_killed_half_way_goes_on_from_its_last_checkpoint(copy_of, tmp_path):
    run = copy_of("radiographs", "embeddings")
    checkpoints = run / "_partial" / "sae" / "checkpoints"
    arguments = ("fit", "--run", str(run), *SMALL, "--fit.epochs", "300", "--fit.evaluate_every", "5")
    process = start_medsae(*arguments, log=tmp_path / "first.log")
    wait_for(lambda: len(list(checkpoints.glob("*/checkpoint_*/state.pt"))) >= 3, process)
    kill(process)
    time.sleep(5)
    # What Ray Train's controller had registered when it died is what there is to go on from.
    (snapshot,) = checkpoints.glob("*/checkpoint_manager_snapshot.json")
    latest = json.loads(snapshot.read_text())["latest_checkpoint_result"]["checkpoint_dir_name"]
    last = torch.load(snapshot.parent / latest / "state.pt", weights_only=True)["epoch"]
    assert 5 <= last < 300

    done = medsae(*arguments)
    told = [int(epoch) for epoch in re.findall(r"epoch +(\d+)/300", done.stdout + done.stderr)]
    assert min(told) == last + 5
    history = pd.read_parquet(run / "sae" / "history")
    valid = history[history["split"] == "valid"]
    assert list(valid["epoch"]) == list(range(5, 301, 5))
    assert valid["step"].is_monotonic_increasing
    assert valid["seconds"].is_monotonic_increasing
