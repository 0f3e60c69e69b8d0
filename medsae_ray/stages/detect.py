"""Stage `detect`: each name put to the test, one radiograph and one description a prompt.

Condition `true` asks every detection image of a neuron about the neuron's own description, `shuffled` about
that of another neuron. The prompts and their replies are the `verdicts`; `detections` are their statistics,
which may be made again, with other settings, without asking anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from medsae_ray.concepts import is_named
from medsae_ray.config import Settings, fingerprinted
from medsae_ray.detections import CONDITIONS, VERDICT_COLUMNS, detections_table, label_phi, shuffled_partner
from medsae_ray.errors import InputError
from medsae_ray.labelling_summary import labelling_text, texts_digest
from medsae_ray.measure import LabelPolicy, labels_of
from medsae_ray.medgemma.pool import Model, identify
from medsae_ray.medgemma.prompts import Task, load_template, request_id
from medsae_ray.medgemma.replies import STATUSES, parse_answer
from medsae_ray.run import Manifest, Plan, Run, Staging
from medsae_ray.stages.asking import (
    REQUESTS,
    Collected,
    ask,
    begin_asking,
    collect,
    estimate,
    refuse_failures,
    require_fresh,
    throughput_notes,
)
from medsae_ray.stages.outcome import Outcome
from medsae_ray.summary import write_summary
from medsae_ray.tables import NAMES, PANELS, RADIOGRAPHS, VERDICTS

ASKING = ("shuffled_share", "seed")
"""Settings of `detect` that decide what is asked; the others decide how it is counted."""
CHUNK = 8192
"""Prompts whose texts are held at a time."""


class Prompts(NamedTuple):
    """The detection prompts of a run in the order of `verdicts`, as numbers: texts are looked up."""

    neuron: NDArray[np.int32]
    image: NDArray[np.int32]
    """Rows of `image_ids`."""
    condition: NDArray[np.int8]
    """Rows of CONDITIONS."""
    description_neuron: NDArray[np.int32]
    expected: NDArray[np.bool_]
    quantile: NDArray[np.float32]
    image_ids: pa.Array
    uris: pa.Array
    texts: dict[int, tuple[str, str]]
    """Concept and description of every named neuron."""
    request_ids: list[str]


class Detecting(NamedTuple):
    """What a run's detection asks of whom."""

    prompts: Prompts
    task: Task
    model: Model
    plan: Plan


def detect(run: Run, settings: Settings) -> Outcome:
    """Write `verdicts` and `detections`, then the summary, which is printed.

    Raises InputError for a model or a template that cannot be used, where no neuron has a name, and where
    more than `medgemma.max_failed_share` of the prompts failed.
    """
    asked = prepare(run, settings)
    staging = begin_asking(run, asked.plan, settings)
    asking = staging is not None
    if staging is not None:
        _ask(asked, staging, settings)
    counted = _count(run, settings)
    print(labelling_text(write_summary(run)["labelling"]))
    return Outcome(run.require("verdicts", "detect"), ran=asking or counted)


