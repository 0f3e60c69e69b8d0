"""Figures of the atlas, of known tables: what is drawn is what was given, legible, small and in words."""

import base64
import re
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch
from test_figures import drawn, history, legend, sweep, texts

from medsae_ray.controls import CONTROLS, controls_table
from medsae_ray.labels import LABELS
from medsae_ray.measure import neurons_schema
from medsae_ray.report import style
from medsae_ray.report.atlas_figures import (
    SIGNED,
    auroc_figure,
    correlation_figure,
    density_figure,
    detection_figure,
    entropy_figure,
    localisation_figure,
    neuron_map_figure,
    overview_figures,
)
from medsae_ray.report.figures import figure_bytes
from medsae_ray.tables import ATLAS, DETECTIONS, LOCALISATION

N_IMAGES = 200


def units(n: int, seed: int = 0, labels: tuple[str, ...] = LABELS, **columns: Any) -> pa.Table:
    """A `neurons` table of random figures; a unit that fires on no image has none."""
    rng = np.random.default_rng(seed)
    n_firing = np.where(rng.random(n) < 0.15, 0, rng.integers(1, N_IMAGES, n))
    alive = n_firing > 0
    r = np.where(alive[:, None], np.clip(rng.normal(0, 0.3, (n, 14)), -1, 1), np.nan)
    r[:, [label not in labels for label in LABELS]] = np.nan
    best = np.nan_to_num(np.abs(r)).argmax(axis=1)
    told: dict[str, Any] = {
        "neuron": np.arange(n),
        "n_firing": n_firing,
        "density": n_firing / N_IMAGES,
        "dead": ~alive,
        "dead_train": rng.random(n) < 0.1,
        "entropy": np.where(alive, rng.uniform(1.8, 2.6, n), np.nan),
        "n_labels": np.where(alive, len(labels), 0),
        "entropy_floor": np.where(alive, rng.normal(2.37, 0.03, n), np.nan),
        "best_label": [LABELS[i] if a else None for i, a in zip(best, alive, strict=True)],
        "best_r": r[np.arange(n), best],
        **{f"r_{label}": r[:, i] for i, label in enumerate(LABELS)},
        **columns,
    }
    schema = neurons_schema()
    empty = {f.name: np.zeros(n, int) if not f.nullable else [None] * n for f in schema}
    arrays = [pa.array((empty | told)[f.name], f.type, from_pandas=True) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def neurons() -> pa.Table:
    return units(60)


def dimensions() -> pa.Table:
    return units(20, 1)


def controls() -> pa.Table:
    return pa.concat_tables([controls_table(kind, units(15, i)) for i, kind in enumerate(CONTROLS, 2)])


def atlas_of(table: pa.Table, seed: int = 0) -> pa.Table:
    """Places and leaves for living neurons, its rows in another order than the neurons'."""
    rng = np.random.default_rng(seed)
    alive = table.filter(pc.invert(table["dead"]))["neuron"].to_pylist()
    leaf = dict(zip(rng.permutation(alive).tolist(), range(len(alive)), strict=True))
    rows = [
        {"neuron": i, "x": rng.normal() if i in leaf else None, "y": rng.normal() if i in leaf else None,
         "leaf": leaf.get(i), "nearest": [], "cosine": [], "bins": [], "shortcuts": []}
        for i in table["neuron"].to_pylist()
    ]  # fmt: skip
    return pa.Table.from_pylist(rows[::-1], ATLAS)


def detections(n: int = 24) -> pa.Table:
    """One without enough answers, of the highest accuracy; one without a shuffled null."""
    rng = np.random.default_rng(5)
    rows = []
    for i in range(n):
        # 28 of 40, as a sum of two rates may round it.
        rounded = {3: 1.0, 6: float(np.nextafter(0.7, 1))}
        accuracy = rounded.get(i, float(rng.integers(18, 39) / 40))
        rows.append(
            {"neuron": i, "named": i != 3, "balanced_accuracy": accuracy,
             "balanced_accuracy_low": accuracy - 0.15, "balanced_accuracy_high": min(1, accuracy + 0.1),
             "n_positive": 20, "n_negative": 20, "n_unparsed": 0, "n_failed": 0, "enough": i != 3,
             "n_shuffled": 40, "tpr_by_quantile": [], "n_by_quantile": [],
             "shuffled_balanced_accuracy": None if i == 4 else float(rng.integers(15, 25) / 40)}
        )  # fmt: skip
    return pa.Table.from_pylist(rows, DETECTIONS)


def located(finding: str, hit_rate: float | None = None, **told: Any) -> dict[str, Any]:
    row = {"finding": finding, "n_boxed": 40, "n": 0, "n_patients": 0}
    if hit_rate is None:
        return row
    figures = {
        "neuron": 3, "n": 30, "n_patients": 25, "hit_rate": hit_rate, "hit_rate_low": hit_rate - 0.1,
        "hit_rate_high": hit_rate + 0.05, "box_share": 0.21, "other_hit_rate": 0.3, "iou": hit_rate / 2,
        "iou_low": hit_rate / 2 - 0.04, "iou_high": hit_rate / 2 + 0.06, "other_iou": 0.11,
        "above_chance": hit_rate > 0.4,
    }  # fmt: skip
    return {**row, **figures, **told}


def localisation() -> pa.Table:
    rows = [
        located("Edema", 0.35),
        located("Pleural Other"),
        located("Enlarged Cardiomediastinum", 0.9),
        located("Lung Lesion", 0.6, other_hit_rate=None, other_iou=None),
    ]
    return pa.Table.from_pylist(rows, LOCALISATION)


def summary() -> dict[str, Any]:
    """Fourteen labels; one without a chosen unit, one with too few positives to be separated."""
    rng = np.random.default_rng(2)
    told: dict[str, Any] = {}
    for name in ("labels", "labels_raw"):
        told[name] = []
        for i, label in enumerate(LABELS):
            area = float(rng.uniform(0.55, 0.97))
            row = {
                "label": label, "neuron": i, "auroc": area, "auroc_low": area - 0.06,
                "auroc_high": area + 0.02, "n_positive": 20 if i == 5 else 50 + i,
                "separated": area > 0.8 and i != 5,
            }  # fmt: skip
            undefined = {"neuron": None, "auroc": None, "auroc_low": None, "auroc_high": None}
            told[name].append({**row, **undefined, "separated": False} if i == 2 else row)
    return told


FIGURES = {
    "entropy": lambda: entropy_figure(neurons(), dimensions(), controls()),
    "density": lambda: density_figure(neurons()),
    "detection": lambda: detection_figure(detections()),
    "detection_wide": lambda: detection_figure(detections(100)),
    "auroc": lambda: auroc_figure(summary()),
    "localisation": lambda: localisation_figure(localisation()),
    "correlation": lambda: correlation_figure(neurons(), atlas_of(neurons())),
    "neuron_map": lambda: neuron_map_figure(neurons(), atlas_of(neurons())),
}


@cache
def figure_of(name: str) -> Figure:
    """One of them, drawn once for all the tests that only look at it."""
    return FIGURES[name]()


every = pytest.mark.parametrize("name", FIGURES)


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy(zero_copy_only=False).astype(float)


def vertical(panel: Axes, linestyle: str, colour: str) -> list[float]:
    """Where vertical lines of this look stand."""
    return [
        float(line.get_xdata()[0])
        for line in panel.lines
        if line.get_linestyle() == linestyle and line.get_color() == colour and len(line.get_xdata()) == 2
    ]


def marks(panel: Axes, marker: str, colour: str) -> np.ndarray:
    """Finite points [n, 2] of this look."""
    found = [
        np.column_stack(line.get_data())
        for line in panel.lines
        if line.get_marker() == marker and line.get_color() == colour
    ]
    points = np.concatenate([np.empty((0, 2)), *(np.asarray(p, float) for p in found)])
    return points[np.isfinite(points).all(axis=1)]


def assert_inside(figure: Figure) -> None:
    for panel in figure.axes:
        for values, ends in zip(drawn(panel).T, (panel.get_xlim(), panel.get_ylim()), strict=True):
            assert ((values >= min(ends)) & (values <= max(ends))).all()


def tick_labels(panel: Axes) -> list[str]:
    return [label.get_text().replace("-\n", "").replace("\n", " ") for label in panel.get_yticklabels()]


# --------------------------------------------------------------------------------------- all of them


@every
def test_text_is_legible_and_nothing_overlaps(name: str) -> None:
    figure = figure_of(name)
    width = figure.get_size_inches()[0] * 25.4
    assert width == pytest.approx(style.SINGLE_MM) or width == pytest.approx(style.DOUBLE_MM)
    written = texts(figure)
    assert len(written) > 10
    assert min(text.get_fontsize() for text in written) >= 8
    boxes = [(text.get_text(), text.get_window_extent()) for text in written]
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)


