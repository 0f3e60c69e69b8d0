"""Each failure signature once met and once not, on small run folders written as the stages write them."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_labelling_summary import labelled_run

from medsae_ray.cli import main, parse_settings
from medsae_ray.config import FitSettings, RadiographsSettings, Settings, fingerprinted
from medsae_ray.controls import CONTROLS, controls_table
from medsae_ray.diagnose import Diagnosis, Signature, describe, diagnose
from medsae_ray.errors import InputError
from medsae_ray.labelling_summary import labelling
from medsae_ray.labels import LABELS
from medsae_ray.measure import Activations, UnitMeasures, chosen_neurons, measure_units, neurons_table
from medsae_ray.pipeline import STAGES
from medsae_ray.run import MANIFEST, Plan, Run
from medsae_ray.sae.trials import trials
from medsae_ray.summary import write_summary

N, UNITS = 160, 28
CURVE = [(10, 0.90, 0.02, 10.1), (20, 0.97, 0.02, 2.10), (30, 0.975, 0.03, 2.00), (40, 0.976, 0.03, 2.001)]
"""Epoch, FVE, dead share and selection score of a training that went well."""


def commit(run: Run, stage: str, table: str, content: pa.Table | None, **told: Any) -> None:
    plan = Plan(stage, table, told.get("settings", {}), told.get("inputs", {}))
    staging = run.restage(plan)
    if content is not None:
        name = "history/part-00000.parquet" if table == "sae" else "part-00000.parquet"
        staging.write_table(content, name)
    rows = told.get("rows", 0)
    staging.commit(
        rows_in=rows, rows_out=rows, notes=told.get("notes"), stand_ins=told.get("stand_ins") or []
    )


def fingerprint(run: Run, *tables: str) -> dict[str, str]:
    return {table: run.manifest(table).fingerprint for table in tables}


def history(curve: list[tuple[int, float, float, float]]) -> pa.Table:
    rows = []
    for epoch, fve, dead, selection in curve:
        rows.append({"epoch": epoch, "step": 20 * epoch, "split": "train", "loss": 1 / epoch})
        rows.append(
            {"epoch": epoch, "step": 20 * epoch, "split": "valid", "fve": fve, "dead": dead, "l0": 40.0,
             "entropy": 2.0, "selection": selection}
        )  # fmt: skip
    names = {name: None for row in rows for name in row}
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def units(pure: bool, share: float, seed: int) -> UnitMeasures:
    """`UNITS` units, each answering to one label in turn, or to none."""
    rng = np.random.default_rng(seed)
    y = (rng.random((N, len(LABELS))) < share).astype(float)
    values = rng.random((N, UNITS)) * (rng.random((N, UNITS)) < 0.5)
    if pure:
        values = y[:, np.arange(UNITS) % len(LABELS)] * rng.uniform(0.8, 1.0, (N, UNITS))
    ids = pa.array([f"i{i:04d}" for i in range(N)])
    known = np.ones_like(y, bool)
    return measure_units(Activations(ids, values.astype(np.float32)), y, known, np.arange(N), permutations=3)


def prepared(folder: Path, stand_ins: list[str] | None = None, **radiographs: Any) -> Run:
    """A run with radiographs and embeddings."""
    run = Run(str(folder))
    listed = fingerprinted(RadiographsSettings(**{"dataset": "chexpert", **radiographs}))
    splits = {"train": 1280, "valid": N, "test": N}
    commit(
        run, "radiographs", "radiographs", None, settings=listed, rows=1600,
        notes={"splits": splits, "dataset": listed["dataset"]},
    )  # fmt: skip
    commit(
        run, "embed", "embeddings", None, inputs=fingerprint(run, "radiographs"), rows=1600,
        notes={"encoder": "medclip-resnet50", "weights_sha256": "0", "embedding_dim": 64, "reasons": {}},
        stand_ins=stand_ins,
    )  # fmt: skip
    return run


def fitted(run: Run, curve: Any = CURVE, settings: dict[str, Any] | None = None, **fit: Any) -> Run:
    """The run with an SAE; `settings` replace those of the manifest altogether."""
    told = fingerprinted(FitSettings(**{"sparsity": 0.01, "learning_rate": 1e-3, "epochs": 40, **fit}))
    rows = [row for row in history(curve).to_pylist() if row["split"] == "valid"]
    chosen = min(rows, key=lambda row: row["selection"])
    notes = {
        "chosen": chosen,
        "fve_floor_reached": chosen["fve"] > 0.95,
        "n_neurons": 1024,
        "normaliser": {"convention": "unit", "k": 1.0},
    }
    told = {**told, "uncertain": "ignore", "blank": "negative"} if settings is None else settings
    commit(
        run, "fit", "sae", history(curve), settings=told, notes=notes,
        inputs=fingerprint(run, "embeddings", "radiographs"),
    )  # fmt: skip
    return run


def measured(
    run: Run,
    *,
    fve: float = 0.97,
    dead: float = 0.05,
    l0: float = 40.0,
    pure: bool = True,
    raw_pure: bool = False,
    share: float = 0.5,
) -> Run:
    """The run with neurons, dimensions and a summary written by `summary.py` itself."""
    of = {split: units(pure, share, seed) for seed, split in enumerate(("test", "valid"))}
    raw = {split: units(raw_pure, share, seed + 9) for seed, split in enumerate(("test", "valid"))}
    counts = {"n_images": N, "n_patients": N}
    positives = dict(zip(LABELS, of["test"].n_positive.tolist(), strict=True))
    notes = {
        "policy": {"uncertain": "ignore", "blank": "negative"},
        "test": {**counts, "fve": fve, "l0": l0, "dead": dead, "n_positive": positives},
        "valid": {**counts, "fve": fve, "l0": l0, "dead": dead, "n_positive": positives},
        "train": {"n_images": 1280, "dead": dead / 2},
        "min_positives": 50,
        "min_firing": 5,
        "chosen": {
            name: chosen_neurons(two["test"], two["valid"], min_firing=5).to_pylist()
            for name, two in (("neurons", of), ("dimensions", raw))
        },
        "embedding": {
            "mean_norm": 3.25,
            "variance_mean": 0.002,
            "variance_min": 0.001,
            "variance_max": 0.004,
            "non_finite_share": 0.0,
            "effective_dimension": 6.96,
        },
    }
    inputs = fingerprint(run, "embeddings", "radiographs", "sae")
    commit(run, "encode", "activations", None, inputs=inputs)
    inputs = fingerprint(run, "activations", "embeddings", "radiographs", "sae")
    commit(run, "measure", "dimensions", neurons_table(raw["test"], raw["valid"]), inputs=inputs)
    commit(
        run, "measure", "neurons", neurons_table(of["test"], of["valid"]), inputs=inputs, notes=notes
    )  # fmt: skip
    write_summary(run)
    return run


def whole(folder: Path, **figures: Any) -> Run:
    return measured(fitted(prepared(folder)), **figures)


def found(run: Run) -> dict[str, Signature]:
    return {signature.kind: signature for signature in diagnose(run).signatures}


def swept(diagnosis: Diagnosis) -> Settings:
    """The settings of the offered command line, read as the command reads them."""
    assert diagnosis.sweep is not None
    program, command, *rest = shlex.split(diagnosis.sweep.command)
    assert (program, command) == ("medsae", "sweep")
    return parse_settings("sweep", rest)


def test_a_sound_run_meets_none_and_is_swept_over_seeds(tmp_path: Path) -> None:
    diagnosis = diagnose(whole(tmp_path))
    assert diagnosis.signatures == []
    sweep = swept(diagnosis).sweep
    assert (sweep.seeds, sweep.sparsity, sweep.learning_rate) == ([0, 1, 2], [0.003, 0.01, 0.03], [])
    assert list(diagnosis.missing) == ["controls", "panels", "atlas", "localise", "name", "detect", "report"]
    text = describe(str(tmp_path))
    assert "No failure signature is met." in text
    assert "FVE 0.970" in text
    assert "L0 40.0" in text
    assert "dead 5.0% (training split 2.5%)" in text


# ------------------------------------------------------------------------------------ one by one


@pytest.mark.parametrize(
    ("figures", "kind", "finding", "remedy"),
    [
        (
            {"dead": 0.62},
            "dead",
            ["62%", "above 40 %", "test split", "31% on the training split"],
            ["lower fit.sparsity (now 0.01)", "raise fit.learning_rate (now 0.001)", "fit.resample_every"],
        ),
        (
            {"fve": 0.85},
            "fve",
            ["0.850", "below 0.90", "test split"],
            ["raise fit.expansion (now 16)", "lower fit.sparsity (now 0.01)"],
        ),
        ({"l0": 130.4}, "l0", ["130 neurons", "13% of all", "above 64"], ["raise fit.sparsity (now 0.01)"]),
        (
            {"pure": False, "raw_pure": False},
            "entropy",
            ["mean entropy 2.", "permuted labels"],
            [
                "norm is 3.25",
                "0.002, from 0.001 to 0.004",
                "dimension 7.0",
                "0.00%",
                "embed.weights",
                "fit.normalisation",
            ],
        ),
        (
            {"raw_pure": True, "pure": False},
            "raw",
            ["not below that of the raw dimensions"],
            ["fit.sparsity"],
        ),
        (
            {"share": 0.2},
            "positives",
            ["14 of 14 labels", "fewer than 50", "Cardiomegaly 3"],
            ["larger data set", "radiographs.train_fraction (now 0.8)"],
        ),
    ],
)
def test_figures_of_the_summary(
    tmp_path: Path, figures: dict[str, Any], kind: str, finding: list[str], remedy: list[str]
) -> None:
    signature = found(whole(tmp_path, **figures))[kind]
    assert all(part in signature.finding for part in finding), signature.finding
    assert all(part in signature.remedy for part in remedy), signature.remedy
    assert f"{signature.finding}." in describe(str(tmp_path))


def test_limits_themselves_are_no_failure(tmp_path: Path) -> None:
    assert found(whole(tmp_path, dead=0.40, fve=0.90, l0=64.0)) == {}


def test_the_figures_are_those_of_the_tables(tmp_path: Path) -> None:
    run = whole(tmp_path, pure=False)
    neurons = run.read("neurons")
    mean = np.mean(neurons["entropy"].to_numpy())
    floor = np.mean(neurons["entropy_floor"].to_numpy())
    assert f"mean entropy {mean:.2f}" in found(run)["entropy"].finding
    assert f"({floor:.2f})" in found(run)["entropy"].finding


@pytest.mark.parametrize(
    ("curve", "kind", "finding", "remedy"),
    [
        (
            [(10, 0.60, 0.0, 10.40), (20, 0.80, 0.0, 10.20), (30, 0.88, 0.0, 10.12)],
            "undertrained",
            ["FVE 0.95", "highest 0.880, epoch 30", "still rising (by 0.080"],
            ["raise fit.epochs (now 40)", "fit.learning_rate (now 0.001)"],
        ),
        (
            [(10, 0.80, 0.0, 10.20), (20, 0.91, 0.0, 10.09), (30, 0.909, 0.0, 10.091)],
            "floor",
            ["highest 0.910, epoch 20", "no longer rises"],
            ["raise fit.expansion (now 16)", "lower fit.sparsity (now 0.01)"],
        ),
        (
            [(10, 0.97, 0.05, 2.1), (20, 0.97, 0.10, 2.0), (30, 0.97, 0.25, 2.05)],
            "dying",
            ["5.0% on validation at epoch 10", "25.0% at epoch 30"],
            ["fit.sparsity_warmup (now 0.05)", "fit.resample_every (now 0"],
        ),
        (
            [(10, 0.97, 0.0, 2.0), (20, 0.98, 0.0, 2.1), (30, 0.98, 0.0, 2.2)],
            "first",
            ["first of 3 evaluations (epoch 10)", "2.000", "2.200"],
            ["fit.evaluate_every, now 10", "lower fit.learning_rate (now 0.001)"],
        ),
        (
            [(10, 0.97, 0.0, 2.2), (20, 0.98, 0.0, 2.1), (30, 0.98, 0.0, 2.05)],
            "last",
            ["last of 3 evaluations (epoch 30)", "by 0.050, to 2.050"],
            ["raise fit.epochs (now 40)"],
        ),
    ],
)
def test_the_course_of_training(
    tmp_path: Path, curve: Any, kind: str, finding: list[str], remedy: list[str]
) -> None:
    run = fitted(prepared(tmp_path), curve)
    signature = found(run)[kind]
    assert all(part in signature.finding for part in finding), signature.finding
    assert all(part in signature.remedy for part in remedy), signature.remedy
    fitted(run)
    assert found(run) == {}


def test_one_evaluation_is_neither_first_nor_last(tmp_path: Path) -> None:
    assert found(fitted(prepared(tmp_path), [(40, 0.97, 0.0, 2.0)])) == {}


def test_an_end_without_gain_is_no_last(tmp_path: Path) -> None:
    curve = [(10, 0.97, 0.0, 2.1), (20, 0.97, 0.0, 2.0), (30, 0.97, 0.0, 1.999)]
    assert found(fitted(prepared(tmp_path), curve)) == {}


@pytest.mark.parametrize("pure", [False, True])
def test_controls_that_are_not_beaten_are_named(tmp_path: Path, pure: bool) -> None:
    run = whole(tmp_path)
    of = {split: units(pure, 0.5, seed + 50) for seed, split in enumerate(("test", "valid"))}
    table = neurons_table(of["test"], of["valid"])
    chosen = chosen_neurons(of["test"], of["valid"], min_firing=5).to_pylist()
    commit(
        run, "controls", "controls", pa.concat_tables(controls_table(name, table) for name in CONTROLS),
        notes={"rank": 9, "ica": {}, "chosen": dict.fromkeys(CONTROLS, chosen)},
        inputs=fingerprint(run, "neurons"),
    )  # fmt: skip
    controls = write_summary(run)["controls"]
    assert "controls" not in diagnose(run).missing
    signatures = found(run)
    assert ("controls" in signatures) == pure
    if pure:
        ours, other = (
            next(figures for figures in controls["kinds"] if figures["kind"] == kind)
            for kind in ("sae", "pca")
        )
        finding = signatures["controls"].finding
        assert ours["labels_separated"] == other["labels_separated"] == 14
        assert "in labels separated (SAE 14): untrained SAE (14), random rotation (14), PCA (14)" in finding
        assert "raw dimensions" not in finding
        assert "fit.architecture" in signatures["controls"].remedy
        # Of other neurons they say nothing.
        measured(fitted(run, sparsity=0.02))
        assert set(found(run)) == {"stale"}


@pytest.mark.parametrize(("accuracy", "met"), [(0.55, True), (0.85, False)])
def test_detection_accuracy(tmp_path: Path, accuracy: float, met: bool) -> None:
    told = labelling(labelled_run(tmp_path / "labelled", accuracy))
    run = whole(tmp_path / "run")
    commit(run, "panels", "panels", None, settings={"name_images": 10, "name_from": "top", "min_patients": 9})
    commit(run, "detect", "detections", None, inputs=fingerprint(run, "panels", "neurons"))
    summary = json.loads(run.read_bytes("summary.json"))
    run.write_bytes(json.dumps({**summary, "labelling": told}).encode(), "summary.json")
    signatures = found(run)
    assert ("detection" in signatures) == met
    if met:
        mean = next(f["value"] for f in told["figures"] if f["name"] == "detection_accuracy")
        finding, remedy = signatures["detection"].finding, signatures["detection"].remedy
        assert f"{mean:.1%}" in finding
        assert f"descriptions {told['nulls']['shuffled']['mean']:.1%}" in finding
        assert "1,590 of 1,600 prompts" in finding
        assert all(
            part in remedy for part in ("name.template", "detect.template", "panels.name_images (now 10)")
        )


def test_detections_of_other_panels_are_not_told(tmp_path: Path) -> None:
    told = labelling(labelled_run(tmp_path / "labelled", 0.55))
    run = whole(tmp_path / "run")
    commit(run, "panels", "panels", None)
    commit(run, "detect", "detections", None, inputs=fingerprint(run, "panels"))
    summary = json.loads(run.read_bytes("summary.json"))
    run.write_bytes(json.dumps({**summary, "labelling": told}).encode(), "summary.json")
    commit(run, "panels", "panels", None, settings={"seed": 1})
    assert set(found(run)) == {"stale"}


def test_stale_tables_are_named_and_their_figures_left_aside(tmp_path: Path) -> None:
    run = whole(tmp_path, dead=0.62)
    fitted(run, sparsity=0.02)
    signatures = found(run)
    assert set(signatures) == {"stale"}
    assert "neurons (activations and sae changed)" in signatures["stale"].finding
    assert signatures["stale"].remedy == (
        "run `medsae encode --overwrite` and `medsae measure --overwrite` on it"
    )
    assert "dead 3.0%" in describe(str(tmp_path))  # validation's
    assert "measure" in diagnose(run).missing


def test_what_is_half_done_is_named(tmp_path: Path) -> None:
    run = fitted(prepared(tmp_path))
    run.begin(Plan("encode", "activations", {}))
    assert "activations" in found(run)["half_done"].finding


def test_stand_ins_are_named_with_what_to_set(tmp_path: Path) -> None:
    run = prepared(tmp_path, ["encoder stand-in"])
    commit(run, "name", "names", None, stand_ins=["model stand-in@0123"])
    signature = found(run)["stand_ins"]
    assert "encoder stand-in, model stand-in@0123" in signature.finding
    assert all(part in signature.remedy for part in ("embed.encoder", "embed.weights", "medgemma.model"))


# ------------------------------------------------------------------------------- what is not there


def test_without_an_sae_it_says_what_is_missing(tmp_path: Path) -> None:
    diagnosis = diagnose(prepared(tmp_path, dataset="phantom"))
    assert list(diagnosis.missing) == list(STAGES[2:])
    assert swept(diagnosis).fit == FitSettings()
    text = describe(str(tmp_path))
    assert "1,600 radiographs (phantom: 1,280 train, 160 valid, 160 test), 1,600 embedded" in text
    assert "Synthetic" in text
    assert "dead neurons, FVE, L0" in text


def test_without_embeddings_nothing_is_swept(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    run.delete("embeddings")
    assert diagnose(run).sweep is None
    assert "medsae sweep" not in describe(str(tmp_path))


def test_before_measure_the_figures_are_of_validation(tmp_path: Path) -> None:
    curve = [(10, 0.85, 0.5, 10.15), (20, 0.851, 0.5, 10.149)]
    signatures = found(fitted(prepared(tmp_path), curve))
    assert set(signatures) == {"dead", "fve", "floor"}
    assert "0.851 (below 0.90) on the validation split" in signatures["fve"].finding


def test_a_manifest_from_before_some_settings_came(tmp_path: Path) -> None:
    older = {"expansion": 4, "sparsity": 0.02, "sparsity_warmup": 0.0, "learning_rate": 7e-6, "epochs": 200,
             "uncertain": "zeros", "blank": "negative"}  # fmt: skip
    told = swept(diagnose(fitted(prepared(tmp_path), settings=older)))
    assert (told.fit.expansion, told.fit.sparsity, told.fit.sparsity_warmup) == (4, 0.02, 0.0)
    assert (told.fit.learning_rate_warmup, told.fit.learning_rate_decay) == (0.0, 0.0)
    assert (told.measure.uncertain, told.measure.blank) == ("zeros", "negative")


def test_a_run_by_uri() -> None:
    import fsspec

    fsspec.filesystem("memory").store.clear()
    run = Run("memory://bucket/a run")
    commit(run, "radiographs", "radiographs", None, rows=5, notes={"splits": {}, "dataset": "nih"})
    inputs = fingerprint(run, "radiographs")
    commit(run, "embed", "embeddings", None, inputs=inputs, rows=5, notes={"encoder": "mine"})
    diagnosis = diagnose(fitted(run))
    assert swept(diagnosis).run == "memory://bucket/a run"


@pytest.mark.parametrize("spoilt", [f"radiographs/{MANIFEST}", "summary.json"])
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, spoilt: str) -> None:
    run = whole(tmp_path)
    run.write_bytes(b'{"stage": ', spoilt)
    with pytest.raises(InputError, match=r"cannot be read|not JSON") as told:
        diagnose(run)
    assert "\n" not in str(told.value)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole(tmp_path / "run", dead=0.9)
    main(["diagnose", str(tmp_path / "run")])
    assert "1 failure signature met:" in capsys.readouterr().out
    for arguments in (["diagnose", str(tmp_path)], ["diagnose"], ["diagnose", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------- the sweep

SPARSE = {"dead": 0.62}
DENSE = {"l0": 200.0}
POOR = {"fve": 0.8}


@pytest.mark.parametrize(
    ("fit", "figures", "wanted"),
    [
        ({}, SPARSE, {"sparsity": [0.001, 0.003, 0.01], "learning_rate": [0.001, 0.003, 0.01]}),
        ({}, DENSE, {"sparsity": [0.01, 0.03, 0.1]}),
        ({}, POOR, {"sparsity": [0.001, 0.003, 0.01], "expansion": [16, 32]}),
        (
            {},
            {**POOR, **DENSE},
            {"architecture": ["relu", "batchtopk"], "sparsity": [0.001, 0.01, 0.1], "l0": [16, 32, 64],
             "expansion": [16, 32]},
        ),
        (
            {"architecture": "jumprelu"}, {**POOR, **DENSE},
            {"sparsity": [0.001, 0.01, 0.1], "expansion": [16, 32]},
        ),
        ({"architecture": "jumprelu", "l0": 20}, POOR, {"l0": [20, 40, 80], "expansion": [16, 32]}),
        ({"architecture": "topk"}, {}, {"l0": [8, 32, 128], "seeds": [0, 1, 2]}),
        ({"architecture": "batchtopk", "l0": 200}, DENSE, {"l0": [50, 100, 200]}),
        ({"architecture": "topk", "l0": 1}, DENSE, {"l0": [1]}),
        ({"sparsity": 0.0}, DENSE, {"sparsity": [3e-4, 9e-4, 3e-3]}),
    ],
)  # fmt: skip
def test_the_sweep_goes_where_the_signatures_point(
    tmp_path: Path, fit: dict[str, Any], figures: dict[str, Any], wanted: dict[str, list[Any]]
) -> None:
    diagnosis = diagnose(measured(fitted(prepared(tmp_path), **fit), **figures))
    settings = swept(diagnosis)
    sweep = settings.sweep
    names = ("architecture", "sparsity", "l0", "expansion", "learning_rate", "seeds")
    assert {name: getattr(sweep, name) for name in names if getattr(sweep, name)} == wanted
    assert diagnosis.sweep is not None
    assert diagnosis.sweep.n_trials == len(trials(settings.fit, sweep))


def test_the_sweep_repeats_the_run_but_for_what_it_says(tmp_path: Path) -> None:
    fit = FitSettings(
        architecture="gated", expansion=4, sparsity=3e-5, learning_rate=7e-5, epochs=30, batch_size=64,
        seed=5, normalisation="dim", reconstruction="mean", decoder_norm="weighted", sparsity_warmup=0.0,
        learning_rate_decay=0.0, evaluate_every=6, workers=2,
    )  # fmt: skip
    run = measured(fitted(prepared(tmp_path), **fingerprinted(fit)))
    again = swept(diagnose(run))
    assert again.run == str(tmp_path)
    assert fingerprinted(again.fit) == fingerprinted(fit)
    # With dead neurons and an end that still gains: resampling, and twice the epochs.
    curve = [(10, 0.97, 0.5, 2.2), (20, 0.98, 0.5, 2.1)]
    diagnosis = diagnose(fitted(prepared(tmp_path / "other"), curve, **fingerprinted(fit)))
    changed = {"epochs": 60, "resample_every": 3.0}
    assert fingerprinted(swept(diagnosis).fit) == {**fingerprinted(fit), **changed}
    assert diagnosis.sweep is not None
    assert diagnosis.sweep.changed == ["fit.epochs 60 (now 30)", "fit.resample_every 3.0 (now 0.0)"]


@pytest.mark.parametrize(
    ("fit", "named", "unnamed"),
    [
        ({}, ["fit.sparsity (", "fit.sparsity_warmup", "fit.resample_every"], ["fit.l0", "auxk"]),
        ({"resample_every": 2.0}, ["fit.sparsity ("], ["fit.resample_every"]),
        ({"architecture": "topk"}, ["fit.l0 (now 32)", "fit.auxk (now 0.03125)"], ["fit.sparsity"]),
        ({"architecture": "jumprelu", "l0": 9}, ["fit.l0 (now 9)"], ["fit.sparsity (", "auxk"]),
    ],
)
def test_remedies_are_those_of_the_architecture(
    tmp_path: Path, fit: dict[str, Any], named: list[str], unnamed: list[str]
) -> None:
    remedy = found(measured(fitted(prepared(tmp_path), **fit), dead=0.5))["dead"].remedy
    assert all(name in remedy for name in named), remedy
    assert not any(name in remedy for name in unnamed), remedy
