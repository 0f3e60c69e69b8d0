"""Phantoms as the stand-in VLM's image processor sees them, in memory."""

from __future__ import annotations

import io
import multiprocessing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medsae_ray.labels import LABELS
from medsae_ray.radiographs.phantom import FINDINGS, PHANTOM_VERSION, render
from medsae_ray.radiographs.phantom.render import images_of

SIDE = 112
PATCHES = 8
"""Patches of the vision tower a side, 14 pixels each."""
CHUNK = 1_000


class Phantoms(NamedTuple):
    """Images with what is in them."""

    pixels: NDArray[np.uint8]
    """[n, 112, 112]."""
    findings: NDArray[np.bool_]
    """[n, 14], truly there, in CheXpert's order."""
    where: NDArray[np.bool_]
    """[n, 13, 8, 8]: which patches the signs of each finding touch."""


def shrink(image: Image.Image) -> NDArray[np.uint8]:
    """The image at 112 x 112 pixels, as Gemma 3's image processor resizes (bilinear with antialiasing)."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def chunk(task: tuple[int, int]) -> Phantoms:
    """One block of CHUNK images. They are stored as JPEG, as the demo's are, at a random quality."""
    seed, number = task
    rng = np.random.default_rng((seed, number))
    pixels = np.empty((CHUNK, SIDE, SIDE), np.uint8)
    findings = np.empty((CHUNK, len(LABELS)), np.bool_)
    where = np.zeros((CHUNK, len(FINDINGS), PATCHES, PATCHES), np.bool_)
    size = 224
    for row, (study, view) in zip(range(CHUNK), images_of(seed, 1 + number * CHUNK), strict=False):
        rendering = render(study, view, size)
        file = io.BytesIO()
        Image.fromarray(rendering.pixels).save(file, "JPEG", quality=int(rng.integers(80, 97)))
        pixels[row] = shrink(Image.open(file))
        findings[row] = study.findings > 0
        for sign in rendering.truth:
            x0, y0, x1, y1 = (np.clip(edge * PATCHES / size, 0, PATCHES) for edge in sign.box)
            where[
                row,
                FINDINGS.index(sign.finding),
                int(y0 + 0.15) : int(np.ceil(y1 - 0.15)),
                int(x0 + 0.15) : int(np.ceil(x1 - 0.15)),
            ] = True
    return Phantoms(pixels, findings, where)


def phantoms(seed: int, images: int, workers: int, cache: Path) -> Phantoms:
    """The first images of a seed, kept in the folder `cache` for the next run."""
    file = cache / f"phantoms-v{PHANTOM_VERSION}-{seed}-{images}.npz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        tasks = [(seed, number) for number in range(-(-images // CHUNK))]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            blocks = pool.map(chunk, tasks, chunksize=1)
        with open(file.with_suffix(".tmp"), "wb") as part:
            arrays = zip(Phantoms._fields, zip(*blocks, strict=True), strict=True)
            np.savez(part, **{name: np.concatenate(array)[:images] for name, array in arrays})
        file.with_suffix(".tmp").rename(file)
    with np.load(file) as saved:
        return Phantoms(*(saved[name] for name in Phantoms._fields))