@every
def test_all_that_is_drawn_lies_within_its_axes(name: str) -> None:
    assert_inside(figure_of(name))


@pytest.mark.parametrize("name", ["detection", "correlation", "neuron_map"])
def test_bytes_are_the_same_again(name: str) -> None:
    again = FIGURES[name]()
    for kind in ("png", "svg"):
        assert figure_bytes(figure_of(name), kind) == figure_bytes(again, kind)


def test_lightness_tells_the_sign_without_colour() -> None:
    red, green, blue, _ = SIGNED(np.linspace(0, 1, 101)).T
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    assert (np.diff(grey) > 0).all()
    assert SIGNED(0.5)[0] == pytest.approx(SIGNED(0.5)[2], abs=0.01)
    assert grey[50] == pytest.approx((grey[0] + grey[-1]) / 2, abs=0.05)


# ------------------------------------------------------------------------------------------ one by one


def test_entropy() -> None:
    figure = figure_of("entropy")
    tables = [neurons(), dimensions(), *(units(15, i) for i in range(2, 8))]
    names = ["SAE", "raw dimensions", "untrained SAE", "random rotation", "PCA", "ICA", "ICA, leading PCs"]
    assert [p.get_ylabel().split("\n")[0] for p in figure.axes] == [*names, "shuffled SAE"]
    assert figure.axes[-1].get_xlabel() == "entropy of |r| over 14 labels (nats)"
    assert legend(figure) == ["mean", "noise floor", "the SAE's mean", "the paper's mean"]
    means = []
    for panel, table in zip(figure.axes, tables, strict=True):
        living = column(table, "n_firing") >= 10
        h, floor = column(table, "entropy")[living], column(table, "entropy_floor")[living]
        assert panel.get_ylabel().endswith(f"\n{living.sum()}")
        for patch in (p for p in panel.patches if isinstance(p, StepPatch)):
            heights, edges, _ = patch.get_data()
            assert np.diff(edges) == pytest.approx(np.full(len(heights), 0.05))
            counts = [((h >= a) & (h < b)).sum() for a, b in pairwise(edges)]
            assert heights == pytest.approx(100 * np.array(counts) / living.sum())
            assert heights.sum() == pytest.approx(100)
        means.append(h.mean())
        assert vertical(panel, "-", style.BLACK) == [pytest.approx(h.mean())]
        assert vertical(panel, "--", style.GREY) == [pytest.approx(floor.mean())]
        assert vertical(panel, "-", style.PALE) == ([] if len(means) == 1 else [pytest.approx(means[0])])
    papers = [marks(panel, "v", style.VERMILION)[:, 0].tolist() for panel in figure.axes]
    assert papers == [[2.25], [2.38], [], [], [], [], [], []]


