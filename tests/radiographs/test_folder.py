import pytest

from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.radiographs import read_radiographs
from medsae_ray.radiographs.folder import read_folder
from medsae_ray.radiographs.schema import image_id

FULL = (
    "path,patient_id,study_id,split,view,sex,age,site,Edema,Pleural Effusion,notes\n"
    'a/1.png,007,s1,train,pa,Female,61.5,north,1,-1,"seen, twice"\n'
    "b\\2.jpg,8,,valid,Lateral,,,,,0,\n"
)


def read(root, text=None, **settings):
    if text is not None:
        (root / settings.get("table", "radiographs.csv")).write_text(text)
    found = read_radiographs("folder", str(root), **settings)
    return {r["image_id"]: r for r in found.table.to_pylist()}, found.refused.to_pylist()


def test_every_column(tmp_path):
    table, refused = read(tmp_path, FULL)
    assert refused == []
    first, second = image_id("folder", "a/1.png"), image_id("folder", "b/2.jpg")
    assert table[first] == dict.fromkeys(LABELS) | {
        "image_id": first,
        "uri": str(tmp_path / "a/1.png"),
        "patient_id": "007",
        "study_id": "s1",
        "split": "train",
        "view": "PA",
        "sex": "F",
        "age": 61.5,
        "site": "north",
        "Edema": 1.0,
        "Pleural Effusion": -1.0,
    }
    assert table[second] == dict.fromkeys(LABELS) | {
        "image_id": second,
        "uri": str(tmp_path / "b/2.jpg"),
        "patient_id": "8",
        "study_id": None,
        "split": "valid",
        "view": "LATERAL",
        "sex": None,
        "age": None,
        "site": None,
        "Pleural Effusion": 0.0,
    }


def test_two_columns_are_enough_and_the_split_is_then_by_patient(tmp_path):
    table, _ = read(tmp_path, "path,patient_id\n" + "".join(f"{i}.png,p{i // 3}\n" for i in range(300)))
    assert {r["split"] for r in table.values()} == {"train", "valid", "test"}
    assert len({(r["patient_id"], r["split"]) for r in table.values()}) == 100
    with pytest.raises(InputError, match="has no column 'split'"):
        read(tmp_path, split="official")


def test_the_table_and_the_name_of_the_data_set_can_be_given(tmp_path):
    (tmp_path / "mine.csv").write_text("path,patient_id\n1.png,1\n")
    found = read_folder(str(tmp_path), table="mine.csv", name="mine")
    assert found.table["image_id"].to_pylist() == [image_id("mine", "1.png")]


def test_paths_may_be_absolute_or_uris(tmp_path):
    table, _ = read(tmp_path, "path,patient_id\n/data/1.png,1\ns3://bucket/2.png,2\n./3.png,3\n")
    assert {r["uri"] for r in table.values()} == {"/data/1.png", "s3://bucket/2.png", str(tmp_path / "3.png")}


@pytest.mark.parametrize(
    ("column", "near"),
    [
        ("Pleural effusion", "Pleural Effusion"),
        ("pneumonia", "Pneumonia"),
        ("Oedema", "Edema"),
        ("Sex", "sex"),
    ],
)
def test_a_nearly_right_column_is_an_error_that_names_the_right_one(tmp_path, column, near):
    with pytest.raises(InputError, match=rf"radiographs\.csv has a column '{column}': write '{near}'"):
        read(tmp_path, f"path,patient_id,{column}\n1.png,1,1\n")


def test_other_columns_are_ignored(tmp_path):
    table, _ = read(tmp_path, "path,patient_id,Emphysema,weight,\n1.png,1,1,70,\n")
    assert len(table) == 1


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,Patient", "no column 'patient_id': the nearest it has is 'Patient'"),
        ("file,patient_id", "no column 'path'"),
    ],
)
def test_a_missing_column_is_an_error(tmp_path, header, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, f"{header}\n1.png,1\n")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (",1,,", "path is blank"),
        ("1.png, ,,", "patient_id is blank"),
        ("1.png,1,3,", "Edema is not 1, 0, -1 or blank"),
        ("1.png,1,,tall", "age is not a number of years"),
        ("1.png,1", "2 fields, not 4"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tmp_path, row, reason):
    table, (refused,) = read(tmp_path, f"path,patient_id,Edema,age\n0.png,0,,\n{row}\n")
    assert len(table) == 1
    assert refused["reason"] == reason


def test_a_split_of_another_name_is_an_error(tmp_path):
    with pytest.raises(InputError, match="row 3: split 'val' is not one of train, valid, test"):
        read(tmp_path, "path,patient_id,split\n1.png,1,train\n2.png,2,val\n")


def test_given_splits_must_be_disjoint_by_patient(tmp_path):
    with pytest.raises(InputError, match="1 patients have images in more than one split"):
        read(tmp_path, "path,patient_id,split\n1.png,1,train\n2.png,1,test\n")


def test_a_missing_table_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"no radiographs\.csv in"):
        read(tmp_path)
    with pytest.raises(InputError, match="no folder at"):
        read(tmp_path / "nosuch")
