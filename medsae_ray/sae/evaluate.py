"""How good an SAE is on a split: FVE, L0, dead neurons, losses, and the mean entropy of its neurons.

All sums are float64 and mergeable: batches, or parts of a split on several workers, in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array

from medsae_ray.errors import InputError
from medsae_ray.sae.base import SparseAutoencoder, check_width
from medsae_ray.statistics import entropy as entropy_of

LOG10_DENSITY_EDGES = np.linspace(-6, 0, 25)
"""Bin edges of the density histogram: quarter decades from one image in a million to every image."""


@dataclass(frozen=True)
class Evaluation:
    """An SAE on a split. Losses are in the units of the normalised embeddings."""

    n: int
    """Number of embeddings."""
    fve: float
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖² over the whole split, the mean being the split's own; at most 1."""
    l0: float
    """Mean number of neurons firing on an embedding."""
    n_firing: np.ndarray
    """int64 [m]: embeddings on which each neuron fires."""
    reconstruction: float
    sparsity: float
    """Mean penalty before λ."""
    loss: float
    """reconstruction + λ · sparsity, with the full λ and without an auxiliary loss."""
    entropy: float
    """Mean neuron entropy in nats (see `LabelSums.entropy`); NaN where no labels were given."""

    @property
    def density(self) -> np.ndarray:
        """float64 [m]: share of the embeddings on which each neuron fires."""
        return self.n_firing / self.n

    @property
    def dead(self) -> float:
        """Share of neurons that fire on no embedding of the split."""
        return float((self.n_firing == 0).mean())

    @property
    def density_histogram(self) -> np.ndarray:
        """Living neurons in each bin of `LOG10_DENSITY_EDGES`, int64 [24]."""
        living = np.log10(self.density[self.n_firing > 0])
        return np.histogram(living.clip(LOG10_DENSITY_EDGES[0]), LOG10_DENSITY_EDGES)[0]


class EvaluationSums:
    """The sums behind `Evaluation`, without its entropy."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        d, m, device = sae.config.embedding_dim, sae.config.n_neurons, sae.W_enc.device
        self.sae = sae
        self.n = 0
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        self.total_squares = torch.zeros((), dtype=torch.float64, device=device)
        self.residual_squares = torch.zeros((), dtype=torch.float64, device=device)
        self.penalty = torch.zeros((), dtype=torch.float64, device=device)
        self.n_firing = torch.zeros(m, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, sae: SparseAutoencoder, x: torch.Tensor, z: torch.Tensor) -> None:
        """Add embeddings x [b, d] and their activations z [b, m], on the SAE's device."""
        if not len(x):
            return
        rows = x.double()
        self.residual_squares += (sae.decode(z).double() - rows).square().sum()
        self.penalty += sae.penalty(x, z)
        self.n_firing += (z > 0).sum(0)
        mean = rows.mean(0)
        self._add_spread(len(x), mean, (rows - mean).square().sum())

    def merge(self, other: EvaluationSums) -> None:
        """Add another part of the split."""
        if not other.n:
            return
        device = self.mean.device
        self.residual_squares += other.residual_squares.to(device)
        self.penalty += other.penalty.to(device)
        self.n_firing += other.n_firing.to(device)
        self._add_spread(other.n, other.mean.to(device), other.total_squares.to(device))

    def _add_spread(self, n: int, mean: torch.Tensor, squares: torch.Tensor) -> None:
        # Chan, Golub & LeVeque (1983): no difference of two large sums, however far the mean is from 0.
        total, shift = self.n + n, mean - self.mean
        self.total_squares += squares + (shift @ shift) * (self.n * n / total)
        self.mean = self.mean + shift * (n / total)
        self.n = total

    def finish(self, entropy: float = math.nan) -> Evaluation:
        """The figures. InputError if no embedding was added. FVE is NaN where all embeddings are equal."""
        if not self.n:
            raise InputError("The split to evaluate on is empty; check the split settings.")
        residual, total = float(self.residual_squares), float(self.total_squares)
        n_firing = self.n_firing.cpu().numpy()
        reconstruction = residual / self.sae.terms(self.n)
        sparsity = float(self.penalty) / self.n
        return Evaluation(
            n=self.n,
            fve=1 - residual / total if total > 0 else math.nan,
            l0=float(n_firing.sum() / self.n),
            n_firing=n_firing,
            reconstruction=reconstruction,
            sparsity=sparsity,
            loss=reconstruction + self.sae.config.sparsity * sparsity,
            entropy=entropy,
        )


