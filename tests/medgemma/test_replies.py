"""Replies become answers, or the statement that there is none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsae_ray.medgemma.replies import parse_answer, parse_name


@pytest.mark.parametrize(("reply", "answer"), [("yes", True), ("no", False), (" Yes\n", True), ("NO", False)])
def test_yes_and_no_are_answers(reply, answer):
    assert parse_answer(reply, None) == ("answered", answer, None)


@given(st.text(max_size=20).filter(lambda text: text.strip().lower() not in ("yes", "no")))
def test_anything_else_is_unparsed_and_never_a_no(reply):
    status, answer, reason = parse_answer(reply, None)
    assert (status, answer) == ("unparsed", None)
    assert reason


def test_no_reply_is_failed_with_its_reason():
    assert parse_answer(None, "timed out") == ("failed", None, "timed out")
    assert parse_name(None, "timed out") == ("failed", None, None, "timed out")


def test_a_name_has_a_concept_and_a_description():
    reply = json.dumps({"concept": " pleural\neffusion", "description": "Fluid  at the base."})
    assert parse_name(reply, None) == ("answered", "pleural effusion", "Fluid at the base.", None)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "a pleural effusion",
        "[]",
        "null",
        "3",
        '{"concept": "effusion"}',
        '{"concept": "effusion", "description": 3}',
        '{"concept": " ", "description": "x"}',
        '{"concept": "effusion", "description": "cut off he',
        "[" * 100_000,
        json.dumps({"concept": "x" * 81, "description": "y"}),
        json.dumps({"concept": "x", "description": "y" * 401}),
    ],
)
def test_what_is_not_the_json_that_was_asked_for_is_unparsed(reply):
    name = parse_name(reply, None)
    assert (name.status, name.concept, name.description) == ("unparsed", None, None)
    assert name.reason
