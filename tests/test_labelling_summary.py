"""The labelling part of the summary, from the tables of a run whose figures are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from medsae_ray.concepts import NO_COMMON_FINDING
from medsae_ray.config import DetectSettings, fingerprinted
from medsae_ray.detections import VERDICT_COLUMNS, detections_table
from medsae_ray.labelling_summary import labelling, labelling_text, printable
from medsae_ray.labels import LABELS
from medsae_ray.run import Plan, Run
from medsae_ray.tables import CANDIDATES, NAMES, VERDICTS

LIVING, NAMED = 60, 40
HOSTILE = "\x1b[2J\x1b]0;owned\x07edema\u202e\r\n" + "x" * 200
THROUGHPUT = {
    "prompts": 800,
    "seconds": 40.0,
    "prompt_tokens": 100_000,
    "cached_tokens": 25_000,
    "completion_tokens": 800,
}
STAND_IN = "model stand-in"


def commit(run: Run, stage: str, table: str, content: pa.Table, notes: Any = None, **plan: Any) -> None:
    staging = run.restage(Plan(stage, table, plan.get("settings", {}), plan.get("inputs", {})))
    staging.write_table(content)
    staging.commit(rows_in=content.num_rows, rows_out=content.num_rows, notes=notes, stand_ins=[STAND_IN])


def names_table() -> pa.Table:
    """Neuron 0-29 named by labels in turn, 30-39 all hostile edema, 40-49 share nothing, the rest without."""
    concepts = [LABELS[i % 14] for i in range(30)] + [HOSTILE] * 10 + [NO_COMMON_FINDING] * 10
    status = ["answered"] * 50 + ["unparsed"] * 7 + ["failed"] * 3
    lost = [None] * 10
    return pa.table(
        {
            "neuron": np.arange(LIVING),
            "concept": [*concepts, *lost],
            "description": [*concepts, *lost],
            "status": status,
            "reason": [None] * 50 + ["no JSON"] * 7 + ["timed out"] * 3,
            "reply": ["{}"] * LIVING,
            "model": ["tiny"] * LIVING,
            "prompt_sha256": ["0" * 64] * LIVING,
            "seconds": [0.1] * LIVING,
            "request_id": [f"r{i}" for i in range(LIVING)],
        },
        schema=NAMES,
    )


def verdicts_table(accuracy: float, shuffled: float) -> pa.Table:
    """20 + 20 prompts of either condition of each named neuron; neuron 39 lost half of its firing ones."""
    rng = np.random.default_rng(0)
    rows = []
    for condition, right in (("true", accuracy), ("shuffled", shuffled)):
        for neuron in range(NAMED):
            for i in range(40):
                expected = i < 20
                answer = bool(expected if rng.random() < right else not expected)
                lost = neuron == 39 and condition == "true" and i < 10
                rows.append(
                    {
                        "request_id": f"{condition}{neuron}-{i}",
                        "neuron": neuron,
                        "image_id": f"i{i}",
                        "condition": condition,
                        "description_neuron": neuron if condition == "true" else (neuron + 1) % NAMED,
                        "expected": expected,
                        "answer": None if lost else answer,
                        "p_yes": None if lost else 0.4 * answer + 0.6 * rng.random(),
                        "status": "unparsed" if lost else "answered",
                        "reason": "neither yes nor no" if lost else None,
                        "reply": "maybe" if lost else "yes" if answer else "no",
                        "model": "tiny",
                        "prompt_sha256": "1" * 64,
                        "quantile": (i + 1) / 20 if expected else 0.0,
                    }
                )
    return pa.Table.from_pylist(rows, VERDICTS)


def labelled_run(folder: Path, accuracy: float = 0.85, shuffled: float = 0.5) -> Run:
    """A run with the tables that the labelling summary reads; `neurons` has only the columns it needs."""
    run, rng, detect = Run(str(folder)), np.random.default_rng(1), DetectSettings()
    n = LIVING + 20
    columns: dict[str, Any] = {
        "neuron": pa.array(range(n), pa.int32()),
        "valid_best_label": [LABELS[i % 14] for i in range(n)],
    }
    for label in LABELS:
        columns |= {f"{name}_{label}": rng.uniform(0.1, 0.9, n) for name in ("r", "valid_r")}
        columns |= {f"auroc_{label}{end}": rng.random(n) for end in ("", "_low", "_high")}
    positives = {label: 40 + 2 * i for i, label in enumerate(LABELS)}
    notes = {"test": {"n_positive": positives}, "min_positives": 50}
    commit(run, "measure", "neurons", pa.table(columns), notes)
    is_candidate = np.arange(n) < LIVING
    candidates = {
        "neuron": np.arange(n),
        "candidate": is_candidate,
        "reason": [None if c else "dead" for c in is_candidate],
        "label": columns["valid_best_label"],
        **{f"n_{kind}_{split}": [9] * n for kind in ("firing", "silent") for split in ("valid", "test")},
    }
    commit(run, "panels", "candidates", pa.table(candidates, schema=CANDIDATES))
    commit(run, "panels", "panels", pa.table({"neuron": [0]}), {"left_out": {"dead": 20}})
    names, verdicts = names_table(), verdicts_table(accuracy, shuffled)
    commit(run, "name", "names", names, {"model": "tiny", "throughput": None})
    commit(run, "detect", "verdicts", verdicts, {"model": "tiny", "throughput": THROUGHPUT})
    table = detections_table(
        verdicts.select(VERDICT_COLUMNS), np.arange(LIVING), np.arange(LIVING) < NAMED, detect
    )
    commit(run, "detect", "detections", table, settings=fingerprinted(detect))
    return run


def figure(told: dict[str, Any], name: str) -> dict[str, Any]:
    return next(f for f in told["figures"] if f["name"] == name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return labelled_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def told(run: Run) -> dict[str, Any]:
    return labelling(run)


def test_it_is_plain_json(told: dict[str, Any]) -> None:
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_counts_stand_beside_what_chance_gives(run: Run, told: dict[str, Any]) -> None:
    rows = [row for row in run.read("detections").to_pylist() if row["enough"]]
    assert told["enough"] == len(rows) == NAMED - 1
    accuracy = np.array([row["balanced_accuracy"] for row in rows])
    above = figure(told, "above_70")
    assert above["value"] == (accuracy > 0.7 + 1e-9).sum()
    assert above["coin"] == pytest.approx(39 * stats.binom.sf(28, 40, 0.5))
    assert above["permuted"] == pytest.approx(above["coin"], abs=0.3)
    other = np.array([row["shuffled_balanced_accuracy"] for row in rows])
    assert above["shuffled"] == (other > 0.7 + 1e-9).sum()
    assert (above["n"], above["paper"]) == (39, 21)
    assert figure(told, "low_above_50")["value"] == sum(row["balanced_accuracy_low"] > 0.5 for row in rows)
    assert figure(told, "fdr_10")["value"] == sum(row["q"] <= 0.1 for row in rows)
    assert figure(told, "fdr_10")["n"] == LIVING
    assert figure(told, "detection_accuracy")["value"] == pytest.approx(accuracy.mean())


def test_statuses_and_names_are_counted(told: dict[str, Any]) -> None:
    names, verdicts = told["names"], told["verdicts"]
    assert [names[s] for s in ("answered", "unparsed", "failed")] == [50, 7, 3]
    assert (names["named"], names["no_common_finding"]) == (40, 10)
    assert names["reasons"] == {"no JSON": 7, "timed out": 3}
    assert [verdicts["true"][s] for s in ("answered", "unparsed", "failed")] == [1590, 10, 0]
    assert [verdicts["shuffled"][s] for s in ("answered", "unparsed", "failed")] == [1600, 0, 0]
    assert told["candidates"] == {"n_neurons": 80, "n_candidates": 60, "left_out": {"dead": 20}}
    assert told["stand_ins"] == [STAND_IN]


def test_nulls_are_near_50_and_told_with_their_spread(told: dict[str, Any]) -> None:
    permuted, shuffled = told["nulls"]["permuted"], told["nulls"]["shuffled"]
    assert permuted["mean"] == pytest.approx(0.5, abs=0.01)
    assert permuted["permutations"] == 100
    assert shuffled["mean"] == pytest.approx(0.5, abs=3 * shuffled["se"])
    assert len(shuffled["deciles"]) == 9
    assert shuffled["deciles"] == sorted(shuffled["deciles"])


@pytest.mark.parametrize(
    ("shuffled", "reading"),
    [(0.5, "It lies at 50 %"), (0.65, "points above 50 %"), (0.35, "points below 50 %")],
)
def test_a_shuffled_null_off_50_is_explained(tmp_path: Path, shuffled: float, reading: str) -> None:
    told = labelling(labelled_run(tmp_path, shuffled=shuffled))
    assert reading in told["nulls"]["shuffled"]["reading"]
    assert told["nulls"]["shuffled"]["reading"] in labelling_text(told)


def test_the_ten_best_are_those_of_highest_lower_bound(run: Run, told: dict[str, Any]) -> None:
    best, measured = told["best"], run.read("neurons").to_pylist()
    assert len(best) == 10
    rows = {row["neuron"]: row for row in run.read("detections").to_pylist()}
    kept = sorted((r["balanced_accuracy_low"] for r in rows.values() if r["enough"]), reverse=True)
    assert [row["balanced_accuracy_low"] for row in best] == kept[:10]
    for row in best:
        of = measured[row["neuron"]]
        assert row["label"] == of["valid_best_label"]
        assert (row["r"], row["auroc"]) == (of[f"r_{row['label']}"], of[f"auroc_{row['label']}"])
        assert row["balanced_accuracy"] == rows[row["neuron"]]["balanced_accuracy"]


def test_per_class_rows_say_what_is_claimed(told: dict[str, Any]) -> None:
    per_class = told["per_class"]
    assert [row["label"] for row in per_class] == list(LABELS)
    assert [row["enough_positives"] for row in per_class] == [row["n_positive"] >= 50 for row in per_class]
    assert all(row["balanced_accuracy"] > 0.7 for row in per_class)
    # Each label is the concept of two or three neurons of accuracy 85 %.
    assert set(told["labels_named"]) >= {"Cardiomegaly", "Edema", "Fracture"}


def test_quantiles_hold_all_answers_of_the_firing_side(told: dict[str, Any]) -> None:
    assert [part["n"] for part in told["quantiles"]] == [39 * 4] * 5
    assert all(part["low"] < part["tpr"] < part["high"] for part in told["quantiles"])


def test_the_text_holds_the_figures_and_nothing_of_a_hostile_reply(told: dict[str, Any]) -> None:
    text = labelling_text(told)
    assert "STAND-IN MODELS (model stand-in)" in text
    assert all(character == "\n" or character.isprintable() for character in text)
    assert max(len(line) for line in text.splitlines()) < 150
    above = figure(told, "above_70")
    line = next(line for line in text.splitlines() if line.startswith("is above 70 %"))
    assert line.split()[4:6] == [str(above["value"]), "39"]
    assert line.split()[-1] == "21"
    assert line.split()[-2] == f"{above['shuffled']:.1f}"
    assert "800 prompts in 40 s (20.0 a second), 100,000 prompt tokens (25% from the prefix cache)" in text
    assert "names: every reply was on disk" in text
    assert "10 panels share no finding" in text
    for row in told["best"]:
        assert f"{row['balanced_accuracy']:.1%}  {row['balanced_accuracy_low']:.1%} - " in text
    assert "Failure signature" not in text


def test_a_low_accuracy_is_a_failure_signature(tmp_path: Path) -> None:
    told = labelling(labelled_run(tmp_path, accuracy=0.5))
    assert figure(told, "detection_accuracy")["value"] < 0.6
    assert "look at the prompt and at whether the activating images cohere" in labelling_text(told)
    assert any(row["neuron"] is None for row in told["per_class"])


def test_without_any_neuron_that_counts_it_still_speaks(tmp_path: Path) -> None:
    run = labelled_run(tmp_path)
    detections = run.read("detections")
    none = detections.set_column(
        detections.column_names.index("enough"),
        detections.schema.field("enough"),
        pa.array([False] * LIVING),
    )
    commit(run, "detect", "detections", none, settings=fingerprinted(DetectSettings()))
    told = labelling(run)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert (told["best"], told["signatures"], told["quantiles"]) == ([], [], [])
    assert "0 with enough answers" in labelling_text(told)


@given(text=st.text(max_size=60), width=st.integers(1, 40))
def test_printable_text_is_one_short_line(text: str, width: int) -> None:
    shown = printable(text, width)
    assert len(shown) <= width
    assert all(character == "…" or character.isprintable() for character in shown)
    assert len(shown.splitlines()) <= 1


def test_printable_keeps_what_is_harmless() -> None:
    assert printable("Pleural  effusion (naïve), ≥ 2 cm", 40) == "Pleural effusion (naïve), ≥ 2 cm"
    assert printable("\x1b[31mred\x1b[0m", 40) == "[31mred [0m"
    assert printable("abcdef", 4) == "abc…"
    assert printable(None, 4) == "-"
