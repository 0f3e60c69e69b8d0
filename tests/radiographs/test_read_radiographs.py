import pytest

from medsae_ray.errors import InputError
from medsae_ray.radiographs import read_radiographs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "chexprt"}, r"radiographs\.dataset is 'chexprt': .* chexpert, nih, folder, phantom"),
        ({"split": "random"}, r"radiographs\.split is 'random'"),
        ({"limit": 0}, r"radiographs\.limit is 0"),
        ({"dataset": "chexpert", "table": "x.csv"}, r"radiographs\.table is 'x\.csv'"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        read_radiographs(**({"dataset": "folder", "root": str(tmp_path)} | settings))


def test_limit_keeps_the_first_ids_and_their_splits(tmp_path):
    rows = "".join(f"{i}.png,{i}\n" for i in range(40))
    (tmp_path / "radiographs.csv").write_text(f"path,patient_id\n{rows}")
    whole = read_radiographs("folder", str(tmp_path)).table
    few = read_radiographs("folder", str(tmp_path), limit=7).table
    assert few.equals(whole.slice(0, 7))
    assert whole["image_id"].to_pylist() == sorted(whole["image_id"].to_pylist())


def test_a_uri_as_root(tmp_path):
    (tmp_path / "radiographs.csv").write_text("path,patient_id\n1.png,1\n")
    table = read_radiographs("folder", tmp_path.as_uri()).table
    assert table.equals(read_radiographs("folder", str(tmp_path)).table)
