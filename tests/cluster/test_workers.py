"""Two Ray Train workers fit as one at the same global batch; streamed shards survive the kill of a worker."""

import os
import signal

import numpy as np
import pandas as pd
from commands import SMALL, evaluations, medsae, start_medsae, train_workers, wait_for


def test_two_workers_fit_as_one(copy_of, tmp_path):
    run = copy_of("radiographs", "embeddings")
    # 5 steps an epoch, 100 steps; the losses are means over every 5 of them. All that looks at a global batch
    # is in it: BatchTopK's selection, AuxK's dead neurons, and restarts after each of the first ten epochs.
    hundred = (
        "--fit.epochs", "20", "--fit.evaluate_every", "1", "--ray.cpus", "6",
        "--fit.architecture", "batchtopk", "--fit.l0", "16",
        "--fit.dead_after", "0.6", "--fit.resample_every", "1",
    )  # fmt: skip
    histories = []
    for workers in ("1", "2"):
        medsae("fit", "--run", str(run), *SMALL, *hundred, "--fit.workers", workers)
        histories.append(pd.read_parquet(run / "sae" / "history"))
        (run / "sae").rename(tmp_path / f"sae-{workers}")
    one, two = histories
    assert one["step"].max() == two["step"].max() >= 100
    train = one["split"] == "train"
    for name in ("loss", "reconstruction", "auxiliary"):
        np.testing.assert_allclose(two[name][train], one[name][train], rtol=1e-4)
    for split in (train, ~train):
        np.testing.assert_allclose(two["l0"][split], one["l0"][split], rtol=1e-6)
        np.testing.assert_allclose(two["dead"][split], one["dead"][split], rtol=1e-6)
    np.testing.assert_allclose(two["fve"][~train], one["fve"][~train], rtol=1e-4)
    assert one["loss"][train].iloc[-1] < one["loss"][train].iloc[0]
    assert one["auxiliary"][train].min() > 0
    # Only restarts bring so many back at once.
    assert one["dead"][train].diff().min() < -0.1


def test_streamed_shards_are_fitted_to_the_end_though_a_worker_is_killed(copy_of, tmp_path):
    run, log = copy_of("radiographs", "embeddings"), tmp_path / "log"
    streamed = ("--fit.in_memory_gib", "0", "--fit.workers", "2", "--ray.cpus", "6")
    process = start_medsae(
        "fit", "--run", str(run), *SMALL, *streamed, "--fit.checkpoint_every", "3", log=log
    )
    wait_for(lambda: evaluations(log.read_text()), process)
    first, _ = workers = train_workers(process.pid)
    os.kill(first, signal.SIGKILL)
    assert process.wait() == 0, log.read_text()[-3000:]
    assert {pid for pid, epoch in evaluations(log.read_text()) if epoch > 10}.isdisjoint(workers)

    valid = pd.read_parquet(run / "sae" / "history").query("split == 'valid'")
    assert valid["fve"].iloc[-1] > 0.5
    assert list(valid["epoch"]) == [10, 20, 30, 40]
    # No batch is trained on again, none left out.
    assert list(valid["step"]) == [50, 100, 150, 200]
