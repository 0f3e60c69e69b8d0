"""The figures of training, sweep and experiments: tables in, matplotlib figures out, nothing computed but
means and standard deviations over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, MaxNLocator, ScalarFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from medsae_ray.errors import printable
from medsae_ray.report.style import (
    BLACK,
    BLUE,
    GREY,
    PALE,
    SINGLE_MM,
    TEXT_PT,
    VERMILION,
    figure_bytes,
    figure_files,
    floats,
    in_order,
    log_axis,
    look_of,
    mean_sd,
    new_figure,
    settle,
    styled,
    tell_empty,
)
from medsae_ray.summary import PAPER

__all__ = [
    "expansion_figure", "figure_bytes", "figure_files", "history_figure", "matched_figure", "pareto_figure",
    "replicate_figure",
]  # fmt: skip

Floats = NDArray[np.float64]

FVE, L0, DEAD, ENTROPY = "FVE", "L0 (neurons an image)", "dead neurons (%)", "mean entropy (nats)"
DEAD_TRAIN, AUROC = "dead neurons,\ntraining split (%)", "best AUROC (test)"
FVE_FLOOR = 0.95
"""Of paper.md: below it a checkpoint's entropy does not count."""
DISTANCES, DEGREES = (9.0, 11.0, 13.5, 17.0, 21.0, 26.0, 32.0, 40.0), (60, 120, 240, 300, *range(0, 360, 15))
"""Where a number may stand around its point: points away, and in which directions first."""


