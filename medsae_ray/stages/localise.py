"""Stage `localise`: maps of where neurons fire, by Ray Data with a pool of encoder actors, and what they hit.

read images and their neurons → download → decode and resize (tasks) → encode and read out (actors) → Parquet,
resumable like `embed`; then the maps are held against the boxes of `truth`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medsae_ray.config import EmbedSettings, Settings, fingerprinted
from medsae_ray.encoders import load_encoder
from medsae_ray.encoders.base import PooledEncoder
from medsae_ray.errors import InputError
from medsae_ray.localise import (
    Pairing,
    Readout,
    localisation_table,
    neuron_maps,
    pairings,
    pointing_table,
    readout,
    square_boxes,
)
from medsae_ray.run import Manifest, Plan, Run, Staging
from medsae_ray.stages.embed import EncoderActor, start_encoders, through_encoders
from medsae_ray.stages.encode import load_sae
from medsae_ray.stages.outcome import Outcome
from medsae_ray.stages.radiographs import write_quarantine
from medsae_ray.stages.resumable import write_resumable
from medsae_ray.stages.rows import batches_of, vectors
from medsae_ray.tables import (
    ACTIVATIONS,
    BOXES,
    GALLERY,
    QUARANTINE,
    RADIOGRAPHS,
    TRUTH,
    maps_schema,
    positions_schema,
)

if TYPE_CHECKING:
    import ray

IMAGES = "_images/part-00000.parquet"
LARGEST_ERROR = 1e-3
"""Between a pre-activation summed from its map and that of the stored embedding, both float32."""


class Wanted(NamedTuple):
    """What is to be mapped, and why."""

    neurons: dict[str, np.ndarray]
    """Neurons (int32, ascending) of each image."""
    pairings: list[Pairing]
    chosen: dict[str, int]
    """The neuron of each label, chosen on validation."""
    truth: pa.Table
    """Boxes on embedded test images, as `truth` tells them."""
    frame: list[int] | None
    patient_of: dict[str, str]
    """Of the images in `truth`."""


def localise(run: Run, settings: Settings) -> Outcome:
    """Write `maps`, `boxes`, `pointing`, `localisation` and `quarantine/localise`.

    Raises InputError for an encoder that has no feature map, or that did not make the embeddings.
    """
    inputs = {
        table: run.require(table, stage)
        for table, stage in (
            ("radiographs", "radiographs"),
            ("embeddings", "embed"),
            ("sae", "fit"),
            ("activations", "encode"),
            ("neurons", "measure"),
            ("gallery", "atlas"),
        )
    }
    truth = run.manifest("truth")
    encoder = _encoder_of(run, inputs["embeddings"], settings.embed)
    fingerprints = {table: manifest.fingerprint for table, manifest in inputs.items()}
    if truth is not None:
        fingerprints["truth"] = truth.fingerprint
    plan = Plan("localise", "maps", fingerprinted(settings.localise), fingerprints)
    staging = run.begin(plan, settings.overwrite, beside="localisation")
    if staging is None:
        return Outcome(run.require("maps", "localise"), ran=False)

    wanted = _wanted(run, inputs["neurons"], truth, settings)
    d = inputs["embeddings"].notes["embedding_dim"]
    mean_shares = vectors(run.read("positions", positions_schema(d))["share"])
    _stage_images(run, staging, wanted.neurons)

    start_encoders(settings)
    import ray

    rows = ray.data.read_parquet(staging.path(IMAGES), filesystem=staging.filesystem)
    reads = readout(load_sae(run), mean_shares.sum(axis=0))
    mapped = through_encoders(
        rows, MapBatch, settings.embed, reads=ray.put(reads), mean_shares=ray.put(mean_shares)
    )
    write_resumable(mapped, staging, id_column="image_id")
    return Outcome(_commit(run, staging, wanted, reads, mean_shares, encoder), ran=True)


class MapBatch(EncoderActor):
    """Batches of pixels to rows of lists: the maps of an image's `neurons`."""

    def __init__(
        self,
        settings: EmbedSettings,
        reads: ray.ObjectRef[Readout],
        mean_shares: ray.ObjectRef[np.ndarray],
    ) -> None:
        import ray

        super().__init__(settings)
        self.reads: Readout = ray.get(reads)
        self.mean_shares: np.ndarray = ray.get(mean_shares)

    def __call__(self, batch: pa.Table) -> pa.Table:
        reasons: list[str | None] = batch["reason"].to_pylist()
        neurons = batch["neurons"].to_pylist()
        maps: list[bytes | None] = [None] * len(reasons)
        good = [i for i, reason in enumerate(reasons) if reason is None]
        for start in range(0, len(good), self.batch_size):
            part = good[start : start + self.batch_size]
            assert isinstance(self.encoder, PooledEncoder)
            for i, shares in zip(part, self.encoder.shares(self.pixels(batch, part)), strict=True):
                if np.isfinite(shares).all():
                    weight = self.reads.weight[:, neurons[i]]
                    maps[i] = neuron_maps(shares, self.mean_shares, weight).tobytes()
                else:
                    reasons[i] = "the encoder gave no finite embedding"
        return pa.table(
            {
                "image_id": batch["image_id"],
                "uri": batch["uri"],
                "width": batch["width"],
                "height": batch["height"],
                "neurons": batch["neurons"],
                "maps": pa.array(maps, pa.binary()),
                "reason": pa.array(reasons, pa.string()),
            }
        )


