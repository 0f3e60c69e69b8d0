import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.radiographs import schema
from medsae_ray.tables import QUARANTINE, RADIOGRAPHS

patients = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=60)


def radiographs(*rows):
    base = dict.fromkeys(RADIOGRAPHS.names) | {"uri": "u", "patient_id": "p", "split": "train"}
    return pa.Table.from_pylist([base | row for row in rows], RADIOGRAPHS)


def refused(*rows):
    return pa.Table.from_pylist(list(rows), QUARANTINE)


def test_image_id_is_the_documented_hash():
    # sha256 of "train/patient00001/study1/view1_frontal.jpg", by `sha256sum`.
    assert (
        schema.image_id("chexpert", "train/patient00001/study1/view1_frontal.jpg")
        == "chexpert-4c1e6d32f64643d6"
    )


@given(st.lists(st.text(min_size=1), unique=True, max_size=50))
def test_image_ids_are_unique_and_do_not_quote_the_path(paths):
    ids = [schema.image_id("nih", path) for path in paths]
    assert len(set(ids)) == len(paths)
    assert all(len(i) == 20 and i.startswith("nih-") and set(i[4:]) <= set("0123456789abcdef") for i in ids)


@given(patients, st.integers(0, 3), st.randoms())
def test_a_patient_has_one_split_whatever_the_order_and_the_others(ids, seed, random):
    splits = schema.split_by_patient(ids, seed=seed)
    of = dict(zip(ids, splits, strict=True))
    assert [of[patient] for patient in ids] == splits
    assert set(splits) <= {"train", "valid", "test"}
    shuffled = random.sample(ids, len(ids))
    assert schema.split_by_patient(shuffled, seed=seed) == [of[patient] for patient in shuffled]
    assert schema.split_by_patient([*ids, "one more"], seed=seed)[: len(ids)] == splits


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_the_shares_are_met_within_sampling_noise(seed):
    splits = schema.split_by_patient([str(i) for i in range(20_000)], (0.7, 0.2, 0.1), seed)
    for name, share in (("train", 0.7), ("valid", 0.2), ("test", 0.1)):
        # Six standard errors of a binomial share.
        assert abs(splits.count(name) / 20_000 - share) < 6 * (share * (1 - share) / 20_000) ** 0.5


def test_another_seed_gives_another_split():
    ids = [str(i) for i in range(200)]
    assert schema.split_by_patient(ids, seed=0) != schema.split_by_patient(ids, seed=1)


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (0.8, 0.3, -0.1), (0.0, 0.5, 0.5), (0.9, 0.1)])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(InputError, match=r"radiographs\.fractions"):
        schema.split_by_patient(["a"], fractions)


def test_a_patient_in_two_splits_is_an_error_that_names_an_image_but_no_patient():
    table = radiographs(
        {"image_id": "x-1", "patient_id": "secret", "split": "train"},
        {"image_id": "x-2", "patient_id": "secret", "split": "test"},
        {"image_id": "x-3", "patient_id": "other"},
    )
    with pytest.raises(InputError, match=r"1 patients .*x-[12].* disjoint") as caught:
        schema.check(table)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"split": "val"}, "split 'val' is not one of"),
        ({"Edema": 2.0}, "label 'Edema' has the value 2"),
    ],
)
def test_check_refuses_values_outside_their_domain(row, message):
    with pytest.raises(InputError, match=message):
        schema.check(radiographs({"image_id": "x-1"} | row))


def test_check_refuses_other_columns():
    with pytest.raises(InputError, match="other columns"):
        schema.check(radiographs({"image_id": "x-1"}).drop_columns(["sex"]))


def test_an_image_listed_twice_is_an_error_even_when_one_is_refused():
    two = schema.Radiographs(radiographs({"image_id": "x-1"}, {"image_id": "x-1"}), refused())
    with pytest.raises(InputError, match=r"1 images are listed more than once \(one of them: x-1\)"):
        schema.assemble([two])
    other = refused({"image_id": "x-1", "uri": None, "stage": "radiographs", "reason": "r"})
    with pytest.raises(InputError, match="more than once"):
        schema.assemble([schema.Radiographs(radiographs({"image_id": "x-1"}), other)])


def test_when_every_row_is_refused_the_commonest_reason_is_shown():
    rows = [{"image_id": f"x-{i}", "uri": None, "stage": "radiographs", "reason": "abb"[i]} for i in range(3)]
    with pytest.raises(InputError, match="all 3 rows are refused, most because: b"):
        schema.assemble([schema.Radiographs(radiographs(), refused(*rows))])


def test_assembled_rows_are_in_the_order_of_their_ids():
    parts = [schema.Radiographs(radiographs({"image_id": f"x-{i}"}), refused()) for i in (2, 0, 1)]
    assert schema.assemble(parts).table["image_id"].to_pylist() == ["x-0", "x-1", "x-2"]


@pytest.mark.parametrize(
    ("text", "value"), [("1.0", 1), ("1", 1), ("0.0", 0), ("-1.0", -1), ("", None), ("nan", None)]
)
def test_label_cells(text, value):
    assert schema.label(text) == value


@pytest.mark.parametrize("text", ["2", "0.5", "yes", "inf"])
def test_label_cells_outside_the_domain(text):
    with pytest.raises(ValueError, match="is not 1, 0, -1 or blank"):
        schema.label(text)


@pytest.mark.parametrize(
    ("text", "years"),
    [("57", 57), ("57.5", 57.5), ("060Y", 60), ("018M", 1.5), ("", None), ("-1", None), ("414", None)],
)
def test_ages(text, years):
    assert schema.age(text) == years


@pytest.mark.parametrize("text", ["old", "Y", "5Z"])
def test_ages_that_are_no_numbers(text):
    with pytest.raises(ValueError, match="number of years"):
        schema.age(text)


@pytest.mark.parametrize(
    ("text", "value"), [("Male", "M"), ("F", "F"), ("female", "F"), ("Unknown", None), ("", None), ("O", "O")]
)
def test_sexes(text, value):
    assert schema.sex(text) == value


def test_the_labels_are_the_last_columns_in_their_order():
    assert tuple(RADIOGRAPHS.names[-14:]) == LABELS
