"""Controls: units that no SAE has learned, to be measured as the neurons are (NumPy and scikit-learn).

Sparsity alone can lower the entropy of |r|, and among thousands of units some one separates a label; what an
SAE has learned is what it has beyond these. `untrained` and `shuffled` have the SAE's own sparsity, neuron by
neuron; `rotation`, `pca`, `ica` and `ica_leading` are linear maps of the same embedding, their units signed.

Shapes: n images, d dimensions of the embedding, m neurons, u units.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, vstack

from medsae_ray.measure import Activations, neurons_schema

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

OF_EMBEDDING = ("rotation", "pca", "ica", "ica_leading")
"""Controls that rest on the embeddings alone; their units are signed."""
CONTROLS = ("untrained", *OF_EMBEDDING, "shuffled")
"""In the order of the table."""

ICA_TOLERANCE, ICA_ITERATIONS = 1e-3, 100
"""FastICA ends where no component turned by more than |cos| = 1 − tolerance, or after so many iterations: at
512 components and 20,000 rows one costs about half a second on two cores."""
ICA_ROWS = 5
"""Embeddings for each of the k² weights of `ica_leading`. With fewer, components are found that are extreme
on a few of the embeddings and nothing else ("overlearning": Särelä and Vigário, JMLR 4:1447, 2003), as `ica`
of all dimensions does on a few thousand."""

_BLOCK_NUMBERS = 1 << 24
"""Numbers in a dense block of pre-activations (64 MiB)."""


def controls_schema() -> pa.Schema:
    """The `controls` table: `control` (one of `CONTROLS`), `unit`, then as `neurons_schema`.

    `dead_train` is null for signed units.
    """
    head = [pa.field("control", pa.string(), nullable=False), pa.field("unit", pa.int32(), nullable=False)]
    return pa.schema([*head, *list(neurons_schema())[1:]])


def controls_table(control: str, units: pa.Table) -> pa.Table:
    """A `neurons` table as rows of the `controls` table."""
    columns = [pa.array([control] * units.num_rows, pa.string()), *units.columns]
    return pa.Table.from_arrays(columns, schema=controls_schema())


# ---------------------------------------------------------------------------------------------- untrained


@dataclass(frozen=True)
class Untrained:
    """An SAE's encoder that learned nothing: ReLU(W x − threshold)."""

    encoder: Singles
    """W [m, d], rows of unit norm."""
    threshold: Singles
    """[m]; infinite for a neuron that never fires."""

    def encode(self, x: Singles) -> csr_array:
        """Activations [n, m] of normalised embeddings [n, d]."""
        blocks = []
        for rows in _slices(len(x), _BLOCK_NUMBERS // len(self.encoder)):
            z = x[rows] @ self.encoder.T
            z -= self.threshold
            blocks.append(csr_array(np.maximum(z, 0, out=z)))
        return csr_array(vstack(blocks, format="csr")) if blocks else csr_array((0, len(self.encoder)))


def untrained(train: Singles, n_firing: ArrayLike, *, seed: int) -> Untrained:
    """Random directions with thresholds so that neuron j fires on `n_firing[j]` of the embeddings `train`.

    `train` [n, d] is normalised, `n_firing` [m] counts the training images on which each fitted neuron fires:
    the shape is the SAE's, and so is each density (but where embeddings tie at the threshold). A neuron that
    is dead there never fires.
    """
    counts = np.asarray(n_firing, np.int64)
    n, d = train.shape
    rows = np.random.default_rng(seed).standard_normal((len(counts), d))
    encoder = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    threshold = np.full(len(counts), np.inf, np.float32)
    living = np.flatnonzero(counts)
    for some in _slices(len(living), _BLOCK_NUMBERS // n):
        units = living[some]
        for unit, values in zip(units, encoder[units] @ train.T, strict=True):
            silent = n - counts[unit]
            if silent == 0:
                threshold[unit] = np.nextafter(values.min(), np.float32(-np.inf))
            else:
                ordered = np.partition(values, (silent - 1, silent))
                # Halfway, so that another rounding of a product does not fire it once more or less.
                threshold[unit] = (ordered[silent - 1] + ordered[silent]) / 2
    return Untrained(encoder, threshold)


def shuffled(activations: Activations, *, seed: int) -> Activations:
    """Each image with the activations [n, m] of another: the neurons' sparsity and distributions stay, and
    which fire together, but not the link with labels."""
    # Not the stream of the entropy floor's permutations: under an equal seed one of them would undo this.
    order = np.random.default_rng([seed, 1]).permutation(len(activations.image_ids))
    return Activations(activations.image_ids, activations.values[order])


# ---------------------------------------------------------------------------- other bases of the embedding


@dataclass(frozen=True)
class Basis:
    """Signed units (x − mean) · directionsᵀ."""

    directions: Floats
    """[u, d]"""
    mean: Floats
    """Of the training embeddings [d]."""

    def project(self, x: Singles) -> Singles:
        """Values [n, u] of embeddings [n, d]."""
        return ((x - self.mean) @ self.directions.T).astype(np.float32)


def rotation(train: Singles, *, seed: int) -> Basis:
    """A random orthogonal basis of the embeddings `train` [n, d]: as many units as dimensions (Haar)."""
    from scipy.stats import ortho_group

    return Basis(ortho_group.rvs(train.shape[1], random_state=seed), train.mean(axis=0, dtype=np.float64))


def principal_components(train: Singles) -> Basis:
    """Principal components of the embeddings `train` [n, d] by falling variance, to their numerical rank.

    Beyond it lies rounding: a variance below ε² · E‖x‖², ε of float32, is that of the last digit kept.
    """
    from sklearn.decomposition import PCA

    x = train.astype(np.float64)
    mean = x.mean(axis=0)
    rounding = np.finfo(np.float32).eps ** 2 * float(np.square(x).sum() / len(x))
    pca = PCA(svd_solver="covariance_eigh").fit(x - mean)
    return Basis(pca.components_[pca.explained_variance_ > rounding], mean)


class Independent(NamedTuple):
    """Independent components and how they were found."""

    basis: Basis
    n_rows: int
    """Embeddings from which they were fitted."""
    iterations: int
    converged: bool


def independent_components(train: Singles, n_components: int, *, seed: int) -> Independent:
    """Independent components of the embeddings `train` [n, d], by FastICA (log cosh) within as many leading
    principal components, or within all where these have no more.
    """
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    pca = principal_components(train)
    principal = pca.directions[:n_components]
    scores = (train - pca.mean) @ principal.T
    scale = scores.std(axis=0)
    ica = FastICA(whiten=False, tol=ICA_TOLERANCE, max_iter=ICA_ITERATIONS, random_state=seed)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ica.fit(scores / scale)
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in told)
    basis = Basis(ica.components_ @ (principal / scale[:, None]), pca.mean)
    return Independent(basis, len(train), int(ica.n_iter_), converged)


def leading(rank: int, n: int) -> int:
    """Components of `ica_leading` that n embeddings of this rank can carry."""
    return min(rank, max(1, math.isqrt(n // ICA_ROWS)))


def drawn(image_ids: pa.Array, n: int, *, seed: int) -> NDArray[np.int64]:
    """Rows of at most `n` images, ascending, drawn by the hash of image_id and seed: whatever else is there,
    an image is drawn before another or after it."""
    order = sorted(
        range(len(image_ids)),
        key=lambda row: hashlib.sha256(f"{seed}:{image_ids[row]}".encode()).digest(),
    )
    return np.sort(np.array(order[:n], np.int64))


def _slices(length: int, step: int) -> Iterator[slice]:
    step = max(step, 1)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
