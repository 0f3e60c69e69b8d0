"""Stage `encode`: embeddings to the sparse `activations` table, by Ray Data, resumable like `embed`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medsae_ray.cluster import start_ray
from medsae_ray.config import Settings, fingerprinted
from medsae_ray.run import Plan, Run
from medsae_ray.stages.outcome import Outcome
from medsae_ray.stages.resumable import write_resumable
from medsae_ray.stages.rows import vectors
from medsae_ray.tables import ACTIVATIONS, embeddings_schema

if TYPE_CHECKING:
    import ray

    from medsae_ray.sae.base import SparseAutoencoder


def load_sae(run: Run) -> SparseAutoencoder:
    """The run's exported SAE, which takes raw embeddings."""
    from medsae_ray.sae.saelens import load_files

    return load_files(
        run.read_bytes("sae", "cfg.json"),
        run.read_bytes("sae", "sae_weights.safetensors"),
        source=f"{run.uri}/sae",
    )


def encode(run: Run, settings: Settings) -> Outcome:
    """Write `activations`: the firing neurons of every embedded radiograph.

    Raises InputError where the SAE is of another width than the embeddings.
    """
    chosen = settings.encode
    embeddings, fitted = run.require("embeddings", "embed"), run.require("sae", "fit")
    plan = Plan(
        "encode",
        "activations",
        fingerprinted(chosen),
        {"embeddings": embeddings.fingerprint, "sae": fitted.fingerprint},
    )
    staging = run.begin(plan, settings.overwrite)
    if staging is None:
        return Outcome(run.require("activations", "encode"), ran=False)

    start_ray(settings.ray)
    import ray

    from medsae_ray.sae.base import check_width

    sae = load_sae(run)
    check_width(sae, embeddings.notes["embedding_dim"])
    run.dataset("embeddings", embeddings_schema(sae.config.embedding_dim))
    encoded = (
        ray.data.read_parquet(run.files("embeddings"), filesystem=run.filesystem)
        .repartition(target_num_rows_per_block=chosen.batch_size)
        .map_batches(
            functools.partial(encode_batch, sae=ray.put(sae)),
            batch_size=chosen.batch_size,
            batch_format="pyarrow",
            num_cpus=chosen.cpus_per_task,
        )
    )
    write_resumable(encoded, staging, id_column="image_id")
    rows = 0
    ids: set[int] = set()
    with staging.writer(ACTIVATIONS, "part-00000.parquet") as writer:
        for path in staging.data_files("_rows"):
            part = pq.read_table(path, filesystem=staging.filesystem).cast(ACTIVATIONS)
            writer.write_table(part)
            rows += part.num_rows
            ids.update(int(i[-16:], 16) for i in part["image_id"].to_pylist())
    if not rows == len(ids) == embeddings.rows_out:
        raise staging.spoilt(
            f"{rows} rows of {len(ids)} images came out for {embeddings.rows_out} embeddings"
        )
    manifest = staging.commit(
        rows_in=embeddings.rows_out, rows_out=rows, notes={"n_neurons": sae.config.n_neurons}
    )
    return Outcome(manifest, ran=True)


def encode_batch(batch: pa.Table, sae: SparseAutoencoder | ray.ObjectRef[SparseAutoencoder]) -> pa.Table:
    """Rows with `embedding` → rows of the `activations` table."""
    import ray
    import torch

    from medsae_ray.sae.sparse import sparse_activations

    if isinstance(sae, ray.ObjectRef):
        sae = ray.get(sae)
    firing = sparse_activations(sae, torch.from_numpy(vectors(batch["embedding"]).copy()))
    offsets = pa.array(firing.indptr.astype(np.int32))
    return pa.table(
        [
            batch["image_id"],
            pa.ListArray.from_arrays(offsets, pa.array(firing.neuron)),
            pa.ListArray.from_arrays(offsets, pa.array(firing.value)),
        ],
        names=ACTIVATIONS.names,
    )
