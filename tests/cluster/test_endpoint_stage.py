"""`name` and `detect` by an HTTP endpoint: a server that fails in every way, and vLLM's own server."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from collections import Counter
from pathlib import Path

import commands
import numpy as np
import pandas as pd
import pytest
from commands import LABELLING, medsae

from medsae_ray.config import MedgemmaSettings

sys.path.append(str(Path(__file__).parents[1] / "medgemma"))
from faulty_server import MODEL, FaultyServer

KEY = "sk-very-secret-0123456789"
INPUTS = ("radiographs", "activations", "neurons", "dimensions", "sae", "embeddings")
KEYS = ["neuron", "image_id", "condition"]
TRIAL = "Is this image blank?"


def ask(run: Path, stage: str, url: str, *more: str, model: str = MODEL, **options):
    endpoint = ("--medgemma.backend", "endpoint", "--medgemma.url", url, "--medgemma.model", model)
    return medsae(stage, "--run", str(run), *LABELLING, *endpoint, *more, **options)


def read(run: Path, table: str) -> pd.DataFrame:
    return pd.read_parquet(run / table)


def asked(server: FaultyServer) -> Counter[str]:
    """How often each prompt came, without the trials; forgets them."""
    counts = Counter(
        request.key
        for request in server.requests
        if TRIAL not in request.body["messages"][0]["content"][-1]["text"]
    )
    server.requests.clear()
    return counts


@pytest.fixture(scope="module")
def panelled(phantom_run, tmp_path_factory):
    """A function that makes a run folder with panels."""
    first = tmp_path_factory.mktemp("panelled") / "run"
    for table in INPUTS:
        shutil.copytree(phantom_run.folder / table, first / table)
    medsae("panels", "--run", str(first), *LABELLING)
    return lambda folder: Path(shutil.copytree(first, folder / "run"))


@pytest.fixture(scope="module")
def undisturbed(panelled, tmp_path_factory):
    """A run folder with names and verdicts of a healthy server, and how often each prompt was asked."""
    run = panelled(tmp_path_factory.mktemp("undisturbed"))
    with FaultyServer() as server:
        ask(run, "name", server.url)
        names = asked(server)
        ask(run, "detect", server.url)
        return run, names, asked(server)


def passing_faults(body, n):
    """Every other prompt fails once or twice before it is answered."""
    draw = zlib.crc32(json.dumps(body).encode()) % 14
    faults = [["429"], ["500", "503"], ["garbage"], ["reset"], ["cut", "500"], ["hang"], ["no choices"]]
    return faults[draw][n] if draw < len(faults) and n < len(faults[draw]) else None


def test_a_server_that_fails_and_dies_half_way_costs_no_row_and_no_second_reply(
    panelled, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setitem(commands.ENVIRONMENT, "MEDGEMMA_API_KEY", KEY)
    healthy, names, verdicts = undisturbed
    run = panelled(tmp_path)
    told = []
    with FaultyServer(fault=passing_faults, key=KEY, retry_after="1") as server:
        patient = ("--medgemma.timeout_s", "3", "--medgemma.concurrency", "8")
        told.append(ask(run, "name", server.url, *patient))
        counts = asked(server)
        assert set(counts) == set(names)
        assert max(counts.values()) > 1
        assert server.peak <= 8
        pd.testing.assert_frame_equal(
            *(read(folder, "names").drop(columns="seconds") for folder in (run, healthy))
        )

        def die_half_way(body, n):
            if len(server.requests) == sum(verdicts.values()) // 2:
                server.stop(wait=False)
            return passing_faults(body, n)

        server.fault = die_half_way
        hasty = (*patient, "--medgemma.retries", "1")
        told.append(ask(run, "detect", server.url, *hasty, code=2))
        assert re.search(r"\d+ of \d+ prompts failed \(the first: the (server|connection)", told[-1].stderr)
        assert "Traceback" not in told[-1].stderr
        answered = Counter(request.key for request in server.requests if request.fault is None)
        asked(server)
        replies = pd.concat(map(pd.read_parquet, (run / "_partial/verdicts/_replies").glob("*.parquet")))
        assert sorted(replies["request_id"]) == sorted(read(healthy, "verdicts")["request_id"])
        missing = int(replies["reply"].isna().sum())
        assert 0 < missing < len(replies)

        server.fault = lambda body, n: None
        server.start()
        told.append(ask(run, "detect", server.url, *patient))
        again = asked(server)
        assert sum(again.values()) == missing
        assert not again - verdicts
        # Asked a second time were only those whose replies the dying server had under way.
        assert sum(((answered & verdicts) + again - verdicts).values()) <= 8
    pd.testing.assert_frame_equal(read(run, "verdicts"), read(healthy, "verdicts"))
    assert not (run / "_partial" / "verdicts").exists()
    assert KEY not in "".join(one.stdout + one.stderr for one in told)
    assert not [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_prompts_that_fail_for_good_have_their_status_and_no_answer(panelled, undisturbed, tmp_path):
    healthy, names, _ = undisturbed
    run = panelled(tmp_path)
    chosen = sorted(names)[:2]
    faults = {chosen[0]: "400", chosen[1]: "half json"}
    with FaultyServer() as server:
        server.fault = lambda body, n: faults.get(server.key_of(body))
        ask(run, "name", server.url, "--medgemma.max_failed_share", "0.5")
        counts = asked(server)
    assert counts == names + Counter({chosen[1]: 1})
    ours, theirs = read(run, "names"), read(healthy, "names")
    failed = ours["status"] == "failed"
    assert failed.sum() == 2
    assert set(ours.loc[failed, "reason"]) == {
        "the server answered 400: the body was refused",
        "the reply is not JSON (2 tries)",
    }
    assert ours.loc[failed, ["concept", "description", "reply"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(
        ours[~failed].drop(columns="seconds"), theirs[~failed].drop(columns="seconds")
    )


def test_a_wrong_key_or_model_is_told_before_anything_is_asked(panelled, tmp_path):
    with FaultyServer(key=KEY) as server:
        run = panelled(tmp_path / "key")
        refused = ask(run, "name", server.url, code=2)
        assert refused.stderr.count("\n") == 1
        assert "set MEDGEMMA_API_KEY" in refused.stderr
        server.key = None
        run = panelled(tmp_path / "model")
        refused = ask(run, "name", server.url, model="other/model", code=2)
        assert refused.stderr.count("\n") == 1
        assert f"set medgemma.model to what it serves ('{MODEL}')" in refused.stderr
        assert not server.requests


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    """The address of vLLM's own server with the stand-in, under the engine backend's arguments."""
    from medsae_ray.medgemma.checkpoint import check_checkpoint
    from medsae_ray.medgemma.engine import engine_arguments

    chosen = dict(zip(LABELLING[::2], LABELLING[1::2], strict=True))
    settings = MedgemmaSettings(
        gpus_per_replica=0,
        dtype=chosen["--medgemma.dtype"],
        max_model_len=int(chosen["--medgemma.max_model_len"]),
        max_num_seqs=int(chosen["--medgemma.max_num_seqs"]),
        engine=json.loads(chosen["--medgemma.engine"]),
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", check_checkpoint("stand-in", False).path, "--served-model-name", "stand-in"]
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--enable-prompt-tokens-details"]
    for name, value in engine_arguments(int(chosen["--panels.name_images"]), settings).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    environment = {**commands.ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with open(log, "wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            stdout=stream, stderr=stream, env=environment,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + 400
        while not _is_up(url):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=5):
            return True
    except OSError:
        return False


def test_vllms_server_gives_the_rows_of_the_engine_backend(labelled, copied, vllm_server):
    engine = labelled.run
    run = copied("panels", "candidates")
    ask(run, "name", vllm_server, model="stand-in")
    columns = ["neuron", "concept", "description", "status", "reason", "reply", "prompt_sha256"]
    pd.testing.assert_frame_equal(*(read(folder, "names")[columns] for folder in (run, engine)))
    assert prompt_tokens(run, "names") == prompt_tokens(engine, "names")

    # With the very table of the engine's names, so that an unlike name would not ask other questions.
    shutil.rmtree(run / "names")
    shutil.copytree(engine / "names", run / "names")
    ask(run, "detect", vllm_server, model="stand-in")
    ours, theirs = (read(folder, "verdicts").set_index(KEYS).sort_index() for folder in (run, engine))
    assert len(theirs) > 100
    # Asked anew: the id of a prompt names who answers it.
    assert not set(ours["request_id"]) & set(theirs["request_id"])
    assert ours.index.equals(theirs.index)
    same = ["description_neuron", "expected", "status", "reason", "prompt_sha256", "quantile"]
    pd.testing.assert_frame_equal(ours[same], theirs[same])
    assert prompt_tokens(run, "verdicts") == prompt_tokens(engine, "verdicts")
    assert ours["p_yes"].notna().all()
    difference = (ours["p_yes"] - theirs["p_yes"]).abs()
    print(f"largest difference of p_yes in {len(ours)} prompts: {difference.max():.2g}")
    assert difference.max() <= 0.02
    unlike = theirs[ours["answer"] != theirs["answer"]]
    assert (unlike["p_yes"] - 0.5).abs().le(0.02).all(), unlike["p_yes"]
    assert np.array_equal(ours["answer"], ours["reply"] == "yes")


def prompt_tokens(run: Path, table: str) -> int:
    notes = json.loads((run / table / "_manifest.json").read_text())["notes"]
    return notes["throughput"]["prompt_tokens"]
