"""Stage `name`: a panel's radiographs to a concept and a description, one prompt a neuron."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.config import Settings, fingerprinted
from medsae_ray.medgemma.pool import Model, identify
from medsae_ray.medgemma.prompts import Task, load_template, request_id
from medsae_ray.medgemma.replies import STATUSES, parse_name
from medsae_ray.run import Plan, Run, Staging
from medsae_ray.stages.asking import (
    REQUESTS,
    ask,
    begin_asking,
    collect,
    estimate,
    refuse_failures,
    require_fresh,
    throughput_notes,
)
from medsae_ray.stages.outcome import Outcome
from medsae_ray.summary import forget_labelling
from medsae_ray.tables import NAMES, PANELS, RADIOGRAPHS


class Naming(NamedTuple):
    """What a run's naming asks of whom."""

    requests: pa.Table
    """REQUESTS, a row a neuron, ascending."""
    task: Task
    model: Model
    plan: Plan


def name(run: Run, settings: Settings) -> Outcome:
    """Write `names`: every candidate neuron's concept and description, or why it has none.

    Raises InputError for a model or a template that cannot be used, and where more than
    `medgemma.max_failed_share` of the prompts failed.
    """
    asked = prepare(run, settings)
    staging = begin_asking(run, asked.plan, settings)
    if staging is None:
        return Outcome(run.require("names", "name"), ran=False)
    throughput = ask([asked.requests], staging, asked.task, settings)
    ids = asked.requests["request_id"].to_pylist()
    collected = collect(ids, staging)
    refuse_failures(collected, settings.medgemma)
    parsed = [parse_name(*told) for told in zip(collected.reply, collected.reason, strict=True)]
    n = len(ids)
    statuses = {status: sum(one.status == status for one in parsed) for status in STATUSES}
    table = pa.table(
        {
            "neuron": asked.requests["neuron"],
            "concept": [one.concept for one in parsed],
            "description": [one.description for one in parsed],
            "status": [one.status for one in parsed],
            "reason": [one.reason for one in parsed],
            "reply": collected.reply,
            "model": [asked.model.name] * n,
            "prompt_sha256": [asked.task.template.sha256] * n,
            "seconds": collected.seconds,
            "request_id": ids,
        },
        schema=NAMES,
    )
    staging.write_table(table)
    manifest = staging.commit(
        rows_in=n,
        rows_out=n,
        stand_ins=[f"model {asked.model.name}"] if asked.model.stand_in else [],
        notes={"model": asked.model.name, "statuses": statuses, **throughput_notes(throughput)},
    )
    forget_labelling(run)
    return Outcome(manifest, ran=True)


def dry_run(run: Run, settings: Settings) -> str:
    """What `name` would send, in words; nothing is sent."""
    asked = prepare(run, settings)
    staging = Staging(run, asked.plan)
    return f"name would send {estimate([asked.requests], asked.task, asked.model, staging)}."


def prepare(run: Run, settings: Settings) -> Naming:
    """The prompts of the stage, nothing started.

    Raises InputError for a model or a template that cannot be used.
    """
    panels = require_fresh(run, "panels", "panels")
    contrast = panels.settings["contrast_images"]
    images = panels.settings["name_images"] + contrast
    task = Task(
        "name",
        load_template("name", settings.name.template, contrast=contrast > 0),
        settings.name.max_tokens,
        images,
    )
    model = identify(settings.medgemma, images)
    chosen = {**fingerprinted(settings.name), **fingerprinted(settings.medgemma)}
    told = {**chosen, "template_sha256": task.template.sha256, "model": model.name}
    plan = Plan("name", "names", told, {"panels": panels.fingerprint, "model": model.digest})
    return Naming(_requests(run, task, model, chosen), task, model, plan)


def _requests(run: Run, task: Task, model: Model, chosen: dict[str, object]) -> pa.Table:
    panels = run.read("panels", PANELS)
    shown = panels.filter(pc.is_in(panels["role"], pa.array(["name", "name_contrast"])))
    radiographs = run.read("radiographs", RADIOGRAPHS, columns=["image_id", "uri"])
    uri = radiographs["uri"].take(pc.index_in(shown["image_id"], radiographs["image_id"].combine_chunks()))
    # Highest activation first, contrast images, of value 0, last; the panel's own order between equals.
    neuron, value = shown["neuron"].to_numpy(), shown["value"].to_numpy()
    order = np.lexsort((np.arange(len(neuron)), -value, neuron))
    ids, uris = (
        np.array(shown["image_id"].to_pylist(), object)[order],
        np.array(uri.to_pylist(), object)[order],
    )
    is_contrast = (np.array(shown["role"].to_pylist()) == "name_contrast")[order]
    neurons, starts = np.unique(neuron[order], return_index=True)
    image_ids = np.split(ids, starts[1:]) if len(neurons) else []
    keys = [
        request_id("name", model.digest, task.template.sha256, chosen, int(neuron), list(images))
        for neuron, images in zip(neurons, image_ids, strict=True)
    ]
    n = len(neurons)
    return pa.table(
        {
            "request_id": keys,
            "neuron": neurons,
            "image_ids": image_ids,
            "uris": np.split(uris, starts[1:]) if n else [],
            "n_contrast": np.add.reduceat(is_contrast, starts, dtype=np.int32) if n else [],
            "concept": pa.nulls(n, pa.string()),
            "description": pa.nulls(n, pa.string()),
        },
        schema=REQUESTS,
    )
