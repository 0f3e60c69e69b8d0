"""The summary of naming and detection: counts beside chance, nulls, per-class table, best neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from medsae_ray.concepts import canonical, is_named
from medsae_ray.detections import (
    ACCURATE,
    CONDITIONS,
    NullFigures,
    per_class_table,
    permuted_null,
    shuffled_null,
)
from medsae_ray.errors import printable
from medsae_ray.labels import LABELS
from medsae_ray.medgemma.replies import STATUSES
from medsae_ray.run import Manifest, Run, table_digest
from medsae_ray.statistics import above, chance_above, wilson
from medsae_ray.tables import CANDIDATES, DETECTIONS, NAMES, VERDICTS

PAPER_ACCURATE = 21
"""Neurons that the paper names with a detection accuracy above 70 % (arXiv 2510.26411)."""
FDR = 0.10
"""False discovery rate at which the neurons are counted."""
LOW_ACCURACY = 0.60
"""Mean detection accuracy below which the paper's failure signature is met."""
N_BEST, N_REASONS = 10, 5


def texts_digest(run: Run) -> str:
    """SHA-256 of what the neurons are called now: names that had failed and were asked again have the same
    fingerprint as before, but other texts."""
    return table_digest(run.read("names", NAMES, ["neuron", "concept", "description"]))


def is_current(run: Run) -> bool:
    """Whether the run has `detections`, of its present names."""
    asked = run.manifest("verdicts")
    return asked is not None and run.is_fresh("detections") and asked.inputs["texts"] == texts_digest(run)


def labelling(run: Run) -> dict[str, Any]:
    """Every figure of a labelled run with its table, split, n and, where there is one, 95 % interval.

    Reads `candidates`, `names`, `verdicts`, `detections` and `neurons`, and of the manifests' notes the
    throughput of `names` and `verdicts` and the positives of each label of `neurons`.
    Raises InputError where one of them is missing or stale.
    """
    detected, measured = run.require("detections", "detect"), run.require("neurons", "measure")
    asked = {"names": run.require("names", "name"), "verdicts": run.require("verdicts", "detect")}
    candidates = run.read("candidates", CANDIDATES)
    names, detections = run.read("names", NAMES), run.read("detections", DETECTIONS)
    neurons = run.read("neurons")
    verdicts = run.read("verdicts", VERDICTS, ["condition", "status", "reason"])
    enough = detections.filter(detections["enough"])
    permuted = permuted_null(detections, detected.settings["permutations"], detected.settings["seed"])
    shuffled = shuffled_null(detections)
    concepts = dict(zip(names["neuron"].to_pylist(), names["concept"].to_pylist(), strict=True))
    answered = names.filter(pc.equal(names["status"], "answered"))["concept"].to_pylist()
    positives = {label: int(n) for label, n in measured.notes["test"]["n_positive"].items()}
    per_class = per_class_table(names, detections, neurons, positives).to_pylist()
    min_positives = measured.notes["min_positives"]
    figures = _figures(enough, detections.num_rows, permuted, shuffled)
    return {
        "stand_ins": detected.stand_ins,
        "models": {table: manifest.notes.get("model") for table, manifest in asked.items()},
        "candidates": {
            "n_neurons": candidates.num_rows,
            "n_candidates": pc.sum(candidates["candidate"]).as_py() or 0,
            "left_out": run.require("panels", "panels").notes.get("left_out", {}),
        },
        "names": {
            **_statuses(names),
            "no_common_finding": sum(not is_named(concept) for concept in answered),
            "named": pc.sum(detections["named"]).as_py() or 0,
            "distinct_concepts": len({canonical(c) for c in answered if is_named(c)}),
            "reasons": _reasons(names),
        },
        "verdicts": {
            **{c: _statuses(verdicts.filter(pc.equal(verdicts["condition"], c))) for c in CONDITIONS},
            "reasons": _reasons(verdicts),
        },
        "throughput": {table: _throughput(manifest) for table, manifest in asked.items()},
        "enough": enough.num_rows,
        "interval": detected.settings["interval"],
        "max_lost_share": detected.settings["max_lost_share"],
        "figures": figures,
        "nulls": {
            "permuted": {**_null(permuted), "permutations": detected.settings["permutations"]},
            "shuffled": {**_null(shuffled), "reading": _reading(shuffled)},
        },
        "quantiles": _quantiles(enough),
        "labels_named": _labels_named(enough, concepts),
        "per_class": [{**row, "enough_positives": row["n_positive"] >= min_positives} for row in per_class],
        "min_positives": min_positives,
        "best": _best(enough, concepts, neurons),
        "signatures": _signatures(figures),
    }


