"""A whole run folder of made-up figures, for tests and benchmarks of the report: no Ray, no training.

    python tests/report/synthetic.py FOLDER [N_NEURONS N_IMAGES]

Tables, manifests and fingerprints are as the stages write them; the figures in them are drawn at random and
agree with each other only as far as a reader would notice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from medsae_ray.concepts import is_named
from medsae_ray.config import DetectSettings
from medsae_ray.controls import CONTROLS, controls_table
from medsae_ray.detections import VERDICT_COLUMNS, detections_table
from medsae_ray.labelling_summary import texts_digest
from medsae_ray.labels import LABELS
from medsae_ray.measure import neurons_schema
from medsae_ray.radiographs.phantom.render import images_of, render
from medsae_ray.radiographs.schema import image_id
from medsae_ray.run import Manifest, Plan, Run
from medsae_ray.sae.pareto import costs, pareto_front
from medsae_ray.summary import write_summary
from medsae_ray.tables import (
    ACQUISITION,
    ACTIVATIONS,
    ATLAS,
    CANDIDATES,
    DETECTIONS,
    GALLERY,
    HISTORY,
    LOCALISATION,
    NAMES,
    PANELS,
    RADIOGRAPHS,
    SWEEP,
    VERDICTS,
    embeddings_schema,
    maps_schema,
)

DEAD, SCRIPT, UNPARSED, FAILED, LOST, UNNAMED = range(6)
"""Neurons with a story: dead; named with markup; whose name could not be read; was not answered; whose
verdicts are mostly lost; whose panel shares no finding."""
MARKUP = "<script>alert(1)</script>"
NASTY = (
    "</script><img src=x onerror=alert(2)> \"quoted\" 'single' & {{ 7 * 7 }} {% raw %} \u2028 line \u2029 "
    "\x1b[31mred\x07 \u202etfel ot thgir\u202c \u00e9\U0001f600"
)
GRID = (7, 7)
STAND_INS = ["encoder stand-in", "model stand-in@0123456789ab"]
MODEL = "stand-in@0123456789ab"
CONCEPTS = [label.lower() for label in LABELS]
TOP, RANGE, SILENT = 10, 10, 20
"""Radiographs on a card; a candidate's has as many of its range as silent ones."""
N_BINS, N_NEAREST = 20, 8
Floats = NDArray[np.float64]