def _encoder_of(run: Run, embedded: Manifest, chosen: EmbedSettings) -> PooledEncoder:
    """The encoder that made the embeddings; raises InputError where the settings name another."""
    if run.manifest("positions") is None:
        raise InputError(
            f"The encoder {embedded.notes['encoder']} has no feature map whose average it projects, so its "
            "neurons cannot be localised: leave the stage out."
        )
    encoder = load_encoder(chosen.encoder, chosen.weights)
    assert isinstance(encoder, PooledEncoder)
    if encoder.weights_sha256 != embedded.notes["weights_sha256"]:
        raise InputError(
            f"Setting embed.weights names weights of SHA-256 {encoder.weights_sha256[:12]}…, but the "
            f"embeddings were made with {embedded.notes['weights_sha256'][:12]}…: name those."
        )
    return encoder


def _wanted(run: Run, measured: Manifest, truth: Manifest | None, settings: Settings) -> Wanted:
    radiographs = run.read("radiographs", RADIOGRAPHS, ["image_id", "patient_id", "split"])
    test = radiographs.filter(pc.equal(radiographs["split"], "test"))
    boxed = run.read("truth", TRUTH) if truth else TRUTH.empty_table()
    boxed = boxed.filter(pc.is_in(boxed["image_id"], test["image_id"].combine_chunks()))
    firing: dict[str, np.ndarray] = {}
    for batch in run.dataset("activations", ACTIVATIONS).to_batches():
        of_boxed = batch.filter(pc.is_in(batch["image_id"], boxed["image_id"].combine_chunks()))
        for image_id, neurons in zip(of_boxed["image_id"].to_pylist(), of_boxed["neuron"], strict=True):
            firing[image_id] = neurons.values.to_numpy()
    boxed = boxed.filter(pc.is_in(boxed["image_id"], pa.array(list(firing), pa.string())))
    chosen = {
        row["label"]: row["neuron"]
        for row in measured.notes["chosen"]["neurons"]
        if row["neuron"] is not None
    }
    best = run.read("neurons", columns=["neuron", "valid_best_label"]).sort_by("neuron")
    pairs = pairings(
        boxed,
        chosen,
        firing,
        best["valid_best_label"].to_pylist(),
        others=settings.localise.others,
        seed=settings.localise.seed,
    )
    gallery = run.read("gallery", GALLERY, ["neuron", "image_id"])
    neuron = [gallery["neuron"].to_numpy()]
    image = gallery["image_id"].to_pylist()
    for pair in pairs:
        neuron.append(np.array([pair.neuron, *pair.others], np.int32))
        image += [pair.image_id] * (1 + len(pair.others))
    # Images with a box are opened even where no neuron of theirs fires: `boxes` needs their size.
    image_ids = pa.array([*image, *firing], pa.string()).dictionary_encode()
    codes, numbers = image_ids.indices.to_numpy()[: len(image)], np.concatenate(neuron)
    unique = np.unique(codes.astype(np.int64) << 32 | numbers)
    starts = np.searchsorted(unique >> 32, np.arange(len(image_ids.dictionary) + 1))
    numbers = (unique & 0xFFFFFFFF).astype(np.int32)
    neurons = {
        image_id: numbers[starts[i] : starts[i + 1]]
        for i, image_id in enumerate(image_ids.dictionary.to_pylist())
    }
    patient_of = dict(zip(test["image_id"].to_pylist(), test["patient_id"].to_pylist(), strict=True))
    frame = truth.notes.get("frame") if truth else None
    return Wanted(neurons, pairs, chosen, boxed, frame, patient_of)


def _stage_images(run: Run, staging: Staging, neurons: dict[str, np.ndarray]) -> None:
    """Write what is to be mapped, as the rows that Ray Data reads."""
    radiographs = run.read("radiographs", RADIOGRAPHS, ["image_id", "uri"])
    rows = radiographs.filter(pc.is_in(radiographs["image_id"], pa.array(list(neurons), pa.string())))
    lists = pa.array([neurons[i] for i in rows["image_id"].to_pylist()], pa.list_(pa.int32()))
    staging.write_table(rows.append_column("neurons", lists), IMAGES)


