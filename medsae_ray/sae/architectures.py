"""The architectures by their names in the settings."""

from __future__ import annotations

import torch

from medsae_ray.errors import InputError
from medsae_ray.sae.base import SAEConfig, SparseAutoencoder
from medsae_ray.sae.gated import GatedSAE
from medsae_ray.sae.jumprelu import JumpReLUSAE
from medsae_ray.sae.matryoshka import MatryoshkaSAE
from medsae_ray.sae.relu import ReLUSAE
from medsae_ray.sae.topk import BatchTopKSAE, TopKSAE

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {
    kind.architecture: kind for kind in (ReLUSAE, GatedSAE, JumpReLUSAE, TopKSAE, BatchTopKSAE, MatryoshkaSAE)
}


def build(
    architecture: str, config: SAEConfig, *, centre: torch.Tensor | None = None, seed: int = 0
) -> SparseAutoencoder:
    """A new SAE to train. InputError where the name is unknown or the architecture has no such penalty."""
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"Setting fit.architecture is {architecture!r}, but it must be one of {', '.join(ARCHITECTURES)}."
        )
    if config.decoder_norm == "weighted" and architecture not in ("relu", "gated"):
        raise InputError(
            f"Setting fit.decoder_norm is 'weighted', but {architecture} has no L1 penalty to weight: "
            "use 'unit'."
        )
    return ARCHITECTURES[architecture](config, centre=centre, seed=seed)
