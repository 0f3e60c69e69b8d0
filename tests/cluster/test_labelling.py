"""`panels`, `name` and `detect` with real vLLM engines: tables computed again, kills, other checkpoints."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import commands
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from commands import LABELLING, label, outside_hosts, start_medsae
from scipy.stats import binomtest, false_discovery_control, fisher_exact
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

sys.path.append(str(Path(__file__).parents[1] / "medgemma"))
from layout import write_medgemma_layout

KEYS = ["neuron", "image_id", "condition"]


class Instant:
    """The backend of instant_engine.py, which remembers what it was asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        folder.mkdir()
        monkeypatch.setitem(commands.ENVIRONMENT, "PYTHONPATH", str(Path(__file__).parent))
        monkeypatch.setitem(commands.ENVIRONMENT, "INSTANT_ASKED", str(folder))

    def __call__(self, run: Path, stage: str, *more: str, failing: int = 0, **options):
        """Run a stage of which `failing` of 1,000 prompts fail."""
        self.monkeypatch.setitem(commands.ENVIRONMENT, "INSTANT_FAILING", str(failing))
        backend = ("--medgemma.backend", "instant_engine:answer", "--medgemma.model", "instant")
        return label(run, stage, *backend, *more, **options)

    def asked(self) -> list[str]:
        """Ids of the prompts asked since the last call, sorted."""
        files = list(self.folder.iterdir())
        ids = [i for file in files for i in file.read_text().split()]
        for file in files:
            file.unlink()
        return sorted(ids)


@pytest.fixture
def instant(tmp_path, monkeypatch) -> Instant:
    return Instant(tmp_path / "asked", monkeypatch)


def read(run: Path, table: str) -> pd.DataFrame:
    return pd.read_parquet(run / table)


def manifest(run: Path, table: str) -> dict:
    return json.loads((run / table / "_manifest.json").read_text())


def test_names_are_the_parsed_replies(labelled):
    run = labelled.run
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
    run = labelled.run
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
    run = labelled.run
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
    run = labelled.run
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
    run, printed = labelled.run, labelled.done[2].stdout
    told = json.loads((run / "summary.json").read_text())["labelling"]
    figures = {figure["name"]: figure for figure in told["figures"]}
    verdicts, detections = read(run, "verdicts"), read(run, "detections")
    enough = detections[detections["enough"]].set_index("neuron")
    answered = verdicts[(verdicts["status"] == "answered") & verdicts["neuron"].isin(enough.index)]
    true = answered[answered["condition"] == "true"].astype({"answer": bool})
    accuracy = true.groupby("neuron")[["expected", "answer"]].apply(
        lambda rows: balanced_accuracy_score(rows["expected"], rows["answer"])
    )
    assert len(accuracy) == len(enough) == told["enough"] >= 5
    assert figures["above_70"]["value"] == (accuracy > 0.7 + 1e-9).sum()
    assert figures["above_70"]["n"] == len(enough)
    assert figures["detection_accuracy"]["value"] == pytest.approx(accuracy.mean())
    assert figures["low_above_50"]["value"] == (enough["balanced_accuracy_low"] > 0.5 + 1e-9).sum()
    assert figures["fdr_10"]["value"] == (enough["q"] <= 0.1).sum()
    assert figures["fdr_10"]["n"] == len(detections)
    for condition, rows in verdicts.groupby("condition"):
        counts = rows["status"].value_counts().to_dict()
        assert {s: n for s, n in told["verdicts"][condition].items() if n} == counts

    rng = np.random.default_rng(1)
    panels = [(rows["expected"].to_numpy(), rows["answer"].to_numpy()) for _, rows in true.groupby("neuron")]
    null = np.array(
        [
            [balanced_accuracy_score(rng.permutation(expected), answer) for expected, answer in panels]
            for _ in range(50)
        ]
    )
    permuted = told["nulls"]["permuted"]
    assert null.mean() == pytest.approx(0.5, abs=0.02)
    assert permuted["mean"] == pytest.approx(0.5, abs=0.02)
    assert permuted["n_neurons"] == len(enough)
    # The mean of one permutation over the neurons spreads by this much.
    assert permuted["se"] == pytest.approx(null.mean(axis=1).std(ddof=1), rel=0.35)
    assert permuted["count_above_70"] == pytest.approx((null > 0.7 + 1e-9).sum(axis=1).mean(), abs=0.7)
    shuffled = enough["shuffled_balanced_accuracy"].dropna()
    assert told["nulls"]["shuffled"]["mean"] == pytest.approx(shuffled.mean())
    assert told["nulls"]["shuffled"]["se"] == pytest.approx(shuffled.sem())

    best = enough.reset_index().sort_values(
        ["balanced_accuracy_low", "auroc", "neuron"], ascending=[False, False, True]
    )
    assert [row["neuron"] for row in told["best"]] == list(best["neuron"][:10])
    first = best.iloc[0]
    concept = read(run, "names").set_index("neuron")["concept"][first["neuron"]]
    ends = [f"{first[f'balanced_accuracy{end}']:.1%}" for end in ("", "_low", "_high")]
    row = rf"^ *{first['neuron']}  {re.escape(concept[:25])}.* {ends[0]}  {ends[1]} - {ends[2]}$"
    assert re.search(row, printed, re.MULTILINE), row

    assert "encoder stand-in" in told["stand_ins"]
    assert any(name.startswith("model stand-in@") for name in told["stand_ins"])
    assert f"STAND-IN MODELS ({', '.join(told['stand_ins'])})" in printed
    assert re.search(r"prompts in [\d,]+ s \(\d[\d.]* a second\)", printed)
    assert not re.search(r"patient\d{5}", "".join(one.stdout + one.stderr for one in labelled.done))


