"""The healthy chest: where lungs, heart, ribs and spine are, and how bright they look.

Coordinates: the image spans [-1, 1] both ways, u to the right, v downwards. Brightness is additive, as
attenuation is in a radiograph: soft tissue adds, air in the lungs (aeration) subtracts.
A `Field` is one lung as signs see it: arrays over its part of the image, with lung coordinates s (0
medial or anterior, 1 lateral or posterior) and t (0 apex, 1 top of the diaphragm's dome), so that a sign
is written once for right lung, left lung and lateral view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from medsae_ray.radiographs.phantom.patients import PhantomStudy

Array = NDArray[np.floating[Any]]
"""float32 throughout: it halves the time of a rendering."""


def ramp(distance: Array, width: float) -> Array:
    """Smooth step from 0 (distance < -width/2) to 1 (distance > width/2)."""
    t = distance * np.float32(1 / width)
    t += np.float32(0.5)
    np.clip(t, 0, 1, out=t)
    step = 3 - 2 * t
    step *= t
    step *= t
    return step


@dataclass(frozen=True)
class Anatomy:
    """One patient's build as one image shows it. Lengths in image half-widths."""

    female: bool
    age: int
    ap: bool
    du: float
    dv: float
    scale: float
    shear: float
    half_width: float
    wall: float
    apex: float
    dome: float
    dome_difference: float
    heart_width: float
    mediastinum: float
    rib_start: float
    rib_spacing: float
    rib_slope: float
    rib_brightness: float
    clavicle: float
    breast: float
    trees: tuple[int, int]
    lung_depth: float
    exposure: float
    contrast: float
    gamma: float
    noise: float

    @classmethod
    def of(cls, study: PhantomStudy, view: int) -> Anatomy:
        """The build comes from the patient's stream, pose and exposure from the image's own."""
        body = np.random.default_rng((study.seed, study.patient, 1_000))
        shot = np.random.default_rng((study.seed, study.patient, study.study, 2_000 + view))
        female = study.sex == "Female"
        ap = study.ap and study.views[view] == "frontal"
        old = (study.age - 18) / 72
        inspiration = shot.normal(-0.05 if ap else 0.03, 0.035)
        return cls(
            female=female,
            age=study.age,
            ap=ap,
            du=shot.normal(0, 0.03),
            dv=shot.normal(0, 0.03),
            scale=body.normal(0.98 if female else 1.02, 0.03) * shot.normal(1, 0.015),
            shear=shot.normal(0, 0.05 if ap else 0.025),
            half_width=body.normal(0.77, 0.025),
            wall=body.uniform(0.09, 0.2),
            apex=body.normal(-0.76, 0.02),
            dome=body.normal(0.44, 0.03) + inspiration,
            dome_difference=body.normal(0.05, 0.015),
            heart_width=body.normal(0.335, 0.018) * (1.06 if ap else 1.0) + 0.02 * old,
            mediastinum=body.normal(0.115, 0.008) * (1.08 if ap else 1.0) + 0.012 * old,
            rib_start=body.uniform(-0.9, -0.78),
            rib_spacing=body.normal(0.165, 0.008),
            rib_slope=body.normal(0.18, 0.05),
            rib_brightness=body.uniform(0.07, 0.11) * (1.05 - 0.35 * old),
            clavicle=body.normal(-0.6, 0.02) - (0.08 if ap else 0.0),
            breast=body.uniform(0.03, 0.1) if female else body.uniform(0, 0.015),
            trees=(int(body.integers(N_TREES)), int(body.integers(N_TREES))),
            lung_depth=body.normal(0.43, 0.02),
            exposure=shot.normal(0, 0.035),
            contrast=shot.normal(0.9 if ap else 1.0, 0.05),
            gamma=shot.uniform(0.85, 1.15),
            noise=shot.uniform(0.012, 0.028),
        )


