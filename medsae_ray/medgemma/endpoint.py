"""The pool's second backend: any OpenAI-compatible HTTP server.

`ask` is plain asyncio and can be called at a prompt; `answer` runs it in one actor of Ray Data. The protocol
is in medgemma/chat.py.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image
from pydantic import SecretStr

from medsae_ray.config import MedgemmaSettings
from medsae_ray.errors import InputError
from medsae_ray.medgemma.chat import (
    Client,
    NoReply,
    NotAuthorised,
    Reply,
    Served,
    endpoint_address,
    request_body,
)
from medsae_ray.medgemma.images import UnreadableImage, read_image
from medsae_ray.medgemma.pool import REPLY, rows_per_block
from medsae_ray.medgemma.prompts import Part, Task

if TYPE_CHECKING:
    import ray.data

TRIAL = "Is this image blank? Answer with one word, yes or no."


def answer(requests: ray.data.Dataset, task: Task, settings: MedgemmaSettings) -> ray.data.Dataset:
    """Reply rows for request rows (medgemma/pool.py says what they hold).

    Raises InputError, before any row is asked, for an endpoint that cannot be used.
    """
    from ray.data import ActorPoolStrategy

    served = check_endpoint(settings, task)
    return requests.map_batches(
        AskBatch,
        batch_size=rows_per_block(task, settings),
        batch_format="pyarrow",
        fn_constructor_kwargs={"task": task, "settings": settings, "served": served},
        # Two blocks at a time: the next one's requests fill the gaps while the last replies of one come in.
        compute=ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=2),
        num_cpus=0,
    )


class AskBatch:
    """The client as a Ray Data actor: batches of request rows to batches of reply rows."""

    def __init__(self, task: Task, settings: MedgemmaSettings, served: Served) -> None:
        self.task, self.settings, self.served = task, settings, served
        self.client: Client | None = None

    async def __call__(self, batch: pa.Table) -> pa.Table:
        if self.client is None:
            # Not in the constructor: it belongs to the event loop that runs this.
            self.client = Client(self.settings, self.served)
        replies = await ask(batch.to_pylist(), self.task, self.client)
        for column in REPLY:
            told = [getattr(reply, column.name) for reply in replies]
            batch = batch.append_column(column, pa.array(told, column.type))
        return batch


async def ask(rows: Sequence[Mapping[str, Any]], task: Task, client: Client) -> list[Reply]:
    """Ask the server every row, `medgemma.concurrency` at a time; replies in the rows' order."""
    settings, served = client.settings, client.served
    turns = [task.parts(row) for row in rows]
    images = _Images(turns, settings)

    async def ask_one(turn: Sequence[Part]) -> Reply:
        async with client.slots:
            start = time.monotonic()
            try:
                client.raise_if_given_up()
                content = await images.fill_in(turn)
                reply = await client.chat(request_body(task.kind, task.max_tokens, content, settings, served))
            except (UnreadableImage, NoReply) as error:
                reply = Reply(reason=str(error))
            return reply._replace(seconds=time.monotonic() - start)

    return await asyncio.gather(*map(ask_one, turns))


class _Images:
    """The images of a batch as data URLs: each is read and encoded once, and dropped after its last use."""

    def __init__(self, turns: Sequence[Sequence[Part]], settings: MedgemmaSettings) -> None:
        self._settings = settings
        self._uses_left = Counter(
            part["image_id"] for turn in turns for part in turn if part["type"] == "image"
        )
        self._encoded: dict[str, asyncio.Task[str]] = {}

    async def fill_in(self, turn: Sequence[Part]) -> list[dict[str, Any]]:
        """The turn's parts in OpenAI's form; raises UnreadableImage."""
        # All are awaited even where one fails, so that each use is counted.
        parts = await asyncio.gather(*map(self._fill_in_one, turn), return_exceptions=True)
        content: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, BaseException):
                raise part
            content.append(part)
        return content

    async def _fill_in_one(self, part: Part) -> dict[str, Any]:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        image_id = part["image_id"]
        if image_id not in self._encoded:
            self._encoded[image_id] = asyncio.create_task(
                asyncio.to_thread(_read_as_url, image_id, part["uri"], self._settings)
            )
        try:
            return _image_part(await self._encoded[image_id])
        finally:
            self._uses_left[image_id] -= 1
            if not self._uses_left[image_id]:
                del self._encoded[image_id]


def _read_as_url(image_id: str, uri: str, settings: MedgemmaSettings) -> str:
    return data_url(read_image(image_id, uri, settings.max_side, settings.max_pixels))


def _image_part(url: str) -> dict[str, Any]:
    """An image, as a data URL, in OpenAI's form."""
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(image: Image.Image) -> str:
    """An RGB image as a lossless PNG in a data URL, grey where its three channels are equal."""
    red, green, blue = image.split()
    if red.tobytes() == green.tobytes() == blue.tobytes():
        image = red
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def check_endpoint(settings: MedgemmaSettings, task: Task | None = None) -> Served:
    """Find out whether the endpoint serves the model and, by one trial request, whether it can answer `task`.

    The trial shows blank images, as many as a prompt of `task` may; without a task nothing is sent. Raises
    InputError for an address that cannot be used or reached, a key that is missing or refused, a model that
    is not served, a failed trial.
    """
    endpoint_address(settings)
    key = os.environ.get(settings.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"The environment variable {settings.key_variable} holds characters that no key has: set it anew."
        )
    # Who starts a stage is told within a minute or so.
    short = dataclasses.replace(
        settings, retries=min(settings.retries, 2), timeout_s=min(settings.timeout_s, 60.0)
    )
    return asyncio.run(_check(short, Served(SecretStr(key) if key else None, None), task))


async def _check(settings: MedgemmaSettings, served: Served, task: Task | None) -> Served:
    try:
        async with Client(settings, served) as client:
            await _check_model(client)
            if task is None:
                return served
            if settings.dialect == "vllm" and task.kind == "detect":
                served = served._replace(choice_ids=await client.choice_ids())
            await _try_out(client, served, task)
            return served
    except NotAuthorised as error:
        raise InputError(f"The endpoint of medgemma.url wants another key: {error}.") from None


async def _check_model(client: Client) -> None:
    try:
        models = await client.models()
    except NotAuthorised:
        raise
    except NoReply as error:
        raise InputError(
            f"The endpoint of medgemma.url gives no list of its models ({error}): see that it runs and that "
            "its address ends before /models, usually with /v1."
        ) from None
    if client.settings.model not in models:
        raise InputError(
            f"The endpoint of medgemma.url does not serve {client.settings.model!r}: set medgemma.model to "
            f"what it serves ({', '.join(map(repr, models[:10])) or 'nothing'})."
        )


async def _try_out(client: Client, served: Served, task: Task) -> None:
    blank = _image_part(data_url(Image.new("RGB", (224, 224), "grey")))
    content = [blank] * task.images_per_prompt + [{"type": "text", "text": TRIAL}]
    try:
        await client.chat(request_body(task.kind, task.max_tokens, content, client.settings, served))
    except NotAuthorised:
        raise
    except NoReply as error:
        raise InputError(
            f"The endpoint of medgemma.url fails at a trial with {task.images_per_prompt} blank image(s) "
            f"({error}): it must serve a vision-language model that takes as many, and the request fields of "
            f"medgemma.dialect = {client.settings.dialect!r}."
        ) from None
