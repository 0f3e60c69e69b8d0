"""The paper's second experiment: entropy, FVE and dead neurons at several expansions and one λ."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from medsae_ray.config import Settings
from medsae_ray.experiments.fitted import Fits, experiment_plan
from medsae_ray.experiments.told import mean_sd, table_text, tell_again, write_experiment
from medsae_ray.run import Run
from medsae_ray.stages.outcome import Outcome


def expansion(run: Run, settings: Settings) -> Outcome:
    """Write the table `expansion` with its figure and paragraph, and print them.

    Raises InputError for embeddings that cannot be normalised.
    """
    from medsae_ray.report.figures import expansion_figure

    chosen = settings.experiment
    told = {"expansions": chosen.expansions, "seeds": chosen.seeds}
    staging = run.begin(experiment_plan(run, "expansion", settings, told), settings.overwrite)
    if staging is None:
        return tell_again(run, "expansion")
    fits = Fits(run, staging, settings, (settings.fit.normalisation,))
    rows = fits(
        [
            dataclasses.replace(settings.fit, expansion=of, seed=seed)
            for of in chosen.expansions
            for seed in chosen.seeds
        ]
    )
    return write_experiment(run, staging, rows, text_of(rows), {"expansion": expansion_figure})


def text_of(rows: list[dict[str, Any]]) -> str:
    """A line an expansion, and in plain words what they show."""
    expansions = sorted({row["expansion"] for row in rows})
    of = {value: [row for row in rows if row["expansion"] == value] for value in expansions}
    names = {"l0": ".1f", "fve": ".3f", "dead_train": ".1%", "entropy": ".3f", "entropy_floor": ".3f"}
    lines = [
        [f"{value}x", *(mean_sd(group, name, form) for name, form in names.items())]
        for value, group in of.items()
    ]
    first, last = of[expansions[0]], of[expansions[-1]]
    n_seeds = len(first)
    said = [
        _change(name, [row[column] for row in first], [row[column] for row in last])
        for name, column in (("entropy", "entropy"), ("FVE", "fve"), ("the dead share", "dead_train"))
    ]
    sentence = f"From {expansions[0]}x to {expansions[-1]}x " + ", ".join(said) + "."
    if n_seeds == 1:
        sentence += " One seed says nothing about chance."
    table = table_text(("expansion", "L0", "FVE", "dead on train", "entropy", "floor"), lines)
    return (
        f"Expansion at one λ (test split, mean ± sd over {n_seeds} seeds)\n{table}\n\n{sentence} "
        "A change counts where the seeds of the two do not overlap."
    )


def _change(name: str, before: list[float], after: list[float]) -> str:
    step = f"from {np.mean(before):.3f} to {np.mean(after):.3f}"
    if not np.isfinite([*before, *after]).all():
        return f"{name} is undefined for some"
    if max(before) < min(after):
        return f"{name} rises ({step})"
    if max(after) < min(before):
        return f"{name} falls ({step})"
    return f"{name} does not change beyond the seeds ({step})"
