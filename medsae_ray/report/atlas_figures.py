"""The figures of the atlas: a run's tables in, matplotlib figures out, nothing computed but histograms,
orders and means; `overview_figures` makes all that a run allows, each with its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, NullLocator
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage

from medsae_ray.config import FitSettings, MeasureSettings
from medsae_ray.controls import CONTROLS
from medsae_ray.controls_summary import NAMES, verdict
from medsae_ray.detections import ACCURATE
from medsae_ray.errors import printable
from medsae_ray.labels import LABELS
from medsae_ray.measure import CLAIM_AUROC, CLAIM_LOW
from medsae_ray.report.controls_figure import controls_figure
from medsae_ray.report.figures import history_figure, pareto_figure
from medsae_ray.report.style import (
    BLACK,
    BLUE,
    DOUBLE_MM,
    GREY,
    PALE,
    SINGLE_MM,
    VERMILION,
    floats,
    log_axis,
    new_figure,
    settle,
    styled,
    tell_empty,
)
from medsae_ray.statistics import above
from medsae_ray.summary import PAPER

__all__ = [
    "OverviewFigure", "auroc_figure", "correlation_figure", "density_figure", "detection_figure",
    "entropy_figure", "localisation_figure", "neuron_map_figure", "overview_figures",
]  # fmt: skip

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MIN_FIRING = MeasureSettings.min_firing
ENTROPY_BIN = 0.05
"""Width of a bar of the entropy histogram, in nats."""
DECADE = 0.1
"""Width of a bar of the density histogram, in decades."""
COIN = 0.5
"""Detection accuracy of tossing a coin."""
COLUMNS = 1500
"""Widest heat map, in cells: about one a dot at 300 dots an inch."""
SIGNED = LinearSegmentedColormap.from_list(
    "signed", ["#0B1E5B", "#3B5A9A", "#8C8C8C", "#EFAE4E", "#FFF8D6"]
)  # fmt: skip
"""Of evenly rising lightness: dark blue below 0, grey at 0, light yellow above, so that the sign survives a
grey printer (most diverging maps are dark at both ends)."""
NEURONS = LinearSegmentedColormap.from_list("neurons", ["#FFFFFF", "#E2E2E2", "#A8A8A8"])
"""Of the number of neurons in a cell of the neuron map."""
CELLS = 48
"""Cells along a side of the neuron map."""
PAPER_MARK: dict[str, Any] = {
    "linestyle": "", "marker": "v", "color": VERMILION, "fillstyle": "none", "mew": 1.0
}  # fmt: skip
"""How a figure of the paper stands in a histogram."""
DECIMAL = (1, 2, 5, 10)
"""Steps of round numbers on an axis."""
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
MANY = 200
"""So many points are put into an SVG as pixels, to keep it small."""


@styled
def entropy_figure(
    neurons: pa.Table,
    dimensions: pa.Table | None = None,
    controls: pa.Table | None = None,
    *,
    min_firing: int = MIN_FIRING,
) -> Figure:
    """Histograms of the entropy of |r| in nats: a row for the SAE, the raw dimensions and each control.

    Takes the tables of these names and shows the units that fire on at least `min_firing` test images. Each
    row has its own mean and its own noise floor; the paper's means stand in the first two where the entropy
    is over all 14 labels.
    """
    units = _entropies(neurons, dimensions, controls, min_firing)
    n_labels = _n_labels(neurons, min_firing)
    figure, panels = new_figure(
        height_mm=24 + 10.5 * len(units), n_rows=len(units), share_x=True, share_y=True
    )
    every = np.concatenate([of.entropy for of in units.values()])
    # A little beyond, so that rounding leaves no unit outside.
    first = np.floor(every.min() / ENTROPY_BIN - 1e-9) if every.size else 0
    last = np.ceil(every.max() / ENTROPY_BIN + 1e-9) if every.size else 1
    edges = ENTROPY_BIN * np.arange(first, last + 1)
    ours = units["sae"]
    for panel, (kind, of) in zip(panels, units.items(), strict=True):
        share = 100 * np.histogram(of.entropy, edges)[0] / max(len(of.entropy), 1)
        panel.stairs(share, edges, fill=True, color=PALE)
        panel.stairs(share, edges, color=BLACK, linewidth=1.0 if kind == "sae" else 0.6)
        if kind != "sae":
            panel.axvline(_mean(ours.entropy), color=PALE, zorder=0)
        panel.axvline(_mean(of.floor), color=GREY, linestyle="--", linewidth=1.2)
        panel.axvline(_mean(of.entropy), ymax=0.65, color=BLACK, linewidth=1.6)
        paper = _paper_entropy(kind, n_labels)
        if paper is not None:
            panel.plot(paper, 1, **PAPER_MARK, transform=panel.get_xaxis_transform(), clip_on=False)
        panel.set_ylabel(f"{NAMES[kind]}\n{len(of.entropy):,}", rotation=0, ha="right", va="center")
        panel.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        tell_empty(panel, of.entropy)
    panels[0].set_ylim(bottom=0)
    panels[-1].set_xlabel(f"entropy of |r| over {n_labels} labels (nats)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(6))
    figure.supylabel(f"living units (% of the row per {ENTROPY_BIN:g} nats)")
    handles = [
        Line2D([], [], color=BLACK, linewidth=1.6, label="mean"),
        Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label="noise floor"),
    ]
    if len(units) > 1:
        handles.append(Line2D([], [], color=PALE, label="the SAE's mean"))
    if _paper_entropy("sae", n_labels) is not None:
        handles.append(Line2D([], [], **PAPER_MARK, label="the paper's mean"))
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return settle(figure)


@styled
def density_figure(neurons: pa.Table) -> Figure:
    """Histogram of the density of the living neurons (log axis, % of the test images), and the dead share.

    Takes the `neurons` table. A bar is about a tenth of a decade, or as wide as one image more makes it, and
    its height the neurons per tenth. The dead are told for the test split, the training split and both;
    `dead_train` may be null.
    """
    density, n_firing = floats(neurons, "density"), floats(neurons, "n_firing")
    alive = n_firing > 0
    figure, (top, bottom) = new_figure(height_mm=88, n_rows=2, height_ratios=(3, 1))
    if alive.any():
        n_images = int(np.rint(np.max(n_firing[alive] / density[alive])))
        edges = _firing_edges(n_images)
        counts = np.histogram(n_firing[alive], edges)[0]
        heights = counts * DECADE / np.diff(np.log10(edges))
        places = 100 * edges / n_images
        top.stairs(heights, places, fill=True, color=PALE)
        top.stairs(heights, places, color=BLACK)
        log_axis(top, "x", places)
        top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        top.axvline(100 * float(np.median(density[alive])), color=BLACK, linestyle="--")
    top.set_ylim(bottom=0)
    top.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    top.set_xlabel("density: test images on which it fires (%)")
    top.set_ylabel(f"living neurons\n(per {DECADE:g} decade)")
    tell_empty(top, density[alive])

    dead = _dead_shares(neurons)
    for place, share in enumerate(dead.values()):
        bottom.barh(place, 100 * share, 0.6, color=PALE, edgecolor=BLACK, linewidth=0.6)
        bottom.annotate(
            f"{round(share * neurons.num_rows):,} ({_percent(share)})" if np.isfinite(share) else "not known",
            (100 * np.nan_to_num(share), place), xytext=(3, 0), textcoords="offset points", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    bottom.axvline(100 * PAPER["dead"], color=VERMILION, linestyle=":", linewidth=1.4)
    bottom.set_yticks(range(len(dead)), list(dead))
    bottom.invert_yaxis()
    bottom.set_xlim(0, 145 * float(np.nanmax([*dead.values(), PAPER["dead"]])))
    bottom.set_xlabel(f"dead neurons (% of {neurons.num_rows:,})")
    bottom.set_ylabel("split")
    handles = [
        Line2D([], [], color=BLACK, linestyle="--", label="median"),
        Line2D([], [], color=VERMILION, linestyle=":", linewidth=1.4, label="paper's dead share"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return settle(figure)


@styled
def detection_figure(detections: pa.Table) -> Figure:
    """Balanced accuracy (%) of every candidate neuron with enough answers, falling, with its 95 % interval.

    Takes the `detections` table. Below each neuron's own accuracy stands that of another neuron's description
    on the same radiographs (the shuffled null). Filled: the interval's lower bound lies above 50 %.
    """
    rows = _ranked(detections)
    accuracy, low, high, shuffled = (
        100 * floats(rows, name)
        for name in (
            "balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high",
            "shuffled_balanced_accuracy",
        )
    )  # fmt: skip
    n = rows.num_rows
    place = np.arange(1, n + 1)
    wide, many = n > 60, n > MANY
    figure, (panel,) = new_figure(DOUBLE_MM if wide else SINGLE_MM, 75)
    panel.axhline(100 * ACCURATE, color=GREY, linestyle="--", zorder=1.9 if many else 0)
    panel.axhline(100 * COIN, color=GREY, linestyle=":", zorder=1.9 if many else 0)
    panel.vlines(place, low, high, color=PALE if many else BLACK, linewidth=0.7, zorder=1, rasterized=many)
    sure = above(low, 100 * COIN)
    size = 1.5 if many else 2.5 if wide else 4.0
    dots: dict[str, Any] = {"linestyle": "", "markersize": size, "rasterized": many}
    panel.plot(place[sure], accuracy[sure], marker="o", color=BLACK, **dots)
    panel.plot(place[~sure], accuracy[~sure], marker="o", color=BLACK, markerfacecolor="white", **dots)
    panel.plot(place, shuffled, marker="x", color=VERMILION, mew=size / 5, **dots)
    panel.set_xlabel("named neuron, by falling accuracy (rank)")
    panel.set_ylabel("balanced accuracy of detection (%)")
    panel.set_xlim(0.2, n + 0.8)
    panel.xaxis.set_major_locator(MaxNLocator(6, steps=DECIMAL, integer=True))
    panel.xaxis.set_major_formatter(THOUSANDS)
    panel.yaxis.set_major_locator(MultipleLocator(10))
    panel.margins(y=0.05)
    tell_empty(panel, accuracy)
    handles = [
        _mark("o", BLACK, "lower bound > 50 %", size=4),
        _mark("o", BLACK, "lower bound ≤ 50 %", size=4, filled=False),
        _mark("x", VERMILION, "another's description", size=4),
        Line2D([], [], color=GREY, linestyle="--", label="70 % (paper's bar)"),
        Line2D([], [], color=GREY, linestyle=":", label="50 % (coin)"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3 if wide else 2)
    return settle(figure)


@styled
def auroc_figure(summary: Mapping[str, Any]) -> Figure:
    """Test AUROC of the neuron chosen for each label on validation, beside that of the raw dimension.

    Takes a run's summary (`summary.json`): its `labels` and `labels_raw`. Intervals are 95 % over patients.
    Filled: the label counts as separated. The labels stand by the neuron's falling AUROC.
    """
    ours, raw = _by_auroc(summary)
    figure, (panel,) = new_figure(height_mm=24 + 6.2 * max(len(ours), 1))
    panel.axvline(0.5, color=GREY, linestyle=":", zorder=0)
    panel.axvline(CLAIM_AUROC, color=GREY, linestyle="--", zorder=0)
    for rows, marker, colour, shift in ((ours, "o", BLACK, -0.17), (raw, "s", BLUE, 0.17)):
        for place, row in enumerate(rows):
            _interval(
                panel, row["auroc"], row["auroc_low"], row["auroc_high"], place + shift, marker, colour,
                filled=row["separated"],
            )  # fmt: skip
    panel.set_yticks(
        range(len(ours)), [f"{_two_lines(row['label'])} ({row['n_positive']:,})" for row in ours]
    )
    panel.set_ylim(len(ours) - 0.4, -0.6)
    panel.xaxis.set_major_locator(MultipleLocator(0.1))
    panel.set_xlim(min(0.46, panel.get_xlim()[0]), 1.02)
    panel.set_xlabel("AUROC (test)")
    panel.set_ylabel("label (test radiographs that have it)")
    tell_empty(panel, _optional(ours, "auroc"))
    handles = [
        _mark("o", BLACK, "neuron"),
        _mark("s", BLUE, "raw dimension"),
        _mark("o", BLACK, "not separated", filled=False),
        Line2D([], [], color=GREY, linestyle="--", label=f"AUROC {CLAIM_AUROC:g}"),
        Line2D([], [], color=GREY, linestyle=":", label="chance"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return settle(figure)


@styled
def localisation_figure(localisation: pa.Table) -> Figure:
    """Hit rate (%) and IoU of each finding's neuron against the boxes, each with its two chance levels.

    Takes the `localisation` table. Intervals are 95 % over patients. Filled: the hit rate's lower bound lies
    above both chance levels. The findings stand by falling hit rate, those without a figure last.
    """
    rows = _by_hit_rate(localisation)
    places = np.arange(rows.num_rows)
    figure, panels = new_figure(DOUBLE_MM, 22 + 6.2 * max(rows.num_rows, 1), n_columns=2, share_y=True)
    above = [bool(value) for value in rows["above_chance"].to_pylist()]
    share = floats(rows, "box_share")
    for panel, name, scale, other, told in (
        (panels[0], "hit_rate", 100, "other_hit_rate", "hit rate of the pointing game (%)"),
        (panels[1], "iou", 1, "other_iou", "IoU with the boxes"),
    ):
        value, low, high = (scale * floats(rows, f"{name}{end}") for end in ("", "_low", "_high"))
        for place in places:
            _interval(panel, value[place], low[place], high[place], place, "o", BLACK, filled=above[place])
        panel.plot(scale * share, places, "|", color=VERMILION, markersize=9, mew=1.4)
        panel.plot(scale * floats(rows, other), places, "D", color=BLUE, fillstyle="none", markersize=4)
        right = panel.get_xlim()[1]
        panel.set_xlim(-0.03 * right, right)
        panel.set_xlabel(told)
        tell_empty(panel, value)
    findings = [printable(finding, 30).replace("$", r"\$") for finding in rows["finding"].to_pylist()]
    panels[0].set_yticks(
        places, [f"{finding} ({n:,})" for finding, n in zip(findings, rows["n"].to_pylist(), strict=True)]
    )
    panels[0].set_ylim(max(rows.num_rows, 1) - 0.4, -0.6)
    panels[0].set_ylabel("finding (radiographs)")
    panels[1].tick_params(axis="y", left=False)
    handles = [
        _mark("o", BLACK, "the finding's neuron"),
        _mark("o", BLACK, "not above chance", filled=False),
        Line2D(
            [], [], linestyle="", marker="|", color=VERMILION, markersize=9, mew=1.4,
            label="chance: the boxes' share",
        ),
        _mark("D", BLUE, "chance: other neurons, same radiograph", filled=False, size=4),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return settle(figure)


@styled
def correlation_figure(neurons: pa.Table, atlas: pa.Table) -> Figure:
    """Heat map of Pearson's r with the labels: labels × neurons, both in the order of a clustering.

    Takes the tables of these names and shows the neurons that have a `leaf`, in its order, and the labels
    that have an r; what is undefined stays white. Of more than 1,500 neurons neighbours share a cell, which
    shows their mean.
    """
    r, labels = _clustered(neurons, atlas)
    n = r.shape[1]
    group = -(-n // COLUMNS) if n else 1
    starts = np.arange(0, n, group)
    known = np.isfinite(r)
    count = np.add.reduceat(known, starts, axis=1) if n else known
    total = np.add.reduceat(np.where(known, r, 0), starts, axis=1) if n else r
    cells = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    figure, (panel,) = new_figure(DOUBLE_MM, 22 + 4.4 * max(len(labels), 1))
    limit = np.ceil(10 * np.abs(r[known]).max(initial=0)) / 10 or 1.0
    # The last cell of neighbours may hold fewer.
    edges = np.append(starts, n)
    mesh = panel.pcolormesh(
        edges, np.arange(len(labels) + 1), cells, cmap=SIGNED, vmin=-limit, vmax=limit, rasterized=True
    )  # fmt: skip
    panel.set_yticks(np.arange(len(labels)) + 0.5, labels)
    panel.invert_yaxis()
    panel.tick_params(axis="y", length=0)
    panel.xaxis.set_major_locator(MaxNLocator(6, steps=DECIMAL, integer=True))
    panel.xaxis.set_major_formatter(THOUSANDS)
    panel.set_xlabel("living neuron, in the order of the clustering")
    if n and labels:
        bar = figure.colorbar(mesh, ax=panel, pad=0.015, fraction=0.04, aspect=25)
        bar.set_label("Pearson's r (test)")
        bar.outline.set_linewidth(0.6)
    tell_empty(panel, r)
    return settle(figure)


@styled
def neuron_map_figure(neurons: pa.Table, atlas: pa.Table) -> Figure:
    """The plane of the decoder directions' t-SNE, once for each label: its own neurons among all others.

    Takes the tables of these names. A neuron belongs to the label of largest |r| on test (`best_label`);
    black where that r is positive, crosses where it is negative. Grey: the number of living neurons.
    """
    at, best, positive = _mapped(neurons, atlas)
    everyone, *edges = np.histogram2d(at[:, 0], at[:, 1], CELLS)
    figure, panels = new_figure(DOUBLE_MM, 122, n_rows=3, n_columns=5, share_x=True, share_y=True)
    for panel, label in zip(panels, LABELS, strict=False):
        mine = best == label
        panel.pcolormesh(*edges, everyone.T, cmap=NEURONS, rasterized=True)
        # Squares fall on whole pixels, which take half the space of discs in an SVG.
        panel.plot(*at[mine & positive].T, "s", color=BLACK, markersize=1.2, mew=0, rasterized=True)
        panel.plot(*at[mine & ~positive].T, "x", color=VERMILION, markersize=2, mew=0.5, rasterized=True)
        panel.set_title(f"{_two_lines(label)} ({np.count_nonzero(mine):,})", linespacing=1.0)
    for panel in panels:
        panel.xaxis.set_major_locator(NullLocator())
        panel.yaxis.set_major_locator(NullLocator())
        panel.spines[:].set_visible(False)
        panel.set_aspect("equal")
        panel.use_sticky_edges = False
        panel.margins(0.03)
    key = panels[-1]
    handles = [
        _mark("s", BLACK, "r > 0", size=2.5),
        _mark("x", VERMILION, "r < 0", size=3.5),
        Patch(facecolor=PALE, label="all neurons\n(darker: more)"),
    ]
    key.legend(handles=handles, loc="center left", title="best label\n(largest |r|, test)", alignment="left")
    figure.supxlabel("t-SNE 1 (no unit)")
    figure.supylabel("t-SNE 2 (no unit)")
    tell_empty(key, at)
    return settle(figure)


# --------------------------------------------------------------------------------------- the overview


class OverviewFigure(NamedTuple):
    """A figure with what is told of it."""

    name: str
    """Of its files, without ending."""
    title: str
    alt: str
    """In words what it shows, with its main numbers."""
    caption: str
    """How to read it."""
    figure: Figure


def overview_figures(tables: Mapping[str, pa.Table], summary: Mapping[str, Any]) -> list[OverviewFigure]:
    """Every figure that a run allows, in the order in which it is read.

    `tables` holds those that are there of `neurons`, `dimensions`, `controls`, `atlas`, `detections`,
    `localisation`, `history` (`sae/history`) and `sweep`; `summary` is the content of `summary.json`, or
    empty. A figure that would show nothing is left out.
    """
    made = (make(tables, summary) for make in _OVERVIEW)
    return [figure for figure in made if figure is not None]


Make = Callable[[Mapping[str, pa.Table], Mapping[str, Any]], OverviewFigure | None]


def _entropy(tables: Mapping[str, pa.Table], summary: Mapping[str, Any]) -> OverviewFigure | None:
    min_firing = summary.get("min_firing", MIN_FIRING)
    neurons, dimensions, controls = (tables.get(name) for name in ("neurons", "dimensions", "controls"))
    if neurons is None:
        return None
    units = _entropies(neurons, dimensions, controls, min_firing)
    if not units["sae"].entropy.size:
        return None
    n_labels = _n_labels(neurons, min_firing)
    means = [
        f"{NAMES[kind]} {of.entropy.mean():.2f} ({_mean(of.floor):.2f}; {len(of.entropy):,} units)"
        for kind, of in units.items()
        if of.entropy.size
    ]
    paper = [_paper_entropy(kind, n_labels) for kind in ("sae", "dimensions")]
    published = (
        f" The paper's means are {paper[0]:.2f} for its SAE and {paper[1]:.2f} for raw dimensions."
        if None not in paper
        else ""
    )
    return OverviewFigure(
        "entropy",
        "Entropy of the neurons over the labels",
        f"Histograms of the entropy of |r| over {n_labels} labels, one for each kind of unit. Means in nats, "
        f"with the noise floor and the number of living units: {'; '.join(means)}.{published}",
        f"Entropy of the normalised |r| with {n_labels} labels, for units that fire on at least {min_firing} "
        f"test images: low where a unit follows few labels, at most {np.log(max(n_labels, 1)):.2f} nats. A "
        "row is a kind of unit, named with its number. Solid line: mean of the row. Dashed: its noise "
        "floor, the mean under permuted labels; a unit there follows no label. Pale line in all rows: the "
        "SAE's mean." + (" Triangle: the paper's mean." if published else ""),
        entropy_figure(neurons, dimensions, controls, min_firing=min_firing),
    )


def _controls(tables: Mapping[str, pa.Table], summary: Mapping[str, Any]) -> OverviewFigure | None:
    if not summary.get("controls"):
        return None
    return OverviewFigure(
        "controls",
        "The SAE beside units that no SAE has learned",
        "Mean entropy, mean AUROC and number of labels separated, for the SAE, the raw dimensions and each "
        f"control. {verdict(summary['controls'])}".replace("\n", " "),
        "Test split. Left: mean entropy of living units with its noise floor, lower is better. Middle: mean "
        "AUROC of the units chosen for each label on validation. Right: labels that these separate "
        f"(AUROC > {CLAIM_AUROC:g}, lower bound > {CLAIM_LOW:g}). Ringed: as good as the SAE or better.",
        controls_figure(dict(summary)),
    )


def _auroc(tables: Mapping[str, pa.Table], summary: Mapping[str, Any]) -> OverviewFigure | None:
    ours, raw = _by_auroc(summary)
    areas, raw_areas = _optional(ours, "auroc"), _optional(raw, "auroc")
    if not np.isfinite(areas).any():
        return None
    first, last = ours[0], ours[int(np.flatnonzero(np.isfinite(areas))[-1])]
    beside = (
        f"; by one raw dimension {sum(row['separated'] for row in raw)}, mean AUROC {_mean(raw_areas):.3f}"
        if np.isfinite(raw_areas).any()
        else ""
    )
    return OverviewFigure(
        "auroc",
        "One neuron against each label",
        f"Test AUROC of one neuron for each of {np.isfinite(areas).sum()} labels, from {first['auroc']:.3f} "
        f"({first['label']}) to {last['auroc']:.3f} ({last['label']}), mean {_mean(areas):.3f}. One neuron "
        f"separates {sum(row['separated'] for row in ours)} labels{beside}.",
        "The neuron of largest r with the label on validation, its AUROC on test with a 95 % interval over "
        "patients; below it the raw dimension of largest |r|. Filled: the label counts as separated (AUROC "
        f"> {CLAIM_AUROC:g}, lower bound > {CLAIM_LOW:g}, enough positives). Behind each label the test "
        "radiographs that have it.",
        auroc_figure(summary),
    )


def _detection(tables: Mapping[str, pa.Table], summary: Mapping[str, Any]) -> OverviewFigure | None:
    if "detections" not in tables:
        return None
    rows = _ranked(tables["detections"])
    if not rows.num_rows:
        return None
    accuracy, low = floats(rows, "balanced_accuracy"), floats(rows, "balanced_accuracy_low")
    shuffled = _mean(floats(rows, "shuffled_balanced_accuracy"))
    null = f" With another neuron's description the mean is {_percent(shuffled)}."
    left_out = tables["detections"].num_rows - rows.num_rows
    return OverviewFigure(
        "detection",
        "Do the names hold on other radiographs?",
        f"Balanced accuracy of detection of {_count(rows.num_rows, 'named neuron')}, from "
        f"{_percent(accuracy[0])} down to {_percent(accuracy[-1])}, median "
        f"{_percent(float(np.median(accuracy)))}. Above 70 %: {above(accuracy, ACCURATE).sum():,}; with the "
        f"lower bound above 50 %: {above(low, COIN).sum():,}." + (null if np.isfinite(shuffled) else ""),
        "The model is asked of one test radiograph at a time, half of them with the neuron firing, whether "
        "it shows what the neuron's description says. Bars: 95 % intervals. Crosses: the same radiographs "
        "asked about another neuron's description; read an accuracy against them, not against 50 % alone."
        + (f" {left_out:,} candidates without enough answers are left out." if left_out else ""),
        detection_figure(tables["detections"]),
    )


def _localisation(tables: Mapping[str, pa.Table], summary: Mapping[str, Any]) -> OverviewFigure | None:
    if "localisation" not in tables:
        return None
    rows = _by_hit_rate(tables["localisation"])
    hit_rate = floats(rows, "hit_rate")
    known = np.isfinite(hit_rate)
    if not known.any():
        return None
    findings = [printable(finding, 30) for finding in rows["finding"].to_pylist()]
    told = [
        f"{finding} {_percent(rate, 0)} ({_percent(share, 0)}, {_percent(other, 0)})"
        for finding, rate, share, other in zip(
            findings, hit_rate, floats(rows, "box_share"), floats(rows, "other_hit_rate"), strict=True
        )
        if np.isfinite(rate)
    ]
    above = sum(bool(value) for value in rows["above_chance"].to_pylist())
    return OverviewFigure(
        "localisation",
        "Does the neuron look at the finding?",
        f"Hit rate and IoU of the neurons of {_count(int(known.sum()), 'finding')} against boxes; the lower "
        f"bound of the hit rate lies above both chance levels for {above}. Hit rates, with those of a random "
        f"point and of other neurons: {'; '.join(told)}.",
        "Hit: the highest point of the neuron's map lies in a box of the finding. IoU: of the map's part "
        "above half its maximum with the boxes. Test radiographs on which the neuron fires, their number "
        "behind the finding; 95 % intervals over patients. Chance: the boxes' share of the radiograph (a "
        "random point; the IoU of the whole image), and the maps of other neurons on the same radiograph.",
        localisation_figure(tables["localisation"]),
    )


def _correlation(tables: Mapping[str, pa.Table], summary: Mapping[str, Any]) -> OverviewFigure | None:
    if "neurons" not in tables or "atlas" not in tables:
        return None
    r, labels = _clustered(tables["neurons"], tables["atlas"])
    if r.shape[1] < 2 or not labels:
        return None
    at = np.unravel_index(np.nanargmax(np.abs(r)), r.shape)
    largest = np.nanmax(np.abs(r), axis=0)
    group = -(-r.shape[1] // COLUMNS)
    return OverviewFigure(
        "correlation",
        "What each neuron follows",
        f"Heat map of Pearson's r of {r.shape[1]:,} neurons with {_count(len(labels), 'label')}, both "
        f"clustered. The strongest is {r[at]:.2f} with {labels[at[0]]}. A neuron's largest |r| has the "
        f"median {np.median(largest):.2f} and lies above 0.5 for {(largest > 0.5).sum():,}.",
        "A column is a living neuron, a row a label; r on test. Light: fires where the label is present; "
        "dark: where it is absent. Neighbours have similar rows of r."
        + (f" A cell is the mean of {group} neighbours." if group > 1 else ""),
        correlation_figure(tables["neurons"], tables["atlas"]),
    )


def _neuron_map(tables: Mapping[str, pa.Table], summary: Mapping[str, Any]) -> OverviewFigure | None:
    if "neurons" not in tables or "atlas" not in tables:
        return None
    at, best, _ = _mapped(tables["neurons"], tables["atlas"])
    counts = {label: int(np.count_nonzero(best == label)) for label in LABELS}
    if len(at) < 2 or not any(counts.values()):
        return None
    most = sorted((label for label in LABELS if counts[label]), key=lambda label: -counts[label])
    return OverviewFigure(
        "neuron_map",
        "A map of the neurons",
        f"{len(at):,} living neurons on the plane of a t-SNE of their decoder directions, drawn for each "
        "label with its own neurons in black. Neurons by best label: "
        f"{', '.join(f'{label} {counts[label]:,}' for label in most)}.",
        "Neurons of similar decoder directions lie near each other; distances between groups mean nothing. "
        "Black: neurons whose largest |r| on test is with the label and positive; crosses: negative. Grey: "
        "all living neurons, darker where there are more. Where black gathers, the SAE spends many similar "
        "directions on that label.",
        neuron_map_figure(tables["neurons"], tables["atlas"]),
    )


def _density(tables: Mapping[str, pa.Table], summary: Mapping[str, Any]) -> OverviewFigure | None:
    neurons = tables.get("neurons")
    if neurons is None or not neurons.num_rows:
        return None
    density = floats(neurons, "density")
    alive = floats(neurons, "n_firing") > 0
    told = [
        f"{round(share * neurons.num_rows):,} ({_percent(share)}) {where}"
        for where, share in zip(
            ("never fire on the test split", "on the training split", "on either"),
            _dead_shares(neurons).values(),
            strict=True,
        )
        if np.isfinite(share)
    ]
    median = _percent(float(np.median(density[alive])), 2) if alive.any() else "undefined"
    return OverviewFigure(
        "density",
        "How often the neurons fire",
        f"Histogram of the density of {_count(int(alive.sum()), 'living neuron')}, median {median} of the "
        f"test images. Of {neurons.num_rows:,} neurons {', '.join(told)}; the paper reports "
        f"{_percent(PAPER['dead'], 0)} dead.",
        "Above: the share of test images on which a neuron fires, for those that fire on one at least; a bar "
        "is a tenth of a decade, or what one image more makes, and its area is the number of neurons. "
        "Below: neurons that never fire, on each split and on both.",
        density_figure(neurons),
    )


def _history(tables: Mapping[str, pa.Table], summary: Mapping[str, Any]) -> OverviewFigure | None:
    if "history" not in tables:
        return None
    history = tables["history"]
    valid = history.filter(pc.equal(history["split"], "valid"))
    if not valid.num_rows:
        return None
    selection = floats(valid, "selection")
    chosen = int(np.nanargmin(selection)) if np.isfinite(selection).any() else valid.num_rows - 1
    row = valid.slice(chosen, 1).to_pylist()[0]
    figures = [f"{name} {told(row[key])}" for name, key, told in _TRAINED if row[key] is not None]
    which = "chosen" if np.isfinite(selection).any() else "last"
    return OverviewFigure(
        "history",
        "Training",
        f"FVE, L0, dead share, mean entropy and loss over {_count(valid.num_rows, 'evaluation')}. The "
        f"{which} checkpoint (epoch {row['epoch']}, step {row['step']:,}) has on validation "
        f"{', '.join(figures)}.",
        "On validation; the loss on the training split. Ringed: the checkpoint that is kept, that of lowest "
        "mean entropy among those above the FVE floor.",
        history_figure(history, fve_floor=_fve_floor(summary)),
    )


def _pareto(tables: Mapping[str, pa.Table], summary: Mapping[str, Any]) -> OverviewFigure | None:
    if "sweep" not in tables:
        return None
    best = tables["sweep"].filter(pc.fill_null(tables["sweep"]["best"], False))
    shown = best.filter(pa.array(np.nan_to_num(floats(best, "l0")) > 0))
    if not shown.num_rows:
        return None
    front = shown.filter(shown["front"])
    ranges = [
        f"{name} {told(np.nanmin(values))} to {told(np.nanmax(values))}"
        for name, key, told in _TRAINED
        if np.isfinite(values := floats(front, key)).any()
    ]
    spanned = f": {', '.join(ranges)}" if ranges else ""
    return OverviewFigure(
        "pareto",
        "The sweep",
        f"FVE, dead share and entropy of {_count(shown.num_rows, 'trial')} against L0. The Pareto front has "
        f"{_count(front.num_rows, 'trial')}{spanned}.",
        "A point is a trial of the sweep at its best evaluation on validation. Ringed and numbered: no other "
        "trial is better in one figure without being worse in another.",
        pareto_figure(tables["sweep"], fve_floor=_fve_floor(summary)),
    )


_OVERVIEW: tuple[Make, ...] = (
    _entropy, _controls, _auroc, _detection, _localisation, _correlation, _neuron_map, _density, _history,
    _pareto,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ parts


class _Entropies(NamedTuple):
    """Entropy and noise floor of living units, in nats [n]."""

    entropy: Floats
    floor: Floats


def _entropies(
    neurons: pa.Table, dimensions: pa.Table | None, controls: pa.Table | None, min_firing: int
) -> dict[str, _Entropies]:
    """By the kinds of `NAMES`, in their order; the SAE first, others where there is a row of them."""
    tables = {"sae": neurons}
    if dimensions is not None:
        tables["dimensions"] = dimensions
    if controls is not None:
        tables |= {kind: controls.filter(pc.equal(controls["control"], kind)) for kind in CONTROLS}
    found = {}
    for kind, table in tables.items():
        if table.num_rows or kind == "sae":
            living = _living(table, min_firing)
            found[kind] = _Entropies(floats(table, "entropy")[living], floats(table, "entropy_floor")[living])
    return found


def _living(units: pa.Table, min_firing: int) -> Bools:
    """As in `entropy_means`."""
    return (floats(units, "n_firing") >= max(min_firing, 1)) & np.isfinite(floats(units, "entropy"))


def _n_labels(neurons: pa.Table, min_firing: int) -> int:
    """Labels behind the entropies."""
    return int(floats(neurons, "n_labels")[_living(neurons, min_firing)].max(initial=0))


def _paper_entropy(kind: str, n_labels: int) -> float | None:
    """The paper's mean, where it can be compared."""
    name = {"sae": "entropy_neurons", "dimensions": "entropy_dimensions"}.get(kind)
    return PAPER[name] if name is not None and n_labels == len(LABELS) else None


