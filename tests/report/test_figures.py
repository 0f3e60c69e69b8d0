"""Figures of known tables: what is drawn, where, under which labels, and as which bytes."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import cache
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text

from medsae_ray.report import style
from medsae_ray.report.figures import (
    expansion_figure,
    figure_bytes,
    history_figure,
    matched_figure,
    pareto_figure,
    replicate_figure,
)

ARCHITECTURES = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
NAMES = ["ReLU-L1", "Gated", "JumpReLU", "TopK", "BatchTopK", "Matryoshka"]
SWEEP = pa.schema(
    [(name, pa.string()) for name in ("trial", "status", "architecture")]
    + [(name, pa.float64()) for name in ("l0", "fve", "dead", "entropy")]
    + [(name, pa.bool_()) for name in ("best", "front")]
)


def trial(i: int, architecture: str, l0: float | None, **told: Any) -> dict[str, Any]:
    row = {"trial": f"{architecture}-{i}", "status": "finished", "architecture": architecture, "l0": l0}
    figures = {"fve": 0.9 + 0.002 * i, "dead": 0.01 * i, "entropy": 2.0 + 0.01 * i}
    return {**row, **figures, "best": True, "front": False, **told}


def sweep() -> pa.Table:
    """Two trials an architecture, three on the front, two stopped; one failed, and one earlier evaluation."""
    rows = [
        trial(
            i,
            architecture,
            10.0 * 1.3**i,
            front=i in (1, 4, 9),
            status="stopped" if i in (5, 6) else "finished",
        )
        for i, architecture in enumerate((*ARCHITECTURES, *ARCHITECTURES))
    ]
    rows.append(trial(12, "relu", None, fve=None, dead=None, entropy=None, status="failed", best=False))
    rows.append(trial(0, "relu", 900.0, best=False))
    return pa.Table.from_pylist(rows, SWEEP)


def history() -> pa.Table:
    rows: list[dict[str, Any]] = []
    for epoch in range(1, 11):
        step = {"epoch": epoch, "step": 50 * epoch}
        rows.append({**step, "split": "train", "loss": 2.0 / epoch})
        rows.append(
            {**step, "split": "valid", "fve": 1 - 1 / (epoch + 1), "l0": 400.0 / epoch, "dead": 0.02 * epoch,
             "entropy": 2.4 - 0.02 * epoch, "selection": 2 + abs(epoch - 7), "loss": 1.0}
        )  # fmt: skip
    schema = [("epoch", pa.int32()), ("step", pa.int64()), ("split", pa.string())]
    schema += [(name, pa.float64()) for name in ("fve", "l0", "dead", "entropy", "selection", "loss")]
    return pa.Table.from_pylist(rows, pa.schema(schema))


def matched() -> pa.Table:
    rng = np.random.default_rng(0)
    rows = []
    for by in ("l0", "fve"):
        for architecture in ARCHITECTURES:
            for seed in range(3):
                entropy = rng.normal(2.2, 0.02)
                rows.append(
                    {"architecture": architecture, "seed": seed, "matched": by,
                     "dead_train": rng.uniform(0, 0.3), "fve": rng.normal(0.95, 0.004),
                     "l0": rng.normal(32, 1), "entropy": entropy,
                     "entropy_low": entropy - 0.04, "entropy_high": entropy + 0.03,
                     "entropy_floor": rng.normal(2.38, 0.002), "best_auroc": rng.uniform(0.9, 1)}
                )  # fmt: skip
    return pa.Table.from_pylist(rows)


def expansions() -> pa.Table:
    rng = np.random.default_rng(1)
    return pa.Table.from_pylist(
        [
            {"expansion": size, "seed": seed, "entropy": rng.normal(2.2, 0.02), "entropy_floor": 2.38,
             "fve": rng.normal(0.96, 0.01), "dead_train": rng.uniform(0, 0.4), "l0": rng.normal(50, 5)}
            for size in (8, 16, 32)
            for seed in range(3)
        ]
    )  # fmt: skip


def replicate() -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "normalisation": "unit",
                "entropy": 2.29,
                "raw_entropy": 2.41,
                "entropy_labels": 14,
                "fve": 0.97,
                "dead": 0.07,
            },
            {
                "normalisation": "dim",
                "entropy": 2.33,
                "raw_entropy": 2.40,
                "entropy_labels": 14,
                "fve": 0.995,
                "dead": 0.01,
            },
        ]
    )


FIGURES = {
    "pareto": lambda: pareto_figure(sweep()),
    "history": lambda: history_figure(history()),
    "matched_l0": lambda: matched_figure(matched()),
    "matched_fve": lambda: matched_figure(matched(), by="fve"),
    "expansion": lambda: expansion_figure(expansions()),
    "replicate": lambda: replicate_figure(replicate()),
}


@cache
def figure_of(name: str) -> Figure:
    """One of them, drawn once for all the tests that only look at it."""
    return FIGURES[name]()


every = pytest.mark.parametrize("name", FIGURES)


def drawn(panel: Axes) -> np.ndarray:
    """Every finite point [n, 2] of the panel's lines and bars that stands for data."""
    points = [
        np.column_stack(line.get_data()) for line in panel.lines if line.get_transform() == panel.transData
    ]
    for collection in panel.collections:
        if isinstance(collection, LineCollection):
            points += [np.asarray(segment) for segment in collection.get_segments()]
    found = np.concatenate([np.empty((0, 2)), *(np.asarray(p, float) for p in points)])
    return found[np.isfinite(found).all(axis=1)]


