"""Stage `fit`: the sparse autoencoder, by Ray Train on the object-store dataset of embeddings.

What is trained, judged and chosen is `sae/training.py`'s; here are the workers, their batches and the
checkpoints, from which a killed worker or driver goes on exactly.
"""

from __future__ import annotations

import itertools
import logging
import os
import posixpath
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from medsae_ray.cluster import require_resources, start_ray
from medsae_ray.config import FitSettings, Settings, fingerprinted
from medsae_ray.errors import InputError
from medsae_ray.measure import LabelPolicy
from medsae_ray.run import Plan, Run, Staging
from medsae_ray.stages.events import write_events
from medsae_ray.stages.outcome import Outcome
from medsae_ray.stages.rows import SplitRows, batches_of, embeddings_of, matrix, split_rows, vectors
from medsae_ray.tables import HISTORY

if TYPE_CHECKING:
    import torch

    from medsae_ray.sae.base import SparseAutoencoder
    from medsae_ray.sae.normaliser import Normaliser
    from medsae_ray.sae.training import Batches, Fitting
    from medsae_ray.sae.workers import Workers

CENTRE_ROWS = 20_000
"""Rows from which the geometric median is taken: its standard error is then far below a decoder row."""

NOT_JUDGED = 1e9
"""By what Ray Train ranks a checkpoint between evaluations: worse than any selection score, so that it is
deleted once it is not the last. Finite, because Ray writes an infinite score down as null."""


def fit(run: Run, settings: Settings) -> Outcome:
    """Fit the SAE on the training split and write `sae/`: weights, normaliser, history, checkpoints.

    Raises InputError for embeddings that cannot be normalised, and settings that do not fit together.
    """
    from medsae_ray.sae.training import new_sae

    chosen = settings.fit
    source = run.require("embeddings", "embed")
    # In a worker it would fail later, and be tried again.
    new_sae(chosen, source.notes["embedding_dim"])
    policy = LabelPolicy(settings.measure.uncertain, settings.measure.blank)
    staging = run.begin(plan := fit_plan(run, chosen, policy), settings.overwrite)
    if staging is None:
        return Outcome(run.require("sae", "fit"), ran=False)

    start_ray(settings.ray)
    cpus, gpus = chosen.workers * chosen.cpus_per_worker, chosen.workers * chosen.gpus_per_worker
    require_resources("fit.workers", {"CPU": cpus, "GPU": gpus})
    train, valid = fitting_rows(run)
    normaliser, centre = normalise(run, train.image_ids, chosen)
    loop_config = {
        "settings": chosen,
        "normaliser": normaliser,
        "centre": centre,
        "n_train": len(train.image_ids),
        "valid_labels": policy.apply(valid.labels),
        "in_memory": source.notes["embedding_dim"] * 4 * len(train.image_ids) <= chosen.in_memory_gib * 2**30,
        "tensorboard": (run.uri, staging.path("tensorboard")),
    }
    fitted = _train(run, staging, plan, loop_config, train.image_ids, valid.image_ids)
    sae, chosen_row = fitted.best_sae(), fitted.best_row
    write_sae(staging, "", sae, normaliser, source.stand_ins)
    staging.write_table(pa.Table.from_pylist(fitted.history, HISTORY), "history/part-00000.parquet")
    manifest = staging.commit(
        rows_in=len(train.image_ids),
        rows_out=len(fitted.history),
        notes=fit_notes(chosen, chosen_row, normaliser),
    )
    if not manifest.notes["fve_floor_reached"]:
        print(
            f"No checkpoint reached FVE {chosen.fve_floor} on validation (best kept: "
            f"{chosen_row['fve']:.3f}): train longer, or "
            + (
                "lower fit.sparsity."
                if chosen.strength[0] == "sparsity"
                else f"raise fit.l0 (now {sae.config.k})."
            )
        )
    return Outcome(manifest, ran=True)


def fit_plan(run: Run, chosen: FitSettings, policy: LabelPolicy) -> Plan:
    """What `sae` would be with these settings. InputError where an input is missing or stale."""
    return Plan(
        "fit",
        "sae",
        {**fingerprinted(chosen), **asdict(policy)},
        {
            "embeddings": run.require("embeddings", "embed").fingerprint,
            "radiographs": run.require("radiographs", "radiographs").fingerprint,
        },
    )


