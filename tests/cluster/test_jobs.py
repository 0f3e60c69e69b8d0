"""`ray job submit` of the shipped job scripts to a private cluster of two Ray nodes on this machine."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from commands import ENVIRONMENT, LABELLING, ROOT, SMALL

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Address of the dashboard of a head and a worker node; `ray stop` would end every Ray of the machine."""
    port, dashboard = free_port(), free_port()
    log = open(tmp_path_factory.mktemp("cluster") / "log", "wb")  # noqa: SIM115
    environment = {
        **ENVIRONMENT,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9",
    }
    nodes = []

    def start(*arguments: str) -> None:
        command = [
            RAY,
            "start",
            "--block",
            "--disable-usage-stats",
            "--object-store-memory",
            "400000000",
            # Jobs go through the agent, which does without its server where another Ray has the usual port.
            f"--dashboard-agent-listen-port={free_port()}",
            *arguments,
        ]
        nodes.append(
            subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        )

    try:
        start(
            "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1",
        )  # fmt: skip
        address = f"http://127.0.0.1:{dashboard}"
        wait_for_nodes(address, 1)
        start(f"--address=127.0.0.1:{port}", "--num-cpus=4")
        wait_for_nodes(address, 2)
        yield address
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        log.close()


def wait_for_nodes(address: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        listed = subprocess.run(
            [RAY, "list", "nodes", "--address", address, "--format", "json"],
            capture_output=True, text=True, env=ENVIRONMENT, check=False,
        )  # fmt: skip
        try:
            nodes = json.loads(listed.stdout)
        except ValueError:
            nodes = []
        if sum(node["state"] == "ALIVE" for node in nodes) >= count:
            return
        time.sleep(1)
    raise AssertionError(f"the cluster did not come to {count} nodes: {listed.stdout}{listed.stderr}")


def submit(address: str, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(
            [
                RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), *options,
                "--", "python", *command,
            ],
            capture_output=True, text=True, env=ENVIRONMENT, check=False,
        )  # fmt: skip
        # A node is there before the agent that takes jobs.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(2)


def asked(url: str) -> Any:
    """What the dashboard's HTTP API answers."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def piped(cluster, tmp_path_factory):
    """A submitted pipeline: its run folder and how it ended."""
    run = tmp_path_factory.mktemp("piped") / "run"
    done = submit(
        cluster, "jobs/pipeline.py", "--config", "jobs/demo.yaml", "--run", str(run), *SMALL,
        *LABELLING, "--until", "report",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return run, done


def test_a_submitted_pipeline_fills_the_run_folder(piped):
    run, done = piped
    assert "MedSAE summary" in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    embedded = pd.read_parquet(run / "embeddings", columns=["image_id"])["image_id"]
    assert embedded.nunique() == len(embedded) == summary["radiographs"]["embedded"] == 400
    assert len(pd.read_parquet(run / "neurons")) == 1024
    candidates, names, verdicts, detections = (
        pd.read_parquet(run / table) for table in ("candidates", "names", "verdicts", "detections")
    )
    assert candidates["candidate"].sum() == len(names) == len(detections) > 0
    assert detections["named"].any()
    named = detections[detections["named"]]["neuron"]
    assert set(verdicts.loc[verdicts["condition"] == "true", "neuron"]) == set(named)
    assert (verdicts["status"] == "answered").mean() > 0.99
    assert summary["labelling"]["names"]["named"] == len(named)
    maps = pd.read_parquet(run / "maps", columns=["neuron", "image_id"])
    gallery = pd.read_parquet(run / "gallery")
    assert len(maps.merge(gallery, on=["neuron", "image_id"])) == len(gallery) > 0
    shown = {path.stem for path in (run / "report" / "radiographs").glob("*.jpg")}
    assert shown == set(gallery["image_id"])
    assert (run / "report" / "index.html").exists()


def test_a_killed_sweep_submitted_again_trains_only_what_is_missing(cluster, piped, tmp_path):
    run = tmp_path / "run"
    for table in ("radiographs", "embeddings"):
        shutil.copytree(piped[0] / table, run / table)
    command = (
        "jobs/sweep.py", "--run", str(run), "--fit.expansion", "1", "--fit.batch_size", "64",
        "--fit.epochs", "6", "--fit.evaluate_every", "3", "--fit.learning_rate", "2e-3",
        "--sweep.sparsity", "[1e-3, 1e-1]", "--sweep.seeds", "[0, 1]", "--sweep.together", "never",
        "--sweep.concurrent", "1", "--ray.progress", "false",
    )  # fmt: skip
    names = [f"relu-x1-l{sparsity}-lr2e-3-s{seed}" for sparsity in ("1e-3", "1e-1") for seed in (0, 1)]

    def curves(table: Path) -> dict[str, int]:
        files = (table / "tensorboard").glob("*/*")
        return {f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns for path in files}

    job = f"{cluster}/api/jobs/killed-sweep"
    assert submit(cluster, *command, options=("--no-wait", "--submission-id", "killed-sweep")).returncode == 0
    deadline = time.monotonic() + 240
    while asked(f"{job}/logs")["logs"].count("\ntrial ") < 2:
        assert asked(job)["status"] in ("PENDING", "RUNNING"), asked(f"{job}/logs")["logs"][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(int(asked(job)["driver_info"]["pid"]), signal.SIGKILL)
    while asked(job)["status"] == "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert asked(job)["status"] == "FAILED"
    finished = re.findall(r"^trial +\d/4 +(\S+)", asked(f"{job}/logs")["logs"], re.MULTILINE)
    assert 2 <= len(finished) < 4
    staged = curves(run / "_partial" / "sweep").items()
    before = {name: written for name, written in staged if name.split("/")[0] in finished}
    assert len(before) == 2 * len(finished)

    done = submit(cluster, *command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    # `ray job submit` exits with 0 as well where it loses sight of the job.
    assert "The run's SAE is" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    after = curves(run / "sweep")
    assert len(after) == 8
    # Of no finished trial was an evaluation written a second time.
    assert {name: after[name] for name in before} == before
    table = pd.read_parquet(run / "sweep" / "part-00000.parquet")
    assert list(dict.fromkeys(table["trial"])) == names
    assert set(table["status"]) == {"finished"}
    assert list(table["epoch"]) == [3, 3, 6, 6] * 4
    assert table["best"].sum() == 4


def test_a_relative_run_folder_is_refused(cluster):
    done = submit(cluster, "jobs/pipeline.py", "--config", "jobs/demo.yaml")
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert "Setting run is the relative path 'runs/demo'" in told
    assert "absolute path" in told


def test_cluster_yaml_is_valid():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    gpus = [t for t in prepared["available_node_types"].values() if t["resources"].get("GPU")]
    assert gpus
    assert all(0 <= t["min_workers"] < t["max_workers"] for t in gpus)
    started = " ".join(prepared["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in started
    assert "RAY_USAGE_STATS_ENABLED=0" in started
