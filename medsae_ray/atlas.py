"""The neuron atlas: a neuron's radiographs, neighbours, place among the others, and possible shortcuts.

Plain NumPy, SciPy and scikit-learn. Shapes: n images of a split, u neurons, L labels, v variables.
Undefined figures are NaN in arrays and null in tables, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse import csr_array

from medsae_ray.config import AtlasSettings
from medsae_ray.labels import LABELS
from medsae_ray.measure import Activations, Bools, Floats, Ints
from medsae_ray.panels import firing_rows
from medsae_ray.statistics import pearson
from medsae_ray.tables import ACQUISITION, ATLAS, GALLERY

N_BINS = 20
"""Bars of a neuron's activation histogram."""
SHORTCUT_R = 0.2
"""|r| beyond which a neuron counts as following an acquisition variable: the bound of a selective neuron."""
DEVICES = "Support Devices"
"""The label that is a shortcut wherever another is meant: lines and drains follow from the finding."""

_ROLES = {"name": "top", "detect_positive": "range", "detect_negative": "silent"}
"""Roles of `panels` as the gallery calls them, in the order of its table."""
_TSNE_COMPONENTS = 50
"""Principal components before the t-SNE: what is left out of them is mostly the noise of a random start."""
_TSNE_ITERATIONS = 750
_TSNE_ANGLE = 0.8
"""Of Barnes and Hut's approximation: 0.5 takes a third longer and changes the divergence by 1 %."""
_TSNE_FEWEST = 5
_SIMILARITY_ROWS = 1024
_VIEWS_LATERAL = ("LATERAL", "LL", "RL")
_VIEWS_FRONTAL = ("AP", "PA", "FRONTAL")


# --------------------------------------------------------------------------------------------- gallery


def gallery(
    valid: Activations, test: Activations, radiographs: pa.Table, panels: pa.Table, settings: AtlasSettings
) -> pa.Table:
    """The radiographs of every neuron that fires on a validation or test image: the table `gallery`.

    `valid` and `test` are sparse [n, u] as `panels.gather` gives them. A candidate shows its panel.
    """
    fires = np.zeros(valid.values.shape[1], bool)
    for of in (valid, test):
        fires[csr_array(of.values).indices] = True
    fires[panels["neuron"].to_numpy()] = False
    others = firing_rows(
        valid,
        test,
        radiographs,
        np.flatnonzero(fires),
        n_top=settings.top_images,
        n_range=settings.range_images,
        seed=settings.seed,
    )
    rows = pa.concat_tables([panels.filter(pc.is_in(panels["role"], pa.array(list(_ROLES)))), others])
    role = pc.index_in(rows["role"], value_set=pa.array(list(_ROLES)))
    # Stable: within a neuron and role the order of `panels` is that of the gallery.
    rows = rows.take(np.lexsort((role.to_numpy(), rows["neuron"].to_numpy())))
    role = pc.index_in(rows["role"], value_set=pa.array(list(_ROLES)))
    return rows.set_column(2, GALLERY.field("role"), pa.array(list(_ROLES.values())).take(role)).cast(GALLERY)


# --------------------------------------------------------------------------------- places among neurons


class Plane(NamedTuple):
    """Decoder directions laid out on a plane."""

    xy: NDArray[np.float32]
    """[u, 2], NaN for dead neurons."""
    kl_divergence: float | None
    """Of the t-SNE, in nats; None where there are too few living neurons for one."""


