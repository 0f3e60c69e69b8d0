import pytest

from medsae_ray.errors import InputError
from medsae_ray.radiographs import read_radiographs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "chexprt"}, r"radiographs\.dataset is 'chexprt': .* chexpert, nih, folder, phantom"),
        ({"split": "random"}, r"radiographs\.split is 'random'"),
        ({"dataset": "chexpert", "table": "x.csv"}, r"radiographs\.table is 'x\.csv'"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        read_radiographs(**({"dataset": "folder", "root": str(tmp_path)} | settings))


def test_a_uri_as_root(tmp_path):
    (tmp_path / "radiographs.csv").write_text("path,patient_id\n1.png,1\n")
    table = read_radiographs("folder", tmp_path.as_uri()).table
    assert table.equals(read_radiographs("folder", str(tmp_path)).table)
