"""Real runs, shared by the tests that start Ray."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import SMALL, label, medsae, watched


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
    prefix = watched(connects)
    done = medsae("pipeline", "--run", str(folder), *SMALL, prefix=prefix)
    return PhantomRun(folder, done.stdout, done.stderr, connects if prefix else None)


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


INPUTS = ("radiographs", "embeddings", "sae", "activations", "neurons", "dimensions")
"""Tables that the labelling stages and the summary read."""


class Labelled(NamedTuple):
    """A run through the three stages, undisturbed."""

    run: Path
    done: list[subprocess.CompletedProcess[str]]
    """Panels, name, detect."""
    connects: Path | None
    """strace's list of every connection that a process of `detect` opened; None without strace."""


@pytest.fixture(scope="session")
def labelled(phantom_run, tmp_path_factory) -> Labelled:
    """The three stages after a finished small run."""
    run = tmp_path_factory.mktemp("labelled") / "run"
    for table in INPUTS:
        shutil.copytree(phantom_run.folder / table, run / table)
    connects = run.parent / "connects"
    prefix = watched(connects)
    done = [label(run, "panels"), label(run, "name"), label(run, "detect", prefix=prefix)]
    return Labelled(run, done, connects if prefix else None)


@pytest.fixture
def copied(labelled, tmp_path):
    """A function that copies some tables of the labelled run into a run folder of its own."""

    def copy(*tables: str) -> Path:
        for table in (*INPUTS, *tables):
            shutil.copytree(labelled.run / table, tmp_path / "run" / table)
        return tmp_path / "run"

    return copy
