"""Stage `sweep`: many SAEs on the same embeddings, by Ray Tune; the best one becomes the run's.

Trials are ranked by the selection score of their best evaluation on validation (paper.md, row "checkpoint"),
never by a loss, which λ is part of: the smallest λ would win.
"""

from __future__ import annotations

import os
import posixpath
import shlex
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from medsae_ray.cluster import on_cluster, require_resources, start_ray
from medsae_ray.config import FitSettings, MeasureSettings, Settings, SweepSettings, fingerprinted
from medsae_ray.errors import InputError, printable
from medsae_ray.measure import LabelPolicy
from medsae_ray.run import Manifest, Plan, Run, Staging
from medsae_ray.stages.fit import fit_notes, fit_plan, fitting_rows, normalise, write_sae
from medsae_ray.stages.outcome import Outcome
from medsae_ray.stages.rows import batches_of, matrix
from medsae_ray.tables import HISTORY, SWEEP

if TYPE_CHECKING:
    from medsae_ray.sae.normaliser import Normaliser
    from medsae_ray.stages.tune_backend import Ended, Job, Shared

STORE_SHARE = 0.8
"""Of the object store that the embeddings may fill."""
SHOWN = 40
"""Trials that the console shows at most."""


def sweep(run: Run, settings: Settings) -> Outcome:
    """Train what is missing of the sweep, write `sweep/` and make the best trial's SAE the run's `sae`.

    Raises InputError for settings that cannot be tried, and where `sweep.promote` names no finished trial or
    the run has another SAE that `overwrite` does not give up.
    """
    policy = LabelPolicy(settings.measure.uncertain, settings.measure.blank)
    plan = _plan(run, settings, policy)
    _refuse(run, settings)
    staging = run.begin(plan, settings.overwrite)
    if staging is not None:
        _train(run, settings, policy, staging)
    outcome = Outcome(run.require("sweep", "sweep"), ran=staging is not None)
    table = run.read("sweep", SWEEP)
    print(as_text(table, outcome.manifest, settings.fit))
    _promote(run, settings, policy, table, outcome.manifest)
    return outcome


def _plan(run: Run, settings: Settings, policy: LabelPolicy) -> Plan:
    """What `sweep` depends on: of `fit`, what it does not search."""
    from medsae_ray.sae.trials import SEARCHED

    chosen = settings.sweep
    idle = {"trials", "seed"} if chosen.search == "grid" else set()
    idle |= set() if chosen.asha else {"grace", "reduction_factor"}
    searched = {field for name, field in SEARCHED.items() if getattr(chosen, name)}
    inputs = fit_plan(run, settings.fit, policy).inputs
    return Plan(
        "sweep",
        "sweep",
        {
            **{f"sweep.{k}": v for k, v in fingerprinted(chosen).items() if k not in idle},
            **{f"fit.{k}": v for k, v in fingerprinted(settings.fit).items() if k not in searched},
            **{f"measure.{k}": v for k, v in asdict(policy).items()},
        },
        inputs,
    )


def _refuse(run: Run, settings: Settings) -> None:
    """InputError for settings that a trial would fail by, before any is begun."""
    import itertools

    from medsae_ray.sae.training import new_sae
    from medsae_ray.sae.trials import choices, n_evaluations, trial_name, trials, with_values

    chosen, fit = settings.sweep, settings.fit
    values = choices(fit, chosen)
    embedding_dim = run.require("embeddings", "embed").notes["embedding_dim"]
    shaped = ("architecture", "expansion", "l0")
    for shape in itertools.product(*(values[name] for name in shaped)):
        new_sae(with_values(fit, dict(zip(shaped, shape, strict=True))), embedding_dim)
    if chosen.asha and chosen.grace >= n_evaluations(fit):
        raise InputError(
            f"Setting sweep.grace is {chosen.grace}, but a trial has {n_evaluations(fit)} evaluations: ASHA "
            "could stop none; lower it or fit.evaluate_every, or leave out sweep.asha."
        )
    if chosen.promote is not None and chosen.search != "optuna":
        names = [trial_name(trial) for trial in trials(fit, chosen)]
        if chosen.promote not in names:
            raise InputError(_unknown(chosen.promote, names))