def test_an_engine_turns_to_no_other_machine(labelled):
    if labelled.connects is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    # ZeroMQ's threads: vLLM's processes talk over it, Ray's do not.
    assert re.search(r"^\d+<ZMQbg", labelled.connects.read_text(errors="replace"), re.MULTILINE)
    assert outside_hosts(labelled.connects) == set()


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


def test_a_dry_run_tells_what_would_be_sent(copied, labelled):
    run = copied("panels", "candidates")
    panels, names = read(run, "panels"), read(labelled.run, "names")
    shown = panels[panels["role"] == "name"]
    told = label(run, "name", "--dry-run").stdout
    assert f"{shown['neuron'].nunique():,} prompts with {len(shown):,} images" in told
    assert f"({shown['image_id'].nunique():,} distinct radiographs)" in told
    shutil.copytree(labelled.run / "names", run / "names")
    told = label(run, "name", "--dry-run").stdout
    assert "name would send 0 prompts with 0 images (0 distinct radiographs)" in told
    assert f"({len(names):,} more prompts have their reply on disk)" in told
    named = names[names["concept"].notna() & (names["concept"] != "no common finding")]
    own = panels[panels["role"].str.startswith("detect") & panels["neuron"].isin(named["neuron"])]
    told = label(run, "detect", "--dry-run").stdout
    assert f"in all {len(own):,} prompts are about a neuron's own description" in told
    assert not (run / "verdicts").exists()
    assert not (run / "_partial").exists()


def test_overwrite_asks_the_failed_prompts_of_a_finished_table_alone(copied, instant):
    run = copied("panels", "candidates", "names")
    lenient = ("--medgemma.max_failed_share", "1")
    instant(run, "detect", *lenient, failing=250)
    first = read(run, "verdicts").set_index("request_id")
    failed = first[first["status"] == "failed"]
    assert instant.asked() == sorted(first.index)
    assert 0.1 * len(first) < len(failed) < 0.4 * len(first)
    assert "up to date" in instant(run, "detect", *lenient).stdout
    assert instant.asked() == []

    instant(run, "detect", *lenient, "--overwrite")
    assert instant.asked() == sorted(failed.index)
    second = read(run, "verdicts").set_index("request_id")
    assert list(second.index) == list(first.index)
    assert (second["status"] != "failed").all()
    pd.testing.assert_frame_equal(second.drop(failed.index), first.drop(failed.index))
    assert read(run, "detections")["n_failed"].sum() == 0
    assert json.loads((run / "summary.json").read_text())["labelling"]["verdicts"]["true"]["failed"] == 0
    instant(run, "detect", *lenient, "--overwrite")
    assert instant.asked() == []


def test_more_shuffled_descriptions_ask_the_new_prompts_alone(copied, instant):
    run = copied("panels", "candidates", "names")
    instant(run, "detect", "--detect.shuffled_share", "0")
    first = read(run, "verdicts").set_index("request_id")
    assert set(first["condition"]) == {"true"}
    instant.asked()
    refused = instant(run, "detect", "--detect.shuffled_share", "1", code=2)
    assert "shuffled_share was 0.0, now 1.0" in refused.stderr
    instant(run, "detect", "--detect.shuffled_share", "1", "--overwrite")
    second = read(run, "verdicts").set_index("request_id")
    shuffled = second[second["condition"] == "shuffled"]
    assert len(shuffled) > 0
    assert instant.asked() == sorted(shuffled.index)
    pd.testing.assert_frame_equal(second.loc[first.index], first)
    assert len(second) == len(first) + len(shuffled)


