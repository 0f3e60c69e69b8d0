"""Rows of the run's tables as Ray Data datasets and as matrices, by split and in `image_id` order."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.labels import LABELS
from medsae_ray.run import Run
from medsae_ray.tables import RADIOGRAPHS

if TYPE_CHECKING:
    import ray.data


class SplitRows(NamedTuple):
    """The embedded radiographs of one split, in `image_id` order."""

    image_ids: pa.Array
    patient_ids: np.ndarray
    """object [n]"""
    labels: np.ndarray
    """float32 [n, 14] in the order of LABELS: 1, 0, -1, NaN = not mentioned."""


def split_rows(run: Run, split: str) -> SplitRows:
    """Ids, patients and labels of the radiographs of one split that have an embedding."""
    embedded = run.read("embeddings", columns=["image_id"])["image_id"]
    table = run.read("radiographs", RADIOGRAPHS, columns=["image_id", "patient_id", "split", *LABELS])
    table = table.filter(pc.and_(pc.equal(table["split"], split), pc.is_in(table["image_id"], embedded)))
    table = table.sort_by("image_id").combine_chunks()
    labels = [pc.fill_null(table[label], float("nan")).to_numpy() for label in LABELS]
    return SplitRows(
        table["image_id"].combine_chunks(),
        table["patient_id"].to_numpy(),
        np.stack(labels, axis=1).astype(np.float32),
    )


def embeddings_of(run: Run, image_ids: pa.Array) -> ray.data.Dataset:
    """The embeddings of some radiographs as a materialised object-store dataset."""
    import ray

    rows = ray.data.read_parquet(run.files("embeddings"), filesystem=run.filesystem)
    wanted = ray.put(image_ids)
    keep = functools.partial(_keep, wanted=wanted)
    # Read in an instant, and again by every worker: a bar for each would drown the training's own lines.
    rows.context.enable_progress_bars = False
    return rows.map_batches(keep, batch_size=8192, batch_format="pyarrow").materialize()


def _keep(batch: pa.Table, wanted: pa.Array) -> pa.Table:
    import ray

    ids = ray.get(wanted) if isinstance(wanted, ray.ObjectRef) else wanted
    return batch.filter(pc.is_in(batch["image_id"], ids))


def matrix(batches: Iterable[pa.Table]) -> np.ndarray:
    """Embeddings [n, d] float32, contiguous, in `image_id` order whatever the order of the batches."""
    table = pa.concat_tables(batches).sort_by("image_id")
    return vectors(table["embedding"])


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size lists as an array [n, d] float32."""
    values = column.combine_chunks()
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)


def batches_of(run: Run, image_ids: pa.Array, rows: int = 8192) -> Iterator[pa.Table]:
    """Embeddings of some radiographs, streamed from the run's Parquet files, a batch at a time."""
    for batch in run.dataset("embeddings").to_batches(batch_size=rows):
        table = pa.Table.from_batches([batch])
        yield table.filter(pc.is_in(table["image_id"], image_ids))
