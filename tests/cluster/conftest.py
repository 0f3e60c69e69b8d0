"""Real runs for the tests that start Ray: the `medsae` command in a process of its own, as a user has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

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
    "--fit.epochs", "40", "--fit.evaluate_every", "10", "--fit.min_firing", "3", "--measure.min_firing", "3",
    "--ray.progress", "false",
)  # fmt: skip
"""A pipeline that takes a minute: 400 phantoms, 1,024 neurons."""


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


class PhantomRun(NamedTuple):
    """A finished small run."""

    folder: Path
    stdout: str
    stderr: str
    connects: Path | None
    """strace's list of every connection that any process of the run opened; None without strace."""


@pytest.fixture(scope="session")
def phantom_run(tmp_path_factory: pytest.TempPathFactory) -> PhantomRun:
    """`medsae pipeline` on 400 phantoms with the stand-in encoder, watched by strace where there is one."""
    folder = tmp_path_factory.mktemp("phantom") / "run"
    connects = folder.parent / "connects"
    watched = shutil.which("strace") is not None
    call = "connect,sendto"
    prefix = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", f"trace={call}", "-e", "signal=none", "-o"]
    done = medsae(
        "pipeline", "--run", str(folder), *SMALL, prefix=[*prefix, str(connects)] if watched else []
    )
    return PhantomRun(folder, done.stdout, done.stderr, connects if watched else None)


@pytest.fixture(scope="session")
def phantoms(phantom_run: PhantomRun) -> Path:
    """The folder of those 400 phantoms, in CheXpert's layout."""
    return phantom_run.folder / "phantoms"


@pytest.fixture
def copy_of(phantom_run: PhantomRun, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies some tables of the finished run into a run folder of its own."""

    def copy(*tables: str) -> Path:
        for table in tables:
            shutil.copytree(phantom_run.folder / table, tmp_path / "run" / table)
        return tmp_path / "run"

    return copy
