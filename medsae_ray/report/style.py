"""One style for all figures: sizes in mm, text of 8 points, colours and shapes that survive a grey printer.

A figure is made by a function under `@styled`, from `new_figure`, and turned into a file by `figure_bytes`:

    @styled
    def my_figure(table: pa.Table) -> Figure:
        figure, (top, bottom) = new_figure(height_mm=90, n_rows=2, share_x=True)
        …
        return figure

No pyplot and no display: importing this opens no window and leaves matplotlib's global settings alone.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, ParamSpec

import matplotlib.style
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter
from numpy.typing import ArrayLike, NDArray

SINGLE_MM, DOUBLE_MM = 89.0, 183.0
"""Widths of one column and of two columns of a printed page."""
TEXT_PT = 8.0
"""All text, at the figure's own size."""

BLACK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
"""Okabe and Ito's colours, told apart with any colour vision; in grey only in part, hence the shapes."""
GREY, PALE = "#6E6E6E", "#C8C8C8"
"""Reference lines, and what is there but does not count."""

STYLE = {
    "font.size": TEXT_PT,
    "axes.labelsize": TEXT_PT,
    "axes.titlesize": TEXT_PT,
    "xtick.labelsize": TEXT_PT,
    "ytick.labelsize": TEXT_PT,
    "legend.fontsize": TEXT_PT,
    "figure.titlesize": TEXT_PT,
    "figure.labelsize": TEXT_PT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.0,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.0,
    "legend.handletextpad": 0.5,
    "figure.constrained_layout.use": True,
    # Equal for the layout and for the file: text is a little wider at one resolution than at another.
    "figure.dpi": 300,
    "savefig.dpi": 300,
    # Text stays text, and no file differs from the next of the same figure.
    "svg.fonttype": "none",
    "svg.hashsalt": "medsae",
}


class Look(NamedTuple):
    """How one series is drawn."""

    name: str
    colour: str
    marker: str


ARCHITECTURES = {
    "relu": Look("ReLU-L1", BLACK, "o"),
    "gated": Look("Gated", BLUE, "s"),
    "jumprelu": Look("JumpReLU", VERMILION, "^"),
    "topk": Look("TopK", GREEN, "D"),
    "batchtopk": Look("BatchTopK", PURPLE, "v"),
    "matryoshka": Look("Matryoshka", ORANGE, "P"),
}
"""By the name in `fit.architecture`; in this order in every legend."""

P = ParamSpec("P")


def styled(make: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a function that makes a figure under `STYLE` alone, whatever the user's matplotlibrc says."""

    @functools.wraps(make)
    def under_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(STYLE, after_reset=True):
            return make(*args, **kwargs)

    return under_style


def new_figure(
    width_mm: float = SINGLE_MM,
    height_mm: float = 60.0,
    *,
    n_rows: int = 1,
    n_columns: int = 1,
    share_x: bool = False,
    share_y: bool = False,
    height_ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """An empty figure on an Agg canvas, laid out without overlaps, and its axes, row by row."""
    figure = Figure(figsize=(width_mm / 25.4, height_mm / 25.4))
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        n_rows, n_columns, sharex=share_x, sharey=share_y, squeeze=False, height_ratios=height_ratios
    )
    return figure, list(axes.flat)


def figure_bytes(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """The figure as a file: the same bytes for the same figure, without date or program name.

    PNG has 300 dots an inch; SVG holds its text as text.
    """
    settle(figure)
    names = {"png": ("Software",), "svg": ("Date", "Creator")}[kind]
    sink = io.BytesIO()
    with matplotlib.style.context(STYLE, after_reset=True):
        figure.savefig(sink, format=kind, metadata=dict.fromkeys(names))
    return sink.getvalue()


def figure_files(figure: Figure, name: str) -> dict[str, bytes]:
    """The figure as PNG and SVG, by file name."""
    return {f"{name}.{kind}": figure_bytes(figure, kind) for kind in ("png", "svg")}


@styled
def settle(figure: Figure) -> Figure:
    """Lay the figure out once and for all: what is placed by pixels holds from now on."""
    if figure.get_layout_engine() is not None:
        figure.align_ylabels()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def look_of(architecture: str) -> Look:
    """Name, colour and marker of an architecture; grey crosses for one that is not known here."""
    return ARCHITECTURES.get(architecture, Look(architecture, GREY, "X"))


def in_order(architectures: ArrayLike) -> list[str]:
    """The distinct ones, in the order of `ARCHITECTURES`, others after them by name."""
    known = list(ARCHITECTURES)
    found = {str(name) for name in np.asarray(architectures).tolist()}
    return sorted(found, key=lambda name: (known.index(name) if name in known else len(known), name))


def mean_sd(values: ArrayLike) -> tuple[float, float]:
    """Mean and standard deviation (n − 1) of the finite values; NaN where too few are."""
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    mean = float(kept.mean()) if kept.size else np.nan
    return mean, float(kept.std(ddof=1)) if kept.size > 1 else np.nan


def floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column as float64, NaN for null."""
    return table[name].to_numpy(zero_copy_only=False).astype(np.float64)


def tell_empty(panel: Axes, values: NDArray[np.float64]) -> None:
    """Say so in a panel that has no finite value to show."""
    if not np.isfinite(values).any():
        panel.set_yticks([])
        panel.text(0.5, 0.5, "no figures", transform=panel.transAxes, ha="center", va="center", color=GREY)


def log_axis(panel: Axes, which: Literal["x", "y"], values: NDArray[np.float64]) -> None:
    """A log axis with plain numbers, where every value allows one."""
    finite = values[np.isfinite(values)]
    if not finite.size or finite.min() <= 0:
        return
    panel.set(**{f"{which}scale": "log"})
    axis = panel.xaxis if which == "x" else panel.yaxis
    span = finite.max() / finite.min()
    if span < 5:
        axis.set_major_locator(MaxNLocator(4))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1,), numticks=9))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
