"""NIH ChestX-ray14's headers, layouts and pitfalls, and the 720 real radiographs."""

import io
from pathlib import Path

import pytest
from PIL import Image

from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.radiographs import read_radiographs
from medsae_ray.radiographs.decode import decode
from medsae_ray.radiographs.schema import image_id

SHARED = Path(__file__).parents[2].parent / "shared" / "radiographs" / "nih"
needs_radiographs = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/radiographs")

V2020 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
V2017 = V2020 + ","
LATER = V2020.replace("Patient Gender", "Patient Sex") + ","
NEVER_NAMED = ("Enlarged Cardiomediastinum", "Fracture", "Support Devices")


def row(
    name="00000061_012.png", findings="No Finding", follow_up="12", patient=None, age="77", sex="M", view="AP"
):
    patient = patient or name[:8].lstrip("0")
    return f"{name},{findings},{follow_up},{patient},{age},{sex},{view},3056,2544,0.139,0.139"


def write(root, *rows, header=V2020, name="Data_Entry_2017_v2020.csv"):
    tail = "," if header.endswith(",") else ""
    (root / name).write_text("\n".join([header, *[r + tail for r in rows]]) + "\n")


def read(root, **settings):
    found = read_radiographs("nih", str(root), **settings)
    return {r["image_id"]: r for r in found.table.to_pylist()}, found.refused.to_pylist()


def read_one(root, *rows, **settings):
    write(root, *rows)
    table, refused = read(root, **settings)
    assert len(table) + len(refused) == len(rows)
    return list(table.values()), refused


@pytest.mark.parametrize("header", [V2020, V2017, LATER])
@pytest.mark.parametrize("name", ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"])
def test_each_header(tmp_path, header, name):
    write(tmp_path, row(findings="Edema|Effusion"), header=header, name=name)
    table, refused = read(tmp_path)
    assert refused == []
    assert table == {
        (key := image_id("nih", "00000061_012.png")): dict.fromkeys(LABELS, 0.0)
        | dict.fromkeys(NEVER_NAMED)
        | {
            "image_id": key,
            "uri": str(tmp_path / "images/00000061_012.png"),
            "patient_id": "61",
            "study_id": "61/12",
            "split": table[key]["split"],
            "view": "AP",
            "sex": "M",
            "age": 77.0,
            "site": None,
            "Edema": 1.0,
            "Pleural Effusion": 1.0,
        }
    }


def test_the_corrected_table_is_preferred_and_another_can_be_named(tmp_path):
    write(tmp_path, row(age="414"), header=V2017, name="Data_Entry_2017.csv")
    write(tmp_path, row(age="14"))
    assert [r["age"] for r in read(tmp_path)[0].values()] == [14.0]
    assert [r["age"] for r in read(tmp_path, table="Data_Entry_2017.csv")[0].values()] == [None]


@pytest.mark.parametrize(
    ("age", "years"), [("0", 0), ("95", 95), ("100", 100), ("101", None), ("414", None), ("058Y", 58)]
)
def test_ages(tmp_path, age, years):
    (one,), _ = read_one(tmp_path, row(age=age))
    assert one["age"] == years


@pytest.mark.parametrize(
    ("findings", "positive"),
    [
        ("No Finding", {"No Finding"}),
        ("Infiltration", {"Lung Opacity"}),
        ("Mass|Nodule", {"Lung Lesion"}),
        ("Mass", {"Lung Lesion"}),
        ("Nodule", {"Lung Lesion"}),
        ("Pleural_Thickening|Effusion", {"Pleural Other", "Pleural Effusion"}),
        ("Emphysema|Fibrosis|Hernia", set()),
        (
            "Atelectasis|Cardiomegaly|Consolidation|Edema|Pneumonia|Pneumothorax",
            {"Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pneumonia", "Pneumothorax"},
        ),
    ],
)
def test_findings(tmp_path, findings, positive):
    (one,), _ = read_one(tmp_path, row(findings=findings))
    assert {name for name in LABELS if one[name] == 1} == positive
    assert {name for name in LABELS if one[name] is None} == set(NEVER_NAMED)
    assert all(one[name] in (0, 1, None) for name in LABELS)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(findings="Infiltrate"), "Finding Labels names a finding that NIH"),
        (row(findings=""), "Finding Labels names a finding that NIH"),
        (row(findings="No Finding|Mass"), "Finding Labels names a finding beside No Finding"),
        (row(view="LL"), "View Position is not AP or PA"),
        (row(sex="X"), "Patient Gender is not a sex"),
        (row(age="?"), "Patient Age is not a number"),
        (row(patient="62"), "Patient ID is not the one in Image Index"),
        (row(name="61.png", patient="61"), "Image Index is not of the form"),
    ],
)
def test_values_outside_the_domain_refuse_the_row(tmp_path, bad, reason):
    good, (refused,) = read_one(tmp_path, bad, row("00000070_000.png"))
    assert len(good) == 1
    assert refused["reason"].startswith(reason)
    assert refused["image_id"] == image_id("nih", bad.split(",")[0])