@dataclass
class Field:
    """One lung (a lateral view has both in one). Arrays are views [rows, columns] into the image's own."""

    side: int
    column: int
    """Of the image at which the field's arrays begin."""
    x: Array
    """Distance from the midline (frontal), or u (lateral)."""
    v: Array
    s: Array
    t: Array
    below: Array
    """Depth under the diaphragm's line, negative above it."""
    mask: Array
    air: Array
    vessels: Array
    rib_phase: Array
    """Grows by 1 from rib to rib downwards."""
    extra: Array
    """Brightness added on top of everything."""
    hilum: tuple[float, float]
    place: Callable[[float, float], tuple[float, float]]
    """(s, t) -> (x, v)."""

    def fill(self, alpha: Array, keep_vessels: float = 0.0) -> None:
        """Replace a share `alpha` of the air by fluid or tissue, and hide its vessels."""
        self.air *= 1 - alpha
        self.vessels *= 1 - (1 - keep_vessels) * alpha


@lru_cache(maxsize=4)
def grid(size: int) -> tuple[Array, Array]:
    """Pixel centres: u [1, size] and v [size, 1] in [-1, 1]."""
    line = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
    return line[None, :], line[:, None]


N_TREES = 12


@lru_cache(maxsize=4)
def vessel_trees(size: int) -> Array:
    """Branching lung vessels [N_TREES, size, size], 0 to about 1, for a lung whose midline is at column 0.

    Columns are in pixels of the image, so the tree spreads from x = 0.2 to the chest wall.
    """
    rng = np.random.default_rng(20_251)
    scale = 2 * size

    def branch(x: float, v: float, angle: float, width: float, length: float) -> None:
        for _ in range(4):
            bend = angle + rng.normal(0, 0.22)
            x1, v1 = x + length / 4 * np.cos(bend), v + length / 4 * np.sin(bend)
            ends = [(x * scale / 2, (v + 1) * scale / 2), (x1 * scale / 2, (v1 + 1) * scale / 2)]
            draw.line(ends, fill=int(50 + 205 * min(width / 0.05, 1)), width=max(1, round(width * scale / 2)))
            x, v, angle = x1, v1, bend
        if width > 0.005:
            for turn in (rng.uniform(0.2, 0.6), -rng.uniform(0.2, 0.6)):
                branch(x, v, angle + turn, width * 0.68, length * rng.uniform(0.65, 0.9))

    trees = []
    for _ in range(N_TREES):
        canvas = Image.new("L", (scale, scale))
        draw = ImageDraw.Draw(canvas)
        for angle in np.linspace(-1.4, 1.35, 7) + rng.normal(0, 0.12, 7):
            branch(0.19, -0.08 + 0.05 * angle, angle, 0.034, 0.22)
        pixels = np.asarray(canvas, np.float32).reshape(size, 2, size, 2).mean((1, 3)) / 255
        trees.append(ndimage.gaussian_filter(pixels, size / 224 * 0.9))
    return np.stack(trees)


@lru_cache(maxsize=1)
def rib_profiles() -> tuple[Array, Array]:
    """Brightness of a rib across its phase (256 steps): posterior (bright edges) and anterior (soft)."""
    phase = (np.arange(256, dtype=np.float32) + 0.5) / 256

    def bump(centre: float, width: float) -> Array:
        return np.exp(-(((phase - centre) / width) ** 2)).astype(np.float32)

    body = ramp(0.26 - np.abs(phase - 0.5), 0.12)
    return 0.75 * body + 0.5 * bump(0.27, 0.05) + 0.4 * bump(0.73, 0.05), 0.6 * body


def rib_shadow(phase: Array, profile: Array) -> Array:
    """Look the profile up; the whole part of the phase is the rib's number."""
    return np.take(profile, (phase * 256).astype(np.int32), mode="wrap")


