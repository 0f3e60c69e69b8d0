"""Stage `measure`: activations, embeddings and labels to `neurons`, `dimensions` and the summary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.config import MeasureSettings, Settings, fingerprinted
from medsae_ray.measure import (
    ActivationState,
    EmbeddingState,
    LabelPolicy,
    ReconstructionState,
    UnitMeasures,
    chosen_neurons,
    labels_of,
    measure_units,
    neurons_schema,
    neurons_table,
)
from medsae_ray.run import Plan, Run
from medsae_ray.stages.encode import load_sae
from medsae_ray.stages.outcome import Outcome
from medsae_ray.summary import as_text, write_summary
from medsae_ray.tables import ACTIVATIONS, RADIOGRAPHS, embeddings_schema

RECONSTRUCTED_ROWS = 4096
"""Images whose reconstruction is held at a time."""


def measure(run: Run, settings: Settings) -> Outcome:
    """Write `neurons`, `dimensions` and `summary.json`, and print the summary."""
    chosen = settings.measure
    activations = run.require("activations", "encode")
    embeddings = run.require("embeddings", "embed")
    radiographs = run.require("radiographs", "radiographs")
    fitted = run.require("sae", "fit")
    plan = Plan(
        "measure",
        "neurons",
        fingerprinted(chosen),
        {m.table: m.fingerprint for m in (activations, embeddings, radiographs, fitted)},
    )
    staging = run.begin(plan, settings.overwrite, beside="dimensions")
    if staging is None:
        print(as_text(write_summary(run)))
        return Outcome(run.require("neurons", "measure"), ran=False)

    splits = _Splits(run, activations.notes["n_neurons"], embeddings.notes["embedding_dim"])
    notes: dict[str, Any] = {"policy": {"uncertain": chosen.uncertain, "blank": chosen.blank}}
    neurons, dimensions = {}, {}
    sae = load_sae(run)
    weights = sae.W_dec.numpy(), sae.b_dec.numpy()
    for split in ("test", "valid"):
        fired, embedded = splits.activations[split].finish(), splits.embeddings[split].finish()
        if not fired.image_ids.equals(embedded.image_ids):
            raise RuntimeError(f"activations and embeddings of split {split} are of different images")
        # The noise floor is a figure of the test split alone.
        permutations = chosen.floor_permutations if split == "test" else 0
        neurons[split] = _measure(fired, splits.radiographs, chosen, permutations)
        dimensions[split] = _measure(embedded, splits.radiographs, chosen, permutations)
        rebuilt = _reconstruction(embedded.values, fired.values, *weights)
        notes[split] = {
            "n_images": rebuilt.n_images,
            "n_patients": len(np.unique(labels_of(splits.radiographs, fired.image_ids)[1])),
            "fve": rebuilt.fve,
            "l0": rebuilt.l0,
            "dead": float(rebuilt.dead.mean()),
            "n_positive": dict(zip(neurons[split].labels, neurons[split].n_positive.tolist(), strict=True)),
        }
        if split == "test":
            notes["embedding"] = _embedding_figures(np.asarray(embedded.values))
    notes["train"] = {"n_images": splits.n_train, "dead": float((splits.train_firing == 0).mean())}
    notes["min_positives"] = chosen.min_positives
    notes["min_firing"] = chosen.min_firing
    notes["chosen"] = {
        name: chosen_neurons(
            of["test"], of["valid"], min_firing=chosen.min_firing, signed=name == "dimensions"
        ).to_pylist()
        for name, of in (("neurons", neurons), ("dimensions", dimensions))
    }
    raw = neurons_table(dimensions["test"], dimensions["valid"])
    beside = run.restage(Plan("measure", "dimensions", plan.settings, plan.inputs))
    beside.write_table(raw)
    beside.commit(rows_in=splits.n_images, rows_out=raw.num_rows)
    table = neurons_table(neurons["test"], neurons["valid"], splits.train_firing == 0)
    assert table.schema.equals(neurons_schema())
    staging.write_table(table)
    manifest = staging.commit(rows_in=splits.n_images, rows_out=table.num_rows, notes=notes)
    print(as_text(write_summary(run)))
    return Outcome(manifest, ran=True)


class _Splits:
    """One pass over `activations` and one over `embeddings`, each row into its split's state."""

    def __init__(self, run: Run, n_neurons: int, embedding_dim: int) -> None:
        self.radiographs = run.read("radiographs", RADIOGRAPHS)
        self.activations = {name: ActivationState(n_neurons) for name in ("test", "valid")}
        self.embeddings = {name: EmbeddingState(embedding_dim) for name in ("test", "valid")}
        self.train_firing = np.zeros(n_neurons, np.int64)
        self.n_train = 0
        self.n_images = 0
        for batch in run.dataset("activations", ACTIVATIONS).to_batches():
            self.n_images += batch.num_rows
            split = self._split_of(batch)
            train = batch.filter(pc.equal(split, "train"))
            self.n_train += train.num_rows
            self.train_firing += np.bincount(train["neuron"].flatten(), minlength=n_neurons)
            for name, state in self.activations.items():
                state.update(batch.filter(pc.equal(split, name)))
        for batch in run.dataset("embeddings", embeddings_schema(embedding_dim)).to_batches():
            split = self._split_of(batch)
            for name, raw in self.embeddings.items():
                raw.update(batch.filter(pc.equal(split, name)))

    def _split_of(self, batch: pa.RecordBatch) -> pa.ChunkedArray:
        rows = pc.index_in(batch["image_id"], value_set=self.radiographs["image_id"].combine_chunks())
        return self.radiographs["split"].take(rows)


def _measure(values: Any, radiographs: pa.Table, chosen: MeasureSettings, permutations: int) -> UnitMeasures:
    labels, patients = labels_of(radiographs, values.image_ids)
    y, known = LabelPolicy(chosen.uncertain, chosen.blank).apply(labels)
    return measure_units(values, y, known, patients, permutations=permutations, seed=chosen.seed)


def _reconstruction(x: Any, z: Any, decoder: np.ndarray, bias: np.ndarray) -> ReconstructionState:
    """Sums over one split; x [n, d] raw embeddings, z sparse [n, m], the decoder of the exported SAE."""
    state = ReconstructionState(*reversed(decoder.shape))
    for start in range(0, len(x), RECONSTRUCTED_ROWS):
        rows = slice(start, start + RECONSTRUCTED_ROWS)
        state.update(x[rows], z[rows] @ decoder + bias, z[rows].indices)
    return state


def _embedding_figures(x: np.ndarray) -> dict[str, float]:
    """What tells whether the embeddings are sound: norm, variance a dimension, effective dimension."""
    variances = x.var(axis=0, dtype=np.float64)
    spectrum = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64)))
    return {
        "mean_norm": float(np.linalg.norm(x, axis=1).mean()),
        "variance_mean": float(variances.mean()),
        "variance_min": float(variances.min()),
        "variance_max": float(variances.max()),
        "non_finite_share": float((~np.isfinite(x)).mean()),
        "effective_dimension": float(spectrum.sum() ** 2 / np.square(spectrum).sum()),
    }
