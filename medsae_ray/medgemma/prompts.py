"""The two prompts: naming (radiographs of a panel → JSON), detection (radiograph, description → yes or no).

A template is a text file that becomes one turn of the user; its `$fields` are filled in, those of images
with the images themselves. Whatever a model wrote is filled in as a JSON string literal without angle
brackets: it is quoted data, and holds no control token of a tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medsae_ray.errors import InputError

Kind = Literal["name", "detect"]
Part = dict[str, Any]
"""`{"type": "image", "image_id": …, "uri": …}` or `{"type": "text", "text": …}`."""

MAX_CONCEPT, MAX_DESCRIPTION = 80, 400
"""Longest concept and description, in characters."""
NAME_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "concept": {"type": "string", "minLength": 1, "maxLength": MAX_CONCEPT},
        "description": {"type": "string", "minLength": 1, "maxLength": MAX_DESCRIPTION},
    },
    "required": ["concept", "description"],
    "additionalProperties": False,
}
"""JSON schema of a naming reply, enforced while it is written."""
CHOICES = ("yes", "no")

_TEMPLATES = Path(__file__).with_name("templates")
_FIELD = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_IMAGE_FIELDS = ("images", "contrast", "image")
_FIELDS: dict[Kind, tuple[set[str], set[str]]] = {
    "name": ({"images"}, {"images", "contrast", "n"}),
    "detect": ({"image", "description"}, {"image", "description", "concept"}),
}
"""Fields that must stand in a template, and all that may."""


@dataclass(frozen=True)
class Template:
    """A checked template."""

    text: str
    sha256: str


def load_template(kind: Kind, path: str | None, *, contrast: bool = False) -> Template:
    """The template at `path`, or the package's own (`contrast`: the one for panels with contrast images).

    Raises InputError where it cannot be read, lacks a field or has one that is unknown.
    """
    default = _TEMPLATES / ("name_contrast.txt" if contrast else f"{kind}.txt")
    file = default if path is None else Path(path).expanduser()
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The template {kind}.template = {path!r} cannot be read ({type(error).__name__}): give a UTF-8 "
            "text file."
        ) from None
    needed, known = _FIELDS[kind]
    if contrast:
        needed = needed | {"contrast"}
    found = [name or bare for name, bare in _FIELD.findall(text)]
    fields = frozenset(found)
    for name in sorted(needed - fields):
        raise InputError(f"The template {kind}.template lacks the field ${name}: put it where it belongs.")
    for name in sorted(fields - known):
        raise InputError(
            f"The template {kind}.template has the unknown field ${name}: the fields are "
            f"{', '.join(f'${field}' for field in sorted(known))}."
        )
    for name in _IMAGE_FIELDS:
        if found.count(name) > 1:
            raise InputError(f"The template {kind}.template has ${name} twice: show each radiograph once.")
    if "contrast" in fields and not contrast:
        raise InputError(
            "The template name.template shows $contrast, but the panels hold no contrast images: make them "
            "with --panels.contrast_images, or drop the field."
        )
    return Template(text, hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class Task:
    """What is asked of every row: the template, and how long a reply may be."""

    kind: Kind
    template: Template
    max_tokens: int
    """Longest reply, in tokens; 1 for detection."""
    images_per_prompt: int
    """Most radiographs that a prompt shows; 1 for detection."""

    def parts(self, row: Mapping[str, Any]) -> list[Part]:
        """The user's turn for a request row: images and texts in the template's order.

        The last `n_contrast` of the row's `image_ids` and `uris` are contrast images. Texts are stripped,
        and empty ones left out.
        """
        images = [
            {"type": "image", "image_id": image_id, "uri": uri}
            for image_id, uri in zip(row["image_ids"], row["uris"], strict=True)
        ]
        n = len(images) - int(row["n_contrast"])
        shown = {"images": images[:n], "contrast": images[n:], "image": images[:1]}
        filled = {
            "n": str(n),
            "concept": quoted(row["concept"] or ""),
            "description": quoted(row["description"] or ""),
        }
        parts: list[Part] = []
        written = ""
        position = 0

        def finish_text() -> None:
            nonlocal written
            if written.strip():
                parts.append({"type": "text", "text": written.strip()})
            written = ""

        for match in _FIELD.finditer(self.template.text):
            written += self.template.text[position : match.start()]
            position = match.end()
            name = match[1] or match[2]
            if name in _IMAGE_FIELDS:
                finish_text()
                parts += shown[name]
            else:
                written += filled[name]
        written += self.template.text[position:]
        finish_text()
        return parts


def quoted(text: str) -> str:
    """Text of a model or a table as a JSON string literal on one line.

    Angle brackets, of which control tokens are made, and invisible characters are written as escapes.
    """
    literal = json.dumps(text, ensure_ascii=False)
    return "".join(
        json.dumps(c)[1:-1]
        if unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp")
        else {"<": "\\u003c", ">": "\\u003e"}.get(c, c)
        for c in literal
    )


def chat_prompt(tokenizer: Any, parts: list[Part]) -> str:
    """The prompt of one user turn by the checkpoint's own chat template, without a leading bos token.

    Who tokenizes it adds that token, as Gemma's tokenizer does by itself.
    """
    content = [
        {"type": "image"} if p["type"] == "image" else {"type": "text", "text": p["text"]} for p in parts
    ]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return prompt.removeprefix(tokenizer.bos_token or "")


def request_id(kind: Kind, model: str, template_sha256: str, settings: Mapping[str, Any], *key: Any) -> str:
    """32 hex digits that name one prompt to one model: the same for the same question, and for no other.

    `key`: what the row asks (neuron, image ids, condition, concept, description, …).
    """
    told = json.dumps(
        [kind, model, template_sha256, dict(settings), *key], sort_keys=True, ensure_ascii=False
    )
    return hashlib.sha256(told.encode()).hexdigest()[:32]