def test_entropy_of_fewer_labels_is_not_set_beside_the_paper() -> None:
    figure = entropy_figure(units(30, labels=LABELS[:12]))
    assert legend(figure) == ["mean", "noise floor"]
    assert not len(marks(figure.axes[0], "v", style.VERMILION))
    assert "over 12 labels" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("edge", [0.85, 1.7, 1.95, 2.0])
def test_no_neuron_is_lost_beside_an_edge(edge: float) -> None:
    entropy = [edge, np.nextafter(edge, 3), edge + 0.01]
    panel = entropy_figure(units(3, n_firing=[50] * 3, entropy=entropy)).axes[0]
    assert panel.patches[0].get_data().values.sum() == pytest.approx(100)


def test_min_firing_decides_who_counts() -> None:
    table = units(40)
    for least in (1, 50):
        living = (column(table, "n_firing") >= least).sum()
        assert entropy_figure(table, min_firing=least).axes[0].get_ylabel() == f"SAE\n{living}"


def test_density() -> None:
    table = neurons()
    top, bottom = figure_of("density").axes
    assert (top.get_xscale(), top.get_xlabel()) == ("log", "density: test images on which it fires (%)")
    n_firing = column(table, "n_firing")
    alive = n_firing > 0
    heights, edges, _ = next(p for p in top.patches if isinstance(p, StepPatch)).get_data()
    # The area over the log axis is the number of neurons, and no bar is without a number of images.
    assert (heights * np.diff(np.log10(edges)) / 0.1).sum() == pytest.approx(alive.sum())
    images = edges * N_IMAGES / 100
    assert images == pytest.approx(np.rint(images))
    assert (images[0], images[-1]) == (pytest.approx(1), pytest.approx(N_IMAGES + 1))
    for height, (first, last) in zip(heights, pairwise(images), strict=True):
        inside = ((n_firing > first - 0.5) & (n_firing < last - 0.5)).sum()
        assert height == pytest.approx(inside * 0.1 / np.log10(last / first))
    assert vertical(top, "--", style.BLACK) == [pytest.approx(100 * np.median(n_firing[alive]) / N_IMAGES)]
    dead, train = column(table, "dead"), column(table, "dead_train")
    wanted = [dead.mean(), train.mean(), (dead * train).mean()]
    bars = [p.get_width() for p in bottom.patches if isinstance(p, Rectangle)]
    assert bars == [pytest.approx(100 * share) for share in wanted]
    told = [text.get_text() for text in bottom.texts]
    assert told == [f"{round(share * 60)} ({100 * share:.1f} %)" for share in wanted]
    assert vertical(bottom, ":", style.VERMILION) == [30.0]


