"""A run's tables as what the pages read: `data/index.js` and `data/cards-<k>.js`, classic scripts of JSON.

Figures are rounded to 4 significant digits, undefined ones are null. Texts of a model or a CSV are cleaned of
control characters here; that they are no markup is the pages' part (`textContent`), and no string can end the
script that holds it.
"""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from medsae_ray.labels import LABELS
from medsae_ray.tables import ACQUISITION

PER_FILE = 32
"""Cards in a file of `data/`."""
MAX_TEXT = 4000
"""Longest text of a model that is shown, in characters."""
DEVICES = "Support Devices"
POWERS = np.array([float(f"1e{power}") for power in range(309)])
ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})

Tables = Mapping[str, pa.Table]
Floats = NDArray[np.float64]


def script(name: str, payload: Any) -> bytes:
    """`medsae.put("name", payload);`, ASCII alone, without `<`, `>`, `&` in its strings."""
    told = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return f'medsae.put("{name}", {told.translate(ESCAPES)});\n'.encode("ascii")


def rounded(values: ArrayLike) -> Any:
    """Numbers of any shape as (nested) lists, to 4 significant digits; NaN and infinity are None."""
    x = np.asarray(values, np.float64)
    known = np.isfinite(x)
    size = np.abs(np.where(known & (x != 0), x, 1.0))
    places = np.clip(3 - np.floor(np.log10(size)).astype(int), -308, 308)
    power = POWERS[np.abs(places)]
    # Times and by an exact power of ten, so that the nearest float to the decimal comes out, which is short.
    with np.errstate(all="ignore"):
        short = np.where(places >= 0, np.rint(x * power) / power, np.rint(x / power) * power)
    short = np.where(np.isfinite(short), short, x)
    told = short.astype(object)
    told[~known] = None
    return told.tolist()


def cleaned(text: str | None) -> str | None:
    """A text from outside without control and invisible characters but line breaks, at most MAX_TEXT long."""
    if text is None:
        return None
    kept = "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else " " for c in text[: MAX_TEXT + 1])
    return kept if len(kept) <= MAX_TEXT else f"{kept[:MAX_TEXT]}…"


def index_payload(tables: Tables, run: dict[str, Any]) -> dict[str, Any]:
    """What `data/index.js` holds: the run and one row a neuron, column by column."""
    neurons = tables["neurons"]
    n = neurons.num_rows
    columns: dict[str, Any] = {"neuron": list(range(n))}
    names = _by_neuron(tables.get("names"), ["concept"])
    columns["name"] = [cleaned(names[i]["concept"]) if i in names else None for i in range(n)]
    label = pc.index_in(neurons["best_label"], value_set=pa.array(LABELS))
    columns["label"] = label.to_pylist()
    columns["r"] = rounded(_floats(neurons, "best_r"))
    columns["auroc"] = rounded(_of_label(neurons, "auroc_{}", _floats_of(label)))
    columns["entropy"], columns["density"] = (rounded(_floats(neurons, c)) for c in ("entropy", "density"))
    columns["dead"] = neurons["dead"].cast(pa.int8()).to_pylist()
    tested = tables.get("detections")
    # Only these are ranked: the others' accuracies rest on too few answers, or on answers without a name.
    tested = None if tested is None else tested.filter(tested["enough"])
    for end in ("", "_low", "_high"):
        columns[f"detection{end}"] = rounded(_spread(tested, f"balanced_accuracy{end}", n))
    atlas = tables.get("atlas")
    follows = _by_neuron(atlas, ["shortcuts"])
    columns["shortcut"] = [
        ", ".join(follows[i]["shortcuts"]) or None if i in follows else None for i in range(n)
    ]
    columns["x"], columns["y"] = (rounded(_spread(atlas, axis, n)) for axis in ("x", "y"))
    return {"run": run, "labels": list(LABELS), "neurons": columns}


def cards(tables: Tables, unreadable: Collection[str] = ()) -> Iterator[list[dict[str, Any]]]:
    """The cards of neurons 0 to 31, 32 to 63, …: the payloads of `data/cards-<k>.js`.

    `unreadable`: ids of the radiographs that have no picture in the report though it has pictures.
    """
    neurons = tables["neurons"]
    n = neurons.num_rows
    alive = (~neurons["dead"].to_numpy()).tolist()
    figures = _figures(neurons)
    labels = _label_rows(neurons)
    images = _Images(tables, unreadable)
    acquisition = _Acquisition(tables)
    candidates = _by_neuron(tables.get("candidates"), ["candidate", "reason"])
    unknown: dict[str, Any] = {"candidate": False, "reason": None}
    names = _names(tables.get("names"))
    detections = _detections(tables.get("detections"))
    for start in range(0, n, PER_FILE):
        yield [
            {
                "neuron": i,
                "alive": alive[i],
                "candidate": candidates.get(i, unknown)["candidate"],
                "why_not": candidates.get(i, unknown)["reason"],
                "name": names.get(i),
                "detection": detections.get(i),
                "figures": figures[i],
                "labels": labels[i],
                **acquisition.of(i),
                "images": images.of(i),
            }
            for i in range(start, min(start + PER_FILE, n))
        ]