def test_other_names_take_the_old_detections_out_of_the_summary(copied, labelled, instant):
    run = copied("panels", "candidates", "names", "verdicts", "detections")
    shutil.copy(labelled.run / "summary.json", run)
    before = json.loads((run / "summary.json").read_text())
    instant(run, "name", "--overwrite")
    assert (read(run, "names")["description"] != read(labelled.run, "names")["description"]).any()
    after = json.loads((run / "summary.json").read_text())
    assert before.pop("labelling")
    assert after == before


def test_names_that_had_failed_do_not_stand_beside_the_detections_made_without_them(copied, instant):
    run = copied("panels", "candidates")
    lenient = ("--medgemma.max_failed_share", "1")
    instant(run, "name", *lenient, failing=500)
    failed = read(run, "names").set_index("request_id")["status"] == "failed"
    assert failed.any()
    assert not failed.all()
    instant(run, "detect", *lenient)
    instant.asked()
    instant(run, "name", *lenient, "--overwrite")
    assert instant.asked() == sorted(failed.index[failed])
    assert "labelling" not in json.loads((run / "summary.json").read_text())
    # The names' fingerprint is what it was: these are the old detections.
    label(run, "measure", "--measure.min_firing", "3")
    assert "labelling" not in json.loads((run / "summary.json").read_text())
    n = len(read(run, "verdicts"))
    instant(run, "detect", *lenient, "--overwrite")
    assert len(read(run, "verdicts")) > n
    assert "labelling" in json.loads((run / "summary.json").read_text())


def test_a_dry_run_subtracts_what_is_on_disk(copied, instant):
    run = copied("panels", "candidates", "names")
    refused = instant(run, "detect", failing=250, code=2)
    found = re.search(r"(\d+) of (\d+) prompts failed \(the first: the engine is not there\)", refused.stderr)
    failed, n = map(int, found.groups())
    assert 0 < failed < n == len(instant.asked())
    before = sorted((run / "_partial").rglob("*"))
    told = instant(run, "detect", "--dry-run").stdout
    assert f"detect would send {failed:,} prompts with {failed:,} images (" in told
    assert f"({n - failed:,} more prompts have their reply on disk)" in told
    assert instant.asked() == []
    assert sorted((run / "_partial").rglob("*")) == before


def test_an_engine_that_cannot_start_is_one_sentence(copied):
    run = copied("panels", "candidates")
    refused = label(run, "name", "--medgemma.engine", '{"block_size": 17}', code=2)
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("medsae: The engine of medgemma.model stand-in does not start (")
    assert "block" in last
    assert "Traceback" not in last
    assert not (run / "names").exists()


def wait_for(condition, process, log: Path, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended before it could be killed\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"the run did not get that far\n{log.read_text()[-3000:]}"
        time.sleep(0.02)


def assert_same_verdicts(run: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]):
    ours, theirs = (read(r, "verdicts").set_index(KEYS).sort_index() for r in (run, undisturbed))
    assert ours.index.is_unique
    assert ours.index.equals(theirs.index)
    assert (ours["request_id"] == theirs["request_id"]).all()
    assert (ours["status"] == theirs["status"]).all()
    # The composition of a batch changes floats: an answer may differ only at a near tie.
    both = ours["p_yes"].to_frame("p_yes").join(theirs["p_yes"], rsuffix="_undisturbed")
    ties = both[ours["answer"] != theirs["answer"]]
    largest = (both["p_yes"] - both["p_yes_undisturbed"]).abs().max()
    with capsys.disabled():
        print(f"\n{len(both)} verdicts, largest difference of p_yes {largest:.2g}, {len(ties)} near ties")
        if len(ties):
            print(ties.to_string())
    assert largest <= 0.02
    assert ((ties["p_yes_undisturbed"] - 0.5).abs() <= 0.02).all()


def descendants(pid: int) -> dict[int, str]:
    """Living processes that a process started, itself or by others, and their command lines."""
    told = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 3) for line in told.splitlines()]
    parent = {int(row[0]): int(row[1]) for row in rows}

    def lineage(of: int) -> Iterator[int]:
        while of := parent.get(of, 0):
            yield of

    return {int(row[0]): row[3] for row in rows if not row[2].startswith("Z") and pid in lineage(int(row[0]))}


