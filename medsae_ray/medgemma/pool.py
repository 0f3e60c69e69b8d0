"""The pool that answers prompts: request rows in, the same rows with replies out, whatever the backend.

A request row holds `request_id`, `neuron`, `image_ids` and `uris` (lists of equal length), `n_contrast` (how
many of them, the last ones, are contrast images), `concept` and `description` (null for naming), and columns
that pass through untouched. A reply row adds `reply` (null where there is none), `p_yes` (detection; null
where the backend did not tell), `reason` (why there is no reply), `prompt_tokens`, `cached_tokens`,
`completion_tokens`, `seconds`. The order of rows may change; none vanishes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from medsae_ray.config import MedgemmaSettings
from medsae_ray.errors import InputError
from medsae_ray.medgemma.checkpoint import Checkpoint, check_checkpoint
from medsae_ray.medgemma.prompts import Task

if TYPE_CHECKING:
    import ray.data


REPLY = pa.schema(
    [
        pa.field("reply", pa.string()),
        pa.field("p_yes", pa.float64()),
        pa.field("reason", pa.string()),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("cached_tokens", pa.int64()),
        pa.field("completion_tokens", pa.int64()),
        pa.field("seconds", pa.float64()),
    ]
)
"""The columns that a backend adds to a request row."""
TEXT_TOKENS = 512
"""Room for a prompt's instruction, its description and the reply, in tokens."""


class Model(NamedTuple):
    """Who answers: what the tables call it, what stands for it in fingerprints, and its files, if any."""

    name: str
    digest: str
    stand_in: bool
    checkpoint: Checkpoint | None


def identify(settings: MedgemmaSettings, images_per_prompt: int) -> Model:
    """The model behind the settings, checked before anything is started; an endpoint is not asked.

    Raises InputError for a checkpoint that cannot be served or prompts that cannot fit.
    """
    if settings.backend == "engine":
        checkpoint = check_checkpoint(settings.model, settings.download)
        _check_length(checkpoint, images_per_prompt, settings)
        folder = Path(settings.model).expanduser()
        name = folder.name if folder.is_dir() else settings.model
        return Model(f"{name}@{checkpoint.digest[:12]}", checkpoint.digest, checkpoint.stand_in, checkpoint)
    digest = hashlib.sha256(f"{settings.backend} {settings.model}".encode()).hexdigest()
    return Model(settings.model, digest, "stand-in" in settings.model.lower(), None)


def _check_length(checkpoint: Checkpoint, images_per_prompt: int, settings: MedgemmaSettings) -> None:
    if settings.max_model_len > checkpoint.max_positions:
        raise InputError(
            f"Setting medgemma.max_model_len is {settings.max_model_len}, but the model {settings.model} "
            f"was made for at most {checkpoint.max_positions} tokens: lower it."
        )
    # Two newlines and a token on either side of each image, and room for the instruction and the reply.
    needed = images_per_prompt * (checkpoint.image_tokens + 4) + TEXT_TOKENS
    if needed > settings.max_model_len:
        raise InputError(
            f"A prompt of {images_per_prompt} radiographs takes about {needed} tokens of the model "
            f"{settings.model}, more than medgemma.max_model_len = {settings.max_model_len}: raise it, or "
            "lower panels.name_images."
        )


def answer(requests: ray.data.Dataset, task: Task, settings: MedgemmaSettings) -> ray.data.Dataset:
    """Reply rows for request rows.

    Raises InputError for a backend that cannot be imported.
    """
    path = {"engine": "medsae_ray.medgemma.engine:answer", "endpoint": "medsae_ray.medgemma.endpoint:answer"}
    module, _, function = path.get(settings.backend, settings.backend).partition(":")
    try:
        backend = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"Setting medgemma.backend = {settings.backend!r} cannot be imported: {error}."
        ) from None
    return backend(requests, task, settings)


def rows_per_block(task: Task, settings: MedgemmaSettings) -> int:
    """Prompts a block, such that it shows at most `medgemma.block_rows` radiographs."""
    return max(1, settings.block_rows // task.images_per_prompt)


def refuse_backend(settings: MedgemmaSettings) -> None:
    """Raises InputError where the backend cannot answer: no vLLM installed, or a silent endpoint."""
    if settings.backend == "endpoint":
        from medsae_ray.medgemma.endpoint import check_endpoint

        check_endpoint(settings)
    elif settings.backend == "engine" and importlib.util.find_spec("vllm") is None:
        raise InputError(
            "The backend medgemma.backend = 'engine' needs vLLM: pip install 'medsae-ray[gpu]', or "
            "'medsae-ray[cpu]' without a GPU."
        )
