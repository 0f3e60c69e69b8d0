"""The one `radiographs` schema: image ids, splits by patient, and the checks every data set passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.radiographs.files import Csv
from medsae_ray.tables import QUARANTINE, RADIOGRAPHS, SPLITS

STAGE = "radiographs"
LABEL_DOMAIN = (1.0, 0.0, -1.0)


class Boxes(NamedTuple):
    """Where readers saw the findings of some radiographs."""

    table: pa.Table
    """In `tables.TRUTH`, without severity, sorted by all columns; of images that may have no row."""
    frame: tuple[int, int]
    """Width and height, in pixels, of the image in which the boxes are told, whatever is stored."""


class Radiographs(NamedTuple):
    """What a reader makes of a data set: every row of its tables is in `table` or in `refused`, once."""

    table: pa.Table
    """The usable rows, in `tables.RADIOGRAPHS`, sorted by image_id."""
    refused: pa.Table
    """The others, in `tables.QUARANTINE` (stage "radiographs"), sorted by image_id. `uri` is the image's,
    or, where the row names none, the table's with `#row=N` (the header is row 1)."""
    boxes: Boxes | None = None
    """None where the data set has none, or not their file."""


def image_id(dataset: str, relative_path: str) -> str:
    """`dataset` and 16 hex digits of the SHA-256 of the path inside the data set (`/` as separator).

    The same image has the same id on every machine, and the id says nothing about the patient.
    """
    return f"{dataset}-{sha256(relative_path.encode()).hexdigest()[:16]}"


def split_by_patient(
    patient_ids: Sequence[str], fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0
) -> list[str]:
    """`train`, `valid` or `test` for each row, the same for all the rows of a patient.

    A patient's split follows from SHA-256 of (seed, patient id) alone, read as a number in [0, 1): neither
    the order of the rows nor the other patients change it. So `fractions` (train, valid, test; of
    patients) are met approximately: within ± 2 % at 1,000 patients.

    Raises InputError when the fractions are not three numbers >= 0 that sum to 1, the first > 0.
    """
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError(
            f"radiographs.fractions is {list(fractions)}: give the shares of train (> 0), valid and test"
        )
    train, valid, _ = fractions

    def draw(patient: str) -> str:
        digest = sha256(f"{seed}:{patient}".encode()).digest()
        number = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
        return "train" if number < train else "valid" if number < train + valid else "test"

    split = {patient: draw(patient) for patient in set(patient_ids)}
    return [split[patient] for patient in patient_ids]


class Rows:
    """The records of one CSV on their way into the schema.

    Each conversion notes why a row cannot be used (the first reason stands); `finish` parts them.
    """

    def __init__(self, dataset: str, csv: Csv) -> None:
        self.dataset, self.csv = dataset, csv
        self._usable = np.ones(csv.table.num_rows, dtype=bool)
        self._reasons = np.full(csv.table.num_rows, "", dtype=object)

    def refuse(self, where: np.ndarray, reason: str) -> None:
        """Note `reason` for the rows of a boolean mask [n] that have none yet."""
        self._reasons[where & self._usable] = reason
        self._usable[where] = False

    def text(self, column: str) -> pa.Array:
        """A column as strings, stripped, blank cells as ""."""
        return pc.utf8_trim_whitespace(pc.fill_null(self.csv.table[column], "").combine_chunks())

    def convert(self, column: str, function: Callable[[str], Any], type_: pa.DataType) -> pa.Array:
        """`function` of each cell of a column (called once for each distinct value).

        A ValueError refuses the rows with that value, for the reason "<column> <message>".
        """
        encoded = self.text(column).dictionary_encode()
        codes = encoded.indices.to_numpy()
        values = []
        for code, value in enumerate(encoded.dictionary.to_pylist()):
            try:
                values.append(function(value))
            except ValueError as error:
                values.append(None)
                self.refuse(codes == code, f"{column} {error}")
        return pa.array(values, type_).take(encoded.indices)

    def finish(self, paths: pa.Array, uris: Sequence[str | None], columns: dict[str, Any]) -> Radiographs:
        """The rows, parted into usable and refused; ids are made of `paths` (null where a row has none)."""
        file_name = self.csv.uri.rsplit("/", 1)[-1]
        ids = [
            image_id(self.dataset, path if path is not None else f"{file_name}#row={row}")
            for path, row in zip(paths.to_pylist(), self.csv.rows.tolist(), strict=True)
        ]
        known = {"image_id": ids, "uri": uris, **columns}
        table = pa.table(
            [
                pa.array(known[name], type_) if name in known else pa.nulls(len(ids), type_)
                for name, type_ in zip(RADIOGRAPHS.names, RADIOGRAPHS.types, strict=True)
            ],
            schema=RADIOGRAPHS,
        )
        refused = [
            (ids[i], uris[i] or f"{self.csv.uri}#row={self.csv.rows[i]}", self._reasons[i])
            for i in np.flatnonzero(~self._usable).tolist()
        ]
        for row, reason in self.csv.malformed:
            place = f"#row={row}"
            refused.append((image_id(self.dataset, file_name + place), self.csv.uri + place, reason))
        return Radiographs(
            table.filter(pa.array(self._usable)),
            pa.Table.from_pylist(
                [{"image_id": i, "uri": u, "stage": STAGE, "reason": r} for i, u, r in refused], QUARANTINE
            ),
        )