def _figures(
    enough: pa.Table, n_candidates: int, permuted: NullFigures, shuffled: NullFigures
) -> list[dict[str, Any]]:
    accuracy = _floats(enough, "balanced_accuracy")
    low, q = _floats(enough, "balanced_accuracy_low"), _floats(enough, "q")
    chance = chance_above(ACCURATE, _floats(enough, "n_positive"), _floats(enough, "n_negative"))
    n = enough.num_rows
    return [
        _figure("detection_accuracy", _mean(accuracy), n),
        _figure("detection_auroc", _mean(_floats(enough, "auroc")), _known(enough, "auroc")),
        {
            **_figure("above_70", int(above(accuracy, ACCURATE).sum()), n),
            "coin": float(chance.sum()),
            "permuted": permuted.count_above_70,
            "shuffled": shuffled.count_above_70 if shuffled.n_neurons else None,
            "n_shuffled": shuffled.n_neurons,
            "paper": PAPER_ACCURATE,
        },
        _figure("low_above_50", int(above(low, 0.5).sum()), n),
        # Each candidate is a test, whether it was named or not.
        _figure("fdr_10", int((q <= FDR).sum()), n_candidates),
    ]


def _figure(name: str, value: float | None, n: int) -> dict[str, Any]:
    return {"name": name, "value": value, "table": "detections", "split": "test", "n": n}


def _null(null: NullFigures) -> dict[str, Any]:
    """Figures in JSON: undefined ones are None."""
    told = {name: _defined(value) for name, value in null._asdict().items()}
    return {**told, "deciles": [_defined(decile) for decile in null.deciles], "table": "detections"}


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value


def _reading(null: NullFigures) -> str:
    """One sentence on how to read an accuracy where other neurons' descriptions are at `null`."""
    off = null.mean - 0.5
    if null.n_neurons < 2:
        return "Too few neurons were asked with another's description to say what such a description gives."
    if abs(off) <= 2 * null.se:
        return (
            "It lies at 50 % within two SE: no sign that another concept's description tells firing from "
            "silent images."
        )
    if off > 0:
        return (
            f"It lies {100 * off:.1f} points above 50 %: another concept's description, too, tells firing "
            "from silent images in part (findings that occur together, severity, acquisition): read an "
            "accuracy against this null, not against 50 %."
        )
    return (
        f"It lies {-100 * off:.1f} points below 50 %: another concept's description fits the silent images "
        "better (findings that exclude each other, neurons of normal images): read an accuracy against this "
        "null, not against 50 %."
    )


def _statuses(table: pa.Table) -> dict[str, int]:
    counts = {row["values"]: row["counts"] for row in pc.value_counts(table["status"]).to_pylist()}
    return {status: counts.get(status, 0) for status in STATUSES}


def _reasons(table: pa.Table) -> dict[str, int]:
    """The commonest reasons of what is not answered, with their counts, whichever image they are of."""
    lost = table.filter(pc.not_equal(table["status"], "answered"))
    kinds = pc.replace_substring_regex(lost["reason"], r"image \S+-[0-9a-f]{16}", "an image")
    counts = pc.value_counts(kinds).to_pylist()
    counts.sort(key=lambda c: (-c["counts"], str(c["values"])))
    return {str(c["values"]): c["counts"] for c in counts[:N_REASONS]}


def _throughput(manifest: Manifest) -> dict[str, Any] | None:
    """Of the last call that asked anything: what was on disk already cost nothing."""
    told = manifest.notes.get("throughput")
    if told is None:
        return None
    return {
        **told,
        "prompts_per_second": told["prompts"] / told["seconds"] if told["seconds"] else None,
        "cache_hit_rate": told["cached_tokens"] / told["prompt_tokens"] if told["prompt_tokens"] else None,
    }


def _quantiles(enough: pa.Table) -> list[dict[str, Any]]:
    """TPR by part of the activation range, lowest first, over all neurons' answers together."""
    n = np.array(enough["n_by_quantile"].to_pylist(), np.int64)
    share = np.array(enough["tpr_by_quantile"].to_pylist(), np.float64)
    if n.size == 0:
        return []
    yes, total = np.rint(np.nan_to_num(share) * n).sum(axis=0), n.sum(axis=0)
    low, high = wilson(yes, total)
    return [
        {"tpr": yes[i] / total[i], "low": low[i], "high": high[i], "n": int(total[i])}
        if total[i]
        else {"tpr": None, "low": None, "high": None, "n": 0}
        for i in range(len(total))
    ]


def _labels_named(enough: pa.Table, concepts: dict[int, str | None]) -> list[str]:
    """Labels that are some neuron's concept, with accuracy above 70 % and its lower bound above 50 %."""
    good = above(_floats(enough, "balanced_accuracy"), ACCURATE)
    good &= above(_floats(enough, "balanced_accuracy_low"), 0.5)
    neurons = enough["neuron"].filter(pa.array(good)).to_pylist()
    found = {canonical(concepts[neuron] or "") for neuron in neurons}
    return [label for label in LABELS if label in found]


