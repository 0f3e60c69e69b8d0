"""Reading weight files: safetensors and PyTorch checkpoints, never any code in them."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import safetensors
import torch
from torch import Tensor

from medsae_ray.errors import InputError

FILE_NAMES = ("pytorch_model.bin", "model.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by key, as stored."""

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    """The header of a safetensors file; empty for other files."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a weight file, or the `pytorch_model.bin` or `model.safetensors` of a folder.

    Raises `InputError`, naming the file, for anything but a flat mapping of names to tensors. PyTorch files
    are opened with `weights_only=True`: a pickle that holds more than tensors is refused, not run.
    """
    file = _find(Path(path))
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        start = stream.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{file} is a web page, not a checkpoint: download the file behind the link.")
    metadata: dict[str, str] = {}
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
        else:
            # Mapping leaves the tensors that nobody asks for (MedCLIP's text model, 430 MB) on the disk.
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_torch_zip(file))
    except UnpicklingError as error:
        raise InputError(
            f"{file} is refused: it is damaged or holds Python objects beside tensors, which could run code."
        ) from error
    except InputError:
        raise
    except Exception as error:  # a damaged file can fail in any way inside the readers
        raise InputError(f"{file} is not a readable checkpoint (truncated or of another kind).") from error
    if not isinstance(tensors, dict):
        raise InputError(f"{file} holds a {type(tensors).__name__}, not a mapping of names to tensors.")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{file}: the entry {key!r} is a {type(value).__name__}, not a tensor.")
    return Checkpoint(file, sha256, dict(tensors), metadata)


def match_keys(checkpoint: Checkpoint, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Demand that `found` has the keys of `wanted`, of the same shapes, with finite values.

    Raises `InputError` naming the first key at fault: missing, unexpected, misshapen or not finite.
    """
    file = checkpoint.path
    for problem, keys in (("lacks", wanted.keys() - found.keys()), ("has", found.keys() - wanted.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            surprise = ", which this encoder does not have" if problem == "has" else ""
            raise InputError(
                f"{file} {problem} {min(keys)}{more}{surprise}: use a checkpoint of this encoder."
            )
    for key, value in found.items():
        if value.shape != wanted[key].shape:
            raise InputError(
                f"{file}: {key} has shape {list(value.shape)} instead of {list(wanted[key].shape)}: "
                "use a checkpoint of this encoder."
            )
        if not torch.isfinite(value).all():
            raise InputError(f"{file}: {key} holds values that are not finite: the checkpoint is damaged.")


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"the weights {path} do not exist: name a checkpoint file or its folder.")
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    raise InputError(f"the folder {path} holds no {' or '.join(FILE_NAMES)}: name the checkpoint file.")


def _is_torch_zip(file: Path) -> bool:
    """Whether the file is PyTorch's zip format; its older formats cannot be mapped into memory."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if not any(name.endswith("data.pkl") for name in names):
        raise InputError(f"{file} is a zip archive of other files: unpack it and name the checkpoint in it.")
    return True
