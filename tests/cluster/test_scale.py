"""344,000 detection prompts through `panels` and `detect` with an engine that answers at once.

Of `detect` all is run but `summary.summarise`, which tells of the sae, the embeddings and the raw dimensions:
the synthetic run has none of them. The labelling's own summary is computed and printed.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from commands import ENVIRONMENT
from instant_engine import told

from medsae_ray.labels import LABELS
from medsae_ray.measure import neurons_schema
from medsae_ray.run import Plan, Run
from medsae_ray.tables import ACTIVATIONS, NAMES, RADIOGRAPHS

NEURONS, PATIENTS, FIRING = 8600, 1500, 60
FLAT_MIB = 150
"""What the driver may hold beside its plan while replies come in, in MiB."""
HERE = Path(__file__).parent


def commit(run: Run, stage: str, name: str, table: pa.Table, inputs: dict, notes: dict | None = None) -> str:
    plan = Plan(stage, name, {}, inputs)
    staging = run.restage(plan)
    staging.write_table(table)
    staging.commit(rows_in=table.num_rows, rows_out=table.num_rows, notes=notes)
    return plan.fingerprint


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A run of 8,600 neurons that each fire on 60 of 1,500 patients of either split, and have names."""
    run = Run(str(tmp_path_factory.mktemp("scale") / "run"))
    rng = np.random.default_rng(0)
    ids = np.array([f"phantom-{i:016x}" for i in range(2 * PATIENTS)])
    labels = (rng.random((2 * PATIENTS, len(LABELS))) < 0.3).astype(np.float32)
    columns = {
        "image_id": ids,
        "uri": [f"{i}.png" for i in ids],
        "patient_id": [f"p{i}" for i in range(2 * PATIENTS)],
        "study_id": ids,
        "split": np.repeat(["valid", "test"], PATIENTS),
        "view": ["PA"] * (2 * PATIENTS),
        "sex": ["F"] * (2 * PATIENTS),
        "age": np.full(2 * PATIENTS, 60, np.float32),
        "site": ["s"] * (2 * PATIENTS),
        **{label: labels[:, i] for i, label in enumerate(LABELS)},
    }
    radiographs = commit(run, "radiographs", "radiographs", pa.table(columns, schema=RADIOGRAPHS), {})
    fires = np.zeros((2 * PATIENTS, NEURONS), bool)
    for neuron in range(NEURONS):
        for start in (0, PATIENTS):
            fires[start + rng.choice(PATIENTS, FIRING, replace=False), neuron] = True
    neuron = [np.flatnonzero(row).astype(np.int32) for row in fires]
    value = [rng.random(len(row), dtype=np.float32) + 0.1 for row in neuron]
    table = pa.table({"image_id": ids, "neuron": neuron, "value": value}, schema=ACTIVATIONS)
    activations = commit(run, "encode", "activations", table, {}, {"n_neurons": NEURONS})
    best = [LABELS[i % len(LABELS)] for i in range(NEURONS)]
    schema = neurons_schema()
    known = {"neuron": np.arange(NEURONS), "dead": [False] * NEURONS, "valid_best_label": best}
    known |= {field.name: np.zeros(NEURONS) for field in schema if field.name not in known}
    known |= {"best_label": best, "dead_train": [False] * NEURONS}
    table = pa.table({field.name: pa.array(known[field.name]).cast(field.type) for field in schema})
    positives = labels[PATIENTS:].sum(axis=0).astype(int).tolist()
    notes = {
        "policy": {"uncertain": "ignore", "blank": "negative"},
        "test": {"n_positive": dict(zip(LABELS, positives, strict=True))},
        "min_positives": 50,
    }
    inputs = {"activations": activations, "radiographs": radiographs}
    commit(run, "measure", "neurons", table.cast(schema), inputs, notes)
    return run


def names_of(run: Run, named: int) -> None:
    """The table `names` of a stage `name` that got a name for the first neurons alone."""
    concepts = [LABELS[1 + i % (len(LABELS) - 1)] for i in range(named)]
    descriptions = [f"Signs of {concept.lower()}, number {i}." for i, concept in enumerate(concepts)]
    unnamed = NEURONS - named
    table = pa.table(
        {
            "neuron": np.arange(NEURONS),
            "concept": [*concepts, *[None] * unnamed],
            "description": [*descriptions, *[None] * unnamed],
            "status": ["answered"] * named + ["unparsed"] * unnamed,
            "reason": [None] * named + ["not the JSON that was asked for"] * unnamed,
            "reply": ["{}"] * NEURONS,
            "model": ["instant"] * NEURONS,
            "prompt_sha256": ["0" * 64] * NEURONS,
            "seconds": np.zeros(NEURONS),
            "request_id": [f"{i:032x}" for i in range(NEURONS)],
        },
        schema=NAMES,
    )
    commit(run, "name", "names", table, {"panels": run.manifest("panels").fingerprint}, {"model": "instant"})


