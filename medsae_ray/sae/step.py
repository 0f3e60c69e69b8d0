"""One training step: gradients, their sum over workers, the constraint and the optimiser, behind one call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from medsae_ray.errors import InputError
from medsae_ray.sae.relu import LossParts, ReLUSAE

AllReduce = Callable[[torch.Tensor], object]
"""Replaces a tensor by its sum over all workers, in place, as `torch.distributed.all_reduce` does."""


class TrainStep:
    """Adam on an SAE; λ rises linearly to its full value over the first `sparsity_warmup_steps` steps."""

    def __init__(
        self,
        sae: ReLUSAE,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        sparsity_warmup_steps: int = 0,
    ) -> None:
        """Move `sae` to its device before. `learning_rate` > 0, `betas` in [0, 1), steps ≥ 0."""
        if not learning_rate > 0:
            raise InputError(f"The learning rate is {learning_rate}; it must be above 0.")
        self.sae = sae
        self.n_steps = 0
        self.sparsity_warmup_steps = sparsity_warmup_steps
        parameters = list(sae.parameters())
        # Every gradient is a view of one tensor, with two places for the loss parts: workers exchange it in
        # one call and nothing is copied.
        sizes = [parameter.numel() for parameter in parameters]
        self._exchange = parameters[0].new_zeros(sum(sizes) + 2)
        for parameter, part in zip(parameters, self._exchange[:-2].split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.optimiser = torch.optim.Adam(parameters, lr=learning_rate, betas=betas, fused=True)

    @property
    def sparsity(self) -> float:
        """λ of the next step."""
        warm = 1.0 if self.sparsity_warmup_steps == 0 else (self.n_steps + 1) / self.sparsity_warmup_steps
        return self.sae.config.sparsity * min(1.0, warm)

    @torch.no_grad()
    def step(
        self, batch_slice: torch.Tensor, global_batch_size: int, all_reduce: AllReduce | None = None
    ) -> LossParts:
        """Train on one global batch, of which `batch_slice` [b, d] is this worker's part (b may be 0).

        Every worker makes the same call and holds the same weights after it: gradients are sums over the
        slice divided by `global_batch_size`, summed by `all_reduce`. Returns the parts of the whole batch.
        """
        sparsity = self.sparsity
        parts = self.sae.write_gradients(batch_slice, sparsity, global_batch_size)
        if all_reduce is not None:
            self._exchange[-2], self._exchange[-1] = parts.reconstruction, parts.sparsity
            all_reduce(self._exchange)
            reconstruction, penalty = self._exchange[-2:].clone()
            parts = LossParts(reconstruction + sparsity * penalty, reconstruction, penalty)
        self.sae.constrain_gradients()
        self.optimiser.step()
        self.sae.constrain()
        self.n_steps += 1
        return parts

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-identical continuation needs; tensors and numbers, so `weights_only` loads it."""
        return {
            "sae": self.sae.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "n_steps": self.n_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; the SAE must have the same shape."""
        self.sae.load_state_dict(state["sae"])
        # torch keeps the tensors it is given, and would then train the source of an in-memory state along.
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self.n_steps = int(state["n_steps"])
