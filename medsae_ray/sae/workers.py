"""What the workers of a training exchange, so that a global batch means the same on any number of them."""

from __future__ import annotations

import torch
import torch.distributed

from medsae_ray.sae.sampling import rank_slice


class Workers:
    """One worker alone: nothing to exchange."""

    rank = 0
    world = 1

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all workers, in place."""

    def concatenate(self, rows: torch.Tensor, n: int) -> torch.Tensor:
        """All workers' rows [n, …], in rank order; this worker's are `rank_slice` of them."""
        return rows


ALONE = Workers()


class TorchWorkers(Workers):
    """The workers of torch's default process group (gloo or nccl)."""

    def __init__(self) -> None:
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def sum(self, tensor: torch.Tensor) -> None:
        torch.distributed.all_reduce(tensor)

    def concatenate(self, rows: torch.Tensor, n: int) -> torch.Tensor:
        # A sum of disjoint rows: parts of unequal length need no padding then, and x + 0 is exact.
        whole = rows.new_zeros(n, *rows.shape[1:])
        mine = rank_slice(torch.arange(n).numpy(), self.rank, self.world)
        if len(mine):
            whole[mine[0] : mine[-1] + 1] = rows
        self.sum(whole)
        return whole
