"""Dead neurons start anew from embeddings that are reconstructed badly (Bricken et al. 2023, appendix)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from medsae_ray.sae.base import SparseAutoencoder

ENCODER_SHARE = 0.2
"""Norm of a restarted neuron's encoder weights, as a share of the living neurons' mean."""


@torch.no_grad()
def restart_dead_neurons(
    sae: SparseAutoencoder,
    optimiser: torch.optim.Optimizer,
    dead: torch.Tensor,
    x: torch.Tensor,
    seed: Sequence[int],
) -> torch.Tensor:
    """Give dead neurons [r] the directions of embeddings of x [n, d], drawn by their squared loss.

    x is the whole global batch, so every worker draws the same from the same `seed`. No embedding is drawn
    twice, as neurons that start equal stay equal: where more are dead than there are embeddings with an
    error, the rest must wait. Moments in Adam start at 0 again. Returns the neurons that started anew.
    """
    living = torch.ones(sae.config.n_neurons, dtype=torch.bool, device=x.device)
    living[dead] = False
    if not len(dead) or not living.any():
        return dead[:0]
    losses = (sae(x) - x).square().sum(1).double().square().cpu().numpy()
    n = min(len(dead), int(np.count_nonzero(losses)))
    if not losses.sum() > 0:
        return dead[:0]
    drawn = np.random.default_rng(seed).choice(len(x), n, replace=False, p=losses / losses.sum())
    dead = dead[:n]
    directions = x[torch.from_numpy(drawn).to(x.device)] - sae.b_dec
    directions = directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True).clamp(min=1e-30)
    norm = torch.linalg.vector_norm(sae.W_enc[:, living], dim=0).mean()
    sae.restart_neurons(dead, directions, ENCODER_SHARE * float(norm))
    for name, parameter in sae.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = optimiser.state[parameter][moment]
            if name == "W_enc":
                kept[:, dead] = 0
            elif name != "b_dec":
                kept[dead] = 0
    return dead
