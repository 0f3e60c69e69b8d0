"""The trials of a sweep as Ray Tune runs them: one training each, on embeddings that all of them share.

What a trial has done lies in its own folder, which has its name. It goes on from the furthest state there,
not from the one that Tune had noted: Tune notes a checkpoint after it is written, and deletes the one before
it after that, so that a kill in between would cost work or leave nothing to go on from.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import posixpath
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pyarrow.fs as pafs
import ray
import torch
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from ray.tune.trainable.function_trainable import wrap_function

from medsae_ray.config import FitSettings, SweepSettings
from medsae_ray.run import Run, Staging
from medsae_ray.sae.stack import Stack, pays
from medsae_ray.sae.training import Fitting, Validation, held_batches
from medsae_ray.sae.trials import choices, has, n_evaluations, rounded, trial_name, with_values
from medsae_ray.stages.events import write_events

FOLDER, TRIALS = "_tune", "trials"
"""Where Tune works, in the staged table, and the name of its experiment there."""
PLACED = f"{FOLDER}/placed.json"
"""With which resources it was begun."""
GROUPS = f"{FOLDER}/groups.json"
"""Names of the trials that train as a stack: once decided, a resumed sweep keeps to it."""
WORST = 1e9
"""A score in place of an infinite one, with which neither ASHA nor Optuna can reckon."""


class Shared(dict[str, np.ndarray]):
    """Arrays in the object store: `train` and `valid` (normalised embeddings, float32 [n, d]), `y` and
    `known` (labels of `valid`, [n, L]) and `centre` (float32 [d])."""


@dataclass(frozen=True)
class Job:
    """What every trial of a sweep is told."""

    fit: FitSettings
    run_uri: str
    folder: str
    """Of the trials, in the run's file system."""
    events: str
    """Folder of their TensorBoard files, one folder a trial."""
    threads: int
    gpu: bool
    groups: dict[str, list[FitSettings]] = field(default_factory=dict)
    """Settings that train in one trial, by its name; empty where Optuna chooses them one by one."""

    def group(self, config: dict[str, Any]) -> list[FitSettings]:
        """The settings behind Tune's `config` of a trial."""
        if self.groups:
            return self.groups[config["trial"]]
        return [with_values(self.fit, {k: v for k, v in config.items() if k != "number"})]

    def name(self, config: dict[str, Any]) -> str:
        """The trial's name; numbered where Optuna may choose the same settings twice."""
        if self.groups:
            return config["trial"]
        return f"{trial_name(self.group(config)[0])}-t{config['number']:02d}"

    def names(self, config: dict[str, Any]) -> list[str]:
        """Names of the SAEs that train in the trial."""
        group = self.group(config)
        return [self.name(config)] if len(group) == 1 else [trial_name(one) for one in group]


