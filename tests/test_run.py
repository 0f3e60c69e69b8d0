"""Runs: manifests, fingerprints, all-or-nothing tables, on a local folder and on an fsspec file system."""

import dataclasses
import json

import pyarrow as pa
import pytest

from medsae_ray.errors import InputError
from medsae_ray.run import MANIFEST, PARTIAL, Plan, Run, table_digest
from medsae_ray.status import _state

TABLE = pa.table({"image_id": ["a", "b"], "value": [1.0, 2.0]})


@pytest.fixture(params=["local", "fsspec"])
def run(request, tmp_path):
    if request.param == "local":
        return Run(str(tmp_path / "run"))
    import fsspec

    fsspec.filesystem("memory").store.clear()
    return Run("memory://bucket/run")


def plan(**settings) -> Plan:
    return Plan("embed", "embeddings", {"size": 1, **settings}, {"radiographs": "abc"})


def commit(run, a_plan, table=TABLE, overwrite=False):
    staging = run.begin(a_plan, overwrite)
    staging.write_table(table)
    return staging.commit(rows_in=2, rows_out=table.num_rows, quarantined=0, stand_ins=["encoder x"])


def test_a_committed_table_is_read_back_and_described(run):
    manifest = commit(run, plan())
    assert run.read("embeddings").equals(TABLE)
    assert run.manifest("embeddings") == manifest
    assert manifest.files == [{"name": "part-00000.parquet", "bytes": manifest.files[0]["bytes"], "rows": 2}]
    assert manifest.rows_in == 2
    assert [m.table for m in run.manifests()] == ["embeddings"]


def test_a_done_table_is_skipped_and_another_setting_refused_by_name(run):
    commit(run, plan())
    assert run.begin(plan()) is None
    with pytest.raises(InputError, match=r"size was 1, now 2.*--overwrite"):
        run.begin(plan(size=2))
    changed = Plan("embed", "embeddings", {"size": 1}, {"radiographs": "other"})
    with pytest.raises(InputError, match="its input radiographs differs"):
        run.begin(changed)
    other = TABLE.slice(0, 1)
    commit(run, plan(size=2), other, overwrite=True)
    assert run.read("embeddings").equals(other)


def test_a_half_done_table_is_resumed_with_its_files_and_refused_for_other_settings(run):
    run.begin(plan()).write_table(TABLE, "_rows/one.parquet")
    assert run.manifest("embeddings") is None
    again = run.begin(plan())
    assert [path.rsplit("/", 1)[1] for path in again.data_files("_rows")] == ["one.parquet"]
    with pytest.raises(InputError, match="has half of a table"):
        run.begin(plan(size=2))
    assert run.begin(plan(size=2), overwrite=True).data_files("_rows") == []


def test_a_commit_that_was_cut_off_is_finished_by_the_next_call(run, monkeypatch):
    staging = run.begin(plan())
    staging.write_table(TABLE)

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(staging), "_move_into_place", killed)
        with pytest.raises(KeyboardInterrupt):
            staging.commit(rows_in=2, rows_out=2)
    assert run.manifest("embeddings") is None
    assert run.begin(plan()) is None
    assert run.read("embeddings").equals(TABLE)


def test_a_commit_cut_off_while_clearing_up_keeps_the_table(run):
    staging = run.begin(plan())
    staging.write_table(TABLE)
    told = staging.commit(rows_in=2, rows_out=2)
    # What a kill in the middle of deleting the staged copy leaves: its manifest, not its files.
    run.filesystem.create_dir(staging.folder, recursive=True)
    staging.write_json(MANIFEST, dataclasses.asdict(told))
    assert run.begin(plan()) is None
    assert run.read("embeddings").equals(TABLE)
    assert run.manifest("embeddings") == told


def test_an_input_made_again_since_is_refused_as_stale(run):
    first = commit(run, plan())
    child = Plan("fit", "sae", {}, {"embeddings": first.fingerprint})
    staging = run.begin(child)
    staging.write_table(TABLE)
    staging.commit(rows_in=2, rows_out=2)
    grandchild = Plan("encode", "activations", {}, {"sae": child.fingerprint})
    staging = run.begin(grandchild)
    staging.write_table(TABLE)
    staging.commit(rows_in=2, rows_out=2)
    assert run.require("sae", "fit").table == "sae"
    commit(run, plan(size=2), overwrite=True)
    with pytest.raises(InputError, match=r"'sae' of .* is stale, as 'embeddings' was made again since"):
        run.require("sae", "fit")
    told = {m.table: _state(run.stale_inputs(m.table)) for m in run.manifests()}
    assert told["embeddings"] == "fresh"
    assert told["sae"] == "stale (embeddings changed)"
    assert told["activations"] == "stale (sae changed)"


def test_working_files_are_not_part_of_the_table(run):
    staging = run.begin(plan())
    staging.write_table(TABLE)
    staging.write_table(TABLE, "_rows/one.parquet")
    staging.write_bytes(b"{}", "extra.json")
    manifest = staging.commit(rows_in=2, rows_out=2)
    assert [f["name"] for f in manifest.files] == ["extra.json", "part-00000.parquet"]
    assert run.read("embeddings").num_rows == 2
    assert run.read_bytes("embeddings", "extra.json") == b"{}"


def test_stand_ins_are_inherited_by_what_is_made_from_them(run):
    made = commit(run, plan())
    child = Plan("fit", "sae", {}, {"embeddings": made.fingerprint})
    staging = run.begin(child)
    staging.write_table(TABLE)
    assert staging.commit(rows_in=2, rows_out=2).stand_ins == ["encoder x"]


def test_a_missing_table_names_the_stage_to_run(run):
    with pytest.raises(InputError, match=r"has no table 'sae': run `medsae fit`"):
        run.require("sae", "fit")


def test_columns_are_checked_on_read(run):
    commit(run, plan())
    with pytest.raises(InputError, match=r"Column 'split' of table 'embeddings' .* is missing"):
        run.read("embeddings", pa.schema([("image_id", pa.string()), ("split", pa.string())]))
    with pytest.raises(InputError, match="is double, but float is needed"):
        run.read("embeddings", pa.schema([("value", pa.float32())]))


def test_nothing_is_left_aside_after_a_commit(tmp_path):
    run = Run(str(tmp_path))
    commit(run, plan())
    staged = (
        [p for p in (tmp_path / PARTIAL).rglob("*") if p.is_file()] if (tmp_path / PARTIAL).exists() else []
    )
    assert staged == []
    assert json.loads((tmp_path / "embeddings" / MANIFEST).read_text())["stage"] == "embed"


def test_fingerprints_change_with_settings_and_inputs_and_not_with_key_order():
    one = Plan("s", "t", {"a": 1, "b": 2}, {"x": "1", "y": "2"})
    same = Plan("s", "t", {"b": 2, "a": 1}, {"y": "2", "x": "1"})
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != Plan("s", "t", {"a": 1, "b": 3}, one.inputs).fingerprint
    assert one.fingerprint != Plan("s", "t", one.settings, {"x": "1", "y": "3"}).fingerprint


def test_the_digest_of_a_table_does_not_depend_on_its_chunks():
    parts = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1, 1)])
    assert parts["image_id"].num_chunks == 2
    assert table_digest(parts) == table_digest(TABLE)
    assert table_digest(TABLE.slice(0, 1)) != table_digest(TABLE)


def test_an_unknown_scheme_is_one_sentence():
    with pytest.raises(InputError, match="No file system opens 'nosuch://x'"):
        Run("nosuch://x")
