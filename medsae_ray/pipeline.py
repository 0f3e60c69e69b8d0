"""All stages in order, each skipped where its table is there already."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from medsae_ray.config import Settings
from medsae_ray.errors import InputError
from medsae_ray.run import Run
from medsae_ray.stages.outcome import Outcome

STAGES = (
    "radiographs",
    "embed",
    "fit",
    "encode",
    "measure",
    "controls",
    "panels",
    "atlas",
    "localise",
    "name",
    "detect",
    "report",
)
EXPERIMENTS = ("replicate", "expansion", "architectures")
"""The paper's experiments, on a run's embeddings."""
ASKING = ("name", "detect")
"""Stages that ask the vision-language model."""


def stage_function(stage: str) -> Callable[[Run, Settings], Outcome]:
    """The function of one stage or experiment, imported only when asked for."""
    return getattr(_module(stage), stage)


def run_stages(stages: tuple[str, ...], settings: Settings) -> None:
    """Run stages in order on `settings.run`, telling one line each.

    Raises InputError for unusable settings or inputs, before or in the stage that meets them.
    """
    from medsae_ray.cluster import refuse_relative, stop_ray

    refuse_relative("run", settings.run)
    refuse_relative("radiographs.root", settings.radiographs.root)
    refuse_relative("embed.weights", settings.embed.weights, or_uri="")
    run = Run(settings.run)
    if settings.dry_run:
        if not set(stages) <= set(ASKING):
            raise InputError(f"Only {' and '.join(ASKING)} know --dry-run: leave it out.")
        for stage in stages:
            print(_module(stage).dry_run(run, settings))
        return
    if stages == STAGES:
        stages = stages[: stages.index(settings.until) + 1]
        if set(stages) & set(ASKING):
            _refuse_model(settings)
    try:
        for stage in stages:
            print(stage_function(stage)(run, settings).line(), flush=True)
    finally:
        stop_ray()
    print(
        f"\nRun folder: {run.uri}\n"
        f"Look at it next: `medsae status {settings.run}`, its summary.json, and its tables with any Parquet "
        "reader (docs/architecture.md says what each column means)."
    )


def _refuse_model(settings: Settings) -> None:
    """Raises InputError for a model that cannot be asked, before the hours of work that come first."""
    from medsae_ray.medgemma.pool import identify, refuse_backend

    shown = settings.panels.name_images + settings.panels.contrast_images
    try:
        identify(settings.medgemma, shown)
        refuse_backend(settings.medgemma)
    except InputError as error:
        raise InputError(f"{error} (Or end the pipeline before it, with --until localise.)") from None


def _module(stage: str) -> Any:
    room = "experiments" if stage in EXPERIMENTS else "stages"
    return importlib.import_module(f"medsae_ray.{room}.{stage}")
