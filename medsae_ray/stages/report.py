"""Stage `report`: the neuron atlas, a folder of pages that opens from disk.

It shows whatever of the run is there and fresh, and is simply made again where anything of that, its settings
or its own templates and code differ.
"""

from __future__ import annotations

import posixpath
import time
from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.concepts import is_named
from medsae_ray.config import ReportSettings, Settings, fingerprinted
from medsae_ray.errors import InputError
from medsae_ray.report.collect import Survey, read_tables, survey
from medsae_ray.report.data import PER_FILE, cards, index_payload, script
from medsae_ray.report.pages import asset_files, render_pages, source_digest
from medsae_ray.report.thumbnails import write_pictures
from medsae_ray.run import Manifest, Plan, Run, Staging
from medsae_ray.stages.outcome import Outcome

AMOUNTS = ("none", "thumbnails", "full")
"""Values of `report.images`, each showing more than the one before."""


def report(run: Run, settings: Settings) -> Outcome:
    """Write `report` and the overview's figures in `figures/`, and tell where to look.

    Raises InputError naming the stage to run where the neurons or what they rest on are missing or stale,
    and where a report that was made with fewer pictures would get more of them without `--overwrite`.
    """
    chosen, max_pixels = settings.report, settings.embed.max_pixels
    found = survey(run)
    plan = Plan(
        "report",
        "report",
        {
            **fingerprinted(chosen),
            "max_pixels": max_pixels,
            "left_out": [list(told) for told in found.left_out],
            "source_sha256": source_digest(),
        },
        found.inputs,
    )
    _refuse_more_pictures(run, chosen, settings.overwrite)
    staging = run.begin(plan, overwrite=True)
    if staging is None:
        manifest = run.require("report", "report")
    else:
        manifest = _build(run, found, staging, chosen, max_pixels)
    print(_told(run, manifest))
    return Outcome(manifest, ran=staging is not None)


def _refuse_more_pictures(run: Run, chosen: ReportSettings, overwrite: bool) -> None:
    done = run.manifest("report")
    if done is None or overwrite:
        return
    earlier = done.settings["images"]
    if AMOUNTS.index(chosen.images) > AMOUNTS.index(earlier):
        raise InputError(
            f"The report of {run.uri} was made with --report.images {earlier} and would now hold more of the "
            f"radiographs ({chosen.images}): say --report.images {earlier} again, or --overwrite."
        )


def _build(run: Run, found: Survey, staging: Staging, chosen: ReportSettings, max_pixels: int) -> Manifest:
    # matplotlib is loaded only where figures are made.
    from medsae_ray.report.atlas_figures import overview_figures
    from medsae_ray.report.style import SINGLE_MM, figure_files

    clock = _Clock()
    tables = read_tables(run, found)
    clock.told("tables")

    shown = _shown(tables)
    unreadable: dict[str, str] = {}
    if chosen.images != "none":
        side = chosen.thumbnail_side if chosen.images == "thumbnails" else chosen.full_side
        unreadable = write_pictures(
            shown,
            lambda content, name: staging.write_bytes(content, f"radiographs/{name}"),
            side,
            max_pixels=max_pixels,
            threads=chosen.threads,
        )
    clock.told("radiographs")

    told = _run_told(run, found, tables, chosen)
    staging.write_bytes(script("index", index_payload(tables, told)), "data/index.js")
    for number, of in enumerate(cards(tables, unreadable)):
        staging.write_bytes(script(f"cards-{number}", of), f"data/cards-{number}.js")
    clock.told("data")

    figures = overview_figures(tables, found.summary)
    for figure in figures:
        for name, content in figure_files(figure.figure, figure.name).items():
            staging.write_bytes(content, f"figures/{name}")
            run.write_bytes(content, "figures", name)
    clock.told("figures")

    localisation = tables.get("localisation")
    context = {
        "run": told,
        "summary": found.summary,
        "figures": [
            {
                **{key: getattr(f, key) for key in ("name", "title", "alt", "caption")},
                "wide": f.figure.get_figwidth() > SINGLE_MM / 25.4 + 1,
            }
            for f in figures
        ],
        "signatures": _signatures(found.summary),
        "localisation": [] if localisation is None else localisation.to_pylist(),
        "counts": _counts(tables, shown.num_rows, unreadable),
        "stale": found.stale,
        "left_out": [told._asdict() for told in found.left_out],
        "made": _made(found),
    }
    for name, content in {**render_pages(context), **asset_files()}.items():
        staging.write_bytes(content, name)
    clock.told("pages")
    n = tables["neurons"].num_rows
    return staging.commit(
        rows_in=n,
        rows_out=n,
        notes={
            "radiographs": shown.num_rows,
            "unreadable": dict(Counter(unreadable.values())),
            "seconds": clock.parts,
        },
    )


