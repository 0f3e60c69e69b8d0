"""Encoders by name. Importing this loads neither PyTorch nor transformers: decoding needs only pixels."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from medsae_ray.encoders.preprocessing import pad_and_resize
from medsae_ray.errors import InputError

if TYPE_CHECKING:
    from medsae_ray.encoders.base import Encoder

ENCODERS = {
    "medclip-resnet50": "medsae_ray.encoders.medclip:MedClipResNet50",
    "stand-in": "medsae_ray.encoders.standin:StandInEncoder",
}
# Both built-in encoders see a radiograph as MedCLIP does, so their pixels need no import of the encoder.
_PREPROCESSING: dict[str, Callable[[Image.Image], np.ndarray]] = dict.fromkeys(ENCODERS, pad_and_resize)


def load_encoder(
    name: str, weights: str | None = None, *, device: str = "cpu", precision: str = "float32"
) -> Encoder:
    """The encoder called `name`, with its weights, ready to embed.

    name: a key of `ENCODERS`, or `package.module:Class` for an `Encoder` of the user's own.
    weights: a checkpoint file or its folder; None for an encoder that ships with its weights.
    device: PyTorch's name of it ("cpu", "cuda"); precision: "float32" or "bfloat16" (feature map only).
    Raises `InputError` for an unknown name, unusable weights, device or precision.
    """
    return _encoder_class(name).load(weights, device=device, precision=precision)


def preprocessing(name: str) -> Callable[[Image.Image], np.ndarray]:
    """The function image -> uint8 [S, S] of the encoder called `name`, found without loading weights."""
    return _PREPROCESSING.get(name) or _encoder_class(name).preprocess


def _encoder_class(name: str) -> type[Encoder]:
    module_name, colon, class_name = ENCODERS.get(name, name).partition(":")
    if not colon:
        nearest = difflib.get_close_matches(name, ENCODERS, n=1, cutoff=0)[0]
        raise InputError(
            f"encoder {name!r} is unknown: did you mean {nearest!r}? (known: {', '.join(ENCODERS)}, "
            "or package.module:Class for your own)"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"encoder {name!r} cannot be imported: {error}.") from error
    from medsae_ray.encoders.base import Encoder

    if not (isinstance(found, type) and issubclass(found, Encoder)):
        raise InputError(f"encoder {name!r} is not a subclass of medsae_ray.encoders.base.Encoder.")
    return found