class LabelSums:
    """Sums behind Pearson's r of every neuron with every label, over the images that have the label."""

    def __init__(self, n_neurons: int, n_labels: int, device: torch.device | str = "cpu") -> None:
        per_neuron = torch.zeros(n_neurons, n_labels, dtype=torch.float64, device=device)
        per_label = torch.zeros(n_labels, dtype=torch.float64, device=device)
        self.z, self.zz, self.zy = per_neuron, per_neuron.clone(), per_neuron.clone()
        self.n, self.y, self.yy = per_label, per_label.clone(), per_label.clone()
        self.n_firing = torch.zeros(n_neurons, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, z: torch.Tensor, y: torch.Tensor, known: torch.Tensor) -> None:
        """Add activations z [b, m] with labels y [b, L] where `known` [b, L]; elsewhere y may be anything."""
        device = self.z.device
        mask = known.to(device, torch.float64)
        labels = torch.where(known.to(device), y.to(device, torch.float64), 0.0)
        by_neuron = z.to(device, torch.float64).T
        self.n_firing += (by_neuron > 0).sum(1)
        self.zy.addmm_(by_neuron, labels)
        self.z.addmm_(by_neuron, mask)
        self.zz.addmm_(by_neuron.square(), mask)
        self.n += mask.sum(0)
        self.y += labels.sum(0)
        self.yy += labels.square().sum(0)

    def merge(self, other: LabelSums) -> None:
        """Add another part of the split."""
        for name in ("z", "zz", "zy", "n", "y", "yy", "n_firing"):
            mine = getattr(self, name)
            mine += getattr(other, name).to(mine.device)

    def correlation(self) -> torch.Tensor:
        """Pearson's r, float64 [m, L]; NaN where neuron or label is constant over the known images."""
        n = self.n.clamp(min=1)
        z_spread = self.zz - self.z.square() / n
        y_spread = self.yy - self.y.square() / n
        # float32 activations carry a relative error of 6e-8; less spread than that is a constant.
        constant = (z_spread <= 1e-13 * self.zz) | (y_spread <= 1e-13 * self.yy)
        r = (self.zy - self.z * self.y / n) / (z_spread.clamp(min=0) * y_spread.clamp(min=0)).sqrt()
        return torch.where(constant, torch.nan, r).clamp(-1, 1)

    def entropy(self, min_firing: int = 1) -> float:
        """Mean over neurons firing on ≥ `min_firing` images of H = −Σ p ln p, p = |r| / Σ|r|, in nats.

        Labels without a defined r stay out of the sum (paper.md, row "entropy"). NaN where no neuron is left.
        """
        entropy = entropy_of(self.correlation().cpu().numpy())
        entropy = entropy[(self.n_firing >= min_firing).cpu().numpy() & ~np.isnan(entropy)]
        return float(entropy.mean()) if len(entropy) else math.nan


def label_entropy(
    z: torch.Tensor | csr_array,
    y: torch.Tensor,
    known: torch.Tensor,
    min_firing: int = 1,
    batch_size: int = 1024,
) -> float:
    """Mean neuron entropy of activations z [n, m], dense or sparse, with y where `known`, [n, L] each."""
    sums = LabelSums(z.shape[1], y.shape[1])
    for start in range(0, len(y), batch_size):
        rows = slice(start, start + batch_size)
        part = z[rows] if isinstance(z, torch.Tensor) else torch.from_numpy(z[rows].toarray())
        sums.update(part, y[rows], known[rows])
    return sums.entropy(min_firing)


@torch.inference_mode()
def evaluate(
    sae: SparseAutoencoder,
    x: torch.Tensor,
    batch_size: int = 4096,
    labels: tuple[torch.Tensor, torch.Tensor] | None = None,
    min_firing: int = 1,
) -> Evaluation:
    """One pass over normalised embeddings x [n, d]; `labels`, (y, known) [n, L] each, add the entropy."""
    check_width(sae, x.shape[1])
    device = sae.W_enc.device
    sums = EvaluationSums(sae)
    label_sums = None if labels is None else LabelSums(sae.config.n_neurons, labels[0].shape[1], device)
    for start in range(0, len(x), batch_size):
        rows = slice(start, start + batch_size)
        batch = x[rows].to(device)
        z = sae.encode(batch)
        sums.update(sae, batch, z)
        if labels is not None and label_sums is not None:
            label_sums.update(z, labels[0][rows], labels[1][rows])
    return sums.finish(math.nan if label_sums is None else label_sums.entropy(min_firing))


def selection_score(entropy: float, fve: float, floor: float = 0.95) -> float:
    """What picks a checkpoint, smaller is better: `entropy` where FVE > `floor`, else 10 + (1 − FVE).

    By entropy alone, early checkpoints that reconstruct nothing would win. Infinite where a needed figure is
    NaN, so that such a checkpoint is never chosen over another.
    """
    score = entropy if fve > floor else 10 + (1 - fve)
    return math.inf if math.isnan(score) else score
