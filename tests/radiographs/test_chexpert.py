"""CheXpert's layouts, columns and pitfalls."""

import gzip

import pytest

from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.radiographs import read_radiographs
from medsae_ray.radiographs.schema import image_id

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS]


def row(path, sex="Male", age="68", plane="Frontal", projection="AP", **labels):
    labels = {name.replace("_", " "): value for name, value in labels.items()}
    return [path, sex, age, plane, projection, *[labels.get(name, "") for name in LABELS]]


def write(folder, name, rows, header=HEADER):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(",".join(cells) + "\n" for cells in [header, *rows]))


def path(patient=1, study=1, view="view1_frontal.jpg", part="train", root="CheXpert-v1.0/"):
    return f"{root}{part}/patient{patient:05d}/study{study}/{view}"


def read(root, **settings):
    found = read_radiographs("chexpert", str(root), **settings)
    return {r["uri"]: r for r in found.table.to_pylist()}, found.refused.to_pylist()


def read_one(tmp_path, *rows, **settings):
    write(tmp_path, "train.csv", rows)
    table, refused = read(tmp_path, **settings)
    assert len(table) + len(refused) == len(rows)
    return list(table.values()), refused


def test_a_row_in_the_schema(tmp_path):
    (one,), refused = read_one(
        tmp_path,
        row(path(42, 3), "Female", "90", "Frontal", "PA", Edema="-1.0", Fracture="0.0", Lung_Lesion="1"),
    )
    assert refused == []
    relative = "train/patient00042/study3/view1_frontal.jpg"
    assert one == dict.fromkeys(LABELS) | {
        "image_id": image_id("chexpert", relative),
        "uri": str(tmp_path / relative),
        "patient_id": "patient00042",
        "study_id": "patient00042/study3",
        "split": one["split"],
        "view": "PA",
        "sex": "F",
        "age": 90.0,
        "site": None,
        "Edema": -1.0,
        "Fracture": 0.0,
        "Lung Lesion": 1.0,
    }
    assert one["split"] in ("train", "valid", "test")


@pytest.mark.parametrize("release", ["CheXpert-v1.0", "CheXpert-v1.0-small", "CheXpert-phantom", None])
def test_the_release_folder_may_be_the_root_lie_in_it_or_be_missing(tmp_path, release):
    base = tmp_path / release if release else tmp_path
    write(base, "train.csv", [row(path(root=f"{release or 'CheXpert-v1.0'}/"))])
    (base / "train").mkdir()
    wanted = str(base / "train/patient00001/study1/view1_frontal.jpg")
    for root in (tmp_path, base):
        table, refused = read(root)
        assert list(table) == [wanted]
        assert refused == []


def test_full_and_small_release_share_ids_and_phantoms_have_their_own(tmp_path):
    ids = set()
    for release in ("CheXpert-v1.0", "CheXpert-v1.0-small"):
        write(tmp_path / release, "train.csv", [row(path(root=f"{release}/"))])
        table, _ = read(tmp_path / release)
        ids |= {r["image_id"] for r in table.values()}
    assert len(ids) == 1
    phantom = read_radiographs("phantom", str(tmp_path / "CheXpert-v1.0")).table["image_id"][0].as_py()
    assert phantom == ids.pop().replace("chexpert", "phantom")


def test_two_releases_in_one_folder_must_be_told_apart(tmp_path):
    for release in ("CheXpert-v1.0", "CheXpert-v1.0-small"):
        write(tmp_path / release, "train.csv", [row(path())])
    with pytest.raises(InputError, match="holds 2 folders"):
        read(tmp_path)


def test_a_folder_without_the_table_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"holds no train\.csv"):
        read(tmp_path)
    with pytest.raises(InputError, match="no folder at"):
        read(tmp_path / "nosuch")


def test_the_four_archives_have_no_train_level(tmp_path):
    first = tmp_path / "CheXpert-v1.0 batch 1 (validate & csv)"
    write(first, "train.csv", [row(path(1)), row(path(30000)), row(path(9))])
    write(first, "valid.csv", [row(path(64541, part="valid"))])
    (first / "valid").mkdir()
    for batch, patient in ((2, 1), (3, 30000)):
        (tmp_path / f"CheXpert-v1.0 batch {batch} (train {batch - 1})" / f"patient{patient:05d}").mkdir(
            parents=True
        )
    table, _ = read(tmp_path)
    tail = "study1/view1_frontal.jpg"
    assert set(table) == {
        f"{tmp_path}/CheXpert-v1.0 batch 2 (train 1)/patient00001/{tail}",
        f"{tmp_path}/CheXpert-v1.0 batch 3 (train 2)/patient30000/{tail}",
        f"{first}/train/patient00009/{tail}",  # in no archive: embed will say that it is missing
        f"{first}/valid/patient64541/{tail}",
    }
    assert image_id("chexpert", f"train/patient30000/{tail}") in {r["image_id"] for r in table.values()}