class _Clock:
    """Seconds of each part of the work."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._since = time.perf_counter()

    def told(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part], self._since = round(now - self._since, 3), now


def _shown(tables: dict[str, pa.Table]) -> pa.Table:
    """`image_id` and `uri` of every radiograph on a card."""
    radiographs = tables["radiographs"]
    gallery = tables.get("gallery")
    ids = pa.array([], pa.string()) if gallery is None else pc.unique(gallery["image_id"])
    return radiographs.filter(pc.is_in(radiographs["image_id"], value_set=ids))


def _run_told(run: Run, found: Survey, tables: dict[str, pa.Table], chosen: ReportSettings) -> dict[str, Any]:
    """What the pages know of the run as a whole; no path but the run folder's own name."""
    dataset = found.manifests["radiographs"].notes["dataset"]
    return {
        "title": posixpath.basename(run.root.rstrip("/")),
        "dataset": dataset,
        "phantom": dataset == "phantom",
        "stand_ins": _stand_ins(found),
        "images": chosen.images,
        "grid": found.manifests["embeddings"].notes.get("grid"),
        "n_neurons": tables["neurons"].num_rows,
        "splits": {"top": "validation", "range": "test"},
        "per_file": PER_FILE,
    }


def _stand_ins(found: Survey) -> list[str]:
    return sorted({name for manifest in found.manifests.values() for name in manifest.stand_ins})


def _signatures(summary: dict[str, Any]) -> list[str]:
    return [*summary["signatures"], *summary.get("labelling", {}).get("signatures", [])]


def _counts(tables: dict[str, pa.Table], n_shown: int, unreadable: Collection[str]) -> dict[str, int]:
    """Numbers of the overview; a table that is not there is not counted."""
    dead = pc.sum(tables["neurons"]["dead"]).as_py() or 0
    counts = {"neurons": tables["neurons"].num_rows, "alive": tables["neurons"].num_rows - dead, "dead": dead}
    if "candidates" in tables:
        counts["candidates"] = pc.sum(tables["candidates"]["candidate"]).as_py() or 0
    if "names" in tables:
        counts["named"] = sum(c is not None and is_named(c) for c in tables["names"]["concept"].to_pylist())
    if "maps" in tables:
        counts["with_maps"] = pc.count_distinct(tables["maps"]["neuron"]).as_py()
    return {**counts, "radiographs": n_shown, "unreadable": len(unreadable)}


def _made(found: Survey) -> dict[str, Any]:
    embedded, fitted = found.manifests["embeddings"], found.manifests["sae"]
    named = found.manifests.get("names")
    return {
        "medsae-ray": version("medsae-ray"),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "encoder": f"{embedded.notes['encoder']}, weights SHA-256 {embedded.notes['weights_sha256'][:12]}",
        "SAE": f"{fitted.notes['architecture']}, fingerprint {fitted.fingerprint[:12]}",
        "neurons": f"fingerprint {found.manifests['neurons'].fingerprint[:12]}",
        **({"vision-language model": named.notes["model"]} if named else {}),
        "versions": fitted.versions,
    }


def _told(run: Run, manifest: Manifest) -> str:
    """Where to look, and which radiographs could not be shown."""
    lines = [
        f"{count:,} of {manifest.notes['radiographs']:,} radiographs have no picture in the report: {reason}"
        for reason, count in manifest.notes["unreadable"].items()
    ]
    index = f"{run.uri.rstrip('/')}/report/index.html"
    if run.is_local:
        lines.append(f"Open {run.path('report', 'index.html')}, or run `medsae report {run.root} --serve`.")
    else:
        lines.append(f"Copy {index.removesuffix('/index.html')} to a disk, whole, and open its index.html.")
    return "\n".join(lines)