def _figures(neurons: pa.Table) -> list[dict[str, Any]]:
    names = ("density", "n_firing", "mean", "max", "entropy", "entropy_floor", "n_labels")
    counts = ("n_firing", "n_labels")
    columns = [
        neurons[name].to_pylist() if name in counts else rounded(_floats(neurons, name)) for name in names
    ]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _label_rows(neurons: pa.Table) -> list[list[list[Any]]]:
    """[neuron][label]: the label's number, r, AUROC with its interval, r on validation, known labels."""
    figures = np.stack(
        [
            [_floats(neurons, name.format(label)) for label in LABELS]
            for name in ("r_{}", "auroc_{}", "auroc_{}_low", "auroc_{}_high", "valid_r_{}")
        ],
        axis=-1,
    ).swapaxes(0, 1)
    known = np.stack([neurons[f"n_{label}"].to_numpy() for label in LABELS], axis=-1).tolist()
    return [
        [[i, *row, count] for i, (row, count) in enumerate(zip(rows, counts, strict=True))]
        for rows, counts in zip(rounded(figures), known, strict=True)
    ]


def _names(names: pa.Table | None) -> dict[int, dict[str, Any]]:
    columns = ["concept", "description", "status", "reason", "reply", "model"]
    return {
        neuron: {key: cleaned(value) for key, value in row.items()}
        for neuron, row in _by_neuron(names, columns).items()
    }


def _detections(detections: pa.Table | None) -> dict[int, dict[str, Any]]:
    if detections is None:
        return {}
    rates = {"balanced_accuracy": "balanced_accuracy", "low": "balanced_accuracy_low"}
    rates |= {"high": "balanced_accuracy_high", "q": "q", "shuffled": "shuffled_balanced_accuracy"}
    rates |= {
        f"{name}{end}": f"{name}{end}" for name in ("tpr", "tnr", "auroc") for end in ("", "_low", "_high")
    }
    counts = ("n_positive", "n_negative", "n_unparsed", "n_failed", "enough", "named")
    columns = {key: rounded(_floats(detections, name)) for key, name in rates.items()}
    columns |= {name: detections[name].to_pylist() for name in counts}
    rows = zip(*columns.values(), strict=True)
    return {
        neuron: dict(zip(columns, row, strict=True))
        for neuron, row in zip(detections["neuron"].to_pylist(), rows, strict=True)
    }


class _Acquisition:
    """What the table `atlas` tells of each neuron: histogram, neighbours, how the radiographs were made."""

    def __init__(self, tables: Tables) -> None:
        atlas, neurons = tables.get("atlas"), tables["neurons"]
        self.rows = _by_neuron(atlas, ["bins", "nearest", "site", "shortcuts"])
        if atlas is None:
            return
        n = neurons.num_rows
        self.max = rounded(_floats(neurons, "max"))
        r = [[_spread(atlas, f"{split}r_{name}", n) for split in ("", "valid_")] for name in ACQUISITION]
        r.append([_floats(neurons, f"{split}r_{DEVICES}") for split in ("", "valid_")])
        self.r = rounded(np.array(r).transpose(2, 0, 1))
        self.cosine = dict(
            zip(atlas["neuron"].to_pylist(), map(rounded, atlas["cosine"].to_pylist()), strict=True)
        )

    def of(self, neuron: int) -> dict[str, Any]:
        row = self.rows.get(neuron)
        if row is None:
            return {"histogram": None, "nearest": [], "acquisition": [], "site": None}
        follows = row["shortcuts"]
        return {
            "histogram": {"max": self.max[neuron], "counts": row["bins"]},
            "nearest": [list(pair) for pair in zip(row["nearest"], self.cosine[neuron], strict=True)],
            "acquisition": [
                [name, r, valid_r, name in follows]
                for name, (r, valid_r) in zip((*ACQUISITION, "devices"), self.r[neuron], strict=True)
            ],
            "site": cleaned(row["site"]),
        }


