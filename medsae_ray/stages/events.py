"""The figures of a training as TensorBoard event files in the run."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from medsae_ray.run import Run


def write_events(run_uri: str, folder: str, rows: list[dict[str, Any]], density: np.ndarray) -> None:
    """Write rows of `history` of one step, and the densities [m] of its living neurons, into `folder`.

    One file a step, of a name that depends on the step alone: what is written again after a kill replaces
    itself. `folder` is a path in the run's file system.
    """
    from tensorboardX import SummaryWriter

    step = rows[-1]["step"]
    with tempfile.TemporaryDirectory() as local:
        with SummaryWriter(local) as writer:
            for row in rows:
                for name, value in row.items():
                    if name not in ("epoch", "step", "split") and math.isfinite(value):
                        writer.add_scalar(f"{row['split']}/{name}", value, step)
            living = density[density > 0]
            if len(living):
                writer.add_histogram("valid/log10_density", np.log10(living), step)
        filesystem = Run(run_uri).filesystem
        filesystem.create_dir(folder, recursive=True)
        (file,) = Path(local).iterdir()
        with filesystem.open_output_stream(f"{folder}/events.out.tfevents.{step:012d}") as stream:
            stream.write(file.read_bytes())
