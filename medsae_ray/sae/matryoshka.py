"""The Matryoshka BatchTopK sparse autoencoder (Bussmann et al. 2025, arXiv 2503.17547)."""

from __future__ import annotations

from typing import ClassVar

import torch

from medsae_ray.sae.base import Architecture
from medsae_ray.sae.topk import BatchTopKSAE

PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the neurons, the first ones, that must each reconstruct on their own."""


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK whose first m/16, m/8, m/4, m/2 and m neurons each reconstruct x; the errors are added up."""

    architecture: ClassVar[Architecture] = "matryoshka"

    @property
    def widths(self) -> list[int]:
        """Neurons of each prefix, ascending, the last one m."""
        m = self.config.n_neurons
        return sorted({max(1, round(share * m)) for share in PREFIXES})

    def reconstruction(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rebuilt, squares, start = self.b_dec.expand_as(x), x.new_zeros(()), 0
        for stop in self.widths:
            rebuilt = rebuilt + z[:, start:stop] @ self.W_dec[start:stop]
            squares = squares + (x - rebuilt).square().sum()
            start = stop
        return rebuilt, squares
