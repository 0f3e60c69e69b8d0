"""What the pages read, computed again from the run's tables with pandas."""

import base64
import json
import math
import shutil
import unicodedata

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import DEAD, FAILED, GRID, MARKUP, SCRIPT, UNPARSED, remake, write_run

from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.report.collect import read_tables, survey
from medsae_ray.report.data import MAX_TEXT, PER_FILE, cards, cleaned, index_payload, rounded, script
from medsae_ray.run import Run
from medsae_ray.tables import NAMES

N = 70


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("data") / "run", N, 160, n_candidates=14, pictures="none")


@pytest.fixture(scope="module")
def tables(run):
    return read_tables(run, survey(run))


@pytest.fixture(scope="module")
def told(tables):
    return [card for of in cards(tables) for card in of]


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run.root, tmp_path / "run", ignore=shutil.ignore_patterns("images"))
    return Run(str(tmp_path / "run"))


def read(run, table) -> pd.DataFrame:
    return pd.read_parquet(run.path(table))


def short(value):
    """To 4 significant digits by way of text."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def agree(told, values):
    """Whether numbers are those of `values` to 4 digits, and None where these are undefined."""
    assert [x is None for x in told] == [short(x) is None for x in values]
    np.testing.assert_allclose(
        [x for x in told if x is not None], [short(x) for x in values if short(x) is not None], rtol=1.01e-3
    )


@given(st.lists(st.floats() | st.floats(-1e6, 1e6), max_size=20))
def test_rounding_keeps_four_digits(values):
    for told, value in zip(rounded(values), values, strict=True):
        if not math.isfinite(value):
            assert told is None
            continue
        assert abs(told - value) <= max(abs(value) * 5.0001e-4, 1e-305)
        # Powers of ten up to 22 are exact, so that nothing but the four digits is written.
        if 1e-18 < abs(value) < 1e24:
            assert told == float(f"{told:.4g}")


def test_rounding_keeps_the_shape():
    x = np.random.default_rng(0).normal(size=(3, 4, 2))
    x[0, 1, 0] = np.nan
    again = rounded(x)
    assert again[0][1][0] is None
    assert np.array(again, float).shape == x.shape
    np.testing.assert_allclose(np.array(again, float), x, rtol=5.0001e-4)


@given(
    st.recursive(
        st.none() | st.text() | st.integers(), lambda of: st.lists(of) | st.dictionaries(st.text(), of)
    )
)
def test_a_script_holds_its_payload_and_can_neither_end_nor_open_markup(payload):
    whole = script("index", payload).decode("ascii")
    told = whole.removeprefix('medsae.put("index", ').removesuffix(");\n")
    assert not set("<>&\u2028\u2029") & set(told)
    assert json.loads(told) == payload


@given(st.text(max_size=50) | st.text(alphabet=st.characters(categories=["C"]), max_size=20))
def test_cleaning_leaves_line_breaks_and_what_can_be_seen(text):
    for before, after in zip(text, cleaned(text), strict=True):
        hidden = unicodedata.category(before)[0] == "C" and before != "\n"
        assert after == (" " if hidden else before)


def test_cleaning_ends_a_text_without_end():
    assert cleaned(None) is None
    assert cleaned("x" * MAX_TEXT) == "x" * MAX_TEXT
    assert cleaned("x" * 10 * MAX_TEXT) == "x" * MAX_TEXT + "…"


def test_the_index_is_what_the_tables_say(run, tables):
    payload = index_payload(tables, {"title": "run"})
    assert payload["run"] == {"title": "run"}
    assert payload["labels"] == list(LABELS)
    columns = payload["neurons"]
    neurons, atlas = read(run, "neurons"), read(run, "atlas").set_index("neuron")
    assert {len(column) for column in columns.values()} == {N}
    assert columns["neuron"] == list(range(N))
    assert columns["dead"] == neurons["dead"].astype(int).tolist()
    assert [None if i is None else LABELS[i] for i in columns["label"]] == [
        label if isinstance(label, str) else None for label in neurons["best_label"]
    ]
    agree(columns["r"], neurons["best_r"])
    own = [
        row[f"auroc_{row['best_label']}"] if isinstance(row["best_label"], str) else None
        for _, row in neurons.iterrows()
    ]
    agree(columns["auroc"], own)
    for name in ("entropy", "density"):
        agree(columns[name], neurons[name])
    for name in ("x", "y"):
        agree(columns[name], atlas[name].reindex(range(N)))
    names = read(run, "names").set_index("neuron")["concept"].reindex(range(N))
    assert columns["name"] == [name if isinstance(name, str) else None for name in names]
    assert columns["name"][SCRIPT] == MARKUP
    detections = read(run, "detections").set_index("neuron")
    for end in ("", "_low", "_high"):
        counted = detections.loc[detections["enough"], f"balanced_accuracy{end}"].reindex(range(N))
        agree(columns[f"detection{end}"], counted)
    assert 0 < sum(x is not None for x in columns["detection"]) < 14
    follows = [", ".join(of) or None for of in atlas["shortcuts"]]
    assert columns["shortcut"] == follows
    assert any(follows)


def test_cards_come_in_files_of_32(tables):
    numbers = [[card["neuron"] for card in of] for of in cards(tables)]
    assert numbers == [list(range(i, min(i + PER_FILE, N))) for i in range(0, N, PER_FILE)]


def test_a_card_holds_its_neurons_measures(run, told):
    rows = (run.read(table).to_pylist() for table in ("neurons", "atlas", "candidates"))
    for card, measured, of, candidate in zip(told, *rows, strict=True):
        assert card["alive"] == (not measured["dead"])
        assert (card["candidate"], card["why_not"]) == (candidate["candidate"], candidate["reason"])
        figures = ("density", "n_firing", "mean", "max", "entropy", "entropy_floor", "n_labels")
        assert list(card["figures"]) == list(figures)
        agree(card["figures"].values(), [measured[name] for name in figures])
        for i, label in enumerate(LABELS):
            columns = ("r_{}", "auroc_{}", "auroc_{}_low", "auroc_{}_high", "valid_r_{}", "n_{}")
            number, *row = card["labels"][i]
            assert number == i
            agree(row, [measured[name.format(label)] for name in columns])
        assert card["histogram"]["counts"] == of["bins"]
        agree([card["histogram"]["max"]], [measured["max"]])
        assert [near for near, _ in card["nearest"]] == of["nearest"]
        agree([cosine for _, cosine in card["nearest"]], of["cosine"])
        assert card["site"] == of["site"]
        for name, r, valid_r, flagged in card["acquisition"]:
            source, column = (measured, "Support Devices") if name == "devices" else (of, name)
            agree([r, valid_r], [source[f"r_{column}"], source[f"valid_r_{column}"]])
            assert flagged == (name in of["shortcuts"])
        assert [row[0] for row in card["acquisition"]] == ["AP", "lateral", "male", "age", "site", "devices"]


def test_a_card_holds_its_name_and_its_detection(run, told):
    names = {row["neuron"]: row for row in run.read("names").to_pylist()}
    detections = {row["neuron"]: row for row in run.read("detections").to_pylist()}
    for card in told:
        neuron = card["neuron"]
        assert (card["name"] is not None) == (card["detection"] is not None) == (neuron in names)
        if card["name"] is None:
            continue
        for key in ("concept", "status", "reason", "model"):
            assert card["name"][key] == names[neuron][key]
        row, of = detections[neuron], card["detection"]
        kept = ("q", "tpr", "tpr_low", "tnr_high", "auroc", "auroc_low", "auroc_high")
        renamed = {"low": "balanced_accuracy_low", "high": "balanced_accuracy_high"}
        renamed |= {"balanced_accuracy": "balanced_accuracy", "shuffled": "shuffled_balanced_accuracy"}
        agree([of[key] for key in (*kept, *renamed)], [row[key] for key in (*kept, *renamed.values())])
        for key in ("n_positive", "n_negative", "n_unparsed", "n_failed", "enough", "named"):
            assert of[key] == row[key]
    assert told[UNPARSED]["name"]["status"] == "unparsed"
    assert MARKUP in told[UNPARSED]["name"]["reply"]
    assert "\x1b" not in told[UNPARSED]["name"]["reply"]
    assert told[FAILED]["name"]["reply"] is None


def test_a_cards_radiographs_have_their_answers_and_maps(run, told):
    gallery = read(run, "gallery")
    verdicts = read(run, "verdicts")
    verdicts = verdicts[verdicts["condition"] == "true"]
    maps = {(row.neuron, row.image_id): row.map for row in read(run, "maps").itertuples()}
    joined = gallery.merge(
        verdicts[["neuron", "image_id", "status", "answer", "p_yes"]], "left", ["neuron", "image_id"]
    )
    answer = (
        joined["answer"]
        .map({True: "yes", False: "no"})
        .where(joined["status"] == "answered", joined["status"])
    )
    shown = [(card["neuron"], image) for card in told for image in card["images"]]
    assert len(shown) == len(gallery)
    assert [neuron for neuron, _ in shown] == gallery["neuron"].tolist()
    for name, column in (("id", "image_id"), ("role", "role")):
        assert [image[name] for _, image in shown] == gallery[column].tolist()
    agree([image["value"] for _, image in shown], gallery["value"])
    agree([image["quantile"] for _, image in shown], gallery["quantile"])
    assert [image["answer"] for _, image in shown] == [a if isinstance(a, str) else None for a in answer]
    assert {image["answer"] for _, image in shown} == {None, "yes", "no", "unparsed", "failed"}
    agree([image["p_yes"] for _, image in shown], joined["p_yes"])
    for neuron, image in shown:
        coded = np.frombuffer(base64.b64decode(image["map"]), np.int8)
        assert len(coded) == math.prod(GRID)
        stored = maps[neuron, image["id"]]
        np.testing.assert_allclose(
            coded * image["scale"], stored, atol=0.51 * image["scale"] + 1e-3 * abs(stored).max()
        )
        assert abs(coded).max() >= 126
        assert "unreadable" not in image


def test_radiographs_that_could_not_be_read_are_marked(tables, told):
    lost = told[SCRIPT]["images"][0]["id"]
    marked = [
        image["id"]
        for of in cards(tables, {lost})
        for card in of
        for image in card["images"]
        if "unreadable" in image
    ]
    assert set(marked) == {lost}


def test_a_map_of_nothing_stays_nothing(tables):
    maps = tables["maps"]
    column = maps.schema.get_field_index("map")
    empty = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(49 * maps.num_rows, np.float32)), 49)
    nothing = {**tables, "maps": maps.set_column(column, maps.schema.field("map"), empty)}
    image = next(cards(nothing))[SCRIPT]["images"][0]
    assert base64.b64decode(image["map"]) == bytes(49)
    assert image["scale"] == 0


def test_images_without_a_verdict_or_a_map_have_none(tables):
    few = {**tables, "verdicts": tables["verdicts"].slice(0, 1), "maps": tables["maps"].slice(0, 1)}
    images = [image for of in cards(few) for card in of for image in card["images"]]
    for key in ("answer", "map", "scale"):
        assert sum(image[key] is not None for image in images) == 1
    none = {**tables, "verdicts": tables["verdicts"].slice(0, 0), "maps": tables["maps"].slice(0, 0)}
    assert all(
        image["map"] is image["answer"] is None
        for of in cards(none)
        for card in of
        for image in card["images"]
    )


def test_cards_do_without_what_is_left_out(tables):
    few = {name: tables[name] for name in ("radiographs", "neurons", "history")}
    payload = index_payload(few, {})["neurons"]
    for name in ("name", "detection", "shortcut", "x", "y"):
        assert payload[name] == [None] * N
    card = next(cards(few))[SCRIPT]
    assert card["images"] == card["nearest"] == card["acquisition"] == []
    assert card["histogram"] is card["name"] is card["detection"] is card["why_not"] is None
    assert not card["candidate"]
    assert len(card["labels"]) == len(LABELS)
    assert "alive" in card
    assert next(cards(few))[DEAD]["alive"] is False


# ------------------------------------------------------------------------------------------------ survey


def test_everything_fresh_is_shown(run):
    found = survey(run)
    assert found.left_out == found.stale == []
    tables = read_tables(run, found)
    assert {"gallery", "maps", "verdicts", "history", "sweep", "controls"} <= set(tables)
    assert tables["radiographs"].column_names == ["image_id", "uri"]


def test_what_rests_on_other_panels_is_left_out_and_told(copied):
    remake(copied, "panels")
    found = survey(copied)
    assert set(found.stale) == {"gallery", "atlas", "maps", "localisation", "names", "verdicts", "detections"}
    by_command = {told.command for told in found.left_out}
    assert by_command == {f"medsae {stage} --run RUN" for stage in ("atlas", "localise", "name", "detect")}
    assert all(told.why.startswith("stale: ") for told in found.left_out)
    assert not set(read_tables(copied, found)) & set(found.stale)


def test_answers_about_other_names_are_left_out(copied):
    names = copied.read("names", NAMES).to_pylist()
    names[0]["description"] = "Asked again, and told otherwise."
    path = copied.files("names")[0]
    pa.parquet.write_table(pa.Table.from_pylist(names, schema=NAMES), path)
    found = survey(copied)
    assert found.stale == ["verdicts", "detections"]
    assert {told.why for told in found.left_out} == {"stale: the names changed since"}


def test_what_was_not_made_is_told_with_the_command_that_makes_it(copied):
    for table in ("controls", "maps", "sweep"):
        copied.delete(table)
    found = survey(copied)
    assert found.stale == []
    assert [told.command for told in found.left_out] == [
        "medsae controls --run RUN",
        "medsae localise --run RUN",
    ]
    assert "maps" not in found.inputs


@pytest.mark.parametrize(("table", "stage"), [("neurons", "measure"), ("radiographs", "radiographs")])
def test_without_its_neurons_there_is_no_report(copied, table, stage):
    copied.delete(table)
    with pytest.raises(InputError, match=f"medsae {stage}"):
        survey(copied)


def test_neurons_of_another_sae_are_refused(copied):
    remake(copied, "sae")
    with pytest.raises(InputError, match=r"'neurons' of .* is stale"):
        survey(copied)
