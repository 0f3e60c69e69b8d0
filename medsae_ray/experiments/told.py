"""How an experiment is told: its table, figure and text in the run, and on the console."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from medsae_ray.run import Run, Staging
from medsae_ray.stages.outcome import Outcome
from medsae_ray.tables import EXPERIMENT


def mean_sd(rows: list[dict[str, Any]], name: str, form: str) -> str:
    """`mean ± sd` of a column over seeds; the mean alone where there is one."""
    values = np.array([row[name] for row in rows], dtype=np.float64)
    told = format(values.mean(), form)
    return told if len(values) < 2 else f"{told} ± {format(values.std(ddof=1), form)}"


def table_text(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first one left, the others right."""
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [heads, *lines]
    )


def tell_again(run: Run, table: str) -> Outcome:
    """Print the text of an experiment that is done."""
    print(f"\n{run.read_bytes(table, f'{table}.txt').decode()}")
    return Outcome(run.require(table, table), ran=False)


def write_experiment(
    run: Run,
    staging: Staging,
    rows: list[dict[str, Any]],
    text: str,
    figures: Mapping[str, Callable[[Any], Any]],
) -> Outcome:
    """Commit the table with its figures (name → function of the table) and text, and print the text."""
    from medsae_ray.report.figures import figure_files

    name = staging.plan.table
    told = [{field.name: row.get(field.name) for field in EXPERIMENT} for row in rows]
    table = pa.Table.from_pylist(told, EXPERIMENT)
    staging.write_table(table)
    for figure, draw in figures.items():
        for file, content in figure_files(draw(table), figure).items():
            staging.write_bytes(content, file)
    staging.write_bytes((text + "\n").encode(), f"{name}.txt")
    stand_ins = run.require("embeddings", "embed").stand_ins
    manifest = staging.commit(rows_in=len(rows), rows_out=table.num_rows, notes={"text": text})
    print(f"\n{text}\n")
    if stand_ins:
        print(f"STAND-IN MODELS ({', '.join(stand_ins)}): these figures say nothing about MedCLIP.")
    return Outcome(manifest, ran=True)
