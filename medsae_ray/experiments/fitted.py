"""Many SAEs fitted and measured, a Ray task each, for the experiments."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import posixpath
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.fs as pafs

from medsae_ray.cluster import require_resources, start_ray
from medsae_ray.config import FitSettings, Settings, fingerprinted
from medsae_ray.experiments.measured import Split, as_row, measure_sae, read_splits
from medsae_ray.measure import LabelPolicy
from medsae_ray.run import Plan, Run, Staging
from medsae_ray.sae.normaliser import Normaliser
from medsae_ray.stages.fit import normalise

Convention = Literal["unit", "dim"]

SPARSITY = {"relu": "sparsity", "gated": "sparsity"}
"""The setting that makes an architecture sparser, where it is not `l0`."""


def setting_of(architecture: str) -> str:
    """The setting that decides how many neurons of an architecture fire."""
    return SPARSITY.get(architecture, "l0")


class Embedded(NamedTuple):
    """What every task shares, out of the object store."""

    splits: dict[str, Split]
    """Raw embeddings and labels of train, valid and test."""
    normalisers: dict[Convention, Normaliser]
    """By convention."""
    centres: dict[Convention, np.ndarray]
    """Geometric medians of the normalised training embeddings, by convention."""


def experiment_plan(run: Run, table: str, settings: Settings, told: dict[str, Any]) -> Plan:
    """What an experiment's table would be. InputError where an input is missing or stale."""
    measured = dataclasses.asdict(settings.measure)
    return Plan(
        table,
        table,
        {"fit": fingerprinted(settings.fit), "measure": measured, **told},
        {
            "embeddings": run.require("embeddings", "embed").fingerprint,
            "radiographs": run.require("radiographs", "radiographs").fingerprint,
        },
    )


