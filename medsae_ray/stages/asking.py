"""Prompts asked of the pool and their replies kept: what is on disk is never asked again.

`RUN/_partial/<table>/_replies` gets a Parquet file a block, as the blocks come. A killed stage loses the
blocks in flight; run again, it asks the prompts that have no reply there, those that failed among them. A
prompt's id says all that decides its reply, so that replies of an earlier version of the table serve as well.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medsae_ray.cluster import require_resources, start_ray
from medsae_ray.config import MedgemmaSettings, Settings
from medsae_ray.errors import InputError, printable
from medsae_ray.medgemma.pool import REPLY, Model, answer, refuse_backend, rows_per_block
from medsae_ray.medgemma.prompts import Task, chat_prompt
from medsae_ray.run import Manifest, Plan, Run, Staging

REQUESTS = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("image_ids", pa.list_(pa.string()), nullable=False),
        pa.field("uris", pa.list_(pa.string()), nullable=False),
        pa.field("n_contrast", pa.int32(), nullable=False),
        pa.field("concept", pa.string()),
        pa.field("description", pa.string()),
    ]
)
"""A row is a prompt to be asked (medgemma/pool.py)."""
REPLIES = pa.schema([REQUESTS.field("request_id"), *REPLY])
"""A row is a reply, or the reason why there is none."""
WORKING = "_replies"
"""Working folder of a staged table that outlives a change of its plan."""
SAMPLED = 50
"""Prompts of each table whose text is tokenized for an estimate."""
ENDPOINT_IMAGE_TOKENS, CHARACTERS_A_TOKEN = 256, 4


class Throughput(NamedTuple):
    """What the last pass over the pool took, from the start of the engines to the last reply."""

    prompts: int
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that came out of the prefix cache."""
    completion_tokens: int


class Collected(NamedTuple):
    """Replies in the order of the planned requests; where one has several, the first that is a reply."""

    reply: list[str | None]
    reason: list[str | None]
    p_yes: NDArray[np.float64]
    """NaN where the backend did not tell."""
    seconds: NDArray[np.float64]


def ask(requests: Iterable[pa.Table], staging: Staging, task: Task, settings: Settings) -> Throughput | None:
    """Have every request answered that has no reply on disk yet; None where there was none to ask.

    `requests`: tables of REQUESTS in the order in which they are best asked, a radiograph's together.
    """
    before = set(staging.data_files(WORKING))
    n_missing = _write_missing(requests, staging)
    if not n_missing:
        return None
    start = time.monotonic()
    start_ray(settings.ray)
    _require_replicas(settings.medgemma)
    import ray
    from ray.data import SaveMode
    from ray.exceptions import RayActorError

    rows = ray.data.read_parquet(staging.data_files("_requests"), filesystem=staging.filesystem)
    rows = rows.repartition(target_num_rows_per_block=rows_per_block(task, settings.medgemma))
    replies = answer(rows, task, settings.medgemma).map_batches(_as_replies, batch_format="pyarrow")
    try:
        replies.write_parquet(staging.path(WORKING), filesystem=staging.filesystem, mode=SaveMode.APPEND)
    except RayActorError as error:
        # Of an actor's own exception Ray keeps the text alone.
        told = re.search(r"InputError: (.+)", str(error))
        if told is None:
            raise
        raise InputError(told[1]) from None
    tokens = dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), 0)
    for table in _working(staging, except_for=before):
        for name in tokens:
            tokens[name] += pc.sum(table[name]).as_py() or 0
    return Throughput(n_missing, round(time.monotonic() - start, 3), **tokens)


def collect(request_ids: Sequence[str], staging: Staging) -> Collected:
    """The replies on disk of the planned requests; those of requests no longer planned are passed over.

    Raises RuntimeError where a request has neither a reply nor a reason.
    """
    planned = np.array(request_ids, "S32")
    order = np.argsort(planned)
    n = len(planned)
    reply: list[str | None] = [None] * n
    reason: list[str | None] = [None] * n
    p_yes, seconds = np.full(n, np.nan), np.zeros(n)
    for table in _replies(staging):
        ids = np.array(table["request_id"].to_pylist(), "S32")
        place = np.searchsorted(planned, ids, sorter=order)
        rows = order[np.minimum(place, n - 1)]
        replies, reasons = table["reply"].to_pylist(), table["reason"].to_pylist()
        told_p, told_seconds = table["p_yes"].to_pylist(), table["seconds"].to_pylist()
        for i in np.flatnonzero(planned[rows] == ids):
            row = rows[i]
            if reply[row] is None:
                # Detection has two replies: one string for all of them.
                reply[row] = None if replies[i] is None else sys.intern(replies[i])
                reason[row] = reasons[i]
                p_yes[row] = np.nan if told_p[i] is None else told_p[i]
                seconds[row] = told_seconds[i] or 0.0
    lost = sum(a is None and b is None for a, b in zip(reply, reason, strict=True))
    if lost:
        raise RuntimeError(f"{lost} of {n} prompts came back without a reply or a reason")
    return Collected(reply, reason, p_yes, seconds)


def refuse_failures(collected: Collected, settings: MedgemmaSettings) -> None:
    """Raises InputError where more than `medgemma.max_failed_share` of the prompts failed."""
    failed = [why for told, why in zip(collected.reply, collected.reason, strict=True) if told is None]
    n = len(collected.reply)
    if len(failed) > settings.max_failed_share * n:
        raise InputError(
            f"{len(failed)} of {n} prompts failed (the first: {printable(failed[0], 300)}), more than "
            f"medgemma.max_failed_share = {settings.max_failed_share} allows: mend the cause and run the "
            "stage again, which asks those alone, or raise the share."
        )