@dataclass
class Chest:
    """An image under construction: the parts signs may change, then `compose`."""

    anatomy: Anatomy
    size: int
    u: Array
    v: Array
    fields: tuple[Field, ...]
    tissue: Array
    """Soft tissue and bone other than ribs."""
    cage: Array
    """Where ribs show."""
    front_ribs: Array
    air: Array
    vessels: Array
    rib_phase: Array
    extra: Array
    heart_box: tuple[float, float, float, float]
    """u0, v0, u1, v1."""
    mediastinum_box: tuple[float, float, float, float]

    def compose(self, noise: np.random.Generator) -> NDArray[np.uint8]:
        """Add the layers up, expose, add quantum noise: uint8 [size, size]."""
        a = self.anatomy
        back, _ = rib_profiles()
        image = self.tissue - a.lung_depth * self.air
        image += 0.19 * self.vessels
        image += a.rib_brightness * self.cage * rib_shadow(self.rib_phase, back)
        image += a.rib_brightness * self.front_ribs
        image += self.extra
        image = (image - 0.5) * a.contrast + (0.5 + a.exposure)
        np.clip(image, 0.004, 1, out=image)
        image = image**a.gamma
        # Noise is scaled to the pixel size so that 112 px is the 2 x 2 mean of 224 px in texture as well.
        grain = noise.standard_normal(image.shape, np.float32)
        image += grain * (0.4 + 0.6 * image) * np.float32(a.noise * self.size / 224)
        np.clip(image, 0, 1, out=image)
        return (image * 255 + 0.5).astype(np.uint8)


def _pose(a: Anatomy, size: int) -> tuple[Array, Array]:
    gu, gv = grid(size)
    v = (gv - a.dv) / np.float32(a.scale)
    u = (gu - a.du) / np.float32(a.scale) - np.float32(a.shear) * v
    return u.astype(np.float32), v.astype(np.float32)


