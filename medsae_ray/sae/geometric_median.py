"""The point of least summed distance to all embeddings: where the SAE's decoder bias starts."""

from __future__ import annotations

import torch


def geometric_median(
    x: torch.Tensor, tolerance: float = 1e-6, max_iterations: int = 200, batch_size: int = 8192
) -> torch.Tensor:
    """Geometric median of rows x [n, d] by Weiszfeld's iteration, float64 [d].

    Stops when a move is below `tolerance` × the mean distance of the rows, or after `max_iterations`.
    Rows that coincide with the current point are handled as in Vardi & Zhang (2000, PNAS 97:1423), so a
    start on a data point neither divides by zero nor gets stuck.
    """
    batches = x.split(batch_size)
    point = x.mean(dim=0, dtype=torch.float64)
    for _ in range(max_iterations):
        weighted = torch.zeros_like(point)
        weights = point.new_zeros(())
        distance = point.new_zeros(())
        n_here = 0
        for batch in batches:
            # A batch at a time, so that a float64 copy of the whole split is never held.
            rows = batch.double()
            distances = torch.linalg.vector_norm(rows - point, dim=1)
            apart = distances > 0
            inverse = torch.where(apart, 1 / distances, 0)
            weighted += inverse @ rows
            weights += inverse.sum()
            distance += distances.sum()
            n_here += int((~apart).sum())
        if weights == 0:
            return point
        step = weighted / weights - point
        pull = torch.linalg.vector_norm(step) * weights
        if n_here:
            step = step * (1 - n_here / pull).clamp(min=0) if pull > 0 else torch.zeros_like(step)
        point = point + step
        if torch.linalg.vector_norm(step) <= tolerance * distance / len(x):
            break
    return point
