"""Stage `embed`: radiographs to embeddings, by Ray Data with a pool of encoder actors.

read table → download → decode and resize (tasks) → encode (actors) → Parquet, under Ray Data's id checkpoint:
a killed run goes on where it was, and every radiograph ends in `embeddings` or `quarantine/embed` once.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medsae_ray.cluster import require_resources, start_ray
from medsae_ray.config import EmbedSettings, Settings, fingerprinted
from medsae_ray.encoders import load_encoder, preprocessing
from medsae_ray.errors import InputError
from medsae_ray.radiographs.decode import DecodeError, decode
from medsae_ray.run import Plan, Run, Staging, open_filesystem
from medsae_ray.stages.outcome import Outcome
from medsae_ray.stages.radiographs import write_quarantine
from medsae_ray.stages.resumable import write_resumable
from medsae_ray.tables import QUARANTINE, embeddings_schema, positions_schema

if TYPE_CHECKING:
    import ray.data


def embed(run: Run, settings: Settings) -> Outcome:
    """Write `embeddings`, `positions` and `quarantine/embed`.

    Raises InputError for weights that cannot be used, and where more than `embed.max_bad_share` of the
    radiographs had to be quarantined.
    """
    chosen = settings.embed
    source = run.require("radiographs", "radiographs")
    # Loaded once here, on the driver, so that unusable weights are told before any actor starts.
    encoder = load_encoder(chosen.encoder, chosen.weights)
    plan = Plan(
        "embed",
        "embeddings",
        fingerprinted(chosen),
        {"radiographs": source.fingerprint, "weights": encoder.weights_sha256},
    )
    staging = run.begin(plan, settings.overwrite)
    if staging is None:
        return Outcome(run.require("embeddings", "embed"), ran=False)

    start_encoders(settings)
    import ray

    rows = ray.data.read_parquet(
        run.files("radiographs"), filesystem=run.filesystem, columns=["image_id", "uri", "split"]
    )
    write_resumable(through_encoders(rows, EncodeBatch, chosen), staging, id_column="image_id")
    split = _split_rows(staging, encoder.embedding_dim, rows_in=source.rows_out)
    quarantined = split.quarantine.num_rows
    if quarantined > chosen.max_bad_share * source.rows_out:
        raise InputError(
            f"{quarantined} of {source.rows_out} radiographs cannot be used (the first: "
            f"{split.quarantine['reason'][0].as_py()}), more than embed.max_bad_share = "
            f"{chosen.max_bad_share} allows: raise the share, or mend the files, delete _partial/embeddings "
            "in the run folder and start again."
        )
    stand_ins = [f"encoder {encoder.name}"] if encoder.stand_in else []
    if split.position_mean is not None:
        _write_positions(run, plan, split.position_mean, stand_ins)
    else:
        run.delete("positions")
    write_quarantine(run, plan, split.quarantine)
    manifest = staging.commit(
        rows_in=source.rows_out,
        rows_out=split.rows,
        quarantined=quarantined,
        stand_ins=stand_ins,
        notes={
            "encoder": encoder.name,
            "weights_sha256": encoder.weights_sha256,
            "embedding_dim": encoder.embedding_dim,
            "grid": encoder.grid,
            "reasons": _counts(split.quarantine["reason"]),
            **encoder.notes,
        },
    )
    return Outcome(manifest, ran=True)


def start_encoders(settings: Settings) -> None:
    """Start Ray; raises InputError where the pool of encoders has no place in it."""
    start_ray(settings.ray)
    chosen = settings.embed
    # One more for the tasks that read, download and write.
    cpus = chosen.encoders_min * chosen.cpus_per_encoder + 1
    require_resources(
        "embed.encoders_min", {"CPU": cpus, "GPU": chosen.encoders_min * chosen.gpus_per_encoder}
    )


def through_encoders(
    rows: ray.data.Dataset, actor: type, chosen: EmbedSettings, **arguments: Any
) -> ray.data.Dataset:
    """Rows with `image_id` and `uri`, downloaded, decoded and put through a pool of encoder actors.

    `actor` takes the settings and `arguments`, and batches with the columns of `decode_batch`.
    """
    import ray
    from ray.data.expressions import download

    return (
        rows.repartition(target_num_rows_per_block=chosen.block_rows)
        .with_column("bytes", download("uri"))
        .map_batches(
            functools.partial(decode_batch, encoder=chosen.encoder, max_pixels=chosen.max_pixels),
            batch_size=chosen.block_rows,
            batch_format="pyarrow",
        )
        .map_batches(
            actor,
            batch_size=chosen.block_rows,
            batch_format="pyarrow",
            fn_constructor_kwargs={"settings": chosen, **arguments},
            compute=ray.data.ActorPoolStrategy(min_size=chosen.encoders_min, max_size=chosen.encoders_max),
            num_cpus=chosen.cpus_per_encoder,
            num_gpus=chosen.gpus_per_encoder,
        )
    )


def decode_batch(batch: pa.Table, *, encoder: str, max_pixels: int) -> pa.Table:
    """A batch with `bytes` → the same rows with `pixels` (uint8, raw, or null), `reason` (or null), and the
    stored image's `width` and `height`."""
    to_pixels = preprocessing(encoder)
    contents = [
        content.as_py() if content.is_valid else _read_again(image_id.as_py(), uri.as_py())
        for image_id, uri, content in zip(batch["image_id"], batch["uri"], batch["bytes"], strict=True)
    ]
    decoded = [_decode_one(content, to_pixels, max_pixels) for content in contents]
    return (
        batch.drop_columns(["bytes"])
        .append_column("pixels", pa.array([of.pixels for of in decoded], pa.binary()))
        .append_column("reason", pa.array([of.reason for of in decoded], pa.string()))
        .append_column("width", pa.array([of.width for of in decoded], pa.int32()))
        .append_column("height", pa.array([of.height for of in decoded], pa.int32()))
    )


