"""Panels: the radiographs that stand for a neuron when it is named, and when its name is tested (NumPy).

The naming images are of the `valid` split and the detection images of `test`, hence of other patients; for
one neuron no patient comes twice. Firing means an activation above 0, silent means exactly 0; a patient
fires for a neuron with any image of the split and is silent with any, so with several images can be both,
but never stands for both. Rows of paper.md: candidates, naming, detection.

Every draw is seeded by (seed, neuron, role) over images in `image_id` order: the same panels for any order
of rows, blocks and files. The values are sparse throughout: below 50 bytes a
firing entry of the two splits at the peak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from medsae_ray.config import PanelsSettings
from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.measure import Activations, ActivationState
from medsae_ray.tables import CANDIDATES, PANELS

Ints = NDArray[np.int64]

ROLES = ("name", "name_contrast", "detect_positive", "detect_negative")
"""What a radiograph is in a panel for, in the order of the table; the first two are of `valid`."""
_NAME, _CONTRAST, _POSITIVE, _NEGATIVE = range(len(ROLES))
_POOL = len(ROLES)

_NOT_TOP = "not among the top of any label"
_TOO_FEW_BESIDES = "too few silent patients besides the firing ones"
_TOO_FEW_ALIKE = "too few silent patients with the views and sexes of the firing ones"
_REMEDIES = {
    "dead": "fit the SAE again with a lower fit.sparsity",
    "fires on too few patients of valid": "lower panels.min_patients ({0.min_patients} now)",
    "fires on too few patients of test": "lower panels.min_patients ({0.min_patients} now)",
    "silent on too few patients of valid": "lower panels.min_patients ({0.min_patients} now)",
    "silent on too few patients of test": "lower panels.min_patients ({0.min_patients} now)",
    _NOT_TOP: "leave panels.per_label out, as no label has a defined r",
    _TOO_FEW_BESIDES: "lower panels.detect_images ({0.detect_images} now)",
    _TOO_FEW_ALIKE: "lower panels.detect_images ({0.detect_images} now) or switch panels.match_acquisition "
    "off",
}
"""Why a neuron is no candidate, by kind, and the setting that would change it."""


class Panels(NamedTuple):
    """The two tables, and the number of neurons left out by kind of reason."""

    panels: pa.Table
    candidates: pa.Table
    left_out: dict[str, int]


def gather(
    batches: Iterable[pa.RecordBatch], radiographs: pa.Table, n_neurons: int
) -> tuple[Activations, Activations]:
    """The `valid` and the `test` rows of the `activations` table, whatever its batches.

    Raises InputError for a split without rows, an image that comes twice, or a row that breaks the contract.
    """
    images = {
        split: radiographs.filter(pc.equal(radiographs["split"], split))["image_id"]
        for split in ("valid", "test")
    }
    states = {split: ActivationState(n_neurons) for split in images}
    for batch in batches:
        for split, state in states.items():
            state.update(batch.filter(pc.is_in(batch["image_id"], value_set=images[split])))
    return states["valid"].finish(), states["test"].finish()


def build_panels(
    valid: Activations, test: Activations, radiographs: pa.Table, neurons: pa.Table, settings: PanelsSettings
) -> Panels:
    """Choose the candidates and draw each one's images.

    `valid` and `test` are sparse [images, neurons] as `gather` gives them; `neurons` has a row a neuron.
    A candidate has n firing and n silent detection images, n being `detect_images` or, where it has fewer
    firing or silent patients, their number (at least `min_patients`).
    Raises InputError where no neuron can have a panel.
    """
    neurons = neurons.sort_by("neuron")
    naming = _Split(valid, radiographs, settings)
    detection = _Split(test, radiographs, settings, matched=settings.match_acquisition)
    unfit = _unfit(neurons["dead"].to_pylist(), naming, detection, settings)
    labels = neurons["valid_best_label"].to_pylist()
    if settings.per_label is not None:
        top = settings.per_label
        labels = _labels_of_top(neurons, [neuron for neuron, why in enumerate(unfit) if not why], top)
        for neuron, why in enumerate(unfit):
            if not why and labels[neuron] is None:
                unfit[neuron] = _Unfit(_NOT_TOP, f"not among the top {top} of any label")

    parts: list[_Part] = []
    for neuron, why in enumerate(unfit):
        if not why:
            drawn = _detection(detection, neuron, settings)
            if isinstance(drawn, _Unfit):
                unfit[neuron] = drawn
            else:
                parts += [*_naming(naming, neuron, settings), *drawn]
    left_out = Counter(why.kind for why in unfit if why)
    if not parts:
        counts = ", ".join(f"{n} {kind}" for kind, n in left_out.most_common())
        cause = max(left_out, key=lambda kind: (kind != "dead", left_out[kind]), default="dead")
        remedy = _REMEDIES[cause].format(settings)
        raise InputError(f"None of {len(unfit)} neurons can have a panel ({counts}): {remedy}.")
    columns = {
        "neuron": np.arange(len(unfit)),
        "candidate": [not why for why in unfit],
        "reason": [why.reason if why else None for why in unfit],
        "label": [None if why else label for why, label in zip(unfit, labels, strict=True)],
        "n_firing_valid": naming.n_firing,
        "n_silent_valid": naming.n_silent,
        "n_firing_test": detection.n_firing,
        "n_silent_test": detection.n_silent,
    }
    candidates = pa.table({f.name: pa.array(columns[f.name], f.type) for f in CANDIDATES}, schema=CANDIDATES)
    return Panels(_table(parts, naming, detection), candidates, dict(left_out))


def firing_rows(
    valid: Activations,
    test: Activations,
    radiographs: pa.Table,
    neurons: Iterable[int],
    *,
    n_top: int,
    n_range: int,
    seed: int,
) -> pa.Table:
    """Firing images of any neurons, candidates or not, in the columns and order of `panels`.

    Role name: the `n_top` highest of `valid`; detect_positive: `n_range` spread over the firing range of
    `test`, drawn as a candidate's are. One image a patient, and fewer where fewer patients fire.
    """
    naming, detection = _FiringImages(valid, radiographs), _FiringImages(test, radiographs)
    parts: list[_Part] = []
    for neuron in neurons:
        firing = naming.firing(neuron)
        parts.append(_firing_part(neuron, _NAME, firing, _highest(firing, n_top)))
        firing = detection.firing(neuron)
        everywhere = np.arange(len(firing.rows))
        chosen = _spread(everywhere, min(n_range, len(everywhere)), neuron, seed)
        parts.append(_firing_part(neuron, _POSITIVE, firing, chosen))
    return _table(parts, naming, detection)


def check_panels(panels: pa.Table, radiographs: pa.Table) -> None:
    """Assert of a written `panels` table what detection rests on.

    Raises RuntimeError, naming a neuron, where a patient stands for it twice (in one role or in two), a
    naming image is not of `valid` or a detection image not of `test`, an image of a firing role is silent or
    the reverse, or its firing and silent detection images are not equally many.
    """
    role = pc.index_in(panels["role"], value_set=pa.array(ROLES)).combine_chunks()
    row = pc.index_in(panels["image_id"], value_set=radiographs["image_id"]).combine_chunks()
    if role.null_count or row.null_count:
        raise RuntimeError("the panels table names an unknown role or an image of no radiograph")
    neuron, role = panels["neuron"].to_numpy(), role.to_numpy()
    drawn = radiographs.select(["patient_id", "split"]).take(row)
    patient = drawn["patient_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    split = drawn["split"].to_numpy()
    value, quantile = panels["value"].to_numpy(), panels["quantile"].to_numpy()

    def refuse(wrong: NDArray[np.bool_], what: str) -> None:
        if wrong.any():
            raise RuntimeError(f"the panel of neuron {neuron[wrong.argmax()]} {what}")

    refuse(split != np.where(role <= _CONTRAST, "valid", "test"), "has an image of the wrong split")
    order = np.lexsort((patient, neuron))
    again = (np.diff(neuron[order]) == 0) & (np.diff(patient[order]) == 0)
    twice = np.zeros(len(neuron), bool)
    twice[order[1:][again]] = True
    refuse(twice, "has two images of one patient")
    fires = np.isin(role, (_NAME, _POSITIVE))
    refuse(fires != (value > 0), "has an image that does not fire as its role says")
    refuse(np.where(fires, (quantile <= 0) | (quantile > 1), quantile != 0), "has a quantile out of range")
    balance = np.bincount(neuron, (role == _POSITIVE).astype(int) - (role == _NEGATIVE))
    refuse(balance[neuron] != 0, "has more detection images of one kind than of the other")


# ------------------------------------------------------------------------------------------ candidates


class _Unfit(NamedTuple):
    kind: str
    reason: str


def _unfit(
    dead: list[bool], naming: _Split, detection: _Split, settings: PanelsSettings
) -> list[_Unfit | None]:
    """Why a neuron cannot have a panel; None where, by its counts, it can."""
    need = settings.min_patients
    found: list[_Unfit | None] = [_Unfit("dead", "dead") if is_dead else None for is_dead in dead]
    for split, images in (("valid", naming), ("test", detection)):
        for does, counts in (("fires", images.n_firing), ("silent", images.n_silent)):
            for neuron in np.flatnonzero(counts < need):
                n = counts[neuron]
                told = f"{does} on {n} patient{'' if n == 1 else 's'} of {split}, {need} needed"
                found[neuron] = found[neuron] or _Unfit(f"{does} on too few patients of {split}", told)
    return found


def _labels_of_top(neurons: pa.Table, fit: list[int], top: int) -> list[str | None]:
    """For each neuron the label among whose `top` of largest r on validation it stands best, or None."""
    eligible = np.array(fit, np.int64)
    best: dict[int, tuple[int, float, str]] = {}
    for label in LABELS:
        r = neurons[f"valid_r_{label}"].to_numpy()[eligible]
        for rank, at in enumerate(np.argsort(-r, kind="stable")[: min(top, np.count_nonzero(~np.isnan(r)))]):
            neuron, standing = fit[at], (rank, -r[at], label)
            if neuron not in best or standing[:2] < best[neuron][:2]:
                best[neuron] = standing
    return [best[neuron][2] if neuron in best else None for neuron in range(neurons.num_rows)]


# ----------------------------------------------------------------------------------------------- draws


class _Firing(NamedTuple):
    """Where one neuron fires in a split."""

    all_values: NDArray[np.float32]
    """Of every firing image, ascending."""
    rows: Ints
    """One image a patient, that of the highest value: by falling value, ties by image_id."""
    values: NDArray[np.float32]
    """Of `rows`."""


class _Part(NamedTuple):
    """The images of one neuron in one role; `rows` of its split."""

    neuron: int
    role: int
    rows: Ints
    values: NDArray[np.float32]
    quantiles: NDArray[np.float32]


class _FiringImages:
    """The images of one split, in `image_id` order, and where neurons fire on them."""

    def __init__(self, activations: Activations, radiographs: pa.Table) -> None:
        self.image_ids = activations.image_ids
        self._found = pc.index_in(self.image_ids, value_set=radiographs["image_id"])
        patients = radiographs["patient_id"].take(self._found).to_numpy()
        _, self.patient = np.unique(patients, return_inverse=True)
        self._values = csc_array(activations.values)
        self._values.sort_indices()

    def _column(self, neuron: int) -> slice:
        return slice(self._values.indptr[neuron], self._values.indptr[neuron + 1])

    def firing(self, neuron: int) -> _Firing:
        """Where this neuron fires."""
        rows, values = self._values.indices[self._column(neuron)], self._values.data[self._column(neuron)]
        order = np.argsort(-values, kind="stable")
        best = order[_first_of_each(self.patient[rows[order]])]
        return _Firing(np.sort(values), rows[best].astype(np.int64), values[best])


class _Split(_FiringImages):
    """Besides, where neurons are silent, and the draws of silent images."""

    def __init__(
        self, activations: Activations, radiographs: pa.Table, settings: PanelsSettings, matched: bool = False
    ) -> None:
        super().__init__(activations, radiographs)
        self.cell = np.zeros(len(self.patient), np.int64)
        """Acquisition (view and sex) of each image: silent images replace one another within it."""
        if matched:
            view, sex = (pc.fill_null(radiographs[name].take(self._found), "") for name in ("view", "sex"))
            _, self.cell = np.unique(
                pc.binary_join_element_wise(view, sex, "|").to_numpy(), return_inverse=True
            )

        n, n_of_patient = len(self.patient), np.bincount(self.patient)
        of_patient = csr_array((np.ones(n, np.int32), (self.patient, np.arange(n))), (len(n_of_patient), n))
        fires = csc_array(
            (np.ones(self._values.nnz, np.int32), self._values.indices, self._values.indptr),
            self._values.shape,
        )
        # Firing images of each patient [patients, neurons].
        images = csc_array(of_patient @ fires)
        self._patients, self._starts = images.indices, images.indptr
        self._never_silent = images.data == n_of_patient[images.indices]
        self.n_firing = np.diff(self._starts).astype(np.int64)
        """Patients with a firing image, for each neuron."""
        never_silent = np.concatenate([[0], np.cumsum(self._never_silent)])[self._starts]
        self.n_silent = len(n_of_patient) - np.diff(never_silent)
        """Patients with a silent image, for each neuron."""

        draws = np.random.default_rng((settings.seed, _POOL))
        order = draws.permutation(n)
        one_each = order[_first_of_each(self.patient[order])]
        self._pool = draws.permutation(one_each)[: settings.negative_pool]

    def never_silent(self, neuron: int) -> Ints:
        """The patients on all of whose images this neuron fires."""
        of_neuron = slice(self._starts[neuron], self._starts[neuron + 1])
        return self._patients[of_neuron][self._never_silent[of_neuron]]

    def draw_silent(self, neuron: int, barred: Ints, cells: Ints, draws: np.random.Generator) -> Ints:
        """Rows of silent images of these acquisitions, one a patient, of no patient of the images `barred`.

        From the pool if it suffices, else from the whole split besides; fewer only where there are no more.
        """
        excluded = np.isin(self.patient, self.patient[barred])
        excluded[self._values.indices[self._column(neuron)]] = True
        pool = draws.permutation(self._pool)
        drawn = self._one_a_patient(pool[~excluded[pool]], cells)
        if len(drawn) < len(cells):
            wide = np.concatenate([pool, draws.permutation(len(self.patient))])
            drawn = self._one_a_patient(wide[~excluded[wide]], cells)
        return drawn

    def _one_a_patient(self, rows: Ints, cells: Ints) -> Ints:
        """As many of `rows` as can be had, early ones first: one a patient and one for each of `cells`.

        A patient can have images of several cells, so that taking the first that fits can run aground
        where a matching of cells with patients exists.
        """
        fitting = {}
        for cell in np.unique(cells):
            of_cell = rows[self.cell[rows] == cell]
            # More than there are places never matter: one of these is always left.
            fitting[cell] = of_cell[_first_of_each(self.patient[of_cell])[: len(cells)]]
        options = [fitting[cell] for cell in cells]
        images = np.concatenate([*options, np.empty(0, np.int64)])
        place = np.repeat(np.arange(len(cells)), [len(option) for option in options])
        _, first, which = np.unique(self.patient[images], return_index=True, return_inverse=True)
        # By appearance, as the matching prefers low columns and patient codes are in no random order.
        column = np.argsort(np.argsort(first))[which]
        edges = csr_array((np.ones(len(images), bool), (place, column)), (len(cells), len(first)))
        return images[maximum_bipartite_matching(edges, perm_type="column")[place] == column]


def _first_of_each(keys: NDArray[Any]) -> Ints:
    """Positions of the first of each distinct key, ascending."""
    return np.sort(np.unique(keys, return_index=True)[1])


def _highest(firing: _Firing, n: int) -> Ints:
    """Positions in `firing.rows` of the n of highest value, fewer where there are no more."""
    return np.arange(min(n, len(firing.rows)))


def _spread(positions: Ints, n: int, neuron: int, seed: int) -> Ints:
    """n of these positions, one drawn from each of n strata of equal size."""
    bounds = np.arange(n + 1) * len(positions) // max(n, 1)
    draws = np.random.default_rng((seed, neuron, _POSITIVE))
    return positions[draws.integers(bounds[:-1], bounds[1:])]


def _naming(split: _Split, neuron: int, settings: PanelsSettings) -> list[_Part]:
    firing = split.firing(neuron)
    n = settings.name_images
    if settings.name_from == "top":
        chosen = _highest(firing, n)
    else:
        rest = np.arange(len(firing.rows))[n - n // 2 :]
        distance = np.abs(firing.values - np.median(firing.values.astype(np.float64)))[rest]
        middle = rest[np.lexsort((firing.rows[rest], distance))][: n // 2]
        chosen = np.concatenate([_highest(firing, n - n // 2), middle])
    parts = [_firing_part(neuron, _NAME, firing, chosen)]
    if settings.contrast_images:
        cells = np.zeros(settings.contrast_images, np.int64)
        draws = np.random.default_rng((settings.seed, neuron, _CONTRAST))
        silent = split.draw_silent(neuron, firing.rows[chosen], cells, draws)
        parts.append(_silent_part(neuron, _CONTRAST, silent))
    return parts


def _detection(split: _Split, neuron: int, settings: PanelsSettings) -> list[_Part] | _Unfit:
    firing = split.firing(neuron)
    n = min(settings.detect_images, len(firing.rows), int(split.n_silent[neuron]))
    usable = np.arange(len(firing.rows))
    if split.n_silent[neuron] < 2 * n:
        # Where few patients are silent, those who can be must not be spent on the firing side.
        never_silent = usable[np.isin(split.patient[firing.rows], split.never_silent(neuron))]
        usable = never_silent if len(never_silent) >= n else usable
    chosen = _spread(usable, n, neuron, settings.seed)
    positives = firing.rows[chosen]
    draws = np.random.default_rng((settings.seed, neuron, _NEGATIVE))
    silent = split.draw_silent(neuron, positives, split.cell[positives], draws)
    if len(silent) == n:
        return [
            _firing_part(neuron, _POSITIVE, firing, chosen),
            _silent_part(neuron, _NEGATIVE, silent),
        ]
    kind = _TOO_FEW_ALIKE if settings.match_acquisition else _TOO_FEW_BESIDES
    return _Unfit(kind, f"{kind}: {len(silent)} in test, {n} needed")


def _firing_part(neuron: int, role: int, firing: _Firing, chosen: Ints) -> _Part:
    values = firing.values[chosen]
    below = np.searchsorted(firing.all_values, values, side="right")
    quantiles = (below / len(firing.all_values)).astype(np.float32)
    return _Part(neuron, role, firing.rows[chosen], values, quantiles)


def _silent_part(neuron: int, role: int, rows: Ints) -> _Part:
    zeros = np.zeros(len(rows), np.float32)
    return _Part(neuron, role, rows, zeros, zeros)


def _table(parts: list[_Part], naming: _FiringImages, detection: _FiringImages) -> pa.Table:
    """Rows by neuron, role (in the order of `ROLES`), falling value and image_id."""
    sizes = [len(part.rows) for part in parts]
    neuron = np.repeat([part.neuron for part in parts], sizes)
    role = np.repeat([part.role for part in parts], sizes)
    row = np.concatenate([part.rows for part in parts])
    value = np.concatenate([part.values for part in parts])
    quantile = np.concatenate([part.quantiles for part in parts])
    order = np.lexsort((row, -value, role, neuron))
    ids = pa.concat_arrays([naming.image_ids, detection.image_ids])
    row += np.where(role <= _CONTRAST, 0, len(naming.image_ids))
    columns = [
        pa.array(neuron[order], pa.int32()),
        ids.take(pa.array(row[order])),
        pa.array(ROLES).take(pa.array(role[order])),
        pa.array(value[order]),
        pa.array(quantile[order]),
    ]
    return pa.table(columns, schema=PANELS)