@styled
def pareto_figure(table: pa.Table, *, fve_floor: float = FVE_FLOOR) -> Figure:
    """FVE, dead share and entropy of a sweep's trials against their L0 (log axis).

    Takes the `sweep` table and shows its `best` evaluations, one a trial; one without L0 or without the
    figure of a panel is not in that panel. Trials of the `front` are ringed and numbered, by rising L0, and
    named below; those that were stopped early are hollow and pale.
    """
    trials = table.filter(pc.fill_null(table["best"], False))
    l0, front = floats(trials, "l0"), trials["front"].to_numpy(zero_copy_only=False).astype(bool)
    shown = np.isfinite(l0) & (l0 > 0)
    stopped = np.array([status == "stopped" for status in trials["status"].to_pylist()], bool)
    architecture = np.array(trials["architecture"].to_pylist(), object)
    members = np.flatnonzero(front & shown)
    members = members[np.argsort(l0[members], kind="stable")]
    # Spaces of the width of a digit and of an en, which SVG does not run together.
    names = [
        f"{i:\u2007>2}\u2002{printable(trials['trial'][int(row)].as_py(), 52)}"
        for i, row in enumerate(members, 1)
    ]
    widest = max((TextPath((0, 0), name, size=TEXT_PT).get_extents().width for name in names), default=0.0)
    n_columns = int(max(1, min(3, SINGLE_MM / 25.4 * 72 // (widest + 14))))
    key_mm = 4.3 * -(-len(names) // n_columns)

    figure, axes = new_figure(height_mm=130 + key_mm, n_rows=3, share_x=True)
    panels = (
        (FVE, floats(trials, "fve")),
        (DEAD, 100 * floats(trials, "dead")),
        (ENTROPY, floats(trials, "entropy")),
    )
    for panel, (name, y) in zip(axes, panels, strict=True):
        panel.set_ylabel(name)
        for kind in in_order(architecture[shown]):
            look = look_of(kind)
            of_kind = shown & (architecture == kind)
            panel.plot(l0[of_kind & ~stopped], y[of_kind & ~stopped], look.marker, color=look.colour)
            panel.plot(
                l0[of_kind & stopped], y[of_kind & stopped], look.marker, color=look.colour, alpha=0.4,
                fillstyle="none", markersize=3.5,
            )  # fmt: skip
        panel.plot(l0[members], y[members], "o", color=BLACK, fillstyle="none", markersize=9, mew=0.7)
        panel.margins(0.08, 0.12)
        tell_empty(panel, y[shown])
    axes[0].axhline(fve_floor, color=GREY, linestyle="--", zorder=0)
    log_axis(axes[-1], "x", l0[shown])
    axes[-1].set_xlabel(L0)

    handles = [
        Line2D([], [], linestyle="", marker=look.marker, color=look.colour, label=look.name)
        for look in map(look_of, in_order(architecture[shown]))
    ]
    if members.size:
        handles.append(_ring("Pareto front"))
    if (stopped & shown).any():
        handles.append(
            Line2D([], [], linestyle="", marker="o", color=GREY, alpha=0.5, fillstyle="none",
                   markersize=3.5, label="stopped early")
        )  # fmt: skip
    handles.append(Line2D([], [], color=GREY, linestyle="--", label=f"FVE floor {fve_floor:g}"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    if names:
        key = [Line2D([], [], linestyle="", label=name) for name in names]
        figure.legend(handles=key, loc="outside lower left", ncols=n_columns, handlelength=0, handletextpad=0)
    settle(figure)
    for panel, (_, y) in zip(axes, panels, strict=True):
        _number(panel, l0[members], y[members], l0[shown], y[shown], [fve_floor] if panel is axes[0] else [])
    return figure


@styled
def history_figure(history: pa.Table, *, fve_floor: float = FVE_FLOOR) -> Figure:
    """FVE, L0, dead share and entropy on validation, and the training loss, over the optimiser's steps.

    Takes `sae/history`. The chosen checkpoint, that of the lowest `selection`, is ringed.
    """
    valid = history.filter(pc.equal(history["split"], "valid"))
    train = history.filter(pc.equal(history["split"], "train"))
    step, selection = floats(valid, "step"), floats(valid, "selection")
    finite = np.isfinite(selection)
    chosen = int(np.argmin(np.where(finite, selection, np.inf))) if finite.any() else None
    figure, axes = new_figure(height_mm=165, n_rows=5, share_x=True)
    panels = (
        (FVE, floats(valid, "fve")),
        (L0, floats(valid, "l0")),
        (DEAD, 100 * floats(valid, "dead")),
        (ENTROPY, floats(valid, "entropy")),
    )
    for panel, (name, y) in zip(axes, panels, strict=False):
        panel.plot(step, y, "-o", color=BLUE, label="validation")
        panel.set_ylabel(_wrapped(name))
        if chosen is not None:
            panel.axvline(step[chosen], color=PALE, zorder=0)
            panel.plot(step[chosen], y[chosen], "o", color=BLACK, fillstyle="none", markersize=9, mew=0.7)
        panel.margins(0.05, 0.15)
        tell_empty(panel, y)
    axes[0].axhline(fve_floor, color=GREY, linestyle="--", zorder=0)
    log_axis(axes[1], "y", panels[1][1])
    loss = floats(train, "loss")
    axes[4].plot(floats(train, "step"), loss, "-s", color=VERMILION)
    axes[4].set_ylabel("loss")
    axes[4].margins(0.05, 0.15)
    tell_empty(axes[4], loss)
    log_axis(axes[4], "y", loss)
    if chosen is not None:
        axes[4].axvline(step[chosen], color=PALE, zorder=0)
    axes[4].set_xlabel("optimiser step")
    axes[4].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    handles = [
        Line2D([], [], color=BLUE, marker="o", label="validation"),
        Line2D([], [], color=VERMILION, marker="s", label="training"),
        Line2D([], [], color=GREY, linestyle="--", label=f"FVE floor {fve_floor:g}"),
    ]
    if chosen is not None:
        handles.append(_ring("chosen checkpoint"))
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return settle(figure)


@styled
def matched_figure(rows: pa.Table, by: Literal["l0", "fve"] = "l0") -> Figure:
    """Dead share, FVE, entropy and best AUROC of each architecture at matched L0 or FVE.

    Takes a row an architecture and seed; shows those with `matched` equal to `by`. Mean ± standard deviation
    over seeds, single seeds as faint dots, each entropy with its interval and, as a grey line, its floor.
    """
    rows = rows.filter(pc.equal(rows["matched"], by))
    kinds = in_order(rows["architecture"].to_pylist())
    figure, axes = new_figure(height_mm=150, n_rows=4, share_x=True)
    panels = (
        (DEAD_TRAIN, 100 * floats(rows, "dead_train")),
        (FVE, floats(rows, "fve")),
        (ENTROPY, floats(rows, "entropy")),
        (AUROC, floats(rows, "best_auroc")),
    )
    of = np.array(rows["architecture"].to_pylist(), object)
    for panel, (name, y) in zip(axes, panels, strict=True):
        panel.set_ylabel(_wrapped(name))
        for place, kind in enumerate(kinds):
            look, mine = look_of(kind), of == kind
            x = place + 0.18 + _spread(int(mine.sum()))
            if name == ENTROPY:
                low, high = floats(rows, "entropy_low")[mine], floats(rows, "entropy_high")[mine]
                panel.vlines(x, low, high, color=look.colour, alpha=0.5, linewidth=0.8)
                floor, _ = mean_sd(floats(rows, "entropy_floor")[mine])
                panel.plot([place - 0.3, place + 0.42], [floor, floor], color=GREY, linewidth=1.4)
            if len(x) > 1:
                panel.plot(x, y[mine], look.marker, color=look.colour, alpha=0.5, markersize=3, mew=0)
            _mean(panel, place - 0.18, y[mine], look.marker, look.colour)
        panel.margins(0.08, 0.12)
        tell_empty(panel, y)
    axes[-1].xaxis.set_major_locator(FixedLocator(range(len(kinds))))
    axes[-1].set_xticklabels(
        [look_of(kind).name for kind in kinds], rotation=35, ha="right", rotation_mode="anchor"
    )
    axes[-1].set_xlim(-0.6, max(len(kinds), 1) - 0.4)
    matched = floats(rows, by)
    digits = 1 if by == "l0" else 3
    told = {"l0": "L0", "fve": "FVE"}[by]
    if matched.size:
        axes[-1].set_xlabel(
            f"matched at {told} {np.nanmin(matched):.{digits}f} to {np.nanmax(matched):.{digits}f}"
        )
    handles = [
        Line2D([], [], color=BLACK, marker="o", linestyle="", label="mean ± SD"),
        Line2D([], [], color=BLACK, marker="o", linestyle="", alpha=0.5, mew=0, markersize=3, label="seed"),
        Line2D([], [], color=GREY, linewidth=1.4, label="noise floor"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return settle(figure)


@styled
def expansion_figure(rows: pa.Table) -> Figure:
    """Entropy with its floor, FVE, dead share and L0 against the expansion (log₂ axis).

    Takes a row an expansion and seed: mean ± standard deviation over seeds, single seeds as faint dots.
    """
    of = floats(rows, "expansion")
    sizes = np.unique(of)
    figure, axes = new_figure(height_mm=145, n_rows=4, share_x=True)
    panels = (
        (ENTROPY, floats(rows, "entropy")),
        (FVE, floats(rows, "fve")),
        (DEAD_TRAIN, 100 * floats(rows, "dead_train")),
        (L0, floats(rows, "l0")),
    )
    axes[-1].set_xscale("log", base=2)
    for panel, (name, y) in zip(axes, panels, strict=True):
        panel.set_ylabel(_wrapped(name))
        if name == ENTROPY:
            floors = [mean_sd(floats(rows, "entropy_floor")[of == size])[0] for size in sizes]
            panel.plot(sizes, floors, "--", color=GREY, label="noise floor")
        for size in sizes:
            mine = y[of == size]
            if len(mine) > 1:
                places = size * 2 ** (0.14 + 0.4 * _spread(len(mine)))
                panel.plot(places, mine, "o", color=BLUE, alpha=0.5, markersize=3, mew=0)
        panel.plot(sizes, [mean_sd(y[of == size])[0] for size in sizes], color=BLUE)
        for size in sizes:
            _mean(panel, size, y[of == size], "o", BLUE)
        panel.margins(0.1, 0.15)
        tell_empty(panel, y)
    axes[-1].xaxis.set_major_locator(FixedLocator(sizes.tolist()))
    axes[-1].xaxis.set_minor_locator(FixedLocator([]))
    axes[-1].xaxis.set_major_formatter(ScalarFormatter())
    if sizes.size:
        axes[-1].set_xlim(sizes.min() / 1.25, sizes.max() * 1.4)
    axes[-1].set_xlabel("expansion (neurons per embedding dimension)")
    handles = [
        Line2D([], [], color=BLUE, marker="o", label="mean ± SD"),
        Line2D([], [], color=BLUE, marker="o", linestyle="", alpha=0.5, mew=0, markersize=3, label="seed"),
        Line2D([], [], color=GREY, linestyle="--", label="noise floor"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return settle(figure)


CONVENTIONS = {"unit": "mean ‖x‖² = 1", "dim": "mean ‖x‖² = d"}


@styled
def replicate_figure(rows: pa.Table) -> Figure:
    """Entropy of neurons and raw dimensions, FVE and dead share under each normalisation, beside the paper's.

    Takes a row a convention (`unit`, `dim`), or several for several seeds.
    """
    of = np.array(rows["normalisation"].to_pylist(), object)
    kinds = [kind for kind in CONVENTIONS if kind in of]
    figure, axes = new_figure(height_mm=110, n_rows=3, share_x=True)
    neurons, raw = floats(rows, "entropy"), floats(rows, "raw_entropy")
    fourteen = set(rows["entropy_labels"].to_pylist()) == {14}
    panels = (
        (
            ENTROPY,
            (
                (neurons, "o", BLUE, PAPER["entropy_neurons"] if fourteen else None),
                (raw, "s", VERMILION, PAPER["entropy_dimensions"] if fourteen else None),
            ),
        ),
        (FVE, ((floats(rows, "fve"), "o", BLUE, PAPER["fve"]),)),
        (DEAD, ((100 * floats(rows, "dead"), "o", BLUE, 100 * PAPER["dead"]),)),
    )
    for panel, (name, series) in zip(axes, panels, strict=True):
        panel.set_ylabel(name)
        for number, (y, marker, colour, paper) in enumerate(series):
            if paper is not None:
                panel.axhline(paper, color=colour, linestyle=("--", ":")[number], zorder=0)
            for place, kind in enumerate(kinds):
                mine = y[of == kind]
                x = place + 0.16 * (number - (len(series) - 1) / 2)
                if len(mine) > 1:
                    seeds = x + 0.08 + 0.15 * _spread(len(mine))
                    panel.plot(seeds, mine, marker, color=colour, alpha=0.5, markersize=3, mew=0)
                _mean(panel, x, mine, marker, colour)
        panel.margins(0.1, 0.15)
    axes[-1].xaxis.set_major_locator(FixedLocator(range(len(kinds))))
    axes[-1].set_xticklabels([CONVENTIONS[kind] for kind in kinds])
    axes[-1].set_xlim(-0.5, max(len(kinds), 1) - 0.5)
    axes[-1].set_xlabel("scale of the centred embeddings")
    handles = [
        Line2D([], [], color=BLUE, marker="o", linestyle="", label="neurons"),
        Line2D([], [], color=VERMILION, marker="s", linestyle="", label="raw dimensions"),
        Line2D([], [], color=BLUE, linestyle="--", label="paper, neurons"),
    ]
    if fourteen:
        told = "paper, raw dimensions"
        handles.append(Line2D([], [], color=VERMILION, linestyle=":", label=told))
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return settle(figure)


# ------------------------------------------------------------------------------------------------ parts


def _wrapped(label: str) -> str:
    """A label of a low panel on two lines: its unit or symbol goes below."""
    return label if "\n" in label else label.replace(" (", "\n(", 1)


def _ring(label: str) -> Line2D:
    return Line2D(
        [], [], linestyle="", marker="o", color=BLACK, fillstyle="none", markersize=9, mew=0.7, label=label
    )


def _spread(n: int) -> Floats:
    """Places of n single seeds beside their mean."""
    return np.linspace(-0.12, 0.12, n) if n > 1 else np.zeros(n)


def _mean(panel: Axes, x: float, values: Floats, marker: str, colour: str) -> None:
    mean, sd = mean_sd(values)
    panel.errorbar(
        x, mean, None if np.isnan(sd) else sd, fmt=marker, color=colour, capsize=2.5, elinewidth=1.0
    )


def _number(panel: Axes, x: Floats, y: Floats, all_x: Floats, all_y: Floats, lines: Sequence[float]) -> None:
    """Write 1, 2, … beside the points x, y: as near as there is room that no number, point or horizontal line
    has taken.

    The panel's place on the canvas must be settled.
    """
    known = np.isfinite(all_x) & np.isfinite(all_y)
    point = panel.figure.dpi / 72
    frame = panel.get_window_extent()
    taken = [_box(at, 9 * point, 9 * point) for at in _on_canvas(panel, all_x[known], all_y[known])]
    taken += [
        _box(np.array([frame.x0, at[1]]), 2 * frame.width, 2 * point)
        for at in _on_canvas(panel, np.ones(len(lines)), np.array(lines))
    ]
    numbers: list[Bbox] = []
    for number, at in enumerate(_on_canvas(panel, x, y), 1):
        if not np.isfinite(at).all():
            continue
        width, height = (2.5 + 5.1 * len(str(number))) * point, 7.5 * point
        best = None
        for distance, degrees in product(DISTANCES, DEGREES):
            offset = distance * np.array([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))])
            box = _box(at + offset * point, width, height)
            outside = not (frame.contains(*box.min) and frame.contains(*box.max))
            cost = 100 * outside + 20 * box.count_overlaps(numbers) + box.count_overlaps(taken)
            if best is None or cost < best[0]:
                best = cost, offset, box, distance
            if cost == 0:
                break
        assert best is not None
        _, offset, box, distance = best
        numbers.append(box)
        leader = {"arrowstyle": "-", "linewidth": 0.4, "color": GREY, "shrinkA": 0, "shrinkB": 4.5}
        panel.annotate(
            str(number),
            (x[number - 1], y[number - 1]),
            xytext=tuple(offset),
            textcoords="offset points",
            ha="center",
            va="center",
            arrowprops=leader if distance > 11 else None,
        )


def _on_canvas(panel: Axes, x: Floats, y: Floats) -> Floats:
    """Pixels [n, 2]."""
    return panel.transData.transform(np.column_stack([x, y])) if len(x) else np.empty((0, 2))


def _box(centre: Floats, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(centre[0] - width / 2, centre[1] - height / 2, width, height)