def _read_again(image_id: str, uri: str) -> bytes | None:
    """The bytes of a file that Ray Data's download gave up on, or None where it is not there or not ours.

    The download tells no reason: a service that throttles or times out must not put a radiograph into
    quarantine for good. Raises OSError, without the path, where the file stays out of reach.
    """
    for pause in (0.5, 2.0, 8.0, 0.0):
        try:
            filesystem, path = open_filesystem(uri)
            with filesystem.open_input_stream(path) as stream:
                return stream.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, InputError):
            return None
        except OSError as error:
            kind = type(error).__name__
        time.sleep(pause)
    raise OSError(
        f"Radiograph {image_id} cannot be read ({kind}) and may be there: run the stage again later."
    )


class _Decoded(NamedTuple):
    pixels: bytes | None
    reason: str | None
    width: int | None = None
    height: int | None = None


def _decode_one(content: bytes | None, to_pixels: Callable[[Any], np.ndarray], max_pixels: int) -> _Decoded:
    if content is None:
        return _Decoded(None, "missing or unreadable file")
    try:
        image = decode(content, max_pixels=max_pixels)
    except DecodeError as error:
        return _Decoded(None, str(error))
    return _Decoded(to_pixels(image).tobytes(), None, *image.size)


class EncoderActor:
    """An encoder as a Ray Data actor, on the device and with the threads that the settings give it."""

    def __init__(self, settings: EmbedSettings) -> None:
        import torch

        if settings.gpus_per_encoder:
            device = "cuda"
        else:
            device = "cpu"
            torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 1) // settings.encoders_max))
        self.batch_size = settings.batch_size
        self.encoder = load_encoder(
            settings.encoder, settings.weights, device=device, precision=settings.precision
        )

    def pixels(self, batch: pa.Table, rows: list[int]) -> np.ndarray:
        """Pixels of these rows of a decoded batch, uint8 [B, S, S]."""
        side = self.encoder.image_size
        raw = b"".join(batch["pixels"][i].as_py() for i in rows)
        return np.frombuffer(raw, np.uint8).reshape(len(rows), side, side)


