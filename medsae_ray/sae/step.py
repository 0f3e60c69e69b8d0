"""One training step: gradients, their sum over workers, the constraint and the optimiser, behind one call."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from medsae_ray.errors import InputError
from medsae_ray.sae.base import LossParts, SparseAutoencoder
from medsae_ray.sae.resampling import restart_dead_neurons
from medsae_ray.sae.workers import ALONE, Workers


@dataclass(frozen=True)
class Schedule:
    """What changes over the steps; 0 switches each off."""

    n_steps: int = 0
    """Steps of the whole training; only the decay needs it."""
    sparsity_warmup: int = 0
    """Steps over which λ rises linearly to its full value."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly to its full value."""
    decay: int = 0
    """Last steps over which the learning rate falls linearly towards 0."""
    dead_after: int = 0
    """Steps without firing, over the whole global batch, after which a neuron is dead (0: never)."""
    resample_every: int = 0
    """Steps between two restarts of dead neurons, up to half of `n_steps`."""

    def sparsity_share(self, step: int) -> float:
        """Share of λ at a step, counted from 0."""
        return min(1.0, (step + 1) / self.sparsity_warmup) if self.sparsity_warmup else 1.0

    def rate_share(self, step: int) -> float:
        """Share of the learning rate at a step, counted from 0; never 0."""
        share = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return min(share, max(1, self.n_steps - step) / self.decay) if self.decay else share

    def resamples(self, step: int) -> bool:
        """Whether dead neurons start anew after `step` steps."""
        return bool(self.resample_every and step % self.resample_every == 0 and 0 < step <= self.n_steps // 2)


class TrainStep:
    """Adam on an SAE, with its schedule and the care for dead neurons."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: Schedule | None = None,
        seed: int = 0,
    ) -> None:
        """Move `sae` to its device before. `learning_rate` > 0, `betas` in [0, 1)."""
        if not learning_rate > 0:
            raise InputError(f"The learning rate is {learning_rate}; it must be above 0.")
        self.sae = sae
        self.n_steps = 0
        self.learning_rate = learning_rate
        self.schedule = schedule or Schedule()
        self.seed = seed
        parameters = list(sae.parameters())
        m = sae.config.n_neurons
        self.silent_steps = torch.zeros(m, dtype=torch.int64, device=sae.W_enc.device)
        """Steps in a row on which each neuron fired on no embedding of the global batch, [m]."""
        # Every gradient is a view of one tensor, with places for the neurons' firing counts and the loss
        # parts: workers exchange it in one call and nothing is copied.
        sizes = [parameter.numel() for parameter in parameters]
        self._exchange = parameters[0].new_zeros(sum(sizes) + m + 4)
        *gradients, self.fired, self._parts = self._exchange.split([*sizes, m, 4])
        for parameter, part in zip(parameters, gradients, strict=True):
            parameter.grad = part.view_as(parameter)
        """`fired` [m] is how often each neuron fired on the last global batch."""
        self.optimiser = torch.optim.Adam(parameters, lr=learning_rate, betas=betas, fused=True)

    @property
    def sparsity(self) -> float:
        """λ of the next step."""
        return self.sae.config.sparsity * self.schedule.sparsity_share(self.n_steps)

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.learning_rate * self.schedule.rate_share(self.n_steps)

    @torch.no_grad()
    def step(self, batch_slice: torch.Tensor, n: int, workers: Workers = ALONE) -> LossParts:
        """Train on one global batch of n embeddings, of which `batch_slice` [b, d] is this worker's (b ≥ 0).

        Every worker makes the same call and holds the same weights after it: gradients are sums over the
        slice divided by n, summed over the workers. Returns the parts of the whole batch.
        """
        after = self.schedule.dead_after
        self.sae.dead = self.silent_steps >= after if after else None
        parts, fired = self.sae.write_gradients(batch_slice, self.sparsity, n, workers)
        self.fired.copy_(fired)
        torch.stack(list(parts), out=self._parts)
        workers.sum(self._exchange)
        parts = LossParts(*self._parts.clone())
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        self.sae.constrain_gradients()
        self.optimiser.step()
        self.sae.constrain()
        self.finish(batch_slice, n, workers)
        return parts

    @torch.no_grad()
    def finish(self, batch_slice: torch.Tensor, n: int, workers: Workers = ALONE) -> None:
        """Count a step whose `fired` is known, and let dead neurons start anew where that is due."""
        self.silent_steps = torch.where(self.fired > 0, 0, self.silent_steps + 1)
        self.n_steps += 1
        if self.schedule.resamples(self.n_steps):
            dead = (self.silent_steps >= (self.schedule.dead_after or 1)).nonzero().squeeze(1)
            whole = workers.concatenate(batch_slice, n)
            anew = restart_dead_neurons(self.sae, self.optimiser, dead, whole, [self.seed, self.n_steps])
            self.silent_steps[anew] = 0

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-identical continuation needs; tensors and numbers, so `weights_only` loads it."""
        return {
            "sae": self.sae.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "n_steps": self.n_steps,
            "silent_steps": self.silent_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; the SAE must have the same shape."""
        self.sae.load_state_dict(state["sae"])
        # torch keeps the tensors it is given, and would then train the source of an in-memory state along.
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self.n_steps = int(state["n_steps"])
        self.silent_steps.copy_(state["silent_steps"])
