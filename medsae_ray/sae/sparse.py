"""Only the firing neurons of each embedding, as the `activations` table and the measures keep them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from medsae_ray.sae.base import SparseAutoencoder, check_width


class SparseActivations(NamedTuple):
    """Compressed rows (CSR): embedding i fires `neuron[indptr[i]:indptr[i + 1]]`, ascending."""

    indptr: np.ndarray
    """int64 [n + 1]."""
    neuron: np.ndarray
    """int32 [n_firing]."""
    value: np.ndarray
    """float32 [n_firing], each > 0."""


@torch.inference_mode()
def sparse_activations(sae: SparseAutoencoder, x: torch.Tensor, batch_size: int = 4096) -> SparseActivations:
    """Encode x [n, d], at most [batch_size, m] dense at a time. InputError on another width."""
    check_width(sae, x.shape[1])
    device = sae.W_enc.device
    counts, neurons, values = [np.zeros(1, np.int64)], [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    for batch in x.split(batch_size):
        z = sae.encode(batch.to(device, torch.float32))
        row, neuron = z.nonzero(as_tuple=True)
        counts.append(torch.bincount(row, minlength=len(batch)).cpu().numpy())
        neurons.append(neuron.to(torch.int32).cpu().numpy())
        values.append(z[row, neuron].cpu().numpy())
    return SparseActivations(
        np.cumsum(np.concatenate(counts)),
        np.concatenate(neurons),
        np.concatenate(values),
    )
