"""The trials of a sweep: which settings are tried, under which names, and which can train together."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from medsae_ray.config import DEFAULT_L0, FitSettings, SweepSettings
from medsae_ray.errors import InputError
from medsae_ray.sae.architectures import ARCHITECTURES

WITHOUT_L0 = ("relu", "gated")
SEARCHED = {
    "architecture": "architecture",
    "expansion": "expansion",
    "sparsity": "sparsity",
    "l0": "l0",
    "learning_rate": "learning_rate",
    "seeds": "seed",
}
"""Fields of `SweepSettings` and of `FitSettings` that they give values to, in the order of a trial's name."""
DIGITS = 3
"""Significant digits of a drawn λ or learning rate: the name then tells the exact value."""


def has(architecture: str, field: str) -> bool:
    """Whether an architecture has the setting `sparsity` or `l0`; every other it has."""
    if field == "sparsity":
        return ARCHITECTURES[architecture].has_sparsity
    return field != "l0" or architecture not in WITHOUT_L0


def with_values(fit: FitSettings, values: dict[str, Any]) -> FitSettings:
    """`fit` with a trial's values by `FitSettings` name; those that its architecture lacks are left out.

    The default k is written out, so that name, table and settings tell it.
    """
    architecture = values.get("architecture", fit.architecture)
    told = {name: value for name, value in values.items() if has(architecture, name)}
    trial = dataclasses.replace(fit, **told)
    if trial.l0 is None and not has(architecture, "sparsity"):
        trial = dataclasses.replace(trial, l0=DEFAULT_L0)
    return trial


def choices(fit: FitSettings, sweep: SweepSettings) -> dict[str, list[Any]]:
    """Values to try by `FitSettings` name: those of `sweep`, else the one of `fit`.

    Raises InputError where there is nothing to search.
    """
    if not any(getattr(sweep, name) for name in SEARCHED):
        names = ", ".join(f"sweep.{name}" for name in SEARCHED)
        raise InputError(f"There is nothing to search: give values to at least one of {names}.")
    return {
        field: list(dict.fromkeys(getattr(sweep, name))) or [getattr(fit, field)]
        for name, field in SEARCHED.items()
    }


def trials(fit: FitSettings, sweep: SweepSettings) -> list[FitSettings]:
    """The settings of every trial of a grid or random search, without repetition."""
    values = choices(fit, sweep)
    found: list[FitSettings] = []
    if sweep.search == "grid":
        for architecture in values["architecture"]:
            own = {field: of for field, of in values.items() if has(architecture, field)}
            for combination in itertools.product(*own.values()):
                told = dict(zip(own, combination, strict=True)) | {"architecture": architecture}
                found.append(with_values(fit, told))
    else:
        generator = np.random.default_rng(sweep.seed)
        for _ in range(sweep.trials):
            drawn = {field: _draw(field, of, generator) for field, of in values.items()}
            found.append(with_values(fit, drawn))
    return list(dict.fromkeys(found))


def _draw(field: str, of: list[Any], generator: np.random.Generator) -> Any:
    if len(of) == 2 and field in ("sparsity", "learning_rate"):
        return rounded(math.exp(generator.uniform(math.log(of[0]), math.log(of[1]))))
    return of[int(generator.integers(len(of)))]


def rounded(value: float) -> float:
    """A drawn value as it is used and named."""
    return float(f"{value:.{DIGITS}g}")


def trial_name(trial: FitSettings) -> str:
    """What a trial is called everywhere: `relu-x8-l3e-2-lr1e-3-s0`, `topk-x8-k32-lr1e-3-s0`."""
    parts = [trial.architecture, f"x{trial.expansion}"]
    if has(trial.architecture, "sparsity"):
        parts.append(f"l{short(trial.sparsity)}")
    if trial.l0 is not None and has(trial.architecture, "l0"):
        parts.append(f"k{trial.l0}")
    return "-".join([*parts, f"lr{short(trial.learning_rate)}", f"s{trial.seed}"])


def group_name(group: Sequence[FitSettings]) -> str:
    """What trials that train together are called: `relu-x8-l3e-4to3e-2-lr1e-3-s0`."""
    if len(group) == 1:
        return trial_name(group[0])
    first, last = min(t.sparsity for t in group), max(t.sparsity for t in group)
    alone = trial_name(group[0])
    return alone.replace(f"-l{short(group[0].sparsity)}-", f"-l{short(first)}to{short(last)}-", 1)


def groups(found: Sequence[FitSettings]) -> list[list[FitSettings]]:
    """Trials that can train together: ReLU SAEs that differ in λ alone; every other alone, in given order."""
    grouped: dict[Any, list[FitSettings]] = {}
    for trial in found:
        alike = dataclasses.replace(trial, sparsity=0.0) if trial.architecture == "relu" else trial
        grouped.setdefault(alike, []).append(trial)
    return list(grouped.values())


def n_evaluations(fit: FitSettings) -> int:
    """How often a whole training is evaluated."""
    return -(-fit.epochs // fit.evaluate_every)


def short(value: float) -> str:
    """A number as briefly as it can be told exactly, without a sign that a file name must not have."""
    told = Decimal(repr(float(value))).normalize()
    _, digits, exponent = told.as_tuple()
    power = len(digits) - 1 + int(exponent)
    if not told or 0 <= power < DIGITS:
        return format(told, "f")
    mantissa = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if digits[1:] else "")
    return f"{mantissa}e{power}"
