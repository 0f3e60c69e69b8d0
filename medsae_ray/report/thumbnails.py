"""The radiographs of a report: each once, as a grey JPEG square, framed as the encoder saw it."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from PIL import Image

from medsae_ray.radiographs.decode import DecodeError, decode
from medsae_ray.run import open_filesystem

QUALITY = 80
"""Of the JPEGs; 160 px square takes 4 KB."""
ENCODER_SIDE = 224
"""Smallest square that `preprocessing.pad_and_resize` pads a radiograph to."""

Write = Callable[[bytes, str], None]


def write_pictures(
    images: pa.Table, write: Write, side: int, *, max_pixels: int, threads: int = 0
) -> dict[str, str]:
    """Shrink radiographs (`image_id`, `uri`) to squares and hand each to `write(content, "<image_id>.jpg")`.

    side: in pixels, at most; nothing is enlarged. threads: 0 for one a core (Pillow works without the GIL).
    Returns the reasons why some have no picture, by `image_id`: no path is in them.
    """
    ids, uris = images["image_id"].to_pylist(), images["uri"].to_pylist()
    make = functools.partial(_write_one, write=write, side=side, max_pixels=max_pixels)
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        reasons = list(pool.map(make, ids, uris))
    return {name: reason for name, reason in zip(ids, reasons, strict=True) if reason is not None}


def square_jpeg(image: Image.Image, side: int) -> bytes:
    """A decoded radiograph (mode L), centred on a black square as `pad_and_resize` does, as a JPEG.

    The square has `side` pixels, or its own size where that is smaller. Nothing of the file but its pixels
    goes over: no EXIF, comment or profile.
    """
    padded = max(ENCODER_SIDE, *image.size)
    square = Image.new("L", (padded, padded))
    left, top = ((padded - extent) // 2 for extent in image.size)
    square.paste(image, (left, top))
    if side < padded:
        square = square.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    sink = io.BytesIO()
    square.save(sink, "JPEG", quality=QUALITY, optimize=True)
    return sink.getvalue()


def _write_one(image_id: str, uri: str, *, write: Write, side: int, max_pixels: int) -> str | None:
    try:
        filesystem, path = open_filesystem(uri)
        with filesystem.open_input_stream(path) as stream:
            content = stream.read()
    # Each file system has errors of its own. Without their words: those quote the path, whose folders name
    # the patient.
    except Exception as error:
        return f"missing or unreadable file ({type(error).__name__})"
    try:
        picture = square_jpeg(decode(content, max_pixels=max_pixels), side)
    except DecodeError as error:
        return str(error)
    write(picture, f"{image_id}.jpg")
    return None