def assert_inside(figure: Figure) -> None:
    for panel in figure.axes:
        for values, (low, high) in zip(drawn(panel).T, (panel.get_xlim(), panel.get_ylim()), strict=True):
            assert ((values >= low) & (values <= high)).all()


def texts(figure: Figure) -> list[Text]:
    """What is written and seen."""
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    ticks = {
        id(tick.label1): low <= tick.get_loc() <= high
        for panel in figure.axes
        for axis, (low, high) in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim()))
        for tick in axis.get_major_ticks()
    }
    return [text for text in found if ticks.get(id(text), True)]


def legend(figure: Figure, which: int = 0) -> list[str]:
    return [text.get_text() for text in figure.legends[which].get_texts()]


def with_label(figure: Figure, start: str) -> Axes:
    (panel,) = (p for p in figure.axes if p.get_ylabel().startswith(start))
    return panel


# --------------------------------------------------------------------------------------- all of them


@every
def test_all_that_is_drawn_lies_within_its_axes(name: str) -> None:
    figure = figure_of(name)
    assert all(len(drawn(panel)) for panel in figure.axes)
    assert_inside(figure)


@every
def test_text_is_legible_and_nothing_overlaps(name: str) -> None:
    figure = figure_of(name)
    assert figure.get_size_inches()[0] * 25.4 == pytest.approx(style.SINGLE_MM)
    written = texts(figure)
    assert len(written) > 10
    assert min(text.get_fontsize() for text in written) >= 8
    canvas = figure.bbox
    boxes = [(text.get_text(), text.get_window_extent()) for text in written]
    for text, box in boxes:
        assert canvas.x0 <= box.x0 < box.x1 <= canvas.x1, text
        assert canvas.y0 <= box.y0 < box.y1 <= canvas.y1, text
    slanted = {text.get_text() for text in written if text.get_rotation() % 90}
    for (one, a), (other, b) in combinations(boxes, 2):
        # The boxes of slanted labels overlap where the labels do not.
        assert {one, other} <= slanted or not a.overlaps(b), (one, other)


@every
def test_axes_have_names_with_units(name: str) -> None:
    labels = [panel.get_ylabel().replace("\n", " ") for panel in figure_of(name).axes]
    assert all(labels)
    units = {"dead": "(%)", "mean entropy": "(nats)", "L0": "(neurons an image)"}
    for label in labels:
        assert all(label.endswith(unit) for start, unit in units.items() if label.startswith(start))


