"""Which setting gives a wanted L0 or FVE, from a few that were tried."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def setting_for(settings: Sequence[float], figures: Sequence[float], wanted: float) -> float:
    """The setting at which a figure takes the value `wanted`; both are above 0, the figures may be 0.

    Interpolates log(figure) over log(setting) between the two neighbours that enclose it, and goes on along
    the end segment where none do. Figures must be those of at least two different settings.
    """
    order = np.argsort(settings, kind="stable")
    # Where no neuron is left the figure is 0, and its logarithm would leave no slope.
    least = wanted / 1000
    floored = np.maximum(np.asarray(figures, float), least)
    x, y = np.log(np.asarray(settings, float))[order], np.log(floored)[order]
    goal = np.log(wanted)
    # A figure that is not monotone over the settings has several crossings: the nearest to the last one.
    crossings = [i for i in range(len(x) - 1) if (y[i] - goal) * (y[i + 1] - goal) <= 0 and y[i] != y[i + 1]]
    nearer_end = 0 if abs(y[0] - goal) < abs(y[-1] - goal) else len(x) - 2
    i = crossings[-1] if crossings else nearer_end
    if crossings and min(y[i], y[i + 1]) <= np.log(least):
        return float(np.exp((x[i] + x[i + 1]) / 2))
    slope = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
    if slope == 0:
        return float(np.exp(x[i]))
    # A flat end segment must not throw the setting far away: a factor of 3 beyond what was tried.
    shift = np.clip((goal - y[i]) / slope, x[0] - x[i] - np.log(3), x[-1] - x[i] + np.log(3))
    return float(np.exp(x[i] + shift))


def is_matched(figure: float, wanted: float, tolerance: float) -> bool:
    """Whether a figure lies within a relative `tolerance` of what is wanted."""
    return bool(abs(figure - wanted) <= tolerance * wanted)