def test_density_where_the_training_split_is_not_known() -> None:
    figure = density_figure(units(10, dead_train=[None] * 10))
    assert [text.get_text() for text in figure.axes[1].texts][1:] == ["not known", "not known"]


def test_detection() -> None:
    (panel,) = figure_of("detection").axes
    rows = sorted(
        (row for row in detections().to_pylist() if row["enough"]), key=lambda row: -row["balanced_accuracy"]
    )
    assert len(rows) == 23
    place = np.arange(1, 24)
    own = marks(panel, "o", style.BLACK)
    assert own[np.argsort(own[:, 0])] == pytest.approx(
        np.column_stack([place, [100 * row["balanced_accuracy"] for row in rows]])
    )
    hollow = [p for line in panel.lines if line.get_markerfacecolor() == "white" for p in line.get_xdata()]
    assert hollow == [p for p, row in zip(place, rows, strict=True) if row["balanced_accuracy_low"] <= 0.5]
    assert 0 < len(hollow) < 23
    (bars,) = (c for c in panel.collections if isinstance(c, LineCollection))
    assert np.array(bars.get_segments()) == pytest.approx(
        np.array(
            [
                [(p, 100 * row["balanced_accuracy_low"]), (p, 100 * row["balanced_accuracy_high"])]
                for p, row in zip(place, rows, strict=True)
            ]
        )
    )
    null = [
        (p, 100 * row["shuffled_balanced_accuracy"])
        for p, row in zip(place, rows, strict=True)
        if row["shuffled_balanced_accuracy"] is not None
    ]
    assert marks(panel, "x", style.VERMILION) == pytest.approx(np.array(null))
    levels = {line.get_ydata()[0] for line in panel.lines if line.get_color() == style.GREY}
    assert levels == {50, 70}