def directions(decoder: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of W_dec [u, d] at unit norm; a row of zeros stays."""
    norms = np.linalg.norm(decoder, axis=1, keepdims=True)
    return (decoder / np.where(norms > 0, norms, 1)).astype(np.float32)


def decoder_plane(
    unit: NDArray[np.float32], living: Bools, *, perplexity: float = 30.0, seed: int = 0
) -> Plane:
    """t-SNE of the living neurons' unit decoder rows [u, d] (of unit vectors ‖a − b‖² = 2 − 2 cos).

    It starts from 50 principal components, and its perplexity is at most a third of the other neurons. Fewer
    than 5 distinct directions are placed by two components. Equal input gives equal bits.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    xy = np.full((len(unit), 2), np.nan, np.float32)
    rows = unit[living]
    if len(np.unique(rows, axis=0)) < _TSNE_FEWEST:
        xy[living] = _principal_plane(rows)
        return Plane(xy, None)
    pca = PCA(min(_TSNE_COMPONENTS, *rows.shape), random_state=seed)
    tsne = TSNE(
        perplexity=min(perplexity, (len(rows) - 1) / 3),
        init="pca",
        max_iter=_TSNE_ITERATIONS,
        angle=_TSNE_ANGLE,
        random_state=seed,
    )
    # One thread: the sums of several come in no fixed order, and a t-SNE amplifies the last bit.
    with threadpool_limits(1):
        xy[living] = tsne.fit_transform(pca.fit_transform(rows))
    return Plane(xy, float(tsne.kl_divergence_))


def _principal_plane(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores on the two leading principal components [n, 2]; 0 where there are fewer."""
    out = np.zeros((len(rows), 2), np.float32)
    if len(rows):
        left, scale, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
        scores = (left * scale)[:, :2]
        out[:, : scores.shape[1]] = scores
    return out


class Leaves(NamedTuple):
    """Order of the neurons in a hierarchical clustering by what they correlate with."""

    leaf: Ints
    """Place of each neuron [u], −1 for those not clustered."""
    labels: tuple[str, ...]
    """Whose r it rests on."""


def leaf_order(r: Floats, living: Bools, labels: Sequence[str] = LABELS) -> Leaves:
    """Ward's clustering of the living neurons by their r with the labels [u, L].

    A label counts if at least half of the living neurons have an r with it; a neuron is clustered if it has
    an r with each of those. Ward's, as distances tell strong neurons from weak ones of the same profile.
    """
    defined = ~np.isnan(r)
    counts = defined[living].mean(axis=0) >= 0.5 if living.any() else np.zeros(len(labels), bool)
    leaf = np.full(len(r), -1, np.int64)
    clustered = np.flatnonzero(living & defined[:, counts].all(axis=1)) if counts.any() else leaf[:0]
    order = np.arange(len(clustered))
    if len(clustered) > 1:
        # Ordering the leaves optimally would take minutes from 2,000 neurons on.
        order = leaves_list(linkage(r[np.ix_(clustered, counts)], "ward"))
    leaf[clustered[order]] = np.arange(len(clustered))
    return Leaves(leaf, tuple(label for label, used in zip(labels, counts, strict=True) if used))


def nearest(
    unit: NDArray[np.float32], living: Bools, n: int
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.float32]]]:
    """For each neuron the n living others of highest decoder cosine, falling, and these cosines.

    `unit` [u, d] has unit rows. Fewer where fewer live, none for a dead neuron; ties go to the lower number.
    """
    number = np.flatnonzero(living).astype(np.int32)
    rows = unit[living]
    n = min(n, len(rows) - 1)
    found = [np.empty(0, np.int32)] * len(unit)
    cosines = [np.empty(0, np.float32)] * len(unit)
    if n < 1:
        return found, cosines
    for start in range(0, len(rows), _SIMILARITY_ROWS):
        block = np.clip(rows[start : start + _SIMILARITY_ROWS] @ rows.T, -1, 1)
        own = np.arange(len(block))
        block[own, start + own] = -np.inf
        best = np.sort(np.argpartition(-block, n - 1, axis=1)[:, :n], axis=1)
        cosine = np.take_along_axis(block, best, axis=1)
        order = np.argsort(-cosine, axis=1, kind="stable")
        best, cosine = np.take_along_axis(best, order, axis=1), np.take_along_axis(cosine, order, axis=1)
        for at in own:
            neuron = number[start + at]
            found[neuron], cosines[neuron] = number[best[at]], cosine[at]
    return found, cosines


def histogram(values: csr_array) -> Ints:
    """Firing images of each neuron in `N_BINS` equal parts of (0, its maximum] [u, N_BINS]."""
    n_neurons = values.shape[1]
    neuron, value = values.indices.astype(np.int64), values.data.astype(np.float64)
    largest = np.zeros(n_neurons)
    np.maximum.at(largest, neuron, value)
    part = np.minimum((value / largest[neuron] * N_BINS).astype(np.int64), N_BINS - 1)
    return np.bincount(neuron * N_BINS + part, minlength=n_neurons * N_BINS).reshape(n_neurons, N_BINS)


# ----------------------------------------------------------------------------------------- acquisition


def correlations(values: csr_array, y: Floats, known: Bools) -> Floats:
    """Pearson's r [u, v] of sparse activations [n, u] with any variables y [n, v], over the known images.

    Defined where `statistics.pearson` is: NaN where the neuron or the variable is constant there.
    """
    n = known.sum(axis=0)
    mask = known.astype(np.float64)
    centred = np.zeros(y.shape)
    for column in range(y.shape[1]):
        of = y[known[:, column], column]
        if len(of):
            of = of - of[0]
            centred[known[:, column], column] = of - of.mean()
    x = values.astype(np.float64)
    total, squares = x.T @ mask, (x * x).T @ mask
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = squares - total * total / n
        r = x.T @ centred / np.sqrt(variance * np.square(centred).sum(axis=0))
        left = variance / squares
    # Sums about 0 lose a small variance to rounding: above all that of a constant neuron, which is none.
    columns = x.tocsc()
    for neuron, column in np.argwhere(left < 1e-4):
        rows = known[:, column]
        r[neuron, column] = pearson(columns[:, [neuron]].toarray()[rows, 0], y[rows, column])
    r[:, np.square(centred).sum(axis=0) == 0] = np.nan
    return np.clip(np.where(np.isfinite(r), r, np.nan), -1.0, 1.0)


def acquisition(radiographs: pa.Table, image_ids: pa.Array) -> tuple[Floats, Bools]:
    """The variables of `ACQUISITION` but the site for these images: y [n, 4], and where they are known."""
    found = radiographs.take(pc.index_in(image_ids, value_set=radiographs["image_id"]))
    view, sex = found["view"].to_numpy(), found["sex"].to_numpy()
    age = found["age"].to_numpy().astype(np.float64)
    lateral = np.isin(view, _VIEWS_LATERAL)
    y = np.column_stack([view == "AP", lateral, sex == "M", np.nan_to_num(age)]).astype(np.float64)
    known = [np.isin(view, ("AP", "PA")), lateral | np.isin(view, _VIEWS_FRONTAL), np.isin(sex, ("M", "F"))]
    return y, np.column_stack([*known, np.isfinite(age)])


class Acquired(NamedTuple):
    """Correlation with how radiographs were made, and of whom; columns in the order of `ACQUISITION`."""

    test: Floats
    """r on the test split [u, 5]."""
    valid: Floats
    site: list[str | None]
    """The site behind the last column [u]; None where no r with one is defined on validation."""


def acquired(valid: Activations, test: Activations, radiographs: pa.Table) -> Acquired:
    """r of every neuron with the variables of `ACQUISITION` on both splits.

    Each site stands against all others; the one of largest |r| on validation is the neuron's.
    """
    sites = sorted(site for site in pc.unique(radiographs["site"]).to_pylist() if site is not None)
    r, of_site = {}, {}
    for split, of in (("valid", valid), ("test", test)):
        r[split] = correlations(of.values, *acquisition(radiographs, of.image_ids))
        at = pc.index_in(of.image_ids, value_set=radiographs["image_id"])
        site = radiographs["site"].take(at).to_numpy()
        # A first column that is nowhere known stands for no site.
        is_site = site[:, None] == np.array([None, *sites], object)
        known = np.repeat(np.isin(site, sites)[:, None], is_site.shape[1], axis=1)
        known[:, 0] = False
        of_site[split] = correlations(of.values, is_site.astype(np.float64), known)
    best = np.nan_to_num(np.abs(of_site["valid"]), nan=-1.0).argmax(axis=1)
    for split, figures in of_site.items():
        r[split] = np.column_stack([r[split], figures[np.arange(len(best)), best]])
    return Acquired(r["test"], r["valid"], [[None, *sites][at] for at in best])


def shortcuts(found: Acquired, neurons: pa.Table) -> list[list[str]]:
    """What each neuron follows beyond |r| `SHORTCUT_R`, with one sign, on test and validation alike.

    Of `ACQUISITION`, in its order, and `devices`: `DEVICES` where another label is the neuron's best on both
    splits. `neurons` has a row a neuron, ascending.
    """
    devices = [_floats(neurons, name) for name in (f"r_{DEVICES}", f"valid_r_{DEVICES}")]
    test, valid = np.column_stack([found.test, devices[0]]), np.column_stack([found.valid, devices[1]])
    follows = (np.minimum(np.abs(test), np.abs(valid)) > SHORTCUT_R) & (test * valid > 0)
    for best in ("best_label", "valid_best_label"):
        follows[:, -1] &= neurons[best].to_numpy() != DEVICES
    names = (*ACQUISITION, "devices")
    return [[name for name, does in zip(names, row, strict=True) if does] for row in follows]


# ----------------------------------------------------------------------------------------------- table


def atlas_table(
    neurons: pa.Table,
    plane: Plane,
    leaves: Leaves,
    neighbours: tuple[Sequence[NDArray[np.int32]], Sequence[NDArray[np.float32]]],
    bins: Ints,
    found: Acquired,
) -> pa.Table:
    """The table `atlas` from its parts; `neurons` has a row a neuron, ascending."""
    columns: dict[str, object] = {
        "neuron": neurons["neuron"],
        "x": plane.xy[:, 0],
        "y": plane.xy[:, 1],
        "leaf": np.ma.masked_less(leaves.leaf, 0),
        "nearest": neighbours[0],
        "cosine": neighbours[1],
        "bins": list(bins),
        "site": found.site,
        "shortcuts": shortcuts(found, neurons),
    }
    for i, name in enumerate(ACQUISITION):
        columns |= {f"r_{name}": found.test[:, i], f"valid_r_{name}": found.valid[:, i]}
    return pa.table(
        {f.name: pa.array(columns[f.name], f.type, from_pandas=True) for f in ATLAS}, schema=ATLAS
    )


def label_correlations(neurons: pa.Table) -> Floats:
    """r with the labels on the test split [u, L], of the table `neurons`."""
    return np.column_stack([_floats(neurons, f"r_{label}") for label in LABELS])


def _floats(table: pa.Table, name: str) -> Floats:
    return table[name].cast(pa.float64()).to_numpy()