class EncodeBatch(EncoderActor):
    """Batches of pixels to rows of embeddings.

    The first row of each batch carries the batch's summed position shares over the training split
    (`share_sum`, float64 [P, d], raw): they are written, checkpointed and lost together with the rows they
    were summed over, so a resumed run counts no image twice.
    """

    def __call__(self, batch: pa.Table) -> pa.Table:
        reasons: list[str | None] = batch["reason"].to_pylist()
        good = [i for i, reason in enumerate(reasons) if reason is None]
        train = np.array(batch["split"].to_pylist()) == "train"
        embeddings: list[np.ndarray | None] = [None] * len(reasons)
        share_sum, share_count = None, 0
        for start in range(0, len(good), self.batch_size):
            part = good[start : start + self.batch_size]
            embedded = self.encoder.embed(self.pixels(batch, part), train[part])
            for i, vector in zip(part, embedded.embedding, strict=True):
                if np.isfinite(vector).all():
                    embeddings[i] = vector
                else:
                    reasons[i] = "the encoder gave no finite embedding"
            if embedded.share_sum is not None and embedded.share_count:
                share_sum = embedded.share_sum if share_sum is None else share_sum + embedded.share_sum
                share_count += embedded.share_count
        shares: list[bytes | None] = [None] * len(reasons)
        counts = [0] * len(reasons)
        if share_sum is not None:
            shares[0], counts[0] = share_sum.astype(np.float64).tobytes(), share_count
        return pa.table(
            {
                "image_id": batch["image_id"],
                "uri": batch["uri"],
                "embedding": pa.array(embeddings, pa.list_(pa.float32(), self.encoder.embedding_dim)),
                "reason": pa.array(reasons, pa.string()),
                "share_sum": pa.array(shares, pa.binary()),
                "share_count": pa.array(counts, pa.int64()),
            }
        )


class _Split:
    """The written rows, told apart: how many embeddings, which rows are quarantined, the shares' mean."""

    def __init__(self) -> None:
        self.rows = 0
        self.quarantine = QUARANTINE.empty_table()
        self.position_mean: np.ndarray | None = None


def _split_rows(staging: Staging, embedding_dim: int, rows_in: int) -> _Split:
    """Write the embeddings' Parquet file by file, so that memory does not grow with their number."""
    split = _Split()
    quarantined, share_sum, share_count = [], np.zeros(1), 0
    schema = embeddings_schema(embedding_dim)
    ids = np.empty(rows_in + 1, np.uint64)
    seen = 0
    with staging.writer(schema, "part-00000.parquet") as writer:
        for path in staging.data_files("_rows"):
            rows = pq.read_table(path, filesystem=staging.filesystem)
            digests = [int(i.rpartition("-")[2], 16) for i in rows["image_id"].to_pylist()]
            if seen + len(digests) > rows_in:
                raise staging.spoilt(f"more than {rows_in} rows came out for {rows_in} radiographs")
            ids[seen : seen + len(digests)] = digests
            seen += len(digests)
            bad = rows.filter(pa.compute.is_valid(rows["reason"]))
            good = rows.filter(pa.compute.is_null(rows["reason"]))
            writer.write_table(good.select(schema.names).cast(schema))
            split.rows += good.num_rows
            stage = pa.array(["embed"] * bad.num_rows, pa.string())
            quarantined.append(bad.append_column("stage", stage).select(QUARANTINE.names).cast(QUARANTINE))
            for content, count in zip(rows["share_sum"], rows["share_count"], strict=True):
                if content.is_valid:
                    share_sum = share_sum + np.frombuffer(content.as_py(), np.float64)
                    share_count += count.as_py()
    if seen != rows_in or len(np.unique(ids[:seen])) != rows_in:
        raise staging.spoilt(f"{seen} rows came out for {rows_in} radiographs")
    split.quarantine = pa.concat_tables(quarantined).sort_by("image_id")
    if share_count:
        split.position_mean = (share_sum / share_count).reshape(-1, embedding_dim)
    return split


def _write_positions(run: Run, plan: Plan, mean: np.ndarray, stand_ins: list[str]) -> None:
    """Replace the `positions` table by the mean shares [P, d], beside the embeddings that `plan` makes."""
    schema = positions_schema(mean.shape[1])
    shares = pa.FixedSizeListArray.from_arrays(pa.array(mean.ravel()), mean.shape[1])
    staging = run.restage(Plan(plan.stage, "positions", plan.settings, plan.inputs))
    staging.write_table(pa.table([pa.array(np.arange(len(mean), dtype=np.int32)), shares], schema=schema))
    staging.commit(rows_in=len(mean), rows_out=len(mean), stand_ins=stand_ins)


def _counts(reasons: pa.ChunkedArray) -> dict[str, int]:
    return {row["values"].as_py(): row["counts"].as_py() for row in reasons.value_counts()}
