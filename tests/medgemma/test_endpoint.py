"""The endpoint backend's client against a server that fails: each row has its reply or its reason."""

import asyncio
import base64
import io
import json
import math
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate

import numpy as np
import pytest
from faulty_server import CHOICE_IDS, MODEL, TOKENS, FaultyServer, p_yes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import SecretStr
from scipy.special import softmax

from medsae_ray.config import MedgemmaSettings
from medsae_ray.errors import InputError
from medsae_ray.medgemma import endpoint
from medsae_ray.medgemma.chat import (
    MAX_PAUSE_S,
    TOP_LOGPROBS,
    Client,
    Served,
    endpoint_address,
    probability_of_yes,
    retry_after,
)
from medsae_ray.medgemma.endpoint import ask, check_endpoint
from medsae_ray.medgemma.images import read_image
from medsae_ray.medgemma.prompts import NAME_SCHEMA, Task, load_template

KEY = "sk-very-secret-0123456789"
DETECT = Task("detect", load_template("detect", None), 1, 1)
NAME = Task("name", load_template("name", None), 200, 3)
IDS = Served(None, CHOICE_IDS)


@pytest.fixture(scope="module")
def radiographs(tmp_path_factory):
    """Six images under a patient's folder: grey PNG, JPEG, 16 bit, colour, one too large for `max_side`."""
    folder = tmp_path_factory.mktemp("patient00042")
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (5, 60, 50), np.uint8)
    Image.fromarray(grey[0]).save(folder / "0.png")
    Image.fromarray(grey[1]).save(folder / "1.jpg")
    Image.fromarray(grey[2].astype(np.uint16) * 257).save(folder / "2.png")
    Image.fromarray(rng.integers(0, 256, (60, 50, 3), np.uint8)).save(folder / "3.png")
    Image.fromarray(rng.integers(0, 256, (500, 300), np.uint8)).save(folder / "4.png")
    Image.fromarray(grey[4]).save(folder / "5.png")
    return {f"image-{path.stem}": str(path) for path in sorted(folder.iterdir())}


@pytest.fixture
def server():
    with FaultyServer() as started:
        yield started


def rows_of(radiographs, n, images=1):
    ids = list(radiographs)
    chosen = [[ids[(i + j) % len(ids)] for j in range(images)] for i in range(n)]
    return [
        {
            "request_id": f"r{i}",
            "neuron": i,
            "image_ids": chosen[i],
            "uris": [radiographs[image_id] for image_id in chosen[i]],
            "n_contrast": 0,
            "concept": None if images > 1 else f"finding {i}",
            "description": None if images > 1 else f"sign number {i}",
        }
        for i in range(n)
    ]


def settings_of(server, **changed):
    return MedgemmaSettings(
        **{"backend": "endpoint", "model": MODEL, "url": server.url, "concurrency": 4, "max_side": 128}
        | {"timeout_s": 5.0, "retries": 3, "key_variable": "TEST_KEY"}
        | changed
    )


def ask_all(server, rows, task=DETECT, served=IDS, first_pause_s=0.01, give_up_s=60.0, **changed):
    async def run():
        settings = settings_of(server, **changed)
        async with Client(settings, served, first_pause_s=first_pause_s, give_up_s=give_up_s) as client:
            return await ask(rows, task, client)

    return asyncio.run(run())


def description(body):
    return body["messages"][0]["content"][-1]["text"].rpartition("sign number ")[2].rstrip('"')


def at_row(*numbers):
    """For a `fault`: whether the body is of one of these rows."""
    return lambda body: description(body) in map(str, numbers)