def test_auroc() -> None:
    (panel,) = figure_of("auroc").axes
    told = summary()
    raw = {row["label"]: row for row in told["labels_raw"]}
    rows = sorted(told["labels"], key=lambda row: -(row["auroc"] or -1))
    assert tick_labels(panel) == [f"{row['label']} ({row['n_positive']})" for row in rows]
    assert rows[-1]["label"] == "Cardiomegaly"
    for marker, colour, shift, of in (
        ("o", style.BLACK, -0.17, rows),
        ("s", style.BLUE, 0.17, [raw[row["label"]] for row in rows]),
    ):
        places = [(row["auroc"], i + shift) for i, row in enumerate(of) if row["auroc"] is not None]
        assert marks(panel, marker, colour) == pytest.approx(np.array(places))
        filled = [
            line.get_markerfacecolor() == colour
            for line in panel.lines
            if line.get_marker() == marker and line.get_color() == colour
        ]
        assert filled == [row["separated"] for row in of if row["auroc"] is not None]
        ends = [
            tuple(line.get_xdata())
            for line in panel.lines
            if line.get_color() == colour and line.get_marker() == "None"
        ]
        wanted = [(row["auroc_low"], row["auroc_high"]) for row in of if row["auroc"] is not None]
        assert np.array(ends) == pytest.approx(np.array(wanted))


def test_localisation() -> None:
    left, right = figure_of("localisation").axes
    findings = ["Enlarged Cardiomediastinum (30)", "Lung Lesion (30)", "Edema (30)", "Pleural Other (0)"]
    assert tick_labels(left) == findings
    assert left.get_xlabel() == "hit rate of the pointing game (%)"
    assert marks(left, "o", style.BLACK) == pytest.approx(np.array([(90, 0), (60, 1), (35, 2)]))
    assert marks(right, "o", style.BLACK) == pytest.approx(np.array([(0.45, 0), (0.3, 1), (0.175, 2)]))
    assert marks(left, "|", style.VERMILION) == pytest.approx(np.array([(21, 0), (21, 1), (21, 2)]))
    assert marks(right, "|", style.VERMILION)[:, 0] == pytest.approx([0.21] * 3)
    assert marks(left, "D", style.BLUE) == pytest.approx(np.array([(30, 0), (30, 2)]))
    assert marks(right, "D", style.BLUE) == pytest.approx(np.array([(0.11, 0), (0.11, 2)]))
    for panel, ends in ((left, [(80, 95), (50, 65), (25, 40)]), (right, [(0.41, 0.51), (0.26, 0.36)])):
        lines = [line for line in panel.lines if line.get_marker() == "None"]
        found = [tuple(line.get_xdata()) for line in lines]
        assert np.array(found[: len(ends)]) == pytest.approx(np.array(ends))
        hollow = [line.get_markerfacecolor() for line in panel.lines if line.get_marker() == "o"]
        assert hollow == [style.BLACK, style.BLACK, "white"]


def heat_map(figure: Figure) -> QuadMesh:
    (mesh,) = (c for c in figure.axes[0].collections if isinstance(c, QuadMesh))
    return mesh


def test_correlation() -> None:
    table, figure = neurons(), figure_of("correlation")
    atlas = {row["neuron"]: row["leaf"] for row in atlas_of(table).to_pylist()}
    order = sorted((i for i, leaf in atlas.items() if leaf is not None), key=lambda i: atlas[i])
    panel, bar = figure.axes
    labels = tick_labels(panel)
    assert sorted(labels) == sorted(LABELS)
    wanted = np.array([[table[f"r_{label}"][i].as_py() for i in order] for label in labels])
    mesh = heat_map(figure)
    assert np.asarray(mesh.get_array()).reshape(wanted.shape) == pytest.approx(wanted)
    low, high = mesh.get_clim()
    assert low == -high
    assert high >= np.abs(wanted).max()
    assert bar.get_ylabel() == "Pearson's r (test)"