def frontal(a: Anatomy, size: int, heart: float, mediastinum: float) -> Chest:
    """A frontal chest; `heart` and `mediastinum` are severities in [0, 1] of their enlargement."""
    u, v = _pose(a, size)
    side_u = np.abs(u)
    wide = np.float32(a.half_width)
    # Chest wall and neck: half-width of the body per row.
    neck, shoulder = np.float32(0.22), np.float32(1.3)
    body_width = neck + (shoulder - neck) * ramp(v + 0.78, 0.5) ** 0.7
    body_width -= (shoulder - wide - a.wall + 0.02) * ramp(v + 0.12, 0.75) ** 0.6
    body = ramp(body_width - side_u, 0.05)
    chord = np.clip(1 - side_u / (body_width + 0.05), 0, 1)
    tissue = body * (0.5 + 0.1 * a.wall / 0.2 + 0.08 * chord)

    # Lungs: medial and lateral edge per row, the diaphragm per pixel.
    lateral = wide * _arch(v, a.apex, 0.38) - 0.04 * ramp(v - 0.35, 0.5)
    medial = 0.1 + 0.1 * ramp(-0.52 - v, 0.35)
    air = np.zeros_like(u)
    below = np.empty_like(u)
    s = np.empty_like(u)
    t = np.empty_like(u)
    middle = int(np.argmin(np.abs(u[size // 2])))
    halves = {-1: slice(0, middle), 1: slice(middle, size)}
    domes = {-1: a.dome - a.dome_difference / 2, 1: a.dome + a.dome_difference / 2}
    for side, cols in halves.items():
        x = side_u[:, cols]
        off = x - np.float32(0.4)
        below[:, cols] = v - domes[side] - off * off * (0.55 + 0.6 * (off > 0))
        s[:, cols] = (x - medial) / np.maximum(lateral - medial, 0.05)
        t[:, cols] = (v - a.apex) / np.float32(domes[side] - a.apex)
    cage = ramp(lateral + 0.05 - side_u, 0.03) * ramp(v - a.apex + 0.08, 0.1)
    mask = ramp(lateral - side_u, 0.05) * ramp(side_u - medial, 0.05) * ramp(-below, 0.035)

    # Silhouette of mediastinum, aortic knob and heart: its right and left border per row.
    bulge = a.heart_width * (1 + 0.25 * (heart > 0) + 0.6 * heart)
    atrium = 0.1 + 0.03 * (heart > 0) + 0.13 * heart
    crown = 0.26 + 0.05 * (heart > 0) + 0.1 * heart
    bottom = a.dome + 0.13
    widening = (0.05 * (mediastinum > 0) + 0.14 * mediastinum) * ramp(v + 0.62, 0.2) * ramp(0.1 - v, 0.3)
    neck_line = np.float32(a.mediastinum) + widening
    knob = (0.06 + 0.04 * a.age / 90) * np.exp(-(((v + 0.3) / 0.11) ** 2))
    left = np.maximum(
        neck_line + knob, neck_line - 0.02 + bulge * _ventricle(v, bottom - 2.1 * crown - 0.12, bottom)
    )
    right = neck_line - 0.01 + atrium * _ventricle(v, bottom - 2.1 * crown, bottom, 0.6)
    solid = ramp(left - u, 0.055) * ramp(u + right, 0.055)
    mask *= 1 - 0.95 * solid
    heart_level = ramp(v - a.dome + 1.9 * crown, 0.3)
    dense = (0.15 + 0.04 * heart_level) * solid
    dense = np.maximum(dense, (0.19 * body) * ramp(below, 0.06))
    tissue += dense * ramp(v + 1.05, 0.3)
    _spine(tissue, u, v, 0.0, 0.085, a)
    tissue -= 0.1 * ramp(0.05 - np.abs(u - 0.008), 0.03) * ramp(-0.2 - v, 0.12)
    # Gas in the stomach, under the left dome.
    bubble = 1 - np.sqrt(((u - 0.36) / 0.16) ** 2 + ((v - a.dome - 0.2) / 0.07) ** 2)
    tissue -= 0.13 * ramp(bubble, 0.4)
    _breasts(tissue, side_u, v, a)
    _shoulders(tissue, side_u, v, a)

    cubic = side_u * side_u * side_u
    rib_phase = (v - a.rib_start - a.rib_slope * side_u - 0.5 * cubic * side_u + 0.1) / np.float32(
        a.rib_spacing
    )
    front_phase = (v - a.rib_start - 0.95 + 0.75 * side_u) / np.float32(a.rib_spacing * 1.25)
    cage *= (
        (0.3 + 0.7 * ramp(0.02 - below, 0.1)) * (0.35 + 0.65 * ramp(side_u - 0.12, 0.12)) * (1 - 0.45 * solid)
    )
    front = rib_shadow(front_phase, rib_profiles()[1]) * cage * ramp(side_u - 0.42, 0.2) * ramp(0.3 - v, 0.4)

    vessels = np.empty_like(u)
    extra = np.zeros_like(u)
    thickness = 1 - 0.45 * np.clip(s - 0.45, 0, 1) ** 2 - 0.12 * ramp(0.15 - t, 0.3)
    np.multiply(mask, thickness, out=air)
    fields = []
    for (side, cols), tree in zip(halves.items(), a.trees, strict=True):
        columns = vessel_trees(size)[tree][:, : cols.stop - cols.start]
        vessels[:, cols] = (columns[:, ::-1] if side < 0 else columns) * mask[:, cols]

        def place(s0: float, t0: float, side: int = side) -> tuple[float, float]:
            row_v = a.apex + t0 * (domes[side] - a.apex)
            row = int(np.clip(np.searchsorted(v[:, 0], row_v), 0, size - 1))
            low, top = float(medial[row, 0]), float(lateral[row, 0])
            return low + s0 * max(top - low, 0.05), row_v

        fields.append(
            Field(
                side=side,
                column=cols.start,
                x=side_u[:, cols],
                v=v,
                s=s[:, cols],
                t=t[:, cols],
                below=below[:, cols],
                mask=mask[:, cols],
                air=air[:, cols],
                vessels=vessels[:, cols],
                rib_phase=rib_phase[:, cols],
                extra=extra[:, cols],
                hilum=(0.18, 0.52),
                place=place,
            )
        )
    span = float(a.mediastinum) + 0.24
    return Chest(
        anatomy=a,
        size=size,
        u=u,
        v=v,
        fields=tuple(fields),
        tissue=tissue,
        cage=cage,
        front_ribs=front,
        air=air,
        vessels=vessels,
        rib_phase=rib_phase,
        extra=extra,
        heart_box=(
            -a.mediastinum - atrium - 0.04,
            bottom - 2.1 * crown - 0.12,
            a.mediastinum + bulge + 0.03,
            bottom,
        ),
        mediastinum_box=(-span, -0.68, span, 0.2),
    )


def lateral(a: Anatomy, size: int, heart: float, mediastinum: float) -> Chest:
    """A lateral chest, the patient facing left: sternum at the left, spine at the right."""
    u, v = _pose(a, size)
    depth = 0.58 + 0.25 * a.wall
    sternum = -depth + 0.2 * ramp(-0.2 - v, 0.9)
    back = depth + 0.06 - 0.22 * ramp(-0.35 - v, 0.6)
    body = ramp(u - sternum + a.wall, 0.05) * ramp(back + a.wall - u, 0.05)
    arm = ramp(0.5 - np.abs(u + 0.12) - 0.4 * (v + 0.75), 0.1) * ramp(-0.66 - v, 0.24)
    tissue = np.maximum(body * (0.52 + 0.1 * a.wall / 0.2), 0.6 * arm)

    lung_back = back - 0.05
    lung_front = sternum + 0.07
    top = a.apex + 0.02
    narrow = _arch(v, top, 0.1)
    centre_u = (lung_back + lung_front) / 2
    lung_front = centre_u + (lung_front - centre_u) * narrow
    lung_back = centre_u + (lung_back - centre_u) * narrow
    dome = a.dome + 0.02
    below = v - dome - 0.32 * np.clip(u + 0.12, 0, 2) ** 1.5 - 0.5 * np.clip(-0.2 - u, 0, 2) ** 2
    s = (u - lung_front) / np.maximum(lung_back - lung_front, 0.05)
    t = ((v - top) / np.float32(dome - top)) * np.ones_like(u)
    mask = ramp(u - lung_front, 0.05) * ramp(lung_back - u, 0.05) * ramp(-below, 0.035) * ramp(v - top, 0.04)
    cage = ramp(u - lung_front + 0.05, 0.03) * ramp(lung_back + 0.06 - u, 0.03) * ramp(v - top + 0.08, 0.1)

    # The heart rests on sternum and diaphragm; its posterior border per row.
    bulge = a.heart_width * (1.65 + 0.3 * (heart > 0) + 0.65 * heart)
    crown, bottom = 0.6 + 0.06 * (heart > 0) + 0.16 * heart, dome + 0.14
    border = sternum + bulge * _ventricle(v, bottom - crown - 0.14, bottom, 0.62)
    heart_mask = body * ramp(border - u, 0.09) * ramp(border - sternum - 0.1, 0.1)
    arch = 0.06 - np.abs(np.sqrt((u - 0.1) ** 2 + (v + 0.14) ** 2) - 0.2)
    centre = 0.5 * ramp(arch, 0.08) * ramp(-0.1 - v - 0.4 * np.clip(-u, 0, 1), 0.2)
    retrosternal = (0.12 + 0.17 * mediastinum) * ramp(v + 0.62, 0.2) * ramp(0.1 - v, 0.3)
    if mediastinum > 0:
        centre = np.maximum(centre, 0.9 * ramp(retrosternal - np.abs(u + 0.16 + 0.12 * v), 0.08))
    mask *= 1 - 0.85 * np.maximum(heart_mask, centre)
    tissue += np.maximum(np.maximum(0.12 * centre, 0.17 * heart_mask), 0.19 * body * ramp(below, 0.06))
    cage *= (0.2 + 0.8 * ramp(0.02 - below, 0.1)) * (1 - 0.6 * heart_mask)
    _spine(tissue, u, v, depth - 0.19, 0.12, a)
    tissue += 0.1 * ramp(0.03 - np.abs(u - sternum - 0.035), 0.03) * ramp(0.35 - v, 0.3) * ramp(v + 0.55, 0.1)
    tissue -= 0.12 * ramp(0.05 - np.abs(u - 0.06 - 0.1 * v), 0.03) * ramp(-0.12 - v, 0.12)
    tissue += (
        0.8 * a.breast * ramp(1 - np.sqrt(((u + depth) / 0.3) ** 2 + ((v - 0.2) / 0.3) ** 2), 0.5) * body
    )

    rib_phase = (v - a.rib_start + 0.42 * u - 0.3 * u * u) / np.float32(a.rib_spacing * 1.05)
    front = 0.5 * rib_shadow(rib_phase * 0.96 + 0.45, rib_profiles()[1]) * cage
    extra = np.zeros_like(u)
    air = mask * (0.95 - 0.25 * ramp(0.2 - t, 0.4))
    tree = vessel_trees(size)[a.trees[0]]
    shift = size // 2
    vessels = np.empty_like(u)
    vessels[:, shift:] = tree[:, : size - shift]
    vessels[:, :shift] = vessel_trees(size)[a.trees[1]][:, :shift][:, ::-1]
    vessels *= mask

    def place(s0: float, t0: float) -> tuple[float, float]:
        row_v = top + t0 * (dome - top)
        row = int(np.clip(np.searchsorted(v[:, 0], row_v), 0, size - 1))
        low, high = float(lung_front[row, 0]), float(lung_back[row, 0])
        return low + s0 * (high - low), row_v

    field = Field(
        side=0,
        column=0,
        x=u,
        v=v,
        s=s,
        t=t,
        below=below,
        mask=mask,
        air=air,
        vessels=vessels,
        rib_phase=rib_phase,
        extra=extra,
        hilum=(0.5, 0.5),
        place=place,
    )
    return Chest(
        anatomy=a,
        size=size,
        u=u,
        v=v,
        fields=(field,),
        tissue=tissue,
        cage=0.8 * cage,
        front_ribs=front,
        air=air,
        vessels=vessels,
        rib_phase=rib_phase,
        extra=extra,
        heart_box=(-depth, bottom - crown - 0.14, -depth + bulge + 0.1, bottom),
        mediastinum_box=(-0.5, -0.68, 0.2, 0.2),
    )


def _arch(v: Array, top: float, full: float) -> Array:
    """Rounded apex: 0 at `top`, 1 from `full` downwards (a superellipse)."""
    q = np.clip((full - v) / np.float32(full - top), 0, 1)
    return (1 - q**2.4) ** np.float32(0.45)


def _ventricle(v: Array, top: float, bottom: float, widest: float = 0.74) -> Array:
    """Heart border: 0 at `top`, 1 at the share `widest` of the way down, round to 0 at `bottom`."""
    q = np.clip((v - np.float32(top)) / np.float32(bottom - top), 0, 1)
    rise = np.sin(np.clip(q / widest, 0, 1) * np.float32(np.pi / 2)) ** 1.7
    fall = np.sqrt(np.clip(1 - ((q - widest) / (1 - widest)) ** 2, 0, 1))
    return np.where(q < widest, rise, fall)


def _spine(tissue: Array, u: Array, v: Array, centre: float, half: float, a: Anatomy) -> None:
    """Vertebral bodies: a column with darker disc spaces."""
    cols = _columns(u, centre - half - 0.2, centre + half + 0.2)
    column = ramp(half - np.abs(u[:, cols] - np.float32(centre)), 0.05)
    level = (v - a.rib_start) / np.float32(a.rib_spacing)
    disc = 0.7 + 0.3 * ramp(np.abs(level - np.floor(level) - 0.5), 0.3)
    tissue[:, cols] += (0.6 + 0.5 * a.rib_brightness / 0.1) * 0.05 * column * disc


def _breasts(tissue: Array, side_u: Array, v: Array, a: Anatomy) -> None:
    if a.breast < 0.01:
        return
    distance = 1 - np.sqrt(((side_u - 0.5) / 0.36) ** 2 + ((v - a.dome + 0.12) / 0.36) ** 2)
    tissue += np.float32(0.85 * a.breast) * ramp(distance, 0.3)


def _shoulders(tissue: Array, side_u: Array, v: Array, a: Anatomy) -> None:
    """Clavicles, the medial edges of the scapulae, humeral heads."""
    rows = slice(0, int(tissue.shape[0] * 0.62))
    x, y = side_u[rows], v[rows]
    line = a.clavicle + 0.02 - 0.2 * (x - 0.1) + 0.12 * (x - 0.45) ** 2
    collar = ramp(0.034 - np.abs(y - line), 0.025) * ramp(x - 0.07, 0.04) * ramp(0.85 - x, 0.1)
    scapula = ramp(x - 0.62 - (0.0 if a.ap else 0.1) + 0.25 * (y + 0.3), 0.04) * ramp(-0.02 - y, 0.1)
    humerus = ramp(0.16 - np.sqrt((x - 0.98) ** 2 + (y + 0.62) ** 2), 0.05)
    tissue[rows] += 0.13 * collar + 0.045 * scapula + 0.12 * humerus


def _columns(u: Array, low: float, high: float) -> slice:
    inside = np.flatnonzero((u.max(0) >= low) & (u.min(0) <= high))
    return slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0)
