"""An engine that answers at once, for tests whose subject is who is asked what: `instant_engine:answer`.

`INSTANT_FAILING` says how many of 1,000 prompts fail; `INSTANT_ASKED` names a folder that takes the id of
every prompt that was asked.
"""

from __future__ import annotations

import functools
import json
import os
import uuid
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa

CONCEPTS = ("pleural effusion", "cardiomegaly", "pneumothorax", "lung opacity", "no common finding")


def answer(requests, task, settings):
    """Replies that follow from the request's id: 1 of 50 unparsed, 1 of 100 failed, else yes or no."""
    return requests.map_batches(functools.partial(reply, kind=task.kind), batch_format="pyarrow")


def reply(batch: pa.Table, kind: str) -> pa.Table:
    ids = batch["request_id"].to_pylist()
    if folder := os.environ.get("INSTANT_ASKED"):
        Path(folder, uuid.uuid4().hex).write_text("\n".join(ids))
    replies, p_yes, reasons = zip(*(told(i, kind) for i in ids), strict=True)
    n = batch.num_rows
    columns = {
        "reply": pa.array(replies, pa.string()),
        "p_yes": pa.array(p_yes, pa.float64()),
        "reason": pa.array(reasons, pa.string()),
        "prompt_tokens": np.full(n, 300),
        "cached_tokens": np.full(n, 256),
        "completion_tokens": np.ones(n, np.int64),
        "seconds": np.zeros(n),
    }
    for name, values in columns.items():
        batch = batch.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    return batch


def told(request_id: str, kind: str = "detect") -> tuple[str | None, float | None, str | None]:
    """Reply, p_yes and reason for one request."""
    draw = zlib.crc32(request_id.encode()) % 1000
    if draw < int(os.environ.get("INSTANT_FAILING", "10")):
        return None, None, "the engine is not there"
    if kind == "name":
        concept = CONCEPTS[draw % len(CONCEPTS)]
        return json.dumps({"concept": concept, "description": f"Signs of {concept}, {draw}."}), None, None
    if draw < 30:
        return "perhaps", None, None
    return ("yes" if draw >= 500 else "no"), draw / 1000, None