def test_labels_that_go_together_stand_together() -> None:
    table = units(40)
    twin = table["r_No Finding"]
    table = table.set_column(table.column_names.index("r_Support Devices"), "r_Support Devices", twin)
    labels = tick_labels(correlation_figure(table, atlas_of(table)).axes[0])
    assert abs(labels.index("No Finding") - labels.index("Support Devices")) == 1


def test_labels_and_cells_without_r() -> None:
    table = units(30, labels=LABELS[:12])
    holes = table["r_Edema"].to_numpy().copy()
    alive = np.flatnonzero(~np.isnan(holes))
    holes[alive[4]] = np.nan
    at = table.column_names.index("r_Edema")
    table = table.set_column(at, table.schema.field(at), pa.array(holes, from_pandas=True))
    figure = correlation_figure(table, atlas_of(table))
    assert sorted(tick_labels(figure.axes[0])) == sorted(LABELS[:12])
    cells = np.ma.masked_invalid(heat_map(figure).get_array())
    assert cells.mask.sum() == 1


def test_many_neurons_share_cells_and_are_averaged() -> None:
    table = units(4000)
    atlas = atlas_of(table)
    figure = correlation_figure(table, atlas)
    leaf = {row["neuron"]: row["leaf"] for row in atlas.to_pylist()}
    order = sorted((i for i, place in leaf.items() if place is not None), key=lambda i: leaf[i])
    group = -(-len(order) // 1500)
    assert group > 1
    label = tick_labels(figure.axes[0])[3]
    r = table[f"r_{label}"].to_numpy()[order]
    wanted = [r[i : i + group].mean() for i in range(0, len(order), group)]
    cells = np.asarray(heat_map(figure).get_array())
    assert cells.reshape(14, -1)[3] == pytest.approx(wanted)
    assert heat_map(figure).get_coordinates()[0, -1, 0] == len(order)


def test_neuron_map() -> None:
    table, figure = neurons(), figure_of("neuron_map")
    at = {row["neuron"]: (row["x"], row["y"]) for row in atlas_of(table).to_pylist()}
    rows = [row for row in table.to_pylist() if at[row["neuron"]][0] is not None]
    for panel, label in zip(figure.axes, LABELS, strict=False):
        mine = [row for row in rows if row["best_label"] == label]
        title = panel.get_title().replace("-\n", "")
        assert title == f"{label} ({len(mine)})"
        for marker, colour, sign in (("s", style.BLACK, 1), ("x", style.VERMILION, -1)):
            wanted = {at[row["neuron"]] for row in mine if sign * row["best_r"] > 0}
            assert {tuple(p) for p in marks(panel, marker, colour).tolist()} == wanted
        (background,) = panel.collections
        assert np.asarray(background.get_array()).sum() == len(rows)


def test_svg_of_8192_neurons_is_small() -> None:
    table = units(8192)
    atlas = atlas_of(table)
    for figure in (correlation_figure(table, atlas), neuron_map_figure(table, atlas)):
        svg = figure_bytes(figure, "svg")
        assert len(svg) < 400_000
        images = re.findall(rb'base64,([^"]+)"', svg)
        assert images
        assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)


# ------------------------------------------------------------------------------------------ the edges


def test_empty_tables_are_drawn_as_such() -> None:
    none = units(0)
    for figure in (
        entropy_figure(none, none, controls().slice(0, 0)),
        density_figure(none),
        detection_figure(detections().slice(0, 0)),
        auroc_figure({}),
        localisation_figure(localisation().slice(0, 0)),
        correlation_figure(none, ATLAS.empty_table()),
        neuron_map_figure(none, ATLAS.empty_table()),
    ):
        assert "no figures" in [text.get_text() for text in texts(figure)]
        assert figure_bytes(figure, "png").startswith(b"\x89PNG")


