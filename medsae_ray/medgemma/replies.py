"""From a reply to an answer, or to the statement that there is none: nothing is guessed."""

from __future__ import annotations

import json
from typing import Literal, NamedTuple, get_args

from medsae_ray.medgemma.prompts import CHOICES, MAX_CONCEPT, MAX_DESCRIPTION

Status = Literal["answered", "unparsed", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)


class Name(NamedTuple):
    """A parsed naming reply; concept and description are None unless `answered`."""

    status: Status
    concept: str | None
    description: str | None
    reason: str | None


class Answer(NamedTuple):
    """A parsed detection reply; `answer` is None unless `answered`."""

    status: Status
    answer: bool | None
    reason: str | None


def parse_name(reply: str | None, reason: str | None) -> Name:
    """Status and content of a naming reply; `reason` says why there is no reply (`failed`)."""
    if reply is None:
        return Name("failed", None, None, reason or "no reply")
    try:
        told = json.loads(reply)
        concept, description = " ".join(told["concept"].split()), " ".join(told["description"].split())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Name("unparsed", None, None, "not the JSON that was asked for")
    if not concept or not description:
        return Name("unparsed", None, None, "the concept or the description is empty")
    if len(concept) > MAX_CONCEPT or len(description) > MAX_DESCRIPTION:
        return Name("unparsed", None, None, "the concept or the description is too long")
    return Name("answered", concept, description, None)


def parse_answer(reply: str | None, reason: str | None) -> Answer:
    """Status and content of a detection reply: `yes` or `no`, whatever its case and white space."""
    if reply is None:
        return Answer("failed", None, reason or "no reply")
    word = reply.strip().lower()
    if word not in CHOICES:
        return Answer("unparsed", None, "neither yes nor no")
    return Answer("answered", word == "yes", None)