def test_csv_gz(tmp_path):
    write(tmp_path, "train.csv", [row(path())])
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress((tmp_path / "train.csv").read_bytes()))
    (tmp_path / "train.csv").unlink()
    assert len(read(tmp_path)[0]) == 1


@pytest.mark.parametrize(
    ("cells", "column", "value"),
    [
        ({"sex": "Unknown"}, "sex", None),
        ({"sex": "Female"}, "sex", "F"),
        ({"age": "0"}, "age", None),
        ({"age": "90"}, "age", 90.0),
        ({"projection": "AP"}, "view", "AP"),
        ({"projection": "LL"}, "view", "LL"),
        ({"projection": "RL"}, "view", "RL"),
        ({"plane": "Lateral", "projection": ""}, "view", "LATERAL"),
        ({"projection": ""}, "view", "FRONTAL"),
    ],
)
def test_domains(tmp_path, cells, column, value):
    (one,), _ = read_one(tmp_path, row(path(), **cells))
    assert one[column] == value


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (row(path(), Edema="2.0"), "Edema is not 1, 0, -1 or blank"),
        (row(path(), No_Finding="yes"), "No Finding is not 1, 0, -1 or blank"),
        (row(path(), sex="Mael"), "Sex is not a sex"),
        (row(path(), age="old"), "Age is not a number of years"),
        (row(path(), plane="Oblique"), "Frontal/Lateral is not Frontal, Lateral"),
        (row(path(), projection="DX"), "AP/PA is not AP, PA, LL, RL or blank"),
    ],
)
def test_values_outside_the_domain_refuse_the_row(tmp_path, cells, reason):
    good, (bad,) = read_one(tmp_path, cells, row(path(2)))
    assert len(good) == 1
    assert bad["reason"].startswith(reason)
    assert bad["stage"] == "radiographs"
    assert bad["image_id"] == image_id("chexpert", "train/patient00001/study1/view1_frontal.jpg")
    assert bad["uri"] == str(tmp_path / "train/patient00001/study1/view1_frontal.jpg")


@pytest.mark.parametrize(
    "bad_path", ["", "patient00001/study1/view1_frontal.jpg", path(part="teach"), path(view="view1.jpg")]
)
def test_a_path_of_another_form_refuses_the_row(tmp_path, bad_path):
    _, (bad,) = read_one(tmp_path, row(path(2)), row(bad_path))
    assert bad["reason"].startswith("Path is not of the form")
    assert bad["image_id"] == image_id("chexpert", "train.csv#row=3")
    assert bad["uri"] == str(tmp_path / "train.csv#row=3")


def test_a_row_with_a_field_too_few_is_refused_and_the_others_stay(tmp_path):
    write(tmp_path, "train.csv", [row(path(1)), row(path(2))[:-1], row(path(3))])
    table, (bad,) = read(tmp_path)
    assert len(table) == 2
    assert bad["reason"] == "18 fields, not 19"
    assert bad["uri"].endswith("train.csv#row=3")


def test_labels_stay_as_given(tmp_path):
    """Parents are not propagated, Support Devices may go with No Finding, and a row may be all blank."""
    rows, refused = read_one(
        tmp_path,
        row(path(1), Cardiomegaly="1.0"),
        row(path(2), No_Finding="1.0", Support_Devices="1.0", Edema="0.0"),
        row(path(3)),
    )
    assert refused == []
    named = [
        {name: r[name] for name in LABELS if r[name] is not None}
        for r in sorted(rows, key=lambda r: r["uri"])
    ]
    assert named == [{"Cardiomegaly": 1}, {"No Finding": 1, "Support Devices": 1, "Edema": 0}, {}]