def shared_tensor(array: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """An array of the object store as a tensor on the same memory, which nothing may write to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).to(device)


def train_trial(config: dict[str, Any], data: Shared, job: Job) -> None:
    """What Tune runs: a training, or a stack of them, from its last state if there is one."""
    device = torch.device("cuda" if job.gpu else "cpu")
    torch.set_num_threads(job.threads)
    train, centre = (shared_tensor(data[name], device) for name in ("train", "centre"))
    valid = Validation(*(shared_tensor(data[name], device) for name in ("valid", "y", "known")))
    group, names = job.group(config), job.names(config)
    fittings = [
        Fitting(one, n_train=len(train), embedding_dim=train.shape[1], centre=centre, device=device)
        for one in group
    ]
    run = Run(job.run_uri)
    state = furthest_state(run.filesystem, job.folder, job.name(config))
    if state is not None and state["finished"]:
        tune.report(_metrics([saved["history"] for saved in state["fittings"]], finished=True))
        return
    training = fittings[0] if len(fittings) == 1 else Stack(fittings)
    if state is not None:
        saved = state["fittings"]
        training.load_state_dict(saved[0] if isinstance(training, Fitting) else saved)
    for evaluated in training.run(held_batches(train, group[0]), valid):
        if evaluated:
            for fitting, name in zip(fittings, names, strict=True):
                assert fitting.density is not None
                events = posixpath.join(job.events, name)
                write_events(job.run_uri, events, fitting.history[-2:], fitting.density)
        with tempfile.TemporaryDirectory() as local:
            torch.save(_state(training, fittings), Path(local) / "state.pt")
            tune.report(
                _metrics([fitting.history for fitting in fittings], training.finished),
                checkpoint=tune.Checkpoint.from_directory(local),
            )


def _state(training: Fitting | Stack, fittings: list[Fitting]) -> dict[str, Any]:
    """What is kept of a trial; once it is finished, only what is told of it."""
    first = fittings[0]
    if training.finished:
        told = [{"history": f.history, "best": None if f.best is None else tuple(f.best)} for f in fittings]
    elif isinstance(training, Stack):
        told = training.state_dict()
    else:
        told = [training.state_dict()]
    return {"step": first.step.n_steps, "finished": training.finished, "fittings": told}


def _metrics(histories: list[list[dict[str, Any]]], finished: bool) -> dict[str, Any]:
    """The evaluation that represents a trial so far, and how many there were."""
    rows = [row for history in histories for row in history if row["split"] == "valid"]
    n = len(rows) // len(histories)
    best = min(rows, key=lambda row: row["selection"], default={"selection": WORST})
    told = {name: value for name, value in best.items() if name != "split"}
    return {**told, "selection": min(told["selection"], WORST), "evaluations": n, "finished": finished}


def furthest_state(filesystem: pafs.FileSystem, folder: str, trial: str) -> dict[str, Any] | None:
    """The state of most steps among a trial's whole checkpoints, on the CPU; None where there is none.

    `folder` holds a folder a trial, or several: where the driver was killed before Tune's snapshot knew of
    the trial, Tune begins it again beside the first, with a suffix.
    """
    found: list[dict[str, Any]] = []
    folders = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    own = [f.path for f in folders if f.base_name == trial or f.base_name.startswith(f"{trial}_")]
    selectors = [pafs.FileSelector(path, recursive=True, allow_not_found=True) for path in own]
    for info in (info for selector in selectors for info in filesystem.get_file_info(selector)):
        if info.base_name != "state.pt":
            continue
        with tempfile.TemporaryDirectory() as local:
            copy = Path(local) / "state.pt"
            # A kill may have cut one off as it was copied, and Tune may be deleting another.
            try:
                with filesystem.open_input_stream(info.path) as stream:
                    copy.write_bytes(stream.read())
                found.append(torch.load(copy, map_location="cpu", weights_only=True))
            except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
                continue
    return max(found, key=lambda state: state["step"], default=None)


class Lines(tune.Callback):
    """One line on the console for each trial that ends."""

    def __init__(self, n_trials: int) -> None:
        self.n_trials = n_trials

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = trial.last_result
        self._tell(trials, trial, as_line(row) + ("" if row["finished"] else "  stopped early"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trials, trial, "failed")

    def _tell(self, trials: list[Any], trial: Any, what: str) -> None:
        done = 1 + sum(other.is_finished() for other in trials if other is not trial)
        sys.stdout.write(f"trial {done:>3}/{self.n_trials}  {trial}  {what}\n")
        sys.stdout.flush()


def as_line(row: dict[str, Any]) -> str:
    """The figures of a validation row of `history`."""
    return (
        f"FVE {row['fve']:.3f}  L0 {row['l0']:.1f}  dead {row['dead']:.1%}  entropy {row['entropy']:.3f}  "
        f"(epoch {row['epoch']})"
    )


def stacking_pays(
    job: Job, group: list[FitSettings], embedding_dim: int, resources: dict[str, float]
) -> bool:
    """Whether a group trains faster as one stack, timed where a trial would run."""

    def timed() -> bool:
        torch.set_num_threads(job.threads)
        device = torch.device("cuda" if job.gpu else "cpu")
        fittings = [
            Fitting(one, n_train=one.batch_size, embedding_dim=embedding_dim, device=device) for one in group
        ]
        return pays(fittings, group[0].batch_size)

    task = ray.remote(timed).options(num_cpus=resources["CPU"], num_gpus=resources["GPU"])
    return ray.get(task.remote())


class Ended(NamedTuple):
    """A trial that Tune is done with."""

    trial: str
    names: list[str]
    """Of the SAEs that trained in it."""
    settings: list[FitSettings]
    """Theirs."""
    error: Exception | None


def run_trials(staging: Staging, data: Shared, job: Job, sweep: SweepSettings, at_a_time: int) -> list[Ended]:
    """Run what is missing of a sweep's trials, and tell of all of them in the order of the search."""
    # Ray Tune's own logs, tables and pages of warnings; and Ctrl-C ends the sweep as it ends every stage.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    os.environ.update(
        RAY_AIR_NEW_OUTPUT="0",
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_PRINT_ALL_TRIAL_ERRORS="0",
        TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
    )
    n_trials = len(job.groups) or sweep.trials
    resources = {"CPU": sweep.cpus_per_trial, "GPU": sweep.gpus_per_trial}
    function = tune.with_parameters(train_trial, data=data, job=job)
    trainable = _named(tune.with_resources(function, resources))
    space = {"trial": tune.grid_search(list(job.groups))} if job.groups else {}
    placed = {**resources, "at_a_time": at_a_time}
    path = staging.path(FOLDER, TRIALS)
    # Tune restores the resources of a trial, too, which another machine may not have. What the trials have
    # done they find themselves.
    if staging.read_json(PLACED) == placed and tune.Tuner.can_restore(path, staging.filesystem):
        tuner = tune.Tuner.restore(path, trainable, param_space=space, storage_filesystem=staging.filesystem)
    else:
        staging.write_json(PLACED, placed)
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                search_alg=None if job.groups else _optuna(job.fit, sweep),
                num_samples=1 if job.groups else n_trials,
                scheduler=_asha(job.fit, sweep) if sweep.asha else None,
                max_concurrent_trials=at_a_time,
                trial_name_creator=functools.partial(_name, job=job),
                trial_dirname_creator=functools.partial(_name, job=job),
            ),
            run_config=tune.RunConfig(
                name=TRIALS,
                storage_path=staging.path(FOLDER),
                storage_filesystem=staging.filesystem,
                failure_config=tune.FailureConfig(max_failures=job.fit.max_failures),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                callbacks=[Lines(n_trials)],
                verbose=0,
            ),
        )
    results = tuner.fit()
    ended = [(results[i].config or {}, results[i].error) for i in range(len(results))]
    # Tune lists the trials of a resumed sweep in another order.
    order = {name: i for i, name in enumerate(job.groups)}
    ended.sort(key=lambda one: order[one[0]["trial"]] if order else one[0]["number"])
    return [Ended(job.name(config), job.names(config), job.group(config), error) for config, error in ended]