def test_the_follow_up_number_is_not_the_file_names(tmp_path):
    (one,), refused = read_one(tmp_path, row(follow_up="3"))
    assert refused == []
    assert one["study_id"] == "61/3"


@pytest.mark.parametrize(
    "stored",
    [
        "images/00000061_012.png",
        "images_001/images/00000061_012.png",
        "images_012/00000061_012.png",
        "00000061_012.png",
        "images/00000061_012.jpg",
        "images_003/images/00000061_012.jpeg",
    ],
)
def test_images_are_found_in_each_layout(tmp_path, stored):
    (tmp_path / stored).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / stored).touch()
    (one,), _ = read_one(tmp_path, row())
    assert one["uri"] == str(tmp_path / stored)


def test_the_exact_name_is_preferred_and_other_folders_are_not_searched(tmp_path):
    for stored in ("images/00000061_012.jpg", "images_002/00000061_012.png", "images_1024/00000061_012.png"):
        (tmp_path / stored).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / stored).touch()
    (one,), _ = read_one(tmp_path, row())
    assert one["uri"] == str(tmp_path / "images_002/00000061_012.png")
    (tmp_path / "images/00000061_012.png").touch()
    (again,), _ = read_one(tmp_path, row())
    assert again["uri"] == str(tmp_path / "images/00000061_012.png")


NAMES = [f"{patient:08d}_{k:03d}.png" for patient in range(1, 101) for k in range(2)]


def official(root, train_val=NAMES[:160], test=NAMES[160:]):
    (root / "train_val_list.txt").write_text("\n".join(train_val))
    (root / "test_list.txt").write_text("\r\n".join(test) + "\r\n")


@pytest.mark.parametrize("split", ["patient", "official"])
def test_the_official_lists_are_followed(tmp_path, split):
    official(tmp_path)
    rows, refused = read_one(tmp_path, *[row(name) for name in NAMES], split=split)
    assert refused == []
    assert {r["split"] for r in rows if int(r["patient_id"]) > 80} == {"test"}
    assert {r["split"] for r in rows if int(r["patient_id"]) <= 80} == {"train", "valid"}


def test_without_lists_the_split_is_by_patient(tmp_path):
    rows, _ = read_one(tmp_path, *[row(name) for name in NAMES])
    assert {r["split"] for r in rows} == {"train", "valid", "test"}
    assert len({(r["patient_id"], r["split"]) for r in rows}) == 100
    with pytest.raises(InputError, match=r"no test_list\.txt"):
        read(tmp_path, split="official")


def test_a_list_alone_is_an_error(tmp_path):
    write(tmp_path, row())
    (tmp_path / "test_list.txt").write_text("00000061_012.png\n")
    with pytest.raises(InputError, match=r"no train_val_list\.txt"):
        read(tmp_path)


def test_images_in_no_list_or_in_both_are_refused(tmp_path):
    official(tmp_path, NAMES[:4], NAMES[2:6])
    _, refused = read_one(tmp_path, *[row(name) for name in NAMES[:8]])
    assert (
        sorted(r["reason"] for r in refused)
        == ["in both train_val_list.txt and test_list.txt"] * 2
        + ["in neither train_val_list.txt nor test_list.txt"] * 2
    )


def test_lists_that_part_a_patient_are_an_error(tmp_path):
    official(tmp_path, NAMES[:3], NAMES[3:])
    with pytest.raises(InputError, match="1 patients have images in more than one split"):
        read_one(tmp_path, *[row(name) for name in NAMES])


def test_a_missing_column_and_a_missing_table(tmp_path):
    with pytest.raises(InputError, match=r"no Data_Entry_2017_v2020\.csv"):
        read(tmp_path)
    write(tmp_path, row(), header=V2020.replace("Finding Labels", "Findings Label"))
    with pytest.raises(
        InputError, match="no column 'Finding Labels': the nearest it has is 'Findings Label'"
    ):
        read(tmp_path)


@needs_radiographs
def test_the_720_real_radiographs():
    table, refused = read(SHARED)
    assert len(table) == 720
    assert refused == []
    assert all(Path(r["uri"]).is_file() for r in table.values())
    assert {r["split"] for r in table.values()} == {"train", "valid", "test"}


@needs_radiographs
def test_a_real_original_as_rgba_decodes_to_its_grey_self():
    originals = sorted((SHARED / "images_1024").glob("*.png"))
    assert len(originals) == 20
    for original in originals:
        assert decode(original.read_bytes()).mode == "L"
    with Image.open(originals[0]) as image:
        buffer = io.BytesIO()
        image.convert("RGBA").save(buffer, "PNG")
    assert decode(buffer.getvalue()).tobytes() == decode(originals[0].read_bytes()).tobytes()
