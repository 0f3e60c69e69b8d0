"""The readers over the whole real tables of CheXpert and NIH, as the torchxrayvision package ships them.

Expected figures: counted from the same files by independent means; see also Irvin et al. 2019 (table 1) and
Wang et al. 2017. The files are fetched by `make tables`, never committed.
"""

import collections
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest

from medsae_ray.labels import LABELS
from medsae_ray.radiographs import read_radiographs

DATA = Path(__file__).parents[2] / "data" / "torchxrayvision"
pytestmark = pytest.mark.skipif(
    not all((DATA / name).is_file() for name in ("chexpert_train.csv.gz", "Data_Entry_2017_v2020.csv.gz")),
    reason="needs data/torchxrayvision: run `make tables`",
)


def counts(table, column):
    return dict(collections.Counter(table[column].to_pylist()))


@pytest.fixture(scope="module")
def chexpert(tmp_path_factory):
    root = tmp_path_factory.mktemp("chexpert") / "CheXpert-v1.0-small"
    root.mkdir()
    shutil.copy(DATA / "chexpert_train.csv.gz", root / "train.csv.gz")
    start = time.perf_counter()
    found = read_radiographs("chexpert", str(root.parent))
    assert time.perf_counter() - start < 20
    return found


@pytest.fixture(scope="module")
def nih(tmp_path_factory):
    root = tmp_path_factory.mktemp("nih")
    shutil.copy(DATA / "Data_Entry_2017_v2020.csv.gz", root)
    start = time.perf_counter()
    found = read_radiographs("nih", str(root))
    assert time.perf_counter() - start < 20
    return found


def test_chexpert_rows_and_details(chexpert):
    table = chexpert.table
    assert (table.num_rows, chexpert.refused.num_rows) == (223_414, 0)
    assert pc.count_distinct(table["patient_id"]).as_py() == 64_540
    assert pc.count_distinct(table["study_id"]).as_py() == 187_641
    assert counts(table, "sex") == {"M": 132_636, "F": 90_777, None: 1}
    assert counts(table, "view") == {"AP": 161_590, "PA": 29_420, "LL": 16, "RL": 1, "LATERAL": 32_387}
    ages = table["age"].to_numpy()
    assert (np.isnan(ages).sum(), np.nanmin(ages), np.nanmax(ages), (ages == 90).sum()) == (3, 18, 90, 7_579)


def test_chexpert_labels_equal_the_file(chexpert):
    """Every label of every row, against pandas' reading of the same file."""
    raw = pd.read_csv(DATA / "chexpert_train.csv.gz")
    raw.index = "train/" + raw["Path"].str.split("/train/").str[1]
    found = chexpert.table.select(["uri", *LABELS]).to_pandas()
    found.index = "train/" + found["uri"].str.split("/train/").str[1]
    expected = raw.loc[found.index, list(LABELS)].to_numpy()
    assert np.array_equal(found[list(LABELS)].to_numpy(), expected.astype(np.float32), equal_nan=True)
    assert (raw["Cardiomegaly"] == 1).sum() == 27_000


def test_chexpert_label_facts(chexpert):
    labels = {name: chexpert.table[name].to_numpy() for name in LABELS}
    assert (labels["Cardiomegaly"] == 1).sum() == 27_000
    assert ((labels["Cardiomegaly"] == 1) & (labels["Enlarged Cardiomediastinum"] != 1)).sum() == 25_099
    assert ((labels["No Finding"] == 1) & (labels["Support Devices"] == 1)).sum() == 8_808
    assert np.all([np.isnan(values) for values in labels.values()], axis=0).sum() == 12
    assert set(labels["No Finding"][~np.isnan(labels["No Finding"])]) == {1.0}
    studies = pd.DataFrame({"study": chexpert.table["study_id"].to_pylist(), "value": labels["Cardiomegaly"]})
    per_study = studies.groupby("study")["value"].first()
    assert ((per_study == 0).sum(), per_study.isna().sum()) == (7_712, 150_330)


def test_chexpert_splits(chexpert):
    shares = np.array([counts(chexpert.table, "split")[name] for name in ("train", "valid", "test")])
    np.testing.assert_allclose(shares / shares.sum(), [0.8, 0.1, 0.1], atol=0.005)
    per_patient = chexpert.table.group_by("patient_id").aggregate([("split", "count_distinct")])
    assert pc.max(per_patient["split_count_distinct"]).as_py() == 1


def test_nih_rows_and_details(nih):
    table = nih.table
    assert (table.num_rows, nih.refused.num_rows) == (112_120, 0)
    assert pc.count_distinct(table["patient_id"]).as_py() == 30_805
    assert counts(table, "sex") == {"M": 63_340, "F": 48_780}
    assert counts(table, "view") == {"PA": 67_310, "AP": 44_810}
    ages = table["age"].to_numpy()
    assert (ages.min(), ages.max(), (ages == 0).sum(), (ages < 18).sum()) == (0, 95, 14, 5_402)


def test_nih_labels_equal_the_file(nih):
    """Positives of each label, against a plain search in the file's own column."""
    findings = pd.read_csv(DATA / "Data_Entry_2017_v2020.csv.gz")["Finding Labels"]
    terms = {name: name for name in LABELS} | {
        "Pleural Effusion": "Effusion",
        "Lung Opacity": "Infiltration",
        "Lung Lesion": "Mass|Nodule",
        "Pleural Other": "Pleural_Thickening",
    }
    for name in LABELS:
        values = nih.table[name].to_numpy()
        if name in ("Enlarged Cardiomediastinum", "Fracture", "Support Devices"):
            assert np.isnan(values).all()
        else:
            assert (values == 1).sum() == findings.str.contains(terms[name]).sum() > 0
            assert ((values == 0) | (values == 1)).all()
    assert (nih.table["No Finding"].to_numpy() == 1).sum() == 60_361
