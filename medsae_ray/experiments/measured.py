"""One fitted SAE measured for an experiment: on the run's embeddings, without writing any table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from medsae_ray.measure import (
    CLAIM_AUROC,
    Bools,
    Floats,
    ReconstructionState,
    chosen_neurons,
    claim,
    entropy_means,
    neurons_table,
)
from medsae_ray.sae.base import SparseAutoencoder
from medsae_ray.sae.sparse import sparse_activations
from medsae_ray.stages.splits import Split, measure_splits
from medsae_ray.statistics import entropy


@dataclass(frozen=True)
class Measured:
    """Figures of one SAE; of the test split unless the name says otherwise. NaN where undefined."""

    fve: float
    l0: float
    dead: float
    """Share of neurons that fire on no test embedding."""
    dead_train: float
    """The same of the training split."""
    n_living: int
    """Neurons behind the entropy: those that fire on at least `min_firing` test embeddings."""
    entropy: float
    """Mean over them, in nats."""
    entropy_low: float
    entropy_high: float
    """95 % interval of it over patients."""
    entropy_floor: float
    """The same mean under permuted labels."""
    best_auroc: float
    """Mean over the labels of the AUROC of the neuron chosen on validation."""
    labels_separated: int
    n_labels: int
    """Labels with enough test positives for a claim (`measure.min_positives`)."""
    share_separated: float
    """labels_separated / n_labels."""
    share_above: float
    """Of the same labels, the share whose chosen neuron has an AUROC above 0.8, whatever its interval."""


def measure_sae(
    sae: SparseAutoencoder,
    splits: dict[str, Split],
    *,
    min_firing: int,
    min_positives: int,
    permutations: int,
    resamples: int = 200,
    seed: int = 0,
) -> Measured:
    """Measure an SAE that takes raw embeddings."""
    fired = {name: _activations(sae, split) for name, split in splits.items()}
    units = measure_splits(fired, splits, permutations=permutations, seed=seed)
    test, z = splits["test"], fired["test"]
    rebuilt = ReconstructionState(test.x.shape[1], sae.config.n_neurons)
    W_dec, b_dec = sae.W_dec.detach().numpy(), sae.b_dec.detach().numpy()
    rebuilt.update(test.x, z @ W_dec + b_dec, z.indices)
    dead_train = np.bincount(fired["train"].indices, minlength=sae.config.n_neurons) == 0
    mean = entropy_means(
        neurons_table(units["test"], units["valid"], dead_train), min_firing=min_firing
    ).living
    low, high = entropy_interval(
        z, test.y, test.known, test.patients, min_firing=min_firing, resamples=resamples, seed=seed
    )
    chosen = chosen_neurons(units["test"], units["valid"], min_firing=min_firing).to_pylist()
    told = [claim(row, min_positives) for row in chosen]
    areas = [row["auroc"] for row in told if row["auroc"] is not None]
    enough = [row for row in told if row["enough_positives"]]
    separated = sum(row["separated"] for row in enough)
    above = sum((row["auroc"] or 0) > CLAIM_AUROC for row in enough)
    return Measured(
        fve=rebuilt.fve,
        l0=rebuilt.l0,
        dead=float(rebuilt.dead.mean()),
        dead_train=float(dead_train.mean()),
        n_living=mean.n_units,
        entropy=mean.entropy,
        entropy_low=low,
        entropy_high=high,
        entropy_floor=mean.floor,
        best_auroc=float(np.mean(areas)) if areas else float("nan"),
        labels_separated=separated,
        n_labels=len(enough),
        share_separated=separated / len(enough) if enough else float("nan"),
        share_above=above / len(enough) if enough else float("nan"),
    )


def _activations(sae: SparseAutoencoder, split: Split) -> csr_array:
    firing = sparse_activations(sae, torch.tensor(split.x))
    shape = (len(split.x), sae.config.n_neurons)
    return csr_array((firing.value, firing.neuron, firing.indptr), shape=shape)


def entropy_interval(
    z: csr_array,
    y: Floats,
    known: Bools,
    patients: NDArray[np.int64],
    *,
    min_firing: int,
    resamples: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % bootstrap interval over patients of the mean entropy of the living neurons, in nats.

    z [n, m] sparse, y and known [n, L], patients [n]. The neurons are those that fire on at least
    `min_firing` of the images; one that is constant in a resample is left out of it. Resampling adds noise to
    every r and so shifts every entropy; the shift is taken out, so that the interval lies about the figure
    and is one for the mean entropy at this number of patients, as the floor is. NaN where no neuron has an
    entropy.
    """
    living = np.bincount(z.indices, minlength=z.shape[1]) >= max(min_firing, 1)
    if not living.any():
        return float("nan"), float("nan")
    by_neuron = csr_array(csr_array(z)[:, np.flatnonzero(living)].T.astype(np.float64))
    squared = by_neuron.multiply(by_neuron).tocsr()
    labels = np.where(known, y, 0.0)
    _, patient = np.unique(patients, return_inverse=True)
    n_patients = int(patient.max()) + 1

    def mean_entropy(weight: Floats) -> float:
        w = weight[:, None]
        counts, sums = (w * known).sum(0), (w * labels).sum(0)
        means = by_neuron @ np.hstack([w * known, w * labels])
        zs, zy = np.split(means, 2, axis=1)
        zz = squared @ (w * known)
        n = np.maximum(counts, 1)
        variance, label_variance = zz - zs**2 / n, sums - sums**2 / n
        # Rounding leaves a constant neuron a trace of variance.
        varies = (variance > 1e-12 * zz) & (label_variance > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            r = np.where(varies, (zy - zs * sums / n) / np.sqrt(variance * label_variance), np.nan)
        entropies = entropy(r)
        defined = entropies[~np.isnan(entropies)]
        return float(defined.mean()) if defined.size else float("nan")

    rng, shares = np.random.default_rng(seed), np.full(n_patients, 1 / n_patients)
    estimate = mean_entropy(np.ones(len(y)))
    drawn = np.array(
        [
            mean_entropy(rng.multinomial(n_patients, shares)[patient].astype(np.float64))
            for _ in range(resamples)
        ]
    )
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        return float("nan"), float("nan")
    low, high = estimate - drawn.mean() + np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
