"""Radiographs as the vision-language model is shown them, the same by every backend."""

from __future__ import annotations

from PIL import Image

from medsae_ray.radiographs.decode import DecodeError, decode
from medsae_ray.run import open_filesystem


class UnreadableImage(Exception):
    """A radiograph that cannot be shown; the message is a short reason that names its `image_id` alone."""


def read_image(image_id: str, uri: str, max_side: int, max_pixels: int) -> Image.Image:
    """The radiograph at `uri` as RGB, shrunk so that its longer side is at most `max_side` pixels.

    The model's own processor resizes it again; shrinking first bounds the memory of many large films.
    Raises UnreadableImage for a file that is missing, out of reach, damaged or above `max_pixels`.
    """
    try:
        filesystem, path = open_filesystem(uri)
        with filesystem.open_input_stream(path) as stream:
            image = decode(stream.read(), max_pixels=max_pixels)
    except DecodeError as error:
        raise UnreadableImage(f"image {image_id} cannot be decoded ({error})") from None
    except MemoryError:
        raise
    # Each file system has errors of its own. Without their words: those quote the path, whose folders name
    # the patient.
    except Exception as error:
        raise UnreadableImage(f"image {image_id} cannot be read ({type(error).__name__})") from None
    image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return image.convert("RGB")
