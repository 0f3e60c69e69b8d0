"""Two Ray Train workers give the loss curve of one at the same global batch."""

import numpy as np
import pandas as pd
from commands import SMALL, medsae


def test_two_workers_fit_as_one(copy_of, tmp_path):
    run = copy_of("radiographs", "embeddings")
    # 5 steps an epoch, 100 steps; the losses are means over every 5 of them.
    hundred = ("--fit.epochs", "20", "--fit.evaluate_every", "1", "--ray.cpus", "6")
    curves = []
    for workers in ("1", "2"):
        medsae("fit", "--run", str(run), *SMALL, *hundred, "--fit.workers", workers)
        curves.append(pd.read_parquet(run / "sae" / "history"))
        (run / "sae").rename(tmp_path / f"sae-{workers}")
    one, two = curves
    assert one["step"].max() == two["step"].max() >= 100
    train = one["split"] == "train"
    for name in ("loss", "reconstruction", "sparsity"):
        np.testing.assert_allclose(two[name][train], one[name][train], rtol=1e-4)
    np.testing.assert_allclose(two["fve"][~train], one["fve"][~train], atol=1e-4)
    assert one["loss"][train].iloc[-1] < one["loss"][train].iloc[0]


def test_streamed_shards_fit_too(copy_of):
    run = copy_of("radiographs", "embeddings")
    medsae(
        "fit", "--run", str(run), *SMALL, "--fit.in_memory_gib", "0", "--fit.workers", "2", "--ray.cpus", "6"
    )
    history = pd.read_parquet(run / "sae" / "history")
    valid = history[history["split"] == "valid"]
    assert valid["fve"].iloc[-1] > 0.5
    assert list(valid["epoch"]) == [10, 20, 30, 40]