def test_a_run_of_which_all_is_dead_or_unanswered() -> None:
    dead = units(5, n_firing=[0] * 5, density=[0.0] * 5, dead=[True] * 5, entropy=[None] * 5)
    unanswered = detections().filter(pc.invert(detections()["enough"]))
    tables = {
        "neurons": dead, "dimensions": dead, "atlas": ATLAS.empty_table(), "detections": unanswered,
        "localisation": pa.Table.from_pylist([located("Edema")], LOCALISATION),
        "history": history().slice(0, 0), "sweep": sweep().slice(0, 0), "controls": controls().slice(0, 0),
    }  # fmt: skip
    (only,) = overview_figures(tables, {})
    assert only.name == "density"
    assert "0 living neurons, median undefined" in only.alt
    assert "5 (100.0 %) never fire on the test split" in only.alt


@settings(deadline=None, max_examples=4)
@given(st.integers(1, 4), st.integers(0, 2**16), st.sampled_from([LABELS, LABELS[:1], LABELS[3:5]]))
def test_tiny_tables_are_drawn(n: int, seed: int, labels: tuple[str, ...]) -> None:
    table = units(n, seed, labels)
    tables = {"neurons": table, "dimensions": table, "atlas": atlas_of(table), "detections": detections(n)}
    for made in overview_figures(tables, {"min_firing": 2}):
        assert_inside(made.figure)
        assert figure_bytes(made.figure, "svg").startswith(b"<?xml")
        assert "nan" not in made.alt


def test_a_findings_name_is_text_and_nothing_else() -> None:
    name = r"$\frac{a}{$<script>alert(1)</script>"
    table = pa.Table.from_pylist([located(name, 0.5), located("a\x1b[31m\nb", 0.4)], LOCALISATION)
    svg = figure_bytes(localisation_figure(table), "svg")
    assert b"<script" not in svg
    assert b"$\\frac{a}{$&lt;script&gt;" in svg
    assert b"\x1b" not in svg


# --------------------------------------------------------------------------------------- the overview


def whole_run() -> dict[str, pa.Table]:
    return {
        "neurons": neurons(), "dimensions": dimensions(), "controls": controls(),
        "atlas": atlas_of(neurons()), "detections": detections(), "localisation": localisation(),
        "history": history(), "sweep": sweep(),
    }  # fmt: skip


def whole_summary() -> dict[str, Any]:
    kinds = [
        {"kind": kind, "entropy": 2.2 + 0.01 * i, "entropy_floor": 2.38, "best_auroc": 0.9 - 0.01 * i,
         "labels_separated": 12 - i}
        for i, kind in enumerate(("sae", "dimensions", *CONTROLS))
    ]  # fmt: skip
    beaten: dict[str, list[str]] = {"entropy": [], "best_auroc": [], "labels_separated": ["pca"]}
    told = {"kinds": kinds, "n_labels": 14, "not_beaten": beaten}
    return {**summary(), "min_firing": 10, "controls": told, "sae": {"settings": {"fve_floor": 0.9}}}


@cache
def overview() -> dict[str, Any]:
    made = overview_figures(whole_run(), whole_summary())
    return {figure.name: figure for figure in made}


def test_the_overview_holds_all_that_a_run_allows() -> None:
    order = ["entropy", "controls", "auroc", "detection", "localisation", "correlation", "neuron_map"]
    assert list(overview()) == [*order, "density", "history", "pareto"]
    for made in overview().values():
        assert re.fullmatch(r"[a-z_]+", made.name)
        assert made.title
        for text in (made.alt, made.caption):
            assert text.endswith((".", "dead."))
            assert len(text) > 80
            assert "nan" not in text
            assert "\n" not in text
            assert "  " not in text


