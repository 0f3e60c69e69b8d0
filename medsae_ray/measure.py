"""What the neurons of one split respond to: correlation, entropy, AUROC, density, FVE (plain NumPy).

Batches go into a mergeable state (`ActivationState`, `EmbeddingState`, `ReconstructionState`); the finished
state, the labels and the patients go into `measure_units`; two splits' results make the `neurons` table.

A unit is a neuron of the SAE, or one of the raw embedding's dimensions. Shapes: n images, u units, L labels.
Undefined figures are NaN in arrays and null in tables, never 0. The measures are those of MedSAE (arXiv
2510.26411); statistics.py has them for one unit at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.statistics import auroc_interval, clustered_variance, entropy, pearson

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# ------------------------------------------------------------------------------------------------ labels


@dataclass(frozen=True)
class LabelPolicy:
    """What an uncertain (−1) and a blank (null, not mentioned) label count as."""

    uncertain: Literal["ignore", "zeros", "ones"] = "ignore"
    """`ignore` leaves the image out for that label; `zeros` and `ones` count it absent or present."""
    blank: Literal["negative", "ignore"] = "negative"
    """`negative` counts a label that the report does not mention as absent (CheXpert's convention)."""

    def apply(self, values: NDArray[np.float32]) -> tuple[Floats, Bools]:
        """Turn label values [n, L] (1, 0, −1, NaN for null) into y [n, L] of 0 and 1, and known [n, L].

        A label that is null on every image was never annotated by the data set, so it is unknown under
        either `blank`. Raises InputError for any other value.
        """
        blank, uncertain = np.isnan(values), values == -1
        if not (blank | uncertain | (values == 0) | (values == 1)).all():
            raise InputError("A label is none of 1, 0, -1 or blank: correct the label columns of the table.")
        known = ~blank if self.blank == "ignore" else ~blank | ~blank.all(axis=0)
        if self.uncertain == "ignore":
            known = known & ~uncertain
        y = (values == 1) | (uncertain if self.uncertain == "ones" else False)
        return y.astype(np.float64), known


def labels_of(radiographs: pa.Table, image_ids: pa.Array) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Label values [n, 14] (NaN for null) and patient numbers [n] of these images, in their order.

    Raises InputError where an image is not in the `radiographs` table.
    """
    rows = pc.index_in(image_ids, value_set=radiographs["image_id"].combine_chunks())
    if rows.null_count:
        stray = image_ids.filter(pc.is_null(rows))[0]
        raise InputError(
            f"Image {stray} has activations but no row in the radiographs table: run embed and encode again."
        )
    found = radiographs.select(["patient_id", *LABELS]).take(rows)
    values = [found[label].to_numpy() for label in LABELS]
    patients = found["patient_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    return np.column_stack(values).astype(np.float32), patients.astype(np.int64)


# ------------------------------------------------------------------------------------- mergeable states


@dataclass(frozen=True)
class Activations:
    """One split's values: `image_ids` [n] ascending, `values` float32 [n, u].

    Sparse for neurons (whatever is not stored is 0, whatever is stored is positive), dense for dimensions.
    """

    image_ids: pa.Array
    values: csr_array | NDArray[np.float32]


@dataclass
class ActivationState:
    """Gathers `activations` rows of one split: 8 bytes a firing entry.

    The finished result is the same, bit for bit, for any order and split of the rows over batches and states.
    """

    n_units: int
    _ids: list[pa.Array] = field(default_factory=list)
    _counts: list[NDArray[np.int32]] = field(default_factory=list)
    _neurons: list[NDArray[np.int32]] = field(default_factory=list)
    _values: list[NDArray[np.float32]] = field(default_factory=list)

    def update(self, batch: pa.Table | pa.RecordBatch) -> None:
        """Add rows of the `activations` table.

        Raises InputError where a row breaks its contract: neurons ascending in [0, n_units), as many values,
        each finite and above 0.
        """
        ids = _ids(batch)
        neuron, value = _whole(batch, "neuron"), _whole(batch, "value")
        counts = pc.fill_null(pc.list_value_length(neuron), 0).to_numpy()
        same = pc.equal(pc.list_value_length(value), pc.list_value_length(neuron))
        _refuse(ids, ~pc.fill_null(same, False).to_numpy(zero_copy_only=False), "lists of unequal length")
        neurons = neuron.flatten().to_numpy().astype(np.int32, copy=False)
        values = value.flatten().to_numpy().astype(np.float32, copy=False)
        row = np.repeat(np.arange(len(ids)), counts)
        _refuse(ids, row[(neurons < 0) | (neurons >= self.n_units)], f"a neuron outside 0-{self.n_units - 1}")
        falling = (np.diff(neurons) <= 0) & (np.diff(row) == 0)
        _refuse(ids, row[1:][falling], "neurons that are not in ascending order")
        _refuse(
            ids, row[~((values > 0) & np.isfinite(values))], "an activation that is not finite and above 0"
        )
        self._ids.append(ids)
        self._counts.append(counts)
        self._neurons.append(neurons)
        self._values.append(values)

    def merge(self, other: ActivationState) -> None:
        """Add another state's rows. Raises ValueError where it counts other neurons."""
        if other.n_units != self.n_units:
            raise ValueError(f"states of {self.n_units} and {other.n_units} neurons do not merge")
        self._ids += other._ids
        self._counts += other._counts
        self._neurons += other._neurons
        self._values += other._values

    def finish(self) -> Activations:
        """All rows, by ascending image_id. Raises InputError for no rows or an image that comes twice."""
        ids, order = _ascending(self._ids)
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(self._counts), dtype=np.int64)])
        entries = np.concatenate(self._values), np.concatenate(self._neurons), indptr
        return Activations(ids, csr_array(entries, shape=(len(ids), self.n_units))[order])


