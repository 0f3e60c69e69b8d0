"""From a phantom study to pixels: one image, a training sample in memory, a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medsae_ray.labels import LABELS
from medsae_ray.radiographs.phantom import anatomy, signs
from medsae_ray.radiographs.phantom.patients import FINDINGS, PhantomStudy, patient_studies

PHANTOM_VERSION = 1
"""Raised whenever phantoms look different or are labelled differently for the same seed."""


class PlantedSign(NamedTuple):
    """A visible sign, or a part of one (a nodule, a tube, one lung's oedema).

    `box` in pixels of the image (x0, y0, x1, y1), severity in (0, 1].
    """

    finding: str
    severity: float
    box: signs.Box


class Rendering(NamedTuple):
    """An image and what is in it."""

    pixels: NDArray[np.uint8]
    """[size, size], dark is air."""
    truth: list[PlantedSign]


def render(study: PhantomStudy, view: int = 0, size: int = 224) -> Rendering:
    """Draw view number `view` (from 0) of the study at `size` x `size` pixels."""
    build = anatomy.Anatomy.of(study, view)
    severity = {sign.finding: sign.severity for sign in study.signs}
    draw = anatomy.frontal if study.views[view] == "frontal" else anatomy.lateral
    chest = draw(
        build, size, severity.get("Cardiomegaly", 0.0), severity.get("Enlarged Cardiomediastinum", 0.0)
    )
    truth: list[PlantedSign] = []
    for sign in study.signs:
        truth += [PlantedSign(sign.finding, sign.severity, box) for box in signs.plant(chest, sign)]
    noise = np.random.default_rng((study.seed, study.patient, study.study, 3_000 + view))
    return Rendering(chest.compose(noise), truth)


def images_of(seed: int, first_patient: int = 1) -> Iterator[tuple[PhantomStudy, int]]:
    """All images of a seed, endless: (study, view number), patient by patient."""
    patient = first_patient
    while True:
        for study in patient_studies(seed, patient):
            for view in range(len(study.views)):
                yield study, view
        patient += 1


def sample_images(
    seed: int, start: int, count: int, size: int = 224
) -> tuple[NDArray[np.uint8], NDArray[np.float32], list[str]]:
    """`count` images of the patients from number `start` (from 1) on, in memory.

    Returns pixels uint8 [count, size, size], the findings truly there float32 [count, 14] (0 or 1, in
    CheXpert's order), and each image's report.
    """
    pixels = np.empty((count, size, size), np.uint8)
    findings = np.empty((count, len(LABELS)), np.float32)
    reports = []
    for row, (study, view) in zip(range(count), images_of(seed, start), strict=False):
        pixels[row] = render(study, view, size).pixels
        findings[row] = study.findings
        reports.append(study.report)
    return pixels, findings, reports


def contact_sheet(path: Path, seed: int = 0, tile: int = 150) -> None:
    """Write a PNG of phantoms, one finding a tile, each marked as synthetic."""
    tiles: list[tuple[str, PhantomStudy]] = []
    wanted = dict.fromkeys(FINDINGS, 1) | {"No Finding": 3, "Lateral": 1, "Lateral, several findings": 1}
    wanted["Several findings"] = 2
    for study, view in images_of(seed):
        names = [sign.finding for sign in study.signs]
        if study.views[view] == "lateral":
            name = "Lateral, several findings" if len(names) > 2 else "Lateral" if not names else ""
        elif not names:
            name = "No Finding"
        elif len(names) == 1 and study.signs[0].severity > 0.5:
            name = names[0]
        else:
            name = "Several findings" if len(names) == 4 else ""
        if wanted.get(name, 0):
            wanted[name] -= 1
            tiles.append((name, _only(study, view)))
        if not any(wanted.values()):
            break
    order = {name: rank for rank, name in enumerate(LABELS)}
    tiles.sort(key=lambda item: order.get(item[0], len(order)))
    columns = 5
    rows = -(-len(tiles) // columns)
    sheet = Image.new("L", (columns * tile, rows * (tile + 14)))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for index, (name, study) in enumerate(tiles):
        x, y = index % columns * tile, index // columns * (tile + 14)
        image = render(study, 0, 2 * tile)
        picture = Image.fromarray(image.pixels).resize((tile, tile), Image.Resampling.BOX)
        sheet.paste(picture, (x, y + 14))
        draw.text((x + 3, y + 1), name, fill=255, font=font)
        draw.text(
            (x + tile - 48, y + tile - 1), "synthetic", fill=255, font=font, stroke_width=1, stroke_fill=0
        )
    sheet.save(path, optimize=True)


def _only(study: PhantomStudy, view: int) -> PhantomStudy:
    return replace(study, views=(study.views[view],))