def _firing_edges(n_images: int) -> NDArray[np.int64]:
    """Edges of the density histogram, in images: tenths of a decade, none without a whole number in it."""
    steps = np.arange(0, np.log10(n_images + 1) + DECADE, DECADE)
    return np.unique(np.minimum(np.ceil(10**steps - 1e-9).astype(np.int64), n_images + 1))


def _dead_shares(neurons: pa.Table) -> dict[str, float]:
    """Share of neurons that never fire, in [0, 1], by where; NaN where that is not known."""
    test, train = floats(neurons, "dead"), floats(neurons, "dead_train")
    both = np.where(np.isfinite(train), np.minimum(test, train), np.nan)
    return {
        name: float(dead.mean()) if len(dead) else np.nan
        for name, dead in (("test", test), ("training", train), ("both", both))
    }


def _ranked(detections: pa.Table) -> pa.Table:
    """Those with enough answers, by falling balanced accuracy."""
    rows = detections.filter(detections["enough"])
    rows = rows.filter(pa.array(np.isfinite(floats(rows, "balanced_accuracy")), pa.bool_()))
    return rows.take(pa.array(np.argsort(-floats(rows, "balanced_accuracy"), kind="stable")))


def _by_auroc(summary: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The chosen neurons and raw dimensions by the neuron's falling AUROC, undefined ones last."""
    ours, raw = summary.get("labels", []), summary.get("labels_raw", [])
    order = np.argsort(-np.nan_to_num(_optional(ours, "auroc"), nan=-1), kind="stable")
    of = {row["label"]: row for row in raw}
    return [ours[i] for i in order], [of[ours[i]["label"]] for i in order]


def _by_hit_rate(localisation: pa.Table) -> pa.Table:
    order = np.argsort(-np.nan_to_num(floats(localisation, "hit_rate"), nan=-1), kind="stable")
    return localisation.take(pa.array(order))


def _clustered(neurons: pa.Table, atlas: pa.Table) -> tuple[Floats, list[str]]:
    """r [labels, neurons], both in the order of a clustering, and the labels; those without any r are left
    out."""
    leaf = floats(_beside(atlas, neurons), "leaf")
    rows = np.argsort(leaf, kind="stable")[: np.count_nonzero(np.isfinite(leaf))]
    r = np.array([floats(neurons, f"r_{label}")[rows] for label in LABELS])
    some = np.flatnonzero(np.isfinite(r).any(axis=1))
    r = r[some]
    if len(some) > 2:
        r_order = leaves_list(linkage(np.nan_to_num(r), "average", optimal_ordering=True))
        some, r = some[r_order], r[r_order]
    return r, [LABELS[i] for i in some]


def _mapped(neurons: pa.Table, atlas: pa.Table) -> tuple[Floats, NDArray[Any], Bools]:
    """Places [n, 2] of the neurons that have one, their best labels and whether r is positive there."""
    placed = _beside(atlas, neurons)
    at = np.column_stack([floats(placed, "x"), floats(placed, "y")])
    known = np.isfinite(at).all(axis=1)
    best = np.array(neurons["best_label"].to_pylist(), object)
    return at[known], best[known], floats(neurons, "best_r")[known] > 0


def _beside(atlas: pa.Table, neurons: pa.Table) -> pa.Table:
    """The atlas's rows in the order of the neurons'; null where there is none."""
    rows = pc.index_in(neurons["neuron"].combine_chunks(), value_set=atlas["neuron"].combine_chunks())
    return atlas.select(["x", "y", "leaf"]).take(rows)


def _interval(
    panel: Axes,
    value: float | None,
    low: float | None,
    high: float | None,
    place: float,
    marker: str,
    colour: str,
    *,
    filled: bool,
) -> None:
    """A value with its interval, lying; nothing where it is undefined."""
    if value is None or not np.isfinite(value):
        return
    if low is not None and high is not None:
        panel.plot([low, high], [place, place], color=colour, linewidth=0.9)
    panel.plot(value, place, marker, color=colour, markerfacecolor=colour if filled else "white", mew=0.9)


def _mark(marker: str, colour: str, label: str, *, filled: bool = True, size: float = 4.5) -> Line2D:
    return Line2D(
        [], [], linestyle="", marker=marker, color=colour, markerfacecolor=colour if filled else "white",
        markersize=size, mew=0.9, label=label,
    )  # fmt: skip


def _optional(rows: Sequence[Mapping[str, Any]], name: str) -> Floats:
    return np.array([row[name] for row in rows], np.float64)


def _mean(values: Floats) -> float:
    """Of the finite ones."""
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if kept.size else np.nan


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %" if np.isfinite(share) else "undefined"


_TRAINED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("FVE", "fve", "{:.3f}".format),
    ("L0", "l0", "{:.1f}".format),
    ("dead", "dead", _percent),
    ("entropy", "entropy", "{:.2f} nats".format),
)
"""What is told of a checkpoint: the name and column of a figure, and how it is written."""


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _two_lines(label: str) -> str:
    """The one label that is too long for one."""
    return label.replace("Cardiomediastinum", "Cardio-\nmediastinum")


def _fve_floor(summary: Mapping[str, Any]) -> float:
    return summary.get("sae", {}).get("settings", {}).get("fve_floor", FitSettings.fve_floor)
