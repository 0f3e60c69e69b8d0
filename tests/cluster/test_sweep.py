"""The sweep: its table computed again from what lies beside it, kills, early stops, failures, promotion."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from commands import ENVIRONMENT, medsae, start_medsae, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medsae_ray.cli import main
from medsae_ray.config import RaySettings
from medsae_ray.run import Run
from medsae_ray.sae import saelens
from medsae_ray.tables import HISTORY, SWEEP

INPUTS = ("radiographs", "embeddings")
FIT = (
    "--fit.expansion", "1", "--fit.batch_size", "64", "--fit.epochs", "12", "--fit.evaluate_every", "3",
    "--fit.learning_rate", "2e-3", "--fit.min_firing", "3", "--measure.min_firing", "3",
    "--fit.checkpoint_every", "7", "--sweep.threads", "1", "--ray.progress", "false",
)  # fmt: skip
"""512 neurons, 60 steps, 4 evaluations."""
GRID = (
    *FIT, "--sweep.architecture", "[relu, topk]", "--sweep.sparsity", "[1e-3, 1e-1]",
    "--sweep.l0", "[16, 64]", "--sweep.seeds", "[0, 1]", "--sweep.together", "never",
    "--fit.fve_floor", "0.9",
)  # fmt: skip
NAMES = [
    f"{kind}-lr2e-3-s{seed}"
    for kind in ("relu-x1-l1e-3", "relu-x1-l1e-1", "topk-x1-k16", "topk-x1-k64")
    for seed in (0, 1)
]


@pytest.fixture(scope="module")
def swept(phantom_run, tmp_path_factory):
    """An undisturbed sweep of 8 trials over two architectures: its run folder and what it printed."""
    run = tmp_path_factory.mktemp("swept") / "run"
    for table in INPUTS:
        shutil.copytree(phantom_run.folder / table, run / table)
    return run, medsae("sweep", "--run", str(run), *GRID).stdout


def table_of(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "sweep" / "part-00000.parquet")


def manifest(run: Path, table: str = "sweep") -> dict:
    return json.loads((run / table / "_manifest.json").read_text())


def vectors(run: Path, split: str) -> np.ndarray:
    """Raw embeddings of a split."""
    radiographs = pd.read_parquet(run / "radiographs").query("split == @split")
    embeddings = pd.read_parquet(run / "embeddings").set_index("image_id")
    return np.stack(embeddings.loc[radiographs["image_id"], "embedding"])


def test_a_row_a_trial_an_evaluation_and_a_split(swept):
    run, _ = swept
    assert pq.read_schema(run / "sweep" / "part-00000.parquet").equals(SWEEP)
    table = table_of(run)
    assert list(dict.fromkeys(table["trial"])) == NAMES
    assert set(table["status"]) == {"finished"}
    for name, rows in table.groupby("trial"):
        assert list(rows["epoch"]) == [3, 3, 6, 6, 9, 9, 12, 12]
        assert list(rows["step"]) == [15, 15, 30, 30, 45, 45, 60, 60]
        assert list(rows["split"]) == ["train", "valid"] * 4
        (seed,), (kind,) = rows["seed"].unique(), rows["architecture"].unique()
        assert name.startswith(kind)
        assert name.endswith(f"-s{seed}")
    relu, topk = (table[table["architecture"] == kind] for kind in ("relu", "topk"))
    assert set(relu["sparsity_setting"]) == {1e-3, 1e-1}
    assert relu["l0_setting"].isna().all()
    assert set(topk["l0_setting"]) == {16, 64}
    assert topk["sparsity_setting"].isna().all()
    assert set(table["expansion"]) == {1}
    assert set(table["learning_rate"]) == {2e-3}


def test_the_best_evaluation_and_the_front(swept):
    run, printed = swept
    table = table_of(run)
    valid = table[table["split"] == "valid"]
    lowest = valid.loc[valid.groupby("trial")["selection"].idxmin()]
    best = table[table["best"]]
    assert sorted(best.index) == sorted(lowest.index)

    def dominated(row) -> bool:
        signs = {"fve": -1, "l0": 1, "dead": 1, "entropy": 1}
        ours = best[list(signs)] * list(signs.values())
        mine = row[list(signs)] * list(signs.values())
        return bool(((ours <= mine).all(axis=1) & (ours < mine).any(axis=1)).any())

    front = [name for name, row in best.set_index("trial").iterrows() if not dominated(row)]
    assert list(table.loc[table["front"], "trial"]) == front
    assert not table.loc[~table["best"], "front"].any()
    ranking = list(best.sort_values("selection", kind="stable")["trial"])
    notes = manifest(run)["notes"]
    assert notes["ranking"] == ranking
    assert set(notes["front"]) == set(front)
    assert re.findall(r"^ +\d+[* ] (\S+) ", printed, re.MULTILINE) == ranking
    assert set(re.findall(r"^ +\d+\* (\S+) ", printed, re.MULTILINE)) == set(front)
    assert len(re.findall(r"^trial +\d/8 ", printed, re.MULTILINE)) == 8


@pytest.mark.parametrize("name", [NAMES[2], NAMES[5]])
def test_a_kept_sae_has_its_trials_figures(swept, name):
    run, _ = swept
    sae = saelens.load(run / "sweep" / "saes" / name)
    x = vectors(run, "valid")
    z = sae.encode(torch.from_numpy(x)).numpy()
    rebuilt = sae.decode(torch.from_numpy(z)).numpy().astype(np.float64)
    best = table_of(run).query("best and trial == @name").iloc[0]
    fve = 1 - np.square(rebuilt - x).sum() / np.square(x - x.mean(axis=0, dtype=np.float64)).sum()
    assert best["fve"] == pytest.approx(fve, abs=1e-5)
    assert best["l0"] == pytest.approx((z > 0).sum() / len(z), rel=0.01)
    assert best["dead"] == pytest.approx((z == 0).all(axis=0).mean(), abs=0.01)


def test_tensorboard_and_the_picture_hold_the_curves(swept):
    run, _ = swept
    table = table_of(run)
    for name in NAMES:
        folder = str(run / "sweep" / "tensorboard" / name)
        events = EventAccumulator(folder, {"histograms": 0}).Reload()
        rows = table.query("trial == @name and split == 'valid'")
        for figure in ("fve", "l0", "dead", "selection"):
            scalars = events.Scalars(f"valid/{figure}")
            assert [s.step for s in scalars] == list(rows["step"])
            assert [s.value for s in scalars] == pytest.approx(list(rows[figure]), rel=1e-5)
        assert len(events.Histograms("valid/log10_density")) == 4
    assert (run / "sweep" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "Pareto front" in (run / "sweep" / "pareto.svg").read_text()


@pytest.fixture
def another(swept, tmp_path):
    """A copy of the swept run to change."""
    return Path(shutil.copytree(swept[0], tmp_path / "run"))


def test_the_best_becomes_the_runs_sae(another, swept):
    run, printed = another, swept[1]
    best, second, *_ = manifest(run)["notes"]["ranking"]
    assert f"The run's SAE is {best}." in printed

    def is_the_sae(name: str) -> bool:
        told = manifest(run, "sae")
        same = all(
            (run / "sae" / file).read_bytes() == (run / "sweep" / "saes" / name / file).read_bytes()
            for file in ("cfg.json", "sae_weights.safetensors", "normaliser.json")
        )
        history = pq.read_table(run / "sae" / "history", schema=HISTORY).to_pandas()
        rows = table_of(run).query("trial == @name")[HISTORY.names].reset_index(drop=True)
        pd.testing.assert_frame_equal(history, rows)
        curves = EventAccumulator(str(run / "sae" / "tensorboard")).Reload().Scalars("valid/fve")
        assert [s.value for s in curves] == pytest.approx(list(rows.query("split == 'valid'")["fve"]))
        return same and told["notes"]["from_sweep"] == name and told["stage"] == "fit"

    assert is_the_sae(best)
    assert (
        manifest(run, "sae")["notes"]["chosen"]["selection"] == table_of(run).query("best")["selection"].min()
    )
    # It is what a fit with the flags that were printed would have made.
    flags = printed.split("besides its other settings, ")[1].split("\n")[0].split()
    assert "up to date" in medsae("fit", "--run", str(run), *FIT, "--fit.fve_floor", "0.9", *flags).stdout
    medsae("encode", "--run", str(run), "--ray.progress", "false")
    assert "MedSAE summary" in medsae("measure", "--run", str(run), "--measure.min_firing", "3").stdout
    assert json.loads((run / "summary.json").read_text())["sae"]["settings"]["seed"] == int(best[-1])

    written = (run / "sweep" / "_manifest.json").stat().st_mtime_ns
    done = medsae("sweep", "--run", str(run), *GRID, "--sweep.promote", second, code=2)
    assert "made otherwise" in done.stderr
    assert "--overwrite" in done.stderr
    assert is_the_sae(best)
    done = medsae("sweep", "--run", str(run), *GRID, "--sweep.promote", second, "--overwrite")
    assert is_the_sae(second)
    assert "64 rows, up to date" in done.stdout
    assert "trial 1/8" not in done.stdout
    # Without --overwrite the one that is there stays, and how to replace it is told.
    done = medsae("sweep", "--run", str(run), *GRID)
    assert f"--sweep.promote {best} --overwrite" in done.stdout
    assert is_the_sae(second)
    assert (run / "sweep" / "_manifest.json").stat().st_mtime_ns == written
    assert Run(str(run)).stale_inputs("neurons")


def test_a_killed_sweep_finishes_only_what_is_missing(swept, copy_of, tmp_path):
    run = copy_of(*INPUTS)
    staged = run / "_partial" / "sweep"

    def curves(folder: Path) -> dict[str, int]:
        files = (folder / "tensorboard").glob("*/*")
        return {f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns for path in files}

    log = tmp_path / "first.log"
    process = start_medsae("sweep", "--run", str(run), *GRID, log=log)
    # Three have finished, and one of the next has at least one evaluation behind it and one before it.
    wait_for(
        lambda: (
            log.read_text().count("\ntrial ") >= 3 and len(list((staged / "tensorboard").glob("*/*"))) >= 17
        ),
        process,
    )
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)
    before = curves(staged)
    assert 17 <= len(before) < 32
    finished = re.findall(r"^trial +\d/8 +(\S+)", log.read_text(), re.MULTILINE)
    assert 3 <= len(finished) < 8

    done = medsae("sweep", "--run", str(run), *GRID)
    after = curves(run / "sweep")
    assert len(after) == 32
    again = [name.split("/")[0] for name, written in before.items() if after[name] != written]
    # Of no finished trial was a file written a second time; of one under way the last at most, whose
    # checkpoint was not there yet.
    assert not set(again) & set(finished)
    assert len(again) == len(set(again))
    assert not (run / "_partial" / "sweep").exists()
    told = re.findall(r"^trial +\d/8 +(\S+)", done.stdout, re.MULTILINE)
    assert set(finished) | set(told) == set(NAMES)

    pd.testing.assert_frame_equal(
        table_of(run).drop(columns="seconds"), table_of(swept[0]).drop(columns="seconds"), check_exact=True
    )
    for name in NAMES:
        weights = Path("sweep") / "saes" / name / "sae_weights.safetensors"
        assert (run / weights).read_bytes() == (swept[0] / weights).read_bytes()
    assert manifest(run)["notes"] == manifest(swept[0])["notes"]


def trial_worker(driver: int, name: str) -> int | None:
    """Process id of a trial: it works in a folder of its name, and its grandparent is the driver."""

    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])

    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd").endswith(f"/working_dirs/{name}"):
                pid = int(process.name)
                if parent(parent(pid)) == driver:
                    return pid
        except OSError:
            continue
    return None


@pytest.mark.parametrize("max_failures", [0, 3])
def test_a_trial_that_dies_takes_no_other_with_it(copy_of, tmp_path, swept, max_failures):
    run = copy_of(*INPUTS)
    victim = "relu-x1-l1e-3-lr2e-3-s0"
    arguments = (
        *FIT, "--sweep.sparsity", "[1e-3, 1e-1]", "--sweep.together", "never", "--fit.fve_floor", "0.9",
        "--fit.max_failures", str(max_failures),
    )  # fmt: skip
    process = start_medsae("sweep", "--run", str(run), *arguments, log=tmp_path / "log")
    first = run / "_partial" / "sweep" / "tensorboard" / victim / f"events.out.tfevents.{15:012d}"
    wait_for(first.exists, process)
    pid = trial_worker(process.pid, victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    log = tmp_path / "log"
    assert process.wait() == 0, log.read_text()[-3000:]
    table = table_of(run).drop(columns=["seconds", "front"]).set_index("trial")
    undisturbed = table_of(swept[0]).drop(columns=["seconds", "front"]).set_index("trial")
    survivors = sorted(set(table.index)) if max_failures else ["relu-x1-l1e-1-lr2e-3-s0"]
    for name in survivors:
        pd.testing.assert_frame_equal(table.loc[name], undisturbed.loc[name], check_exact=True)
    notes = manifest(run)["notes"]
    assert sorted(notes["ranking"]) == survivors
    if max_failures:
        return
    assert set(table.loc[[victim], "status"]) == {"failed"}
    assert not table.loc[[victim], "best"].any()
    assert (notes["n_finished"], notes["n_failed"]) == (1, 1)
    assert "died" in notes["failed"][victim]
    assert f"failed: {victim}: ActorDiedError" in log.read_text()
    assert not (run / "sweep" / "saes" / victim).exists()


def test_trials_that_asha_stops_are_on_no_front_and_a_low_fve_is_told(copy_of):
    run = copy_of(*INPUTS)
    done = medsae(
        "sweep", "--run", str(run), *FIT, "--sweep.sparsity", "[1e-3, 1.0, 3.0]", "--sweep.asha", "true",
        "--sweep.grace", "2", "--sweep.reduction_factor", "2", "--sweep.concurrent", "1",
        "--fit.fve_floor", "0.999",
    )  # fmt: skip
    table = table_of(run)
    status = table.groupby("trial")["status"].first()
    (good, *bad) = ("relu-x1-l1e-3-lr2e-3-s0", "relu-x1-l1-lr2e-3-s0", "relu-x1-l3-lr2e-3-s0")
    assert dict(status) == {good: "finished", bad[0]: "stopped", bad[1]: "stopped"}
    # Not before their grace was over.
    assert set(table[table["status"] == "stopped"].groupby("trial")["epoch"].max()) == {6}
    assert list(table.loc[table["front"], "trial"]) == [good]
    assert manifest(run)["notes"]["ranking"] == [good]
    assert manifest(run, "sae")["notes"]["from_sweep"] == good
    assert not manifest(run, "sae")["notes"]["fve_floor_reached"]
    assert [path.name for path in (run / "sweep" / "saes").iterdir()] == [good]
    assert done.stdout.count("stopped early") == 2
    assert "NO TRIAL REACHED FVE 0.999" in done.stdout
    assert "sweep.sparsity below 0.001" in done.stdout
    assert "sweep.expansion above 1" in done.stdout
    assert "fit.epochs above 12" in done.stdout
    # A stopped trial cannot be promoted.
    done = medsae(
        "sweep", "--run", str(run), *FIT, "--sweep.sparsity", "[1e-3, 1.0, 3.0]", "--sweep.asha", "true",
        "--sweep.grace", "2", "--sweep.reduction_factor", "2", "--sweep.concurrent", "1",
        "--fit.fve_floor", "0.999", "--sweep.promote", bad[0], code=2,
    )  # fmt: skip
    assert f"sweep.promote is '{bad[0]}', but it must be a finished trial" in done.stderr


def test_a_path_of_lambdas_trained_together_gives_the_same(copy_of, swept):
    run = copy_of(*INPUTS)
    done = medsae(
        "sweep", "--run", str(run), *FIT, "--sweep.sparsity", "[1e-3, 1e-1]", "--sweep.together", "always",
        "--fit.fve_floor", "0.9",
    )  # fmt: skip
    assert "Sweep of 2 SAEs in 1 trial" in done.stdout
    names = [NAMES[0], NAMES[2]]
    assert manifest(run)["notes"]["trained_together"] == [names]
    table, alone = (table_of(folder).query(f"trial in {names}") for folder in (run, swept[0]))
    assert list(table["trial"]) == list(alone["trial"])
    for figure in ("fve", "loss", "reconstruction", "selection"):
        np.testing.assert_allclose(table[figure], alone[figure], rtol=1e-4, equal_nan=True)
    for name in names:
        weights = [saelens.load(folder / "sweep" / "saes" / name).state_dict() for folder in (run, swept[0])]
        for key, value in weights[0].items():
            torch.testing.assert_close(value, weights[1][key], rtol=1e-4, atol=1e-4)


def test_optuna_draws_within_the_bounds(copy_of):
    run = copy_of(*INPUTS)
    medsae(
        "sweep", "--run", str(run), *FIT, "--fit.epochs", "3", "--sweep.search", "optuna",
        "--sweep.trials", "4", "--sweep.architecture", "[relu, topk]", "--sweep.sparsity", "[1e-4, 1e-1]",
        "--sweep.l0", "[8, 16]",
    )  # fmt: skip
    table = table_of(run)
    names = list(dict.fromkeys(table["trial"]))
    assert [name[-4:] for name in names] == ["-t00", "-t01", "-t02", "-t03"]
    relu, topk = (table[table["architecture"] == kind] for kind in ("relu", "topk"))
    assert relu["sparsity_setting"].between(1e-4, 1e-1).all()
    assert relu["l0_setting"].isna().all()
    assert topk["l0_setting"].isin([8, 16]).all()
    assert topk["sparsity_setting"].isna().all()
    assert len(relu) + len(topk) == len(table) == 8
    assert manifest(run, "sae")["notes"]["from_sweep"] == manifest(run)["notes"]["ranking"][0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "There is nothing to search: give values to at least one of sweep.architecture"),
        (("--sweep.sparsity", "[0.1]", "--sweep.promote", "it"), "sweep.promote is 'it', but .*relu-x1-l1e"),
        (("--sweep.architecture", "[relu, top]"), "sweep.architecture is 'top', but it must be one of relu"),
        (("--sweep.architecture", "[topk]", "--sweep.l0", "[8, 9999]"), "l0 is 9999; of 512 neurons"),
        (
            ("--sweep.architecture", "[topk]", "--fit.decoder_norm", "weighted", "--sweep.l0", "[8]"),
            "fit.decoder_norm is 'weighted', but topk",
        ),
        (
            ("--sweep.sparsity", "[0.1, 1]", "--sweep.asha", "true", "--sweep.grace", "4"),
            "sweep.grace is 4, but a trial has 4 evaluations",
        ),
        (("--sweep.search", "random", "--sweep.sparsity", "[1, 0.1]"), "sweep.sparsity is .* a lower and"),
        (
            ("--sweep.search", "random", "--sweep.sparsity", "[0.1, 1]", "--sweep.together", "always"),
            "sweep.together is 'always', but it must be auto or never",
        ),
    ],
)  # fmt: skip
def test_bad_settings_are_one_sentence(copy_of, capsys, arguments, sentence):
    run = copy_of(*INPUTS)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "--run", str(run), *FIT, *arguments])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert re.search(sentence, told)
    assert told.count("\n") == 1
    assert not (run / "_partial").exists()


def test_a_trial_that_cannot_be_placed_is_told(copy_of):
    run = copy_of(*INPUTS)
    arguments = (*FIT, "--sweep.sparsity", "[0.1, 1]", "--sweep.cpus_per_trial", "64")
    done = medsae("sweep", "--run", str(run), *arguments, code=2)
    assert "sweep.cpus_per_trial" in done.stderr
    assert "asks for 64 CPU" in done.stderr


@pytest.fixture
def embedded_ray(monkeypatch):
    """A Ray in this process."""
    from medsae_ray.cluster import start_ray, stop_ray

    monkeypatch.setenv("RAY_AUTH_MODE", ENVIRONMENT["RAY_AUTH_MODE"])
    start_ray(RaySettings(progress=False, object_store_gib=0.2))
    yield
    stop_ray()


def test_trials_read_the_embeddings_in_the_object_store(embedded_ray, tmp_path):
    """What `tune.with_parameters` hands to a trial, and its tensor, lie in memory that all of them share."""
    import warnings

    from ray import tune

    from medsae_ray.stages.tune_backend import Shared, shared_tensor

    def look(config, data):
        held = data["train"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tensor = shared_tensor(held)
        tune.report(
            {
                "writeable": held.flags.writeable or held.flags.owndata,
                "same": tensor.data_ptr() == held.ctypes.data,
                "total": float(tensor.sum()),
            }
        )

    rows = np.ones((60_000, 256), np.float32)
    data = Shared(train=rows)
    trainable = tune.with_resources(tune.with_parameters(look, data=data), {"CPU": 1})
    tuner = tune.Tuner(
        trainable,
        param_space={"seed": tune.grid_search([0, 1])},
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    told = [one.metrics for one in tuner.fit()]
    assert len(told) == 2
    for metrics in told:
        assert not metrics["writeable"]
        assert metrics["same"]
        assert metrics["total"] == rows.size


def test_a_checkpoint_that_a_newer_one_replaced_does_not_fail_its_trial(tmp_path):
    """As Tune finds it after a kill between the deletion and its own next snapshot."""
    from ray import tune
    from ray.train._internal.session import _TrainingResult

    from medsae_ray.stages.tune_backend import _named

    trial = object.__new__(_named(lambda config: None))
    gone = tune.Checkpoint.from_directory(str(tmp_path / "gone"))
    trial.restore(_TrainingResult(checkpoint=gone, metrics={"training_iteration": 3}))
    assert trial.iteration == 3


def test_a_trial_finds_its_furthest_state_in_whatever_folder_tune_gave_it(tmp_path):
    from pyarrow.fs import LocalFileSystem

    from medsae_ray.stages.tune_backend import furthest_state

    for folder, step in (("t-s1", 7), ("t-s1_d4ae", 14), ("t-s10", 99), ("other_t-s1", 98)):
        (tmp_path / folder / "checkpoint_0").mkdir(parents=True)
        torch.save({"step": step}, tmp_path / folder / "checkpoint_0" / "state.pt")
    (tmp_path / "t-s1_e5bf" / "checkpoint_1").mkdir(parents=True)
    (tmp_path / "t-s1_e5bf" / "checkpoint_1" / "state.pt").write_bytes(b"cut off")
    assert furthest_state(LocalFileSystem(), str(tmp_path), "t-s1") == {"step": 14}
    assert furthest_state(LocalFileSystem(), str(tmp_path), "t-s2") is None
