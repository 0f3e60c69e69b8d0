"""NIH ChestX-ray14.

Wang et al., CVPR 2017, arXiv:1705.02315. Labels were mined from the reports and name positives only.
"""

from __future__ import annotations

import csv
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.radiographs.files import Folder, join
from medsae_ray.radiographs.schema import (
    Boxes,
    Radiographs,
    Rows,
    age,
    assemble,
    image_id,
    sex,
    split_by_patient,
)
from medsae_ray.tables import TRUTH

FINDINGS: dict[str, str | None] = {
    "No Finding": "No Finding",
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Emphysema": None,
    "Fibrosis": None,
    "Hernia": None,
    "Infiltration": "Lung Opacity",
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pleural_Thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
}
"""The label that stands for each finding of NIH, None where the 14 have none. Infiltration, Mass, Nodule and
Pleural_Thickening are approximate: the label is the wider term."""

EXPRESSIBLE = tuple(name for name in LABELS if name in FINDINGS.values())
"""The labels NIH can give; the others (Enlarged Cardiomediastinum, Fracture, Support Devices) are null."""

BOX_FILE = "BBox_List_2017.csv"
FRAME = (1024, 1024)
"""Width and height, in pixels, of every original: boxes are told in them."""
_BOXED = FINDINGS | {"Infiltrate": FINDINGS["Infiltration"]}

_FOLDERS = re.compile(r"images(_\d{3})?")
# Data_Entry_2017.csv has 16 ages above 100 (to 414), typing errors: the corrected table ends at 95.
_AGE_LIMIT = 100