def _best(enough: pa.Table, concepts: dict[int, str | None], neurons: pa.Table) -> list[dict[str, Any]]:
    """The neurons of highest lower bound of accuracy; r and AUROC are of the label chosen on validation."""
    keys = [("balanced_accuracy_low", "descending"), ("auroc", "descending"), ("neuron", "ascending")]
    best = enough.sort_by(keys).slice(0, N_BEST)
    measured = neurons.take(pc.index_in(best["neuron"], value_set=neurons["neuron"].combine_chunks()))
    rows = []
    for row, of in zip(best.to_pylist(), measured.to_pylist(), strict=True):
        label = of["valid_best_label"]
        accuracy = [f"balanced_accuracy{end}" for end in ("", "_low", "_high")]
        counts = ("n_positive", "n_negative", "n_unparsed", "n_failed", "p", "q")
        rows.append(
            {
                "neuron": row["neuron"],
                "concept": concepts[row["neuron"]],
                "label": label,
                "r": of.get(f"r_{label}"),
                **{f"auroc{end}": of.get(f"auroc_{label}{end}") for end in ("", "_low", "_high")},
                **{name: row[name] for name in (*accuracy, *counts)},
                "shuffled_balanced_accuracy": row["shuffled_balanced_accuracy"],
            }
        )
    return rows


def _signatures(figures: list[dict[str, Any]]) -> list[str]:
    mean = next(f["value"] for f in figures if f["name"] == "detection_accuracy")
    if mean is None or mean >= LOW_ACCURACY:
        return []
    return [
        f"The mean detection accuracy is {mean:.1%} (below 60 %): look at the prompt and at whether the "
        "activating images cohere."
    ]


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    return table[name].to_numpy().astype(np.float64)


def _known(table: pa.Table, name: str) -> int:
    return table.num_rows - table[name].null_count


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


# ------------------------------------------------------------------------------------------ printed form


def labelling_text(told: dict[str, Any]) -> str:
    """The labelling part of the summary, for a terminal."""
    named, figures = told["names"], {f["name"]: f for f in told["figures"]}
    candidates = told["candidates"]
    lines = [
        "",
        f"MedSAE labelling: {candidates['n_candidates']:,} of {candidates['n_neurons']:,} neurons are "
        f"candidates, {named['named']:,} named, {told['enough']:,} with enough answers",
    ]
    lines += [f"  left out {n:>6,}  {printable(reason, 90)}" for reason, n in candidates["left_out"].items()]
    if told["stand_ins"]:
        lines.append(
            f"STAND-IN MODELS ({', '.join(told['stand_ins'])}): these names and answers say nothing about "
            "MedCLIP or MedGEMMA."
        )
    lines += ["", f"{'prompts':<28}{'answered':>10}{'unparsed':>10}{'failed':>10}"]
    counts = {"names": named} | {f"verdicts, {c} description": told["verdicts"][c] for c in CONDITIONS}
    lines += [
        f"{what:<28}{of['answered']:>10,}{of['unparsed']:>10,}{of['failed']:>10,}"
        for what, of in counts.items()
    ]
    for of in (named, told["verdicts"]):
        lines += [f"  {n:>6,}  {printable(reason, 90)}" for reason, n in of["reasons"].items()]
    lines.append(
        f"{named['no_common_finding']:,} panels share no finding; the {named['named']:,} names are "
        f"{named['distinct_concepts']:,} different concepts."
    )
    lines += [_throughput_text(table, of) for table, of in told["throughput"].items()]
    lines += ["", *_counts_text(told, figures), "", *_nulls_text(told)]
    lines += ["", *_per_class_text(told), "", *_best_text(told)]
    lines += [f"Failure signature: {signature}" for signature in told["signatures"]]
    return "\n".join(lines)


def _throughput_text(table: str, of: dict[str, Any] | None) -> str:
    if of is None:
        return f"{table}: every reply was on disk, nothing was asked."
    rate, hits = of["prompts_per_second"], of["cache_hit_rate"]
    return (
        f"{table}: {of['prompts']:,} prompts in {of['seconds']:,.0f} s"
        + ("" if rate is None else f" ({rate:.1f} a second)")
        + f", {of['prompt_tokens']:,} prompt tokens"
        + ("" if hits is None else f" ({hits:.0%} from the prefix cache)")
        + f", {of['completion_tokens']:,} completion tokens"
    )