def _named(function: Any) -> Any:
    """The trainable under which Ray's dashboard shows a trial by its name."""

    class Trial(wrap_function(function, name="sweep")):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            # They tell where every checkpoint lies.
            for module in ("ray.train._internal.storage", "ray.tune.trainable.trainable"):
                logging.getLogger(module).setLevel(logging.WARNING)
            super().setup(config)

        def restore(self, checkpoint_path: Any) -> None:
            # After a kill Tune may know of no checkpoint but one that a newer has replaced, and would count
            # the trial as failed. A trial looks for its furthest state itself.
            with contextlib.suppress(ValueError):
                super().restore(checkpoint_path)

        def __repr__(self) -> str:
            return self.trial_name or "sweep"

    return Trial


def _name(trial: Any, job: Job) -> str:
    return job.name(trial.config)


def _asha(fit: FitSettings, sweep: SweepSettings) -> Any:
    return tune.schedulers.ASHAScheduler(
        time_attr="evaluations",
        metric="selection",
        mode="min",
        max_t=n_evaluations(fit),
        grace_period=sweep.grace,
        reduction_factor=sweep.reduction_factor,
    )


def _optuna(fit: FitSettings, sweep: SweepSettings) -> OptunaSearch:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(
        space=functools.partial(_ask, values=choices(fit, sweep)),
        metric="selection",
        mode="min",
        sampler=optuna.samplers.TPESampler(seed=sweep.seed),
    )


def _ask(asked: Any, values: dict[str, list[Any]]) -> dict[str, Any]:
    """A trial's values as Optuna suggests them: only those that its architecture has."""
    told: dict[str, Any] = {}
    for name, of in values.items():
        if not has(told.get("architecture", of[0]), name):
            continue
        if len(of) == 1:
            told[name] = of[0]
        elif name in ("sparsity", "learning_rate"):
            told[name] = rounded(asked.suggest_float(name, of[0], of[1], log=True))
        else:
            told[name] = asked.suggest_categorical(name, of)
    return {**told, "number": asked.number}
