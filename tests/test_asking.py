"""Replies on disk: what is missing, what counts, what is passed over; no Ray here."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsae_ray.config import MedgemmaSettings
from medsae_ray.errors import InputError
from medsae_ray.medgemma.pool import rows_per_block
from medsae_ray.medgemma.prompts import Task, load_template
from medsae_ray.run import Plan, Run
from medsae_ray.stages.asking import REPLIES, REQUESTS, _write_missing, collect, refuse_failures

IDS = [f"{i:032x}" for i in (7, 3, 11, 5)]


@pytest.fixture
def staging(tmp_path):
    return Run(str(tmp_path / "run")).begin(Plan("detect", "verdicts", {}))


def replies(*rows):
    """Rows (position in IDS, reply, reason) as a table of replies."""
    columns = {name: [0] * len(rows) for name in REPLIES.names}
    columns["request_id"] = [IDS[i] for i, _, _ in rows]
    columns["reply"] = [reply for _, reply, _ in rows]
    columns["reason"] = [reason for _, _, reason in rows]
    columns["p_yes"] = [0.9 if reply == "yes" else None for _, reply, _ in rows]
    return pa.table(columns, schema=REPLIES)


def requests():
    n = len(IDS)
    columns = {
        "request_id": IDS,
        "neuron": range(n),
        "image_ids": [["a"]] * n,
        "uris": [["a.png"]] * n,
        "n_contrast": [0] * n,
        "concept": [None] * n,
        "description": [None] * n,
    }
    return pa.table(columns, schema=REQUESTS)


def missing(staging):
    n = _write_missing([requests()], staging)
    files = staging.data_files("_requests")
    listed = [i for path in files for i in pa.parquet.read_table(path)["request_id"].to_pylist()]
    assert n == len(listed)
    return listed


def test_only_what_has_no_reply_is_asked_again(staging):
    assert missing(staging) == IDS
    staging.write_table(
        replies((0, "yes", None), (1, "perhaps", None), (2, None, "timed out")), "_replies/a.parquet"
    )
    assert missing(staging) == [IDS[2], IDS[3]]
    staging.write_table(replies((2, "no", None), (3, "no", None)), "_replies/b.parquet")
    assert missing(staging) == []


def test_a_file_that_a_kill_cut_off_is_dropped_and_asked_again(staging):
    staging.write_table(replies((0, "yes", None)), "_replies/a.parquet")
    staging.write_table(replies((1, "yes", None)), "_replies/b.parquet")
    whole = staging.run.read_bytes("_partial", "verdicts", "_replies", "b.parquet")
    staging.write_bytes(whole[: len(whole) // 2], "_replies/b.parquet")
    assert missing(staging) == IDS[1:]
    assert [path.rpartition("/")[2] for path in staging.data_files("_replies")] == ["a.parquet"]


def test_a_reply_wins_over_a_failure_and_the_first_over_the_second(staging):
    staging.write_table(replies((0, None, "timed out"), (1, "yes", None)), "_replies/a.parquet")
    staging.write_table(
        replies((0, "no", None), (1, "no", None), (2, None, "gone"), (3, "no", None)), "_replies/b.parquet"
    )
    collected = collect(IDS, staging)
    assert collected.reply == ["no", "yes", None, "no"]
    assert collected.reason == [None, None, "gone", None]
    np.testing.assert_array_equal(collected.p_yes, [np.nan, 0.9, np.nan, np.nan])


def test_a_prompt_without_reply_or_reason_is_an_error(staging):
    staging.write_table(replies((0, "no", None)), "_replies/a.parquet")
    with pytest.raises(RuntimeError, match="3 of 4 prompts"):
        collect(IDS, staging)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.floats(0, 1))
def test_failures_are_refused_above_the_share_alone(failed, share):
    told = [(None, "gone") if f else ("no", None) for f in failed]
    collected = type("Collected", (), {"reply": [r for r, _ in told], "reason": [w for _, w in told]})
    settings = MedgemmaSettings(max_failed_share=share)
    if sum(failed) > share * len(failed):
        with pytest.raises(InputError, match=rf"{sum(failed)} of {len(failed)} prompts failed .*gone"):
            refuse_failures(collected, settings)
    else:
        refuse_failures(collected, settings)


@pytest.mark.parametrize(("images", "rows"), [(1, 256), (10, 25), (30, 8), (1000, 1)])
def test_a_block_shows_no_more_radiographs_than_its_rows(images, rows):
    task = Task("name", load_template("name", None), 100, images)
    assert rows_per_block(task, MedgemmaSettings(block_rows=256)) == rows
