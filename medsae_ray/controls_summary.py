"""The summary of the controls: the SAE's entropy and best AUROCs beside those of units no SAE has learned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.controls import CONTROLS, controls_schema
from medsae_ray.measure import CLAIM_AUROC, CLAIM_LOW, claim, entropy_means
from medsae_ray.run import Run
from medsae_ray.tables import TRUTH

NAMES = {
    "sae": "SAE",
    "dimensions": "raw dimensions",
    "untrained": "untrained SAE",
    "rotation": "random rotation",
    "pca": "PCA",
    "ica": "ICA",
    "ica_leading": "ICA, leading PCs",
    "shuffled": "shuffled SAE",
}
"""Kinds of units by what they are called, in the order of the table."""
FIGURES = {
    "entropy": ("mean entropy", -1),
    "best_auroc": ("mean AUROC", 1),
    "labels_separated": ("labels separated", 1),
    "planted_separated": ("planted findings separated", 1),
}
"""What is compared: its name, and 1 where more is better."""


def beside_controls(run: Run) -> dict[str, Any]:
    """The same figures, of the test split, for the SAE, the raw dimensions and every control.

    `kinds` holds for each its units, the mean entropy over living units with its floor, the mean AUROC of
    the units chosen on validation and the labels these separate (`claim`); where signs were planted (table
    `truth`), also the planted findings at test AUROC > 0.8. `not_beaten` names for each of these figures the
    kinds that are as good as the SAE or better.
    Raises InputError where a table is missing or stale.
    """
    made, measured = run.require("controls", "controls"), run.require("neurons", "measure")
    notes = measured.notes
    planted = _planted(run)
    tables = {"sae": run.read("neurons"), "dimensions": run.read("dimensions")}
    chosen = {"sae": notes["chosen"]["neurons"], "dimensions": notes["chosen"]["dimensions"]}
    controls = run.read("controls", controls_schema())
    for name in CONTROLS:
        tables[name] = controls.filter(pc.equal(controls["control"], name))
        chosen[name] = made.notes["chosen"][name]
    kinds = []
    for kind, table in tables.items():
        claims = [claim(row, notes["min_positives"]) for row in chosen[kind]]
        kinds.append(_figures(kind, table, claims, notes["min_firing"], planted))
    ours = kinds[0]
    return {
        "stand_ins": made.stand_ins,
        "kinds": kinds,
        "n_labels": sum(row["enough_positives"] for row in ours["labels"]),
        "planted": planted,
        "rank": made.notes["rank"],
        "ica": made.notes["ica"],
        "not_beaten": {
            figure: [other["kind"] for other in kinds[1:] if not _beats(ours, other, figure, sign)]
            for figure, (_, sign) in FIGURES.items()
            if figure in ours
        },
    }


def controls_text(summary: dict[str, Any]) -> str:
    """The controls' part of the summary, for a terminal."""
    told = summary["controls"]
    planted = told["planted"]
    lines = ["", "MedSAE controls: the same figures for units that no SAE has learned (test split)"]
    if told["stand_ins"]:
        lines.append(
            f"STAND-IN MODELS ({', '.join(told['stand_ins'])}): these figures say nothing about MedCLIP."
        )
    head = f"{'units':<18}{'number':>8}{'living':>8}{'entropy':>9}{'floor':>8}{'separated':>11}{'AUROC':>8}"
    lines += ["", head + (f"{'planted':>9}" if planted else "")]
    for of in told["kinds"]:
        lines.append(
            f"{NAMES[of['kind']]:<18}{of['n_units']:>8,}{of['n_living']:>8,}{_number(of['entropy']):>9}"
            f"{_number(of['entropy_floor']):>8}{of['labels_separated']:>11}{_number(of['best_auroc']):>8}"
            + (f"{of['planted_separated'] / len(planted):>9.0%}" if planted else "")
        )
    lines.append(
        f"separated: labels (of {told['n_labels']} with enough positives) that the unit chosen on validation "
        f"separates (AUROC > {CLAIM_AUROC}, lower bound > {CLAIM_LOW}); AUROC: mean over labels of that "
        "unit's."
    )
    if planted:
        lines.append(f"planted: share of the {len(planted)} planted findings at AUROC > {CLAIM_AUROC}.")
    lines.append("untrained, rotated, shuffled: one draw each, another with another controls.seed.")
    lines += [
        f"{NAMES[name]} did not converge in {ica['iterations']} iterations: its units are as found."
        for name, ica in told["ica"].items()
        if not ica["converged"]
    ]
    return "\n".join([*lines, verdict(told)])


def verdict(told: dict[str, Any]) -> str:
    """In plain words: in which figures the SAE beats the raw dimensions and every control, and where not."""
    of = {figures["kind"]: figures for figures in told["kinds"]}
    won, lost = [], []
    for figure, others in told["not_beaten"].items():
        ours = f"{FIGURES[figure][0]} ({_shown(of['sae'][figure])})"
        if others:
            beaten_by = _and([f"{NAMES[kind]} ({_shown(of[kind][figure])})" for kind in others])
            lost.append(f"In {ours} the SAE does not beat {beaten_by}.")
        else:
            won.append(ours)
    first = [f"In {_and(won)} the SAE beats the raw dimensions and every control."] if won else []
    return "\n".join([*first, *lost])


def _figures(
    kind: str, table: pa.Table, claims: list[dict[str, Any]], min_firing: int, planted: list[str]
) -> dict[str, Any]:
    living = entropy_means(table, min_firing=min_firing).living
    areas = {row["label"]: row["auroc"] for row in claims if row["auroc"] is not None}
    told = {
        "kind": kind,
        "table": {"sae": "neurons", "dimensions": "dimensions"}.get(kind, "controls"),
        "split": "test",
        "n_units": table.num_rows,
        "n_living": living.n_units,
        "entropy": _finite(living.entropy),
        "entropy_floor": _finite(living.floor),
        "labels_separated": sum(row["separated"] for row in claims),
        "best_auroc": float(np.mean(list(areas.values()))) if areas else None,
        "n_best_auroc": len(areas),
    }
    if planted:
        told["planted_separated"] = sum(areas.get(finding, 0.0) > CLAIM_AUROC for finding in planted)
    return {**told, "labels": claims}


def _planted(run: Run) -> list[str]:
    """Findings that were planted, where the radiographs are phantoms."""
    if run.manifest("truth") is None:
        return []
    return sorted(pc.unique(run.read("truth", TRUTH)["finding"]).to_pylist())


def _beats(ours: dict[str, Any], other: dict[str, Any], figure: str, sign: int) -> bool:
    """A figure that is not defined loses: units that are all dead have no entropy."""
    if ours[figure] is None or other[figure] is None:
        return ours[figure] is not None
    return sign * (ours[figure] - other[figure]) > 0


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _shown(value: float | None) -> str:
    return _number(value) if value is None or isinstance(value, float) else str(value)


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
