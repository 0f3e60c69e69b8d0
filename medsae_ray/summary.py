"""The run's summary: `summary.json` and the table that `measure` prints, ours beside the paper's figures."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from medsae_ray.controls_summary import beside_controls
from medsae_ray.labelling_summary import is_current, labelling
from medsae_ray.labels import LABELS
from medsae_ray.measure import (
    CLAIM_AUROC,
    CLAIM_LOW,
    EntropyMean,
    claim,
    entropy_means,
    failure_signatures,
)
from medsae_ray.run import Manifest, Run

PAPER = {"entropy_neurons": 2.25, "entropy_dimensions": 2.38, "fve": 0.98, "dead": 0.30}
"""Published figures (arXiv 2510.26411); the entropies hold for 14 labels."""


def write_summary(run: Run) -> dict[str, Any]:
    """Compute a measured run's summary from its tables, write `summary.json` and return it.

    Its `controls` are there once the stage of that name has run, its `labelling` once the neurons are named
    and tested, both until what they rest on changes.
    """
    summary = summarise(run)
    if run.is_fresh("controls"):
        summary["controls"] = beside_controls(run)
    if is_current(run):
        summary["labelling"] = labelling(run)
    run.write_bytes(json.dumps(summary, indent=1).encode(), "summary.json")
    return summary


def forget_labelling(run: Run) -> None:
    """Take the figures of detection out of `summary.json`: what they rest on was made again."""
    try:
        summary = json.loads(run.read_bytes("summary.json"))
    except FileNotFoundError:
        return
    if summary.pop("labelling", None) is not None:
        run.write_bytes(json.dumps(summary, indent=1).encode(), "summary.json")


def summarise(run: Run) -> dict[str, Any]:
    """Every figure of the summary with its table, split, n and, where there is one, interval."""
    measured, fitted = run.require("neurons", "measure"), run.require("sae", "fit")
    embedded, listed = run.require("embeddings", "embed"), run.require("radiographs", "radiographs")
    notes = measured.notes
    neurons, dimensions = run.read("neurons"), run.read("dimensions")
    means = {
        "neurons": entropy_means(neurons, min_firing=notes["min_firing"]),
        "dimensions": entropy_means(dimensions, min_firing=notes["min_firing"]),
    }
    n_labels = int(np.max(neurons["n_labels"].to_numpy(), initial=0))
    test = notes["test"]
    figures = [
        _figure("fve", test["fve"], "embeddings, activations, sae", test["n_images"], paper=PAPER["fve"]),
        _figure("l0", test["l0"], "activations", test["n_images"]),
        _figure("dead", test["dead"], "neurons", neurons.num_rows, paper=PAPER["dead"]),
        _figure("dead_train", notes["train"]["dead"], "neurons", neurons.num_rows, split="train"),
    ]
    for table, of in means.items():
        for kind, mean in of._asdict().items():
            paper = PAPER[f"entropy_{table}"] if kind == "living" and n_labels == len(LABELS) else None
            figures += [
                _figure(f"entropy_{kind}_{table}", mean.entropy, table, mean.n_units, paper=paper),
                _figure(f"entropy_floor_{kind}_{table}", mean.floor, table, mean.n_units),
                _figure(f"entropy_relative_{kind}_{table}", mean.relative, table, mean.n_units),
            ]
    chosen = [claim(row, notes["min_positives"]) for row in notes["chosen"]["neurons"]]
    raw_chosen = [claim(row, notes["min_positives"]) for row in notes["chosen"]["dimensions"]]
    separated = [row["label"] for row in chosen if row["separated"]]
    figures.append(_figure("labels_separated", len(separated), "neurons", n_labels))
    return {
        "dataset": listed.notes["dataset"],
        "splits": listed.notes["splits"],
        "images": {name: notes[name]["n_images"] for name in ("test", "valid", "train")},
        "patients": {name: notes[name]["n_patients"] for name in ("test", "valid")},
        "radiographs": {
            "table_rows": listed.rows_in,
            "refused": listed.quarantined,
            "embedded": embedded.rows_out,
            "quarantined": embedded.quarantined,
            "reasons": embedded.notes["reasons"],
        },
        "encoder": {name: embedded.notes[name] for name in ("encoder", "weights_sha256", "embedding_dim")},
        "stand_ins": measured.stand_ins,
        "label_policy": notes["policy"],
        "n_labels": n_labels,
        "min_firing": notes["min_firing"],
        "normalisation": fitted.notes["normaliser"],
        "fve_reference": "the mean of the split itself",
        "sae": {
            "n_neurons": fitted.notes["n_neurons"],
            "chosen_epoch": fitted.notes["chosen"]["epoch"],
            "fve_floor_reached": fitted.notes["fve_floor_reached"],
            "settings": fitted.settings,
        },
        "embedding": notes["embedding"],
        "figures": figures,
        "labels": chosen,
        "labels_raw": raw_chosen,
        "signatures": _signatures(notes, means["neurons"].living, fitted),
        "seconds": {m.table: m.seconds for m in run.manifests()},
    }


def as_text(summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    value = {f["name"]: f["value"] for f in summary["figures"]}
    n = {f["name"]: f["n"] for f in summary["figures"]}
    fourteen = summary["n_labels"] == len(LABELS)
    radiographs = summary["radiographs"]
    lines = [
        "",
        f"MedSAE summary: {summary['dataset']}, {radiographs['embedded']:,} radiographs embedded, "
        f"{radiographs['quarantined']:,} quarantined, {radiographs['refused']:,} refused; "
        f"test split {summary['images']['test']:,} images of {summary['patients']['test']:,} patients",
    ]
    lines += [f"  quarantined {count:>6,}  {reason}" for reason, count in radiographs["reasons"].items()]
    if summary["stand_ins"]:
        lines.append(
            f"STAND-IN MODELS ({', '.join(summary['stand_ins'])}): these figures say nothing about MedCLIP."
        )
    if summary["dataset"] == "phantom":
        lines.append("SYNTHETIC RADIOGRAPHS: these figures say nothing about patients.")
    lines += ["", f"{'figure (test split)':<50}{'ours':>9}{'floor':>9}{'n':>8}{'paper':>9}"]

    def row(name: str, key: str, paper: float | None, *, share: bool = False) -> str:
        floor = value.get(key.replace("entropy_", "entropy_floor_", 1)) if key.startswith("entropy") else None
        shown = [_number(value[key], share), "" if floor is None else _number(floor, False)]
        return f"{name:<50}{shown[0]:>9}{shown[1]:>9}{n[key]:>8,}{_number(paper, share):>9}"

    lines += [
        row("fraction of variance explained (FVE)", "fve", PAPER["fve"]),
        row("firing neurons an image (L0)", "l0", None),
        row("dead neurons", "dead", PAPER["dead"], share=True),
        row("dead neurons on the training split", "dead_train", None, share=True),
    ]
    for kind, told in (
        ("living", "living"),
        ("selective", "selective (max |r| > 0.2)"),
        ("best", "best of each label"),
    ):
        for table in ("neurons", "dimensions"):
            paper = PAPER[f"entropy_{table}"] if kind == "living" and fourteen else None
            unit = "neurons" if table == "neurons" else "raw dims"
            lines.append(row(f"mean entropy, {told} {unit}", f"entropy_{kind}_{table}", paper))
    lines.append(
        f"Entropy over {summary['n_labels']} labels in nats (at most "
        f"{math.log(max(summary['n_labels'], 1)):.2f}); floor: the same with permuted labels."
        + ("" if fourteen else " The paper's 2.25 and 2.38 hold for 14 labels and are not comparable.")
    )
    lines += ["", _labels_text(summary)]
    if not summary["sae"]["fve_floor_reached"]:
        lines.append("No checkpoint reached the FVE floor on validation: the one of highest FVE was kept.")
    lines += [f"Failure signature: {told}" for told in summary["signatures"]]
    if not summary["signatures"]:
        lines.append("No failure signature of the paper is met.")
    return "\n".join(lines)


def _labels_text(summary: dict[str, Any]) -> str:
    head = (
        f"{'label':<28}{'neuron':>8}{'AUROC':>8}  {'95 % interval':<16}{'positives':>9}{'raw dim AUROC':>15}"
    )
    lines = ["Neuron of each label, chosen on validation, told on test:", head]
    for ours, raw in zip(summary["labels"], summary["labels_raw"], strict=True):
        if ours["auroc"] is None:
            lines.append(f"{ours['label']:<28}{'-':>8}{'-':>8}  {'-':<16}{ours['n_positive']:>9,}")
            continue
        interval = f"{ours['auroc_low']:.3f}-{ours['auroc_high']:.3f}"
        mark = " *" if ours["separated"] else ""
        raw_area = "-" if raw["auroc"] is None else f"{raw['auroc']:.3f}"
        lines.append(
            f"{ours['label']:<28}{ours['neuron']:>8}{ours['auroc']:>8.3f}  {interval:<16}"
            f"{ours['n_positive']:>9,}{raw_area:>15}{mark}"
        )
    separated = sum(row["separated"] for row in summary["labels"])
    raw_separated = sum(row["separated"] for row in summary["labels_raw"])
    lines.append(
        f"* {separated} labels separated by one neuron (AUROC > {CLAIM_AUROC}, lower bound > {CLAIM_LOW}, "
        f"enough positives); by one raw dimension: {raw_separated}."
    )
    return "\n".join(lines)


def _figure(
    name: str, value: float, table: str, n: int, *, split: str = "test", paper: float | None = None
) -> dict[str, Any]:
    finite = None if value is None or not math.isfinite(value) else value
    told = {"name": name, "value": finite, "table": table, "split": split, "n": n}
    return told if paper is None else {**told, "paper": paper}


def _signatures(notes: dict[str, Any], living: EntropyMean, fitted: Manifest) -> list[str]:
    found = failure_signatures(
        fve=notes["test"]["fve"],
        dead_share=notes["test"]["dead"],
        entropy=living,
        embedding=notes["embedding"],
    )
    return [str(failure) for failure in found]


def _number(value: float | None, share: bool) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if share else f"{value:.1f}" if value >= 100 else f"{value:.3f}"
