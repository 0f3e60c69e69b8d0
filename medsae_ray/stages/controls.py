"""Stage `controls`: the neurons' figures beside those of units that no SAE has learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.config import ControlsSettings, MeasureSettings, Settings, fingerprinted
from medsae_ray.controls import (
    CONTROLS,
    OF_EMBEDDING,
    controls_schema,
    controls_table,
    drawn,
    independent_components,
    leading,
    principal_components,
    rotation,
    shuffled,
    untrained,
)
from medsae_ray.controls_summary import controls_text
from medsae_ray.measure import (
    ActivationState,
    LabelPolicy,
    chosen_neurons,
    neurons_table,
)
from medsae_ray.run import Manifest, Plan, Run
from medsae_ray.stages.outcome import Outcome
from medsae_ray.stages.splits import MEASURED, measure_splits, read_splits
from medsae_ray.summary import write_summary
from medsae_ray.tables import ACTIVATIONS


def controls(run: Run, settings: Settings) -> Outcome:
    """Write `controls`, and before it `embedding_controls`, those of its rows that rest on embeddings alone.

    They are made again only where embeddings, labels or settings changed, not for every SAE. Labels count as
    they did for `neurons`. Prints the controls' part of the summary and draws `figures/controls`.
    """
    chosen = settings.controls
    inputs = {
        table: run.require(table, stage)
        for table, stage in (
            ("radiographs", "radiographs"),
            ("embeddings", "embed"),
            ("sae", "fit"),
            ("activations", "encode"),
            ("neurons", "measure"),
        )
    }
    measured = inputs["neurons"].settings
    of_embedding = Plan(
        "controls",
        "embedding_controls",
        {**fingerprinted(chosen), "measure": measured},
        {table: inputs[table].fingerprint for table in ("radiographs", "embeddings")},
    )
    plan = Plan(
        "controls",
        "controls",
        fingerprinted(chosen),
        {
            **{table: manifest.fingerprint for table, manifest in inputs.items()},
            of_embedding.table: of_embedding.fingerprint,
        },
    )
    staging = run.begin(plan, settings.overwrite)
    if staging is None:
        _show(run)
        return Outcome(run.require("controls", "controls"), ran=False)

    splits = _Splits(run, MeasureSettings(**measured))
    made = run.manifest(of_embedding.table)
    if made is None or made.fingerprint != of_embedding.fingerprint:
        made = _measure_bases(run, of_embedding, splits, chosen)
    table, notes = _measure_sparse(run, splits, inputs["activations"].notes["n_neurons"], chosen.seed)
    bases = run.read(of_embedding.table, controls_schema())
    rows = {name: _rows_of(bases if name in OF_EMBEDDING else table, name) for name in CONTROLS}
    whole = pa.concat_tables(rows.values())
    staging.write_table(whole)
    manifest = staging.commit(
        rows_in=splits.n_images,
        rows_out=whole.num_rows,
        notes={**made.notes, "chosen": {**notes, **made.notes["chosen"]}},
    )
    _show(run)
    return Outcome(manifest, ran=True)


class _Splits:
    """The splits under the label policy of `neurons`, and one way to measure any units on them."""

    def __init__(self, run: Run, measured: MeasureSettings) -> None:
        self._measured = measured
        self.of = read_splits(run, LabelPolicy(measured.uncertain, measured.blank))
        self.n_images = sum(len(split.image_ids) for split in self.of.values())

    def measure(
        self, values: dict[str, Any], *, signed: bool, dead_train: np.ndarray | None = None
    ) -> tuple[pa.Table, list[dict[str, Any]]]:
        """The `neurons` table of some units and those chosen for each label, from their values by split."""
        chosen = self._measured
        units = measure_splits(values, self.of, permutations=chosen.floor_permutations, seed=chosen.seed)
        test, valid = units["test"], units["valid"]
        best = chosen_neurons(test, valid, min_firing=chosen.min_firing, signed=signed)
        return neurons_table(test, valid, dead_train), best.to_pylist()


def _measure_bases(run: Run, plan: Plan, splits: _Splits, chosen: ControlsSettings) -> Manifest:
    """Write `embedding_controls`."""
    train = splits.of["train"].x
    pca = principal_components(train)
    rank = len(pca.directions)
    some = train[drawn(splits.of["train"].image_ids, chosen.ica_rows, seed=chosen.seed)]
    found = {
        name: independent_components(some, n_components, seed=chosen.seed)
        for name, n_components in (("ica", rank), ("ica_leading", leading(rank, len(some))))
    }
    bases = {
        "rotation": rotation(train, seed=chosen.seed),
        "pca": pca,
        **{name: ica.basis for name, ica in found.items()},
    }
    tables, best = [], {}
    for name, basis in bases.items():
        values = {split: basis.project(splits.of[split].x) for split in MEASURED}
        table, best[name] = splits.measure(values, signed=True)
        tables.append(controls_table(name, table))
    whole = pa.concat_tables(tables)
    staging = run.restage(plan)
    staging.write_table(whole)
    told = {
        name: {"n_rows": ica.n_rows, "iterations": ica.iterations, "converged": ica.converged}
        for name, ica in found.items()
    }
    return staging.commit(
        rows_in=splits.n_images,
        rows_out=whole.num_rows,
        notes={"rank": rank, "ica": told, "chosen": best},
    )


def _measure_sparse(
    run: Run, splits: _Splits, n_neurons: int, seed: int
) -> tuple[pa.Table, dict[str, list[dict[str, Any]]]]:
    """Rows of the controls that have the SAE's own sparsity, and their chosen units."""
    from medsae_ray.sae.normaliser import Normaliser

    states = {name: ActivationState(n_neurons) for name in MEASURED}
    firing = np.zeros(n_neurons, np.int64)
    for batch in run.dataset("activations", ACTIVATIONS).to_batches():
        ids = batch["image_id"]
        train = batch.filter(pc.is_in(ids, splits.of["train"].image_ids))
        firing += np.bincount(train["neuron"].flatten(), minlength=n_neurons)
        for name, state in states.items():
            state.update(batch.filter(pc.is_in(ids, splits.of[name].image_ids)))
    own = {name: state.finish() for name, state in states.items()}
    normaliser = Normaliser.from_json(run.read_bytes("sae", "normaliser.json").decode())
    random = untrained(normaliser.apply(splits.of["train"].x), firing, seed=seed)
    values: dict[str, dict[str, Any]] = {"untrained": {}, "shuffled": {}}
    for name in MEASURED:
        split = splits.of[name]
        if not own[name].image_ids.equals(split.image_ids):
            raise RuntimeError(f"activations and embeddings of split {name} are of different images")
        values["untrained"][name] = random.encode(normaliser.apply(split.x))
        values["shuffled"][name] = shuffled(own[name], seed=seed).values
    tables, best = [], {}
    for name, of in values.items():
        table, best[name] = splits.measure(of, signed=False, dead_train=firing == 0)
        tables.append(controls_table(name, table))
    return pa.concat_tables(tables), best


def _rows_of(table: pa.Table, control: str) -> pa.Table:
    return table.filter(pc.equal(table["control"], control))


def _show(run: Run) -> None:
    from medsae_ray.report.controls_figure import controls_figure
    from medsae_ray.report.style import figure_files

    summary = write_summary(run)
    for file, content in figure_files(controls_figure(summary), "controls").items():
        run.write_bytes(content, "figures", file)
    print(controls_text(summary))
