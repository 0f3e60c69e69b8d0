"""Many SAEs fitted and measured, a Ray task each, for the experiments."""

from __future__ import annotations

import dataclasses
import posixpath
from typing import Any, Literal, NamedTuple

import numpy as np

from medsae_ray.cluster import require_resources, start_ray
from medsae_ray.config import FitSettings, MeasureSettings, Settings, fingerprinted
from medsae_ray.experiments.measured import measure_sae
from medsae_ray.measure import LabelPolicy
from medsae_ray.run import Plan, Run, Staging
from medsae_ray.sae.normaliser import Normaliser
from medsae_ray.stages.fit import fit_plan, normalise
from medsae_ray.stages.splits import Split, read_splits
from medsae_ray.stages.sweep import threads_of_a_trial, trials_at_a_time

Convention = Literal["unit", "dim"]

FIGURES = "figures.json"
"""A measured SAE's row of the table, beside its weights."""


class Embedded(NamedTuple):
    """What every task shares, out of the object store."""

    splits: dict[str, Split]
    """Raw embeddings and labels of train, valid and test."""
    normalisers: dict[Convention, Normaliser]
    """By convention."""
    centres: dict[Convention, np.ndarray]
    """Geometric medians of the normalised training embeddings, by convention."""
    stand_ins: list[str]
    """Of the run's embeddings."""


def experiment_plan(run: Run, table: str, settings: Settings, told: dict[str, Any]) -> Plan:
    """What an experiment's table would be. InputError where an input is missing or stale."""
    policy = LabelPolicy(settings.measure.uncertain, settings.measure.blank)
    measured = dataclasses.asdict(settings.measure)
    inputs = fit_plan(run, settings.fit, policy).inputs
    return Plan(table, table, {"fit": fingerprinted(settings.fit), "measure": measured, **told}, inputs)


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
            "sweep.cpus_per_trial and sweep.gpus_per_trial",
            {"CPU": chosen.cpus_per_trial, "GPU": chosen.gpus_per_trial},
        )
        policy = LabelPolicy(settings.measure.uncertain, settings.measure.blank)
        splits = read_splits(run, policy)
        stand_ins = run.require("embeddings", "embed").stand_ins
        normalisers, centres = {}, {}
        for convention in conventions:
            of = dataclasses.replace(settings.fit, normalisation=convention)
            normaliser, centre = normalise(run, splits["train"].image_ids, of)
            normalisers[convention], centres[convention] = normaliser, centre.numpy()
        self._shared = ray.put(Embedded(splits, normalisers, centres, stand_ins))

    def __call__(self, wanted: list[FitSettings]) -> list[dict[str, Any]]:
        """A row for each: its settings and `Measured` figures, in the order asked for."""
        import ray

        found = [self._kept(settings) for settings in wanted]
        missing = [i for i, row in enumerate(found) if row is None]
        chosen, measure = self.settings.sweep, self.settings.measure
        at_a_time = trials_at_a_time(chosen)
        threads = threads_of_a_trial(chosen, at_a_time)
        task = ray.remote(num_cpus=chosen.cpus_per_trial, num_gpus=chosen.gpus_per_trial)(fit_one)
        under_way: dict[Any, int] = {}
        while missing or under_way:
            while missing and len(under_way) < at_a_time:
                i = missing.pop(0)
                remote = task.options(name=name_of(wanted[i]), max_retries=3)
                under_way[remote.remote(self._shared, wanted[i], measure, threads)] = i
            done, _ = ray.wait(list(under_way))
            i = under_way.pop(done[0])
            row, files = ray.get(done[0])
            found[i] = row
            self._keep(wanted[i], row, files)
            print(
                f"{name_of(wanted[i]):<34} FVE {row['fve']:.3f}  L0 {row['l0']:.1f}  "
                f"dead on train {row['dead_train']:.1%}  entropy {row['entropy']:.3f}  "
                f"best AUROC {row['best_auroc']:.3f}  {row['seconds']:.0f} s",
                flush=True,
            )
        return [row for row in found if row is not None]

    def _kept(self, settings: FitSettings) -> dict[str, Any] | None:
        return self.staging.read_json(posixpath.join("saes", name_of(settings), FIGURES))

    def _keep(self, settings: FitSettings, row: dict[str, Any], files: dict[str, bytes]) -> None:
        folder = posixpath.join("saes", name_of(settings))
        for name, content in files.items():
            self.staging.write_bytes(content, posixpath.join(folder, name))
        # Last: after a kill it says that nothing is missing.
        self.staging.write_json(posixpath.join(folder, FIGURES), row)


def name_of(settings: FitSettings) -> str:
    """A readable name of one fit among others."""
    which, value = settings.strength
    letter = "l" if which == "sparsity" else "k"
    return (
        f"{settings.architecture}-x{settings.expansion}-{letter}{value:.4g}-"
        f"{settings.normalisation}-s{settings.seed}"
    )


def fit_one(
    embedded: Embedded, settings: FitSettings, measure: MeasureSettings, threads: int
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Fit one SAE to its end and measure it; a Ray task, but plain without it.

    Returns its row of the `EXPERIMENT` schema, and its files in SAELens's format by name.
    """
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
    files = export_files(fitting.best_sae(), normaliser, {"stand_ins": embedded.stand_ins})
    sae = load_files(files["cfg.json"], files["sae_weights.safetensors"])
    measured = measure_sae(
        sae,
        embedded.splits,
        min_firing=measure.min_firing,
        min_positives=measure.min_positives,
        permutations=measure.floor_permutations,
        seed=measure.seed,
    )
    which, value = settings.strength
    judged_row = fitting.best_row
    row = {
        "sae": name_of(settings),
        "architecture": settings.architecture,
        "normalisation": settings.normalisation,
        "expansion": settings.expansion,
        "sparsity_setting": value if which == "sparsity" else None,
        "l0_setting": int(value) if which == "l0" else None,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "epoch": judged_row["epoch"],
        "valid_l0": judged_row["l0"],
        "valid_fve": judged_row["fve"],
        **dataclasses.asdict(measured),
        "seconds": time.monotonic() - started,
    }
    return row, files