def require_fresh(run: Run, table: str, stage: str) -> Manifest:
    """The manifest of an input table that rests on nothing outdated.

    `Run.require` looks at its own inputs alone; here hours of prompts would be asked in vain.
    Raises InputError where it is missing, or anything it was made from was made again since.
    """
    manifest = run.require(table, stage)
    if not run.is_fresh(table):
        raise InputError(
            f"Table {table!r} of {run.uri} rests on a table that was made again since (`medsae status` says "
            "which): run the stages between them with --overwrite first."
        )
    return manifest


def begin_asking(run: Run, plan: Plan, settings: Settings) -> Staging | None:
    """Where to write a table of replies, or None where it is done.

    With `overwrite`, a table that is done but for prompts that failed is opened again to ask those.
    Raises InputError, before anything is begun, where the backend cannot answer.
    """
    done = run.manifest(plan.table)
    if done is None or done.fingerprint != plan.fingerprint:
        refuse_backend(settings.medgemma)
    staging = run.begin(plan, settings.overwrite, keep=[WORKING])
    if (
        staging is None
        and settings.overwrite
        and run.require(plan.table, plan.stage).notes["statuses"]["failed"]
    ):
        return run.restage(plan, keep=[WORKING])
    return staging


def estimate(requests: Iterable[pa.Table], task: Task, model: Model, staging: Staging) -> str:
    """Prompts, radiographs and tokens of the requests that have no reply on disk, in words.

    Text is counted by the checkpoint's tokenizer on the first prompts of each table and taken to be as long
    in the others; behind an endpoint there is none, and MedGemma's 256 tokens an image are assumed.
    """
    n_prompts, n_images, text_tokens = 0, 0, 0.0
    distinct: set[str] = set()
    answered, n_answered = _answered(staging), 0
    for table in requests:
        n_answered += table.num_rows
        table = table.filter(pc.invert(pc.is_in(table["request_id"], answered)))
        n_answered -= table.num_rows
        sample = [_text_tokens(row, task, model) for row in table.slice(0, SAMPLED).to_pylist()]
        n_prompts += table.num_rows
        text_tokens += table.num_rows * float(np.mean(sample)) if sample else 0.0
        images = table["image_ids"].combine_chunks().flatten()
        n_images += len(images)
        distinct |= set(images.unique().to_pylist())
    per_image = model.checkpoint.image_tokens if model.checkpoint else ENDPOINT_IMAGE_TOKENS
    tokens = n_images * per_image + text_tokens
    return (
        f"{n_prompts:,} prompts with {n_images:,} images ({len(distinct):,} distinct radiographs) and about "
        f"{tokens:,.0f} tokens to {model.name}, for at most {n_prompts * task.max_tokens:,} tokens of replies"
        + (f" ({n_answered:,} more prompts have their reply on disk)" if n_answered else "")
    )


def _text_tokens(row: dict[str, Any], task: Task, model: Model) -> float:
    parts = task.parts(row)
    if model.checkpoint is None:
        return sum(len(part["text"]) for part in parts if part["type"] == "text") / CHARACTERS_A_TOKEN
    return len(
        _tokenizer(model.checkpoint.path)(chat_prompt(_tokenizer(model.checkpoint.path), parts)).input_ids
    )


@functools.cache
def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def _require_replicas(settings: MedgemmaSettings) -> None:
    if settings.backend != "engine":
        return
    engines = settings.replicas_min * settings.tensor_parallel
    # One more for the tasks that read and write.
    wanted = {"CPU": engines * settings.cpus_per_replica + 1, "GPU": engines * settings.gpus_per_replica}
    require_resources("medgemma.replicas_min", wanted)


def _answered(staging: Staging) -> pa.Array:
    """Ids of the requests with a reply on disk."""
    found = [t["request_id"].filter(pc.is_valid(t["reply"])).combine_chunks() for t in _replies(staging)]
    return pa.concat_arrays(found) if found else pa.array([], pa.string())


def _write_missing(requests: Iterable[pa.Table], staging: Staging) -> int:
    """Write the requests without a reply to `_requests`; returns how many they are."""
    answered = _answered(staging)
    staging.delete("_requests")
    n = 0
    for number, table in enumerate(requests):
        missing = table.filter(pc.invert(pc.is_in(table["request_id"], answered)))
        if missing.num_rows:
            staging.write_table(missing.cast(REQUESTS), f"_requests/part-{number:05d}.parquet")
            n += missing.num_rows
    return n


def _replies(staging: Staging) -> Iterator[pa.Table]:
    """All replies on disk: of this version of the table, half done, and of the one that it replaces."""
    yield from _working(staging)
    table = staging.plan.table
    if staging.run.manifest(table) is not None:
        for batch in staging.run.dataset(table).to_batches():
            told = pa.Table.from_batches([batch])
            for field in REPLIES:
                if field.name not in told.column_names:
                    told = told.append_column(field, pa.nulls(told.num_rows, field.type))
            yield told.filter(pc.is_valid(told["reply"])).select(REPLIES.names)


def _working(staging: Staging, except_for: Collection[str] = ()) -> Iterator[pa.Table]:
    for path in staging.data_files(WORKING):
        if path in except_for:
            continue
        try:
            yield pq.read_table(path, filesystem=staging.filesystem)
        except pa.ArrowInvalid:
            # A file has its footer last: a kill cut this one off. Its prompts are asked again.
            staging.filesystem.delete_file(path)


def _as_replies(batch: pa.Table) -> pa.Table:
    return batch.select(REPLIES.names).cast(REPLIES)


def throughput_notes(throughput: Throughput | None) -> dict[str, Any]:
    """For the manifest's notes, from which the summary prints prompts/s, tokens and the cache's hit rate."""
    return {"throughput": None if throughput is None else throughput._asdict()}