@dataclass
class EmbeddingState:
    """Gathers `embeddings` rows of one split (4 bytes a number), to measure its dimensions like neurons."""

    embedding_dim: int
    _ids: list[pa.Array] = field(default_factory=list)
    _rows: list[NDArray[np.float32]] = field(default_factory=list)

    def update(self, batch: pa.Table | pa.RecordBatch) -> None:
        """Add rows of the `embeddings` table. Raises InputError for another width or a number not finite."""
        ids, embedding = _ids(batch), _whole(batch, "embedding")
        lengths = pc.fill_null(pc.list_value_length(embedding), -1).to_numpy(zero_copy_only=False)
        _refuse(ids, lengths != self.embedding_dim, f"an embedding that has not {self.embedding_dim} numbers")
        flat = embedding.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        rows = flat.reshape(len(ids), self.embedding_dim)
        _refuse(ids, ~np.isfinite(rows).all(axis=1), "an embedding with a number that is not finite")
        self._ids.append(ids)
        self._rows.append(rows)

    def merge(self, other: EmbeddingState) -> None:
        """Add another state's rows. Raises ValueError where its embeddings have another width."""
        if other.embedding_dim != self.embedding_dim:
            raise ValueError(f"states of width {self.embedding_dim} and {other.embedding_dim} do not merge")
        self._ids += other._ids
        self._rows += other._rows

    def finish(self) -> Activations:
        """All rows, by ascending image_id. Raises InputError for no rows or an image that comes twice."""
        ids, order = _ascending(self._ids)
        return Activations(ids, np.concatenate(self._rows)[order])