def pixels_of(part):
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_a_detection_shows_the_engines_pixels_and_asks_for_one_token(server, radiographs):
    rows = rows_of(radiographs, 6)
    replies = ask_all(server, rows)
    assert len(server.requests) == 6
    for request in server.requests:
        row = rows[int(description(request.body))]
        (turn,) = request.body.pop("messages")
        image, text = turn["content"]
        told = DETECT.parts(row)
        assert turn["role"] == "user"
        assert text == {"type": "text", "text": told[1]["text"]}
        wanted = read_image(row["image_ids"][0], row["uris"][0], 128, 10**8)
        assert max(wanted.size) <= 128
        assert np.array_equal(pixels_of(image), np.asarray(wanted))
        assert request.body == {
            "model": MODEL, "temperature": 0, "max_tokens": 1, "seed": 0, "logprobs": True,
            "top_logprobs": TOP_LOGPROBS, "allowed_token_ids": [*CHOICE_IDS],
            "logprob_token_ids": [*CHOICE_IDS],
        }  # fmt: skip
        reply = replies[row["neuron"]]
        assert reply.reason is None
        assert reply.p_yes == pytest.approx(p_yes(request.key), rel=1e-9)
        assert reply.reply == ("yes" if p_yes(request.key) > 0.5 else "no")
        assert (reply.prompt_tokens, reply.cached_tokens, reply.completion_tokens) == (40, 16, 1)
        assert 0 < reply.seconds < 5


def test_a_naming_request_shows_the_panel_in_its_order_under_the_schema(server, radiographs):
    rows = rows_of(radiographs, 2, images=3)
    replies = ask_all(server, rows, NAME)
    bodies = [request.body for request in server.requests]
    assert all(body["max_tokens"] == 200 and body["temperature"] == 0 for body in bodies)
    assert all(body["response_format"]["json_schema"]["schema"] == NAME_SCHEMA for body in bodies)
    assert not any("logprobs" in body or "structured_outputs" in body for body in bodies)
    shown = [[pixels_of(part) for part in body["messages"][0]["content"][:-1]] for body in bodies]
    for row in rows:
        wanted = [
            np.asarray(read_image(i, uri, 128, 10**8))
            for i, uri in zip(row["image_ids"], row["uris"], strict=True)
        ]
        assert any(all(map(np.array_equal, images, wanted)) for images in shown)
    assert all(set(json.loads(reply.reply)) == {"concept", "description"} for reply in replies)
    assert all(reply.p_yes is None for reply in replies)


@pytest.mark.parametrize(("dialect", "field"), [("vllm", {"structured_outputs"}), ("openai", set())])
def test_vendor_fields_are_sent_to_the_vendor_alone(server, radiographs, dialect, field):
    (reply,) = ask_all(server, rows_of(radiographs, 1), served=Served(None, None), dialect=dialect)
    plain = {"model", "messages", "temperature", "max_tokens", "seed", "logprobs", "top_logprobs"}
    assert set(server.requests[0].body) == plain | field
    if field:
        assert server.requests[0].body["structured_outputs"] == {"choice": ["yes", "no"]}
    assert reply.p_yes == pytest.approx(p_yes(server.requests[0].key))


def test_concurrency_is_bounded_and_changes_no_request(radiographs):
    rows = rows_of(radiographs, 24)
    asked = []
    for concurrency in (1, 6):
        with FaultyServer(seconds=0.02) as server:
            replies = ask_all(server, rows, concurrency=concurrency)
        assert server.peak == concurrency
        assert set(server.counts().values()) == {1}
        asked.append((set(server.counts()), [reply[:6] for reply in replies]))
    assert len(asked[0][0]) == 24
    assert asked[0] == asked[1]


def test_each_image_is_read_once_a_batch_and_dropped_after_its_last_use(server, radiographs, monkeypatch):
    read = []
    lock = threading.Lock()

    def spy(image_id, *arguments):
        with lock:
            read.append(image_id)
        return read_image(image_id, *arguments)

    monkeypatch.setattr(endpoint, "read_image", spy)
    rows = rows_of(radiographs, 30, images=3)
    turns = [NAME.parts(row) for row in rows]

    async def fill_in():
        images = endpoint._Images(turns, settings_of(server))
        for turn in turns:
            await images.fill_in(turn)
        return images

    assert asyncio.run(fill_in())._encoded == {}
    assert sorted(read) == sorted(radiographs)


