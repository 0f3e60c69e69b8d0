"""TopK with AuxK (Gao et al. 2024, arXiv 2406.04093) and BatchTopK (Bussmann et al. 2024, 2412.06410)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from medsae_ray.sae.base import Architecture, LossParts, SAEConfig, SparseAutoencoder
from medsae_ray.sae.workers import ALONE, Workers

THRESHOLD_RATE = 0.01
"""How fast BatchTopK's inference threshold follows that of the batches: a mean over about 100 of them."""


class TopKSAE(SparseAutoencoder):
    """z = ReLU of the k largest of π = (x − b_dec) W_enc + b_enc; no sparsity term.

    AuxK (appendix A.2 there): the `k_aux` largest π among the neurons that are dead in training reconstruct
    the error e = x − x̂; the auxiliary loss is α ‖e − ê‖², with e held constant.
    """

    architecture: ClassVar[Architecture] = "topk"
    saelens_name = "topk"
    has_sparsity = False

    def __init__(self, config: SAEConfig, *, centre: torch.Tensor | None = None, seed: int = 0) -> None:
        super().__init__(config, centre=centre, seed=seed)
        self.b_enc = nn.Parameter(torch.zeros(config.n_neurons))

    def encoder_scale(self) -> float:
        """1: of k neurons alone x̂ does not overshoot."""
        return 1.0

    @property
    def k_aux(self) -> int:
        """Dead neurons that reconstruct the error of an embedding: d / 2."""
        return max(1, self.config.embedding_dim // 2)

    def _pre(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b_enc, x - self.b_dec, self.W_enc)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return _largest(self._pre(x), self.config.k)

    def select(self, pre: torch.Tensor, n: int, workers: Workers) -> torch.Tensor:
        """Activations [b, m] in training, from the pre-activations [b, m] of a slice of n embeddings."""
        return _largest(pre, self.config.k)

    def reconstruction(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x̂ [b, d] and the sum of squares that training minimises, 0-d."""
        rebuilt = self.decode(z)
        return rebuilt, (x - rebuilt).square().sum()

    def objective(
        self, x: torch.Tensor, sparsity: float, n: int, workers: Workers = ALONE
    ) -> tuple[torch.Tensor, LossParts, torch.Tensor]:
        pre = self._pre(x)
        z = self.select(pre, n, workers)
        rebuilt, squares = self.reconstruction(x, z)
        reconstruction = squares / self.terms(n)
        auxiliary = self._auxk(pre, (x - rebuilt).detach()) * (self.config.auxk / self.terms(n))
        loss = reconstruction + auxiliary
        parts = LossParts(loss, reconstruction, torch.zeros_like(loss), auxiliary)
        return loss, parts, torch.count_nonzero(z, 0)

    def _auxk(self, pre: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        if self.dead is None or self.config.auxk == 0:
            return error.new_zeros(())
        dead = self.dead.nonzero().squeeze(1)
        if not len(dead):
            return error.new_zeros(())
        z = _largest(pre[:, dead], min(self.k_aux, len(dead)))
        return (error - z @ self.W_dec[dead]).square().sum()

    def describe(self) -> dict[str, object]:
        return {"k": self.config.k, "rescale_acts_by_decoder_norm": False}


class BatchTopKSAE(TopKSAE):
    """As TopK, but the k · n largest π of a whole batch of n embeddings fire, over all workers.

    At inference a neuron fires where π > θ, one threshold for all: the mean over the last batches of the
    smallest π that fired (section 3 there). Until it was trained θ is 0.
    """

    architecture: ClassVar[Architecture] = "batchtopk"
    saelens_name = "jumprelu"
    threshold: torch.Tensor
    n_batches: torch.Tensor

    def __init__(self, config: SAEConfig, *, centre: torch.Tensor | None = None, seed: int = 0) -> None:
        super().__init__(config, centre=centre, seed=seed)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("n_batches", torch.zeros(()))
        self._smallest = torch.zeros(())

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        pre = self._pre(x)
        return pre * (pre > self.threshold)

    def select(self, pre: torch.Tensor, n: int, workers: Workers) -> torch.Tensor:
        self._smallest = smallest_selected(pre.detach(), self.config.k * n, workers)
        return pre * ((pre >= self._smallest) & (pre > 0))

    def write_gradients(
        self, x: torch.Tensor, sparsity: float, n: int, workers: Workers = ALONE
    ) -> tuple[LossParts, torch.Tensor]:
        told = super().write_gradients(x, sparsity, n, workers)
        self.n_batches += 1
        # A plain mean at first, so that the 0 it starts from does not linger.
        rate = (1 / self.n_batches).clamp(min=THRESHOLD_RATE)
        self.threshold += rate * (self._smallest - self.threshold)
        return told

    @torch.no_grad()
    def export(self) -> dict[str, torch.Tensor]:
        weights = super().export()
        del weights["n_batches"]
        return {**weights, "threshold": weights["threshold"].expand(self.config.n_neurons).clone()}

    def describe(self) -> dict[str, object]:
        return {}


def smallest_selected(pre: torch.Tensor, n_selected: int, workers: Workers) -> torch.Tensor:
    """The `n_selected`-th largest of all workers' pre-activations [b, m] above 0, or 0 where there are fewer.

    Each worker offers as many of its own as could be among them, so the answer is exact.
    """
    offered = torch.relu(pre.flatten())
    if workers.world > 1:
        mine = offered.new_zeros(workers.world, n_selected)
        largest = offered.topk(min(n_selected, len(offered)), sorted=False).values
        mine[workers.rank, : len(largest)] = largest
        workers.sum(mine)
        offered = mine.flatten()
    if len(offered) < n_selected:
        return offered.new_zeros(())
    return offered.topk(n_selected, sorted=False).values.min()


def _largest(pre: torch.Tensor, k: int) -> torch.Tensor:
    """ReLU of the k largest of each row of [b, m]; 0 elsewhere."""
    values, neurons = pre.topk(k, dim=1, sorted=False)
    return torch.zeros_like(pre).scatter(1, neurons, torch.relu(values))