@every
def test_bytes_are_the_same_again(name: str) -> None:
    again = FIGURES[name]()
    for kind in ("png", "svg"):
        assert figure_bytes(figure_of(name), kind) == figure_bytes(again, kind)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_saving_changes_no_figure(kind: Any) -> None:
    figure = FIGURES["replicate"]()
    assert figure_bytes(figure, kind) == figure_bytes(figure, kind)


def test_files_are_what_they_say() -> None:
    figure = figure_of("pareto")
    png, svg = figure_bytes(figure, "png"), figure_bytes(figure, "svg")
    assert png.startswith(b"\x89PNG")
    width = int.from_bytes(png[16:20], "big")
    assert width == pytest.approx(style.SINGLE_MM / 25.4 * 300, abs=1)
    assert b"Software" not in png
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    told = {"".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("}text")}
    assert {"mean entropy (nats)", "BatchTopK"} <= told
    assert b"dc:date" not in svg
    assert b"matplotlib.org" not in svg


def test_the_users_style_neither_enters_nor_changes() -> None:
    plain = figure_bytes(figure_of("replicate"), "png")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert figure_bytes(replicate_figure(replicate()), "png") == plain
        assert dict(matplotlib.rcParams) == before


def test_no_pyplot() -> None:
    code = "import sys, medsae_ray.report.figures; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_architectures_differ_by_shape_and_by_colour() -> None:
    looks = [style.look_of(name) for name in ARCHITECTURES]
    assert [look.name for look in looks] == NAMES
    assert len({look.marker for look in looks}) == len({look.colour for look in looks}) == 6
    assert style.look_of("mine").marker not in {look.marker for look in looks}
    assert style.in_order(["topk", "mine", "relu", "topk"]) == ["relu", "topk", "mine"]


# ------------------------------------------------------------------------------------------ one by one


def test_pareto() -> None:
    figure = figure_of("pareto")
    assert [panel.get_ylabel() for panel in figure.axes] == ["FVE", "dead neurons (%)", "mean entropy (nats)"]
    assert figure.axes[-1].get_xlabel() == "L0 (neurons an image)"
    assert {panel.get_xscale() for panel in figure.axes} == {"log"}
    assert legend(figure) == [*NAMES, "Pareto front", "stopped early", "FVE floor 0.95"]
    assert [name.split("\u2002")[1] for name in legend(figure, 1)] == ["gated-1", "batchtopk-4", "topk-9"]
    best = [row for row in sweep().to_pylist() if row["best"]]
    for panel, name, scale in zip(figure.axes, ("fve", "dead", "entropy"), (1, 100, 1), strict=True):
        points = drawn(panel)
        wanted = {(row["l0"], scale * row[name]) for row in best}
        rings = {(row["l0"], scale * row[name]) for row in best if row["front"]}
        assert {tuple(point) for point in points} - {(0.0, 0.95), (1.0, 0.95)} == wanted
        ringed = [line for line in panel.lines if line.get_markersize() == 9]
        assert [set(zip(*line.get_data(), strict=True)) for line in ringed] == [rings]
        pale = {
            tuple(p) for line in panel.lines if line.get_alpha() for p in zip(*line.get_data(), strict=True)
        }
        assert pale == {(row["l0"], scale * row[name]) for row in best if row["status"] == "stopped"}
        numbers = {text.get_text(): text.xy for text in panel.texts}
        assert sorted(numbers) == ["1", "2", "3"]
        assert numbers["2"] == pytest.approx((best[4]["l0"], scale * best[4][name]))
    (floor,) = (line for line in figure.axes[0].lines if line.get_linestyle() == "--")
    assert list(floor.get_ydata()) == [0.95, 0.95]


def test_pareto_numbers_stand_apart_in_a_crowd() -> None:
    rows = [trial(i, ARCHITECTURES[i % 6], 30 + 0.3 * i, front=True, fve=0.96, dead=0.0) for i in range(12)]
    figure = pareto_figure(pa.Table.from_pylist(rows, SWEEP))
    figure.draw_without_rendering()
    for panel in figure.axes:
        boxes = [Text.get_window_extent(text) for text in panel.texts]
        assert len(boxes) == 12
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


