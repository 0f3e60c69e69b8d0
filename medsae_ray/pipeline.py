"""All stages in order, each skipped where its table is there already."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from medsae_ray.config import Settings
from medsae_ray.run import Run
from medsae_ray.stages.outcome import Outcome

STAGES = ("radiographs", "embed", "fit", "encode", "measure")


def stage_function(stage: str) -> Callable[[Run, Settings], Outcome]:
    """The function of one stage, imported only when asked for."""
    return getattr(importlib.import_module(f"medsae_ray.stages.{stage}"), stage)


def run_stages(stages: tuple[str, ...], settings: Settings) -> None:
    """Run stages in order on `settings.run`, telling one line each.

    Raises InputError for unusable settings or inputs, before or in the stage that meets them.
    """
    from medsae_ray.cluster import refuse_relative, stop_ray

    refuse_relative("run", settings.run)
    refuse_relative("radiographs.root", settings.radiographs.root)
    refuse_relative("embed.weights", settings.embed.weights, or_uri="")
    run = Run(settings.run)
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
