"""`medsae diagnose RUN`: which failure signatures a run meets, what to change, and the next sweep.

Reads manifests, `summary.json` and `sae/history`; computes no figure that they hold. What two generations
of tables would tell together is not told: a stale summary is left aside.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from medsae_ray.config import BY_RANK, FitSettings, MeasureSettings
from medsae_ray.controls_summary import FIGURES, NAMES
from medsae_ray.errors import InputError
from medsae_ray.labelling_summary import LOW_ACCURACY
from medsae_ray.measure import EntropyMean, failure_signatures
from medsae_ray.run import Manifest, Run
from medsae_ray.status import half_done

INTERPRETABLE_L0 = 64
"""Neurons an image above which nobody reads them all; architectures are compared below it."""
RISE = 0.05
"""Share of the neurons that die between the first and the last evaluation, from which it is told."""
STILL_RISING = 0.002
"""FVE gained by the last evaluation, from which training had not ended."""
STILL_FALLING = 0.005
"""Selection score (nats) gained by the last evaluation, from which training had not ended."""
WITHOUT = {"learning_rate_warmup": 0.0, "learning_rate_decay": 0.0}
"""What training did before these settings were there: their defaults are no longer that."""

TABLES = {
    "radiographs": "radiographs",
    "embed": "embeddings",
    "fit": "sae",
    "encode": "activations",
    "measure": "neurons",
    "controls": "controls",
    "panels": "panels",
    "atlas": "atlas",
    "localise": "maps",
    "name": "names",
    "detect": "detections",
    "report": "report",
}
"""The table that says that a stage is done."""
UNJUDGED = {
    "fit": "dead neurons, FVE, L0 and the course of training",
    "measure": "the test split's figures, the entropy's noise floor and the labels' positives",
    "controls": "whether the SAE's figures are better than those of units that learned nothing",
    "detect": "the detection accuracy of the names",
}


class Signature(NamedTuple):
    """A failure that the run shows."""

    kind: str
    finding: str
    """What is met, with its figures."""
    remedy: str
    """What to change, by the names of the settings and with their present values."""


class Sweep(NamedTuple):
    """A sweep around the run's SAE, to where the signatures point."""

    command: str
    """A command line for a POSIX shell."""
    n_trials: int
    changed: list[str]
    """Settings in which all its trials differ from the run's SAE."""


@dataclass(frozen=True)
class Diagnosis:
    """What a run shows."""

    run: str
    facts: list[str]
    """A sentence each: the SAE, its figures and of which split they are."""
    signatures: list[Signature]
    missing: dict[str, str]
    """Stage that has not run → what cannot be judged without it."""
    sweep: Sweep | None
    """The next one; None where there are no embeddings."""


class _Figures(NamedTuple):
    """What the signatures are judged by; NaN where it is not known."""

    where: str
    fve: float
    l0: float
    dead: float
    entropy: EntropyMean


class _History(NamedTuple):
    """The evaluations on validation, in their order."""

    epoch: list[int]
    fve: np.ndarray
    dead: np.ndarray
    selection: np.ndarray

    @property
    def chosen(self) -> int:
        return int(np.argmin(np.where(np.isnan(self.selection), np.inf, self.selection)))


def describe(uri: str) -> str:
    """The diagnosis of the run at `uri`, for a terminal. Raises InputError where none can be read there."""
    return as_text(diagnose(Run(uri)))


def diagnose(run: Run) -> Diagnosis:
    """Which failure signatures a run meets, from what it has.

    Raises InputError where the folder holds no run, or a manifest or `summary.json` that is not whole.
    """
    made = _manifests(run)
    fitted = made.get("sae")
    stale = {table: inputs for table in made if (inputs := run.stale_inputs(table))}
    summary = _summary(run) if "neurons" in made and "neurons" not in stale else None
    labelling = (summary or {}).get("labelling") if run.is_fresh("detections") else None

    facts = [_data_fact(made)]
    signatures = _stale_signatures(run, made, stale)
    settings = FitSettings()
    if fitted is not None:
        settings, history = _fit_settings(fitted), _history(run)
        figures = _figures(summary, fitted)
        facts += [_sae_fact(fitted, settings), _figures_fact(figures, summary)]
        signatures += _known_failures(figures, summary, settings)
        signatures += _training_signatures(history, settings)
        signatures += _sparsity_signatures(figures, settings, fitted)
    if summary is not None:
        signatures += _baseline_signatures(summary, run.is_fresh("controls"))
        signatures += _positives_signatures(summary, made)
    if labelling is not None:
        signatures += _detection_signatures(labelling, made)
    signatures += _stand_in_signatures(made)

    done = {stage for stage, table in TABLES.items() if table in made and table not in stale}
    missing = {stage: UNJUDGED.get(stage, "") for stage in TABLES if stage not in done}
    kinds = {signature.kind for signature in signatures}
    sweep = _sweep(run.uri, settings, fitted, kinds) if "embeddings" in made else None
    return Diagnosis(run.uri, facts, signatures, missing, sweep)