@settings(deadline=None, max_examples=8)
@given(
    st.lists(
        st.tuples(
            st.floats(0.05, 5000), st.floats(-3, 1), st.floats(0, 1), st.none() | st.floats(0, 2.64),
            st.sampled_from(ARCHITECTURES), st.booleans(), st.sampled_from(["finished", "stopped", "failed"]),
        ),
        max_size=12,
    )
)  # fmt: skip
def test_any_sweep_is_drawn_within_its_axes(trials: list[tuple[Any, ...]]) -> None:
    rows = [
        trial(i, kind, l0, fve=fve, dead=dead, entropy=entropy, front=front, status=status)
        for i, (l0, fve, dead, entropy, kind, front, status) in enumerate(trials)
    ]
    figure = pareto_figure(pa.Table.from_pylist(rows, SWEEP))
    assert_inside(figure)
    assert len(figure.axes[1].texts) == (sum(row["front"] for row in rows) if rows else 1)


def test_history() -> None:
    figure = figure_of("history")
    valid = [row for row in history().to_pylist() if row["split"] == "valid"]
    assert [panel.get_ylabel().split("\n")[0] for panel in figure.axes] == [
        "FVE", "L0", "dead neurons", "mean entropy", "loss",
    ]  # fmt: skip
    assert figure.axes[-1].get_xlabel() == "optimiser step"
    assert [panel.get_yscale() for panel in figure.axes] == ["linear", "log", "linear", "linear", "log"]
    assert legend(figure) == ["validation", "training", "FVE floor 0.95", "chosen checkpoint"]
    for panel, name, scale in zip(
        figure.axes, ("fve", "l0", "dead", "entropy"), (1, 1, 100, 1), strict=False
    ):
        assert panel.lines[0].get_ydata() == pytest.approx([scale * row[name] for row in valid])
        (ring,) = (line for line in panel.lines if line.get_markersize() == 9)
        assert ring.get_xydata()[0] == pytest.approx((350, scale * valid[6][name]))
    assert figure.axes[4].lines[0].get_ydata() == pytest.approx([2.0 / epoch for epoch in range(1, 11)])


def test_history_without_a_score_has_no_chosen_checkpoint() -> None:
    table = history()
    at = table.column_names.index("selection")
    table = table.set_column(at, "selection", pa.nulls(table.num_rows, pa.float64()))
    figure = history_figure(table)
    assert not [line for panel in figure.axes for line in panel.lines if line.get_markersize() == 9]
    assert "chosen checkpoint" not in legend(figure)


def bars(panel: Axes) -> list[tuple[float, float, float]]:
    """Mean, lower and upper end of each error bar."""
    found = []
    for container in panel.containers:
        assert isinstance(container, ErrorbarContainer)
        segments = container[2][0].get_segments()[0]
        found.append((float(container[0].get_ydata()[0]), segments[0, 1], segments[1, 1]))
    return found


