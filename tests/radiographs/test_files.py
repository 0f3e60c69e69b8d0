import gzip

import pytest

from medsae_ray.errors import InputError
from medsae_ray.radiographs.files import Folder, join


def csv_of(tmp_path, data, name="t.csv"):
    (tmp_path / name).write_bytes(data)
    return Folder(str(tmp_path)).read_csv(name)


def test_every_cell_is_a_string_and_blanks_are_empty(tmp_path):
    csv = csv_of(tmp_path, b"id,n,\n00000061,1.0,\n,-1,\n")
    assert csv.table["id"].to_pylist() == ["00000061", ""]
    assert csv.table["n"].to_pylist() == ["1.0", "-1"]


def test_gz_byte_order_mark_carriage_returns_and_quoted_line_breaks(tmp_path):
    csv = csv_of(tmp_path, gzip.compress(b'\xef\xbb\xbfa,b\r\n1,"x\ny"\r\n'), "t.csv.gz")
    assert csv.table.to_pydict() == {"a": ["1"], "b": ["x\ny"]}


def test_malformed_records_are_set_aside_with_their_numbers(tmp_path):
    csv = csv_of(tmp_path, b"a,b\n1,2\n3\n4,5\n6,7,8\n9,10\n")
    assert csv.table["a"].to_pylist() == ["1", "4", "9"]
    assert csv.rows.tolist() == [2, 4, 6]
    assert [(row, reason) for row, reason in csv.malformed] == [
        (3, "1 fields, not 2"),
        (5, "3 fields, not 2"),
    ]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"a,b\n"])
def test_an_empty_table_is_an_error(tmp_path, data):
    with pytest.raises(InputError, match=r"t\.csv is empty"):
        csv_of(tmp_path, data)


def test_what_is_no_csv_is_an_error_that_quotes_no_row(tmp_path):
    with pytest.raises(InputError, match="not a CSV table") as caught:
        csv_of(tmp_path, b"a,b\npatient00001,\xff\xfe\n")
    assert "patient00001" not in str(caught.value)


def test_a_broken_gz_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        csv_of(tmp_path, gzip.compress(b"a,b\n1,2\n" * 1000)[:-20], "t.csv.gz")


def test_a_column_that_is_there_twice_is_an_error(tmp_path):
    with pytest.raises(InputError, match="'a' twice"):
        csv_of(tmp_path, b"a,b,a\n1,2,3\n")


def test_require_names_the_nearest_column(tmp_path):
    csv = csv_of(tmp_path, b"Patient Gender,x\nM,1\n")
    assert csv.require("Patient Sex", "Patient Gender") == "Patient Gender"
    with pytest.raises(InputError, match=r"t\.csv has no column 'patient_gender': .* 'Patient Gender'"):
        csv.require("patient_gender")
    with pytest.raises(InputError, match="has no column 'Path': it has Patient Gender, x"):
        csv.require("Path")


def test_local_uris_are_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Folder("a b").uri("c/d.png") == str(tmp_path / "a b" / "c" / "d.png")
    assert Folder("a/../b").uri() == f"{tmp_path}/a/../b"
    assert Folder(tmp_path.as_uri()).uri("x y.png") == str(tmp_path / "x y.png")


def test_uris_of_a_bucket_keep_its_query():
    folder = Folder("s3://bucket/set/?region=eu-west-1&endpoint_override=localhost:9")
    assert folder.uri("a/b.png") == "s3://bucket/set/a/b.png?region=eu-west-1&endpoint_override=localhost:9"


@pytest.mark.parametrize("root", ["nosuch://a/b", "s3://a b"])
def test_a_root_that_is_no_uri_is_an_error(root):
    with pytest.raises(InputError, match="no URI that pyarrow opens"):
        Folder(root).files()


def test_listing_and_finding(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "t.csv.gz").write_bytes(b"")
    folder = Folder(tmp_path.as_uri())
    assert folder.folders() == ["d"]
    assert folder.files("d") == ["t.csv.gz"]
    assert folder.files("nosuch") == []
    assert folder.find("d", "u.csv", "t.csv") == "d/t.csv.gz"
    assert folder.find("", "t.csv") is None
    with pytest.raises(InputError, match="no folder at"):
        Folder(str(tmp_path / "nosuch")).check_exists()


def test_join():
    assert [join("", "a"), join("a", ""), join("a/", "b"), join("", "")] == ["a", "a", "a/b", ""]
