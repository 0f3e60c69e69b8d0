"""The `medsae` command in a process of its own, as a user has it, for the tests that start Ray."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MEDSAE = [sys.executable, "-m", "medsae_ray.cli"]
ENVIRONMENT = {
    **os.environ,
    "RAY_AUTH_MODE": "disabled",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
SMALL = (
    "--radiographs.phantom_images", "400", "--embed.encoder", "stand-in", "--embed.block_rows", "64",
    "--fit.expansion", "2", "--fit.sparsity", "1e-2", "--fit.learning_rate", "2e-3", "--fit.batch_size", "64",
    "--fit.epochs", "40", "--fit.evaluate_every", "10", "--fit.min_firing", "3", "--fit.threads", "1",
    "--measure.min_firing", "3", "--ray.progress", "false", "--until", "measure",
)  # fmt: skip
"""A pipeline that takes a minute: 400 phantoms, 1,024 neurons."""

LABELLING = (
    "--panels.per_label", "1", "--panels.min_patients", "3", "--panels.name_images", "5",
    "--panels.detect_images", "8", "--medgemma.model", "stand-in", "--medgemma.gpus_per_replica", "0",
    "--medgemma.kv_cache_gib", "1", "--medgemma.max_model_len", "1024", "--medgemma.dtype", "float32",
    "--medgemma.max_num_seqs", "16", "--medgemma.block_rows", "16", "--medgemma.concurrent_batches", "1",
    "--medgemma.engine", '{"block_size": 32}', "--ray.progress", "false",
)  # fmt: skip
"""Naming and detection of a dozen neurons of that pipeline by the stand-in VLM."""


def medsae(*arguments: str, code: int = 0, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run `medsae` to its end and check its exit code."""
    done = subprocess.run(
        [*prefix, *MEDSAE, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == code, (
        f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    return done


def start_medsae(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Start `medsae` and go on; its output goes to `log`."""
    with open(log, "wb") as stream:
        return subprocess.Popen([*MEDSAE, *arguments], stdout=stream, stderr=stream, env=ENVIRONMENT)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    """Poll until `condition()` holds; fails where the process ends or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.05)


def train_workers(driver: int) -> list[int]:
    """Process ids of the Ray Train workers of a driver whose Ray is embedded in it."""
    processes = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, rest = stat.read_text().split("(", 1)[1].rsplit(")", 1)
            processes[int(stat.parent.name)] = name, int(rest.split()[1])
    # Linux cuts names to 15 characters; the parent of a worker is the raylet, whose parent is the driver.
    return [
        pid
        for pid, (name, raylet) in processes.items()
        if name == "ray::RayTrainWorker"[:15] and raylet in processes and processes[raylet][1] == driver
    ]


def evaluations(log: str) -> list[tuple[int, int]]:
    """(process id of the worker, epoch) of each evaluation that `fit` told, in their order."""
    told = re.findall(r"RayTrainWorker pid=(\d+)\)\S* epoch +(\d+)/", log)
    return [(int(pid), int(epoch)) for pid, epoch in told]


def watched(connects: Path) -> list[str]:
    """Prefix of a command of which strace lists every connection in a file; none where there is no strace.

    With each call stands the name of its process.
    """
    if shutil.which("strace") is None:
        return []
    calls = ["-e", "trace=connect,sendto", "-e", "signal=none"]
    return ["strace", "-f", "--decode-pids=comm", "--seccomp-bpf", "-qq", *calls, "-o", str(connects)]


def outside_hosts(connects: Path) -> set[str]:
    """Addresses beyond this machine that a watched command turned to."""
    calls = connects.read_text(errors="replace")
    addresses = re.findall(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"', calls)
    hosts = {v4 or v6.removeprefix("::ffff:") for v4, v6 in addresses}
    assert "127.0.0.1" in hosts
    return {host for host in hosts if not host.startswith("127.") and host != "::1"}


def label(run: Path, stage: str, *more: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one of the labelling stages to its end on a dozen neurons; `options` are those of `medsae`."""
    return medsae(stage, "--run", str(run), *LABELLING, *more, **options)