@pytest.mark.parametrize(
    "faults",
    [["429"], ["500"], ["502", "503", "504"], ["408"], ["reset"], ["cut"], ["hang"], ["429", "reset", "500"]],
)
def test_passing_failures_are_tried_again(radiographs, faults):
    hit = at_row(2, 5)
    rows = rows_of(radiographs, 8)
    with FaultyServer() as server:
        undisturbed = ask_all(server, rows)
    with FaultyServer(fault=lambda body, n: faults[n] if hit(body) and n < len(faults) else None) as server:
        replies = ask_all(server, rows, timeout_s=1.5 if "hang" in faults else 30)
    assert [reply[:6] for reply in replies] == [reply[:6] for reply in undisturbed]
    tries = {request.key: len(faults) + 1 if hit(request.body) else 1 for request in server.requests}
    assert server.counts() == tries
    assert sorted(tries.values()) == [1] * 6 + [len(faults) + 1] * 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "the server answered 500 (4 tries)"),
        ("429", "the server answered 429 (4 tries)"),
        ("hang", "timed out after 1 s (4 tries)"),
        ("reset", "the connection failed: ServerDisconnectedError (4 tries)"),
        ("cut", "the connection failed: ClientPayloadError (4 tries)"),
    ],
)
def test_lasting_failures_end_with_their_reason_and_touch_no_other_row(radiographs, fault, reason):
    hit = at_row(0, 7)
    with FaultyServer(fault=lambda body, n: fault if hit(body) else None) as server:
        replies = ask_all(server, rows_of(radiographs, 8), timeout_s=1 if fault == "hang" else 30)
    assert [reply.reason for reply in replies] == [reason, *[None] * 6, reason]
    assert [reply.reply is None for reply in replies] == [True, *[False] * 6, True]
    assert sorted(server.counts().values()) == [1] * 6 + [4] * 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("garbage", "the reply is not JSON"),
        ("half json", "the reply is not JSON"),
        ("html", "the reply is not JSON"),
        ("empty", "the reply is not JSON"),
        ("deep", "the reply is not JSON"),
        ("a list", "the reply has no choices"),
        ("null", "the reply has no choices"),
        ("no choices", "the reply has no choices"),
        ("error", "the reply has no choices"),
        ("no text", "the reply has no text"),
        ("no message", "the reply has no text"),
        ("huge", "the reply is larger than 1024 KiB"),
    ],
)
def test_a_malformed_reply_is_asked_for_once_more(radiographs, fault, reason):
    once, always = at_row(1), at_row(2)

    def misbehave(body, n):
        return fault if always(body) or (once(body) and n == 0) else None

    with FaultyServer(fault=misbehave) as server:
        replies = ask_all(server, rows_of(radiographs, 3))
    assert [reply.reason for reply in replies] == [None, None, f"{reason} (2 tries)"]
    assert replies[2].reply is None
    tries = {description(request.body): server.counts()[request.key] for request in server.requests}
    assert tries == {"0": 1, "1": 2, "2": 2}


def test_lost_connections_do_not_cost_a_malformed_reply_its_second_try(radiographs):
    faults = ["500", "garbage", "reset", "no choices"]
    with FaultyServer(fault=lambda body, n: faults[n] if n < 4 else None) as server:
        (reply,) = ask_all(server, rows_of(radiographs, 1), retries=6)
        assert reply.reason == "the reply has no choices (4 tries)"
        faults[3] = "503"
        server.requests.clear()
        (reply,) = ask_all(server, rows_of(radiographs, 1), retries=6)
    assert reply.reason is None
    assert len(server.requests) == 5


def test_without_retries_nothing_is_asked_twice(radiographs):
    with FaultyServer(fault=lambda body, n: "500" if at_row(0)(body) else "garbage") as server:
        replies = ask_all(server, rows_of(radiographs, 2), retries=0)
    assert [reply.reason for reply in replies] == ["the server answered 500", "the reply is not JSON"]
    assert len(server.requests) == 2


