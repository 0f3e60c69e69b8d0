"""Where in a radiograph a neuron fires, and whether that is where the finding lies.

MedCLIP-ResNet's embedding is e = W mean(f) / ‖W mean(f)‖, linear in the P positions of the last feature map f
but for its norm. With c_ij = W f_ij / (P ‖e‖) (`PooledEncoder.shares`) and m_ij its mean over the training
images (table `positions`; Σ m_ij = μ), a neuron that reads x' = k (e − μ) with encoder weights w has the map

    a_ij = k w·(c_ij − m_ij),      Σ a_ij − w·b_dec + b_enc = its pre-activation.

Without m_ij the map would be dominated by μ and look alike everywhere. ‖e‖ is held fixed: a decomposition,
not what would happen if a part of the image were changed. A Gated neuron's map is that of its gate.

The pointing game asks whether the highest point of the map lies in a box of the finding (Zhang et al. 2016,
arXiv 1608.00507; in radiology, Saporta et al. 2022, Nature Machine Intelligence 4:867).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from medsae_ray.tables import BOXES, LOCALISATION, POINTING

if TYPE_CHECKING:
    from medsae_ray.sae.base import SparseAutoencoder

Floats = NDArray[np.float64]

SIDE = 112
"""Points a side of the square on which maps and boxes are compared."""
LEVEL = 0.5
"""Share of the map's maximum above which a point belongs to its region."""


class Readout(NamedTuple):
    """What neurons read from a raw embedding e: pre-activation = weight·(e − μ) + constant."""

    weight: NDArray[np.float32]
    """[d, m], k·w of every neuron."""
    constant: Floats
    """[m], the pre-activation at the training mean: b_enc − w·b_dec."""


def readout(sae: SparseAutoencoder, mean: ArrayLike) -> Readout:
    """Weights and constants of an exported SAE, which takes raw embeddings, about their training mean μ [d].

    Of a Gated SAE those of the gate.
    """
    tensors = {name: tensor.double().numpy() for name, tensor in sae.state_dict().items()}
    bias = tensors["b_gate"] if "b_gate" in tensors else tensors["b_enc"]
    weight = tensors["W_enc"]
    constant = (np.asarray(mean, np.float64) - tensors["b_dec"]) @ weight + bias
    return Readout(weight.astype(np.float32), constant)


