"""Stage `panels`: the candidate neurons, and the radiographs by which each is named and its name tested."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medsae_ray.config import Settings, fingerprinted
from medsae_ray.measure import neurons_schema
from medsae_ray.panels import ROLES, Panels, build_panels, check_panels, gather
from medsae_ray.run import Plan, Run
from medsae_ray.stages.outcome import Outcome
from medsae_ray.summary import forget_labelling
from medsae_ray.tables import ACTIVATIONS, PANELS, RADIOGRAPHS

PART = "part-00000.parquet"


def panels(run: Run, settings: Settings) -> Outcome:
    """Write `panels` and, beside it, `candidates`.

    Raises InputError where no neuron can have a panel, naming the setting to change.
    """
    chosen = settings.panels
    inputs = [
        run.require(table, stage)
        for table, stage in (
            ("radiographs", "radiographs"),
            ("activations", "encode"),
            ("neurons", "measure"),
        )
    ]
    plan = Plan("panels", "panels", fingerprinted(chosen), {m.table: m.fingerprint for m in inputs})
    staging = run.begin(plan, settings.overwrite, beside="candidates")
    if staging is None:
        return Outcome(run.require("panels", "panels"), ran=False)

    radiographs = run.read("radiographs", RADIOGRAPHS, ["image_id", "patient_id", "split", "view", "sex"])
    neurons = run.read("neurons", neurons_schema())
    batches = run.dataset("activations", ACTIVATIONS).to_batches()
    valid, test = gather(batches, radiographs, neurons.num_rows)
    built = build_panels(valid, test, radiographs, neurons, chosen)
    staging.write_table(built.panels, PART)
    written = pq.read_table(staging.path(PART), filesystem=staging.filesystem, schema=PANELS)
    check_panels(written, radiographs)

    n_images = len(valid.image_ids) + len(test.image_ids)
    manifest = staging.commit(rows_in=n_images, rows_out=written.num_rows, notes=_notes(built))
    beside = run.restage(Plan("panels", "candidates", plan.settings, plan.inputs))
    beside.write_table(built.candidates)
    beside.commit(rows_in=n_images, rows_out=built.candidates.num_rows)
    forget_labelling(run)
    return Outcome(manifest, ran=True)


def _notes(built: Panels) -> dict[str, Any]:
    of_role = {role: built.panels.filter(pc.equal(built.panels["role"], role)) for role in ROLES}

    def distinct(*roles: str) -> int:
        return pc.count_distinct(pa.concat_tables(of_role[role] for role in roles)["image_id"]).as_py()

    return {
        "n_neurons": built.candidates.num_rows,
        "n_candidates": pc.sum(built.candidates["candidate"]).as_py(),
        "left_out": built.left_out,
        "rows": {role: table.num_rows for role, table in of_role.items()},
        "n_naming_images": distinct("name", "name_contrast"),
        "n_detection_images": distinct("detect_positive", "detect_negative"),
        "n_silent_images": distinct("detect_negative"),
    }
