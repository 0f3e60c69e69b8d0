"""Centring and scaling of embeddings before the SAE, fitted once on the training split.

x' = k (x − μ): μ is the training mean, k one scalar for all dimensions. λ means another thing under each
convention, so the convention is stored with k (paper.md, row "normalisation").
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

import numpy as np
import torch

from medsae_ray.errors import InputError

Convention = Literal["unit", "dim"]
"""Mean squared norm after normalisation: "unit" = 1 (the authors' library), "dim" = d (SAELens)."""

Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class Normaliser:
    """x' = `scale` · (x − `mean`)."""

    mean: np.ndarray
    """Training mean μ, float64 [d], in the units of the embedding."""
    scale: float
    """k > 0, in 1 / units of the embedding."""
    convention: Convention
    n: int
    """Number of training embeddings behind μ and k."""

    @property
    def embedding_dim(self) -> int:
        """d."""
        return len(self.mean)

    def apply(self, x: Array) -> Array:
        """Normalise embeddings [..., d]; returns the same kind (array or tensor), dtype and device."""
        return (x - self._mean_like(x)) * self.scale

    def invert(self, x: Array) -> Array:
        """Undo `apply`: x / k + μ, [..., d]."""
        return x / self.scale + self._mean_like(x)

    def to_json(self) -> str:
        """The content of `normaliser.json`: μ, k, convention, n; floats round-trip exactly."""
        values = {"convention": self.convention, "k": self.scale, "n": self.n, "mu": self.mean.tolist()}
        return json.dumps(values, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "normaliser.json") -> Normaliser:
        """Read what `to_json` wrote. InputError naming `source` if it is not that."""
        try:
            values = json.loads(text)
            mean = np.asarray(values["mu"], dtype=np.float64)
            normaliser = Normaliser(mean, float(values["k"]), values["convention"], int(values["n"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{source} is not a normaliser (needs mu, k, convention, n: {type(error).__name__} {error}); "
                "fit again."
            ) from error
        usable = mean.ndim == 1 and mean.size and np.isfinite(mean).all() and 0 < normaliser.scale < np.inf
        if not usable or normaliser.convention not in get_args(Convention):
            raise InputError(f"{source} holds an unusable mean, scale or convention; fit again.")
        return normaliser

    def _mean_like(self, x: Array) -> Array:
        if x.shape[-1] != self.embedding_dim:
            raise InputError(
                f"The embeddings have {x.shape[-1]} dimensions but the normaliser was fitted on "
                f"{self.embedding_dim}; use the encoder it was fitted with."
            )
        if isinstance(x, torch.Tensor):
            return torch.as_tensor(self.mean, dtype=x.dtype, device=x.device)
        return self.mean.astype(x.dtype)


@dataclass
class NormaliserSums:
    """What μ and k need, mergeable in any order and split (Chan, Golub & LeVeque 1983; float64)."""

    n: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: float = 0.0
    """Σ‖x − mean‖² over the rows so far."""
    n_not_finite: int = 0
    """Rows left out of the sums because they hold a NaN or an infinity."""

    def update(self, embeddings: np.ndarray) -> None:
        """Add rows [n, d]."""
        rows = np.asarray(embeddings, dtype=np.float64)
        finite = np.isfinite(rows).all(axis=1)
        self.n_not_finite += int((~finite).sum())
        rows = rows if finite.all() else rows[finite]
        if len(rows):
            mean = rows.mean(axis=0)
            self._add(len(rows), mean, float(np.square(rows - mean).sum()))

    def merge(self, other: NormaliserSums) -> None:
        """Add the rows of another part."""
        self.n_not_finite += other.n_not_finite
        if other.n:
            self._add(other.n, other.mean, other.squares)

    def _add(self, n: int, mean: np.ndarray, squares: float) -> None:
        if not self.n:
            self.n, self.mean, self.squares = n, mean.copy(), squares
            return
        if len(mean) != len(self.mean):
            raise InputError(f"Embeddings of {len(self.mean)} and of {len(mean)} dimensions are mixed.")
        shift, total = mean - self.mean, self.n + n
        self.squares += squares + float(shift @ shift) * self.n * n / total
        self.mean = self.mean + shift * (n / total)
        self.n = total

    def finish(self, convention: Convention) -> Normaliser:
        """μ and k. InputError for non-finite rows, no rows, or rows that are all equal."""
        if self.n_not_finite:
            raise InputError(
                f"{self.n_not_finite} of {self.n + self.n_not_finite} training embeddings are not finite; "
                "embed these images again or leave them out."
            )
        # Equal rows leave rounding of the mean behind: about (1e-16 · |μ|)² a row.
        noise = 1e-28 * self.n * float(self.mean @ self.mean)
        if not self.n or self.squares <= noise:
            raise InputError(
                f"The {self.n} training embeddings have no variance; check that the encoder's weights loaded "
                "and that the images differ."
            )
        target = 1.0 if convention == "unit" else float(len(self.mean))
        return Normaliser(self.mean, float(np.sqrt(target * self.n / self.squares)), convention, self.n)


def fit(embeddings: np.ndarray, convention: Convention = "unit", batch_size: int = 16_384) -> Normaliser:
    """Fit on the training split's embeddings [n, d] (float32 or float64), in float64, a batch at a time."""
    sums = NormaliserSums()
    for start in range(0, len(embeddings), batch_size):
        sums.update(embeddings[start : start + batch_size])
    return sums.finish(convention)
