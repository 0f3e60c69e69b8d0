"""344,000 detection prompts through `panels` and the whole of `detect`, but for the engine itself."""

import json
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
    notes = {"policy": {"uncertain": "ignore", "blank": "negative"}}
    inputs = {"activations": activations, "radiographs": radiographs}
    commit(run, "measure", "neurons", table.cast(schema), inputs, notes)
    return run


def names_of(run: Run) -> None:
    """Names for every neuron, as `name` would have written them."""
    n = NEURONS
    concepts = [LABELS[1 + i % (len(LABELS) - 1)] for i in range(n)]
    table = pa.table(
        {
            "neuron": np.arange(n),
            "concept": concepts,
            "description": [f"Signs of {concept.lower()}, number {i}." for i, concept in enumerate(concepts)],
            "status": ["answered"] * n,
            "reason": pa.nulls(n, pa.string()),
            "reply": ["{}"] * n,
            "model": ["instant"] * n,
            "prompt_sha256": ["0" * 64] * n,
            "seconds": np.zeros(n),
            "request_id": [f"{i:032x}" for i in range(n)],
        },
        schema=NAMES,
    )
    commit(run, "name", "names", table, {"panels": run.manifest("panels").fingerprint}, {"model": "instant"})


# Runs in a process of its own, and prints what that process held at its most, in MiB.
DRIVER = """
import resource, sys, threading, time
from medsae_ray.cluster import stop_ray
from medsae_ray.config import DetectSettings, MedgemmaSettings, RaySettings, Settings
from medsae_ray.run import Run
from medsae_ray.stages import asking, detect

def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize() / 2**20

samples = []
def watch():
    while True:
        samples.append(resident())
        time.sleep(0.25)
threading.Thread(target=watch, daemon=True).start()

settings = Settings(
    run=sys.argv[1],
    detect=DetectSettings(shuffled_share=0.0),
    medgemma=MedgemmaSettings(backend="instant_engine:answer", model="instant", block_rows=2000),
    ray=RaySettings(progress=False),
)
run = Run(settings.run)
asked = detect.prepare(run, settings)
print("planned", len(asked.prompts.neuron), resident())
staging = run.begin(asked.plan)
detect._ask(asked, staging, settings)
print("asked", max(samples), resident())
detect._count(run, settings)
stop_ray()
print("counted", max(samples), resident())
print("quarters", *(max(samples[i * len(samples) // 4 : (i + 1) * len(samples) // 4]) for i in range(4)))
"""


def test_the_driver_of_344_000_prompts_stays_small(synthetic, capsys):
    from medsae_ray.config import PanelsSettings, Settings
    from medsae_ray.stages.panels import panels

    start = time.monotonic()
    panels(synthetic, Settings(panels=PanelsSettings(), run=synthetic.uri))
    seconds = {"panels": time.monotonic() - start}
    names_of(synthetic)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, synthetic.uri],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": str(HERE)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seconds["detect"] = time.monotonic() - start
    told_by = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in done.stdout.splitlines()}
    with capsys.disabled():
        print(f"\n{NEURONS} neurons: {json.dumps(seconds)}; MiB of the driver: {json.dumps(told_by)}")
    assert told_by["planned"][0] == NEURONS * 40 == 344_000

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

    # Flat: what the driver holds while replies come in does not grow with their number.
    quarters = told_by["quarters"]
    assert quarters[3] < 1.5 * quarters[1], quarters
    assert told_by["asked"][0] < told_by["planned"][1] + 500, told_by
