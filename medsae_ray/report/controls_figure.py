"""The figure of the controls: the SAE beside units that no SAE has learned."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from medsae_ray.controls_summary import NAMES
from medsae_ray.report.style import BLACK, DOUBLE_MM, GREY, PALE, new_figure, settle, styled


@styled
def controls_figure(summary: dict[str, Any]) -> Figure:
    """Mean entropy with its floor, mean AUROC, labels separated: SAE, raw dimensions and every control.

    Takes a run's summary (`summary.json`) that holds `controls`. The SAE is black, what it does not beat in
    a panel is ringed.
    """
    told = summary["controls"]
    kinds = told["kinds"]
    places = np.arange(len(kinds))
    figure, panels = new_figure(DOUBLE_MM, 62, n_columns=3, share_y=True)
    left, middle, right = panels
    for panel, name in zip(panels, ("entropy", "best_auroc", "labels_separated"), strict=True):
        equal = told["not_beaten"][name]
        for place, of in zip(places, kinds, strict=True):
            value = np.nan if of[name] is None else of[name]
            colour = BLACK if of["kind"] == "sae" else GREY
            panel.plot(value, place, "o", color=colour, markersize=5.5)
            if of["kind"] in equal:
                panel.plot(value, place, "o", color=BLACK, fillstyle="none", markersize=9, mew=0.7)
        panel.axvline(
            np.nan if kinds[0][name] is None else kinds[0][name], color=PALE, linewidth=0.8, zorder=0
        )
    floors = [np.nan if of["entropy_floor"] is None else of["entropy_floor"] for of in kinds]
    left.plot(floors, places, "|", color=BLACK, markersize=9, mew=1.2)
    left.margins(x=0.1)
    left.set_xlabel("mean entropy of |r| (nats)")
    left.set_yticks(places, [NAMES[of["kind"]] for of in kinds])
    left.invert_yaxis()
    middle.margins(x=0.1)
    middle.set_xlabel("mean AUROC of the chosen units")
    right.set_xlim(-0.5, told["n_labels"] + 0.5)
    right.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for panel in (middle, right):
        panel.tick_params(axis="y", left=False)
    right.set_xlabel(f"labels separated (of {told['n_labels']})")
    handles = [
        Line2D([], [], linestyle="", marker="o", color=BLACK, markersize=5.5, label="SAE"),
        Line2D([], [], linestyle="", marker="o", color=GREY, markersize=5.5, label="no SAE"),
        Line2D([], [], linestyle="", marker="|", color=BLACK, markersize=9, mew=1.2, label="noise floor"),
        Line2D(
            [], [], linestyle="", marker="o", color=BLACK, fillstyle="none", markersize=9, mew=0.7,
            label="not beaten by the SAE",
        ),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return settle(figure)
