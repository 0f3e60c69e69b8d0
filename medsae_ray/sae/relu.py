"""The ReLU sparse autoencoder with an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

import torch
from torch import nn

from medsae_ray.sae.base import LossParts, SAEConfig, SparseAutoencoder
from medsae_ray.sae.workers import ALONE, Workers


class ReLUSAE(SparseAutoencoder):
    """z = ReLU((x − b_dec) W_enc + b_enc); penalty Σ z, or Σ z · ‖W_dec row‖."""

    architecture = "relu"
    saelens_name = "standard"

    def __init__(self, config: SAEConfig, *, centre: torch.Tensor | None = None, seed: int = 0) -> None:
        super().__init__(config, centre=centre, seed=seed)
        self.b_enc = nn.Parameter(torch.zeros(config.n_neurons))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.addmm(self.b_enc, x - self.b_dec, self.W_enc))

    def sparsity_weights(self) -> torch.Tensor | float:
        """What each neuron's activation counts in the penalty: 1, or its decoder norm [m]."""
        if self.config.decoder_norm == "unit":
            return 1.0
        return torch.linalg.vector_norm(self.W_dec, dim=1)

    def penalty(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (z.sum(0, dtype=torch.float64) * self.sparsity_weights()).sum()

    def objective(
        self, x: torch.Tensor, sparsity: float, n: int, workers: Workers = ALONE
    ) -> tuple[torch.Tensor, LossParts, torch.Tensor]:
        z = self.encode(x)
        reconstruction = (x - self.decode(z)).square().sum() / self.terms(n)
        penalty = (z * self.sparsity_weights()).sum() / n
        loss = reconstruction + sparsity * penalty
        return loss, LossParts(loss, reconstruction, penalty, torch.zeros_like(loss)), (z > 0).sum(0)

    @torch.no_grad()
    def write_gradients(
        self, x: torch.Tensor, sparsity: float, n: int, workers: Workers = ALONE
    ) -> tuple[LossParts, torch.Tensor]:
        """As in the base class, in closed form.

        The same numbers as autograd's, without one of its six matrix products: x − b_dec hands b_dec the
        gradient −W_enc · grad(b_enc), which needs no [b, d] matrix.
        """
        grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec = (
            parameter.grad for parameter in (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        )
        assert grad_W_enc is not None
        assert grad_b_enc is not None
        assert grad_W_dec is not None
        assert grad_b_dec is not None
        z, grad_z = self.scratch("z", x), self.scratch("grad_z", x)
        centred = x - self.b_dec
        torch.addmm(self.b_enc, centred, self.W_enc, out=z).relu_()
        error = torch.addmm(self.b_dec, z, self.W_dec).sub_(x)
        terms = self.terms(n)
        reconstruction = error.square().sum() / terms
        z_sums = z.sum(0)
        weights = self.sparsity_weights()
        penalty = (z_sums * weights).sum() / n

        error *= 2 / terms
        torch.mm(z.T, error, out=grad_W_dec)
        torch.sum(error, 0, out=grad_b_dec)
        each = sparsity / n
        if isinstance(weights, torch.Tensor):
            # d(z·‖w‖)/dw = z · w/‖w‖. A row of norm 0 has no direction: its subgradient here is 0.
            grad_W_dec.addcmul_((each * z_sums / weights.clamp(min=1e-30))[:, None], self.W_dec)
        torch.mm(error, self.W_dec.T, out=grad_z).add_(each * weights)
        torch.ops.aten.threshold_backward.grad_input(grad_z, z, 0, grad_input=grad_z)
        torch.mm(centred.T, grad_z, out=grad_W_enc)
        torch.sum(grad_z, 0, out=grad_b_enc)
        grad_b_dec.addmv_(self.W_enc, grad_b_enc, alpha=-1)
        parts = LossParts(
            reconstruction + sparsity * penalty, reconstruction, penalty, torch.zeros_like(penalty)
        )
        return parts, torch.count_nonzero(z, 0)