def test_a_figure_needs_its_tables() -> None:
    needs = {
        "entropy": {"neurons"}, "density": {"neurons"}, "detection": {"detections"},
        "localisation": {"localisation"}, "correlation": {"neurons", "atlas"},
        "neuron_map": {"neurons", "atlas"}, "history": {"history"}, "pareto": {"sweep"},
    }  # fmt: skip
    whole = whole_run()
    for given_ in ({"neurons"}, {"atlas", "detections"}, {"neurons", "atlas"}, {"history", "sweep"}, set()):
        made = overview_figures({name: whole[name] for name in given_}, {})
        assert {figure.name for figure in made} == {name for name, of in needs.items() if of <= given_}


def test_alt_texts_tell_the_numbers() -> None:
    alt = {name: made.alt for name, made in overview().items()}
    table = neurons()
    living = column(table, "n_firing") >= 10
    h, floor = column(table, "entropy")[living].mean(), column(table, "entropy_floor")[living].mean()
    assert f"SAE {h:.2f} ({floor:.2f}; {living.sum()} units); raw dimensions " in alt["entropy"]
    assert "The paper's means are 2.25 for its SAE and 2.38 for raw dimensions." in alt["entropy"]

    dead = column(table, "dead").sum()
    assert f"{60 - dead:.0f} living neurons" in alt["density"]
    told = f"Of 60 neurons {dead:.0f} ({100 * dead / 60:.1f} %) never fire on the test split"
    assert told in alt["density"]

    areas = {row["label"]: row["auroc"] for row in summary()["labels"] if row["auroc"] is not None}
    first, last = max(areas, key=areas.__getitem__), min(areas, key=areas.__getitem__)
    assert f"from {areas[first]:.3f} ({first}) to {areas[last]:.3f} ({last})" in alt["auroc"]
    separated = [sum(row["separated"] for row in summary()[name]) for name in ("labels", "labels_raw")]
    assert f"separates {separated[0]} labels; by one raw dimension {separated[1]}" in alt["auroc"]

    rows = [row for row in detections().to_pylist() if row["enough"]]
    accuracy = np.array([row["balanced_accuracy"] for row in rows])
    shuffled = [row["shuffled_balanced_accuracy"] for row in rows if row["neuron"] != 4]
    assert "of 23 named neurons" in alt["detection"]
    assert f"median {100 * np.median(accuracy):.1f} %" in alt["detection"]
    # In fortieths, where 28 of 40 are not above 70 %.
    assert f"Above 70 %: {(np.rint(40 * accuracy) > 28).sum()};" in alt["detection"]
    assert f"description the mean is {100 * np.mean(shuffled):.1f} %" in alt["detection"]
    assert "1 candidate" in overview()["detection"].caption

    assert "of 3 findings against boxes" in alt["localisation"]
    assert "above both chance levels for 2." in alt["localisation"]
    assert (
        "Enlarged Cardiomediastinum 90 % (21 %, 30 %); Lung Lesion 60 % (21 %, undefined)"
        in (alt["localisation"])
    )

    alive = table.filter(pc.invert(table["dead"]))
    r = np.array([column(alive, f"r_{label}") for label in LABELS])
    label, neuron = np.unravel_index(np.abs(r).argmax(), r.shape)
    assert f"r of {alive.num_rows} neurons with 14 labels" in alt["correlation"]
    assert f"The strongest is {r[label, neuron]:.2f} with {LABELS[label]}." in alt["correlation"]
    assert f"above 0.5 for {(np.abs(r).max(axis=0) > 0.5).sum()}." in alt["correlation"]

    of = alive["best_label"].to_pylist()
    assert all(f"{name} {of.count(name)}" in alt["neuron_map"] for name in set(of))

    assert "In labels separated (12) the SAE does not beat PCA (8)." in alt["controls"]
    assert "over 10 evaluations. The chosen checkpoint (epoch 7, step 350) has on" in alt["history"]
    assert "FVE 0.875, L0 57.1, dead 14.0 %, entropy 2.26 nats." in alt["history"]
    assert "12 trials against L0. The Pareto front has 3 trials" in alt["pareto"]


def test_the_fve_floor_is_that_of_the_run() -> None:
    for name in ("history", "pareto"):
        assert "FVE floor 0.9" in legend(overview()[name].figure)
