"""The pages of a report from their templates, and the files beside them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOM = Path(__file__).parent
PAGES = ("index.html", "neurons.html", "neuron.html")


def render_pages(context: dict[str, Any]) -> dict[str, bytes]:
    """Every page by file name; what `context` holds is text, never markup."""
    environment = Environment(
        loader=FileSystemLoader(ROOM / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return {page: environment.get_template(page).render(context).encode() for page in PAGES}


def asset_files() -> dict[str, bytes]:
    """Scripts, styles and the libraries with their licences, by name relative to the report's folder."""
    return {
        path.relative_to(ROOM).as_posix(): path.read_bytes()
        for path in sorted((ROOM / "assets").rglob("*"))
        if path.is_file()
    }


def source_digest() -> str:
    """SHA-256 (hex) of all that makes a report: templates, assets and code. A newer one makes it anew."""
    sink = hashlib.sha256()
    for path in sorted(ROOM.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            content = path.read_bytes()
            sink.update(f"{path.relative_to(ROOM).as_posix()} {len(content)}\n".encode() + content)
    return sink.hexdigest()