def dry_run(run: Run, settings: Settings) -> str:
    """What `detect` would send, in words; nothing is sent."""
    asked = prepare(run, settings)
    prompts = asked.prompts
    n, n_shuffled = len(prompts.neuron), int((prompts.condition == 1).sum())
    chunks = np.array_split(np.arange(n), -(-n // CHUNK))
    requests = (_requests(prompts, rows) for rows in chunks)
    told = estimate(requests, asked.task, asked.model, Staging(run, asked.plan))
    return (
        f"detect would send {told}; in all {n - n_shuffled:,} prompts are about a neuron's own description, "
        f"{n_shuffled:,} about another's."
    )


def prepare(run: Run, settings: Settings) -> Detecting:
    """The prompts of the stage, nothing started.

    Raises InputError for a model or a template that cannot be used, and where no neuron has a name.
    """
    panels, names = require_fresh(run, "panels", "panels"), require_fresh(run, "names", "name")
    task = Task("detect", load_template("detect", settings.detect.template), 1, 1)
    model = identify(settings.medgemma, 1)
    asking = {key: value for key, value in fingerprinted(settings.detect).items() if key in ASKING}
    chosen = fingerprinted(settings.medgemma)
    plan = Plan(
        "detect",
        "verdicts",
        {**asking, **chosen, "template_sha256": task.template.sha256, "model": model.name},
        {
            "panels": panels.fingerprint,
            "names": names.fingerprint,
            "texts": texts_digest(run),
            "model": model.digest,
        },
    )
    return Detecting(_prompts(run, settings, task, model), task, model, plan)


def _ask(asked: Detecting, staging: Staging, settings: Settings) -> Manifest:
    prompts = asked.prompts
    # A radiograph's prompts together: its vision tokens and the prefix before the description are shared.
    order = np.lexsort((prompts.description_neuron, prompts.image))
    requests = (_requests(prompts, rows) for rows in np.array_split(order, -(-len(order) // CHUNK)))
    throughput = ask(requests, staging, asked.task, settings)
    collected = collect(prompts.request_ids, staging)
    refuse_failures(collected, settings.medgemma)
    counts = dict.fromkeys(STATUSES, 0)
    for number, rows in enumerate(_whole_neurons(prompts.neuron)):
        table = _verdicts(prompts, collected, rows, asked)
        for status in counts:
            counts[status] += pc.sum(pc.equal(table["status"], status)).as_py()
        staging.write_table(table, f"part-{number:05d}.parquet")
    n = len(order)
    return staging.commit(
        rows_in=n,
        rows_out=n,
        stand_ins=[f"model {asked.model.name}"] if asked.model.stand_in else [],
        notes={"model": asked.model.name, "statuses": counts, **throughput_notes(throughput)},
    )


def _count(run: Run, settings: Settings) -> bool:
    """Write `detections` where its settings or inputs are new; returns whether it did."""
    verdicts, names = run.require("verdicts", "detect"), run.require("names", "name")
    counting = {key: value for key, value in fingerprinted(settings.detect).items() if key not in ASKING}
    # Counting asks nobody, so it is simply done again where its settings changed.
    plan = Plan(
        "detect",
        "detections",
        {**counting, "seed": settings.detect.seed},
        # Prompts that had failed and were asked again leave the verdicts' fingerprint as it was.
        {
            "verdicts": verdicts.fingerprint,
            "names": names.fingerprint,
            "statuses": json.dumps(verdicts.notes["statuses"], sort_keys=True),
        },
    )
    staging = run.begin(plan, overwrite=True)
    if staging is None:
        return False
    told = run.read("names", NAMES).sort_by("neuron")
    candidates = told["neuron"].to_numpy()
    named = np.array([is_named(concept) for concept in told["concept"].to_pylist()], bool)
    asked = run.read("verdicts", VERDICTS, VERDICT_COLUMNS)
    table = detections_table(asked, candidates, named, settings.detect)
    staging.write_table(table)
    staging.commit(rows_in=verdicts.rows_out, rows_out=table.num_rows)
    return True


def _prompts(run: Run, settings: Settings, task: Task, model: Model) -> Prompts:
    names = run.read("names", NAMES).sort_by("neuron")
    texts = {
        neuron: (concept, description)
        for neuron, concept, description in zip(
            names["neuron"].to_pylist(),
            names["concept"].to_pylist(),
            names["description"].to_pylist(),
            strict=True,
        )
        if concept is not None and is_named(concept)
    }
    if not texts:
        raise InputError(
            f"None of the {names.num_rows} neurons of {run.uri} has a name, so nothing can be tested: "
            "look at the column reply of its names table, and at the panels."
        )
    panels = run.read("panels", PANELS)
    detecting = pc.is_in(panels["role"], pa.array(["detect_positive", "detect_negative"]))
    named = pc.is_in(panels["neuron"], pa.array(sorted(texts), pa.int32()))
    panels = panels.filter(pc.and_(detecting, named))
    images = panels["image_id"].combine_chunks().dictionary_encode()
    radiographs = run.read("radiographs", RADIOGRAPHS, columns=["image_id", "uri"])
    uris = radiographs["uri"].combine_chunks().take(
        pc.index_in(images.dictionary, radiographs["image_id"].combine_chunks())
    )  # fmt: skip
    neuron = panels["neuron"].to_numpy()
    partner = _partners(run, settings, texts)
    other = partner[neuron]
    # Each panel once under its own description, and once more under another's where there is one.
    rows = np.concatenate([np.arange(len(neuron)), np.flatnonzero(other >= 0)])
    condition = np.repeat(np.array([0, 1], np.int8), [len(neuron), len(rows) - len(neuron)])
    order = np.lexsort((rows, condition, neuron[rows]))
    rows, condition = rows[order], condition[order]
    image = images.indices.to_numpy()[rows]
    described = np.where(condition == 0, neuron[rows], other[rows]).astype(np.int32)
    chosen = fingerprinted(settings.medgemma)
    image_ids = images.dictionary.to_pylist()
    request_ids = [
        request_id(
            "detect", model.digest, task.template.sha256, chosen, n, image_ids[i], CONDITIONS[c], *texts[d]
        )
        for n, i, c, d in zip(
            neuron[rows].tolist(), image.tolist(), condition.tolist(), described.tolist(), strict=True
        )
    ]
    return Prompts(
        neuron[rows],
        image,
        condition,
        described,
        (panels["role"].to_numpy() == "detect_positive")[rows],
        panels["quantile"].to_numpy()[rows],
        images.dictionary,
        uris,
        texts,
        request_ids,
    )


def _partners(run: Run, settings: Settings, texts: dict[int, tuple[str, str]]) -> NDArray[np.int64]:
    """The neuron whose description is put to each neuron's panel, -1 where there is none [n_neurons]."""
    measured = run.require("neurons", "measure")
    neurons = run.read("neurons", columns=["neuron", "valid_best_label"]).sort_by("neuron")
    partner = np.full(neurons.num_rows, -1)
    radiographs = run.read("radiographs", RADIOGRAPHS)
    seen = run.read("activations", columns=["image_id"])["image_id"]
    valid = radiographs.filter(
        pc.and_(pc.equal(radiographs["split"], "valid"), pc.is_in(radiographs["image_id"], seen))
    )
    labels, _ = labels_of(valid, valid["image_id"].combine_chunks())
    phi = label_phi(labels, LabelPolicy(**measured.notes["policy"]))
    named = np.array(sorted(texts))
    partner[named] = shuffled_partner(
        named,
        [texts[neuron][0] for neuron in named.tolist()],
        neurons["valid_best_label"].take(pa.array(named)).to_pylist(),
        phi,
        settings.detect.seed,
        share=settings.detect.shuffled_share,
    )
    return partner


def _requests(prompts: Prompts, rows: NDArray[np.int64]) -> pa.Table:
    """REQUESTS of some of the prompts."""
    n = len(rows)
    image = pa.array(prompts.image[rows])
    told = [prompts.texts[d] for d in prompts.description_neuron[rows].tolist()]
    offsets = pa.array(np.arange(n + 1, dtype=np.int32))
    return pa.table(
        {
            "request_id": [prompts.request_ids[row] for row in rows.tolist()],
            "neuron": prompts.neuron[rows],
            "image_ids": pa.ListArray.from_arrays(offsets, prompts.image_ids.take(image)),
            "uris": pa.ListArray.from_arrays(offsets, prompts.uris.take(image)),
            "n_contrast": np.zeros(n, np.int32),
            "concept": [concept for concept, _ in told],
            "description": [description for _, description in told],
        },
        schema=REQUESTS,
    )


def _whole_neurons(neuron: NDArray[np.int32]) -> Iterator[slice]:
    """Slices of about CHUNK rows that split no neuron; `neuron` ascends."""
    start = 0
    while start < len(neuron):
        last = neuron[min(start + CHUNK, len(neuron)) - 1]
        end = int(np.searchsorted(neuron, last, "right"))
        yield slice(start, end)
        start = end


def _verdicts(prompts: Prompts, collected: Collected, rows: slice, asked: Detecting) -> pa.Table:
    parsed = [parse_answer(*told) for told in zip(collected.reply[rows], collected.reason[rows], strict=True)]
    n = len(parsed)
    p_yes = collected.p_yes[rows]
    return pa.table(
        {
            "request_id": prompts.request_ids[rows],
            "neuron": prompts.neuron[rows],
            "image_id": prompts.image_ids.take(pa.array(prompts.image[rows])),
            "condition": [CONDITIONS[c] for c in prompts.condition[rows].tolist()],
            "description_neuron": prompts.description_neuron[rows],
            "expected": prompts.expected[rows],
            "answer": [one.answer for one in parsed],
            "p_yes": pa.array(p_yes, mask=np.isnan(p_yes)),
            "status": [one.status for one in parsed],
            "reason": [one.reason for one in parsed],
            "reply": collected.reply[rows],
            "model": [asked.model.name] * n,
            "prompt_sha256": [asked.task.template.sha256] * n,
            "quantile": prompts.quantile[rows],
        },
        schema=VERDICTS,
    )