def fitting_rows(run: Run) -> tuple[SplitRows, SplitRows]:
    """Rows of train and valid. InputError where a split has no embedding."""
    found = split_rows(run, "train"), split_rows(run, "valid")
    for name, rows in zip(("train", "valid"), found, strict=True):
        if not len(rows.image_ids):
            raise InputError(f"Split {name!r} has no embedding in {run.uri}: nothing to fit on.")
    return found


def fit_notes(chosen: FitSettings, chosen_row: dict[str, Any], normaliser: Normaliser) -> dict[str, Any]:
    """What the manifest of `sae` says of an SAE with these settings, kept at this row of its history."""
    return {
        "architecture": chosen.architecture,
        "chosen": chosen_row,
        "fve_floor_reached": chosen_row["fve"] > chosen.fve_floor,
        "n_neurons": chosen.expansion * normaliser.embedding_dim,
        "normaliser": {"convention": normaliser.convention, "k": normaliser.scale},
    }


def normalise(run: Run, image_ids: pa.Array, chosen: FitSettings) -> tuple[Normaliser, torch.Tensor]:
    """The training split's normaliser, and the geometric median of its normalised embeddings."""
    import torch

    from medsae_ray.sae.geometric_median import geometric_median
    from medsae_ray.sae.normaliser import NormaliserSums

    # Ids are hashes, so the smallest ones are a random sample, the same wherever it is drawn.
    sample = image_ids.take(pa.array(np.argsort([i[-16:] for i in image_ids.to_pylist()])[:CENTRE_ROWS]))
    sums, kept = NormaliserSums(), []
    for batch in batches_of(run, image_ids):
        sums.update(vectors(batch["embedding"]))
        kept.append(batch.filter(pa.compute.is_in(batch["image_id"], sample)))
    normaliser = sums.finish(chosen.normalisation)
    return normaliser, geometric_median(torch.from_numpy(normaliser.apply(matrix(kept))))