def test_a_reply_without_logprobs_is_a_reply(radiographs):
    with FaultyServer(fault=lambda body, n: "no logprobs") as server:
        (reply,) = ask_all(server, rows_of(radiographs, 1))
    assert reply.reply in ("yes", "no")
    assert reply.p_yes is None
    assert reply.reason is None


def test_a_refusal_is_final_and_its_words_hold_nothing_private(radiographs):
    quoted = (
        "This model's maximum context length is 64 tokens, got "
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUg== "
        f"from /data/patient00042/1.jpg with {KEY} at http://10.0.0.1:8000/v1"
    )
    with FaultyServer(fault=lambda body, n: "400", message=quoted, key=KEY) as server:
        (reply,) = ask_all(server, rows_of(radiographs, 1), served=Served(SecretStr(KEY), None))
    assert len(server.requests) == 1
    assert reply.reason == (
        "the server answered 400: This model's maximum context length is 64 tokens, got … from … with … at …"
    )


def test_a_redirect_is_not_followed(radiographs):
    with FaultyServer(fault=lambda body, n: "307") as server:
        (reply,) = ask_all(server, rows_of(radiographs, 1))
    assert "a redirect" in reply.reason
    assert dict(server.paths) == {"/v1/chat/completions": 1}


def test_retry_after_is_honoured(radiographs):
    with FaultyServer(fault=lambda body, n: "429" if n == 0 else None, retry_after="1") as server:
        (reply,) = ask_all(server, rows_of(radiographs, 1))
    first, second = (request.at for request in server.requests)
    assert reply.reason is None
    assert second - first >= 1


def test_retry_after_may_be_a_date_and_is_capped():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    assert 17 < retry_after(soon) <= 20
    assert retry_after(formatdate(0, usegmt=True)) == 0
    assert retry_after("3600") == retry_after("inf") == MAX_PAUSE_S
    assert retry_after("-5") == retry_after("nan") == 0
    assert retry_after(None) is None
    assert retry_after("later") is retry_after("99999999999999999999 Jan 2030") is None


def test_a_server_that_dies_half_way_and_comes_back_loses_no_row(radiographs):
    rows = rows_of(radiographs, 40)
    with FaultyServer() as server:
        undisturbed = ask_all(server, rows)
    server = FaultyServer(seconds=0.05).start()

    def die_and_come_back():
        while len(server.requests) < 20:
            time.sleep(0.005)
        server.stop()
        time.sleep(0.6)
        server.start()

    nemesis = threading.Thread(target=die_and_come_back)
    nemesis.start()
    replies = ask_all(server, rows, retries=8, first_pause_s=0.05)
    nemesis.join()
    server.stop()
    assert [reply[:6] for reply in replies] == [reply[:6] for reply in undisturbed]
    counts = server.counts()
    assert len(counts) == 40
    # Only those under way when it died were asked again.
    assert 1 <= sum(n > 1 for n in counts.values()) <= 4
    assert max(counts.values()) == 2


def test_a_dead_server_fails_its_rows_and_after_a_while_the_rest_at_once(radiographs):
    server = FaultyServer().start()
    server.stop()
    rows = rows_of(radiographs, 12)
    replies = ask_all(server, rows[:4], retries=1)
    assert {reply.reason for reply in replies} == {"the connection failed: ClientConnectorError (2 tries)"}
    start = time.monotonic()
    replies = ask_all(server, rows, first_pause_s=0.2, retries=5, give_up_s=0.5)
    assert {reply.reason for reply in replies} == {"the server has given no useful answer for 0.5 s"}
    # Three rounds of four rows, each of six tries, would take 18 s.
    assert time.monotonic() - start < 5


def test_a_server_that_answers_now_and_then_is_not_given_up(radiographs):
    start = time.monotonic()
    with FaultyServer(fault=lambda body, n: "503" if n < 2 else None) as server:
        replies = ask_all(server, rows_of(radiographs, 16), concurrency=1, give_up_s=1, first_pause_s=0.06)
    assert time.monotonic() - start > 1.4
    assert [reply.reason for reply in replies] == [None] * 16