def label(text: str) -> float | None:
    """A label's cell: 1, 0, -1, or None for a blank."""
    if text.lower() in ("", "nan"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if value not in LABEL_DOMAIN:
        raise ValueError("is not 1, 0, -1 or blank")
    return value


def sex(text: str) -> str | None:
    """`F`, `M`, `O` (other), or None for a blank or an unknown one."""
    known = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}
    if text.lower() in ("", "nan", "unknown"):
        return None
    if text.lower() not in known:
        raise ValueError("is not a sex (male, female, other, unknown or blank)")
    return known[text.lower()]


def age(text: str, highest: float = 120) -> float | None:
    """Years, from a number or a DICOM age string (`060Y`, `018M`, `003W`, `012D`).

    None for a blank and for what no patient can be: below 0 or above `highest`.
    """
    if text.lower() in ("", "nan"):
        return None
    unit = {"Y": 1.0, "M": 12.0, "W": 52.18, "D": 365.25}.get(text[-1].upper())
    try:
        years = float(text[:-1]) / unit if unit else float(text)
    except ValueError:
        raise ValueError("is not a number of years") from None
    return years if 0 <= years <= highest else None


def assemble(parts: Sequence[Radiographs]) -> Radiographs:
    """The parts of a data set as one, sorted by image_id and checked.

    Raises InputError when no row is usable, an image is listed twice, or a patient is in two splits.
    """
    table = pa.concat_tables([part.table for part in parts]).combine_chunks().sort_by("image_id")
    refused = pa.concat_tables([part.refused for part in parts]).combine_chunks().sort_by("image_id")
    if table.num_rows == 0:
        reasons = pc.value_counts(refused["reason"]).to_pylist()
        commonest = max(reasons, key=lambda count: count["counts"])["values"]
        raise InputError(f"all {refused.num_rows} rows are refused, most because: {commonest}")
    _check_unique(pa.chunked_array([*table["image_id"].chunks, *refused["image_id"].chunks]))
    check(table)
    return Radiographs(table, refused)


def check(table: pa.Table) -> None:
    """What holds for every `radiographs` table; InputError where it does not.

    Unique image ids, known splits, labels in {1, 0, -1, null}, and no patient in two splits.
    """
    if not table.schema.equals(RADIOGRAPHS):
        raise InputError("the radiographs table has other columns than its schema: read the data set again")
    _check_unique(table["image_id"])
    unknown = set(table["split"].unique().to_pylist()) - set(SPLITS)
    if unknown:
        raise InputError(f"split {sorted(map(str, unknown))[0]!r} is not one of {', '.join(SPLITS)}")
    for name in LABELS:
        outside = set(table[name].unique().to_pylist()) - {*LABEL_DOMAIN, None}
        if outside:
            raise InputError(f"label {name!r} has the value {outside.pop()}: it must be 1, 0, -1 or null")
    splits = table.group_by("patient_id").aggregate([("split", "count_distinct")])
    shared = splits.filter(pc.greater(splits["split_count_distinct"], 1))["patient_id"]
    if len(shared):
        example = table.filter(pc.equal(table["patient_id"], shared[0]))["image_id"][0]
        raise InputError(
            f"{len(shared)} patients have images in more than one split (one of the images: {example}): "
            "splits must be disjoint by patient"
        )


def _check_unique(ids: pa.ChunkedArray) -> None:
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(twice):
        raise InputError(
            f"{len(twice)} images are listed more than once (one of them: {twice[0]}): list each once"
        )