def _commit(
    run: Run,
    staging: Staging,
    wanted: Wanted,
    reads: Readout,
    mean_shares: np.ndarray,
    encoder: PooledEncoder,
) -> Manifest:
    """All tables from the written rows, `maps` last; the maps (200 bytes a pair) are held in memory."""
    plan, n_positions = staging.plan, len(mean_shares)
    sizes: dict[str, tuple[int, int]] = {}
    neuron, image, maps, refused = [], [], [], []
    for path in staging.data_files("_rows"):
        rows = pq.read_table(path, filesystem=staging.filesystem)
        bad = rows.filter(pc.is_valid(rows["reason"]))
        stage = pa.array(["localise"] * bad.num_rows, pa.string())
        refused.append(bad.append_column("stage", stage).select(QUARANTINE.names).cast(QUARANTINE))
        for row in rows.filter(pc.is_null(rows["reason"])).to_pylist():
            sizes[row["image_id"]] = row["width"], row["height"]
            neuron.append(np.array(row["neurons"], np.int32))
            image += [row["image_id"]] * len(row["neurons"])
            maps.append(np.frombuffer(row["maps"], np.float32).reshape(-1, n_positions))
    quarantine = pa.concat_tables(refused).sort_by("image_id")
    if len(sizes) + quarantine.num_rows != len(wanted.neurons):
        raise staging.spoilt(f"{len(sizes)} images came out for {len(wanted.neurons)}")
    numbers, values = np.concatenate(neuron), np.concatenate(maps)
    pre = _pre_activations(run, numbers, image, reads, mean_shares)
    constant = reads.constant[numbers]
    error = float(np.abs(values.sum(axis=1, dtype=np.float64) + constant - pre).max(initial=0.0))
    if error > LARGEST_ERROR and encoder_is_exact(run):
        raise staging.spoilt(f"maps and embeddings disagree by {error:.1e}: are the image files the same?")

    schema = maps_schema(n_positions)
    table = pa.table(
        {
            "neuron": numbers,
            "image_id": pa.array(image, pa.string()),
            "map": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), n_positions),
            "constant": constant.astype(np.float32),
            "pre_activation": pre.astype(np.float32),
        }
    ).cast(schema)
    boxes = BOXES.empty_table()
    if wanted.truth.num_rows:
        boxes = square_boxes(wanted.truth, sizes, frame=wanted.frame, smallest=encoder.image_size)
    place = {(int(n), i): row for row, (n, i) in enumerate(zip(numbers, image, strict=True))}
    paired = {
        (n, pair.image_id): values[place[n, pair.image_id]]
        for pair in wanted.pairings
        for n in (pair.neuron, *pair.others.tolist())
        if (n, pair.image_id) in place
    }
    assert encoder.grid is not None
    pointing = pointing_table(wanted.pairings, paired, boxes, encoder.grid)
    told = localisation_table(pointing, boxes, wanted.chosen, wanted.patient_of)
    write_quarantine(run, plan, quarantine)
    for name, rows in (("boxes", boxes), ("pointing", pointing), ("localisation", told)):
        beside = run.restage(Plan(plan.stage, name, plan.settings, plan.inputs))
        beside.write_table(rows)
        beside.commit(rows_in=len(wanted.pairings), rows_out=rows.num_rows)
    staging.write_table(table.sort_by([("neuron", "ascending"), ("image_id", "ascending")]))
    return staging.commit(
        rows_in=len(wanted.neurons),
        rows_out=table.num_rows,
        quarantined=quarantine.num_rows,
        notes={"grid": encoder.grid, "n_images": len(sizes), "largest_error": error},
    )


def encoder_is_exact(run: Run) -> bool:
    """Whether an image embedded twice gives the same to float32's rounding (bfloat16 does not)."""
    embedded = run.manifest("embeddings")
    return embedded is not None and embedded.settings["precision"] == "float32"


def _pre_activations(
    run: Run, neuron: np.ndarray, image: list[str], reads: Readout, mean_shares: np.ndarray
) -> np.ndarray:
    """Pre-activation of each pair from the stored embedding, float64 [n]."""
    codes = pa.array(image, pa.string()).dictionary_encode()
    order = np.argsort(codes.indices.to_numpy(), kind="stable")
    starts = np.searchsorted(codes.indices.to_numpy()[order], np.arange(len(codes.dictionary) + 1))
    mean = mean_shares.sum(axis=0, dtype=np.float64)
    found = np.full(len(neuron), np.nan)
    for batch in batches_of(run, codes.dictionary):
        places = pc.index_in(batch["image_id"], value_set=codes.dictionary).to_numpy()
        for place, embedding in zip(places, vectors(batch["embedding"]).astype(np.float64), strict=True):
            rows = order[starts[place] : starts[place + 1]]
            found[rows] = (embedding - mean) @ reads.weight[:, neuron[rows]]
    return found + reads.constant[neuron]