def test_an_unreadable_image_fails_its_rows_without_a_request(server, radiographs, tmp_path):
    corrupt = tmp_path / "patient00043.png"
    corrupt.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    shown = {**radiographs, "image-6": str(corrupt), "image-7": str(tmp_path / "patient00044.png")}
    rows = rows_of(shown, 8) + rows_of(shown, 8)
    replies = ask_all(server, rows)
    failed = [reply.reason for reply in replies if reply.reason is not None]
    assert [i % 8 for i, reply in enumerate(replies) if reply.reply is None] == [6, 7, 6, 7]
    assert len(failed) == 4
    assert all("image-6" in failed[i] and "image-7" in failed[i + 1] for i in (0, 2))
    assert not any("patient" in reason or "/" in reason for reason in failed)
    assert len(server.counts()) == 6


def test_the_environments_proxy_is_not_used(server, radiographs, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    (reply,) = ask_all(server, rows_of(radiographs, 1), retries=0)
    assert reply.reason is None


def test_the_key_is_sent_as_bearer_and_told_nowhere(radiographs, monkeypatch, caplog):
    monkeypatch.setenv("TEST_KEY", KEY)
    with FaultyServer(key=KEY) as server:
        served = check_endpoint(settings_of(server), DETECT)
        assert KEY not in f"{served} {served!r} {served.key}"
        replies = ask_all(server, rows_of(radiographs, 3), served=served)
        assert [reply.reason for reply in replies] == [None] * 3
        assert {request.authorization for request in server.requests} == {f"Bearer {KEY}"}
        server.key = "another"
        server.requests.clear()
        replies = ask_all(server, rows_of(radiographs, 3), served=served)
        reason = "the server answered 401, not authorised: set TEST_KEY"
        assert [reply.reason for reply in replies] == [reason] * 3
        with pytest.raises(InputError) as refused:
            check_endpoint(settings_of(server))
    assert str(refused.value) == f"The endpoint of medgemma.url wants another key: {reason}."
    assert KEY not in caplog.text


def test_the_check_finds_the_token_ids_and_shows_as_many_images_as_a_prompt(server, monkeypatch):
    assert check_endpoint(settings_of(server)) == Served(None, None)
    assert dict(server.paths) == {"/v1/models": 1}
    assert check_endpoint(settings_of(server), DETECT) == IDS
    assert check_endpoint(settings_of(server), NAME).choice_ids is None
    shown = [len(request.body["messages"][0]["content"]) - 1 for request in server.requests]
    assert shown == [1, 3]
    assert "response_format" in server.requests[-1].body
    monkeypatch.setitem(TOKENS, "no", [1, 2])
    assert check_endpoint(settings_of(server), DETECT).choice_ids is None
    server.tokenizes = False
    assert check_endpoint(settings_of(server), DETECT).choice_ids is None
    server.paths.clear()
    assert check_endpoint(settings_of(server, dialect="openai"), DETECT).choice_ids is None
    assert dict(server.paths) == {"/v1/models": 1, "/v1/chat/completions": 1}


@pytest.mark.parametrize(
    ("server", "changed", "sentence"),
    [
        (FaultyServer(models=("a", "b")), {}, r"does not serve 'some/model': .* \('a', 'b'\)"),
        (FaultyServer(models=()), {}, r"\(nothing\)"),
        (FaultyServer(key="k"), {}, "wants another key: the server answered 401, .*: set TEST_KEY"),
        (FaultyServer(key="k", guards_models=False), {}, "wants another key.*401"),
        (FaultyServer(fault=lambda *_: "400"), {}, r"trial with 1 blank.*400: the body was refused"),
        (FaultyServer(fault=lambda *_: "500"), {"retries": 0}, "trial.*the server answered 500"),
        (FaultyServer(fault=lambda *_: "hang"), {"retries": 0, "timeout_s": 0.2}, "trial.*timed out"),
    ],
)  # fmt: skip
def test_an_endpoint_that_cannot_serve_is_told_in_one_sentence(server, changed, sentence):
    with server, pytest.raises(InputError, match=sentence) as told:
        check_endpoint(settings_of(server, **changed), DETECT)
    assert str(told.value).endswith(".")


def test_an_endpoint_that_is_not_there_is_told_in_one_sentence(server, monkeypatch):
    with pytest.raises(InputError, match=r"no list of its models \(the server answered 404: Not Found\)"):
        check_endpoint(settings_of(server, url=server.url + "/v2"))
    server.stop()
    with pytest.raises(InputError, match=r"the connection failed: ClientConnectorError"):
        check_endpoint(settings_of(server, retries=0))
    monkeypatch.setenv("TEST_KEY", "two\nlines")
    with pytest.raises(InputError, match="TEST_KEY holds characters") as told:
        check_endpoint(settings_of(server, retries=0))
    assert "lines" not in str(told.value)


@pytest.mark.parametrize(
    "url",
    [None, "", "host:8000/v1", "ftp://host/v1", "http://", "http://me:hunter2@host/v1", "http://me@host/v1",
     "http://host/v1?key=hunter2", "http://host/v1#x", "http://host:port/v1", "http://[::1/v1"],
)  # fmt: skip
def test_an_address_of_another_form_is_refused_unquoted(url):
    with pytest.raises(InputError, match=r"medgemma\.url") as told:
        endpoint_address(MedgemmaSettings(backend="endpoint", url=url))
    assert "hunter2" not in str(told.value)


def test_an_address_may_end_in_a_slash():
    settings = MedgemmaSettings(backend="endpoint", url="https://[::1]:8000/v1/")
    assert endpoint_address(settings) == "https://[::1]:8000/v1"


def choice_of(tokens, first=0):
    top = [{"token": token, "logprob": logprob} for token, logprob in tokens]
    return {"logprobs": {"content": [{**top[first], "top_logprobs": top}]}}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["yes", " Yes", "YES\n", "no", "No", "maybe", ""]), st.floats(-50, 0)))
)
def test_p_yes_is_the_share_of_yes_among_yes_and_no(tokens):
    logprobs = np.array([logprob for _, logprob in tokens])
    words = np.array([token.strip().lower() for token, _ in tokens])
    told = probability_of_yes(choice_of(tokens)) if tokens else None
    if not {"yes", "no"} <= set(words):
        assert told is None
    else:
        wanted = softmax(logprobs[(words == "yes") | (words == "no")])
        kept = words[(words == "yes") | (words == "no")]
        assert told == pytest.approx(wanted[kept == "yes"].sum(), abs=1e-12)


def test_p_yes_of_extremes_and_of_the_first_token_beside_the_list():
    assert probability_of_yes(choice_of([("yes", -0.0), ("no", -900.0)])) == 1
    assert probability_of_yes(choice_of([("yes", -900.0), ("no", -0.0)])) == pytest.approx(0, abs=1e-300)
    beside = choice_of([("no", math.log(0.6))])
    beside["logprobs"]["content"][0].update(token="yes", logprob=math.log(0.2))
    assert probability_of_yes(beside) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"logprobs": None},
        {"logprobs": {"content": []}},
        {"logprobs": {"content": [{"token": "yes", "logprob": -1.0}]}},
        {"logprobs": {"content": [{"token": "yes", "logprob": -1.0, "top_logprobs": [None]}]}},
        choice_of([("yes", -1.0), ("no", -9999.0)]),
        choice_of([("yes", -1.0), ("no", math.nan)]),
        choice_of([("yes", -1.0), ("no", "none")]),
        choice_of([("yes", 3.0), ("no", -1.0)]),
    ],
)
def test_p_yes_is_unknown_where_one_of_the_two_is_not_told(choice):
    assert probability_of_yes(choice) is None
