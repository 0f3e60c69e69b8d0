"""Which trials of a sweep are best: by selection score, and by four figures at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COSTS = {"fve": -1, "l0": 1, "dead": 1, "entropy": 1}
"""The figures of the front, by their names in `history`, with the sign that makes smaller better."""


def costs(rows: Sequence[dict[str, float]]) -> np.ndarray:
    """Figures of some evaluations as costs, float64 [n, 4]: smaller is better in every column."""
    return np.array([[sign * float(row[name]) for name, sign in COSTS.items()] for row in rows]).reshape(
        len(rows), len(COSTS)
    )


def pareto_front(costs: np.ndarray) -> np.ndarray:
    """Which rows of costs [n, k] no other row dominates, bool [n].

    A row dominates another if it is nowhere larger and somewhere smaller; equal rows do not, so ties stay
    together. A row with a NaN or an infinity is on no front and dominates none.
    """
    usable = np.isfinite(costs).all(axis=1)
    front = usable.copy()
    for i in np.flatnonzero(usable):
        no_larger = (costs <= costs[i]).all(axis=1) & usable
        front[i] = not (no_larger & (costs < costs[i]).any(axis=1)).any()
    return front


def ranking(selection: Sequence[float]) -> list[int]:
    """Indices by rising selection score; ties in their given order, NaN last."""
    scores = np.asarray(selection, dtype=np.float64)
    return np.argsort(np.where(np.isnan(scores), np.inf, scores), kind="stable").tolist()
