"""What of a run goes into its report: the tables that are there and fresh, and what is left out and why."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.controls import controls_schema
from medsae_ray.errors import InputError
from medsae_ray.labelling_summary import texts_digest
from medsae_ray.measure import neurons_schema
from medsae_ray.run import Manifest, Run
from medsae_ray.tables import (
    ATLAS,
    CANDIDATES,
    DETECTIONS,
    GALLERY,
    HISTORY,
    LOCALISATION,
    NAMES,
    RADIOGRAPHS,
    SWEEP,
    VERDICTS,
)

REQUIRED = {"radiographs": "radiographs", "embeddings": "embed", "sae": "fit", "neurons": "measure"}
"""Tables without which there is no report, and the stages that make them."""


class Optional(NamedTuple):
    """A table that a report shows where it is there."""

    stage: str
    what: str
    """What the pages show of it."""


OPTIONAL = {
    "dimensions": Optional("measure", "the raw dimensions of the embedding beside the neurons"),
    "controls": Optional("controls", "the controls beside the neurons"),
    "candidates": Optional("panels", "which neurons are candidates for a name"),
    "gallery": Optional("atlas", "radiographs on the cards"),
    "atlas": Optional("atlas", "the map of neurons, neighbours, histograms and shortcuts"),
    "maps": Optional("localise", "where in a radiograph a neuron fires"),
    "localisation": Optional("localise", "the pointing game"),
    "names": Optional("name", "concepts and descriptions"),
    "verdicts": Optional("detect", "the answers beside the radiographs"),
    "detections": Optional("detect", "detection accuracies"),
    "sweep": Optional("sweep", "the Pareto front of the sweep"),
}

SCHEMAS: dict[str, pa.Schema] = {
    "dimensions": neurons_schema(),
    "controls": controls_schema(),
    "candidates": CANDIDATES,
    "gallery": GALLERY,
    "atlas": ATLAS,
    "localisation": LOCALISATION,
    "names": NAMES,
    "verdicts": VERDICTS,
    "detections": DETECTIONS,
    "sweep": SWEEP,
}


class LeftOut(NamedTuple):
    """A table that the report does without."""

    what: str
    why: str
    command: str
    """What makes the table."""


@dataclass(frozen=True)
class Survey:
    """What a report of a run would be made of, nothing read yet but manifests and the summary."""

    manifests: dict[str, Manifest]
    """Of the tables that are there and fresh, by name."""
    summary: dict[str, Any]
    """`summary.json`."""
    left_out: list[LeftOut]
    stale: list[str]
    """Names of the tables among these that are there, but outdated."""
    inputs: dict[str, str]
    """For the report's fingerprint."""


def survey(run: Run) -> Survey:
    """Look at what is there.

    Raises InputError naming the stage to run where the radiographs, the neurons or what these rest on are
    missing or stale.
    """
    manifests = {table: run.require(table, stage) for table, stage in REQUIRED.items()}
    try:
        summary = json.loads(run.read_bytes("summary.json"))
    except FileNotFoundError:
        raise InputError(
            f"The run {run.uri} has no summary.json: run `medsae measure` on it first."
        ) from None
    left_out, stale = [], []
    for table, (stage, what) in OPTIONAL.items():
        manifest, why = run.manifest(table), _why_stale(run, table)
        if manifest is not None and why is None:
            manifests[table] = manifest
            continue
        if manifest is not None:
            stale.append(table)
        # A run needs no sweep, and an encoder without a feature map gives no maps.
        elif table == "sweep" or (stage == "localise" and manifests["embeddings"].notes.get("grid") is None):
            continue
        reason = f"stale: {why}" if manifest is not None else "not made yet"
        left_out.append(LeftOut(f"{what} (table {table})", reason, f"medsae {stage} --run RUN"))
    # Prompts that had failed and were asked again leave a table's fingerprint as it was.
    asked = {f"{t} of": m.finished for t in ("names", "verdicts") if (m := manifests.get(t))}
    # Seconds change with the report's own.
    told = {key: value for key, value in summary.items() if key != "seconds"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    inputs = {table: manifest.fingerprint for table, manifest in manifests.items()}
    return Survey(manifests, summary, left_out, stale, {**inputs, **asked, "summary": digest})


def _why_stale(run: Run, table: str) -> str | None:
    outdated = run.stale_inputs(table)
    if outdated:
        return f"{', '.join(outdated)} changed since"
    if table not in ("verdicts", "detections") or run.manifest("names") is None:
        return None
    asked = run.manifest("verdicts")
    renamed = asked is not None and asked.inputs.get("texts") != texts_digest(run)
    return "the names changed since" if renamed else None


def read_tables(run: Run, found: Survey) -> dict[str, pa.Table]:
    """The surveyed tables in memory, by name, and `history` of the SAE's training.

    Of `radiographs` only ids and URIs, of `verdicts` only what is shown, of condition true.
    """
    tables = {
        "radiographs": run.read("radiographs", RADIOGRAPHS, ["image_id", "uri"]),
        "neurons": run.read("neurons", neurons_schema()),
        "history": run.read("sae", HISTORY),
    }
    for table in found.manifests:
        if table == "verdicts":
            columns = ["neuron", "image_id", "status", "answer", "p_yes"]
            own = pc.field("condition") == "true"
            tables[table] = run.dataset(table, VERDICTS).to_table(columns, filter=own)
        elif table in OPTIONAL:
            tables[table] = run.read(table, SCHEMAS.get(table))
    return tables