def read_nih(
    root: str,
    *,
    table: str | None = None,
    split: str = "patient",
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Radiographs:
    """Read `Data_Entry_2017_v2020.csv`, else `Data_Entry_2017.csv` (or `table`), in each of its forms.

    Images lie in `images/`, in `images_001/` … `images_012/` (with or without an `images/` of their own) or
    in `root`, as `NAME.png`, or else as `NAME.jpg` or `NAME.jpeg`; one that is not found keeps its row.

    Splits. Where `train_val_list.txt` and `test_list.txt` lie in `root`: the test list is test, and the
    other's patients go to train and valid in the ratio of `fractions` (it has no official valid set). Else
    `split_by_patient`; `split` = "official" then raises InputError.

    Labels. 1 where named; 0 where NIH could have named it and did not, which nobody verified; null for the
    three it never names. Emphysema, Fibrosis and Hernia have no label, but make No Finding 0.

    Columns. `sex` F or M. `age` in years, null above 100 (typing errors). `view` AP or PA. `study_id` is
    patient and `Follow-up #`, which is not the file name's number. `site` is null. The id's path is the
    `Image Index`, whatever the layout.

    Boxes. `BBox_List_2017.csv`, where it lies in `root`: see `read_boxes`.

    Refused, with the reason: a name of another form or of another patient than its row; a finding NIH does
    not have, none at all, or one beside No Finding; a value outside its column's domain; an image in
    neither list or in both. Raises InputError as `read_chexpert` does.
    """
    folder = Folder(root)
    found = folder.find("", *([table] if table else ["Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"]))
    if found is None:
        folder.check_exists()
        raise InputError(
            f"there is no {table or 'Data_Entry_2017_v2020.csv'} in {folder.root}: is that NIH's folder?"
        )
    csv = folder.read_csv(found)
    rows = Rows("nih", csv)

    name_column, patient_column = csv.require("Image Index"), csv.require("Patient ID")
    names, patients = rows.text(name_column), rows.text(patient_column)
    parsed = pc.extract_regex(names, r"^(?P<patient>[0-9]{8})_[0-9]{3}\.png$")
    rows.refuse(
        parsed.is_null().to_numpy(zero_copy_only=False), "Image Index is not of the form NNNNNNNN_NNN.png"
    )
    # The check that no column has slipped: a wrong patient would leak between the splits unseen.
    own = pc.equal(pc.utf8_lpad(patients, 8, "0"), pc.struct_field(parsed, "patient")).fill_null(False)
    rows.refuse(~own.to_numpy(zero_copy_only=False), "Patient ID is not the one in Image Index")

    stored = _stored_images(folder)
    columns = {
        "patient_id": patients,
        "study_id": pc.binary_join_element_wise(patients, rows.text(csv.require("Follow-up #")), "/"),
        "split": _splits(rows, folder, names.to_pylist(), patients.to_pylist(), split, fractions, seed),
        "view": rows.convert(csv.require("View Position"), _view, pa.string()),
        "sex": rows.convert(csv.require("Patient Gender", "Patient Sex"), sex, pa.string()),
        "age": rows.convert(csv.require("Patient Age"), lambda text: age(text, _AGE_LIMIT), pa.float32()),
    }
    findings = rows.convert(csv.require("Finding Labels"), _labels, pa.list_(pa.float32(), len(EXPRESSIBLE)))
    columns |= {name: pc.list_element(findings, i) for i, name in enumerate(EXPRESSIBLE)}
    uris = [folder.uri(_locate(stored, name)) for name in names.to_pylist()]
    return assemble([rows.finish(names, uris, columns)])._replace(boxes=read_boxes(folder))


def read_boxes(folder: Folder) -> Boxes | None:
    """The boxes that radiologists drew (984 on 880 images, eight findings), at `FRAME`; None without file.

    Raises InputError naming the first row that is no box of a finding: with a damaged list every figure
    would rest on fewer boxes than it says.
    """
    found = folder.find("", BOX_FILE)
    if found is None:
        return None
    rows = []
    # The header has nine names ("Bbox [x,y,w,h],,,") for the six fields of a row.
    for number, cells in enumerate(csv.reader(folder.read_lines(found)[1:]), start=2):
        try:
            rows.append(_box(cells))
        except ValueError as error:
            raise InputError(
                f"{folder.uri(found)}: row {number} {error}; mend it, or take the file away to have none."
            ) from None
    table = pa.Table.from_pylist(rows, TRUTH)
    return Boxes(table.sort_by([(name, "ascending") for name in TRUTH.names]), FRAME)


def _box(cells: list[str]) -> dict[str, str | float]:
    name, finding, *numbers = (cell.strip() for cell in cells)
    if len(numbers) < 4 or any(numbers[4:]):
        raise ValueError("has not the six fields image, finding, x, y, w, h")
    label = _BOXED.get(finding)
    if label is None:
        raise ValueError("names a finding that no label stands for")
    try:
        x, y, w, h = map(float, numbers[:4])
    except ValueError:
        raise ValueError("has a coordinate that is no number") from None
    # NaN fails every comparison.
    if not (0 <= x < FRAME[0] and 0 <= y < FRAME[1] and 0 < w < math.inf and 0 < h < math.inf):
        raise ValueError("has a box that is empty or begins outside the image")
    corners = {"x0": x, "y0": y, "x1": x + w, "y1": y + h}
    return {"image_id": image_id("nih", name), "finding": label, **corners}


def _view(text: str) -> str:
    if text not in ("AP", "PA"):
        raise ValueError("is not AP or PA")
    return text


def _labels(text: str) -> list[float]:
    """The `EXPRESSIBLE` labels of one cell of `Finding Labels`."""
    named = {finding.strip() for finding in text.split("|")}
    if named - set(FINDINGS):
        raise ValueError("names a finding that NIH ChestX-ray14 does not have")
    if "No Finding" in named and len(named) > 1:
        raise ValueError("names a finding beside No Finding")
    present = {FINDINGS[finding] for finding in named}
    return [float(name in present) for name in EXPRESSIBLE]


def _stored_images(folder: Folder) -> dict[str, str]:
    """File name → path below the root, of every image folder; `images/` first."""
    stored: dict[str, str] = {}
    for top in [name for name in folder.folders() if _FOLDERS.fullmatch(name)] + [""]:
        for place in [top] + [join(top, "images")] * ("images" in folder.folders(top) and top != ""):
            for name in folder.files(place):
                stored.setdefault(name, join(place, name))
    return stored


def _locate(stored: dict[str, str], name: str) -> str:
    stem = name.removesuffix(".png")
    for candidate in (name, f"{stem}.jpg", f"{stem}.jpeg"):
        if candidate in stored:
            return stored[candidate]
    return join("images", name)


def _splits(
    rows: Rows,
    folder: Folder,
    names: list[str],
    patients: list[str],
    split: str,
    fractions: tuple[float, float, float],
    seed: int,
) -> list[str]:
    lists = {"train_val_list.txt", "test_list.txt"}
    present = lists & set(folder.files())
    if present != lists and (present or split == "official"):
        missing = sorted(lists - present)[0]
        raise InputError(
            f"there is no {missing} in {folder.root}, which the official split of NIH needs: add it"
        )
    if not present:
        return split_by_patient(patients, fractions, seed)
    test = np.isin(names, folder.read_lines("test_list.txt"))
    other = np.isin(names, folder.read_lines("train_val_list.txt"))
    rows.refuse(~(test | other), "in neither train_val_list.txt nor test_list.txt")
    rows.refuse(test & other, "in both train_val_list.txt and test_list.txt")
    share = fractions[0] / (fractions[0] + fractions[1])
    drawn = split_by_patient(patients, (share, 1 - share, 0.0), seed)
    return ["test" if is_test else other_split for is_test, other_split in zip(test, drawn, strict=True)]