def _counts_text(told: dict[str, Any], figures: dict[str, dict[str, Any]]) -> list[str]:
    most, accuracy = figures["above_70"], figures["detection_accuracy"]
    head = ("ours", "n", "coin", "permuted", "shuffled", "paper")
    columns = (most["value"], most["n"], most["coin"], most["permuted"], most["shuffled"], most["paper"])
    lines = ["neurons whose detection accuracy".ljust(42) + "".join(f"{name:>10}" for name in head)]
    lines.append("is above 70 %".ljust(42) + "".join(f"{_count(value):>10}" for value in columns))
    for name, title in (
        ("low_above_50", "has its lower bound above 50 %"),
        ("fdr_10", f"is above chance at FDR {FDR:.0%} (q)"),
    ):
        figure = figures[name]
        lines.append(f"{title:<42}{figure['value']:>10,}{figure['n']:>10,}")
    lines += [
        f"The paper's {PAPER_ACCURATE} are of 8,192 neurons: of so many, fair coins at 20 + 20 answers put "
        f"{8192 * float(chance_above(ACCURATE, np.array([20]), np.array([20]))[0]):.0f} above 70 %.",
        "Beside it, what chance alone puts above 70 %: a fair coin's answers, permuted expectations, another "
        "neuron's",
        f"description (asked of {most['n_shuffled']:,}). Mean detection accuracy "
        f"{_percent(accuracy['value'])}, AUROC of P(yes) {_decimal(figures['detection_auroc']['value'])}.",
        f"Intervals: {told['interval']}, MOVER. A neuron that lost over {told['max_lost_share']:.0%} of "
        "either side's replies is not counted.",
    ]
    if told["quantiles"]:
        shares = " ".join(f"{_percent(part['tpr'])} ({part['n']:,})" for part in told["quantiles"])
        lines.append(f"Answered yes where it fires, by activation, weakest first (n): {shares}")
    return lines


def _nulls_text(told: dict[str, Any]) -> list[str]:
    permuted, shuffled = told["nulls"]["permuted"], told["nulls"]["shuffled"]
    return [
        f"Permuted null: mean {_percent(permuted['mean'], 2)} ± {_percent(permuted['se'], 2)} SE "
        f"({permuted['permutations']:,} permutations, {permuted['n_neurons']:,} neurons)",
        f"Shuffled null: mean {_percent(shuffled['mean'], 2)} ± {_percent(shuffled['se'], 2)} SE "
        f"({shuffled['n_neurons']:,} neurons), deciles "
        + " ".join(_percent(decile, 0) for decile in shuffled["deciles"]),
        f"  {shuffled['reading']}",
    ]


def _per_class_text(told: dict[str, Any]) -> list[str]:
    lines = [
        "For each label, of the neurons named above 70 %, the one of largest r on validation, told on test:",
        f"{'label':<28}{'neuron':>7}  {'concept':<28}{'AUROC':>6}  {'95 % interval':<13}{'positives':>10}"
        f"{'detection':>11}",
    ]
    for row in told["per_class"]:
        if row["neuron"] is None:
            lines.append(f"{row['label']:<28}{'-':>7}  {'-':<28}{'-':>6}  {'-':<13}{row['n_positive']:>10,}")
            continue
        few = "" if row["enough_positives"] else " few"
        lines.append(
            f"{row['label']:<28}{row['neuron']:>7}  {printable(row['concept'], 26):<28}"
            f"{_decimal(row['auroc']):>6}  {_interval(row['auroc_low'], row['auroc_high']):<13}"
            f"{row['n_positive']:>10,}{_percent(row['balanced_accuracy']):>11}"
            + (" *" if row["is_label"] else "")
            + few
        )
    lines.append(
        f"* its concept is that label; few: below {told['min_positives']} positives, no claim.\n"
        f"{len(told['labels_named'])} of {len(LABELS)} labels are the concept of a neuron above 70 % whose "
        "lower bound is above 50 %."
    )
    return lines


def _best_text(told: dict[str, Any]) -> list[str]:
    lines = [
        f"The {len(told['best'])} best-validated neurons, by the lower bound of their detection accuracy:",
        f"{'neuron':>7}  {'concept':<28}{'best label':<28}{'r':>6}{'AUROC':>8}{'detection':>11}"
        "  95 % interval",
    ]
    lines += [
        f"{row['neuron']:>7}  {printable(row['concept'], 26):<28}{row['label'] or '-':<28}"
        f"{_decimal(row['r'], 2):>6}{_decimal(row['auroc']):>8}{_percent(row['balanced_accuracy']):>11}  "
        f"{_percent(row['balanced_accuracy_low'])} - {_percent(row['balanced_accuracy_high'])}"
        for row in told["best"]
    ]
    return lines


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _decimal(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.3f}-{high:.3f}"
