"""The Gated sparse autoencoder (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

import torch
from torch import nn

from medsae_ray.sae.base import LossParts, SAEConfig, SparseAutoencoder
from medsae_ray.sae.workers import ALONE, Workers


class GatedSAE(SparseAutoencoder):
    """Which neurons fire and how strongly are two affine maps with tied directions (section 3.2 there).

    gate = (x − b_dec) W_enc + b_gate, magnitude = (x − b_dec) W_enc · exp(r_mag) + b_mag,
    z = 1[gate > 0] · ReLU(magnitude). The penalty is Σ ReLU(gate) (or weighted by the decoder's norm), the
    auxiliary loss ‖x − x̂(ReLU(gate))‖² through a frozen decoder.
    """

    architecture = "gated"
    saelens_name = "gated"

    def __init__(self, config: SAEConfig, *, centre: torch.Tensor | None = None, seed: int = 0) -> None:
        super().__init__(config, centre=centre, seed=seed)
        self.b_gate = nn.Parameter(torch.zeros(config.n_neurons))
        self.b_mag = nn.Parameter(torch.zeros(config.n_neurons))
        self.r_mag = nn.Parameter(torch.zeros(config.n_neurons))

    def _paths(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and magnitude before their ReLU, [B, m] each."""
        shared = (x - self.b_dec) @ self.W_enc
        return shared + self.b_gate, shared * self.r_mag.exp() + self.b_mag

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        gate, magnitude = self._paths(x)
        return torch.relu(magnitude) * (gate > 0)

    def _weights(self) -> torch.Tensor | float:
        if self.config.decoder_norm == "unit":
            return 1.0
        # Constant, as in the auxiliary loss: were the decoder frozen there alone, the penalty would shrink
        # its rows, r_mag would make up for it, and the gates would stay as they are.
        return torch.linalg.vector_norm(self.W_dec.detach(), dim=1)

    def penalty(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (torch.relu(self._paths(x)[0]).sum(0, dtype=torch.float64) * self._weights()).sum()

    def objective(
        self, x: torch.Tensor, sparsity: float, n: int, workers: Workers = ALONE
    ) -> tuple[torch.Tensor, LossParts, torch.Tensor]:
        gate, magnitude = self._paths(x)
        z = torch.relu(magnitude) * (gate > 0)
        opened = torch.relu(gate)
        reconstruction = (x - self.decode(z)).square().sum() / self.terms(n)
        frozen = torch.addmm(self.b_dec.detach(), opened, self.W_dec.detach())
        auxiliary = (x - frozen).square().sum() / self.terms(n)
        penalty = (opened * self._weights()).sum() / n
        loss = reconstruction + sparsity * penalty + auxiliary
        return loss, LossParts(loss, reconstruction, penalty, auxiliary), (z > 0).sum(0)
