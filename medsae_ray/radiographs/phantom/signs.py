"""How each finding looks. Every sign changes the chest and says which pixels it changed (its box)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from medsae_ray.radiographs.phantom.anatomy import Array, Chest, Field, ramp, rib_profiles, rib_shadow
from medsae_ray.radiographs.phantom.patients import Sign


class Box(NamedTuple):
    """In pixels of the stored image; x1 and y1 are exclusive edges."""

    x0: float
    y0: float
    x1: float
    y1: float


def changed_box(change: Array, column: int = 0, share: float = 0.06) -> Box | None:
    """The box around all pixels that change by more than `share` of the largest change."""
    strong = change > share * max(float(change.max()), 1e-6)
    rows, cols = np.flatnonzero(strong.any(1)), np.flatnonzero(strong.any(0))
    if not rows.size:
        return None
    return Box(float(cols[0] + column), float(rows[0]), float(cols[-1] + column + 1), float(rows[-1] + 1))


def plant(chest: Chest, sign: Sign) -> list[Box]:
    """Draw the sign, unless the anatomy already holds it (heart, mediastinum).

    Returns a box for each part: one a lung, nodule or device; fewer where a part is off the image.
    """
    if sign.finding == "Cardiomegaly":
        boxes = [_geometry_box(chest, chest.heart_box)]
    elif sign.finding == "Enlarged Cardiomediastinum":
        boxes = [_geometry_box(chest, chest.mediastinum_box)]
    elif sign.finding == "Support Devices":
        devices = _support_devices(chest, sign.severity, np.random.default_rng(sign.stream))
        boxes = [changed_box(device) for device in devices]
    else:
        boxes = [
            changed_box(change, field.column)
            for field in chest.fields
            if field.side == 0 or sign.side in (0, field.side)
            for change in PAINTERS[sign.finding](field, sign.severity, np.random.default_rng(sign.stream))
        ]
    return [box for box in boxes if box is not None]


def _geometry_box(chest: Chest, box: tuple[float, float, float, float]) -> Box | None:
    u0, v0, u1, v1 = box
    inside = (chest.u >= u0) & (chest.u <= u1) & (chest.v >= v0) & (chest.v <= v1)
    return changed_box(inside.astype(np.float32))


def _gauss(field: Field, s: float, t: float, width: float, height: float) -> Array:
    x, v = field.place(s, t)
    return np.exp(-(((field.x - np.float32(x)) / width) ** 2) - ((field.v - np.float32(v)) / height) ** 2)


def _lung_opacity(field: Field, severity: float, rng: np.random.Generator) -> list[Array]:
    """Ground glass: one large soft haze through which vessels still show."""
    s, t = rng.uniform(0.45, 0.7), rng.uniform(0.3, 0.72)
    width = rng.uniform(0.24, 0.32) + 0.06 * severity
    haze = (0.36 + 0.34 * severity) * _gauss(field, s, t, width, width * rng.uniform(0.8, 1.2))
    change = haze * field.air
    field.fill(haze, keep_vessels=0.9)
    return [change]


def _lung_lesion(field: Field, severity: float, rng: np.random.Generator) -> list[Array]:
    """One to three round, sharply bounded nodules."""
    nodules = []
    for _ in range(1 + int(rng.random() < 0.5) + int(severity > 0.7)):
        x, v = field.place(rng.uniform(0.3, 0.8), rng.uniform(0.2, 0.85))
        radius = np.float32(rng.uniform(0.05, 0.065) + 0.05 * severity)
        distance = radius - np.sqrt((field.x - np.float32(x)) ** 2 + (field.v - np.float32(v)) ** 2)
        nodules.append(ramp(distance, 0.03))
    change = np.maximum.reduce(nodules)
    field.extra += 0.07 * change
    field.fill(0.85 * change)
    return nodules


def _edema(field: Field, severity: float, rng: np.random.Generator) -> list[Array]:
    """Both lungs: perihilar bat-wing haze, fat vessels, short septal lines at the lateral bases."""
    s0, t0 = field.hilum
    wings = np.exp(-(((field.s - s0 - 0.1) / 0.42) ** 2) - ((field.t - t0) / 0.34) ** 2)
    wings *= field.mask * np.float32(0.34 + 0.42 * severity)
    lines = np.square(np.sin(field.t * np.float32(rng.uniform(52, 62))))
    lines *= lines
    lines *= ramp(field.s - 0.68, 0.1) * ramp(field.t - 0.6, 0.1) * field.mask
    field.fill(wings, keep_vessels=1)
    field.vessels *= 1 + np.float32(0.5 + 0.8 * severity)
    field.air *= 1 - np.float32(0.25 + 0.4 * severity) * lines
    return [np.maximum(field.mask, lines)]


def _consolidation(field: Field, severity: float, rng: np.random.Generator) -> list[Array]:
    """A whole lobe, dense and homogeneous, cut off straight at the fissure."""
    tilt = np.float32(rng.normal(0, 0.08))
    line = field.t + tilt * (field.s - 0.5)
    extent = 0.24 + 0.14 * severity
    if rng.random() < 0.5:
        fissure = rng.uniform(0.42, 0.5)
        lobe = ramp(fissure - line, 0.03) * ramp(line - (fissure - extent), 0.2)
    else:
        fissure = rng.uniform(0.56, 0.64)
        lobe = ramp(line - fissure, 0.03) * ramp(fissure + extent - line, 0.2)
    if field.side == 0:
        lobe *= ramp(0.36 - np.abs(field.s - 0.6), 0.15)
    lobe *= np.float32(0.62 + 0.3 * severity)
    change = lobe * field.mask
    field.fill(lobe)
    return [change]


def _pneumonia(field: Field, severity: float, rng: np.random.Generator) -> list[Array]:
    """Many small fuzzy patches in one zone, crossed by dark air bronchograms that run out from the hilum."""
    zone_s, zone_t = rng.uniform(0.5, 0.62), rng.choice((0.3, 0.68))
    patches = np.zeros_like(field.air)
    for _ in range(7 + int(7 * severity)):
        s, t = zone_s + rng.normal(0, 0.2), zone_t + rng.normal(0, 0.11)
        size = rng.uniform(0.035, 0.06)
        patches += _gauss(field, s, t, size, size * rng.uniform(0.7, 1.3))
    alpha = np.clip(1.3 * patches, 0, 1) * np.float32(0.6 + 0.3 * severity)
    x0, v0 = field.place(*field.hilum)
    x1, v1 = field.place(zone_s, zone_t)
    angle = np.arctan2(v1 - v0, x1 - x0)
    for turn in (-0.35, 0.0, 0.35):
        cos, sin = np.float32(np.cos(angle + turn)), np.float32(np.sin(angle + turn))
        across = np.abs(cos * (field.v - np.float32(v0)) - sin * (field.x - np.float32(x0)))
        alpha *= 1 - 0.85 * ramp(0.011 - across, 0.016)
    change = alpha * field.mask
    field.fill(alpha, keep_vessels=0.3)
    return [change]


def _atelectasis(field: Field, severity: float, rng: np.random.Generator) -> list[Array]:
    """Thick plate-like bands above a raised diaphragm."""
    bands = np.zeros_like(field.air)
    tilt = np.float32(rng.uniform(0.05, 0.3) * rng.choice((-1, 1)))
    for t in float(rng.uniform(0.64, 0.68)) + np.array((0.0, 0.1, 0.2))[: 2 + int(severity > 0.45)]:
        line = field.t - np.float32(t + rng.normal(0, 0.012)) + tilt * (field.s - 0.5)
        end = rng.uniform(0.75, 0.95)
        bands = np.maximum(
            bands,
            ramp(0.013 + 0.008 * severity - np.abs(line), 0.02)
            * ramp(0.5 * end - np.abs(field.s - 0.5), 0.1),
        )
    raised = ramp(field.below + np.float32(0.05 + 0.07 * severity), 0.04) * ramp(field.s + 0.1, 0.1)
    bands *= field.mask
    field.extra += np.float32(0.05 + 0.05 * severity) * bands
    alpha = np.maximum(0.85 * bands, 0.9 * raised)
    change = alpha * field.mask
    field.fill(alpha)
    return [change]


def _pneumothorax(field: Field, severity: float, rng: np.random.Generator) -> list[Array]:
    """Black apical and lateral band without vessels, bounded by a thin white pleural line."""
    width = (0.2 + 0.3 * severity) * np.clip(1.25 - 1.05 * field.t, 0, 1.4)
    apex = 0.1 + 0.16 * severity
    inside = np.maximum(field.s - (1 - width), 0.9 * (apex - field.t))
    free = ramp(inside, 0.03)
    line = np.exp(-((inside / np.float32(0.022)) ** 2)) * field.mask * (field.t > 0.02)
    field.air *= 1 + np.float32(0.4) * free
    field.vessels *= 1 - free
    field.extra += np.float32(0.14) * line * ramp(0.95 - field.t, 0.1)
    return [np.maximum(free, line) * field.mask * ramp(1.19 - field.t, 0.05)]


def _pleural_effusion(field: Field, severity: float, rng: np.random.Generator) -> list[Array]:
    """Fluid at the base that rises along the lateral wall in a meniscus."""
    height = np.float32(0.1 + 0.36 * severity)
    level = 1 - height * (0.55 + 0.75 * np.clip(field.s, 0, 1.1) ** 3)
    fluid = ramp(field.t - level, 0.045)
    change = fluid * field.mask
    field.extra += 0.05 * change
    field.fill(fluid * 0.96)
    return [change]


def _pleural_other(field: Field, severity: float, rng: np.random.Generator) -> list[Array]:
    """A thick pleural rind along the lateral wall, its inner border calcified and beaded."""
    start, end = rng.uniform(0.22, 0.3), rng.uniform(0.72, 0.8)
    wave = np.sin(field.t * np.float32(rng.uniform(16, 24)) + np.float32(rng.uniform(0, 6)))
    thick = np.float32(0.085 + 0.075 * severity) * (1 + 0.25 * wave)
    along = ramp(field.t - start, 0.1) * ramp(end - field.t, 0.1) * field.mask
    inside = field.s - (1 - thick)
    rind = ramp(inside, 0.03) * along
    beads = 0.65 + 0.35 * np.sin(field.t * np.float32(rng.uniform(60, 80)))
    rim = np.exp(-((inside / np.float32(0.024)) ** 2)) * along * beads
    change = np.maximum(rind, rim)
    field.fill(0.85 * rind)
    field.extra += np.float32(0.13 + 0.12 * severity) * rim
    return [change]


def _fracture(field: Field, severity: float, rng: np.random.Generator) -> list[Array]:
    """One to three neighbouring ribs break: the outer piece drops, callus and bright ends mark the break."""
    x0, v0 = field.place(rng.uniform(0.55, 0.75), rng.uniform(0.3, 0.65))
    row = int(np.clip(np.searchsorted(field.v[:, 0], v0), 0, len(field.v) - 1))
    column = int(np.argmin(np.abs(field.x[row] - x0)))
    middle = np.floor(field.rib_phase[row, column]) + np.float32(0.5)
    half_count = 0.5 * (2 + int(severity > 0.5))
    ribs = ramp(half_count - np.abs(field.rib_phase - middle), 0.2)
    beyond = field.x - np.float32(x0)
    piece = ramp(beyond, 0.015) * ramp(0.26 - beyond, 0.2) * ribs
    # Distance to the centre line of the nearest rib, in ribs.
    offset = field.rib_phase - middle
    offset -= np.round(offset)
    callus = np.exp(-((beyond / np.float32(0.05)) ** 2) - (offset / np.float32(0.27)) ** 2) * ribs
    gap = np.exp(-((beyond / np.float32(0.01)) ** 2)) * (np.abs(offset) < 0.25) * ribs
    field.rib_phase -= np.float32(0.4 + 0.1 * severity) * piece
    dropped = piece * rib_shadow(field.rib_phase, rib_profiles()[0])
    field.extra += np.float32(0.27 + 0.13 * severity) * callus - np.float32(0.16) * gap
    field.extra += np.float32(0.04 + 0.05 * severity) * dropped
    return [np.maximum(callus, 0.5 * piece * (field.s < 1.1))]


PAINTERS: dict[str, Callable[[Field, float, np.random.Generator], list[Array]]] = {
    "Lung Opacity": _lung_opacity,
    "Lung Lesion": _lung_lesion,
    "Edema": _edema,
    "Consolidation": _consolidation,
    "Pneumonia": _pneumonia,
    "Atelectasis": _atelectasis,
    "Pneumothorax": _pneumothorax,
    "Pleural Effusion": _pleural_effusion,
    "Pleural Other": _pleural_other,
    "Fracture": _fracture,
}
"""Lung and rib signs: change one field, return what changed (>= 0, any scale) over it, one array a box."""


def _support_devices(chest: Chest, severity: float, rng: np.random.Generator) -> list[Array]:
    """Tubes, lines, a pacemaker: one to four of them, more in severe (bedside) cases."""
    kinds = rng.permutation(("tube", "line", "gastric", "pacemaker", "drain"))
    layers = []
    frontal = len(chest.fields) == 2
    for kind in kinds[: 1 + int(severity > 0.35) + int(severity > 0.65) + int(severity > 0.85)]:
        side = float(rng.choice((-1, 1))) if frontal else 1.0
        layers.append(np.zeros_like(chest.extra))
        _DEVICES[kind](layers[-1], chest, side, rng)
    chest.extra += np.float32(0.2 + 0.1 * severity) * np.maximum.reduce(layers)
    return layers


def _stroke(layer: Array, distance: Array, keep: Array, width: float = 0.012) -> None:
    np.maximum(layer, ramp(width - np.abs(distance), 0.014) * keep, out=layer)


def _tube(layer: Array, chest: Chest, side: float, rng: np.random.Generator) -> None:
    """Endotracheal tube: two parallel walls down the windpipe."""
    tip = rng.uniform(-0.36, -0.24)
    keep = (chest.v < tip).astype(np.float32)
    centre = (
        chest.u
        - np.float32(0.01 + rng.normal(0, 0.008))
        - (0 if len(chest.fields) == 2 else 0.1 * chest.v + 0.06)
    )
    _stroke(layer, np.abs(centre) - 0.022, keep, 0.007)
    _stroke(layer, centre, 0.35 * keep, 0.02)


def _line(layer: Array, chest: Chest, side: float, rng: np.random.Generator) -> None:
    """Central venous line: from the shoulder along the clavicle, then down the superior vena cava."""
    turn, tip = chest.anatomy.clavicle + 0.06, rng.uniform(-0.05, 0.15)
    x = -chest.u * np.float32(side) if side < 0 else chest.u
    vein = np.float32(0.1)
    arc = turn - 0.35 * (x - vein) + 0.3 * (x - vein) ** 2
    _stroke(layer, chest.v - arc, ((x > vein) & (x < 0.8)).astype(np.float32))
    _stroke(
        layer, x - vein - 0.02 * np.sin(6 * chest.v), ((chest.v > turn) & (chest.v < tip)).astype(np.float32)
    )


def _gastric(layer: Array, chest: Chest, side: float, rng: np.random.Generator) -> None:
    """Feeding tube: down the midline, then into the stomach under the left dome."""
    bend = chest.anatomy.dome + 0.05
    down = 0.03 + 0.22 * np.clip(chest.v - np.float32(bend - 0.35), 0, 1) ** 1.5
    _stroke(layer, chest.u - down, (chest.v < bend + 0.3).astype(np.float32))


def _pacemaker(layer: Array, chest: Chest, side: float, rng: np.random.Generator) -> None:
    """A metal box below the clavicle and its lead into the heart."""
    u0, v0 = (0.52 * side, -0.42) if len(chest.fields) == 2 else (-0.45, -0.3)
    dx, dy = np.abs(chest.u - np.float32(u0)), np.abs(chest.v - np.float32(v0))
    corner = 0.115 - np.maximum(np.maximum(dx, dy * 1.15), 0.72 * (dx + dy))
    np.maximum(layer, 1.25 * ramp(corner, 0.02), out=layer)
    tip_u, tip_v = 0.28, chest.anatomy.dome - 0.06
    w = np.clip((chest.v - np.float32(v0)) / np.float32(tip_v - v0), 0, 1)
    path = u0 + (tip_u - u0) * w - 0.16 * np.sin(np.pi * w) * np.sign(u0)
    _stroke(layer, chest.u - path, ((w > 0.02) & (w < 1)).astype(np.float32))


def _drain(layer: Array, chest: Chest, side: float, rng: np.random.Generator) -> None:
    """Chest drain: in through the lateral wall, up to the apex."""
    x = chest.u * np.float32(side)
    low, top = rng.uniform(0.1, 0.25), rng.uniform(-0.5, -0.4)
    w = np.clip((chest.v - np.float32(top)) / np.float32(low - top), 0, 1)
    path = 0.3 + 0.55 * w**1.6
    _stroke(layer, x - path, ((w > 0) & (w < 1)).astype(np.float32), 0.016)


_DEVICES: dict[str, Callable[[Array, Chest, float, np.random.Generator], None]] = {
    "tube": _tube,
    "line": _line,
    "gastric": _gastric,
    "pacemaker": _pacemaker,
    "drain": _drain,
}
