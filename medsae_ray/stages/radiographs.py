"""Stage `radiographs`: a data set's own tables into the run's one `radiographs` table (and `truth`)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.config import Settings, fingerprinted
from medsae_ray.errors import InputError
from medsae_ray.radiographs import Boxes, Radiographs, read_radiographs
from medsae_ray.run import Manifest, Plan, Run, table_digest
from medsae_ray.stages.outcome import Outcome
from medsae_ray.tables import SPLITS, TRUTH


def radiographs(run: Run, settings: Settings) -> Outcome:
    """Read the tables of the data set, write `radiographs`, `quarantine/radiographs` and `truth`.

    The tables are read on every call (seconds): the fingerprint is of their content, so a run follows its
    data set to another folder, and a changed table is noticed. Readers' boxes have a fingerprint of their
    own: added later, they leave the radiographs and what was made of them as they are.
    """
    chosen = settings.radiographs
    root = chosen.root or _phantom_root(run, settings)
    if chosen.dataset == "phantom":
        root = _make_phantoms(root, settings)
    read = read_radiographs(
        chosen.dataset,
        root,
        table=chosen.table,
        split=chosen.split,
        fractions=(
            chosen.train_fraction,
            chosen.valid_fraction,
            1 - chosen.train_fraction - chosen.valid_fraction,
        ),
        seed=chosen.seed,
    )
    rows_in = read.table.num_rows + read.refused.num_rows
    # Cut after counting: the share refused is one of the whole table.
    read = read._replace(table=read.table.slice(0, chosen.limit))
    _check(read, rows_in, chosen.max_refused_share)

    plan = Plan(
        "radiographs",
        "radiographs",
        fingerprinted(chosen),
        {"tables": table_digest(read.table.drop_columns(["uri"])), "refused": table_digest(read.refused)},
    )
    staging = run.begin(plan, settings.overwrite)
    if read.boxes is not None:
        _write_boxes(run, plan, read.boxes, read.table["image_id"], settings.overwrite)
    if staging is None:
        done = run.require("radiographs", "radiographs")
        if run.read("radiographs", columns=["uri"])["uri"].equals(read.table["uri"]):
            return Outcome(done, ran=False)
        # Same radiographs in another place: the table follows them, its fingerprint stays.
        staging = run.restage(plan)
    staging.write_table(read.table)
    if chosen.dataset == "phantom":
        _write_truth(run, plan, Path(root), read.table["image_id"], settings.overwrite)
    elif read.boxes is None:
        run.delete("truth")
    write_quarantine(run, plan, read.refused)
    manifest = staging.commit(
        rows_in=rows_in,
        rows_out=read.table.num_rows,
        quarantined=read.refused.num_rows,
        notes={"splits": _counts(read.table["split"]), "dataset": chosen.dataset},
    )
    return Outcome(manifest, ran=True)


def write_quarantine(run: Run, plan: Plan, rows: pa.Table) -> Manifest:
    """Replace `quarantine/<stage>` by `rows`, beside the table that `plan` makes."""
    quarantine = Plan(plan.stage, f"quarantine/{plan.stage}", plan.settings, plan.inputs)
    staging = run.restage(quarantine)
    staging.write_table(rows)
    return staging.commit(rows_in=rows.num_rows, rows_out=rows.num_rows, quarantined=rows.num_rows)


def _phantom_root(run: Run, settings: Settings) -> str:
    if settings.radiographs.dataset != "phantom":
        raise InputError(
            "Setting radiographs.root is missing: name the folder of the "
            f"{settings.radiographs.dataset} data set."
        )
    if not run.is_local:
        raise InputError(
            "Setting radiographs.root is missing: phantoms are written to a local folder, and the run folder "
            f"{run.uri} is not one; name a folder that all nodes share."
        )
    return run.path("phantoms")


def _make_phantoms(root: str, settings: Settings) -> str:
    from medsae_ray.radiographs.phantom import PhantomSettings, write_phantoms

    chosen = settings.radiographs
    if "://" in root:
        raise InputError(
            f"Setting radiographs.root is {root!r}, but phantoms are written to a folder: give a path."
        )
    wanted = PhantomSettings(images=chosen.phantom_images, size=chosen.phantom_size, seed=chosen.phantom_seed)
    return str(write_phantoms(Path(root), wanted))


def _check(read: Radiographs, rows_in: int, max_refused_share: float) -> None:
    if read.table.num_rows == 0:
        raise InputError(f"No radiograph is left of {rows_in} table rows: look at the data set's table.")
    refused = read.refused.num_rows
    if refused > max_refused_share * rows_in:
        reason = read.refused["reason"][0].as_py()
        raise InputError(
            f"{refused} of {rows_in} table rows are refused (the first: {reason}), more than "
            f"radiographs.max_refused_share = {max_refused_share} allows: mend the table or raise the share."
        )
    present = set(_counts(read.table["split"]))
    lacking = [name for name in ("train", "valid", "test") if name not in present]
    if lacking:
        raise InputError(
            f"No radiograph is in split {lacking[0]!r}: give more patients, or other "
            "radiographs.train_fraction and radiographs.valid_fraction."
        )


def _write_truth(run: Run, plan: Plan, root: Path, image_ids: pa.ChunkedArray, overwrite: bool) -> None:
    import pyarrow.parquet as pq

    truth = pq.read_table(root / "truth.parquet").select(TRUTH.names)
    truth = truth.filter(pc.is_in(truth["image_id"], image_ids.combine_chunks())).cast(TRUTH)
    staging = run.restage(Plan(plan.stage, "truth", plan.settings, plan.inputs))
    staging.write_table(truth)
    staging.commit(rows_in=truth.num_rows, rows_out=truth.num_rows)


def _write_boxes(run: Run, plan: Plan, boxes: Boxes, image_ids: pa.ChunkedArray, overwrite: bool) -> None:
    """Write `truth` from the boxes of images in the table, unless these are there already."""
    kept = boxes.table.filter(pc.is_in(boxes.table["image_id"], image_ids.combine_chunks()))
    # Not called `boxes`, which is a table of the run.
    inputs = {"radiographs": plan.fingerprint, "box list": table_digest(kept)}
    staging = run.begin(Plan(plan.stage, "truth", plan.settings, inputs), overwrite)
    if staging is None:
        return
    staging.write_table(kept)
    staging.commit(
        rows_in=boxes.table.num_rows,
        rows_out=kept.num_rows,
        notes={"frame": boxes.frame, "left_out": boxes.table.num_rows - kept.num_rows},
    )


def _counts(splits: pa.ChunkedArray) -> dict[str, int]:
    counted = {row["values"].as_py(): row["counts"].as_py() for row in splits.value_counts()}
    return {name: counted[name] for name in SPLITS if name in counted}
