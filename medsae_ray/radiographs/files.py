"""A data set's folder, local or at a URI, and its CSV tables as plain strings."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import pyarrow as pa
from pyarrow import csv as pacsv
from pyarrow import fs

from medsae_ray.errors import InputError


class Malformed(NamedTuple):
    """A record of a CSV file with too few or too many fields."""

    row: int
    reason: str


@dataclass(frozen=True)
class Csv:
    """A CSV file, every cell a string; a blank cell is an empty string.

    `rows[i]` is the number of record i in the file (the header is row 1). Records whose number of
    fields differs from the header's are in `malformed` instead of `table`.
    """

    uri: str
    table: pa.Table
    rows: np.ndarray
    malformed: list[Malformed]

    def require(self, *names: str) -> str:
        """The first of `names`, spellings of one column, that the file has; InputError when it has none."""
        present = self.table.column_names
        for name in names:
            if name in present:
                return name
        near = {column.casefold(): column for column in present if column}
        match = get_close_matches(names[0].casefold(), near, n=1, cutoff=0.6)
        hint = f"the nearest it has is {near[match[0]]!r}" if match else f"it has {', '.join(present[:20])}"
        raise InputError(f"{self.uri} has no column {names[0]!r}: {hint}")


@dataclass(frozen=True)
class Folder:
    """The folder at `root`: a local path, or a URI that `pyarrow.fs` opens (`s3://bucket/folder`).

    Paths given to the methods are relative to it, with `/` between components.
    """

    root: str
    _listings: dict[tuple[str, fs.FileType], list[str]] = field(default_factory=dict, compare=False)

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.root:
            return fs.LocalFileSystem(), str(Path(self.root).expanduser().absolute())
        try:
            return fs.FileSystem.from_uri(self.root)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"radiographs.root {self.root!r} is no URI that pyarrow opens") from error

    def uri(self, relative: str = "") -> str:
        """Where `relative` is: an absolute path for a local folder, else the root's URI with it appended."""
        filesystem, path = self._opened
        if isinstance(filesystem, fs.LocalFileSystem):
            return join(path, relative)
        root = urlsplit(self.root)
        return urlunsplit(root._replace(path=join(root.path or "/", relative)))

    def files(self, relative: str = "") -> list[str]:
        """Names of the files in a folder, sorted; none when there is no such folder."""
        return self._names(relative, fs.FileType.File)

    def folders(self, relative: str = "") -> list[str]:
        """Names of the folders in a folder, sorted; none when there is no such folder."""
        return self._names(relative, fs.FileType.Directory)

    def _names(self, relative: str, kind: fs.FileType) -> list[str]:
        if (relative, kind) not in self._listings:
            filesystem, path = self._opened
            try:
                entries = filesystem.get_file_info(
                    fs.FileSelector(join(path, relative), allow_not_found=True)
                )
            except OSError as error:
                raise InputError(f"{self.uri(relative)} cannot be listed: is it there, and yours?") from error
            for wanted in (fs.FileType.File, fs.FileType.Directory):
                self._listings[relative, wanted] = sorted(e.base_name for e in entries if e.type == wanted)
        return self._listings[relative, kind]

    def find(self, relative: str, *names: str) -> str | None:
        """The first of `names` (or of `names` + `.gz`) that lies in a folder, as a relative path."""
        present = self.files(relative)
        for name in names:
            for stored in (name, f"{name}.gz"):
                if stored in present:
                    return join(relative, stored)
        return None

    def check_exists(self) -> None:
        """InputError when there is no folder at the root."""
        filesystem, path = self._opened
        if filesystem.get_file_info(path).type != fs.FileType.Directory:
            raise InputError(f"radiographs.root: there is no folder at {self.root}")

    def read_lines(self, relative: str) -> list[str]:
        """The lines of a text file, stripped, without the blank ones."""
        return [
            line.strip()
            for line in self._read(relative).decode(errors="replace").splitlines()
            if line.strip()
        ]

    def read_csv(self, relative: str) -> Csv:
        """A CSV file (`.gz` accepted); InputError when it has no record or is not a UTF-8 CSV table."""
        uri, data = self.uri(relative), self._read(relative)
        empty = InputError(f"{uri} is empty: it needs a header and at least one row")
        if not data.strip():
            raise empty
        try:
            header_line = io.StringIO(data.split(b"\n", 1)[0].decode("utf-8-sig"))
            # pyarrow takes types by column name, so the names must be known first: left to infer, it
            # would turn an id such as 00000061 into 61.
            header = [name.strip() for name in next(csv.reader(header_line), [])]
            malformed: list[Malformed] = []

            def set_aside(row: pacsv.InvalidRow) -> str:
                malformed.append(
                    Malformed(row.number, f"{row.actual_columns} fields, not {row.expected_columns}")
                )
                return "skip"

            table = pacsv.read_csv(
                pa.BufferReader(data),
                # One thread: only then do the malformed rows carry their numbers.
                read_options=pacsv.ReadOptions(column_names=header, skip_rows=1, use_threads=False),
                parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=set_aside),
                convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
            )
        # The cause may quote a row, and with it a patient: it is not shown.
        except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
            raise InputError(f"{uri} is not a CSV table in UTF-8: save it again as one") from error
        repeated = [name for name in header if name and header.count(name) > 1]
        if repeated:
            raise InputError(f"{uri} has the column {repeated[0]!r} twice: keep one")
        if table.num_rows + len(malformed) == 0:
            raise empty
        numbers = np.arange(2, table.num_rows + len(malformed) + 2)
        rows = numbers[~np.isin(numbers, [record.row for record in malformed])]
        return Csv(uri, table, rows, malformed)

    def _read(self, relative: str) -> bytes:
        filesystem, path = self._opened
        try:
            with filesystem.open_input_stream(join(path, relative)) as stream:
                return stream.read()
        except FileNotFoundError as error:
            raise InputError(f"there is no file {self.uri(relative)}") from error
        except OSError as error:
            raise InputError(f"{self.uri(relative)} cannot be read: is it whole?") from error


def join(folder: str, name: str) -> str:
    """`folder/name`, either of which may be empty."""
    return f"{folder.rstrip('/')}/{name}" if folder and name else folder or name