def test_labels_are_read_by_name(tmp_path):
    """The per-reader test tables put Lung Lesion before Lung Opacity."""
    swapped = ["Path", *LABELS[:3], "Lung Lesion", "Lung Opacity", *LABELS[5:]]
    write(tmp_path, "train.csv", [row(path())])
    write(tmp_path, "test.csv", [[path(64741, part="test"), "0", "0", "0", "1", "0", *["0"] * 9]], swapped)
    table, _ = read(tmp_path)
    (test,) = [r for r in table.values() if r["split"] == "official_test"]
    assert (test["Lung Lesion"], test["Lung Opacity"]) == (1.0, 0.0)


def three_sets(tmp_path, test_name="test_labels.csv", test_root="", folder="valid"):
    write(tmp_path, "train.csv", [row(path(i)) for i in range(1, 101)])
    write(tmp_path, "valid.csv", [row(path(64541, part="valid"))])
    views = ("view1_frontal.jpg", "view2_lateral.jpg")
    rows = [[path(64741, 1, view, "test", test_root), *["0"] * 14] for view in views]
    write(tmp_path, test_name, rows, ["Path", *LABELS])
    for part in ("train", folder, "test"):
        (tmp_path / part).mkdir()


@pytest.mark.parametrize("test_name", ["test.csv", "test_labels.csv"])
@pytest.mark.parametrize("test_root", ["", "CheXpert/", "CheXpert-v1.0/"])
def test_by_patient_the_official_sets_stand_apart(tmp_path, test_name, test_root):
    three_sets(tmp_path, test_name, test_root)
    table, refused = read(tmp_path)
    assert refused == []
    splits = {uri.removeprefix(f"{tmp_path}/"): r["split"] for uri, r in table.items()}
    assert splits["valid/patient64541/study1/view1_frontal.jpg"] == "official_valid"
    assert {s for uri, s in splits.items() if uri.startswith("test/")} == {"official_test"}
    assert {s for uri, s in splits.items() if uri.startswith("train/")} == {"train", "valid", "test"}


def test_the_test_set_has_labels_alone(tmp_path):
    three_sets(tmp_path)
    table, _ = read(tmp_path)
    test = [r for r in table.values() if r["split"] == "official_test"]
    assert sorted((r["view"], r["sex"], r["age"], r["Edema"]) for r in test) == [
        ("FRONTAL", None, None, 0.0),
        ("LATERAL", None, None, 0.0),
    ]


def test_the_valid_images_may_lie_in_val(tmp_path):
    three_sets(tmp_path, folder="val")
    assert str(tmp_path / "val/patient64541/study1/view1_frontal.jpg") in read(tmp_path)[0]


def test_official_splits(tmp_path):
    three_sets(tmp_path)
    table, _ = read(tmp_path, split="official")
    splits = [r["split"] for r in table.values()]
    assert [splits.count(name) for name in ("train", "valid", "test")] == [100, 1, 2]
    (tmp_path / "test_labels.csv").unlink()
    with pytest.raises(InputError, match=r"no test\.csv .* official needs"):
        read(tmp_path, split="official")


def test_a_patient_in_two_of_the_sets_is_an_error(tmp_path):
    write(tmp_path, "train.csv", [row(path(7))])
    write(tmp_path, "valid.csv", [row(path(7, part="valid"))])
    with pytest.raises(InputError, match="1 patients have images in more than one split") as caught:
        read(tmp_path)
    assert "patient00007" not in str(caught.value)


def test_an_image_listed_twice_is_an_error(tmp_path):
    with pytest.raises(InputError, match="listed more than once"):
        read_one(tmp_path, row(path()), row(path()))


def test_the_split_does_not_depend_on_the_order_of_the_rows(tmp_path):
    rows = [row(path(i)) for i in range(50)]
    forward, _ = read_one(tmp_path, *rows)
    backward, _ = read_one(tmp_path, *rows[::-1])
    assert forward == backward


@pytest.mark.parametrize("missing", ["Path", "Sex", "Age", "AP/PA", "Pleural Effusion"])
def test_a_missing_column_is_named_with_its_file(tmp_path, missing):
    header = [f"{name}s" if name == missing else name for name in HEADER]
    write(tmp_path, "train.csv", [row(path())], header)
    with pytest.raises(
        InputError, match=rf"train\.csv has no column '{missing}': the nearest it has is '{missing}s'"
    ):
        read(tmp_path)


def test_an_empty_table_is_an_error(tmp_path):
    write(tmp_path, "train.csv", [])
    with pytest.raises(InputError, match=r"train\.csv is empty"):
        read(tmp_path)
