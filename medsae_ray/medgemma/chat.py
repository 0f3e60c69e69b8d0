"""A client of OpenAI's chat protocol over HTTP: bodies, retries, replies, the probability of a yes.

Nothing here knows of radiographs or Ray. No proxy of the environment is used and no redirect followed:
whatever is sent goes to `medgemma.url` and nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from pydantic import SecretStr

from medsae_ray.config import MedgemmaSettings
from medsae_ray.errors import InputError, printable
from medsae_ray.medgemma.checkpoint import SPELLINGS
from medsae_ray.medgemma.prompts import CHOICES, NAME_SCHEMA, Kind

FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
"""Pause before the first retry, doubled at each further one, and the longest: with the default of 6 retries
a request outlives an outage of about a minute."""
GIVE_UP_S = 900.0
"""After so long without one useful answer the remaining requests fail at once: a dead server ends the stage
in a quarter of an hour, not in retries × prompts, and before Ray Data's own limit of half an hour."""
MAX_REPLY_BYTES = 2**20
TOP_LOGPROBS = 20
"""Most log-probabilities a token that OpenAI's protocol gives."""

T = TypeVar("T")


class Reply(NamedTuple):
    """What came of one request: `reply` or `reason`, never both."""

    reply: str | None = None
    p_yes: float | None = None
    """P(yes) / (P(yes) + P(no)) of the first token; None for naming, or where the server told only one."""
    reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    """From the first try to the reply, pauses between tries included."""


class Served(NamedTuple):
    """What `check_endpoint` found out."""

    key: SecretStr | None
    """Ray Data may log the arguments of an actor: as a secret the key stays out of there."""
    choice_ids: tuple[int, ...] | None
    """Tokens that are a yes or a no in one of the spellings of `SPELLINGS`, where the server tells them."""


def request_body(
    kind: Kind, max_tokens: int, content: list[dict[str, Any]], settings: MedgemmaSettings, served: Served
) -> dict[str, Any]:
    """The body of one chat request: greedy, one turn of the user, and a reply of the form that is wanted."""
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "seed": 0,
    }
    if kind == "name":
        schema = {"name": "finding", "strict": True, "schema": NAME_SCHEMA}
        return body | {"response_format": {"type": "json_schema", "json_schema": schema}}
    body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    if settings.dialect == "vllm" and served.choice_ids is not None:
        # As the engine backend asks: all their log-probabilities are told, however small.
        ids = list(served.choice_ids)
        body |= {"allowed_token_ids": ids, "logprob_token_ids": ids}
    elif settings.dialect == "vllm":
        body["structured_outputs"] = {"choice": list(CHOICES)}
    return body


