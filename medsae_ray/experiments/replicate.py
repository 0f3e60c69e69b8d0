"""The paper's first experiment: its settings, under both conventions of normalisation, beside its figures."""

from __future__ import annotations

import dataclasses
from typing import Any

from medsae_ray.config import Settings
from medsae_ray.experiments.fitted import Convention, Fits, experiment_plan
from medsae_ray.experiments.told import table_text, tell_again, write_experiment
from medsae_ray.measure import Activations, LabelPolicy, entropy_means, measure_units, neurons_table
from medsae_ray.run import Run
from medsae_ray.stages.outcome import Outcome
from medsae_ray.stages.splits import read_splits
from medsae_ray.summary import PAPER

CONVENTIONS: tuple[Convention, ...] = ("unit", "dim")
"""Mean squared norm 1 (the authors' library), and d (SAELens): λ means another thing under each."""


def replicate(run: Run, settings: Settings) -> Outcome:
    """Write the table `replicate` with its figure and paragraph, and print them.

    Raises InputError for embeddings that cannot be normalised.
    """
    from medsae_ray.report.figures import replicate_figure

    staging = run.begin(experiment_plan(run, "replicate", settings, {}), settings.overwrite)
    if staging is None:
        return tell_again(run, "replicate")
    fits = Fits(run, staging, settings, CONVENTIONS)
    raw = _raw_entropy(run, settings)
    rows = [
        {**row, **raw}
        for row in fits([dataclasses.replace(settings.fit, normalisation=of) for of in CONVENTIONS])
    ]
    return write_experiment(run, staging, rows, text_of(rows), {"replicate": replicate_figure})


def _raw_entropy(run: Run, settings: Settings) -> dict[str, Any]:
    """The raw dimensions' mean entropy on test, its floor, and over how many labels entropies are."""
    measure = settings.measure
    test = read_splits(run, LabelPolicy(measure.uncertain, measure.blank))["test"]
    units = measure_units(
        Activations(test.image_ids, test.x),
        test.y,
        test.known,
        test.patients,
        permutations=measure.floor_permutations,
        seed=measure.seed,
        with_auroc=False,
    )
    mean = entropy_means(neurons_table(units, units), min_firing=measure.min_firing).living
    n_labels = int(units.n_labels.max())
    return {"raw_entropy": mean.entropy, "raw_entropy_floor": mean.floor, "entropy_labels": n_labels}


def deviation(row: dict[str, Any]) -> float:
    """Mean relative deviation of dead share and FVE from the paper's (paper.md, row "SAE")."""
    return (abs(row["dead"] / PAPER["dead"] - 1) + abs(row["fve"] / PAPER["fve"] - 1)) / 2


def text_of(rows: list[dict[str, Any]]) -> str:
    """Both conventions beside the paper, and in plain words which lies nearer."""
    fourteen = rows[0]["entropy_labels"] == 14
    lines = [
        [
            name,
            "-"
            if "entropy" in name and not fourteen
            else format(PAPER[paper], ".2f" if form != ".1%" else ".0%"),
            *(format(row[column], form) for row in rows),
        ]
        for name, paper, column, form in (
            ("mean entropy, living neurons", "entropy_neurons", "entropy", ".3f"),
            ("mean entropy, raw dimensions", "entropy_dimensions", "raw_entropy", ".3f"),
            ("FVE", "fve", "fve", ".3f"),
            ("dead neurons", "dead", "dead", ".1%"),
        )
    ]
    lines += [
        ["noise floor of the neurons' entropy", "-", *(f"{row['entropy_floor']:.3f}" for row in rows)],
        ["L0", "-", *(f"{row['l0']:.1f}" for row in rows)],
    ]
    table = table_text(("test split", "paper", *(row["normalisation"] for row in rows)), lines)
    nearer = min(rows, key=deviation)
    others = " and ".join(f"{deviation(row):.0%} ({row['normalisation']})" for row in rows)
    order = " and ".join(
        f"{'below' if row['entropy'] < row['raw_entropy'] else 'not below'} it under {row['normalisation']!r}"
        for row in rows
    )
    return (
        f"The paper's settings under both conventions of normalisation\n{table}\n\n"
        f"Convention {nearer['normalisation']!r} lies nearer to the paper's dead share and FVE: the mean "
        f"relative deviation of the two is {others}. The paper's order is the SAE's entropy below the raw "
        f"dimensions'; here it is {order}."
        + ("" if fourteen else " The paper's entropies hold for 14 labels and are not comparable.")
    )