@pytest.mark.parametrize("by", ["l0", "fve"])
def test_matched(by: Any) -> None:
    figure = figure_of(f"matched_{by}")
    rows = [row for row in matched().to_pylist() if row["matched"] == by]
    last = figure.axes[-1]
    assert [label.get_text() for label in last.get_xticklabels()] == NAMES
    low, high = (f(row[by] for row in rows) for f in (min, max))
    told = f"L0 {low:.1f} to {high:.1f}" if by == "l0" else f"FVE {low:.3f} to {high:.3f}"
    assert last.get_xlabel() == f"matched at {told}"
    assert legend(figure) == ["mean ± SD", "seed", "noise floor"]
    for panel, name, scale in (
        (with_label(figure, "dead"), "dead_train", 100),
        (with_label(figure, "FVE"), "fve", 1),
        (with_label(figure, "mean entropy"), "entropy", 1),
        (with_label(figure, "best AUROC"), "best_auroc", 1),
    ):
        of = [[scale * row[name] for row in rows if row["architecture"] == kind] for kind in ARCHITECTURES]
        wanted = [(fmean(v), fmean(v) - stdev(v), fmean(v) + stdev(v)) for v in of]
        assert np.array(bars(panel)) == pytest.approx(np.array(wanted))
        faint = [line.get_ydata() for line in panel.lines if line.get_alpha()]
        assert np.array(faint) == pytest.approx(np.array(of))
    entropy = with_label(figure, "mean entropy")
    intervals = [c for c in entropy.collections if c.get_alpha()]
    ends = np.array([segment[:, 1] for c in intervals for segment in c.get_segments()])
    assert ends == pytest.approx(np.array([(row["entropy_low"], row["entropy_high"]) for row in rows]))
    floors = [line.get_ydata()[0] for line in entropy.lines if len(line.get_xdata()) == 2]
    assert floors == pytest.approx(
        [fmean(row["entropy_floor"] for row in rows if row["architecture"] == kind) for kind in ARCHITECTURES]
    )


def test_a_single_seed_has_no_bar() -> None:
    one = matched().filter(pa.compute.equal(matched()["seed"], 0))
    figure = matched_figure(one)
    for panel in figure.axes:
        assert all(not np.isfinite(c[2][0].get_segments()).any() for c in panel.containers if c.has_yerr)
    assert_inside(figure)


def test_expansion() -> None:
    figure = figure_of("expansion")
    last = figure.axes[-1]
    assert [label.get_text() for label in last.get_xticklabels()] == ["8", "16", "32"]
    assert last.get_xlabel() == "expansion (neurons per embedding dimension)"
    assert last.get_xscale() == "log"
    assert legend(figure) == ["mean ± SD", "seed", "noise floor"]
    rows = expansions().to_pylist()
    for panel, name, scale in zip(
        figure.axes, ("entropy", "fve", "dead_train", "l0"), (1, 1, 100, 1), strict=True
    ):
        of = [[scale * row[name] for row in rows if row["expansion"] == size] for size in (8, 16, 32)]
        wanted = [(fmean(v), fmean(v) - stdev(v), fmean(v) + stdev(v)) for v in of]
        assert np.array(bars(panel)) == pytest.approx(np.array(wanted))
        assert sum(len(line.get_xdata()) for line in panel.lines if line.get_alpha()) == 9
    (floor,) = (line for line in figure.axes[0].lines if line.get_linestyle() == "--")
    assert list(floor.get_ydata()) == pytest.approx([2.38] * 3)


def test_replicate() -> None:
    figure = figure_of("replicate")
    assert [panel.get_ylabel() for panel in figure.axes] == ["mean entropy (nats)", "FVE", "dead neurons (%)"]
    ticks = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert ticks == ["mean ‖x‖² = 1", "mean ‖x‖² = d"]
    assert legend(figure) == ["neurons", "raw dimensions", "paper, neurons", "paper, raw dimensions"]
    papers = [
        [line.get_ydata()[0] for line in p.lines if line.get_linestyle() in ("--", ":")] for p in figure.axes
    ]
    assert papers == [[2.25, 2.38], [0.98], [30.0]]
    ours = [[float(c[0].get_ydata()[0]) for c in panel.containers] for panel in figure.axes]
    assert ours == [pytest.approx(v) for v in ([2.29, 2.33, 2.41, 2.40], [0.97, 0.995], [7.0, 1.0])]


def test_empty_tables_are_drawn_as_such() -> None:
    for figure in (
        pareto_figure(SWEEP.empty_table()),
        history_figure(history().slice(0, 0)),
        matched_figure(matched().slice(0, 0)),
        expansion_figure(expansions().slice(0, 0)),
    ):
        assert all(panel.texts[0].get_text() == "no figures" for panel in figure.axes)
        assert figure_bytes(figure, "png").startswith(b"\x89PNG")