# --------------------------------------------------------------------------------------------- reading


def _manifests(run: Run) -> dict[str, Manifest]:
    try:
        found = {m.table: m for m in run.manifests()}
    except (ValueError, TypeError) as error:
        raise InputError(
            f"A manifest in {run.uri} cannot be read ({error}): delete that table's folder and run its stage "
            "again."
        ) from None
    if not found:
        raise InputError(
            f"The folder {run.uri} holds no run: start one with `medsae pipeline --run {run.uri}`."
        )
    return found


def _summary(run: Run) -> dict[str, Any] | None:
    try:
        return json.loads(run.read_bytes("summary.json"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise InputError(
            f"The summary.json of {run.uri} is not JSON: run `medsae measure --run {run.uri}`, which writes "
            "it anew."
        ) from None


def _fit_settings(fitted: Manifest) -> FitSettings:
    known = {f.name for f in dataclasses.fields(FitSettings)}
    told = {name: value for name, value in fitted.settings.items() if name in known}
    return FitSettings(**{**WITHOUT, **told})


def _history(run: Run) -> _History:
    table = run.read("sae", columns=["epoch", "step", "split", "fve", "dead", "selection"])
    rows = [row for row in table.sort_by("step").to_pylist() if row["split"] == "valid"]
    columns = {
        name: np.array([row[name] for row in rows], np.float64) for name in ("fve", "dead", "selection")
    }
    return _History([row["epoch"] for row in rows], **columns)


def _value(summary: dict[str, Any], name: str) -> float:
    """A figure of the summary by its name; NaN where it is undefined or not there."""
    found = next((f["value"] for f in summary["figures"] if f["name"] == name), None)
    return math.nan if found is None else found


def _figures(summary: dict[str, Any] | None, fitted: Manifest) -> _Figures:
    """Of the test split once it is measured, else of the chosen checkpoint on validation."""
    if summary is None:
        of = {**dict.fromkeys(("fve", "l0", "dead", "entropy")), **(fitted.notes.get("chosen") or {})}
        fve, l0, dead, entropy = (
            math.nan if of[name] is None else of[name] for name in ("fve", "l0", "dead", "entropy")
        )
        return _Figures("validation", fve, l0, dead, EntropyMean(0, entropy, math.nan, math.nan))
    entropies = [_value(summary, f"entropy_{kind}living_neurons") for kind in ("", "floor_", "relative_")]
    fve, l0, dead = (_value(summary, name) for name in ("fve", "l0", "dead"))
    return _Figures("test", fve, l0, dead, EntropyMean(0, *entropies))


# ------------------------------------------------------------------------------------------ signatures


def _stale_signatures(run: Run, made: dict[str, Manifest], stale: dict[str, list[str]]) -> list[Signature]:
    found = []
    if stale:
        told = ", ".join(f"{table} ({' and '.join(inputs)} changed)" for table, inputs in stale.items())
        stages = [made[table].stage for table in stale]
        order = [s for s in TABLES if s in stages] + sorted({s for s in stages if s not in TABLES})
        again = " and ".join(f"`medsae {stage} --overwrite`" for stage in order)
        found.append(
            Signature("stale", f"Made from inputs that were made again since: {told}", f"run {again} on it")
        )
    if half := half_done(run):
        found.append(
            Signature(
                "half_done", f"Begun and not finished: {', '.join(half)}", "run its stage again to resume"
            )
        )
    return found


def _known_failures(
    figures: _Figures, summary: dict[str, Any] | None, settings: FitSettings
) -> list[Signature]:
    failures = failure_signatures(
        fve=figures.fve,
        dead_share=figures.dead,
        entropy=figures.entropy,
        # Without a summary there is no floor, and the embeddings are not asked for.
        embedding={} if summary is None else summary["embedding"],
    )
    dead = [
        _less_sparse(settings),
        f"raise fit.learning_rate (now {settings.learning_rate:g})",
        *_revive(settings),
    ]
    remedies = {
        "dead": ", or ".join(dead),
        "fve": f"raise fit.expansion (now {settings.expansion}), or {_less_sparse(settings)}",
    }
    found = []
    for failure in failures:
        finding, remedy = failure.finding, remedies.get(failure.kind, failure.remedy)
        if failure.kind == "entropy":
            remedy += (
                f": they come from embed.encoder and embed.weights, their scale from fit.normalisation (now "
                f"{settings.normalisation})"
            )
        else:
            finding += f" on the {figures.where} split"
            if failure.kind == "dead" and summary is not None:
                finding += f", {_value(summary, 'dead_train'):.0%} on the training split"
        found.append(Signature(failure.kind, finding, remedy))
    return found


def _training_signatures(history: _History, settings: FitSettings) -> list[Signature]:
    n = len(history.epoch)
    if n == 0:
        return []
    found, chosen, last = [], history.chosen, n - 1
    gain = history.fve[last] - history.fve[last - 1] if n > 1 else math.nan
    if not np.nanmax(history.fve, initial=-np.inf) > settings.fve_floor:
        best = int(np.argmax(np.nan_to_num(history.fve, nan=-np.inf)))
        finding = (
            f"No checkpoint exceeds FVE {settings.fve_floor:g} on validation (highest "
            f"{history.fve[best]:.3f}, epoch {history.epoch[best]})"
        )
        if gain > STILL_RISING:
            found.append(
                Signature(
                    "undertrained",
                    f"{finding}, and it is still rising (by {gain:.3f} at the last evaluation)",
                    f"raise fit.epochs (now {settings.epochs}) or fit.learning_rate (now "
                    f"{settings.learning_rate:g})",
                )
            )
        else:
            found.append(
                Signature(
                    "floor",
                    f"{finding}, and it no longer rises",
                    f"raise fit.expansion (now {settings.expansion}), or {_less_sparse(settings)}: more "
                    "epochs will not help",
                )
            )
    rise = history.dead[last] - history.dead[0]
    if rise > RISE:
        found.append(
            Signature(
                "dying",
                f"Neurons die during training: {history.dead[0]:.1%} on validation at epoch "
                f"{history.epoch[0]}, {history.dead[last]:.1%} at epoch {history.epoch[last]}",
                ", or ".join(_revive(settings) or [_less_sparse(settings)]),
            )
        )
    if n > 1 and chosen == 0 and np.isfinite(history.selection[0]):
        found.append(
            Signature(
                "first",
                f"The chosen checkpoint is the first of {n} evaluations (epoch {history.epoch[0]}): its "
                f"score was {history.selection[0]:.3f}, the last {history.selection[last]:.3f} (lower is "
                "better)",
                f"evaluate more often (fit.evaluate_every, now {settings.evaluate_every}) or lower "
                f"fit.learning_rate (now {settings.learning_rate:g})",
            )
        )
    improved = np.nanmin(history.selection[:last], initial=np.inf) - history.selection[last]
    if n > 1 and chosen == last and STILL_FALLING < improved < np.inf:
        found.append(
            Signature(
                "last",
                f"The chosen checkpoint is the last of {n} evaluations (epoch {history.epoch[last]}), and "
                f"its score was still falling (by {improved:.3f}, to {history.selection[last]:.3f})",
                f"train longer: raise fit.epochs (now {settings.epochs})",
            )
        )
    return found


def _sparsity_signatures(figures: _Figures, settings: FitSettings, fitted: Manifest) -> list[Signature]:
    if not figures.l0 > INTERPRETABLE_L0:
        return []
    share = ""
    if n_neurons := fitted.notes.get("n_neurons"):
        share = f", {figures.l0 / n_neurons:.0%} of all"
    remedy = (
        f"lower fit.l0 (now {settings.strength[1]})"
        if _has_l0(settings)
        else f"raise fit.sparsity (now {settings.sparsity:g})"
    )
    return [
        Signature(
            "l0",
            f"{figures.l0:.0f} neurons fire on an image of the {figures.where} split{share} (above "
            f"{INTERPRETABLE_L0}: too many to read)",
            remedy,
        )
    ]


def _baseline_signatures(summary: dict[str, Any], controlled: bool) -> list[Signature]:
    """The SAE beside units that learned nothing; before `controls` has run, beside the raw dimensions."""
    remedy = (
        "claim no more than they give; change what decides how many neurons fire (fit.sparsity, fit.l0), "
        "fit.expansion or fit.architecture"
    )
    if controlled and "controls" in summary:
        told = summary["controls"]
        of = {figures["kind"]: figures for figures in told["kinds"]}
        lost = [
            f"in {FIGURES[name][0]} (SAE {_shown(of['sae'][name])}): "
            + ", ".join(f"{NAMES[kind]} ({_shown(of[kind][name])})" for kind in kinds)
            for name, kinds in told["not_beaten"].items()
            if kinds
        ]
        finding = f"What learned nothing is as good as the SAE or better: {'; '.join(lost)}"
        return [Signature("controls", finding, remedy)] if lost else []
    ours, raw = (_value(summary, f"entropy_living_{of}") for of in ("neurons", "dimensions"))
    if not ours >= raw:
        return []
    finding = (
        f"The living neurons' mean entropy {ours:.3f} is not below that of the raw dimensions ({raw:.3f})"
    )
    return [Signature("raw", finding, remedy)]


def _positives_signatures(summary: dict[str, Any], made: dict[str, Manifest]) -> list[Signature]:
    few = [row for row in summary["labels"] if not row["enough_positives"]]
    if not few:
        return []
    needed = made["neurons"].notes["min_positives"]
    listed = made["radiographs"].settings
    size = "phantom_images" if listed["dataset"] == "phantom" else "limit" if listed["limit"] else None
    more = "take a larger data set" if size is None else f"raise radiographs.{size} (now {listed[size]})"
    fractions = [
        f"radiographs.{name} (now {listed[name]:g})" for name in ("train_fraction", "valid_fraction")
    ]
    told = ", ".join(f"{row['label']} {row['n_positive']}" for row in few)
    return [
        Signature(
            "positives",
            f"{len(few)} of {len(summary['labels'])} labels have fewer than {needed} positives in the test "
            f"split, too few for a claim: {told}",
            f"{more}, or leave more to the test split: lower {' or '.join(fractions)}",
        )
    ]


def _detection_signatures(labelling: dict[str, Any], made: dict[str, Manifest]) -> list[Signature]:
    accuracy = next(f for f in labelling["figures"] if f["name"] == "detection_accuracy")
    if accuracy["value"] is None or accuracy["value"] >= LOW_ACCURACY:
        return []
    null, counts = labelling["nulls"]["shuffled"]["mean"], labelling["verdicts"]["true"]
    beside = "" if null is None else f"; with other neurons' descriptions {null:.1%}"
    asked = sum(counts.values())
    panels = made["panels"].settings if "panels" in made else {}
    now = {name: panels.get(name) for name in ("name_images", "name_from", "min_patients")}
    told = ", ".join(f"panels.{name} (now {value})" for name, value in now.items())
    return [
        Signature(
            "detection",
            f"The mean detection accuracy of {accuracy['n']} neurons is {accuracy['value']:.1%} (below "
            f"{LOW_ACCURACY:.0%}){beside}; {counts['answered']:,} of {asked:,} prompts were answered",
            f"look at the prompts (name.template, detect.template) and at whether the images of a panel "
            f"cohere ({told})",
        )
    ]


def _stand_in_signatures(made: dict[str, Manifest]) -> list[Signature]:
    names = sorted({name for manifest in made.values() for name in manifest.stand_ins})
    if not names:
        return []
    remedies = {
        "encoder": "embed.encoder medclip-resnet50 with embed.weights (`medsae weights` says where they are)",
        "model": "medgemma.model",
    }
    told = [remedy for kind, remedy in remedies.items() if any(name.startswith(kind) for name in names)]
    return [
        Signature(
            "stand_ins",
            f"Stand-in models were used ({', '.join(names)}): the figures say nothing about MedCLIP or "
            "MedGEMMA",
            f"set {' and '.join(told)}" if told else "use the real models",
        )
    ]


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


# -------------------------------------------------------------------------------------------- settings


def _has_l0(settings: FitSettings) -> bool:
    """Whether `fit.l0`, not λ, decides how many neurons fire."""
    return settings.strength[0] == "l0"


def _less_sparse(settings: FitSettings) -> str:
    if _has_l0(settings):
        return f"raise fit.l0 (now {settings.strength[1]})"
    return f"lower fit.sparsity (now {settings.sparsity:g})"


def _revive(settings: FitSettings) -> list[str]:
    """What is left to try for dead neurons."""
    found = []
    if settings.architecture in BY_RANK:
        found.append(f"raise fit.auxk (now {settings.auxk:g})")
    else:
        found.append(f"raise fit.sparsity_warmup (now {settings.sparsity_warmup:g})")
    if settings.resample_every == 0:
        found.append("set fit.resample_every (now 0: never), which starts dead neurons anew")
    return found


# ----------------------------------------------------------------------------------------------- sweep


def _sweep(uri: str, settings: FitSettings, fitted: Manifest | None, kinds: set[str]) -> Sweep:
    """Around this run, to where the signatures point; three seeds where they point nowhere."""
    searched, n_values = _sparsities(settings, bool(kinds & {"dead", "fve", "floor"}), "l0" in kinds)
    others: dict[str, list[Any]] = {}
    slow, fast = bool(kinds & {"dead", "undertrained"}), "first" in kinds
    if slow or fast:
        factors = (0.3, 1, 3) if slow and fast else (1, 3, 10) if slow else (0.1, 0.3, 1)
        others["learning_rate"] = _around(settings.learning_rate, factors)
    if kinds & {"fve", "floor"}:
        others["expansion"] = [settings.expansion, 2 * settings.expansion]
    if not kinds & {"dead", "undertrained", "first", "fve", "floor", "l0"}:
        others["seeds"] = [settings.seed + i for i in range(3)]

    changed: dict[str, Any] = {}
    if kinds & {"undertrained", "last"}:
        changed["epochs"] = 2 * settings.epochs
    if "first" in kinds and settings.evaluate_every > 1:
        changed["evaluate_every"] = settings.evaluate_every // 2
    if kinds & {"dead", "dying"}:
        if settings.architecture in BY_RANK and settings.auxk == 0:
            changed["auxk"] = FitSettings.auxk
        elif settings.resample_every == 0:
            changed["resample_every"] = float(max(1, round(settings.epochs / 10)))
    words = ["medsae", "sweep", "--run", uri]
    for name, value in _flags(dataclasses.replace(settings, **changed), fitted).items():
        words += [f"--{name}", str(value)]
    for name, values in {**searched, **others}.items():
        words += [f"--sweep.{name}", json.dumps(values)]
    told = [f"fit.{name} {value} (now {getattr(settings, name)})" for name, value in changed.items()]
    return Sweep(shlex.join(words), n_values * math.prod(map(len, others.values())), told)


def _sparsities(settings: FitSettings, too_sparse: bool, too_dense: bool) -> tuple[dict[str, list[Any]], int]:
    """Values of λ or `l0` to search, and how many they are. Where both too few and too many neurons fire,
    BatchTopK besides an architecture with a penalty, which cannot mend both."""
    if _has_l0(settings):
        factors = (0.25, 1, 4) if too_sparse == too_dense else (1, 2, 4) if too_sparse else (0.25, 0.5, 1)
        l0 = sorted({max(1, round(settings.strength[1] * factor)) for factor in factors})
        return {"l0": l0}, len(l0)
    wide, around = (0.1, 1, 10), (0.3, 1, 3)
    one_way = (0.1, 0.3, 1) if too_sparse else (1, 3, 10)
    factors = one_way if too_sparse != too_dense else wide if too_sparse else around
    sparsity = _around(settings.sparsity or FitSettings.sparsity, factors)
    # JumpReLU would take `l0` as a target, and BatchTopK has no norm-weighted penalty.
    alone = settings.architecture == "jumprelu" or settings.decoder_norm != "unit"
    if not (too_sparse and too_dense) or alone:
        return {"sparsity": sparsity}, len(sparsity)
    architectures = [settings.architecture, "batchtopk"]
    l0 = [INTERPRETABLE_L0 // 4, INTERPRETABLE_L0 // 2, INTERPRETABLE_L0]
    return {"architecture": architectures, "sparsity": sparsity, "l0": l0}, len(sparsity) + len(l0)


def _around(value: float, factors: tuple[float, ...]) -> list[float]:
    return [float(f"{value * factor:.3g}") for factor in factors]


def _flags(settings: FitSettings, fitted: Manifest | None) -> dict[str, Any]:
    """What makes another `fit` this one: the settings that are not the defaults."""
    defaults, policy = FitSettings(), MeasureSettings()
    told = {
        f"fit.{f.name}": getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if not f.metadata.get("resource") and getattr(settings, f.name) != getattr(defaults, f.name)
    }
    for name in ("uncertain", "blank"):
        value = fitted.settings.get(name) if fitted else None
        if value is not None and value != getattr(policy, name):
            told[f"measure.{name}"] = value
    return told


# -------------------------------------------------------------------------------------------- printing


def _data_fact(made: dict[str, Manifest]) -> str:
    told = []
    if listed := made.get("radiographs"):
        splits = listed.notes.get("splits", {})
        shares = ", ".join(
            f"{splits[name]:,} {name}" for name in ("train", "valid", "test") if name in splits
        )
        told.append(f"{listed.rows_out:,} radiographs ({listed.notes.get('dataset')}: {shares})")
        if listed.quarantined:
            told.append(f"{listed.quarantined:,} refused")
    if embedded := made.get("embeddings"):
        told.append(f"{embedded.rows_out:,} embedded by {embedded.notes.get('encoder')}")
        if embedded.quarantined:
            told.append(f"{embedded.quarantined:,} quarantined")
    synthetic = listed is not None and listed.notes.get("dataset") == "phantom"
    end = ". Synthetic: its figures say nothing about patients." if synthetic else "."
    return f"Data: {', '.join(told)}{end}"


def _sae_fact(fitted: Manifest, settings: FitSettings) -> str:
    knob = f"l0 {settings.strength[1]}" if _has_l0(settings) else f"λ {settings.sparsity:g}"
    chosen = (fitted.notes.get("chosen") or {}).get("epoch")
    n_neurons = fitted.notes.get("n_neurons")
    return (
        f"SAE: {settings.architecture}, "
        + (f"{n_neurons:,} neurons, " if n_neurons else "")
        + f"expansion {settings.expansion}, {knob}, learning rate {settings.learning_rate:g}, "
        f"{settings.normalisation} normalisation; "
        + (f"checkpoint of epoch {chosen} of {settings.epochs}." if chosen else f"{settings.epochs} epochs.")
    )


def _figures_fact(figures: _Figures, summary: dict[str, Any] | None) -> str:
    h = figures.entropy
    told = [f"FVE {figures.fve:.3f}", f"L0 {figures.l0:.1f}", f"dead {figures.dead:.1%}"]
    if summary is None:
        told.append(f"entropy {h.entropy:.3f}")
        where = "validation split, chosen checkpoint"
    else:
        told[-1] += f" (training split {_value(summary, 'dead_train'):.1%})"
        raw = _value(summary, "entropy_living_dimensions")
        told.append(
            f"entropy {h.entropy:.3f} of living neurons, {h.floor:.3f} of permuted labels, {raw:.3f} of raw "
            "dimensions"
        )
        where = f"test split, {summary['images']['test']:,} images"
    return f"Figures ({where}): {', '.join(told)}."


def as_text(diagnosis: Diagnosis) -> str:
    """The diagnosis for a terminal."""
    lines = [f"Diagnosis of {diagnosis.run}", *diagnosis.facts, ""]
    n = len(diagnosis.signatures)
    lines.append(
        f"{n} failure signature{'' if n == 1 else 's'} met:" if n else "No failure signature is met."
    )
    for i, signature in enumerate(diagnosis.signatures, 1):
        lines += [f"{i:>2}. {signature.finding}.", f"    → {signature.remedy}."]
    if diagnosis.missing:
        unjudged = [what for what in diagnosis.missing.values() if what]
        lines += ["", f"Not done, or stale: {', '.join(diagnosis.missing)}."]
        if unjudged:
            lines.append(f"So this is not judged: {'; '.join(unjudged)}.")
        lines.append(f"`medsae pipeline --run {diagnosis.run}` with the run's settings goes on from here.")
    if (sweep := diagnosis.sweep) is not None:
        but = f", with {', '.join(sweep.changed)}" if sweep.changed else ""
        lines += [
            "",
            f"Next sweep, around this run's settings{but} ({sweep.n_trials} trials):",
            sweep.command,
        ]
    return "\n".join(lines)
