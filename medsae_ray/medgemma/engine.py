"""The default backend: vLLM engines as a Ray Data actor pool (`ray.data.llm`).

A request row crosses the object store with the ids and URIs of its radiographs, never with their pixels: the
actor that runs the engine reads each distinct radiograph of a block once and hands it to vLLM under its
`image_id`, so that vLLM computes its vision tokens once as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStage, vLLMEngineStageUDF
from scipy.special import expit

from medsae_ray.cluster import on_cluster
from medsae_ray.config import MedgemmaSettings
from medsae_ray.errors import InputError, printable
from medsae_ray.medgemma.checkpoint import check_checkpoint
from medsae_ray.medgemma.images import UnreadableImage, read_image
from medsae_ray.medgemma.pool import REPLY, rows_per_block
from medsae_ray.medgemma.prompts import NAME_SCHEMA, Kind, Task, chat_prompt

if TYPE_CHECKING:
    import ray.data
    from PIL import Image

BLOCK_RETRIES = 3
"""How often a block whose engine died is given to another."""
STALLED_S = 1200
"""Seconds without any reply after which an engine is replaced; below Ray Data's own limit of 1,800."""
PENDING_IMAGES = 512
"""Films held in RGB for the prompts that wait in an engine."""


def answer(requests: ray.data.Dataset, task: Task, settings: MedgemmaSettings) -> ray.data.Dataset:
    """Reply rows for request rows (medgemma/pool.py says what they hold).

    The stage of `ray.data.llm` places the engines and runs several blocks on each. It is used without the
    processor around it, which wraps every row in a struct by two more operators whose workers import vLLM,
    and starts Ray and its usage reports over.
    Raises InputError for a checkpoint that cannot be served.
    """
    import ray

    checkpoint = check_checkpoint(settings.model, settings.download)
    environment = {"PYTHONWARNINGS": "ignore"}
    if not on_cluster():
        # Else vLLM finds its own address as Ray would, by a socket to a public name server.
        environment["VLLM_HOST_IP"] = "127.0.0.1"
    if settings.gpus_per_replica == 0 and settings.kv_cache_gib:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(settings.kv_cache_gib)))
    rows = rows_per_block(task, settings)
    bundle = {"CPU": settings.cpus_per_replica, "GPU": settings.gpus_per_replica}
    stage = vLLMEngineStage(
        fn=RadiographEngine,
        fn_constructor_kwargs={
            "batch_size": rows,
            "max_concurrent_batches": settings.concurrent_batches,
            "max_pending_requests": pending_prompts(task.images_per_prompt, settings),
            "model": checkpoint.path,
            "engine_kwargs": engine_arguments(task.images_per_prompt, settings),
            "placement_group_config": {"bundles": [bundle] * settings.tensor_parallel},
            # What one prompt raises becomes that row's reason; a dead engine ends its actor, which Ray
            # replaces before the block is asked again.
            "should_continue_on_error": True,
            # Its exporter needs Ray Serve.
            "log_engine_metrics": False,
            "task": task,
            "settings": settings,
            "digest": checkpoint.digest,
        },
        map_batches_kwargs={
            "compute": ray.data.ActorPoolStrategy(
                min_size=settings.replicas_min, max_size=settings.replicas_max
            ),
            "max_concurrency": settings.concurrent_batches,
            # Without end, Ray would give a block that kills its engine to one engine after the other.
            "max_task_retries": BLOCK_RETRIES,
            "runtime_env": {"env_vars": environment},
        },
    )
    return requests.map_batches_internal(
        RadiographEngine,
        batch_format="pyarrow",
        udf_modifying_row_count=False,
        **stage.get_dataset_map_batches_kwargs(rows, data_column=""),
    )


