"""Concepts are compared by meaning as far as the synonym table goes, and no further."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsae_ray.concepts import NO_COMMON_FINDING, SYNONYMS, UNNAMED, canonical, is_named
from medsae_ray.labels import LABELS

SAID = [(said, label) for label in LABELS for said in (label, *SYNONYMS[label])]


def test_every_label_and_synonym_means_one_label() -> None:
    assert list(SYNONYMS) == list(LABELS)
    assert {said: canonical(said) for said, _ in SAID} == dict(SAID)
    assert len(dict(SAID)) == len(SAID), "a synonym of two labels"
    assert all(is_named(said) for said, _ in SAID)


@given(
    said=st.sampled_from(SAID),
    change=st.sampled_from([str.upper, str.title, lambda s: f"  {s}. ", lambda s: s.replace(" ", "-")]),
)
def test_case_and_punctuation_do_not_count(said: tuple[str, str], change: object) -> None:
    assert canonical(change(said[0])) == said[1]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("Bilateral pleural effusions", "Pleural Effusion"),
        ("small left pleural fluid", "Pleural Effusion"),
        ("blunting of the left costophrenic angles", "Pleural Effusion"),
        ("The heart is enlarged.", "Cardiomegaly"),
        ("mild cardiomegaly with enlarged heart", "Cardiomegaly"),
        ("Right lower lobe opacity", "Lung Opacity"),
        ("Ground-glass opacities", "Lung Opacity"),
        ("lung nodules or masses", "Lung Lesion"),
        ("Pulmonary oedema", "Edema"),
        ("Kerley B-lines", "Edema"),
        ("dense lobar consolidation, right base", "Consolidation"),
        ("bibasilar atelectasis", "Atelectasis"),
        ("large right pneumothoraces", "Pneumothorax"),
        ("calcified pleural plaques", "Pleural Other"),
        ("displaced left rib fractures", "Fracture"),
        ("a cardiac pacemaker", "Support Devices"),
        ("Lines and tubes", "Support Devices"),
        ("No acute cardiopulmonary abnormality", "No Finding"),
    ],
)
def test_side_place_degree_and_number_do_not_count(said: str, label: str) -> None:
    assert canonical(said) == label


@pytest.mark.parametrize(
    "said", ["no pleural effusion", "absence of pneumothorax", "cardiomegaly with edema", "hiatal hernia"]
)
def test_what_is_negated_joined_or_unknown_is_no_label(said: str) -> None:
    assert canonical(said) not in LABELS


def test_unknown_concepts_are_compared_by_their_words() -> None:
    assert canonical("Left hiatal hernias!") == canonical("hiatal hernia")
    assert canonical("hiatal hernia") != canonical("scoliosis")
    assert canonical("left") == "left"


@given(st.text(max_size=80))
def test_any_text_has_a_stable_canonical_form(text: str) -> None:
    once = canonical(text)
    assert once in LABELS or canonical(once) in (once, *LABELS)


@pytest.mark.parametrize("said", [*UNNAMED, "No Common Finding.", " none ", "", "  ", "...", None])
def test_a_panel_that_shares_nothing_has_no_name(said: str | None) -> None:
    assert not is_named(said)


@pytest.mark.parametrize("said", ["No Finding", "normal", "edema", "no acute abnormality"])
def test_a_normal_radiograph_is_a_name(said: str) -> None:
    assert is_named(said)
    assert NO_COMMON_FINDING in UNNAMED


@pytest.mark.parametrize(
    "said",
    [
        "None identified",
        "No common findings identified",
        "No shared radiographic abnormality",
        "no consistent pattern",
        "Unclear",
        "Nothing in common",
        "no single unifying finding",
    ],
)
def test_ways_to_say_that_nothing_is_shared_are_no_names(said: str) -> None:
    assert not is_named(said)


@pytest.mark.parametrize("said", ["no acute abnormality", "nothing abnormal", "no pneumothorax", "normal"])
def test_the_absence_of_findings_is_a_name(said: str) -> None:
    assert is_named(said)