def _unknown(name: str, names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"Setting sweep.promote is {name!r}, but it must be a finished trial of the sweep ({shown})."


# ---------------------------------------------------------------------------------------------- training


def _train(run: Run, settings: Settings, policy: LabelPolicy, staging: Staging) -> None:
    """Run the trials and commit their table, SAEs and curves."""
    from medsae_ray.stages.tune_backend import FOLDER, TRIALS, Job, run_trials

    chosen, fit = settings.sweep, settings.fit
    start_ray(settings.ray)
    require_resources(
        "sweep.cpus_per_trial and sweep.gpus_per_trial",
        {"CPU": chosen.cpus_per_trial, "GPU": chosen.gpus_per_trial},
    )
    data, normaliser = _shared(run, settings, policy)
    job = Job(
        fit=fit,
        run_uri=run.uri,
        folder=staging.path(FOLDER, TRIALS),
        events=staging.path("tensorboard"),
        threads=0,
        gpu=chosen.gpus_per_trial > 0,
    )
    groups = _groups(settings, staging, job, data) if chosen.search != "optuna" else {}
    n_trials = len(groups) or chosen.trials
    at_a_time = min(trials_at_a_time(chosen), n_trials)
    threads = threads_of_a_trial(chosen, at_a_time)
    job = replace(job, threads=threads, groups=groups)
    n_saes = sum(map(len, groups.values())) or n_trials
    print(
        f"Sweep of {n_saes} SAEs in {n_trials} trials, {at_a_time} at a time with {threads} "
        f"thread{'' if threads == 1 else 's'} each.",
        flush=True,
    )
    ended = run_trials(staging, data, job, chosen, at_a_time)
    _commit(run, settings, staging, job, normaliser, ended, rows_in=len(data["train"]))


def _shared(run: Run, settings: Settings, policy: LabelPolicy) -> tuple[Shared, Normaliser]:
    """What every trial reads: normalised embeddings of both splits, labels, their median."""
    import ray

    from medsae_ray.stages.tune_backend import Shared

    train, valid = fitting_rows(run)
    normaliser, centre = normalise(run, train.image_ids, settings.fit)
    y, known = policy.apply(valid.labels)
    data = Shared(
        train=normaliser.apply(matrix(batches_of(run, train.image_ids))),
        valid=normaliser.apply(matrix(batches_of(run, valid.image_ids))),
        y=np.asarray(y),
        known=np.asarray(known),
        centre=centre.numpy(),
    )
    needed, have = sum(a.nbytes for a in data.values()), ray.cluster_resources()["object_store_memory"]
    if not on_cluster() and needed > STORE_SHARE * have:
        raise InputError(
            f"Setting ray.object_store_gib is {settings.ray.object_store_gib:g}, but a sweep holds the "
            f"embeddings of both splits in the object store, {needed / 2**30:.1f} GiB: raise it to "
            f"{needed / STORE_SHARE / 2**30:.1f} at least."
        )
    return data, normaliser


def trials_at_a_time(chosen: SweepSettings) -> int:
    """Trials that run at a time, if there are enough of them."""
    import ray

    have = ray.cluster_resources()
    fit_in = [int(have.get("CPU", 0) // chosen.cpus_per_trial)]
    if chosen.gpus_per_trial:
        fit_in.append(int(have.get("GPU", 0) // chosen.gpus_per_trial))
    elif not on_cluster():
        # An embedded Ray has more logical CPUs than a small machine has cores.
        fit_in.append(os.cpu_count() or 1)
    if chosen.concurrent:
        fit_in.append(chosen.concurrent)
    return max(1, min(fit_in))


def threads_of_a_trial(chosen: SweepSettings, at_a_time: int) -> int:
    """Torch threads of each of `at_a_time` trials on the CPU."""
    if on_cluster():
        return chosen.threads or max(1, int(chosen.cpus_per_trial))
    return chosen.threads or max(1, (os.cpu_count() or 1) // at_a_time)


def _groups(settings: Settings, staging: Staging, job: Job, data: Shared) -> dict[str, list[FitSettings]]:
    """What trains in each trial of a grid or random search, by its name."""
    from medsae_ray.sae.trials import group_name, groups, trials
    from medsae_ray.stages.tune_backend import GROUPS

    chosen = settings.sweep
    found = trials(settings.fit, chosen)
    stacked: list[str] = []
    stackable = {group_name(group): group for group in groups(found) if len(group) > 1}
    if chosen.search == "grid" and chosen.together == "always":
        stacked = list(stackable)
    elif chosen.search == "grid" and chosen.together == "auto" and stackable and not chosen.asha:
        kept = staging.read_json(GROUPS)
        stacked = _paying(chosen, stackable, len(groups(found)), job, data) if kept is None else kept
        if kept is None:
            staging.write_json(GROUPS, stacked)
    grouped: dict[str, list[FitSettings]] = {}
    in_stack = {trial: name for name in stacked for trial in stackable[name]}
    for trial in found:
        name = in_stack.get(trial) or group_name([trial])
        grouped.setdefault(name, []).append(trial)
    return grouped


def _paying(
    chosen: SweepSettings,
    stackable: dict[str, list[FitSettings]],
    n_groups: int,
    job: Job,
    data: Shared,
) -> list[str]:
    """Names of the groups that train faster as one stack."""
    from medsae_ray.stages.tune_backend import stacking_pays

    slots = trials_at_a_time(chosen)
    threads_fill_up = not on_cluster() and not chosen.gpus_per_trial
    if n_groups < slots and not threads_fill_up:
        # Side by side on all the machines they are done sooner.
        return []
    job = replace(job, threads=threads_of_a_trial(chosen, min(slots, n_groups)))
    resources = {"CPU": chosen.cpus_per_trial, "GPU": chosen.gpus_per_trial}
    timed: dict[tuple[int, int], bool] = {}
    for group in stackable.values():
        shape = group[0].expansion, len(group)
        if shape not in timed:
            timed[shape] = stacking_pays(job, group, data["train"].shape[1], resources)
            print(
                f"{shape[1]} SAEs of expansion {shape[0]} train faster "
                f"{'together' if timed[shape] else 'one by one'}.",
                flush=True,
            )
    return [name for name, group in stackable.items() if timed[group[0].expansion, len(group)]]


# -------------------------------------------------------------------------------------------- the table


def _commit(
    run: Run,
    settings: Settings,
    staging: Staging,
    job: Job,
    normaliser: Normaliser,
    ended: list[Ended],
    rows_in: int,
) -> None:
    """Gather what the trials left behind, and commit it."""
    from medsae_ray.report.figures import figure_files, pareto_figure
    from medsae_ray.sae.training import new_sae
    from medsae_ray.stages.tune_backend import furthest_state

    stand_ins = run.require("embeddings", "embed").stand_ins
    rows: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    for trial in ended:
        state = furthest_state(staging.filesystem, job.folder, trial.trial)
        finished = state is not None and state["finished"]
        if not finished and trial.error is None and not settings.sweep.asha:
            raise RuntimeError(f"Ray Tune ended trial {trial.trial} before it had finished.")
        status = "finished" if finished else "failed" if trial.error else "stopped"
        for i, (name, of) in enumerate(zip(trial.names, trial.settings, strict=True)):
            saved = state["fittings"][i] if state else {"history": [], "best": None}
            if status == "failed":
                reasons[name] = _reason(trial.error)
            rows += _rows(name, status, of, saved)
            if finished:
                sae = new_sae(of, normaliser.embedding_dim)
                sae.load_state_dict(saved["best"][2])
                write_sae(staging, posixpath.join("saes", name), sae, normaliser, stand_ins)
    if len(reasons) == len({row["trial"] for row in rows}):
        name, reason = next(iter(reasons.items()))
        raise staging.spoilt(f"All {len(reasons)} trials failed, {name} by {reason}")
    table, notes = tabulate(rows)
    staging.write_table(table)
    figure = pareto_figure(table, fve_floor=settings.fit.fve_floor)
    for file, content in figure_files(figure, "pareto").items():
        staging.write_bytes(content, file)
    staging.commit(
        rows_in=rows_in,
        rows_out=table.num_rows,
        notes={**notes, "failed": reasons, "trained_together": [t.names for t in ended if len(t.names) > 1]},
    )


def _rows(name: str, status: str, of: FitSettings, saved: dict[str, Any]) -> list[dict[str, Any]]:
    """A trial's rows of the `sweep` table, `front` still to be told."""
    from medsae_ray.sae.trials import has

    told = {
        "trial": name,
        "status": status,
        "architecture": of.architecture,
        "expansion": of.expansion,
        "sparsity_setting": of.sparsity if has(of.architecture, "sparsity") else None,
        "l0_setting": of.l0 if has(of.architecture, "l0") else None,
        "learning_rate": of.learning_rate,
        "seed": of.seed,
        "best": False,
        "front": False,
    }
    if not saved["history"]:
        return [{**told, "epoch": 0, "step": 0, "split": "valid"}]
    epoch = saved["best"][1] if saved["best"] and status != "failed" else None
    return [
        {**told, **row, "best": row["split"] == "valid" and row["epoch"] == epoch} for row in saved["history"]
    ]


def tabulate(rows: list[dict[str, Any]]) -> tuple[pa.Table, dict[str, Any]]:
    """The `sweep` table with its front, and the notes of its manifest: counts, ranking and front by name."""
    from medsae_ray.sae.pareto import costs, pareto_front, ranking

    best = [row for row in rows if row["best"] and row["status"] == "finished"]
    for row, member in zip(best, pareto_front(costs(best)), strict=True):
        row["front"] = bool(member)
    ranked = [best[i] for i in ranking([row["selection"] for row in best])]
    status = {row["trial"]: row["status"] for row in rows}
    return pa.Table.from_pylist(rows, SWEEP), {
        "n_trials": len(status),
        **{f"n_{kind}": list(status.values()).count(kind) for kind in ("finished", "stopped", "failed")},
        "ranking": [row["trial"] for row in ranked],
        "front": [row["trial"] for row in ranked if row["front"]],
    }


def _reason(error: BaseException | None) -> str:
    """The exception that a trial ended with, in one line, out of what Ray wrapped it in."""
    while error is not None and (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    told = str(error).strip().partition("\n")[0]
    return printable(f"{type(error).__name__}: {told}", 200)


# ------------------------------------------------------------------------------------------ the console


def as_text(table: pa.Table, manifest: Manifest, fit: FitSettings) -> str:
    """The trials by rank, the front, what failed, and what to widen where no trial reconstructs well."""
    best = table.filter(table["best"]).to_pylist()
    notes = manifest.notes
    rank = {name: i for i, name in enumerate(notes["ranking"])}
    best.sort(key=lambda row: rank.get(row["trial"], len(rank)))
    width = max((len(row["trial"]) for row in best), default=5)
    lines = [
        f"\n{'':>5}{'trial':<{width}}  {'FVE':>6}{'L0':>8}{'dead':>8}{'entropy':>9}{'score':>9}{'epoch':>7}",
    ]
    for row in best[:SHOWN]:
        mark = "*" if row["front"] else " "
        place = str(rank[row["trial"]] + 1) if row["trial"] in rank else "-"
        lines.append(
            f"{place:>3}{mark} {row['trial']:<{width}}  {row['fve']:>6.3f}{row['l0']:>8.1f}"
            f"{row['dead']:>8.1%}{row['entropy']:>9.3f}{row['selection']:>9.3f}{row['epoch']:>7}"
            + ("" if row["status"] == "finished" else f"  {row['status']}")
        )
    if len(best) > SHOWN:
        lines.append(f"     … and {len(best) - SHOWN} more in the table")
    counts = ", ".join(f"{notes[f'n_{k}']} {k}" for k in ("finished", "stopped", "failed") if notes[f"n_{k}"])
    lines.append(
        f"{notes['n_trials']} trials: {counts}. * {len(notes['front'])} on the Pareto front of FVE, L0, dead "
        "and entropy; all on the validation split."
    )
    lines += [f"failed: {name}: {reason}" for name, reason in list(notes["failed"].items())[:SHOWN]]
    if told := _too_low(best, fit):
        lines.append(told)
    return "\n".join(lines)


def _too_low(best: list[dict[str, Any]], fit: FitSettings) -> str | None:
    """What to widen where no finished trial reaches the floor of FVE."""
    finished = [row for row in best if row["status"] == "finished"]
    if not finished or any(row["fve"] > fit.fve_floor for row in finished):
        return None
    top = max(finished, key=lambda row: row["fve"])
    sparsities = [row["sparsity_setting"] for row in finished if row["sparsity_setting"]]
    l0s = [row["l0_setting"] for row in finished if row["l0_setting"] is not None]
    wider = [f"sweep.sparsity below {min(sparsities):g}"] if sparsities else []
    wider += [f"sweep.l0 above {max(l0s)}"] if l0s else []
    wider += [
        f"sweep.expansion above {max(row['expansion'] for row in finished)}",
        f"fit.epochs above {fit.epochs}",
        f"sweep.learning_rate above {max(row['learning_rate'] for row in finished):g}",
    ]
    return (
        f"NO TRIAL REACHED FVE {fit.fve_floor} on validation ({top['trial']} comes nearest: "
        f"{top['fve']:.4f}), so they are ranked by FVE alone. Widen the sweep: {', '.join(wider[:-1])} or "
        f"{wider[-1]}."
    )


# ---------------------------------------------------------------------------------------------- promotion


def _promote(run: Run, settings: Settings, policy: LabelPolicy, table: pa.Table, swept: Manifest) -> None:
    """Make a trial's SAE the run's, as `fit` would have with its settings."""
    from medsae_ray.sae.trials import with_values

    ranked = swept.notes["ranking"]
    asked = settings.sweep.promote
    if asked is not None and asked not in ranked:
        raise InputError(_unknown(asked, ranked))
    if not ranked:
        print("No trial finished, so none is promoted.")
        return
    name = asked or ranked[0]
    rows = table.filter(pc.equal(table["trial"], name))
    chosen = rows.filter(rows["best"]).to_pylist()[0]
    values = {
        "architecture": chosen["architecture"],
        "expansion": chosen["expansion"],
        "sparsity": chosen["sparsity_setting"],
        "l0": chosen["l0_setting"],
        "learning_rate": chosen["learning_rate"],
        "seed": chosen["seed"],
    }
    values = {field: value for field, value in values.items() if value is not None}
    fit = with_values(settings.fit, values)
    plan = fit_plan(run, fit, policy)
    try:
        staging = run.begin(plan, settings.overwrite)
    except InputError:
        if asked is not None:
            raise
        print(
            f"The run has another SAE, which stays. To put {name} in its place, training nothing again, add "
            f"--sweep.promote {name} --overwrite to this command."
        )
        return
    if staging is not None:
        _write_promoted(run, staging, name, rows, chosen, fit, swept)
    print(f"The run's SAE is {name}" + (", as it was." if staging is None else "."))
    print(_next(run, settings, values))


def _write_promoted(
    run: Run,
    staging: Staging,
    name: str,
    rows: pa.Table,
    chosen: dict[str, Any],
    fit: FitSettings,
    swept: Manifest,
) -> None:
    from medsae_ray.sae.normaliser import Normaliser

    # A fit with these settings may have been killed half way.
    staging.start_afresh()
    for folder, target in (("saes", ""), ("tensorboard", "tensorboard")):
        staging.filesystem.create_dir(staging.path(target), recursive=True)
        selector = pafs.FileSelector(run.path("sweep", folder, name))
        for file in staging.filesystem.get_file_info(selector):
            staging.filesystem.copy_file(file.path, staging.path(target, file.base_name))
    history = rows.select(HISTORY.names).cast(HISTORY)
    staging.write_table(history, "history/part-00000.parquet")
    normaliser = Normaliser.from_json(run.read_bytes("sweep", "saes", name, "normaliser.json").decode())
    chosen_row = {k: chosen[k] for k in HISTORY.names if chosen[k] is not None}
    staging.commit(
        rows_in=swept.rows_in,
        rows_out=history.num_rows,
        notes={**fit_notes(fit, chosen_row, normaliser), "from_sweep": name},
    )


def _next(run: Run, settings: Settings, values: dict[str, Any]) -> str:
    """The commands to go on with."""
    measure, defaults = settings.measure, MeasureSettings()
    told = {k: v for k, v in asdict(measure).items() if v != getattr(defaults, k)}
    words = ["medsae", "measure", "--run", run.uri]
    words += [word for k, v in told.items() for word in (f"--measure.{k}", str(v))]
    flags = shlex.join(word for k, v in values.items() for word in (f"--fit.{k}", str(v)))
    return (
        f"Go on: `medsae encode --run {shlex.quote(run.uri)}`, then `{shlex.join(words)}`; a pipeline on "
        f"this run needs, besides its other settings, {flags}"
    )
