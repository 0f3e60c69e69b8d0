"""`panels`, `name` and `detect` with real vLLM engines: tables computed again, kills, other checkpoints."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import LABELLING, medsae, start_medsae
from scipy.stats import binomtest, false_discovery_control, fisher_exact
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

sys.path.append(str(Path(__file__).parents[1] / "medgemma"))
from layout import write_medgemma_layout

INPUTS = ("radiographs", "embeddings", "sae", "activations", "neurons", "dimensions")
KEYS = ["neuron", "image_id", "condition"]


def label(run: Path, stage: str, *more: str, **options):
    return medsae(stage, "--run", str(run), *LABELLING, *more, **options)


@pytest.fixture(scope="session")
def labelled(phantom_run, tmp_path_factory):
    """Run folder and output of the three stages after a finished small run, undisturbed."""
    run = tmp_path_factory.mktemp("labelled") / "run"
    for table in INPUTS:
        shutil.copytree(phantom_run.folder / table, run / table)
    return run, [label(run, stage) for stage in ("panels", "name", "detect")]


@pytest.fixture
def copied(labelled, tmp_path):
    """A function that copies some tables of the labelled run into a run folder of its own."""

    def copy(*tables: str) -> Path:
        for table in (*INPUTS, *tables):
            shutil.copytree(labelled[0] / table, tmp_path / "run" / table)
        return tmp_path / "run"

    return copy


def read(run: Path, table: str) -> pd.DataFrame:
    return pd.read_parquet(run / table)


def manifest(run: Path, table: str) -> dict:
    return json.loads((run / table / "_manifest.json").read_text())


def test_names_are_the_parsed_replies(labelled):
    run, _ = labelled
    names, candidates = read(run, "names"), read(run, "candidates")
    assert list(names["neuron"]) == sorted(candidates.loc[candidates["candidate"], "neuron"])
    assert len(names) >= 8
    assert names["request_id"].is_unique
    answered = names[names["status"] == "answered"]
    assert len(answered) >= 0.8 * len(names)
    for row in answered.itertuples():
        assert json.loads(row.reply) == {"concept": row.concept, "description": row.description}
    assert names.loc[names["status"] != "answered", ["concept", "description"]].isna().all(axis=None)
    assert names["model"].str.startswith("stand-in@").all()
    assert manifest(run, "names")["stand_ins"] != []
    assert manifest(run, "names")["settings"]["template_sha256"] == names["prompt_sha256"].iloc[0]


def test_verdicts_ask_each_panel_of_a_named_neuron_under_both_conditions(labelled):
    run, _ = labelled
    verdicts, names, panels = read(run, "verdicts"), read(run, "names"), read(run, "panels")
    assert verdicts["request_id"].is_unique
    assert not verdicts.duplicated(KEYS).any()
    named = names[names["concept"].notna() & (names["concept"] != "no common finding")]
    true = verdicts[verdicts["condition"] == "true"]
    assert set(true["neuron"]) == set(named["neuron"])
    assert (true["description_neuron"] == true["neuron"]).all()
    asked = panels[panels["role"].str.startswith("detect") & panels["neuron"].isin(named["neuron"])]
    merged = true.merge(
        asked, on=["neuron", "image_id"], how="outer", suffixes=("", "_panel"), indicator=True
    )
    assert (merged["_merge"] == "both").all()
    assert (merged["expected"] == (merged["value"] > 0)).all()
    shuffled = verdicts[verdicts["condition"] == "shuffled"]
    assert len(shuffled) > 0
    concept = names.set_index("neuron")["concept"]
    assert (shuffled["neuron"].map(concept) != shuffled["description_neuron"].map(concept)).all()
    assert set(verdicts["status"]) <= {"answered", "unparsed", "failed"}
    assert (verdicts["status"] == "answered").mean() > 0.99
    assert (verdicts["answer"] == (verdicts["reply"] == "yes"))[verdicts["status"] == "answered"].all()
    answered = verdicts[verdicts["status"] == "answered"]
    sure = answered[(answered["p_yes"] - 0.5).abs() > 1e-6]
    assert (sure["answer"] == (sure["p_yes"] > 0.5)).all()


def test_naming_and_detection_show_other_patients(labelled):
    run, _ = labelled
    panels, radiographs = read(run, "panels"), read(run, "radiographs")
    panels = panels.merge(radiographs[["image_id", "patient_id", "split"]], on="image_id")
    for _, panel in panels.groupby("neuron"):
        naming = panel[panel["role"] == "name"]
        detection = panel[panel["role"].str.startswith("detect")]
        assert set(naming["split"]) == {"valid"}
        assert set(detection["split"]) == {"test"}
        assert not set(naming["patient_id"]) & set(detection["patient_id"])
        assert detection["patient_id"].is_unique


def test_detections_are_what_one_liners_make_of_the_verdicts(labelled):
    run, _ = labelled
    verdicts, detections = read(run, "verdicts"), read(run, "detections").set_index("neuron")
    answered = verdicts[verdicts["status"] == "answered"]
    p = {}
    for neuron, rows in answered[answered["condition"] == "true"].groupby("neuron"):
        row = detections.loc[neuron]
        answer, expected = rows["answer"].astype(bool), rows["expected"]
        assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(expected, answer))
        assert row["auroc"] == pytest.approx(roc_auc_score(expected, rows["p_yes"]))
        wilson = binomtest(int(answer[expected].sum()), int(expected.sum())).proportion_ci(method="wilson")
        assert (row["tpr_low"], row["tpr_high"]) == pytest.approx(tuple(wilson))
        table = pd.crosstab(expected, answer).reindex(
            index=[True, False], columns=[True, False], fill_value=0
        )
        p[neuron] = fisher_exact(table, alternative="greater").pvalue
        assert row["p"] == pytest.approx(p[neuron])
    tested = pd.Series(1.0, index=detections.index)
    tested.update(pd.Series(p))
    tested[~detections["enough"]] = 1.0
    q = pd.Series(false_discovery_control(tested), index=tested.index)
    np.testing.assert_allclose(detections["q"], q.where(detections["enough"]), atol=1e-12)
    for neuron, rows in answered[answered["condition"] == "shuffled"].groupby("neuron"):
        told = detections.loc[neuron, "shuffled_balanced_accuracy"]
        assert told == pytest.approx(balanced_accuracy_score(rows["expected"], rows["answer"].astype(bool)))


def test_the_summary_says_what_the_tables_say(labelled):
    run, done = labelled
    labelling = json.loads((run / "summary.json").read_text())["labelling"]
    detections = read(run, "detections")
    told = json.dumps(labelling)
    assert "stand-in" in told
    printed = done[2].stdout
    best = detections[detections["enough"]].sort_values("balanced_accuracy_low", ascending=False).iloc[0]
    assert str(best["neuron"]) in printed
    assert "STAND-IN" in printed
    assert re.search(r"prompts in [\d,]+ s \(\d[\d.]* a second\)", printed)
    assert not re.search(r"patient\d{5}", "".join(one.stdout + one.stderr for one in done))


def test_a_second_call_asks_nothing_and_statistics_are_made_again_alone(copied):
    run = copied("panels", "candidates", "names", "verdicts", "detections")
    start = time.monotonic()
    assert "up to date" in label(run, "detect").stdout
    assert time.monotonic() - start < 60
    before = manifest(run, "verdicts")["finished"]
    label(run, "detect", "--detect.interval", "clopper-pearson")
    assert manifest(run, "verdicts")["finished"] == before
    row = read(run, "detections").dropna(subset=["tpr"]).iloc[0]
    exact = binomtest(round(row["tpr"] * row["n_positive"]), int(row["n_positive"])).proportion_ci()
    assert row["tpr_low"] == pytest.approx(exact.low)


def test_other_prompts_are_not_mixed_with_earlier_ones(copied, tmp_path):
    run = copied("panels", "candidates", "names", "verdicts", "detections")
    template = tmp_path / "detect.txt"
    template.write_text("$image\nIs this there? Answer yes or no.\nDescription: $description")
    refused = label(run, "detect", "--detect.template", str(template), code=2)
    assert "template_sha256" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_dry_run_tells_what_would_be_sent(copied):
    run = copied("panels", "candidates", "names")
    panels, names = read(run, "panels"), read(run, "names")
    shown = panels[panels["role"] == "name"]
    told = label(run, "name", "--dry-run").stdout
    assert f"{shown['neuron'].nunique():,} prompts with {len(shown):,} images" in told
    assert f"({shown['image_id'].nunique():,} distinct radiographs)" in told
    named = names[names["concept"].notna() & (names["concept"] != "no common finding")]
    own = panels[panels["role"].str.startswith("detect") & panels["neuron"].isin(named["neuron"])]
    told = label(run, "detect", "--dry-run").stdout
    assert f"{len(own):,} prompts about a neuron's own description" in told
    assert not (run / "verdicts").exists()
    assert not (run / "_partial").exists()


def wait_for(condition, process, log: Path, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended before it could be killed\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"the run did not get that far\n{log.read_text()[-3000:]}"
        time.sleep(0.02)


def assert_same_verdicts(run: Path, undisturbed: Path):
    ours, theirs = (read(r, "verdicts").set_index(KEYS).sort_index() for r in (run, undisturbed))
    assert ours.index.is_unique
    assert ours.index.equals(theirs.index)
    assert (ours["request_id"] == theirs["request_id"]).all()
    assert (ours["status"] == theirs["status"]).all()
    # The composition of a batch changes floats: an answer may differ only at a near tie.
    assert (ours["p_yes"] - theirs["p_yes"]).abs().max() <= 0.02
    other = ours["answer"] != theirs["answer"]
    assert (theirs.loc[other, "p_yes"] - 0.5).abs().max() <= 0.02 if other.any() else True


def test_detect_killed_half_way_asks_only_what_is_missing(copied, labelled, tmp_path):
    run = copied("panels", "candidates", "names")
    replies = run / "_partial" / "verdicts" / "_replies"
    log = tmp_path / "first.log"
    process = start_medsae("detect", "--run", str(run), *LABELLING, log=log)
    wait_for(lambda: len(list(replies.glob("*.parquet"))) >= 3, process, log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)
    kept = {path: path.stat().st_mtime_ns for path in replies.glob("*.parquet")}
    on_disk = set(pd.concat(pd.read_parquet(path) for path in kept)["request_id"])
    n = len(read(labelled[0], "verdicts"))
    assert 0 < len(on_disk) < n

    process = start_medsae("detect", "--run", str(run), *LABELLING, log=tmp_path / "second.log")
    wait_for(lambda: list((run / "_partial/verdicts/_requests").glob("*.parquet")), process, log)
    time.sleep(1)
    asked_again = set(pd.read_parquet(run / "_partial/verdicts/_requests")["request_id"])
    assert not asked_again & on_disk
    assert len(asked_again) + len(on_disk) == n
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert process.wait() == 0, (tmp_path / "second.log").read_text()[-3000:]
    assert_same_verdicts(run, labelled[0])
    assert not (run / "_partial" / "verdicts").exists()


def engine_processes() -> list[int]:
    told = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in told.splitlines() if "VLLM::EngineCore" in line]


def test_an_engine_killed_in_the_middle_of_naming_is_replaced(copied, labelled, tmp_path):
    run = copied("panels", "candidates")
    replies = run / "_partial" / "names" / "_replies"
    log = tmp_path / "name.log"
    earlier = set(engine_processes())
    process = start_medsae("name", "--run", str(run), *LABELLING, log=log)
    wait_for(lambda: list(replies.glob("*.parquet")), process, log)
    (engine,) = set(engine_processes()) - earlier
    os.kill(engine, signal.SIGKILL)
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    ours, theirs = (read(r, "names").drop(columns="seconds") for r in (run, labelled[0]))
    pd.testing.assert_frame_equal(ours, theirs)
    time.sleep(3)
    assert not set(engine_processes()) - earlier


def test_a_checkpoint_of_the_real_layout_is_served_by_changing_the_path_alone(copied, tmp_path):
    folder = tmp_path / "medgemma-4b-it"
    write_medgemma_layout(folder)
    run = copied("panels", "candidates", "names")
    label(run, "detect", "--medgemma.model", str(folder))
    verdicts = read(run, "verdicts")
    assert (verdicts["status"] == "answered").all()
    assert verdicts["p_yes"].between(0, 1, inclusive="neither").all()
    assert verdicts["model"].str.startswith("medgemma-4b-it@").all()
    label(run, "name", "--medgemma.model", str(folder), "--name.max_tokens", "32", "--overwrite")
    names = read(run, "names")
    # Random weights keep to the schema and never come to its end.
    assert set(names["status"]) <= {"answered", "unparsed"}
    assert names["reply"].str.startswith("{").all()
    assert manifest(run, "names")["stand_ins"] == ["encoder stand-in"]

    shards = sorted(folder.glob("*.safetensors"))
    shards[-1].unlink()
    start = time.monotonic()
    refused = label(run, "detect", "--medgemma.model", str(folder), code=2)
    assert time.monotonic() - start < 30
    assert f"lacks {shards[-1].name}" in refused.stderr
    assert refused.stderr.count("\n") == 1