class Fits:
    """Fits and measures SAEs of one run; what was measured once is kept and not fitted again."""

    def __init__(
        self, run: Run, staging: Staging, settings: Settings, conventions: tuple[Convention, ...]
    ) -> None:
        """`conventions` are the normalisations that will be asked for. Starts Ray."""
        import ray

        self.staging = staging
        self.settings = settings
        start_ray(settings.ray)
        chosen = settings.sweep
        require_resources(
            "sweep.cpus_per_trial", {"CPU": chosen.cpus_per_trial, "GPU": chosen.gpus_per_trial}
        )
        policy = LabelPolicy(settings.measure.uncertain, settings.measure.blank)
        splits = read_splits(run, policy)
        normalisers, centres = {}, {}
        for convention in conventions:
            of = dataclasses.replace(settings.fit, normalisation=convention)
            normaliser, centre = normalise(run, splits["train"].image_ids, of)
            normalisers[convention], centres[convention] = normaliser, centre.numpy()
        self._shared = ray.put(Embedded(splits, normalisers, centres))

    def __call__(self, wanted: list[FitSettings]) -> list[dict[str, Any]]:
        """A row for each: its settings and `Measured` figures, in the order asked for."""
        import ray

        found = [self._kept(settings) for settings in wanted]
        missing = [i for i, row in enumerate(found) if row is None]
        chosen, measure = self.settings.sweep, self.settings.measure
        cpus = ray.cluster_resources().get("CPU", 1)
        at_once = max(1, min(len(missing), int((os.cpu_count() or 1) // chosen.cpus_per_trial)))
        task = ray.remote(num_cpus=cpus / at_once if cpus < at_once else chosen.cpus_per_trial)(fit_one)
        under_way: dict[Any, int] = {}
        while missing or under_way:
            while missing and (len(under_way) < (chosen.concurrent or at_once)):
                i = missing.pop(0)
                remote = task.options(num_gpus=chosen.gpus_per_trial, name=name_of(wanted[i]), max_retries=3)
                under_way[remote.remote(self._shared, wanted[i], measure, chosen.threads or 1)] = i
            done, _ = ray.wait(list(under_way))
            i = under_way.pop(done[0])
            row = found[i] = ray.get(done[0])
            self._keep(wanted[i], row)
            print(
                f"{name_of(wanted[i]):<34} FVE {row['fve']:.3f}  L0 {row['l0']:.1f}  "
                f"dead on train {row['dead_train']:.1%}  entropy {row['entropy']:.3f}  "
                f"best AUROC {row['best_auroc']:.3f}  {row['seconds']:.0f} s",
                flush=True,
            )
        return [row for row in found if row is not None]

    def _path(self, settings: FitSettings) -> str:
        told = json.dumps(fingerprinted(settings), sort_keys=True).encode()
        return self.staging.path("_fits", f"{hashlib.sha256(told).hexdigest()[:16]}.json")

    def _kept(self, settings: FitSettings) -> dict[str, Any] | None:
        path = self._path(settings)
        if self.staging.filesystem.get_file_info(path).type == pafs.FileType.NotFound:
            return None
        with self.staging.filesystem.open_input_stream(path) as stream:
            return json.loads(stream.read())

    def _keep(self, settings: FitSettings, row: dict[str, Any]) -> None:
        path = self._path(settings)
        self.staging.filesystem.create_dir(posixpath.dirname(path), recursive=True)
        # Named only once it is whole: a kill leaves no half a figure.
        with self.staging.filesystem.open_output_stream(f"{path}.new") as stream:
            stream.write(json.dumps(row).encode())
        self.staging.filesystem.move(f"{path}.new", path)


def name_of(settings: FitSettings) -> str:
    """A readable name of one fit among others."""
    which = setting_of(settings.architecture)
    value = settings.sparsity if which == "sparsity" else settings.l0
    letter = "l" if which == "sparsity" else "k"
    return (
        f"{settings.architecture}-x{settings.expansion}-{letter}{value:.3g}-"
        f"{settings.normalisation}-s{settings.seed}"
    )


def fit_one(embedded: Embedded, settings: FitSettings, measure: Any, threads: int) -> dict[str, Any]:
    """Fit one SAE to its end and measure it; a Ray task, but plain without it."""
    import time

    import torch

    from medsae_ray.sae.saelens import export_files, load_files
    from medsae_ray.sae.training import Fitting, Validation, held_batches

    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    normaliser = embedded.normalisers[settings.normalisation]
    train, valid = embedded.splits["train"], embedded.splits["valid"]
    x, judged = (torch.from_numpy(normaliser.apply(split.x)).to(device) for split in (train, valid))
    fitting = Fitting(
        settings,
        n_train=len(x),
        embedding_dim=x.shape[1],
        centre=torch.from_numpy(embedded.centres[settings.normalisation].copy()),
        device=device,
    )
    check = Validation(judged, torch.from_numpy(valid.y.copy()), torch.from_numpy(valid.known.copy()))
    for _ in fitting.run(held_batches(x, settings), check):
        pass
    files = export_files(fitting.best_sae(), normaliser, {})
    sae = load_files(files["cfg.json"], files["sae_weights.safetensors"])
    measured = measure_sae(
        sae,
        embedded.splits,
        min_firing=measure.min_firing,
        min_positives=measure.min_positives,
        permutations=measure.floor_permutations,
        seed=measure.seed,
    )
    which = setting_of(settings.architecture)
    assert fitting.best is not None
    judged_row = next(
        row for row in fitting.history if row["split"] == "valid" and row["epoch"] == fitting.best.epoch
    )
    return {
        "architecture": settings.architecture,
        "normalisation": settings.normalisation,
        "expansion": settings.expansion,
        "sparsity_setting": settings.sparsity if which == "sparsity" else None,
        "l0_setting": settings.l0 if which == "l0" else None,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "epoch": fitting.best.epoch,
        "valid_l0": judged_row["l0"],
        "valid_fve": judged_row["fve"],
        **as_row(measured),
        "seconds": time.monotonic() - started,
    }
