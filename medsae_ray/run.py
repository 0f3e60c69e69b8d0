"""A run: a folder (local, or any pyarrow/fsspec URI) of tables, each with a manifest that says it is whole.

A stage writes its table aside, in `RUN/_partial/<table>`, and commits it: the manifest is written into the
folder, which is then moved into place. On a local file system the move is one rename; on an object store
the files are copied and the manifest comes last, so a table without a manifest was never there.

The fingerprint of a table is the SHA-256 of the settings that change its results and of its inputs'
fingerprints. Done with the same fingerprint: the stage is skipped. Done, or half done, with another:
refused, naming the settings that differ. Half done with the same: resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import posixpath
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from medsae_ray.errors import InputError

MANIFEST = "_manifest.json"
STARTED = "_started.json"
PARTIAL = "_partial"
VERSIONED = ("medsae-ray", "ray", "torch", "transformers", "numpy", "scipy", "pyarrow")


@dataclass(frozen=True)
class Plan:
    """What a stage is about to write, before it is known whether it must."""

    stage: str
    table: str
    settings: dict[str, Any]
    """Settings that change the result, by name."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each input: a table's name or a file's role (`weights`) to a hex digest."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the stage, its settings and its inputs."""
        told = {"stage": self.stage, "settings": self.settings, "inputs": self.inputs}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What a table's folder says about itself (`_manifest.json`)."""

    stage: str
    table: str
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    files: list[dict[str, Any]]
    """`name` (relative to the table's folder), `bytes`, and `rows` for Parquet files."""
    rows_in: int
    rows_out: int
    quarantined: int
    seconds: float
    finished: str
    versions: dict[str, str]
    stand_ins: list[str]
    """Models that stood in for the real ones, here or in any input."""
    notes: dict[str, Any]
    """Figures of the stage itself that the summary repeats."""


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path in it of a local path, a pyarrow URI or an fsspec URI.

    Raises InputError where no file system of that scheme is installed.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as unknown:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise InputError(
                f"No file system opens {uri!r} ({error or unknown}); use a local path, s3://, gs:// or "
                "install the fsspec package of that scheme."
            ) from None
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