def engines(processes: dict[int, str]) -> dict[int, str]:
    return {pid: args for pid, args in processes.items() if args.startswith("VLLM::")}


def alive(processes: dict[int, str]) -> list[str]:
    """Those of the processes that still live under their name."""
    now = descendants(1) | descendants(os.getpid())
    return [args for pid, args in processes.items() if now.get(pid) == args]


def assert_all_end(processes: dict[int, str], seconds: float = 60):
    deadline = time.monotonic() + seconds
    while left := alive(processes):
        assert time.monotonic() < deadline, f"after {seconds} s there still are {left}"
        time.sleep(0.5)


def test_detect_killed_half_way_asks_only_what_is_missing(copied, labelled, tmp_path, capsys):
    run = copied("panels", "candidates", "names")
    partial = run / "_partial" / "verdicts"
    log = tmp_path / "first.log"
    process = start_medsae("detect", "--run", str(run), *LABELLING, log=log)
    wait_for(lambda: len(list((partial / "_replies").glob("*.parquet"))) >= 3, process, log)
    ours = descendants(process.pid)
    assert any("VLLM::EngineCore" in args for args in ours.values())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_all_end(engines(ours))
    # Until Ray's workers are gone as well, they may go on writing.
    assert_all_end({pid: args for pid, args in ours.items() if args.startswith("ray::")})
    kept, on_disk = {}, set()
    for path in (partial / "_replies").glob("*.parquet"):
        # Such a file was cut off by the kill.
        with contextlib.suppress(pa.ArrowInvalid):
            on_disk |= set(pd.read_parquet(path)["request_id"])
            kept[path] = path.stat().st_mtime_ns
    n = len(read(labelled.run, "verdicts"))
    assert 0 < len(on_disk) < n

    shutil.rmtree(partial / "_requests")
    log = tmp_path / "second.log"
    process = start_medsae("detect", "--run", str(run), *LABELLING, log=log)
    wait_for(lambda: list((partial / "_requests").glob("*.parquet")), process, log)
    time.sleep(1)
    asked_again = set(pd.read_parquet(partial / "_requests")["request_id"])
    assert not asked_again & on_disk
    assert len(asked_again) + len(on_disk) == n
    wait_for(lambda: engines(descendants(process.pid)), process, log)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert process.wait() == 0, log.read_text()[-3000:]
    assert manifest(run, "verdicts")["notes"]["throughput"]["prompts"] == len(asked_again)
    assert_same_verdicts(run, labelled.run, capsys)
    assert not partial.exists()


def test_an_engine_killed_in_the_middle_of_naming_is_replaced(copied, labelled, tmp_path):
    run = copied("panels", "candidates")
    replies = run / "_partial" / "names" / "_replies"
    log = tmp_path / "name.log"
    process = start_medsae("name", "--run", str(run), *LABELLING, log=log)
    wait_for(lambda: list(replies.glob("*.parquet")), process, log)
    seen = engines(descendants(process.pid))
    (engine,) = [pid for pid, args in seen.items() if "VLLM::EngineCore" in args]
    os.kill(engine, signal.SIGKILL)
    early = {path: path.stat().st_mtime_ns for path in replies.glob("*.parquet")}
    # A second name for every file of replies, as the folder goes with the commit.
    kept = tmp_path / "kept"
    kept.mkdir()
    deadline = time.monotonic() + 300
    while process.poll() is None:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        for path in replies.glob("*.parquet"):
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                os.link(path, kept / path.name)
        seen |= engines(descendants(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, log.read_text()[-3000:]
    assert sum("VLLM::EngineCore" in args for args in seen.values()) >= 2
    ours, theirs = (read(r, "names").drop(columns="seconds") for r in (run, labelled.run))
    pd.testing.assert_frame_equal(ours, theirs)

    assert {path.name for path in early} <= {path.name for path in kept.iterdir()}
    assert all((kept / path.name).stat().st_mtime_ns == mtime for path, mtime in early.items())
    replied = pd.concat(pd.read_parquet(path) for path in kept.iterdir())
    replied = replied.loc[replied["reply"].notna(), "request_id"]
    assert replied.is_unique
    assert set(replied) <= set(ours["request_id"])
    assert_all_end(seen)


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
