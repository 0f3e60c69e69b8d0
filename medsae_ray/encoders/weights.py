"""`medsae weights`: where an encoder's weights come from, and whether a file holds them. Never downloads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from medsae_ray.errors import InputError


class WeightsReport(NamedTuple):
    """What a checked weight file holds."""

    path: str
    encoder: str
    sha256: str
    embedding_dim: int
    n_parameters: int
    """Learned values of the image encoder; batch normalisations' running statistics not counted."""
    n_read: int
    """Tensors read into the image encoder."""
    n_skipped: int
    """Tensors known and left alone: the text half, the temperature, position buffers."""

    def __str__(self) -> str:
        return (
            f"{self.path} holds {self.encoder}: {self.n_parameters:,} parameters in {self.n_read} tensors, "
            f"{self.n_skipped} of the text half skipped, embeddings of {self.embedding_dim} dimensions\n"
            f"SHA-256 {self.sha256}"
        )


def describe() -> str:
    """Where MedCLIP's weights come from and how to give them to this tool, as a paragraph for a terminal."""
    return """\
MedCLIP-ResNet-50 (encoder: medclip-resnet50) is published by its authors, github.com/RyanWangZf/MedCLIP.
This tool does not download it. To fetch it yourself:

  1. Open medclip/medclip_resnet_weight.txt in that repository. Its one line is the address of a zip archive;
     when last looked at, https://storage.googleapis.com/pytrial/medclip-pretrained.zip
  2. Download and unpack the archive: it holds pytorch_model.bin, the whole image and text encoder.
  3. Check it with `medsae weights FILE`, and note the SHA-256 that this prints: the repository gives none.

Terms: the repository's code is under the MIT licence; nothing is said there about the weights alone. They
were trained on CheXpert and MIMIC-CXR, whose use agreements may bind you as well. For research, not for
clinical use.

The stand-in (encoder: stand-in) ships with this package and needs no file. It has seen generated radiographs
only: it shows that the machinery runs, and says nothing about patients."""


def check(path: str | Path, encoder: str = "medclip-resnet50") -> WeightsReport:
    """Read a weight file exactly as embedding would; raises `InputError` saying what is wrong with it."""
    # Loaded here: `describe` should not wait for PyTorch and transformers.
    from medsae_ray.encoders.checkpoints import read_checkpoint
    from medsae_ray.encoders.medclip import MedClipResNet50, split_keys

    if encoder != MedClipResNet50.name:
        raise InputError(
            f"encoder {encoder!r} has no weight file to check: only {MedClipResNet50.name} has one."
        )
    checkpoint = read_checkpoint(path)
    keys = split_keys(checkpoint)
    model = MedClipResNet50.from_checkpoint(checkpoint)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return WeightsReport(
        path=str(checkpoint.path),
        encoder=encoder,
        sha256=checkpoint.sha256,
        embedding_dim=model.embedding_dim,
        n_parameters=sum(t.numel() for key, t in keys.vision.items() if not key.endswith(statistics)),
        n_read=len(keys.vision),
        n_skipped=len(keys.skipped),
    )
