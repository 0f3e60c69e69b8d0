"""Phantoms on disk, in CheXpert's layout: folders, train.csv, valid.csv, test.csv, the truth beside them."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.radiographs.phantom.patients import PhantomStudy
from medsae_ray.radiographs.phantom.render import PHANTOM_VERSION, images_of, render
from medsae_ray.tables import TRUTH

FOLDER = "CheXpert-phantom"

FIRST_PATIENT = {"train": 1, "valid": 70_001, "test": 80_001}
"""Patient numbers never move with the data set's size, so a smaller set is a prefix of a larger one."""

TRUTH_FILE = TRUTH.append(pa.field("path", pa.string(), nullable=False))
"""`truth.parquet`: the table `truth` and, for files on disk, `path` as in the CSV's `Path`."""


@dataclass(frozen=True)
class PhantomSettings:
    """What to generate."""

    images: int = 6000
    """Number of images over train.csv, valid.csv (3 % of them) and test.csv (3 %)."""
    size: int = 224
    """Side in pixels."""
    seed: int = 0
    """Decides every patient; the stand-in encoder was trained on seed 1,000,003."""
    format: str = "jpg"
    """`jpg` (quality 95; as CheXpert's own, and 8 times as fast to write) or `png` (lossless)."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise InputError(f"images is {self.images}: ask for at least 1 phantom.")
        if not 32 <= self.size <= 2048:
            raise InputError(f"size is {self.size}: phantoms are drawn at 32 to 2048 pixels.")
        if self.format not in {"png", "jpg"}:
            raise InputError(f"format is {self.format!r}: choose png or jpg.")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}: choose 0 or more.")


class _Image(NamedTuple):
    study: PhantomStudy
    view: int
    path: str
    """As in the CSV: begins with the data set's folder."""


def write_phantoms(root: Path, settings: PhantomSettings, workers: int = 1) -> Path:
    """Write phantoms under `root`/CheXpert-phantom and return that folder.

    Does nothing if the folder already holds the same settings and PHANTOM_VERSION. All or nothing: a
    killed run leaves only a temporary folder, which the next one removes. `workers` processes render;
    the files do not depend on their number. Raises InputError if the folder holds other phantoms.
    """
    folder = Path(root) / FOLDER
    wanted = {"phantom_version": PHANTOM_VERSION, **asdict(settings)}
    done = folder / "phantom.json"
    if folder.exists():
        found = json.loads(done.read_text()) if done.exists() else {}
        if found == wanted:
            return folder
        differing = sorted(key for key in wanted if found.get(key) != wanted[key])
        raise InputError(
            f"{folder} holds other phantoms ({', '.join(differing)} differ): remove it or write elsewhere."
        )
    unfinished = folder.with_name(f".{FOLDER}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    splits = {split: list(_plan(split, settings)) for split in FIRST_PATIENT}
    for split, images in splits.items():
        _write_csv(unfinished / f"{split}.csv", split, images)
    truth = _render_all(
        [image for images in splits.values() for image in images], unfinished, settings, workers
    )
    pq.write_table(pa.Table.from_pylist(truth, TRUTH_FILE), unfinished / "truth.parquet")
    (unfinished / "phantom.json").write_text(json.dumps(wanted, indent=2) + "\n")
    os.replace(unfinished, folder)
    return folder


def _plan(split: str, settings: PhantomSettings) -> Iterator[_Image]:
    official = round(0.03 * settings.images)
    count = official if split != "train" else settings.images - 2 * official
    # As in CheXpert, the official sets hold one study a patient.
    images = (
        (study, view)
        for study, view in images_of(settings.seed, FIRST_PATIENT[split])
        if split == "train" or study.study == 1
    )
    last = {"train": FIRST_PATIENT["valid"], "valid": FIRST_PATIENT["test"], "test": 100_000}[split]
    for study, view in islice(images, count):
        if study.patient >= last:
            raise InputError(
                f"images is {settings.images}: there are patient numbers for about 140,000 only."
            )
        name = f"view{view + 1}_{study.views[view]}.{settings.format}"
        patient = f"patient{study.patient:05d}"
        yield _Image(study, view, f"{FOLDER}/{split}/{patient}/study{study.study}/{name}")


def _write_csv(path: Path, split: str, images: Iterable[_Image]) -> None:
    described = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA"] if split != "test" else ["Path"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*described, *LABELS])
        for study, view, name in images:
            row: list[str | int | float | None] = [name]
            if split != "test":
                frontal = study.views[view] == "frontal"
                projection = ("AP" if study.ap else "PA") if frontal else None
                row += [study.sex, study.age, "Frontal" if frontal else "Lateral", projection]
            # The official sets carry the readers' consensus: what is truly there, 0 or 1.
            row += list(study.labels) if split == "train" else [float(x) for x in study.findings]
            writer.writerow(row)


def _render_all(
    images: list[_Image], folder: Path, settings: PhantomSettings, workers: int
) -> list[dict[str, object]]:
    tasks = [(image, folder, settings.size) for image in images]
    if workers <= 1:
        return [row for task in tasks for row in _render_one(task)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return [row for rows in pool.imap(_render_one, tasks, chunksize=64) for row in rows]


def _render_one(task: tuple[_Image, Path, int]) -> list[dict[str, object]]:
    image, folder, size = task
    relative = image.path.split("/", 1)[1]
    pixels, truth = render(image.study, image.view, size)
    file = folder / relative
    file.parent.mkdir(parents=True, exist_ok=True)
    # PNG level 1: half the time of the default, for a tenth more in size.
    Image.fromarray(pixels).save(file, compress_level=1, quality=95)
    image_id = f"phantom-{sha256(relative.encode()).hexdigest()[:16]}"
    return [
        {
            "image_id": image_id,
            "path": image.path,
            "finding": sign.finding,
            "severity": sign.severity,
            **sign.box._asdict(),
        }
        for sign in truth
    ]