class Run:
    """A run folder: reads committed tables, stages new ones.

    Args:
        uri: local path, or a URI that pyarrow or fsspec opens. The folder is made when first written to.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else str(Path(uri).expanduser().absolute())
        self.filesystem, self.root = open_filesystem(uri)

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on this machine's file system."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, *parts: str) -> str:
        """A path inside the run, in the run's own file system."""
        return posixpath.join(self.root, *parts)

    def manifest(self, table: str) -> Manifest | None:
        """The manifest of a committed table, or None where the table is missing."""
        told = self._read_json(self.path(table, MANIFEST))
        return None if told is None else Manifest(**told)

    def manifests(self) -> list[Manifest]:
        """Manifests of all committed tables, in the order in which they were finished."""
        folders = self.filesystem.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        names = [f.base_name for f in folders if f.type == pafs.FileType.Directory]
        nested = [f"quarantine/{f.base_name}" for f in self._list("quarantine")]
        found = [self.manifest(name) for name in [*names, *nested] if name != PARTIAL]
        return sorted((m for m in found if m is not None), key=lambda m: m.finished)

    def require(self, table: str, stage: str) -> Manifest:
        """The manifest of an input table.

        Raises InputError naming the stage to run first, where the table is missing or was made from inputs
        that were made again since: figures of two generations must not mix.
        """
        manifest = self.manifest(table)
        if manifest is None:
            raise InputError(f"The run {self.uri} has no table {table!r}: run `medsae {stage}` on it first.")
        for name, fingerprint in manifest.inputs.items():
            now = self.manifest(name)
            if now is not None and now.fingerprint != fingerprint:
                raise InputError(
                    f"Table {table!r} of {self.uri} is stale, as {name!r} was made again since: run "
                    f"`medsae {stage} --overwrite` on it first."
                )
        return manifest

    def stale_inputs(self, table: str) -> list[str]:
        """Inputs of a committed table that were made again since, or that rest on one that was."""
        manifest = self.manifest(table)
        return [
            name
            for name, fingerprint in (manifest.inputs.items() if manifest else ())
            if (now := self.manifest(name)) and (now.fingerprint != fingerprint or self.stale_inputs(name))
        ]

    def is_fresh(self, table: str) -> bool:
        """Whether a table is there, and neither it nor anything it was made from was outdated since."""
        return self.manifest(table) is not None and not self.stale_inputs(table)

    def dataset(self, table: str, schema: pa.Schema | None = None) -> pads.FileSystemDataset:
        """A committed table, lazily; its columns are checked against `schema`.

        Raises InputError naming the first column that is missing or of another type.
        """
        files = self.files(table)
        found = pq.read_schema(files[0], filesystem=self.filesystem)
        for wanted in schema or ():
            index = found.get_field_index(wanted.name)
            if index < 0 or found.field(index).type != wanted.type:
                have = "is missing" if index < 0 else f"is {found.field(index).type}"
                raise InputError(
                    f"Column {wanted.name!r} of table {table!r} in {self.uri} {have}, but {wanted.type} is "
                    "needed: delete the table's folder and run its stage again."
                )
        return pads.dataset(files, filesystem=self.filesystem, format="parquet", schema=found)

    def read(
        self, table: str, schema: pa.Schema | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """A committed table, whole, in memory."""
        return self.dataset(table, schema).to_table(columns=list(columns) if columns else None)

    def files(self, table: str) -> list[str]:
        """Paths of a committed table's Parquet files, in the run's file system."""
        manifest = self.manifest(table)
        if manifest is None:
            raise InputError(f"The run {self.uri} has no table {table!r}.")
        return [self.path(table, f["name"]) for f in manifest.files if f["name"].endswith(".parquet")]

    def delete(self, table: str) -> None:
        """Remove a table; fine where it is absent."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.path(table))

    def read_bytes(self, *parts: str) -> bytes:
        """The content of one file of the run."""
        with self.filesystem.open_input_stream(self.path(*parts)) as stream:
            return stream.read()

    def write_bytes(self, content: bytes, *parts: str) -> None:
        """Write one file of the run (not a table: `summary.json`, a figure)."""
        path = self.path(*parts)
        self.filesystem.create_dir(posixpath.dirname(path), recursive=True)
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def begin(
        self, plan: Plan, overwrite: bool = False, *, keep: Sequence[str] = (), beside: str | None = None
    ) -> Staging | None:
        """Where to write a planned table, or None where it is done already.

        `keep` names working folders of another, half done table that this one may use as well. `beside` is a
        second table of the same plan: where a kill between the two commits left one of another plan, both
        are made anew.

        Raises InputError where the table (whole or half done) was made with other settings or inputs
        and `overwrite` is off.
        """
        staging = Staging(self, plan)
        staging.finish_interrupted_commit()
        done = self.manifest(plan.table)
        if done is not None and done.fingerprint == plan.fingerprint:
            second = self.manifest(beside) if beside else done
            whole = second is not None and second.fingerprint == plan.fingerprint
            return None if whole else self.restage(plan, keep)
        started = self._read_json(posixpath.join(staging.folder, STARTED))
        for state, earlier in (("holds", done and dataclasses.asdict(done)), ("has half of", started)):
            if earlier and earlier["fingerprint"] != plan.fingerprint and not overwrite:
                raise InputError(
                    f"The run {self.uri} {state} a table {plan.table!r} made otherwise "
                    f"({_difference(earlier, plan)}): choose another run folder, or replace it with "
                    "--overwrite."
                )
        if started is None or started["fingerprint"] != plan.fingerprint:
            staging.start_afresh(keep)
        return staging

    def restage(self, plan: Plan, keep: Sequence[str] = ()) -> Staging:
        """Where to write a planned table anew, whatever is there: for tables that another's plan decides."""
        staging = Staging(self, plan)
        staging.start_afresh(keep)
        return staging

    def _list(self, folder: str) -> list[pafs.FileInfo]:
        return self.filesystem.get_file_info(pafs.FileSelector(self.path(folder), allow_not_found=True))

    def _read_json(self, path: str) -> dict[str, Any] | None:
        try:
            with self.filesystem.open_input_stream(path) as stream:
                return json.loads(stream.read())
        except FileNotFoundError:
            return None


class Staging:
    """A table being written, aside from the committed ones, in `RUN/_partial/<table>`."""

    def __init__(self, run: Run, plan: Plan) -> None:
        self.run = run
        self.plan = plan
        self.filesystem = run.filesystem
        self.folder = run.path(PARTIAL, plan.table)

    def path(self, *parts: str) -> str:
        """A path inside the staged folder, in the run's file system."""
        return posixpath.join(self.folder, *parts)

    def start_afresh(self, keep: Sequence[str] = ()) -> None:
        """Empty the staged folder but for the folders in `keep`, and note what is being made in it."""
        selector = pafs.FileSelector(self.folder, allow_not_found=True)
        for info in self.filesystem.get_file_info(selector):
            if info.base_name in keep:
                continue
            if info.type == pafs.FileType.Directory:
                self.filesystem.delete_dir(info.path)
            else:
                self.filesystem.delete_file(info.path)
        self.filesystem.create_dir(self.folder, recursive=True)
        told = {
            "fingerprint": self.plan.fingerprint,
            "settings": self.plan.settings,
            "inputs": self.plan.inputs,
            "started": time.time(),
        }
        self.write_json(STARTED, told)

    def delete(self, *parts: str) -> None:
        """Remove the staged folder, or one folder in it; fine where it is absent."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.path(*parts))

    def data_files(self, folder: str) -> list[str]:
        """Paths of the Parquet files in one folder of the staged table."""
        selector = pafs.FileSelector(self.path(folder), recursive=True, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(f.path for f in infos if f.path.endswith(".parquet"))

    def write_table(self, table: pa.Table, name: str = "part-00000.parquet") -> None:
        """Write one Parquet file of the table."""
        with self.writer(table.schema, name) as writer:
            writer.write_table(table)

    @contextlib.contextmanager
    def writer(self, schema: pa.Schema, name: str) -> Iterator[pq.ParquetWriter]:
        """A writer of one Parquet file, for a table that does not fit in memory."""
        path = self.path(name)
        self.filesystem.create_dir(posixpath.dirname(path), recursive=True)
        with pq.ParquetWriter(path, schema, filesystem=self.filesystem, compression="zstd") as writer:
            yield writer

    def write_bytes(self, content: bytes, name: str) -> None:
        """Write one file beside the table's Parquet, in a folder of its own if `name` has one."""
        path = self.path(name)
        self.filesystem.create_dir(posixpath.dirname(path), recursive=True)
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def write_json(self, name: str, told: Any) -> None:
        """Write one JSON file; after a kill it is there whole or not at all."""
        content = json.dumps(told, indent=1, default=str).encode()
        if not self.run.is_local:
            self.write_bytes(content, name)
            return
        # An object store shows a file when it is whole; a local one would show half of it after a kill.
        self.write_bytes(content, f"{name}.new")
        self.filesystem.move(self.path(f"{name}.new"), self.path(name))

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote; None where nothing is."""
        return self.run._read_json(self.path(name))

    def commit(
        self,
        *,
        rows_in: int,
        rows_out: int,
        quarantined: int = 0,
        stand_ins: Iterable[str] = (),
        notes: dict[str, Any] | None = None,
    ) -> Manifest:
        """Write the manifest and move the table into place, replacing an earlier one."""
        started = self.read_json(STARTED) or {"started": time.time()}
        inherited = [m.stand_ins for name in self.plan.inputs if (m := self.run.manifest(name))]
        manifest = Manifest(
            stage=self.plan.stage,
            table=self.plan.table,
            fingerprint=self.plan.fingerprint,
            settings=self.plan.settings,
            inputs=self.plan.inputs,
            files=self._describe_files(),
            rows_in=rows_in,
            rows_out=rows_out,
            quarantined=quarantined,
            seconds=round(time.time() - started["started"], 3),
            finished=datetime.now(UTC).isoformat(timespec="milliseconds"),
            versions=_versions(),
            stand_ins=sorted({*stand_ins, *(name for names in inherited for name in names)}),
            notes=notes or {},
        )
        self.write_json(MANIFEST, dataclasses.asdict(manifest))
        self._move_into_place()
        return manifest

    def finish_interrupted_commit(self) -> None:
        """Move a staged folder into place that had its manifest, hence was whole, when its driver died."""
        told = self.read_json(MANIFEST)
        if told is None or told["fingerprint"] != self.plan.fingerprint:
            return
        done = self.run.manifest(self.plan.table)
        copied = done is not None and done.finished == told["finished"]
        if copied or {f["name"] for f in told["files"]} - set(self._file_sizes()):
            # Only the clearing up was cut off; or it had begun, and what is left here is no whole table.
            self.delete()
        else:
            self._move_into_place()

    def _move_into_place(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(STARTED))
        for folder in self.filesystem.get_file_info(pafs.FileSelector(self.folder)):
            if folder.type == pafs.FileType.Directory and folder.base_name.startswith("_"):
                self.delete(folder.base_name)
        target = self.run.path(self.plan.table)
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(target)
        self.filesystem.create_dir(posixpath.dirname(target), recursive=True)
        if self.run.is_local:
            self.filesystem.move(self.folder, target)
            return
        # An object store has no rename: the manifest goes last, so a reader never sees half a table.
        for name in [*self._file_sizes(), MANIFEST]:
            destination = posixpath.join(target, name)
            self.filesystem.create_dir(posixpath.dirname(destination), recursive=True)
            self.filesystem.copy_file(self.path(name), destination)
        self.filesystem.delete_file(self.path(MANIFEST))
        self.delete()

    def spoilt(self, what: str) -> RuntimeError:
        """Remove what is staged and give the error to raise: the next run of the stage starts afresh."""
        self.delete()
        return RuntimeError(
            f"{what}; the half done {self.plan.table} is removed: run `medsae {self.plan.stage}` again."
        )

    def _file_sizes(self) -> dict[str, int]:
        """Name (relative) to bytes of every staged file that belongs to the table."""
        selector = pafs.FileSelector(self.folder, recursive=True)
        infos = [f for f in self.filesystem.get_file_info(selector) if f.type == pafs.FileType.File]
        prefix = self.folder.rstrip("/") + "/"
        names = {f.path.split(prefix, 1)[1]: f.size for f in infos}
        return {n: size for n, size in sorted(names.items()) if not any(p[0] == "_" for p in n.split("/"))}

    def _describe_files(self) -> list[dict[str, Any]]:
        described = []
        for name, size in self._file_sizes().items():
            told: dict[str, Any] = {"name": name, "bytes": size}
            if name.endswith(".parquet"):
                told["rows"] = pq.read_metadata(self.path(name), filesystem=self.filesystem).num_rows
            described.append(told)
        return described


def table_digest(table: pa.Table) -> str:
    """SHA-256 (hex) of a table's rows, whatever its chunks."""
    sink = hashlib.sha256()
    for batch in table.combine_chunks().to_batches(max_chunksize=65_536):
        for column in batch.columns:
            sink.update(json.dumps(column.to_pylist()).encode())
    return sink.hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a local file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _difference(earlier: dict[str, Any], plan: Plan) -> str:
    changed = [
        f"{name} was {earlier['settings'].get(name)!r}, now {plan.settings.get(name)!r}"
        for name in sorted({*earlier["settings"], *plan.settings})
        if earlier["settings"].get(name) != plan.settings.get(name)
    ]
    changed += [
        f"its input {name} differs"
        for name in sorted({*earlier["inputs"], *plan.inputs})
        if earlier["inputs"].get(name) != plan.inputs.get(name)
    ]
    return "; ".join(f"{plan.stage}: {item}" for item in changed) or "its stage has changed"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
