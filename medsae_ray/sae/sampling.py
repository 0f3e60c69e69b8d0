"""Which embedding is in which batch: a function of (seed, epoch) alone, so any number of workers agrees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n rows in an epoch, int64 [n]; rows are those of the table sorted by `image_id`."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def global_batches(n: int, batch_size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """The epoch's global batches of row numbers; each row once.

    The last, incomplete batch is kept: a step divides by the batch's own size, so its gradient is an honest
    mean, and no embedding is left out of an epoch.
    """
    order = epoch_permutation(n, seed, epoch)
    for start in range(0, n, batch_size):
        yield order[start : start + batch_size]


def rank_slice(indices: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The contiguous part of a global batch for worker `rank` of `world`; sizes differ by at most 1."""
    return indices[len(indices) * rank // world : len(indices) * (rank + 1) // world]
