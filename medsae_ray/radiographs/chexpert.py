"""CheXpert (v1.0 and v1.0-small), and whatever is laid out like it: our phantoms.

Irvin et al., 2019, arXiv:1901.07031. Labels are per study and copied to each of its views; a blank is a
finding the report does not mention; a finding's parent is not set with it (Cardiomegaly = 1 leaves Enlarged
Cardiomediastinum blank in most rows). All three stay as they are here: policies are `measure`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.radiographs.files import Folder, join
from medsae_ray.radiographs.schema import Radiographs, Rows, age, assemble, label, sex, split_by_patient

_TABLES = {
    "train": ("train.csv",),
    "valid": ("valid.csv", "val_labels.csv"),
    "test": ("test.csv", "test_labels.csv"),
}
_DETAILS = ("Sex", "Age", "Frontal/Lateral", "AP/PA")
_PATH = (
    r"^(?:.*/)?(?P<set>train|valid|val|test)/(?P<patient>patient[0-9]+)/(?P<study>study[0-9]+)/"
    r"(?P<file>view[0-9]+_(?P<plane>frontal|lateral)\.[A-Za-z]+)$"
)
Splitter = Callable[[Sequence[str]], list[str]]
_BATCH = re.compile(r"CheXpert-v1\.0 batch \d+ \(train \d+\)")


def read_chexpert(
    root: str,
    *,
    dataset: str = "chexpert",
    split: str = "patient",
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Radiographs:
    """Read `train.csv` and, where present, `valid.csv` and `test.csv` (or `test_labels.csv`).

    They lie in `root` or in one folder `CheXpert…` of it: v1.0, v1.0-small, copies without that folder, and
    the four archives of v1.0 as they come (`CheXpert-v1.0 batch 1 (validate & csv)`, `… 2 (train 1)` …).

    Splits. "patient": the rows of `train.csv` go to train, valid and test by `split_by_patient`; the
    official sets, too small for thousands of neurons, are `official_valid` and `official_test`.
    "official": the three files are train, valid and test, and all must be there.

    Columns. `sex` F or M (null: Unknown). `age` in years, capped at 90 by the data set (null: 0, which
    stands for missing). `view`: AP, PA, LL or RL as given; LATERAL; FRONTAL where only the file name is
    known (`test_labels.csv` has labels alone). `site` is null. The id's path is `Path` from train/, valid/
    or test/ on, so that the full and the small release share ids.

    Refused, with the reason: a `Path` of another form; a value outside its column's domain.
    Raises InputError for a missing file or column, an empty table, an image listed twice, and a patient in
    two splits.
    """
    folder = Folder(root)
    base = _base(folder)
    parts = []
    for name, files in _TABLES.items():
        found = folder.find(base, *files) or folder.find("", *files)
        if found:
            rows = Rows(dataset, folder.read_csv(found))
            if split == "official":
                splits: Splitter = partial(_all_in, name)
            elif name == "train":
                splits = partial(split_by_patient, fractions=fractions, seed=seed)
            else:
                splits = partial(_all_in, f"official_{name}")
            parts.append(_read(rows, folder, base, name, splits))
        elif split == "official":
            raise InputError(
                f"there is no {files[0]} in {folder.uri(base)}, which radiographs.split: official needs: "
                "add it, or set radiographs.split: patient"
            )
    return assemble(parts)


def _base(folder: Folder) -> str:
    """The folder of `train.csv`, relative to the root."""
    if folder.find("", *_TABLES["train"]):
        return ""
    folder.check_exists()
    bases = [
        name for name in folder.folders() if name.startswith("CheXpert") and folder.find(name, "train.csv")
    ]
    if len(bases) != 1:
        problem = f"{len(bases)} folders CheXpert… with a train.csv" if bases else "no train.csv"
        raise InputError(f"radiographs.root: {folder.root} holds {problem}: name the folder of one data set")
    return bases[0]


def _all_in(split: str, patients: Sequence[str]) -> list[str]:
    return [split] * len(patients)


def _read(rows: Rows, folder: Folder, base: str, name: str, splits: Splitter) -> Radiographs:
    for column in ("Path", *LABELS, *(_DETAILS if name != "test" else ())):
        rows.csv.require(column)

    path = pc.extract_regex(pc.replace_substring(rows.text("Path"), "\\", "/"), _PATH)
    unparsed = path.is_null().to_numpy(zero_copy_only=False)
    rows.refuse(unparsed, "Path is not of the form train/patientN/studyN/viewN_frontal.jpg")
    patient, study, file = (pc.struct_field(path, part) for part in ("patient", "study", "file"))
    relative = pc.binary_join_element_wise(pc.struct_field(path, "set"), patient, study, file, "/")
    within = pc.binary_join_element_wise(patient, study, file, "/")
    images = _image_folders(folder, base, name)
    uris = [
        None if inner is None else folder.uri(f"{images.get(who, images[''])}/{inner}")
        for who, inner in zip(patient.to_pylist(), within.to_pylist(), strict=True)
    ]
    patients = patient.to_pylist()
    columns = {
        "patient_id": patient,
        "study_id": pc.binary_join_element_wise(patient, study, "/"),
        "split": splits(patients),
        "view": _view(rows, pc.struct_field(path, "plane")),
        **{finding: rows.convert(finding, label, pa.float32()) for finding in LABELS},
    }
    if "Sex" in rows.csv.table.column_names:
        columns["sex"] = rows.convert("Sex", sex, pa.string())
    if "Age" in rows.csv.table.column_names:
        columns["age"] = rows.convert("Age", lambda text: age(text) or None, pa.float32())
    return rows.finish(relative, uris, columns)


def _view(rows: Rows, plane: pa.Array) -> pa.Array:
    """The projection; the side of a lateral view is not given, and 17 frontal rows are LL or RL."""

    def one_of(*names: str) -> Callable[[str], str]:
        def convert(text: str) -> str:
            if text not in names:
                raise ValueError(
                    f"is not {', '.join(filter(None, names))}{' or blank' if '' in names else ''}"
                )
            return text or "FRONTAL"

        return convert

    present = rows.csv.table.column_names
    if "Frontal/Lateral" in present:
        plane = pc.utf8_lower(rows.convert("Frontal/Lateral", one_of("Frontal", "Lateral"), pa.string()))
    projection: pa.Array | str = "FRONTAL"
    if "AP/PA" in present:
        projection = rows.convert("AP/PA", one_of("AP", "PA", "LL", "RL", ""), pa.string())
    return pc.if_else(pc.equal(plane, "lateral"), "LATERAL", projection)


def _image_folders(folder: Folder, base: str, name: str) -> dict[str, str]:
    """Where the patients' folders lie: by patient where the archives part them, "" for all others."""
    for place in (base, ""):
        for stored in (name, "val") if name == "valid" else (name,):
            if stored in folder.folders(place):
                return {"": join(place, stored)}
    batches = [batch for batch in folder.folders() if _BATCH.fullmatch(batch)] if name == "train" else []
    return {"": join(base, name)} | {patient: batch for batch in batches for patient in folder.folders(batch)}
