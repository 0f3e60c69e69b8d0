"""The splits with embeddings and labels, and one way to measure any units on the two that are reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medsae_ray.measure import Activations, Bools, Floats, LabelPolicy, UnitMeasures, measure_units
from medsae_ray.run import Run
from medsae_ray.stages.rows import batches_of, matrix, split_rows

MEASURED = ("test", "valid")


class Split(NamedTuple):
    """Embeddings of one split, in `image_id` order, with labels under the policy."""

    image_ids: Any
    """pyarrow string array [n]."""
    x: NDArray[np.float32]
    """Raw embeddings [n, d]."""
    y: Floats
    """[n, L], 0 or 1."""
    known: Bools
    patients: NDArray[np.int64]


def read_splits(run: Run, policy: LabelPolicy) -> dict[str, Split]:
    """train, valid and test of a run's embeddings."""
    splits = {}
    for name in ("train", "valid", "test"):
        rows = split_rows(run, name)
        patients = pa.array(rows.patient_ids).dictionary_encode().indices.to_numpy().astype(np.int64)
        x = matrix(batches_of(run, rows.image_ids))
        splits[name] = Split(rows.image_ids, x, *policy.apply(rows.labels), patients)
    return splits


def measure_splits(
    values: Mapping[str, Any], splits: Mapping[str, Split], *, permutations: int, seed: int
) -> dict[str, UnitMeasures]:
    """Units measured on test and valid, from their values [n, m] by split, dense or sparse.

    The noise floor is a figure of the test split alone.
    """
    return {
        name: measure_units(
            Activations(splits[name].image_ids, values[name]),
            splits[name].y,
            splits[name].known,
            splits[name].patients,
            permutations=permutations if name == "test" else 0,
            seed=seed,
        )
        for name in MEASURED
    }
