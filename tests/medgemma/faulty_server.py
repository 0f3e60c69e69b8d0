"""A small OpenAI-compatible server for tests, which answers as a busy, broken or foreign one on demand.

Its answers depend on nothing but the body of a request; `requests` keeps what it was asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

MODEL = "some/model"
TOKENS = {"yes": [11], "Yes": [12], "YES": [13, 14], "no": [15], "No": [16], "NO": [17, 14]}
CHOICE_IDS = (11, 12, 15, 16)
"""The tokens of TOKENS that are a whole answer."""
Fault = str | None
"""None, a status such as "500", or one of `_BODIES`, "hang", "reset", "cut", "huge", "no logprobs"."""

_BODIES = {
    "garbage": b"\x00\xff<html>",
    "half json": b'{"choices": [{"message": {"cont',
    "html": b"<html><body>Bad gateway</body></html>",
    "empty": b"",
    "a list": b"[1, 2]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "no choices": b'{"choices": []}',
    "error": b'{"error": {"message": "overloaded"}}',
    "no text": b'{"choices": [{"message": {"content": null}}]}',
    "no message": b'{"choices": ["yes"]}',
}


@dataclass(frozen=True)
class Request:
    """One chat request as it came in."""

    key: str
    """SHA-256 of the body."""
    body: dict[str, Any]
    fault: Fault
    authorization: str | None
    at: float


@dataclass
class FaultyServer:
    """Serves in a thread of its own from `start` to `stop`, and again on the same port after that.

    `fault` is given a chat request's body and how often that body came before, and says what to do.
    """

    fault: Callable[[dict[str, Any], int], Fault] = lambda body, n: None
    key: str | None = None
    """The only key it accepts; None: any or none."""
    models: Sequence[str] = (MODEL,)
    tokenizes: bool = True
    """Whether it has vLLM's /tokenize."""
    guards_models: bool = True
    """Whether the list of models wants the key as well."""
    message: str = "the body was refused"
    """What a refusal says."""
    retry_after: str | None = None
    seconds: float = 0.0
    """How long an answer takes."""
    requests: list[Request] = field(default_factory=list)
    paths: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    """Most chat requests that were under way together."""
    port: int = 0
    _open: int = 0
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @staticmethod
    def key_of(body: dict[str, Any]) -> str:
        """The key of a body, as json.dumps writes it."""
        return hashlib.sha256(json.dumps(body).encode()).hexdigest()

    def counts(self) -> Counter[str]:
        """How often each body came."""
        return Counter(request.key for request in self.requests)

    def __enter__(self) -> FaultyServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> FaultyServer:
        self.stop()
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(10), "the server did not start"
        return self

    def stop(self, wait: bool = True) -> None:
        """Die: connections break off, then nothing listens any more. `fault` must not wait for it."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stopped.set)
        if wait and self._thread is not None:
            self._thread.join(10)

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_route("*", "/{elsewhere:.*}", self._elsewhere)
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        started.set()
        await self._stopped.wait()
        await runner.cleanup()

    def _refused(self, request: web.Request) -> web.Response | None:
        self.paths[request.path] += 1
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            # As OpenAI does, the key that was sent is quoted.
            sent = request.headers.get("Authorization", "")
            return web.json_response({"error": {"message": f"wrong key {sent}"}}, status=401)
        return None

    async def _list_models(self, request: web.Request) -> web.Response:
        refused = self._refused(request)
        if refused is not None and self.guards_models:
            return refused
        return web.json_response({"object": "list", "data": [{"id": model} for model in self.models]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        self.paths[request.path] += 1
        if not self.tokenizes:
            return web.json_response({"detail": "Not Found"}, status=404)
        word = (await request.json())["prompt"]
        return web.json_response({"tokens": TOKENS[word]})

    async def _elsewhere(self, request: web.Request) -> web.Response:
        self.paths[request.path] += 1
        return web.json_response({"detail": "Not Found"}, status=404)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        content = await request.read()
        refused = self._refused(request)
        if refused is not None:
            return refused
        body = json.loads(content)
        key = hashlib.sha256(content).hexdigest()
        fault = self.fault(body, sum(earlier.key == key for earlier in self.requests))
        told = request.headers.get("Authorization")
        self.requests.append(Request(key, body, fault, told, time.monotonic()))
        self._open += 1
        self.peak = max(self.peak, self._open)
        try:
            await asyncio.sleep(self.seconds)
            return await self._answer(request, body, key, fault)
        finally:
            self._open -= 1

    async def _answer(
        self, request: web.Request, body: dict[str, Any], key: str, fault: Fault
    ) -> web.StreamResponse:
        if fault == "hang":
            await self._stopped.wait()
        assert request.transport is not None
        if fault == "reset" or self._stopped.is_set():
            request.transport.abort()
            return web.Response()
        if fault in _BODIES:
            return web.Response(body=_BODIES[fault], content_type="application/json")
        if fault is not None and fault.isdigit():
            headers = {"Location": "/elsewhere"} if fault.startswith("3") else {}
            if self.retry_after is not None:
                headers["Retry-After"] = self.retry_after
            refusal = {"error": {"message": self.message, "code": int(fault)}}
            return web.json_response(refusal, status=int(fault), headers=headers)
        reply = completion(body, key)
        if fault == "no logprobs":
            reply["choices"][0]["logprobs"] = None
        if fault == "huge":
            reply["padding"] = "x" * 2_000_000
        if fault == "cut":
            response = web.StreamResponse(headers={"Content-Length": "5000"})
            await response.prepare(request)
            await response.write(json.dumps(reply).encode()[:50])
            request.transport.abort()
            return response
        return web.json_response(reply)


def p_yes(key: str) -> float:
    """The probability of a yes that the server gives to a body."""
    return (int(key[:8], 16) + 1) / (2**32 + 1)


def completion(body: dict[str, Any], key: str) -> dict[str, Any]:
    """The answer to a body: yes, no or a name, drawn from its hash."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    if "response_format" in body:
        named = {"concept": f"finding {key[:4]}", "description": f"Look for the sign {key[:4]}."}
        text = json.dumps(named)
    else:
        p = p_yes(key)
        text = "yes" if p > 0.5 else "no"
        # A tenth of the mass lies on other words.
        told = [("yes", math.log(0.9 * p)), ("no", math.log(0.9 * (1 - p))), ("Maybe", math.log(0.1))]
        tokens = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in told]
        first = {**next(token for token in tokens if token["token"] == text), "top_logprobs": tokens}
        choice["logprobs"] = {"content": [first]}
    choice["message"] = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 40, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 16}}
    return {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}
