"""`medsae status RUN`: the stages of a run, from their manifests alone."""

from __future__ import annotations

from medsae_ray.errors import InputError
from medsae_ray.run import PARTIAL, STARTED, Run


def describe(uri: str) -> str:
    """A table of the run's stages: rows, quarantined, seconds, and whether each is fresh.

    `stale`: an input was made again since. Raises InputError where the folder holds no run.
    """
    run = Run(uri)
    manifests = run.manifests()
    if not manifests:
        raise InputError(f"The folder {run.uri} holds no run: start one with `medsae pipeline --run {uri}`.")
    lines = [f"{'table':<24}{'stage':<13}{'rows':>10}{'quarantined':>13}{'seconds':>9}  state"]
    for m in manifests:
        lines.append(
            f"{m.table:<24}{m.stage:<13}{m.rows_out:>10,}{m.quarantined:>13,}{m.seconds:>9.1f}  "
            f"{_state(run.stale_inputs(m.table))}"
        )
    lines += [f"{name:<24}half done: run its stage again to resume" for name in half_done(run)]
    stand_ins = sorted({name for m in manifests for name in m.stand_ins})
    if stand_ins:
        lines.append(f"Stand-in models, not the real ones: {', '.join(stand_ins)}.")
    return "\n".join(lines)


def half_done(run: Run) -> list[str]:
    """Names of the tables that a stage has begun and not committed."""
    import posixpath

    import pyarrow.fs as pafs

    root = run.path(PARTIAL)
    selector = pafs.FileSelector(root, allow_not_found=True, recursive=True)
    started = [f.path for f in run.filesystem.get_file_info(selector) if f.base_name == STARTED]
    return sorted(posixpath.dirname(path).removeprefix(root).strip("/") for path in started)


def _state(stale: list[str]) -> str:
    return f"stale ({', '.join(stale)} changed)" if stale else "fresh"