class _Images:
    """Every neuron's radiographs, with the model's answers and the maps of those that have them."""

    def __init__(self, tables: Tables, unreadable: Collection[str]) -> None:
        n = tables["neurons"].num_rows
        gallery = tables.get("gallery")
        self.offsets = np.zeros(n + 1, int)
        if gallery is None:
            return
        # Stable: within a neuron the rows keep the table's order.
        gallery = gallery.take(np.argsort(gallery["neuron"].to_numpy(), kind="stable"))
        self.offsets = np.searchsorted(gallery["neuron"].to_numpy(), np.arange(n + 1))
        self.ids = gallery["image_id"].to_pylist()
        self.roles = gallery["role"].to_pylist()
        self.values, self.quantiles = (rounded(_floats(gallery, name)) for name in ("value", "quantile"))
        self.answers, self.p_yes = _answers(gallery, tables.get("verdicts"))
        self.maps, self.scales = _maps(gallery, tables.get("maps"))
        self.unreadable = unreadable

    def of(self, neuron: int) -> list[dict[str, Any]]:
        return [self._image(row) for row in range(self.offsets[neuron], self.offsets[neuron + 1])]

    def _image(self, row: int) -> dict[str, Any]:
        told = {
            "id": self.ids[row],
            "role": self.roles[row],
            "value": self.values[row],
            "quantile": self.quantiles[row],
            "answer": self.answers[row],
            "p_yes": self.p_yes[row],
            "map": self.maps[row],
            "scale": self.scales[row],
        }
        return {**told, "unreadable": True} if self.ids[row] in self.unreadable else told


def _answers(gallery: pa.Table, verdicts: pa.Table | None) -> tuple[list[str | None], list[float | None]]:
    """The model's answer and its probability of yes for each row of `gallery`."""
    if verdicts is None:
        return [None] * gallery.num_rows, [None] * gallery.num_rows
    answer = pc.if_else(verdicts["answer"], "yes", "no")
    told = pc.if_else(pc.equal(verdicts["status"], "answered"), answer, verdicts["status"])
    found = _rows_of(gallery, verdicts)
    rows = pa.array(found, mask=found < 0)
    return told.take(rows).to_pylist(), rounded(_floats_of(verdicts["p_yes"].take(rows)))


def _maps(gallery: pa.Table, maps: pa.Table | None) -> tuple[list[str | None], list[float | None]]:
    """Each row's map as base64 of int8 and the scale by which to multiply it."""
    n = gallery.num_rows
    if maps is None:
        return [None] * n, [None] * n
    rows = _rows_of(gallery, maps)
    column = maps["map"].combine_chunks()
    values = column.flatten().to_numpy().reshape(maps.num_rows, column.type.list_size)
    highest = np.abs(values).max(axis=1, initial=0)
    scale = np.array(rounded(highest / 127), np.float64)
    whole = np.rint(values / np.where(scale > 0, scale, 1)[:, None]).clip(-127, 127).astype(np.int8)
    coded = [base64.b64encode(row).decode() for row in whole]
    scales = scale.tolist()
    return (
        [coded[row] if row >= 0 else None for row in rows.tolist()],
        [scales[row] if row >= 0 else None for row in rows.tolist()],
    )


def _rows_of(gallery: pa.Table, other: pa.Table) -> NDArray[np.int64]:
    """The row of `other` of the same neuron and image, for each row of `gallery`; -1 where it has none."""
    if not other.num_rows:
        return np.full(gallery.num_rows, -1)
    images = pc.unique(other["image_id"])
    keys = [
        table["neuron"].to_numpy().astype(np.int64) * len(images)
        + _floats_of(pc.index_in(table["image_id"], value_set=images))
        for table in (gallery, other)
    ]
    order = np.argsort(keys[1])
    place = np.searchsorted(keys[1], keys[0], sorter=order).clip(max=len(order) - 1)
    found = order[place]
    return np.where(keys[1][found] == keys[0], found, -1)


def _by_neuron(table: pa.Table | None, columns: list[str]) -> dict[int, dict[str, Any]]:
    """Rows of a table by their neuron."""
    if table is None:
        return {}
    return dict(zip(table["neuron"].to_pylist(), table.select(columns).to_pylist(), strict=True))


def _spread(table: pa.Table | None, name: str, n: int) -> Floats:
    """A column as float64 [n], by neuron, NaN for neurons that the table has not."""
    values = np.full(n, np.nan)
    if table is not None:
        values[table["neuron"].to_numpy()] = _floats(table, name)
    return values


def _of_label(neurons: pa.Table, name: str, label: Floats) -> Floats:
    """The column `name` of each neuron's own label; `label` is a row of LABELS, or NaN."""
    every = np.stack([_floats(neurons, name.format(of)) for of in LABELS], axis=-1)
    own = np.nan_to_num(label).astype(int)
    return np.where(np.isnan(label), np.nan, every[np.arange(len(every)), own])


def _floats(table: pa.Table, name: str) -> Floats:
    return _floats_of(table[name])


def _floats_of(column: Any) -> Floats:
    """A column as float64, NaN for null."""
    return column.to_numpy(zero_copy_only=False).astype(np.float64)
