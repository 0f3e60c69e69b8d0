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

    x is the whole global batch, so every worker draws the same from the same `seed`. Neurons that start equal
    stay equal: once every embedding was drawn, those drawn again are moved part of the way towards another
    (ours, for batches of fewer embeddings than neurons are dead). Moments in Adam start at 0 again. Returns
    the neurons that started anew: all, or none where no embedding has a loss.
    """
    living = torch.ones(sae.config.n_neurons, dtype=torch.bool, device=x.device)
    living[dead] = False
    if not len(dead) or not living.any():
        return dead[:0]
    losses = (sae(x) - x).square().sum(1).double().square().cpu().numpy()
    if not losses.sum() > 0:
        return dead[:0]
    generator, p = np.random.default_rng(seed), losses / losses.sum()
    first = generator.choice(len(x), min(len(dead), int(np.count_nonzero(p))), replace=False, p=p)
    again = generator.choice(len(x), len(dead) - len(first), p=p)
    drawn = np.concatenate([first, again])
    towards = (drawn + generator.integers(1, max(2, len(x)), len(dead))) % len(x)
    turned = np.concatenate([np.zeros(len(first)), generator.uniform(0, 0.5, len(again))])
    rows, others, share = (torch.from_numpy(array).to(x.device) for array in (drawn, towards, turned))
    directions = torch.lerp(x[rows], x[others], share[:, None].to(x.dtype)) - sae.b_dec
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
