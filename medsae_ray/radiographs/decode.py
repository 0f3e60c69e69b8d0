"""From the bytes of an image file to grey pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

# The plugins by the file's first bytes, rather than Image.open: no other plugin ever sees the bytes, and
# Image.open's own pixel limit, a global of the process, stays out of play.
_READERS: dict[bytes, tuple[str, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    b"\x89PNG\r\n\x1a\n": ("PNG", PngImageFile),
    b"\xff\xd8\xff": ("JPEG", JpegImageFile),
}
_OTHERS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"RIFF": "WebP"}
_DEPTHS = (8, 10, 12, 14, 16)


class DecodeError(Exception):
    """The bytes are no image that can be used; the message is a short reason that names no file."""


def decode(data: bytes, *, max_pixels: int = 100_000_000, max_bytes: int = 128 * 2**20) -> Image.Image:
    """A PNG or JPEG as a grey image (mode "L"), turned upright as its EXIF says.

    Grey, RGB, palette and 1-bit images are converted by Pillow's luma weights, transparency is ignored (as
    MedCLIP's processor does when it pastes into a grey canvas). Grey of more than 8 bits is scaled by the
    range of the smallest of 8, 10, 12, 14 or 16 bits that holds the brightest pixel, since PNG does not say
    how many bits of its 16 the detector used (PadChest: 10 or 12).

    `max_pixels`: width x height, checked on the header, before a pixel is decompressed.
    `max_bytes`: length of `data`.
    Raises DecodeError for everything else, truncated and damaged files included.
    """
    if not data:
        raise DecodeError("empty file")
    if len(data) > max_bytes:
        raise DecodeError(f"too large: {len(data) / 2**20:.0f} MiB exceed {max_bytes / 2**20:.0f} MiB")
    name, reader = _recognise(data)
    # Pillow warns of odd EXIF or palettes; in a worker each warning is a line in the driver's log.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = reader(io.BytesIO(data))
            width, height = image.size
            if width * height <= max_pixels:
                image.load()
                return _grey(ImageOps.exif_transpose(image))
        except MemoryError:
            raise
        # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... as the damage falls.
        except Exception as error:
            raise DecodeError(f"truncated or corrupt {name}") from error
    raise DecodeError(f"too large: {width} x {height} px exceed {max_pixels / 1e6:g} megapixels")


def _recognise(data: bytes) -> tuple[str, Callable[[io.BytesIO], ImageFile.ImageFile]]:
    for magic, reader in _READERS.items():
        if data.startswith(magic):
            return reader
    if data[128:132] == b"DICM":
        raise DecodeError("DICOM is not read: convert it to PNG")
    for magic, name in _OTHERS.items():
        if data.startswith(magic):
            raise DecodeError(f"unsupported format {name}: convert it to PNG")
    raise DecodeError("not an image")


def _grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.uint32)
        brightest = int(pixels.max())
        full = next(2**depth - 1 for depth in _DEPTHS if brightest < 2**depth)
        return Image.fromarray(((pixels * 255 + full // 2) // full).astype(np.uint8))
    return image.convert("L")