def neuron_maps(
    shares: NDArray[np.float32], mean_shares: Floats, weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Maps [n, P] of n neurons on one image: its shares c [P, d], their means m [P, d], weights [d, n]."""
    return ((shares - mean_shares.astype(np.float32)) @ weight).T


# ---------------------------------------------------------------------------------------- maps and boxes


def upsampled(maps: ArrayLike, grid: tuple[int, int], side: int = SIDE) -> Floats:
    """Maps [..., P] row-major over `grid` (h, w) to [..., side, side], bilinear between the cells' centres.

    Beyond the outermost centres the edge's value goes on.
    """
    cells = np.asarray(maps, np.float64)
    cells = cells.reshape(*cells.shape[:-1], *grid)
    rows, columns = (_weights(n, side) for n in grid)
    return np.einsum("yi,...ij,xj->...yx", rows, cells, columns, optimize=True)


def _weights(n: int, side: int) -> Floats:
    """[side, n]: what each of n cells counts at each of `side` points."""
    place = np.clip((np.arange(side) + 0.5) * n / side - 0.5, 0, n - 1)
    below = np.minimum(place.astype(int), max(n - 2, 0))
    weights = np.zeros((side, n))
    weights[np.arange(side), below] = 1 - (place - below)
    weights[np.arange(side), np.minimum(below + 1, n - 1)] += place - below
    return weights


def in_boxes(boxes: Sequence[Sequence[float]] | Floats, side: int = SIDE) -> NDArray[np.bool_]:
    """Whether the centre of each point [side, side] lies in one of the boxes (x0, y0, x1, y1), in shares."""
    centres = (np.arange(side) + 0.5) / side
    inside = np.zeros((side, side), bool)
    for x0, y0, x1, y1 in boxes:
        inside |= ((centres >= y0) & (centres <= y1))[:, None] & ((centres >= x0) & (centres <= x1))
    return inside


def hits_and_iou(maps: Floats, inside: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], Floats]:
    """For upsampled maps [n, side, side]: whether the highest point lies inside, and the IoU [n] in [0, 1].

    The IoU is of the points above `LEVEL` of the map's maximum with those inside; 0 where no point of the map
    is above 0. Of several highest points the first, row by row, counts.
    """
    flat, target = maps.reshape(len(maps), -1), inside.ravel()
    highest = flat.max(axis=1, keepdims=True)
    region = (flat >= LEVEL * highest) & (flat > 0)
    union = (region | target).sum(axis=1)
    iou = np.divide((region & target).sum(axis=1), union, out=np.zeros(len(flat)), where=union > 0)
    return target[flat.argmax(axis=1)], iou


def square_boxes(
    truth: pa.Table,
    sizes: Mapping[str, tuple[int, int]],
    *,
    frame: Sequence[int] | None,
    smallest: int,
) -> pa.Table:
    """Boxes of `truth` in shares of the square that the encoder sees: the table `boxes`.

    `sizes`: width and height in pixels of each stored image; boxes of others are left out. `frame`: width and
    height in pixels of the image in which the boxes are told (NIH: 1024 × 1024), None for the stored one.
    `smallest`: side of the square to which smaller images are padded (`pad_and_resize`).
    """
    kept = truth.filter(pc.is_in(truth["image_id"], pa.array(list(sizes), pa.string())))
    size = np.array([sizes[i] for i in kept["image_id"].to_pylist()], np.float64).reshape(-1, 2)
    side = np.maximum(size.max(axis=1, initial=0), smallest)
    offset = np.floor((side[:, None] - size) / 2)
    scale = np.ones_like(size) if frame is None else size / np.asarray(frame, np.float64)
    columns = {"image_id": kept["image_id"], "finding": kept["finding"]}
    for axis, name in enumerate("xy"):
        for end in "01":
            told = kept[f"{name}{end}"].to_numpy().astype(np.float64)
            share = (told * scale[:, axis] + offset[:, axis]) / side
            columns[f"{name}{end}"] = np.clip(share, 0, 1).astype(np.float32)
    return pa.table(columns, schema=BOXES)


# ----------------------------------------------------------------------------------- the pointing game


class Pairing(NamedTuple):
    """A finding, its neuron, an image with a box of it on which that fires, and neurons to compare with."""

    finding: str
    neuron: int
    image_id: str
    others: NDArray[np.int32]


def pairings(
    boxes: pa.Table,
    chosen: Mapping[str, int],
    firing: Mapping[str, NDArray[np.int32]],
    best_label: Sequence[str | None],
    *,
    others: int,
    seed: int,
) -> list[Pairing]:
    """The rows of the pointing game, by finding and image_id.

    `chosen`: the neuron of each finding, `firing`: the neurons that fire on each test image, `best_label` of
    each neuron on validation. Others are drawn from those firing on the image that stand for another label;
    the draw rests on `seed`, the finding and the image's place among the finding's.
    """
    label = np.array(best_label, object)
    rows: list[Pairing] = []
    for number, (finding, neuron) in enumerate(sorted(chosen.items())):
        of_finding = boxes.filter(pc.equal(boxes["finding"], finding))
        for place, image_id in enumerate(sorted(set(of_finding["image_id"].to_pylist()))):
            fires = firing.get(image_id, np.empty(0, np.int32))
            if neuron not in fires:
                continue
            stand_for_others = fires[(label[fires] != finding) & (label[fires] != None) & (fires != neuron)]  # noqa: E711
            draws = np.random.default_rng((seed, number, place))
            drawn = draws.choice(stand_for_others, min(others, len(stand_for_others)), replace=False)
            rows.append(Pairing(finding, neuron, image_id, np.sort(drawn).astype(np.int32)))
    return rows


def pointing_table(
    rows: Sequence[Pairing],
    maps: Mapping[tuple[int, str], NDArray[np.float32]],
    boxes: pa.Table,
    grid: tuple[int, int],
) -> pa.Table:
    """The table `pointing`; pairings of which a map is missing (an image no longer readable) are left out."""
    box_of: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for row in boxes.to_pylist():
        box = tuple(row[name] for name in ("x0", "y0", "x1", "y1"))
        box_of.setdefault((row["finding"], row["image_id"]), []).append(box)
    told: list[dict[str, object]] = []
    for of in rows:
        neurons = [of.neuron, *of.others.tolist()]
        if any((neuron, of.image_id) not in maps for neuron in neurons):
            continue
        inside = in_boxes(box_of[of.finding, of.image_id])
        hit, iou = hits_and_iou(upsampled(np.stack([maps[n, of.image_id] for n in neurons]), grid), inside)
        told.append(
            {
                "finding": of.finding,
                "neuron": of.neuron,
                "image_id": of.image_id,
                "hit": bool(hit[0]),
                "iou": iou[0],
                "box_share": inside.mean(),
                "others": of.others,
                "other_hits": hit[1:].mean() if len(of.others) else None,
                "other_iou": iou[1:].mean() if len(of.others) else None,
            }
        )
    return pa.Table.from_pylist(told, POINTING)


def localisation_table(
    pointing: pa.Table, boxes: pa.Table, chosen: Mapping[str, int], patient_of: Mapping[str, str]
) -> pa.Table:
    """The table `localisation`: a row a finding that has boxes; intervals over patients."""
    rows = []
    for finding in sorted(set(boxes["finding"].to_pylist())):
        boxed = boxes.filter(pc.equal(boxes["finding"], finding))
        of = pointing.filter(pc.equal(pointing["finding"], finding))
        row: dict[str, object] = {
            "finding": finding,
            "neuron": chosen.get(finding),
            "n_boxed": pc.count_distinct(boxed["image_id"]).as_py(),
            "n": of.num_rows,
        }
        patient = np.unique([patient_of[i] for i in of["image_id"].to_pylist()], return_inverse=True)[1]
        row["n_patients"] = len(np.unique(patient))
        if of.num_rows:
            hit = of["hit"].to_numpy().astype(np.float64)
            iou = of["iou"].to_numpy()
            row |= dict(
                zip(("hit_rate", "hit_rate_low", "hit_rate_high"), clustered_rate(hit, patient), strict=True)
            )
            row |= dict(zip(("iou", "iou_low", "iou_high"), clustered_mean(iou, patient), strict=True))
            row |= {"box_share": of["box_share"].to_numpy().mean()}
            row |= {
                f"other_{name}": pc.mean(of[f"other_{column}"]).as_py()
                for name, column in (("hit_rate", "hits"), ("iou", "iou"))
            }
            levels = [row["box_share"], row["other_hit_rate"]]
            row["above_chance"] = all(v is None or row["hit_rate_low"] > v for v in levels)  # type: ignore[operator]
        rows.append(row)
    return pa.Table.from_pylist(rows, LOCALISATION)


def clustered_rate(hit: ArrayLike, cluster: ArrayLike) -> tuple[float, float, float]:
    """A share of hits [n] and its 95 % interval (rate, low, high) in [0, 1] over clusters (patients).

    Wilson's interval at the effective size n / deff, deff the variance by clusters over that of independent
    images (Kish 1965; Dean & Pagano 2015, doi:10.1093/jssam/smv018), at least 1. Where all hit or none, no
    variance tells deff: the number of clusters is then the size.
    """
    x, code = np.asarray(hit, np.float64), np.unique(np.asarray(cluster), return_inverse=True)[1]
    rate, n, k = float(x.mean()), len(x), int(code.max()) + 1
    size = float(k)
    if 0 < rate < 1 and k > 1:
        size = min(n, max(rate * (1 - rate) / _mean_variance(x, code), 1.0))
    z2 = ndtri(0.975) ** 2
    centre = (rate + z2 / (2 * size)) / (1 + z2 / size)
    spread = np.sqrt(z2 * (rate * (1 - rate) / size + z2 / (4 * size**2))) / (1 + z2 / size)
    return rate, max(0.0, float(centre - spread)), min(1.0, float(centre + spread))


def clustered_mean(values: ArrayLike, cluster: ArrayLike) -> tuple[float, float, float]:
    """A mean of values [n] in [0, 1] and its 95 % interval by Student's t over clusters; NaN for only one."""
    x, code = np.asarray(values, np.float64), np.unique(np.asarray(cluster), return_inverse=True)[1]
    mean, k = float(x.mean()), int(code.max()) + 1
    if k < 2:
        return mean, np.nan, np.nan
    spread = float(stdtrit(k - 1, 0.975) * np.sqrt(_mean_variance(x, code)))
    return mean, max(0.0, mean - spread), min(1.0, mean + spread)


def _mean_variance(x: Floats, code: NDArray[np.int64]) -> float:
    """Variance of the mean of x [n] over clusters `code`, as of a ratio of cluster totals."""
    totals = np.bincount(code, x - x.mean())
    k = len(totals)
    return float(k / (k - 1) * np.square(totals).sum() / len(x) ** 2)