# `detect` in a process of its own, which prints what that process held, in MiB: planned, then the most while
# replies came in, while they were collected and written, while they were counted.
DRIVER = """
import json, resource, sys, threading, time
from medsae_ray.cluster import start_ray, stop_ray
from medsae_ray.config import DetectSettings, MedgemmaSettings, RaySettings, Settings
from medsae_ray.labelling_summary import labelling, labelling_text
from medsae_ray.run import Run
from medsae_ray.stages import detect
from medsae_ray.stages.asking import begin_asking

def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize() / 2**20

most = {}
phase = "start"
def watch():
    while True:
        most[phase] = max(most.get(phase, 0), resident())
        time.sleep(0.05)

def collect(request_ids, staging, collect=detect.collect):
    global phase
    phase = "collecting"
    return collect(request_ids, staging)

detect.collect = collect
settings = Settings(
    run=sys.argv[1],
    detect=DetectSettings(shuffled_share=0.0),
    medgemma=MedgemmaSettings(backend="instant_engine:answer", model="instant", block_rows=2000),
    ray=RaySettings(progress=False),
)
run = Run(settings.run)
# Ray's own share is there before the level is taken.
start_ray(settings.ray)
import ray
ray.data.range(1000).map_batches(lambda batch: batch).materialize()
threading.Thread(target=watch, daemon=True).start()
asked = detect.prepare(run, settings)
planned = resident()
phase = "asking"
detect._ask(asked, begin_asking(run, asked.plan, settings), settings)
phase = "counting"
detect._count(run, settings)
print(labelling_text(labelling(run)))
stop_ray()
print(json.dumps({"prompts": len(asked.prompts.neuron), "planned": planned, **most}))
"""


def drive(run: Run) -> tuple[dict[str, float], str]:
    """What the driver held, with the seconds it took, and what it printed."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, run.uri],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": str(HERE)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *printed, figures = done.stdout.splitlines()
    return {**json.loads(figures), "seconds": time.monotonic() - start}, "\n".join(printed)


def test_the_driver_of_344_000_prompts_stays_small(synthetic, capsys):
    from medsae_ray.config import PanelsSettings, Settings
    from medsae_ray.stages.panels import panels

    start = time.monotonic()
    panels(synthetic, Settings(panels=PanelsSettings(), run=synthetic.uri))
    seconds = time.monotonic() - start
    held = {}
    for named in (NEURONS // 2, NEURONS):
        names_of(synthetic, named)
        synthetic.delete("verdicts")
        held[named], printed = drive(synthetic)
    with capsys.disabled():
        print(f"\n{NEURONS} panels in {seconds:.0f} s; neurons detected, seconds and MiB of the driver:")
        print(pd.DataFrame(held).T.round(0).astype(int).to_string())
    assert held[NEURONS]["prompts"] == NEURONS * 40 == 344_000

    verdicts = pd.read_parquet(synthetic.path("verdicts"))
    assert len(verdicts) == 344_000
    assert verdicts["request_id"].is_unique
    assert verdicts["neuron"].is_monotonic_increasing
    assert (verdicts.groupby("neuron")["expected"].agg(["sum", "size"]) == [20, 40]).all(axis=None)
    reply, p_yes, reason = zip(*map(told, verdicts["request_id"]), strict=True)
    assert list(verdicts["reply"].fillna("")) == [r or "" for r in reply]
    assert list(verdicts["reason"].fillna("")) == [
        why or ("" if r in ("yes", "no") else "neither yes nor no")
        for r, why in zip(reply, reason, strict=True)
    ]
    status = ["failed" if r is None else "answered" if r in ("yes", "no") else "unparsed" for r in reply]
    assert list(verdicts["status"]) == status
    answer = [{"yes": True, "no": False}.get(r) for r in reply]
    assert verdicts["answer"].where(verdicts["answer"].notna(), None).tolist() == answer
    np.testing.assert_array_equal(verdicts["p_yes"], np.array(p_yes, float))
    panels_table = pd.read_parquet(synthetic.path("panels"))
    asked = panels_table[panels_table["role"].str.startswith("detect")]
    merged = verdicts.merge(asked, on=["neuron", "image_id"], validate="one_to_one")
    assert len(merged) == 344_000
    assert (merged["expected"] == (merged["role"] == "detect_positive")).all()
    detections = pd.read_parquet(synthetic.path("detections"))
    assert detections["n_failed"].sum() == status.count("failed")

    assert re.search(rf"verdicts, true description +{status.count('answered'):,}", printed)
    assert "verdicts: 344,000 prompts in " in printed

    # Flat: what the driver holds beside its plan is small, and no more for twice the prompts.
    growth = {named: of["asking"] - of["planned"] for named, of in held.items()}
    assert growth[NEURONS] < FLAT_MIB, held
    assert growth[NEURONS] - growth[NEURONS // 2] < FLAT_MIB / 2, held
    assert held[NEURONS]["collecting"] - held[NEURONS]["planned"] < 2 * FLAT_MIB, held
