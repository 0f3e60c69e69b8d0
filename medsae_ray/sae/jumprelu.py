"""The JumpReLU sparse autoencoder (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medsae_ray.sae.base import LossParts, SAEConfig, SparseAutoencoder
from medsae_ray.sae.workers import ALONE, Workers

INITIAL_THRESHOLD = 1e-3
"""θ at the start (appendix there), in units of the pre-activation at a mean squared norm of 1."""


class _Jump(torch.autograd.Function):
    """π · H(π − θ), with the straight-through derivative −θ/ε · K((π − θ)/ε) for θ (equation 11 there)."""

    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = _kernel(pre, threshold, ctx.bandwidth)
        for_threshold = (gradients[0] * near).sum(0) * (-threshold / ctx.bandwidth)
        return gradients[0] * (pre > threshold), for_threshold, None


class _Fires(torch.autograd.Function):
    """H(π − θ), with the straight-through derivative −1/ε · K((π − θ)/ε) for θ, none for π (equation 12)."""

    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = _kernel(pre, threshold, ctx.bandwidth)
        return None, (gradients[0] * near).sum(0) / -ctx.bandwidth, None


def _kernel(pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """The rectangle K((π − θ)/ε): whether π is within ε/2 of θ."""
    return (pre - threshold).abs() < bandwidth / 2


class JumpReLUSAE(SparseAutoencoder):
    """z = π · H(π − θ), π = (x − b_dec) W_enc + b_enc, with a threshold θ > 0 a neuron.

    The sparsity term is L0, the number of firing neurons; or, with `config.l0`, (L0 / l0 − 1)² of each
    embedding (equation 40 there), so that λ need not be searched for. θ learns by straight-through
    estimators alone; it is a parameter itself, held at 0 or above, and not its logarithm, which would need
    several thousand steps of Adam to grow a hundredfold.
    """

    architecture = "jumprelu"
    saelens_name = "jumprelu"

    def __init__(self, config: SAEConfig, *, centre: torch.Tensor | None = None, seed: int = 0) -> None:
        super().__init__(config, centre=centre, seed=seed)
        self.b_enc = nn.Parameter(torch.zeros(config.n_neurons))
        self.threshold = nn.Parameter(torch.full((config.n_neurons,), INITIAL_THRESHOLD))

    def _pre(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b_enc, x - self.b_dec, self.W_enc)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        pre = self._pre(x)
        return pre * (pre > self.threshold)

    def penalty(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self._of_each(torch.count_nonzero(z, 1).double()).sum()

    def _of_each(self, l0: torch.Tensor) -> torch.Tensor:
        """The sparsity term of each embedding [B], from its number of firing neurons."""
        return l0 if self.config.l0 is None else (l0 / self.config.l0 - 1).square()

    def objective(
        self, x: torch.Tensor, sparsity: float, n: int, workers: Workers = ALONE
    ) -> tuple[torch.Tensor, LossParts, torch.Tensor]:
        pre = self._pre(x)
        z = _Jump.apply(pre, self.threshold, self.config.bandwidth)
        l0 = _Fires.apply(pre, self.threshold, self.config.bandwidth).sum(1)
        reconstruction = (x - self.decode(z)).square().sum() / self.terms(n)
        penalty = self._of_each(l0).sum() / n
        loss = reconstruction + sparsity * penalty
        parts = LossParts(loss, reconstruction, penalty, torch.zeros_like(loss))
        return loss, parts, torch.count_nonzero(z, 0)

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        self.threshold.clamp_(min=0)

    @torch.no_grad()
    def restart_neurons(self, neurons: torch.Tensor, directions: torch.Tensor, scale: float) -> None:
        super().restart_neurons(neurons, directions, scale)
        self.threshold[neurons] = INITIAL_THRESHOLD