class NoReply(Exception):
    """A request without a usable reply; the message is a short reason without address, key or image."""

    def __init__(self, reason: str, *, retries: int = 0, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.retries = retries
        """How often a failure of this kind is worth another try."""
        self.wait_s = wait_s
        """How long the server asks to be left alone."""


class NotAuthorised(NoReply):
    """The server wants another key."""


class Client:
    """A connection to the endpoint, made and used within one event loop.

    At most `medgemma.concurrency` requests are under way as long as callers of `chat` hold one of `slots`.
    """

    def __init__(
        self,
        settings: MedgemmaSettings,
        served: Served,
        *,
        first_pause_s: float = FIRST_PAUSE_S,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        self.settings, self.served = settings, served
        self.slots = asyncio.Semaphore(settings.concurrency)
        self._address = endpoint_address(settings)
        self._first_pause_s, self._give_up_s = first_pause_s, give_up_s
        self._useless_since: float | None = None
        headers = {"Content-Type": "application/json"}
        if served.key is not None:
            headers["Authorization"] = f"Bearer {served.key.get_secret_value()}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=settings.timeout_s),
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def chat(self, body: dict[str, Any]) -> Reply:
        """The reply to one chat request; raises NoReply."""
        return await self._send("POST", f"{self._address}/chat/completions", body, read_reply)

    async def models(self) -> list[str]:
        """The models that the server says it serves; raises NoReply."""
        return await self._send("GET", f"{self._address}/models", None, _model_ids)

    async def choice_ids(self) -> tuple[int, ...] | None:
        """The tokens of yes and no by vLLM's /tokenize, which stands beside /v1; None where it is not."""
        url = f"{self._address.removesuffix('/v1')}/tokenize"
        ids: list[int] = []
        try:
            for spellings in SPELLINGS.values():
                for spelling in spellings:
                    body = {"model": self.settings.model, "prompt": spelling, "add_special_tokens": False}
                    tokens = await self._send("POST", url, body, _tokens)
                    if len(tokens) == 1:
                        ids += tokens
                    elif spelling == spellings[0]:
                        return None
        except NoReply:
            return None
        return tuple(dict.fromkeys(ids))

    def raise_if_given_up(self) -> None:
        """Raises NoReply where the server has not given one useful answer for `give_up_s`."""
        if self._useless_since is not None and time.monotonic() - self._useless_since > self._give_up_s:
            raise NoReply(f"the server has given no useful answer for {self._give_up_s:g} s")

    async def _send(self, method: str, url: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        """What `read` makes of the JSON that the server answers; raises NoReply once no try is left.

        `read` raises NoReply for JSON of a shape that it does not know.
        """
        data = None if body is None else json.dumps(body).encode()
        # Counted by kind: lost connections do not cost a malformed reply its second try.
        failures: Counter[int] = Counter()
        while True:
            self.raise_if_given_up()
            try:
                told = read(await self._send_once(method, url, data))
            except NoReply as failure:
                if not failure.retries:
                    self._useless_since = None
                elif self._useless_since is None:
                    self._useless_since = time.monotonic()
                failures[failure.retries] += 1
                tries = failures.total()
                if failures[failure.retries] > failure.retries or tries > self.settings.retries:
                    if tries > 1:
                        raise NoReply(f"{failure} ({tries} tries)") from None
                    raise
                backoff = min(self._first_pause_s * 2 ** (tries - 1), MAX_PAUSE_S)
                pause = backoff / 2 if failure.wait_s is None else failure.wait_s
                # Jitter: requests that failed together must not come back together.
                await asyncio.sleep(pause + random.uniform(0, backoff / 2))
            else:
                self._useless_since = None
                return told

    async def _send_once(self, method: str, url: str, data: bytes | None) -> Any:
        often = self.settings.retries
        try:
            async with self._session.request(method, url, data=data, allow_redirects=False) as response:
                if response.status != 200:
                    raise self._refusal(response, await response.content.read(2**14))
                content = await _read_at_most(response, MAX_REPLY_BYTES)
        except TimeoutError:
            raise NoReply(f"timed out after {self.settings.timeout_s:g} s", retries=often) from None
        except (aiohttp.ClientError, OSError) as error:
            raise NoReply(f"the connection failed: {type(error).__name__}", retries=often) from None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise NoReply("the reply is not JSON", retries=1) from None

    def _refusal(self, response: aiohttp.ClientResponse, content: bytes) -> NoReply:
        status = response.status
        reason = f"the server answered {status}"
        if status in (408, 429) or status >= 500:
            wait_s = retry_after(response.headers.get("Retry-After"))
            return NoReply(reason, retries=self.settings.retries, wait_s=wait_s)
        if status in (401, 403):
            return NotAuthorised(f"{reason}, not authorised: set {self.settings.key_variable}")
        if 300 <= status < 400:
            return NoReply(f"{reason}, a redirect: medgemma.url must be its final address")
        return NoReply(reason + _told(content, self.served.key))


async def _read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > limit:
            raise NoReply(f"the reply is larger than {limit // 2**10} KiB", retries=1)
    return bytes(content)


def _told(content: bytes, key: SecretStr | None) -> str:
    """`: ` and the server's own words for a refusal, or nothing.

    Without whatever could be an address, a path, a part of an image or the key: servers quote the request.
    """
    try:
        told = json.loads(content)
        error = told.get("error", told.get("detail"))
        words = " ".join((error["message"] if isinstance(error, dict) else error).split())
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
        return ""
    if key is not None:
        words = words.replace(key.get_secret_value(), "…")
    words = re.sub(r"\S*/\S*|\S{40,}", "…", words)
    return f": {printable(words, 200).rstrip('.')}" if words else ""


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header (RFC 9110: seconds or a date) asks to wait, at most MAX_PAUSE_S."""
    if header is None:
        return None
    try:
        wait = float(header)
    except ValueError:
        try:
            wait = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(0.0, wait), MAX_PAUSE_S)


def read_reply(told: Any) -> Reply:
    """The reply in the JSON of a chat completion; raises NoReply where it has none."""
    try:
        choice = told["choices"][0]
    except (TypeError, LookupError):
        raise NoReply("the reply has no choices", retries=1) from None
    try:
        text = choice["message"]["content"]
    except (TypeError, LookupError):
        text = None
    if not isinstance(text, str):
        raise NoReply("the reply has no text", retries=1)
    usage = told.get("usage")
    return Reply(
        reply=text,
        p_yes=probability_of_yes(choice),
        prompt_tokens=_count(usage, "prompt_tokens"),
        cached_tokens=_count(usage, "prompt_tokens_details", "cached_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
    )


def _count(usage: Any, *path: str) -> int:
    """A number of tokens, 0 where the server does not tell it."""
    for key in path:
        usage = usage.get(key) if isinstance(usage, dict) else None
    return usage if type(usage) is int and 0 <= usage < 2**31 else 0


def probability_of_yes(choice: Any) -> float | None:
    """P(yes) / (P(yes) + P(no)) of a choice's first token, over all tokens that read so (`yes`, ` Yes`, …).

    None where the server told the log-probability of neither or of one alone.
    """
    try:
        first = choice["logprobs"]["content"][0]
        listed = list(first["top_logprobs"])
        # The token itself may not be among the most probable ones.
        if all(token["token"] != first["token"] for token in listed):
            listed.append(first)
        told = [(token["token"].strip().lower(), float(token["logprob"])) for token in listed]
    except (TypeError, LookupError, AttributeError, ValueError):
        return None
    # vLLM writes -9999 for what it did not compute.
    of_yes, of_no = ([x for word, x in told if word == wanted and -9999 < x <= 0] for wanted in CHOICES)
    if not of_yes or not of_no:
        return None
    yes, no = np.logaddexp.reduce(of_yes), np.logaddexp.reduce(of_no)
    return float(np.exp(yes - np.logaddexp(yes, no)))


def _model_ids(told: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in told["data"]]
    except (TypeError, LookupError):
        raise NoReply("the reply is no list of models") from None


def _tokens(told: Any) -> list[int]:
    tokens = told.get("tokens") if isinstance(told, dict) else None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise NoReply("the reply is no list of tokens")
    return tokens


def endpoint_address(settings: MedgemmaSettings) -> str:
    """`medgemma.url` without a final slash; raises InputError where it is no usable address."""
    try:
        url = urlsplit(settings.url or "")
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        usable = usable and "@" not in url.netloc and not (url.query or url.fragment)
    except ValueError:
        usable = False
    if not usable:
        # Not quoted: it may hold a password.
        raise InputError(
            f"Setting medgemma.url is {'no usable address' if settings.url else 'missing'}: give the "
            "endpoint's with its version and without user name, query or fragment, such as "
            f"http://host:8000/v1; a key goes into the environment variable {settings.key_variable}."
        )
    return url.geturl().rstrip("/")