def write_run(
    folder: str | Path,
    n_neurons: int = 300,
    n_images: int = 240,
    *,
    n_candidates: int | None = None,
    pictures: Literal["phantoms", "variants", "none"] = "phantoms",
    side: int = 224,
    seed: int = 0,
) -> Run:
    """Write a run of `n_neurons` and, on its validation and test splits, `n_images` radiographs.

    n_candidates: named and tested neurons, from number 1 on (default: a fifth).
    pictures: `phantoms` are rendered (14 ms each); `variants` are cheap, yet no two alike; `none`: no files.
    side: of the pictures, in pixels. They lie in `FOLDER/images`, in folders that name their patients.
    """
    rng = np.random.default_rng(seed)
    run = Run(str(folder))
    radiographs = _radiographs(Path(folder).absolute() / "images", n_images, rng)
    _write_pictures(radiographs["uri"].to_pylist()[:n_images], pictures, side, seed)
    splits = {
        "train": n_images // 4,
        "valid": n_images // 2,
        "test": n_images - n_images // 2,
    }
    n_test = splits["test"]
    _commit(run, "radiographs", "radiographs", radiographs, notes={"dataset": "phantom", "splits": splits})
    _write_embeddings(run, radiographs, rng)
    _write_sae(run, n_neurons, rng)
    inputs = ("embeddings", "sae")
    _commit(run, "encode", "activations", ACTIVATIONS.empty_table(), inputs, notes={"n_neurons": n_neurons})

    candidates = min(n_neurons - 1, n_neurons // 5 if n_candidates is None else n_candidates)
    dead = np.arange(n_neurons) % 14 == DEAD
    dead[1 : candidates + 1] = False
    neurons = _units(n_neurons, n_test, dead, rng, signed=False)
    dimensions = _units(min(512, n_neurons), n_test, np.zeros(min(512, n_neurons), bool), rng, signed=True)
    _write_measures(run, neurons, dimensions, splits)
    _write_controls(run, n_test, rng)

    gallery = _gallery(radiographs, neurons, candidates, n_images)
    _write_panels(run, gallery, neurons, candidates)
    inputs = ("radiographs", "sae", "activations", "neurons", "panels")
    _commit(run, "atlas", "gallery", gallery, inputs)
    _commit(run, "atlas", "atlas", _atlas(neurons, rng), inputs)
    inputs = ("radiographs", "embeddings", "sae", "activations", "neurons", "gallery")
    _commit(run, "localise", "maps", _maps(gallery, rng), inputs)
    _commit(run, "localise", "localisation", _localisation(neurons, rng), inputs)
    _write_labelling(run, gallery, neurons, candidates, rng)
    _write_sweep(run, rng)
    write_summary(run)
    return run


def remake(run: Run, table: str) -> None:
    """Make a table's fingerprint another one, as a new fit or new settings do: what rests on it is stale."""
    told = json.loads(run.read_bytes(table, "_manifest.json"))
    told["fingerprint"] = "f" * 64
    run.write_bytes(json.dumps(told).encode(), table, "_manifest.json")


# ------------------------------------------------------------------------------------------------- tables


def _radiographs(images: Path, n_images: int, rng: np.random.Generator) -> pa.Table:
    """First the validation and test images, one after the other; then the training split, without files.

    Consecutive images of a split are of different patients, each of which has two.
    """
    n = n_images + n_images // 4
    number = np.arange(n)
    split = np.where(number >= n_images, "train", np.where(number % 2 == 0, "valid", "test"))
    per_split = max(1, n_images // 4)
    patient = np.where(
        number < n_images, 2 * (number // 2 % per_split) + number % 2, 2 * per_split + number - n_images
    )
    study = np.where(number < n_images, 1 + number // 2 // per_split, 1)
    names = [f"patient{p + 1:05d}" for p in patient.tolist()]
    paths = [f"{name}/study{s}/view1_frontal.jpg" for name, s in zip(names, study.tolist(), strict=True)]
    lateral = rng.random(n) < 0.2
    labels = {
        label: pa.array(rng.choice([0.0, 1.0, -1.0], n, p=[0.75, 0.2, 0.05]), pa.float32(), mask=hidden)
        for label, hidden in zip(LABELS, rng.random((len(LABELS), n)) < 0.1, strict=True)
    }
    columns = {
        "image_id": [image_id("phantom", path) for path in paths],
        "uri": [str(images / path) for path in paths],
        "patient_id": names,
        "study_id": [f"{name}/study{s}" for name, s in zip(names, study.tolist(), strict=True)],
        "split": split,
        "view": np.where(lateral, "LATERAL", rng.choice(["AP", "PA"], n)),
        "sex": rng.choice(["F", "M"], n),
        "age": rng.uniform(18, 95, n).astype(np.float32),
        "site": rng.choice(["north", "south"], n),
        **labels,
    }
    return pa.table(columns, schema=RADIOGRAPHS)


def _write_embeddings(run: Run, radiographs: pa.Table, rng: np.random.Generator) -> None:
    x = rng.normal(size=(radiographs.num_rows, 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    vectors = pa.FixedSizeListArray.from_arrays(x.ravel(), 8)
    table = pa.table([radiographs["image_id"], vectors], schema=embeddings_schema(8))
    notes = {
        "encoder": "stand-in",
        "weights_sha256": "0" * 64,
        "embedding_dim": 8,
        "grid": list(GRID),
        "reasons": {},
    }
    _commit(run, "embed", "embeddings", table, ("radiographs",), notes=notes, stand_ins=STAND_INS[:1])


def _write_sae(run: Run, n_neurons: int, rng: np.random.Generator) -> None:
    rows = []
    for epoch in range(10, 101, 10):
        for split in ("train", "valid"):
            progress = 1 - np.exp(-epoch / 30)
            figures = {
                "fve": 0.5 + 0.48 * progress + rng.normal(0, 0.003),
                "l0": 400 - 300 * progress,
                "dead": 0.07 * progress,
                "entropy": 2.6 - 0.3 * progress,
                "selection": 2.6 - 0.3 * progress,
                "loss": 0.3 - 0.2 * progress,
                "reconstruction": 0.1 - 0.08 * progress,
                "sparsity": 5.0,
                "auxiliary": None,
                "seconds": 0.5 * epoch,
            }
            rows.append({"epoch": epoch, "step": 18 * epoch, "split": split, **figures})
    plan = _plan(run, "fit", "sae", ("embeddings", "radiographs"), {"architecture": "relu", "sparsity": 0.03})
    staging = run.restage(plan)
    staging.write_table(pa.Table.from_pylist(rows, schema=HISTORY), "history/part-00000.parquet")
    notes = {
        "architecture": "relu",
        "chosen": rows[-1],
        "fve_floor_reached": True,
        "n_neurons": n_neurons,
        "normaliser": {"convention": "unit", "k": 1.05},
    }
    staging.commit(rows_in=100, rows_out=len(rows), notes=notes)


def _units(
    n: int, n_test: int, dead: NDArray[np.bool_], rng: np.random.Generator, *, signed: bool
) -> pa.Table:
    """A table of `neurons_schema`: each unit follows a label and a little of the others."""
    best = rng.integers(len(LABELS), size=n)
    r = rng.normal(0, 0.06, (n, len(LABELS)))
    r[np.arange(n), best] = rng.beta(2, 3, n) * (rng.choice([-1, 1], n) if signed else 1)
    # An r of silent units is undefined, as is that of a label that no image of the split has.
    r[dead], r[::17, 1] = np.nan, np.nan
    valid_r = r + rng.normal(0, 0.03, r.shape)
    auroc = np.clip(0.5 + r / 2 + rng.normal(0, 0.02, r.shape), 0.01, 0.99)
    share = np.abs(r) / np.nansum(np.abs(r), axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        entropy = np.where(dead, np.nan, -np.nansum(share * np.log(share), axis=1))
    n_firing = np.where(dead, 0, np.maximum(1, (n_test * rng.beta(0.5, 4, n)).astype(int)))
    highest = np.where(dead, 0, rng.uniform(0.5, 12, n))
    known = np.isfinite(r)
    label = np.where(dead, None, np.array(LABELS, object)[best])
    columns: dict[str, Any] = {
        "neuron": np.arange(n),
        "n_firing": n_firing,
        "density": n_firing / n_test,
        "mean": highest / 9,
        "max": highest,
        "dead": dead,
        "dead_train": None if signed else dead,
        "entropy": entropy,
        "n_labels": known.sum(axis=1),
        "entropy_floor": np.where(dead, np.nan, 2.35 + rng.normal(0, 0.03, n)),
        "best_label": label,
        "best_r": r[np.arange(n), best],
        "valid_best_label": label,
    }
    for i, name in enumerate(LABELS):
        columns |= {
            f"r_{name}": r[:, i],
            f"n_{name}": np.where(known[:, i], int(0.9 * n_test), 0),
            f"auroc_{name}": auroc[:, i],
            f"auroc_{name}_low": np.clip(auroc[:, i] - 0.06, 0, 1),
            f"auroc_{name}_high": np.clip(auroc[:, i] + 0.06, 0, 1),
            f"valid_r_{name}": valid_r[:, i],
            f"valid_auroc_{name}": auroc[:, i],
        }
    schema = neurons_schema()
    arrays = [
        pa.nulls(n, field.type)
        if (value := columns[field.name]) is None
        else pa.array(value, field.type, from_pandas=True)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _chosen(units: pa.Table) -> list[dict[str, Any]]:
    rows = []
    for label in LABELS:
        of = units[f"valid_r_{label}"].to_numpy()
        neuron = int(np.nanargmax(of))
        row = units.slice(neuron, 1).to_pylist()[0]
        rows.append(
            {
                "label": label,
                "neuron": neuron,
                "valid_r": float(of[neuron]),
                "valid_auroc": row[f"valid_auroc_{label}"],
                "r": row[f"r_{label}"],
                **{f"auroc{end}": row[f"auroc_{label}{end}"] for end in ("", "_low", "_high")},
                "n_positive": 90,
            }
        )
    return rows


def _write_measures(run: Run, neurons: pa.Table, dimensions: pa.Table, splits: dict[str, int]) -> None:
    notes: dict[str, Any] = {
        "policy": {"uncertain": "ignore", "blank": "negative"},
        "train": {"n_images": splits["train"], "dead": 0.05},
        "embedding": {"mean_norm": 1.0, "variance_mean": 0.1, "variance_min": 0.05, "variance_max": 0.2,
                      "non_finite_share": 0.0, "effective_dimension": 7.0},
        "min_positives": 50,
        "min_firing": 10,
        "chosen": {"neurons": _chosen(neurons), "dimensions": _chosen(dimensions)},
    }  # fmt: skip
    for split in ("valid", "test"):
        notes[split] = {
            "n_images": splits[split],
            "n_patients": splits[split] // 2,
            "fve": 0.97,
            "l0": 90.0,
            "dead": float(np.mean(neurons["dead"].to_numpy())),
            "n_positive": dict.fromkeys(LABELS, 90),
        }
    inputs = ("activations", "embeddings", "radiographs", "sae")
    _commit(run, "measure", "dimensions", dimensions, inputs)
    _commit(run, "measure", "neurons", neurons, inputs, notes=notes)


def _write_controls(run: Run, n_test: int, rng: np.random.Generator) -> None:
    units = {name: _units(60, n_test, np.zeros(60, bool), rng, signed=True) for name in CONTROLS}
    ica = {"n_rows": 100, "iterations": 20, "converged": True}
    notes = {
        "rank": 8,
        "ica": {"ica": ica, "ica_leading": ica},
        "chosen": {name: _chosen(table) for name, table in units.items()},
    }
    table = pa.concat_tables(controls_table(name, of) for name, of in units.items())
    inputs = ("radiographs", "embeddings", "sae", "activations", "neurons")
    _commit(run, "controls", "controls", table, inputs, notes=notes)


def _gallery(radiographs: pa.Table, neurons: pa.Table, candidates: int, n_images: int) -> pa.Table:
    """Each living neuron's images are the next ones of the split, so that all of them are used."""
    of_split = {
        "valid": np.arange(0, n_images, 2),
        "test": np.arange(1, n_images, 2),
    }
    alive = np.flatnonzero(~neurons["dead"].to_numpy())
    highest = neurons["max"].to_numpy()
    parts = []
    for rank, (role, split) in enumerate((("top", "valid"), ("range", "test"), ("silent", "test"))):
        for candidate in (True, False):
            of = alive[(alive <= candidates) == candidate]
            k = TOP if role == "top" else SILENT if candidate else RANGE if role == "range" else 0
            place = np.arange(k)[None, :] + k * np.arange(len(of))[:, None]
            images = of_split[split]
            place += len(images) // 4 if role == "silent" else 0
            share = (
                np.zeros(k) if role == "silent" else 1 - np.arange(k) * (0.02 if role == "top" else 0.9 / k)
            )
            parts.append(
                {
                    "neuron": np.repeat(of, k),
                    "image": images[place.ravel() % len(images)],
                    "rank": np.full(k * len(of), rank),
                    "value": (highest[of][:, None] * share).ravel(),
                    "quantile": np.tile(share, len(of)),
                }
            )
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((-whole["value"], whole["rank"], whole["neuron"]))
    columns = {
        "neuron": whole["neuron"][order],
        "image_id": radiographs["image_id"].take(pa.array(whole["image"][order])),
        "role": np.array(["top", "range", "silent"])[whole["rank"][order]],
        "value": whole["value"][order].astype(np.float32),
        "quantile": whole["quantile"][order].astype(np.float32),
    }
    return pa.table(columns, schema=GALLERY)


def _write_panels(run: Run, gallery: pa.Table, neurons: pa.Table, candidates: int) -> None:
    n = neurons.num_rows
    number = np.arange(n)
    chosen = (number >= 1) & (number <= candidates)
    dead = neurons["dead"].to_numpy()
    reason = np.where(chosen, None, np.where(dead, "dead", "not among the top of any label"))
    counts = {
        f"n_{kind}_{split}": np.full(n, 40) for split in ("valid", "test") for kind in ("firing", "silent")
    }
    columns = {
        "neuron": number.astype(np.int32),
        "candidate": chosen,
        "reason": reason,
        "label": pa.array(np.where(chosen, neurons["best_label"].to_numpy(), None), pa.string()),
        **counts,
    }
    inputs = ("radiographs", "activations", "neurons")
    left_out = {"not among the top of any label": int((~chosen & ~dead).sum()), "dead": int(dead.sum())}
    roles = {"top": "name", "range": "detect_positive", "silent": "detect_negative"}
    panels = gallery.filter(pa.array(chosen[gallery["neuron"].to_numpy()]))
    panels = panels.set_column(
        2, PANELS.field("role"), pa.array([roles[r] for r in panels["role"].to_pylist()])
    )
    _commit(run, "panels", "panels", panels.cast(PANELS), inputs, notes={"left_out": left_out})
    _commit(run, "panels", "candidates", pa.table(columns, schema=CANDIDATES), inputs)


def _atlas(neurons: pa.Table, rng: np.random.Generator) -> pa.Table:
    n = neurons.num_rows
    dead = neurons["dead"].to_numpy()
    alive = np.flatnonzero(~dead)
    best = neurons["best_label"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    angle = 2 * np.pi * np.nan_to_num(best) / len(LABELS)
    place = 30 * np.column_stack([np.cos(angle), np.sin(angle)]) + rng.normal(0, 6, (n, 2))
    k = min(N_NEAREST, len(alive))
    nearest = alive[(np.arange(n)[:, None] + 1 + np.arange(k)) % len(alive)]
    cosine = np.sort(rng.uniform(-0.1, 0.9, (n, k)), axis=1)[:, ::-1]
    n_firing = neurons["n_firing"].to_numpy()
    shares = rng.dirichlet(np.linspace(2, 0.2, N_BINS), n)
    bins = np.floor(shares * n_firing[:, None]).astype(np.int64)
    bins[:, 0] += n_firing - bins.sum(axis=1)
    r = np.where(dead[:, None], np.nan, rng.normal(0, 0.12, (n, len(ACQUISITION))))
    valid_r = r + rng.normal(0, 0.02, r.shape)
    follows = (np.abs(r) > 0.2) & (np.abs(valid_r) > 0.2)
    shortcuts = [[name for name, f in zip(ACQUISITION, row, strict=True) if f] for row in follows.tolist()]
    columns: dict[str, Any] = {
        "neuron": np.arange(n),
        "x": np.where(dead, np.nan, place[:, 0]),
        "y": np.where(dead, np.nan, place[:, 1]),
        "leaf": pa.array(rng.permutation(n), pa.int32(), mask=dead),
        "nearest": [[] if d else row for d, row in zip(dead, nearest.tolist(), strict=True)],
        "cosine": [[] if d else row for d, row in zip(dead, cosine.tolist(), strict=True)],
        "bins": bins.tolist(),
        "site": np.where(dead, None, rng.choice(["north", "south"], n)),
        "shortcuts": shortcuts,
    }
    for i, name in enumerate(ACQUISITION):
        columns |= {f"r_{name}": r[:, i], f"valid_r_{name}": valid_r[:, i]}
    arrays = [
        value
        if isinstance(value := columns[field.name], pa.Array)
        else pa.array(value, field.type, from_pandas=True)
        for field in ATLAS
    ]
    return pa.Table.from_arrays(arrays, schema=ATLAS)


def _maps(gallery: pa.Table, rng: np.random.Generator) -> pa.Table:
    """A bump somewhere, signed noise around it; its sum is the activation of images that fire."""
    height, width = GRID
    n = gallery.num_rows
    y, x = np.divmod(np.arange(height * width), width)
    centre = rng.uniform(0, height, (2, n, 1)).astype(np.float32)
    of = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 2).astype(np.float32)
    of += rng.normal(0, 0.05, of.shape).astype(np.float32)
    value = gallery["value"].to_numpy()
    of *= np.where(value > 0, (value + 0.1) / of.sum(axis=1), -0.1)[:, None]
    columns = [
        gallery["neuron"],
        gallery["image_id"],
        pa.FixedSizeListArray.from_arrays(of.astype(np.float32).ravel(), height * width),
        np.full(n, -0.1, np.float32),
        (of.sum(axis=1) - 0.1).astype(np.float32),
    ]
    return pa.table(columns, schema=maps_schema(height * width))


def _localisation(neurons: pa.Table, rng: np.random.Generator) -> pa.Table:
    rows = []
    for label in LABELS[1:]:
        hit, iou = rng.uniform(0.4, 0.9), rng.uniform(0.1, 0.5)
        rows.append(
            {
                "finding": label,
                "neuron": int(np.nanargmax(neurons[f"valid_r_{label}"].to_numpy())),
                "n_boxed": 60,
                "n": 52,
                "n_patients": 40,
                "hit_rate": hit,
                "hit_rate_low": hit - 0.1,
                "hit_rate_high": hit + 0.1,
                "box_share": 0.08,
                "other_hit_rate": 0.2,
                "iou": iou,
                "iou_low": iou - 0.05,
                "iou_high": iou + 0.05,
                "other_iou": 0.07,
                "above_chance": hit - 0.1 > 0.2,
            }
        )
    lost = dict.fromkeys(LOCALISATION.names)
    rows[-1] = {**lost, "finding": LABELS[-1], "n_boxed": 3, "n": 0, "n_patients": 0}
    return pa.Table.from_pylist(rows, schema=LOCALISATION)


def _write_labelling(
    run: Run, gallery: pa.Table, neurons: pa.Table, candidates: int, rng: np.random.Generator
) -> None:
    names = []
    best = neurons["best_label"].to_pylist()
    for neuron in range(1, candidates + 1):
        concept = MARKUP if neuron == SCRIPT else (best[neuron] or "opacity").lower()
        description = NASTY if neuron == SCRIPT else f"Radiographs that show {concept}, mostly on one side."
        concept = "no common finding" if neuron == UNNAMED else concept
        status, reason = "answered", None
        reply: str | None = json.dumps({"concept": concept, "description": description})
        if neuron == UNPARSED:
            status, reason, reply = "unparsed", "not the JSON that was asked for", f"I see {MARKUP} {NASTY}"
        if neuron == FAILED:
            status, reason, reply = "failed", "the request timed out", None
        answered = status == "answered"
        names.append(
            {
                "neuron": neuron,
                "concept": concept if answered else None,
                "description": description if answered else None,
                "status": status,
                "reason": reason,
                "reply": reply,
                "model": MODEL,
                "prompt_sha256": "1" * 64,
                "seconds": 1.0,
                "request_id": f"name-{neuron}",
            }
        )
    table = pa.Table.from_pylist(names, schema=NAMES)
    _commit(run, "name", "names", table, ("panels",), notes={"model": MODEL}, stand_ins=STAND_INS[1:])

    named = np.zeros(neurons.num_rows, bool)
    named[[row["neuron"] for row in names if row["concept"] and is_named(row["concept"])]] = True
    tested = named[gallery["neuron"].to_numpy()] & (gallery["role"].to_numpy() != "top")
    verdicts = pa.concat_tables(
        _verdicts(gallery.filter(pa.array(tested)), condition, rng) for condition in ("true", "shuffled")
    )
    counts = {status: int((verdicts["status"].to_numpy() == status).sum()) for status in STATUSES}
    asked = _commit(
        run,
        "detect",
        "verdicts",
        verdicts,
        ("panels", "names"),
        notes={"model": MODEL, "statuses": counts},
        more={"texts": texts_digest(run)},
    )
    settings = DetectSettings()
    every = table["neuron"].to_numpy()
    detections = detections_table(verdicts.select(VERDICT_COLUMNS), every, named[every], settings)
    _commit(
        run,
        "detect",
        "detections",
        detections.cast(DETECTIONS),
        ("verdicts", "names"),
        settings={"interval": settings.interval, "permutations": 10, "max_lost_share": 0.2, "seed": 0},
        more={"statuses": json.dumps(asked.notes["statuses"], sort_keys=True)},
    )


STATUSES = ("answered", "unparsed", "failed")


def _verdicts(gallery: pa.Table, condition: str, rng: np.random.Generator) -> pa.Table:
    n = gallery.num_rows
    neuron = gallery["neuron"].to_numpy()
    expected = gallery["role"].to_numpy() == "range"
    skill = 0.8 if condition == "true" else 0.5
    yes = np.where(rng.random(n) < skill, expected, ~expected)
    kind = np.searchsorted([0.95, 0.98], rng.random(n))
    kind = np.where((neuron == LOST) & (rng.random(n) < 0.7), 1, kind)
    answered = kind == 0
    columns = {
        "request_id": [f"{condition}-{i}" for i in range(n)],
        "neuron": neuron,
        "image_id": gallery["image_id"],
        "condition": [condition] * n,
        "description_neuron": neuron,
        "expected": expected,
        "answer": pa.array(yes, mask=~answered),
        "p_yes": pa.array(np.where(yes, rng.uniform(0.5, 1, n), rng.uniform(0, 0.5, n)), mask=~answered),
        "status": np.array(STATUSES)[kind],
        "reason": pa.array(["neither yes nor no"] * n, mask=answered),
        "reply": np.where(yes, "yes", "no"),
        "model": [MODEL] * n,
        "prompt_sha256": ["2" * 64] * n,
        "quantile": gallery["quantile"],
    }
    return pa.table(columns, schema=VERDICTS)


def _write_sweep(run: Run, rng: np.random.Generator) -> None:
    rows = []
    for trial in range(12):
        for epoch in (10, 20, 30):
            row = {
                "trial": f"t{trial:02d}",
                "status": "finished",
                "architecture": ("relu", "topk", "gated")[trial % 3],
                "expansion": 8,
                "sparsity_setting": 3e-4 * 2**trial,
                "l0_setting": None,
                "learning_rate": 3e-4,
                "seed": 0,
                **dict.fromkeys(HISTORY.names),
                "epoch": epoch,
                "step": 18 * epoch,
                "split": "valid",
                "fve": 0.99 - 0.02 * trial + rng.normal(0, 0.01),
                "l0": 400 / (trial + 1),
                "dead": 0.02 * trial,
                "entropy": 2.5 - 0.03 * trial + rng.normal(0, 0.05),
                "selection": 2.5,
                "best": epoch == 30,
                "front": False,
            }
            rows.append(row)
    best = [row for row in rows if row["best"]]
    for row, front in zip(best, pareto_front(costs(best)), strict=True):
        row["front"] = bool(front)
    table = pa.Table.from_pylist(rows, schema=SWEEP)
    _commit(run, "sweep", "sweep", table, ("embeddings", "radiographs"))


# ---------------------------------------------------------------------------------------------- manifests


def _plan(
    run: Run, stage: str, table: str, inputs: tuple[str, ...], settings: dict[str, Any], **more: str
) -> Plan:
    of = {name: m.fingerprint for name in inputs if (m := run.manifest(name))}
    return Plan(stage, table, settings, {**of, **more})


def _commit(
    run: Run,
    stage: str,
    table: str,
    content: pa.Table,
    inputs: tuple[str, ...] = (),
    *,
    settings: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
    stand_ins: list[str] | None = None,
    more: dict[str, str] | None = None,
) -> Manifest:
    staging = run.restage(_plan(run, stage, table, inputs, settings or {"seed": 0}, **(more or {})))
    staging.write_table(content)
    n = content.num_rows
    return staging.commit(rows_in=n, rows_out=n, stand_ins=stand_ins or (), notes=notes)


# ----------------------------------------------------------------------------------------------- pictures


def _write_pictures(paths: list[str], kind: str, side: int, seed: int) -> None:
    if kind == "none":
        return
    for folder in {Path(path).parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    pictures = _phantoms(len(paths), side, seed) if kind == "phantoms" else _variants(len(paths), side, seed)
    with ThreadPoolExecutor() as pool:
        for path, picture in zip(paths, pictures, strict=True):
            pool.submit(picture.save, path, quality=90)


def _phantoms(n: int, side: int, seed: int) -> Iterator[Image.Image]:
    for _, (study, view) in zip(range(n), images_of(seed), strict=False):
        yield Image.fromarray(render(study, view, side).pixels)


def _variants(n: int, side: int, seed: int) -> Iterator[Image.Image]:
    """Two of 40 phantoms blended and one moved about: no less detailed than the phantoms themselves."""
    rng = np.random.default_rng(seed)
    bases = [np.asarray(picture, np.uint16) for picture in _phantoms(40, side, seed)]
    for _ in range(n):
        a, b = (bases[i] for i in rng.integers(len(bases), size=2))
        down, right = rng.integers(-8, 9, size=2)
        mixed = (2 * np.roll(a, (down, right), (0, 1)) + b) // 3
        yield Image.fromarray(mixed.astype(np.uint8))


if __name__ == "__main__":
    sizes = [int(number) for number in sys.argv[2:4]]
    print(write_run(sys.argv[1], *sizes).uri)
