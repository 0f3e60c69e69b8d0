"""Stage `fit`: the sparse autoencoder, by Ray Train on the object-store dataset of embeddings.

Every few epochs the model is judged on the validation split and checkpointed; Ray Train keeps the
checkpoints of lowest selection score (paper.md, row "checkpoint"), and the best one is exported.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from medsae_ray.cluster import require_resources, start_ray
from medsae_ray.config import FitSettings, Settings, fingerprinted
from medsae_ray.errors import InputError
from medsae_ray.measure import LabelPolicy
from medsae_ray.run import Plan, Run, Staging
from medsae_ray.stages.outcome import Outcome
from medsae_ray.stages.rows import batches_of, embeddings_of, matrix, split_rows, vectors
from medsae_ray.tables import HISTORY

CENTRE_ROWS = 20_000
"""Rows from which the geometric median is taken: its standard error is then far below a decoder row."""


def fit(run: Run, settings: Settings) -> Outcome:
    """Fit the SAE on the training split and write `sae/`: weights, normaliser, history, checkpoints.

    Raises InputError for embeddings that cannot be normalised.
    """
    chosen = settings.fit
    source = run.require("embeddings", "embed")
    radiographs = run.require("radiographs", "radiographs")
    policy = LabelPolicy(settings.measure.uncertain, settings.measure.blank)
    plan = Plan(
        "fit",
        "sae",
        {**fingerprinted(chosen), **asdict(policy)},
        {"embeddings": source.fingerprint, "radiographs": radiographs.fingerprint},
    )
    staging = run.begin(plan, settings.overwrite)
    if staging is None:
        return Outcome(run.require("sae", "fit"), ran=False)

    start_ray(settings.ray)
    cpus, gpus = chosen.workers * chosen.cpus_per_worker, chosen.workers * chosen.gpus_per_worker
    require_resources("fit.workers", {"CPU": cpus, "GPU": gpus})
    train, valid = split_rows(run, "train"), split_rows(run, "valid")
    for name, rows in (("train", train), ("valid", valid)):
        if not len(rows.image_ids):
            raise InputError(f"Split {name!r} has no embedding in {run.uri}: nothing to fit on.")
    normaliser, centre = _normalise(run, train.image_ids, chosen)
    loop_config = {
        "settings": chosen,
        "normaliser": normaliser,
        "centre": centre,
        "n_train": len(train.image_ids),
        "valid_labels": policy.apply(valid.labels),
        "in_memory": source.notes["embedding_dim"] * 4 * len(train.image_ids) <= chosen.in_memory_gib * 2**30,
        "tensorboard": (run.uri, staging.path("tensorboard")),
    }
    best, history = _train(run, staging, plan, loop_config, train.image_ids, valid.image_ids)
    _export(staging, best, normaliser, source.stand_ins)
    staging.write_table(pa.Table.from_pylist(history, HISTORY), "history/part-00000.parquet")
    chosen_row = min((h for h in history if h["split"] == "valid"), key=lambda h: h["selection"])
    manifest = staging.commit(
        rows_in=len(train.image_ids),
        rows_out=len(history),
        notes={
            "chosen": chosen_row,
            "fve_floor_reached": chosen_row["fve"] > chosen.fve_floor,
            "n_neurons": best.config.n_neurons,
            "normaliser": {"convention": normaliser.convention, "k": normaliser.scale},
        },
    )
    if not manifest.notes["fve_floor_reached"]:
        print(
            f"No checkpoint reached FVE {chosen.fve_floor} on validation (best kept: "
            f"{chosen_row['fve']:.3f}): train longer, or lower fit.sparsity."
        )
    return Outcome(manifest, ran=True)


def _normalise(run: Run, image_ids: pa.Array, chosen: FitSettings) -> tuple[Any, Any]:
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
) -> tuple[Any, list[dict[str, Any]]]:
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
    last = _load_state(result.checkpoint)
    best = _load_state(result.get_best_checkpoint("selection", "min"))
    sae = _new_sae(loop_config)
    sae.load_state_dict(best["step"]["sae"])
    return sae, last["history"]


def train_loop(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs: epochs of global batches, evaluations, checkpoints."""
    import ray.train
    import torch
    import torch.distributed
    from ray.train.v2._internal.execution.context import logger as report_log

    from medsae_ray.sae.step import TrainStep

    # Named by its file, this logger escapes `LoggingConfig`: it would print every report in full.
    report_log.setLevel(logging.WARNING)
    chosen: FitSettings = config["settings"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        local = context.get_local_world_size()
        torch.set_num_threads(chosen.threads or max(1, (os.cpu_count() or 1) // local))

    sae = _new_sae(config).to(device)
    steps_an_epoch = -(-config["n_train"] // chosen.batch_size)
    step = TrainStep(
        sae,
        learning_rate=chosen.learning_rate,
        sparsity_warmup_steps=int(chosen.sparsity_warmup * chosen.epochs * steps_an_epoch),
    )
    first_epoch, history, earlier_seconds = 0, [], 0.0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        state = _load_state(checkpoint)
        step.load_state_dict(state["step"])
        first_epoch, history, earlier_seconds = state["epoch"], state["history"], state["seconds"]

    batches = _batch_source(config, rank, world, device)
    valid = torch.from_numpy(config["normaliser"].apply(matrix(_tables("valid")))).to(device)
    all_reduce = torch.distributed.all_reduce if world > 1 else None
    started = time.monotonic()
    # Summed on the device: reading a loss at every step would wait for the GPU.
    totals, n_steps = torch.zeros(3, device=device), 0
    for epoch in range(first_epoch, chosen.epochs):
        for batch, global_size in batches(epoch):
            totals += torch.stack(step.step(batch, global_size, all_reduce))
            n_steps += 1
        if (epoch + 1) % chosen.evaluate_every and epoch + 1 < chosen.epochs:
            continue
        seconds = earlier_seconds + time.monotonic() - started
        metrics, made = {}, None
        if rank == 0:
            told = {"epoch": epoch + 1, "step": step.n_steps, "seconds": seconds}
            losses = dict(
                zip(("loss", "reconstruction", "sparsity"), (totals / n_steps).tolist(), strict=True)
            )
            judged, density = _judge(sae, valid, config)
            history += [{**told, "split": "train", **losses}, {**told, "split": "valid", **judged}]
            _tell(history[-2:], chosen.epochs)
            run_uri, folder = config["tensorboard"]
            _write_events(run_uri, folder, history[-2:], density)
            metrics, made = judged, {
                "step": step.state_dict(), "epoch": epoch + 1, "history": history, "seconds": seconds
            }  # fmt: skip
        _report(metrics, made)
        totals.zero_()
        n_steps = 0


def _report(metrics: dict[str, float], state: dict[str, Any] | None) -> None:
    """Report on every rank, with the checkpoint from the one that has it."""
    import ray.train
    import torch

    if state is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "state.pt")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _batch_source(config: dict[str, Any], rank: int, world: int, device: Any) -> Any:
    """A function epoch → (this worker's slice [b, d] on the device, size of the global batch)."""
    import ray.train
    import torch

    from medsae_ray.sae.sampling import global_batches, rank_slice

    chosen: FitSettings = config["settings"]
    normaliser = config["normaliser"]
    if config["in_memory"]:
        held = torch.from_numpy(normaliser.apply(matrix(_tables("train")))).to(device)

        def whole(epoch: int) -> Iterator[tuple[Any, int]]:
            for rows in global_batches(len(held), chosen.batch_size, chosen.seed, epoch):
                mine = torch.from_numpy(rank_slice(rows, rank, world)).to(device)
                yield held[mine], len(rows)

        return whole

    shard = ray.train.get_dataset_shard("train")

    def streamed(epoch: int) -> Iterator[tuple[Any, int]]:
        for batch in shard.iter_batches(
            batch_size=max(1, chosen.batch_size // world),
            batch_format="pyarrow",
            local_shuffle_buffer_size=16 * chosen.batch_size,
            local_shuffle_seed=chosen.seed + epoch,
        ):
            rows = normaliser.apply(vectors(batch["embedding"]))
            yield torch.from_numpy(rows).to(device), len(rows) * world

    return streamed


def _tables(name: str) -> Iterator[pa.Table]:
    import ray.train

    yield from ray.train.get_dataset_shard(name).iter_batches(batch_size=8192, batch_format="pyarrow")


def _judge(sae: Any, valid: Any, config: dict[str, Any]) -> tuple[dict[str, float], np.ndarray]:
    """The validation figures of one evaluation, with its selection score, and the neurons' densities [m]."""
    import torch

    from medsae_ray.sae.evaluate import evaluate, selection_score

    chosen: FitSettings = config["settings"]
    y, known = (torch.tensor(array) for array in config["valid_labels"])
    judged = evaluate(sae, valid, labels=(y, known), min_firing=chosen.min_firing)
    figures = {
        "fve": judged.fve,
        "l0": judged.l0,
        "dead": judged.dead,
        "entropy": judged.entropy,
        "selection": selection_score(judged.entropy, judged.fve, chosen.fve_floor),
        "loss": judged.loss,
        "reconstruction": judged.reconstruction,
        "sparsity": judged.sparsity,
    }
    return figures, judged.density


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


def _write_events(run_uri: str, folder: str, rows: list[dict[str, Any]], density: np.ndarray) -> None:
    """The same figures, and the densities of living neurons, as a TensorBoard event file in the run."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as local:
        with SummaryWriter(local, filename_suffix=f".{rows[-1]['step']}") as writer:
            for row in rows:
                for name, value in row.items():
                    if name not in ("epoch", "step", "split"):
                        writer.add_scalar(f"{row['split']}/{name}", value, row["step"])
            writer.add_histogram("valid/log10_density", np.log10(density[density > 0]), rows[-1]["step"])
        filesystem = Run(run_uri).filesystem
        filesystem.create_dir(folder, recursive=True)
        for file in Path(local).iterdir():
            with filesystem.open_output_stream(f"{folder}/{file.name}") as stream:
                stream.write(file.read_bytes())


def _new_sae(config: dict[str, Any]) -> Any:
    from medsae_ray.sae.relu import ReLUSAE, SAEConfig

    chosen: FitSettings = config["settings"]
    d = config["normaliser"].embedding_dim
    shape = SAEConfig(
        embedding_dim=d,
        n_neurons=chosen.expansion * d,
        sparsity=chosen.sparsity,
        decoder_norm=chosen.decoder_norm,
        reduction=chosen.reconstruction,
    )
    return ReLUSAE(shape, centre=config["centre"], seed=chosen.seed)


def _load_state(checkpoint: Any) -> dict[str, Any]:
    import torch

    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)


def _export(staging: Staging, sae: Any, normaliser: Any, stand_ins: list[str]) -> None:
    from medsae_ray.sae.saelens import export_files

    for name, content in export_files(sae, normaliser, {"stand_ins": stand_ins}).items():
        staging.write_bytes(content, name)
    staging.write_bytes(normaliser.to_json().encode(), "normaliser.json")
