"""The ReLU sparse autoencoder with an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity").

Shapes: batch B, embedding d, neurons m; x [B, d], z [B, m], W_enc [d, m], W_dec [m, d].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from medsae_ray.errors import InputError

DecoderNorm = Literal["unit", "weighted"]
"""What keeps neurons from dodging the penalty by small z and large W_dec: "unit" holds the rows of W_dec at
norm 1; "weighted" leaves them free and penalises z · ‖W_dec row‖ (April 2024 update of the same group)."""

Reduction = Literal["sum", "mean"]
"""Whether ‖x − x̂‖² is summed over the d dimensions (the authors' library) or averaged: λ depends on it."""


@dataclass(frozen=True)
class SAEConfig:
    """Shape and objective of an SAE. InputError where a value is out of range."""

    embedding_dim: int
    """d, the width of the embedding."""
    n_neurons: int
    """m, expansion × d."""
    sparsity: float = 3e-4
    """λ ≥ 0, the weight of the L1 penalty; what it does depends on `reduction` and the normalisation."""
    decoder_norm: DecoderNorm = "unit"
    reduction: Reduction = "sum"

    def __post_init__(self) -> None:
        if self.embedding_dim < 1 or self.n_neurons < 1:
            raise InputError(
                f"An SAE of {self.embedding_dim} dimensions and {self.n_neurons} neurons cannot be built; "
                "both must be at least 1."
            )
        if not 0 <= self.sparsity < float("inf"):
            raise InputError(f"The sparsity weight λ is {self.sparsity}; it must be 0 or more.")


class LossParts(NamedTuple):
    """Means over the batch, as 0-d tensors: reading one as a float waits for the GPU, so do that seldom."""

    loss: torch.Tensor
    """reconstruction + λ · sparsity."""
    reconstruction: torch.Tensor
    sparsity: torch.Tensor
    """The penalty before λ: Σ z, or Σ z · ‖W_dec row‖."""


class ReLUSAE(nn.Module):
    """z = ReLU((x − b_dec) W_enc + b_enc), x̂ = z W_dec + b_dec."""

    def __init__(self, config: SAEConfig, *, centre: torch.Tensor | None = None, seed: int = 0) -> None:
        """Seeded initialisation, equal on every worker; b_dec starts at `centre` [d] (default 0)."""
        super().__init__()
        self.config = config
        d, m = config.embedding_dim, config.n_neurons
        rows = torch.randn(m, d, generator=torch.Generator().manual_seed(seed))
        rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        # Half of m random neurons fire on any x, and Σ z·w over them is m/(2d) · x: this factor makes x̂ ≈ x
        # at the start, so that training begins with sparsifying instead of undoing an m/(2d)-fold overshoot.
        self.W_enc = nn.Parameter((rows.T * (2 * d / m)).contiguous())
        self.b_enc = nn.Parameter(torch.zeros(m))
        self.b_dec = nn.Parameter(
            torch.zeros(d) if centre is None else centre.to("cpu", torch.float32).clone()
        )
        check_width(self, self.b_dec.numel())
        self._scratch = torch.empty(2, 0, m)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Activations z ≥ 0 [B, m] of x [B, d]."""
        return torch.relu(torch.addmm(self.b_enc, x - self.b_dec, self.W_enc))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstruction x̂ [B, d] of z [B, m]."""
        return torch.addmm(self.b_dec, z, self.W_dec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction x̂ [B, d] of x [B, d]."""
        return self.decode(self.encode(x))

    def sparsity_weights(self) -> torch.Tensor | float:
        """What each neuron's activation counts in the penalty: 1, or its decoder norm [m]."""
        if self.config.decoder_norm == "unit":
            return 1.0
        return torch.linalg.vector_norm(self.W_dec, dim=1)

    def loss(self, x: torch.Tensor, sparsity: float | None = None) -> LossParts:
        """The objective on x [B, d], differentiable. `sparsity` is λ where it is not yet the full one."""
        z = self.encode(x)
        squares = (x - self.decode(z)).square()
        reconstruction = squares.sum(1).mean() if self.config.reduction == "sum" else squares.mean()
        penalty = (z * self.sparsity_weights()).sum(1).mean()
        weight = self.config.sparsity if sparsity is None else sparsity
        return LossParts(reconstruction + weight * penalty, reconstruction, penalty)

    @torch.no_grad()
    def write_gradients(self, x: torch.Tensor, sparsity: float, global_batch_size: int) -> LossParts:
        """Write the gradient of `loss` into every parameter's `.grad` (which must exist), in closed form.

        x [b, d] is this worker's slice of a global batch: sums over its rows are divided by
        `global_batch_size`, so that slices add up to the gradient of the whole batch. The returned parts are
        this slice's share in the same sense. The same numbers as autograd's, without one of its six matrix
        products: x − b_dec hands b_dec the gradient −W_enc · grad(b_enc), which needs no [b, d] matrix.
        """
        grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec = (
            parameter.grad for parameter in (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        )
        assert grad_W_enc is not None
        assert grad_b_enc is not None
        assert grad_W_dec is not None
        assert grad_b_dec is not None
        z, grad_z = self._scratch_pair(x)
        centred = x - self.b_dec
        torch.addmm(self.b_enc, centred, self.W_enc, out=z).relu_()
        error = torch.addmm(self.b_dec, z, self.W_dec).sub_(x)
        terms = global_batch_size * (1 if self.config.reduction == "sum" else self.config.embedding_dim)
        reconstruction = error.square().sum() / terms
        z_sums = z.sum(0)
        weights = self.sparsity_weights()
        penalty = (z_sums * weights).sum() / global_batch_size

        error *= 2 / terms
        torch.mm(z.T, error, out=grad_W_dec)
        torch.sum(error, 0, out=grad_b_dec)
        each = sparsity / global_batch_size
        if isinstance(weights, torch.Tensor):
            # d(z·‖w‖)/dw = z · w/‖w‖. A row of norm 0 has no direction: its subgradient here is 0.
            grad_W_dec.addcmul_((each * z_sums / weights.clamp(min=1e-30))[:, None], self.W_dec)
        torch.mm(error, self.W_dec.T, out=grad_z).add_(each * weights)
        torch.ops.aten.threshold_backward.grad_input(grad_z, z, 0, grad_input=grad_z)
        torch.mm(centred.T, grad_z, out=grad_W_enc)
        torch.sum(grad_z, 0, out=grad_b_enc)
        grad_b_dec.addmv_(self.W_enc, grad_b_enc, alpha=-1)
        return LossParts(reconstruction + sparsity * penalty, reconstruction, penalty)

    def _scratch_pair(self, x: torch.Tensor) -> torch.Tensor:
        """Two [b, m] matrices kept between steps: fresh ones of that size cost a page fault every 4 kB."""
        if self._scratch.shape[1] < len(x) or self._scratch.device != x.device:
            self._scratch = x.new_empty(2, len(x), self.config.n_neurons)
        return self._scratch[:, : len(x)]

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """With unit rows, remove from each decoder row's gradient the part along the row.

        That part would only change the norm, which `constrain` undoes, but Adam's moments would keep it.
        """
        if self.config.decoder_norm == "unit" and self.W_dec.grad is not None:
            along = torch.einsum("md,md->m", self.W_dec.grad, self.W_dec)
            self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        """With unit rows, bring the rows of W_dec back to norm 1."""
        if self.config.decoder_norm == "unit":
            self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp(min=1e-30))


def check_width(sae: ReLUSAE, embedding_dim: int) -> None:
    """InputError unless the SAE takes embeddings of `embedding_dim`."""
    if sae.config.embedding_dim != embedding_dim:
        raise InputError(
            f"The SAE takes embeddings of {sae.config.embedding_dim} dimensions but these have "
            f"{embedding_dim}; use the encoder it was trained on, or fit an SAE to these embeddings."
        )
