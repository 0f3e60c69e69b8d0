"""The one exception a user causes: shown as a single sentence, exit code 2, no traceback."""

from __future__ import annotations

import unicodedata


class InputError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence: what is wrong, where (file, row, key), what to do about it.
    It never names a patient: a row is named by its `image_id`, a table by its path and row number.
    """


def printable(text: str | None, width: int) -> str:
    """Text from outside for one terminal cell: one line, no control or invisible character, at most `width`.

    Unicode's category C holds escape sequences' first bytes, direction overrides and unassigned code points.
    """
    clean = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text or "-")
    line = " ".join(clean.split())
    return line if len(line) <= width else line[: max(width - 1, 0)].rstrip() + "…"