def _whole(batch: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    column = batch[name]
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _ids(batch: pa.Table | pa.RecordBatch) -> pa.Array:
    ids = _whole(batch, "image_id").cast(pa.string())
    if ids.null_count:
        raise InputError("A row of the activations or embeddings has no image_id: run that stage again.")
    return ids


def _refuse(ids: pa.Array, rows: NDArray[np.integer] | Bools, what: str) -> None:
    """Name the first bad image; `rows` are bad row numbers, or a flag for each row."""
    bad = np.flatnonzero(rows) if rows.dtype == bool else rows
    if bad.size:
        raise InputError(f"Image {ids[int(bad[0])]} has {what}: run the stage that wrote it again.")


def _ascending(chunks: Sequence[pa.Array]) -> tuple[pa.Array, NDArray[np.int64]]:
    ids = pa.concat_arrays(chunks) if chunks else pa.array([], pa.string())
    if len(ids) == 0:
        raise InputError(
            "There is no image to measure in this split: check the split column and the quarantine."
        )
    order = pc.sort_indices(ids)
    ids = ids.take(order)
    twice = pc.equal(ids[1:], ids[:-1])
    if pc.any(twice).as_py():
        raise InputError(f"Image {ids[1:].filter(twice)[0]} comes twice: run the stage that wrote it again.")
    return ids, order.to_numpy().astype(np.int64)


# ------------------------------------------------------------------------------- measures of each unit


@dataclass(frozen=True)
class UnitMeasures:
    """Measures of u units over one split; [u] and [u, L] arrays, NaN where undefined."""

    labels: tuple[str, ...]
    n_images: int
    n_firing: Ints
    """Images with a value other than 0 [u] (a raw dimension, being signed, as a rule has all)."""
    mean: Floats
    """Over all images [u]."""
    max: Floats
    """Over all images [u]; 0 for a silent neuron."""
    r: Floats
    """Pearson's r over the images whose label is known [u, L]."""
    n: Ints
    """Images whose label is known [L]."""
    n_positive: Ints
    """Images whose label is known and present [L]."""
    entropy: Floats
    """Of normalised |r| in nats [u]."""
    entropy_floor: Floats
    """Mean entropy under permuted labels [u]: what noise alone would give."""
    auroc: Floats
    """Exact, ties half, over the images whose label is known [u, L]."""
    auroc_low: Floats
    auroc_high: Floats
    """95 % interval by clustered DeLong, patients as clusters [u, L]."""

    @property
    def density(self) -> Floats:
        """Share of images on which the unit fires [u], in [0, 1]."""
        return self.n_firing / self.n_images

    @property
    def n_labels(self) -> Ints:
        """Labels with a defined r [u]."""
        return np.count_nonzero(~np.isnan(self.r), axis=1).astype(np.int64)

    @property
    def best(self) -> Ints:
        """Index of the label of largest |r| [u], −1 where none is defined."""
        magnitude = np.nan_to_num(np.abs(self.r), nan=-1.0)
        return np.where(magnitude.max(axis=1) < 0, -1, magnitude.argmax(axis=1))


def measure_units(
    activations: Activations,
    y: Floats,
    known: Bools,
    patients: ArrayLike,
    *,
    labels: Sequence[str] = LABELS,
    permutations: int = 20,
    seed: int = 0,
    with_auroc: bool = True,
) -> UnitMeasures:
    """Measure every unit against every label on one split.

    `y` [n, L] of 0 and 1, `known` [n, L] and `patients` [n] follow the rows of `activations`. `permutations`
    is the number of seeded joint permutations of the label rows among the images behind `entropy_floor` (0
    leaves it NaN). `with_auroc=False` leaves the AUROCs NaN, for the cheap look during training.
    Raises ValueError where the shapes disagree.
    """
    n = len(activations.image_ids)
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    if not (y.shape == known.shape == (n, len(labels)) and patient.shape == (n,)):
        raise ValueError(f"{n} images, y {y.shape}, known {known.shape}, patients {patient.shape} disagree")
    # A patient's images side by side: cluster sums are then sums of neighbours.
    order = np.argsort(patient, kind="stable")
    columns = _Columns(activations.values, order)
    y, known, patient = np.where(known, y, 0.0)[order], known[order], patient[order]

    u, undefined = columns.n_units, np.full((columns.n_units, len(labels)), np.nan)
    n_firing, mean, largest = np.zeros(u, np.int64), np.zeros(u), np.zeros(u)
    r, floor = undefined.copy(), np.full(u, np.nan)
    label_sums = _LabelSums(y, known, permutations, seed)
    for units in _slices(u, max(1, _BLOCK_NUMBERS // n)):
        block = columns.dense(units)
        n_firing[units] = np.count_nonzero(block, axis=1)
        mean[units], largest[units] = block.mean(axis=1), block.max(axis=1)
        r[units], floor[units] = label_sums.correlate(block, mean[units])

    areas = _aurocs(columns, y, known, patient) if with_auroc else (undefined, undefined, undefined)
    return UnitMeasures(
        labels=tuple(labels),
        n_images=n,
        n_firing=n_firing,
        mean=mean,
        max=largest,
        r=r,
        n=known.sum(axis=0),
        n_positive=y.sum(axis=0).astype(np.int64),
        entropy=entropy(r),
        entropy_floor=floor,
        auroc=areas[0],
        auroc_low=areas[1],
        auroc_high=areas[2],
    )


_BLOCK_NUMBERS = 1 << 23
"""Numbers in a dense block of units (64 MiB): a product by BLAS beats a sparse one from about 5 % density."""
_CHUNK_ENTRIES = 1 << 17
"""Entries ranked at a time: the temporaries stay in a core's cache."""
_PERMUTATIONS_AT_ONCE = 4


class _Columns:
    """The values unit by unit, rows in the order given."""

    def __init__(self, values: csr_array | NDArray[np.float32], order: Ints) -> None:
        self.n_images, self.n_units = values.shape
        self._is_dense = isinstance(values, np.ndarray)
        # By unit: [u, n] where dense, [n, u] by columns where sparse.
        self._values: Any = (
            np.ascontiguousarray(values[order].T) if isinstance(values, np.ndarray) else values[order].tocsc()
        )

    def dense(self, units: slice) -> Floats:
        """Every value [units, n]."""
        block = self._values[units] if self._is_dense else self._values[:, units].T.toarray()
        return block.astype(np.float64)

    def chunks(self) -> Iterator[tuple[slice, Ints, Ints, NDArray[np.float32]]]:
        """Some units at a time: units, indptr, rows (ascending in a unit) and values of their entries.

        A dense unit has n entries and a sparse one those that fire; what has no entry is 0.
        """
        if self._is_dense:
            starts = np.arange(self.n_units + 1, dtype=np.int64) * self.n_images
        else:
            starts = self._values.indptr.astype(np.int64)
        # A sort key holds the unit in what its 64 bits leave over beside the value and the row.
        most = 1 << (32 - self.n_images.bit_length())
        first = 0
        while first < self.n_units:
            fitting = int(np.searchsorted(starts, starts[first] + _CHUNK_ENTRIES, side="right")) - 1
            last = min(max(fitting, first + 1), first + most, self.n_units)
            entries = slice(starts[first], starts[last])
            if self._is_dense:
                rows, values = (
                    np.tile(np.arange(self.n_images), last - first),
                    self._values[first:last].ravel(),
                )
            else:
                rows, values = self._values.indices[entries].astype(np.int64), self._values.data[entries]
            yield slice(first, last), starts[first : last + 1] - starts[first], rows, values
            first = last


class _LabelSums:
    """Correlations of a block of units with the labels, as given and permuted."""

    def __init__(self, y: Floats, known: Bools, permutations: int, seed: int) -> None:
        self._y, self._known = y, known
        # Labels known on the same images share their sums.
        masks, self._mask_of = np.unique(known, axis=1, return_inverse=True)
        self._columns = np.hstack([y, masks.astype(np.float64)])
        rng = np.random.default_rng(seed)
        self._permutations = [rng.permutation(len(y)) for _ in range(permutations)]
        self._n, self._positive = known.sum(axis=0), y.sum(axis=0)

    def correlate(self, block: Floats, mean: Floats) -> tuple[Floats, Floats]:
        """r [units, L], and the mean entropy under the permutations [units], of values [units, n]."""
        # Centred first: sums of squares about a far-off origin would lose the variance to rounding.
        centred = block - mean[:, None]
        squares = centred * centred
        r, left = self._correlate(centred, squares, [np.arange(block.shape[1])])
        r, left = r[:, 0], left[:, 0]
        # What centring on all images could not save (above all, what is constant) is computed one by one.
        for unit, label in np.argwhere(left < 1e-4):
            rows = self._known[:, label]
            r[unit, label] = pearson(block[unit, rows], self._y[rows, label])
        floors = []
        for some in _slices(len(self._permutations), _PERMUTATIONS_AT_ONCE):
            noise, left = self._correlate(centred, squares, self._permutations[some])
            noise[left < 1e-9] = np.nan
            floors.append(entropy(noise))
        if not floors:
            return r, np.full(len(r), np.nan)
        entropies = np.hstack(floors)
        count = np.count_nonzero(~np.isnan(entropies), axis=1)
        with np.errstate(invalid="ignore"):
            return r, np.nansum(entropies, axis=1) / count

    def _correlate(self, centred: Floats, squares: Floats, orders: list[Ints]) -> tuple[Floats, Floats]:
        """r, and the share of the known images' sum of squares that is variance: [units, orders, L]."""
        n_labels = self._y.shape[1]
        columns = self._columns[np.stack(orders, axis=1)]
        n_units, shape = len(centred), (len(centred), len(orders), -1)
        sums = (centred @ columns.reshape(len(columns), -1)).reshape(shape)
        masks = np.ascontiguousarray(columns[:, :, n_labels:]).reshape(len(columns), -1)
        total = (squares @ masks).reshape(n_units, len(orders), -1)[..., self._mask_of]
        product, first = sums[..., :n_labels], sums[..., n_labels:][..., self._mask_of]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = self._positive / self._n
            variance = total - first * first / self._n
            label_variance = self._positive * (1 - share)
            label_variance[(self._positive == 0) | (self._positive == self._n)] = np.nan
            r = (product - first * share) / np.sqrt(variance * label_variance)
            # A unit without any deviation on the known images (0/0) is constant there: no variance left.
            left = np.where(total > 0, variance / total, 0.0)
        left[..., np.isnan(label_variance)] = np.nan
        return np.clip(r, -1.0, 1.0), left


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


_LOW = (1 << 32) - 1


def _aurocs(columns: _Columns, y: Floats, known: Bools, patient: Ints) -> tuple[Floats, Floats, Floats]:
    """AUROC with its interval [u, L]; rows are ordered by `patient`, numbered from 0 without gaps."""
    sums = _AreaSums(y, known, patient)
    shape = (4, columns.n_units, y.shape[1])
    area, ss10, ss01, ss11 = np.full(shape, np.nan)
    for units, indptr, rows, values in columns.chunks():
        for label, figures in sums.of(indptr, rows, values):
            area[units, label], ss10[units, label], ss01[units, label], ss11[units, label] = figures
    clusters = sums.n_clusters
    variance = clustered_variance(ss10, ss01, ss11, sums.m, sums.n, *clusters)
    low, high = auroc_interval(area, variance, np.minimum(clusters[0], clusters[1]))
    return area, low, high


class _AreaSums:
    """Areas and Obuchowski's sums from ranked entries.

    Only entries are ranked: all images without one tie at 0, below every entry. Counts are doubled because of
    the halves of ties, so they stay whole numbers and are exact in whatever order they are added. A packed
    number counts positives in its lower 32 bits and negatives in its upper ones.
    """

    def __init__(self, y: Floats, known: Bools, patient: Ints) -> None:
        positive, negative = (y == 1).T, (known & (y == 0)).T
        self.m, self.n = positive.sum(axis=1), negative.sum(axis=1)
        self._patient = patient
        self._n_rows = len(patient)
        starts = np.flatnonzero(np.diff(patient, prepend=-1))
        self._m_k, self._n_k = (
            np.add.reduceat(c, starts, axis=1, dtype=np.float64) for c in (positive, negative)
        )
        self.n_clusters = tuple(
            np.count_nonzero(c, axis=1) for c in (self._m_k, self._n_k, self._m_k + self._n_k)
        )
        self._products = np.concatenate([self._m_k**2, self._n_k**2, self._m_k * self._n_k]).T
        self._code = positive.astype(np.int64) | negative.astype(np.int64) << 32
        # A positive is placed among the negatives, a negative among the positives.
        self._other_class = np.where(positive, -1 << 32, np.where(negative, _LOW, 0))
        # A patient's sum fits into half a packed number, unless one patient has a great many images.
        self._packed = 3 * self._n_rows * int(np.diff(starts, append=self._n_rows).max()) < 1 << 31

    def of(
        self, indptr: Ints, rows: Ints, values: NDArray[np.float32]
    ) -> Iterator[tuple[int, tuple[Floats, ...]]]:
        """Each label with both classes: its number, area, ss10, ss01 and ss11 (`clustered_variance`) [units].

        `indptr` [units + 1], `rows` and `values` [entries] hold the entries of some units.
        """
        ranked = _rank(indptr, values, self._n_rows.bit_length())
        row_by_rank = rows[ranked.entry_by_rank]
        # Segments: the entries of one unit and one patient.
        cluster = self._patient[rows]
        new = np.diff(cluster, prepend=-1) != 0
        new[indptr[:-1][indptr[:-1] < len(rows)]] = True
        segment = np.flatnonzero(new)
        cluster = cluster[segment]
        bounds = np.searchsorted(segment, indptr)
        per_unit = np.diff(bounds)
        entered = csr_array(
            (np.ones(len(segment)), cluster, bounds), shape=(len(per_unit), len(self._products))
        )
        # Of the patients without an entry only these sums are needed.
        rest = (self._products.sum(axis=0) - entered @ self._products).reshape(len(per_unit), 3, -1)
        counted = np.zeros(len(rows) + 1, np.int64)
        for label in np.flatnonzero((self.m > 0) & (self.n > 0)):
            m, n = int(self.m[label]), int(self.n[label])
            np.cumsum(self._code[label][row_by_rank], out=counted[1:])
            silent = (m | n << 32) - np.diff(counted[indptr])
            # Twice the images below an entry (a tie counts once), beyond twice or once the silent ones.
            below = counted[ranked.tie_bounds[:-1]] + counted[ranked.tie_bounds[1:]]
            below += np.repeat(silent - 2 * counted[indptr[:-1]], ranked.ties_per_unit)
            placed = below[ranked.tie_of_entry] & self._other_class[label][rows]
            if self._packed:
                placed = _sums(placed, segment)
                above_silent, below_silent = placed >> 32, placed & _LOW
            else:
                above_silent, below_silent = _sums(placed >> 32, segment), _sums(placed & _LOW, segment)
            silent_positive, silent_negative = silent & _LOW, silent >> 32
            twice = _sums(above_silent, bounds[:-1], per_unit) + m * silent_negative
            # What a silent positive and a silent negative lie off the mean placement.
            a, b = silent_negative - twice / m, 2 * m - silent_positive - twice / n
            x = above_silent + self._m_k[label][cluster] * np.repeat(a, per_unit)
            z = self._n_k[label][cluster] * np.repeat(b, per_unit) - below_silent
            ss10 = _sums(x * x, bounds[:-1], per_unit) + a * a * rest[:, 0, label]
            ss01 = _sums(z * z, bounds[:-1], per_unit) + b * b * rest[:, 1, label]
            ss11 = _sums(x * z, bounds[:-1], per_unit) + a * b * rest[:, 2, label]
            yield int(label), (twice / (2 * m * n), ss10 / 4, ss01 / 4, ss11 / 4)


class _Ranked(NamedTuple):
    """Entries by ascending value within their unit; a tie is a run of equal values, often of one."""

    entry_by_rank: Ints
    tie_bounds: Ints
    tie_of_entry: Ints
    ties_per_unit: Ints


def _rank(indptr: Ints, values: NDArray[np.float32], row_bits: int) -> _Ranked:
    # One sort of whole numbers (unit, value, place in the unit) is several times faster than a lexsort.
    # Adding 0 makes -0 equal to 0; flipping bits makes unsigned order that of signed floats.
    bits = (values + np.float32(0)).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    counts = np.diff(indptr)
    unit = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    start = np.repeat(indptr[:-1], counts)
    place = (np.arange(len(values)) - start).astype(np.uint64)
    key = unit << np.uint64(32 + row_bits) | ordered << np.uint64(row_bits) | place
    key.sort()
    entry_by_rank = (key & np.uint64((1 << row_bits) - 1)).astype(np.int64) + start
    key >>= np.uint64(row_bits)
    new = np.ones(len(key), bool)
    np.not_equal(key[1:], key[:-1], out=new[1:])
    tie_of_entry = np.empty(len(key), np.int64)
    tie_of_entry[entry_by_rank] = np.cumsum(new) - 1
    first = np.flatnonzero(new)
    bounds = np.append(first, len(key))
    return _Ranked(entry_by_rank, bounds, tie_of_entry, np.diff(np.searchsorted(first, indptr)))


def _sums(values: NDArray, starts: Ints, lengths: Ints | None = None) -> NDArray:
    """Sums of runs of values that begin at `starts`; a run of length 0 sums to 0."""
    if lengths is None:
        return np.add.reduceat(values, starts) if len(starts) else values[:0]
    out, some = np.zeros(len(starts), values.dtype), lengths > 0
    if some.any():
        out[some] = np.add.reduceat(values, starts[some])
    return out


# ------------------------------------------------------------------------------------ the neurons table


def neurons_schema(labels: Sequence[str] = LABELS) -> pa.Schema:
    """The `neurons` and `dimensions` tables: a row is a unit; undefined figures are null.

    Figures are of the test split, `dead_train` of the training split, `valid_…` of the validation split.
    Intervals are 95 %, `density` is a share in [0, 1], `entropy` and `entropy_floor` are in nats.
    """
    head = [
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("n_firing", pa.int64(), nullable=False),
        *(pa.field(name, pa.float64(), nullable=False) for name in ("density", "mean", "max")),
        pa.field("dead", pa.bool_(), nullable=False),
        pa.field("dead_train", pa.bool_()),
        pa.field("entropy", pa.float64()),
        pa.field("n_labels", pa.int64(), nullable=False),
        pa.field("entropy_floor", pa.float64()),
        pa.field("best_label", pa.string()),
        pa.field("best_r", pa.float64()),
    ]
    per_label = [
        pa.field(name.format(label), pa.int64() if name == "n_{}" else pa.float64(), nullable=name != "n_{}")
        for name in (
            "r_{}",
            "n_{}",
            "auroc_{}",
            "auroc_{}_low",
            "auroc_{}_high",
            "valid_r_{}",
            "valid_auroc_{}",
        )
        for label in labels
    ]
    return pa.schema([*head, *per_label, pa.field("valid_best_label", pa.string())])


def neurons_table(test: UnitMeasures, valid: UnitMeasures, dead_train: ArrayLike | None = None) -> pa.Table:
    """The table of `neurons_schema` from two splits' measures; `dead_train` [u] bool, null if not given.

    Raises ValueError where the splits have other units or labels.
    """
    u = len(test.n_firing)
    if len(valid.n_firing) != u or valid.labels != test.labels:
        raise ValueError("test and validation measures must be of the same units and labels")
    best = np.maximum(test.best, 0)
    columns: dict[str, object] = {
        "neuron": np.arange(u, dtype=np.int32),
        "n_firing": test.n_firing,
        "density": test.density,
        "mean": test.mean,
        "max": test.max,
        "dead": test.n_firing == 0,
        "dead_train": pa.nulls(u, pa.bool_()) if dead_train is None else np.asarray(dead_train, bool),
        "entropy": test.entropy,
        "n_labels": test.n_labels,
        "entropy_floor": test.entropy_floor,
        "best_label": _best_label(test),
        "best_r": test.r[np.arange(u), best],
        "valid_best_label": _best_label(valid),
    }
    for i, label in enumerate(test.labels):
        columns |= {
            f"r_{label}": test.r[:, i],
            f"n_{label}": np.full(u, test.n[i]),
            f"auroc_{label}": test.auroc[:, i],
            f"auroc_{label}_low": test.auroc_low[:, i],
            f"auroc_{label}_high": test.auroc_high[:, i],
            f"valid_r_{label}": valid.r[:, i],
            f"valid_auroc_{label}": valid.auroc[:, i],
        }
    schema = neurons_schema(test.labels)
    # from_pandas turns NaN into null.
    arrays = [pa.array(columns[f.name], f.type, from_pandas=True) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _best_label(units: UnitMeasures) -> list[str | None]:
    return [units.labels[i] if i >= 0 else None for i in units.best]


# -------------------------------------------------------------------------------------- reconstruction


@dataclass
class ReconstructionState:
    """Sums behind FVE, L0 and the dead share of one split; merging agrees to rounding in float64."""

    embedding_dim: int
    n_units: int
    n_images: int = 0
    squared_error: float = 0.0
    """Σ‖x − x̂‖² over the images."""
    scatter: float = 0.0
    """Σ‖x − mean‖² about the mean of the images so far."""
    mean: Floats = field(init=False)
    firing: Ints = field(init=False)
    """Images on which each neuron fires [n_units]."""

    def __post_init__(self) -> None:
        self.mean = np.zeros(self.embedding_dim)
        self.firing = np.zeros(self.n_units, np.int64)

    def update(self, x: ArrayLike, reconstruction: ArrayLike, neuron: ArrayLike) -> None:
        """Add a batch: x and x̂ [B, embedding_dim] in one scale, and the neuron of each firing entry.

        Raises ValueError for another shape, InputError for a number that is not finite.
        """
        a, b = np.asarray(x, np.float64), np.asarray(reconstruction, np.float64)
        if a.shape != b.shape or a.shape[1:] != (self.embedding_dim,):
            raise ValueError(
                f"x {a.shape} and reconstruction {b.shape} must be [batch, {self.embedding_dim}]"
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise InputError(
                "An embedding or its reconstruction has a number that is not finite: "
                "check the SAE's weights and the embeddings."
            )
        if len(a) == 0:
            return
        mean = a.mean(axis=0)
        batch = ReconstructionState(
            self.embedding_dim,
            self.n_units,
            len(a),
            float(np.square(a - b).sum()),
            float(np.square(a - mean).sum()),
        )
        batch.mean = mean
        batch.firing = np.bincount(np.asarray(neuron, np.int64), minlength=self.n_units)
        self.merge(batch)

    def merge(self, other: ReconstructionState) -> None:
        """Add another state. Raises ValueError where it is of another SAE's shape."""
        if (other.embedding_dim, other.n_units) != (self.embedding_dim, self.n_units):
            raise ValueError("states of SAEs of different shapes do not merge")
        n = self.n_images + other.n_images
        if other.n_images == 0:
            return
        # Chan, Golub and LeVeque (1983): exact in algebra and free of the cancellation of Σ‖x‖² − n‖mean‖².
        apart = other.mean - self.mean
        self.scatter += other.scatter + float(apart @ apart) * self.n_images * other.n_images / n
        self.mean = self.mean + apart * (other.n_images / n)
        self.squared_error += other.squared_error
        self.firing = self.firing + other.firing
        self.n_images = n

    @property
    def fve(self) -> float:
        """1 − Σ‖x − x̂‖² / Σ‖x − mean‖² over the whole split and its own mean; NaN where all x are equal."""
        return 1 - self.squared_error / self.scatter if self.scatter > 0 else np.nan

    @property
    def l0(self) -> float:
        """Mean number of firing neurons an image; NaN without images."""
        return float(self.firing.sum() / self.n_images) if self.n_images else np.nan

    @property
    def dead(self) -> Bools:
        """Neurons that fire on no image [n_units]; its mean is the dead share."""
        return self.firing == 0


# --------------------------------------------------------------------------------------------- summary


class EntropyMean(NamedTuple):
    """Means over `n_units` units: entropy and its floor in nats, and entropy / ln(n_labels); NaN for none."""

    n_units: int
    entropy: float
    floor: float
    relative: float


class EntropyMeans(NamedTuple):
    """Three means, all reported, for neurons and dimensions alike."""

    living: EntropyMean
    """Units that fire on at least `min_firing` images."""
    selective: EntropyMean
    """Those of them with max |r| above the threshold."""
    best: EntropyMean
    """The one of largest signed r for each label among the selective; one best for two counts twice."""


def entropy_means(
    units: UnitMeasures | pa.Table, *, min_firing: int, selective_threshold: float = 0.2
) -> EntropyMeans:
    """Mean entropies of one split's measures, or of a `neurons` or `dimensions` table (its test split).

    `min_firing` is in images (a unit that fires on none never counts); a unit without a defined entropy is
    left out.
    """
    n_firing: NDArray[Any]
    if isinstance(units, pa.Table):
        names = [name for name in units.column_names if name.startswith("r_")]
        r = np.column_stack([_floats(units, name) for name in names])
        h, floor = _floats(units, "entropy"), _floats(units, "entropy_floor")
        n_firing = _floats(units, "n_firing")
    else:
        r, h, floor, n_firing = units.r, units.entropy, units.entropy_floor, units.n_firing
    living = (n_firing >= max(min_firing, 1)) & ~np.isnan(h)
    selective = living & (np.nan_to_num(np.abs(r)).max(axis=1, initial=0) > selective_threshold)
    chosen = np.where(selective[:, None] & ~np.isnan(r), r, -np.inf)
    best = chosen.argmax(axis=0)[chosen.max(axis=0) > -np.inf] if len(r) else np.empty(0, int)
    n_labels = np.count_nonzero(~np.isnan(r), axis=1)

    def mean_of(rows: Ints) -> EntropyMean:
        many = rows[n_labels[rows] > 1]
        relative = _mean(h[many] / np.log(n_labels[many]))
        return EntropyMean(len(rows), _mean(h[rows]), _mean(floor[rows][~np.isnan(floor[rows])]), relative)

    return EntropyMeans(
        mean_of(np.flatnonzero(living)),
        mean_of(np.flatnonzero(selective)),
        mean_of(best),
    )


def _floats(table: pa.Table, name: str) -> Floats:
    return table[name].to_numpy().astype(np.float64)


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else np.nan


CHOSEN = pa.schema(
    [
        pa.field("label", pa.string(), nullable=False),
        pa.field("neuron", pa.int32()),
        pa.field("valid_r", pa.float64()),
        pa.field("valid_auroc", pa.float64()),
        pa.field("r", pa.float64()),
        pa.field("auroc", pa.float64()),
        pa.field("auroc_low", pa.float64()),
        pa.field("auroc_high", pa.float64()),
        pa.field("n_positive", pa.int64(), nullable=False),
    ]
)
"""A row is a label: the unit chosen for it on validation, null if none qualifies, and its test figures."""


def chosen_neurons(
    test: UnitMeasures, valid: UnitMeasures, *, min_firing: int, signed: bool = False
) -> pa.Table:
    """For each label the unit chosen on the validation split alone, with its figures on test (`CHOSEN`).

    The largest r wins, a unit that fires where the label is present. Of `signed` units, whose direction means
    nothing (raw dimensions, components), the largest |r|: all its figures are then those of the unit in the
    direction of its r on validation. Only units that fire on at least `min_firing` images of the validation
    split qualify: on test, a chosen one may turn out silent, and then its AUROC is 0.5.
    """
    score = np.abs(valid.r) if signed else valid.r
    eligible = (valid.n_firing >= max(min_firing, 1))[:, None] & ~np.isnan(score)
    score = np.where(eligible, score, -np.inf)
    rows: list[dict[str, Any]] = []
    for i, label in enumerate(test.labels):
        row: dict[str, Any] = {"label": label, "n_positive": int(test.n_positive[i])}
        if eligible[:, i].any():
            unit = int(score[:, i].argmax())
            row |= {
                "neuron": unit,
                "valid_r": valid.r[unit, i],
                "valid_auroc": valid.auroc[unit, i],
                "r": test.r[unit, i],
                "auroc": test.auroc[unit, i],
                "auroc_low": test.auroc_low[unit, i],
                "auroc_high": test.auroc_high[unit, i],
            }
            if valid.r[unit, i] < 0 and signed:
                row |= {name: -row[name] for name in ("valid_r", "r")}
                row |= {name: 1 - row[name] for name in ("valid_auroc", "auroc")}
                row |= {"auroc_low": 1 - row["auroc_high"], "auroc_high": 1 - row["auroc_low"]}
        rows.append(row)
    columns = {f.name: pa.array([row.get(f.name) for row in rows], f.type, from_pandas=True) for f in CHOSEN}
    return pa.table(columns, schema=CHOSEN)


CLAIM_AUROC, CLAIM_LOW = 0.8, 0.7
"""A label counts as separated where the unit chosen on validation exceeds these on test."""


def claim(row: dict[str, Any], min_positives: int) -> dict[str, Any]:
    """A row of `chosen_neurons` without NaN, with whether the unit separates its label: `separated` needs an
    AUROC and its lower bound above `CLAIM_AUROC` and `CLAIM_LOW`, and `min_positives` positives (paper.md).
    """
    row = {name: None if isinstance(v, float) and not np.isfinite(v) else v for name, v in row.items()}
    enough = row["n_positive"] >= min_positives
    area, low = row["auroc"], row["auroc_low"]
    separates = area is not None and low is not None and area > CLAIM_AUROC and low > CLAIM_LOW
    return {**row, "enough_positives": enough, "separated": enough and separates}


class Failure(NamedTuple):
    """One of the known failures, with its figures."""

    kind: Literal["dead", "fve", "entropy"]
    finding: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.finding}: {self.remedy}."


def failure_signatures(
    *,
    fve: float,
    dead_share: float,
    entropy: EntropyMean,
    embedding: Mapping[str, float],
    near_floor: float = 0.05,
) -> list[Failure]:
    """The known failures that these figures show (paper.md); a figure that is NaN shows none.

    `dead_share` is in [0, 1]; `entropy` is the mean over living neurons; `embedding` describes the raw
    embeddings: `mean_norm`, `variance_mean`, `variance_min` and `variance_max` a dimension,
    `non_finite_share` in [0, 1], `effective_dimension`. Entropy counts as high from `near_floor` nats below
    its floor under permuted labels.
    """
    found = []
    if dead_share > 0.40:
        found.append(
            Failure(
                "dead",
                f"{dead_share:.0%} of the neurons are dead (above 40 %)",
                "lower the sparsity weight λ or raise the learning rate",
            )
        )
    if fve < 0.90:
        found.append(
            Failure(
                "fve",
                f"FVE is {fve:.3f} (below 0.90)",
                "raise the expansion or lower the sparsity weight λ",
            )
        )
    if entropy.entropy >= entropy.floor - near_floor:
        of = embedding
        found.append(
            Failure(
                "entropy",
                f"The living neurons' mean entropy {entropy.entropy:.2f} is that of permuted labels "
                f"({entropy.floor:.2f})",
                f"check the normalisation (the embeddings' mean norm is {of['mean_norm']:.3g}, their "
                f"variance a dimension {of['variance_mean']:.2g}, from {of['variance_min']:.2g} to "
                f"{of['variance_max']:.2g}, their effective dimension {of['effective_dimension']:.1f}, and "
                f"{of['non_finite_share']:.2%} of their numbers are not finite)",
            )
        )
    return found
