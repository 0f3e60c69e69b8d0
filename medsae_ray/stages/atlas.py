"""Stage `atlas`: the radiographs on every neuron's card, and its place among the other neurons."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.atlas import (
    acquired,
    atlas_table,
    decoder_plane,
    directions,
    gallery,
    histogram,
    label_correlations,
    leaf_order,
    nearest,
)
from medsae_ray.config import Settings, fingerprinted
from medsae_ray.measure import neurons_schema
from medsae_ray.panels import gather
from medsae_ray.run import Plan, Run
from medsae_ray.stages.encode import load_sae
from medsae_ray.stages.outcome import Outcome
from medsae_ray.tables import ACTIVATIONS, PANELS, RADIOGRAPHS

COLUMNS = ("image_id", "patient_id", "split", "view", "sex", "age", "site")


def atlas(run: Run, settings: Settings) -> Outcome:
    """Write `atlas` and, beside it, `gallery`."""
    chosen = settings.atlas
    inputs = [
        run.require(table, stage)
        for table, stage in (
            ("radiographs", "radiographs"),
            ("sae", "fit"),
            ("activations", "encode"),
            ("neurons", "measure"),
            ("panels", "panels"),
        )
    ]
    plan = Plan("atlas", "atlas", fingerprinted(chosen), {m.table: m.fingerprint for m in inputs})
    staging = run.begin(plan, settings.overwrite, beside="gallery")
    if staging is None:
        return Outcome(run.require("atlas", "atlas"), ran=False)

    radiographs = run.read("radiographs", RADIOGRAPHS, COLUMNS)
    neurons = run.read("neurons", neurons_schema()).sort_by("neuron")
    panels = run.read("panels", PANELS)
    batches = run.dataset("activations", ACTIVATIONS).to_batches()
    valid, test = gather(batches, radiographs, neurons.num_rows)
    living = ~neurons["dead"].to_numpy()
    unit = directions(load_sae(run).W_dec.numpy())

    seconds: dict[str, float] = {}
    with _timed(seconds, "gallery"):
        images = gallery(valid, test, radiographs, panels, chosen)
    with _timed(seconds, "t_sne"):
        plane = decoder_plane(unit, living, perplexity=chosen.perplexity, seed=chosen.seed)
    with _timed(seconds, "clustering"):
        leaves = leaf_order(label_correlations(neurons), living)
    with _timed(seconds, "nearest"):
        neighbours = nearest(unit, living, chosen.nearest)
    with _timed(seconds, "acquisition"):
        found = acquired(valid, test, radiographs)
    table = atlas_table(neurons, plane, leaves, neighbours, histogram(test.values), found)
    staging.write_table(table)

    n_images = len(valid.image_ids) + len(test.image_ids)
    notes = {
        "n_living": int(living.sum()),
        "n_clustered": int((leaves.leaf >= 0).sum()),
        "clustering_labels": list(leaves.labels),
        "kl_divergence": plane.kl_divergence,
        "shortcuts": dict(Counter(name for names in table["shortcuts"].to_pylist() for name in names)),
        "seconds": seconds,
    }
    manifest = staging.commit(rows_in=n_images, rows_out=table.num_rows, notes=notes)
    beside = run.restage(Plan("atlas", "gallery", plan.settings, plan.inputs))
    beside.write_table(images)
    beside.commit(rows_in=n_images, rows_out=images.num_rows, notes=_gallery_notes(images))
    return Outcome(manifest, ran=True)


def _gallery_notes(images: pa.Table) -> dict[str, int]:
    return {
        "n_neurons": pc.count_distinct(images["neuron"]).as_py(),
        "n_images": pc.count_distinct(images["image_id"]).as_py(),
    }


@contextlib.contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - started, 3)