def _train(
    run: Run,
    staging: Staging,
    plan: Plan,
    loop_config: dict[str, Any],
    train_ids: pa.Array,
    valid_ids: pa.Array,
) -> Fitting:
    from ray.train import (
        CheckpointConfig,
        DataConfig,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
    )

    from medsae_ray.stages.torch_backend import Trainer, WorkersTorchConfig

    # How long each report waits for the controller at most; Ray's default of 2 s outlasts a small epoch.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    chosen: FitSettings = loop_config["settings"]
    use_gpu = chosen.gpus_per_worker > 0
    resources = {"CPU": chosen.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = chosen.gpus_per_worker
    trainer = Trainer(
        train_loop,
        train_loop_config=loop_config,
        scaling_config=ScalingConfig(
            num_workers=chosen.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        torch_config=WorkersTorchConfig(backend="nccl" if use_gpu else "gloo"),
        datasets={"train": embeddings_of(run, train_ids), "valid": embeddings_of(run, valid_ids)},
        dataset_config=DataConfig(datasets_to_split=[] if loop_config["in_memory"] else ["train"]),
        run_config=RunConfig(  # type: ignore[call-arg]
            # The name holds the fingerprint: the same name resumes, another setting must not.
            name=f"fit-{plan.fingerprint[:12]}",
            storage_path=staging.path("checkpoints"),
            storage_filesystem=staging.filesystem,
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(max_failures=chosen.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=chosen.keep_checkpoints,
                checkpoint_score_attribute="selection",
                checkpoint_score_order="min",
            ),
        ),
    )
    result = trainer.fit()
    if result.error is not None or result.checkpoint is None:
        raise RuntimeError(f"training did not end well: {result.error}")
    _delete_unregistered(staging, result)
    fitting = _fitting(loop_config)
    fitting.load_state_dict(_load_state(result.checkpoint))
    return fitting


def _delete_unregistered(staging: Staging, result: Any) -> None:
    """Delete checkpoints that a kill left behind before Ray Train knew of them, or as it deleted them."""
    known = {result.checkpoint.path, *(checkpoint.path for checkpoint, _ in result.best_checkpoints)}
    for info in staging.filesystem.get_file_info(pafs.FileSelector(result.path)):
        if info.type == pafs.FileType.Directory and info.path not in known:
            staging.filesystem.delete_dir(info.path)


def _fitting(
    config: dict[str, Any], device: torch.device | str = "cpu", workers: Workers | None = None
) -> Fitting:
    """The training at its first step."""
    from medsae_ray.sae.training import Fitting
    from medsae_ray.sae.workers import ALONE

    return Fitting(
        config["settings"],
        n_train=config["n_train"],
        embedding_dim=config["normaliser"].embedding_dim,
        centre=config["centre"],
        device=device,
        workers=workers or ALONE,
    )


def train_loop(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs, from the last checkpoint if there is one."""
    import ray.train
    import torch
    from ray.train.v2._internal.execution.context import logger as report_log

    from medsae_ray.sae.training import Validation
    from medsae_ray.sae.workers import ALONE, TorchWorkers

    # Named by its file, this logger escapes `LoggingConfig`: it would print every report in full.
    report_log.setLevel(logging.WARNING)
    chosen: FitSettings = config["settings"]
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        local = context.get_local_world_size()
        torch.set_num_threads(chosen.threads or max(1, (os.cpu_count() or 1) // local))

    workers = TorchWorkers() if context.get_world_size() > 1 else ALONE
    fitting = _fitting(config, device, workers)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        fitting.load_state_dict(_load_state(checkpoint))
    batches = _batch_source(config, workers, device)
    x = torch.from_numpy(config["normaliser"].apply(matrix(_tables("valid")))).to(device)
    y, known = (torch.tensor(array) for array in config["valid_labels"])
    for evaluated in fitting.run(batches, Validation(x, y, known)):
        if workers.rank > 0:
            ray.train.report({})
            continue
        if evaluated:
            _tell(fitting.history[-2:], chosen.epochs)
            assert fitting.density is not None
            run_uri, folder = config["tensorboard"]
            write_events(run_uri, folder, fitting.history[-2:], fitting.density)
        score = fitting.history[-1]["selection"] if evaluated else NOT_JUDGED
        with tempfile.TemporaryDirectory() as local:
            torch.save(fitting.state_dict(), Path(local) / "state.pt")
            ray.train.report(
                {"selection": min(score, NOT_JUDGED)},
                checkpoint=ray.train.Checkpoint.from_directory(local),
            )


def _batch_source(config: dict[str, Any], workers: Workers, device: torch.device) -> Batches:
    """This worker's batches: of the matrix that every worker holds, or streamed from its shard."""
    import ray.train
    import torch

    from medsae_ray.sae.training import held_batches

    chosen: FitSettings = config["settings"]
    normaliser = config["normaliser"]
    if config["in_memory"]:
        held = torch.from_numpy(normaliser.apply(matrix(_tables("train")))).to(device)
        return held_batches(held, chosen, workers)

    shard = ray.train.get_dataset_shard("train")

    def streamed(epoch: int, first: int) -> Iterator[tuple[torch.Tensor, int]]:
        batches = shard.iter_batches(
            batch_size=max(1, chosen.batch_size // workers.world),
            batch_format="pyarrow",
            local_shuffle_buffer_size=16 * chosen.batch_size,
            local_shuffle_seed=chosen.seed + epoch,
        )
        for batch in itertools.islice(batches, first, None):
            rows = normaliser.apply(vectors(batch["embedding"]))
            yield torch.from_numpy(rows).to(device), len(rows) * workers.world

    return streamed


def _tables(name: str) -> Iterator[pa.Table]:
    import ray.train

    yield from ray.train.get_dataset_shard(name).iter_batches(batch_size=8192, batch_format="pyarrow")


def _tell(rows: list[dict[str, Any]], epochs: int) -> None:
    """One line on the console."""
    train, valid = rows
    # Not print: Ray Train patches it to log the line a second time.
    sys.stdout.write(
        f"epoch {valid['epoch']:>4}/{epochs}  loss {train['loss']:.4f}  FVE {valid['fve']:.3f}  "
        f"L0 {valid['l0']:.0f}  dead {valid['dead']:.1%}  entropy {valid['entropy']:.3f}  "
        f"{valid['seconds']:.0f} s\n"
    )
    sys.stdout.flush()


def _load_state(checkpoint: Any) -> dict[str, Any]:
    import torch

    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)


def write_sae(
    staging: Staging, folder: str, sae: SparseAutoencoder, normaliser: Normaliser, stand_ins: list[str]
) -> None:
    """Write the SAE in SAELens's format, and its normaliser, into a folder of a staged table."""
    from medsae_ray.sae.saelens import export_files

    files = export_files(sae, normaliser, {"stand_ins": stand_ins})
    files["normaliser.json"] = normaliser.to_json().encode()
    for name, content in files.items():
        staging.write_bytes(content, posixpath.join(folder, name))
