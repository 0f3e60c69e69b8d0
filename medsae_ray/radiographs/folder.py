"""A plain folder of images with a CSV: anyone's own radiographs."""

from __future__ import annotations

from difflib import get_close_matches

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.radiographs.files import Csv, Folder
from medsae_ray.radiographs.schema import Radiographs, Rows, age, assemble, label, sex, split_by_patient
from medsae_ray.tables import SPLITS

REQUIRED = ("path", "patient_id")
OPTIONAL = ("study_id", "split", "view", "sex", "age", "site")


def read_folder(
    root: str,
    *,
    table: str | None = None,
    name: str = "folder",
    split: str = "patient",
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Radiographs:
    """Read `radiographs.csv` (or the file `table`) in `root`.

    Columns, by these names: `path` (below `root`, or absolute, or a URI) and `patient_id`; where known
    `study_id`, `split` (train, valid, test, official_valid or official_test), `view`, `sex`, `age` (years),
    `site`, and any of the 14 labels (1, 0, -1 uncertain, blank not mentioned). Other columns are ignored,
    except one that is nearly one of these names, which is an error.

    Without a `split` column the split is `split_by_patient`, and `split` = "official" raises InputError.
    `view` is written in capitals. `sex` becomes F, M, O or null; `age` outside 0 to 120 becomes null.

    Refused, with the reason: a blank path or patient_id; a value outside its column's domain.
    Raises InputError as `read_chexpert` does, and for a split of another name.
    """
    folder = Folder(root)
    wanted = table or "radiographs.csv"
    found = folder.find("", wanted)
    if found is None:
        folder.check_exists()
        raise InputError(f"there is no {wanted} in {folder.root}: add it, or name it in radiographs.table")
    csv = folder.read_csv(found)
    for column in REQUIRED:
        csv.require(column)
    _check_names(csv)
    rows, present = Rows(name, csv), csv.table.column_names

    paths = pc.replace_substring_regex(pc.replace_substring(rows.text("path"), "\\", "/"), r"^(\./)+", "")
    patients = rows.text("patient_id").to_pylist()
    for column, cells in (("path", paths.to_pylist()), ("patient_id", patients)):
        rows.refuse(np.equal(cells, ""), f"{column} is blank")
    columns = {
        "patient_id": patients,
        "split": _splits(rows, split) or split_by_patient(patients, fractions, seed),
    }
    for column in ("study_id", "site"):
        if column in present:
            columns[column] = rows.convert(column, lambda text: text or None, pa.string())
    if "view" in present:
        columns["view"] = rows.convert("view", lambda text: text.upper() or None, pa.string())
    if "sex" in present:
        columns["sex"] = rows.convert("sex", sex, pa.string())
    if "age" in present:
        columns["age"] = rows.convert("age", age, pa.float32())
    columns |= {
        finding: rows.convert(finding, label, pa.float32()) for finding in LABELS if finding in present
    }
    paths = pc.if_else(pc.equal(paths, ""), None, paths)
    uris = [
        path if path is None or "://" in path or path.startswith("/") else folder.uri(path)
        for path in paths.to_pylist()
    ]
    return assemble([rows.finish(paths, uris, columns)])


def _check_names(csv: Csv) -> None:
    """A misspelt label would silently be a label that is null everywhere."""
    known = {_plain(name): name for name in (*REQUIRED, *OPTIONAL, *LABELS)}
    for column in csv.table.column_names:
        if column and column not in known.values():
            near = get_close_matches(_plain(column), known, n=1, cutoff=0.9)
            if near:
                raise InputError(f"{csv.uri} has a column {column!r}: write {known[near[0]]!r}, or rename it")


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _splits(rows: Rows, split: str) -> list[str] | None:
    if "split" not in rows.csv.table.column_names:
        if split == "official":
            raise InputError(
                f"{rows.csv.uri} has no column 'split', which radiographs.split: official needs: "
                "add it, or set radiographs.split: patient"
            )
        return None
    splits = rows.text("split").to_pylist()
    for row, value in zip(rows.csv.rows, splits, strict=True):
        if value not in SPLITS:
            raise InputError(f"{rows.csv.uri}, row {row}: split {value!r} is not one of {', '.join(SPLITS)}")
    return splits