def engine_arguments(images_per_prompt: int, settings: MedgemmaSettings) -> dict[str, Any]:
    """Arguments of vLLM's engine (`vllm.AsyncEngineArgs`), but for the model."""
    arguments: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel,
        "limit_mm_per_prompt": {"image": images_per_prompt},
        # Crops would cost (crops + 1) × 256 tokens a radiograph.
        "mm_processor_kwargs": {"do_pan_and_scan": False},
        "structured_outputs_config": {"backend": "xgrammar"},
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if settings.tensor_parallel > 1:
        # Processes of the engine's own, on GPUs that Ray reserves for its actor: on one node, freed with it.
        arguments["distributed_executor_backend"] = "mp"
    if settings.gpus_per_replica == 0:
        # Compiling takes minutes on a CPU.
        arguments["enforce_eager"] = True
    elif settings.kv_cache_gib:
        arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
    return {**arguments, **settings.engine}


def pending_prompts(images_per_prompt: int, settings: MedgemmaSettings) -> int:
    """Prompts handed to an engine at a time, with at most PENDING_IMAGES films in RGB."""
    return max(1, min(math.ceil(1.1 * settings.max_num_seqs), PENDING_IMAGES // images_per_prompt))


def sampling_parameters(kind: Kind, max_tokens: int, token_ids: Sequence[int]) -> dict[str, Any]:
    """vLLM's sampling parameters of one prompt: greedy, and nothing but a reply of the wanted form.

    Naming is held to the JSON schema; detection to the tokens of `yes` and `no`, whose log-probabilities all
    come back.
    """
    if kind == "name":
        return {
            "temperature": 0.0,
            "max_tokens": max_tokens,
            "structured_outputs": {"json": NAME_SCHEMA},
        }
    return {
        "temperature": 0.0,
        "max_tokens": 1,
        "allowed_token_ids": list(token_ids),
        "logprob_token_ids": list(token_ids),
    }


class RadiographEngine(vLLMEngineStageUDF):
    """The engine actor of `ray.data.llm`, given request rows: it renders prompts and reads radiographs."""

    def __init__(self, *, task: Task, settings: MedgemmaSettings, digest: str, **engine: Any) -> None:
        from transformers import AutoTokenizer

        # Found again: a hub name and the stand-in lie elsewhere on another node than on the driver's.
        checkpoint = check_checkpoint(settings.model, settings.download)
        if checkpoint.digest != digest:
            raise InputError(
                f"medgemma.model {settings.model} on node {socket.gethostname()} is another checkpoint than "
                "on the driver's: put the same files on every node, or into a folder that all share."
            )
        path = checkpoint.path
        with _engine_log() as log:
            try:
                super().__init__(**{**engine, "model": path})
            except Exception as error:
                raise InputError(
                    f"The engine of medgemma.model {settings.model} does not start ({_cause(log, error)}): "
                    "change the setting of medgemma that it names; with too little memory lower "
                    f"max_model_len or max_num_seqs. Its whole log is {log} on that node."
                ) from None
        # At the end of a stage the engine's processes end together, and each tells of the other's death.
        logging.getLogger("vllm.v1.engine.async_llm").setLevel(logging.CRITICAL)
        self.task, self.settings = task, settings
        self.yes_ids, self.no_ids = checkpoint.yes_ids, checkpoint.no_ids
        self.pending = asyncio.Semaphore(pending_prompts(task.images_per_prompt, settings))
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.readers = ThreadPoolExecutor(max(1, int(settings.cpus_per_replica)))
        self.cached_tokens: dict[int, int] = {}
        self.llm._generate_async = _counting(  # type: ignore[method-assign, assignment]
            self.llm._generate_async, self.cached_tokens
        )
        self.last_reply = time.monotonic()

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """A block of request rows with their replies."""
        rows = batch.to_pylist()
        shown = await self._read_images(rows)
        block = uuid.uuid4()
        watchdog = asyncio.create_task(self._watch())
        replies = await asyncio.gather(*(self._reply(row, i, shown, block) for i, row in enumerate(rows)))
        watchdog.cancel()
        told = pa.Table.from_pylist(list(replies), schema=REPLY)
        for field in REPLY:
            batch = batch.append_column(field, told[field.name])
        yield batch

    async def _read_images(self, rows: list[dict[str, Any]]) -> dict[str, Image.Image | str]:
        """Every distinct radiograph of a block by its id, or the reason why it cannot be shown."""
        uris = {i: uri for row in rows for i, uri in zip(row["image_ids"], row["uris"], strict=True)}
        loop = asyncio.get_running_loop()
        read = [loop.run_in_executor(self.readers, self._read_image, *image) for image in uris.items()]
        return dict(zip(uris, await asyncio.gather(*read), strict=True))

    def _read_image(self, image_id: str, uri: str) -> Image.Image | str:
        try:
            # Held as grey, a third of the memory, until its prompt's turn.
            return read_image(image_id, uri, self.settings.max_side, self.settings.max_pixels).getchannel(0)
        except UnreadableImage as error:
            return str(error)

    async def _reply(
        self, row: dict[str, Any], number: int, shown: dict[str, Image.Image | str], block: uuid.UUID
    ) -> dict[str, Any]:
        parts = self.task.parts(row)
        ids = [part["image_id"] for part in parts if part["type"] == "image"]
        images = []
        for image_id in ids:
            if isinstance(image := shown[image_id], str):
                return _failed(image)
            images.append(image)
        token_ids = [*self.yes_ids, *self.no_ids]
        async with self.pending:
            prompt = {
                self.IDX_IN_BATCH_COLUMN: number,
                "prompt": chat_prompt(self.tokenizer, parts),
                "multimodal_data": {"image": [image.convert("RGB") for image in images]},
                "multimodal_uuids": {"image": ids},
                "sampling_params": sampling_parameters(self.task.kind, self.task.max_tokens, token_ids),
            }
            output = await self._generate_with_error_handling(prompt, block)
        self.last_reply = time.monotonic()
        if output["__inference_error__"]:
            return _failed(f"the engine refused it ({output['__inference_error__']})")
        return {
            "reply": output["generated_text"],
            "p_yes": self._p_yes(output["logprobs"]) if self.task.kind == "detect" else None,
            "reason": None,
            "prompt_tokens": output["num_input_tokens"],
            "cached_tokens": self.cached_tokens.pop(output["request_id"], 0),
            "completion_tokens": output["num_generated_tokens"],
            "seconds": output["time_taken_llm"],
        }

    async def _watch(self) -> None:
        """End the actor of an engine that gives no reply any more: Ray replaces it."""
        self.last_reply = time.monotonic()
        while time.monotonic() - self.last_reply < STALLED_S:
            await asyncio.sleep(30)
        print(f"An engine gave no reply for {STALLED_S} s and is replaced.", file=sys.stderr, flush=True)
        os._exit(1)

    def _p_yes(self, logprobs: list[dict[int, dict[str, Any]]]) -> float:
        told = logprobs[0]
        yes, no = (
            np.logaddexp.reduce([told[token]["logprob"] for token in ids])
            for ids in (self.yes_ids, self.no_ids)
        )
        return float(expit(yes - no))


def _counting(
    generate: Callable[[Any], Awaitable[Any]], cached_tokens: dict[int, int]
) -> Callable[[Any], Awaitable[Any]]:
    """`generate` that notes how many tokens came out of the prefix cache, which `ray.data.llm` drops."""

    async def generate_and_count(request: Any) -> Any:
        output = await generate(request)
        cached_tokens[request.request_id] = output.num_cached_tokens or 0
        return output

    return generate_and_count


def _failed(reason: str) -> dict[str, Any]:
    tokens = dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), 0)
    return {"reply": None, "p_yes": None, "reason": printable(reason, 300), **tokens, "seconds": 0.0}


@contextlib.contextmanager
def _engine_log() -> Iterator[Path]:
    """A file among Ray's logs that takes what an engine's processes print: they inherit it when they start.

    On the console it would be pages of warnings, and complaints of one process about another's end.
    """
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[attr-defined]
    path = logs / f"medsae-engine-{os.getpid()}.log"
    kept = [os.dup(stream) for stream in (1, 2)]
    try:
        with path.open("ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        yield path
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, own in zip((1, 2), kept, strict=True):
            os.dup2(own, stream)
            os.close(own)


def _cause(log: Path, error: Exception) -> str:
    """The first error that an engine's processes told, or the one that came of it."""
    found = re.search(r"\b(\w*(?:Error|Exception): .+)", log.read_text(errors="replace"))
    return found[1].strip().rstrip(".") if found else f"{type(error).__name__}: {error}"
