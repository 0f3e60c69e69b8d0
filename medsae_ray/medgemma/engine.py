"""The default backend: vLLM engines as a Ray Data actor pool (`ray.data.llm`).

A request row crosses the object store with the ids and URIs of its radiographs, never with their pixels: the
actor that runs the engine reads each distinct radiograph of a block once and hands it to vLLM under its
`image_id`, so that vLLM computes its vision tokens once as well.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

from medsae_ray.config import MedgemmaSettings
from medsae_ray.medgemma.checkpoint import check_checkpoint, find_checkpoint
from medsae_ray.medgemma.images import UnreadableImage, read_image
from medsae_ray.medgemma.pool import REPLY, rows_per_block
from medsae_ray.medgemma.prompts import NAME_SCHEMA, Kind, Task, chat_prompt

if TYPE_CHECKING:
    import ray.data
    from PIL import Image


def answer(requests: ray.data.Dataset, task: Task, settings: MedgemmaSettings) -> ray.data.Dataset:
    """Reply rows for request rows (medgemma/pool.py says what they hold).

    `ray.data.llm` places the engines and decides how many blocks each has; its processor is not called, since
    it would wrap every row in a struct by two more operators, whose workers each import vLLM.
    Raises InputError for a checkpoint that cannot be served.
    """
    checkpoint = check_checkpoint(settings.model, settings.download)
    environment = {"PYTHONWARNINGS": "ignore"}
    if settings.gpus_per_replica == 0 and settings.kv_cache_gib:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(settings.kv_cache_gib)))
    bundle = {"CPU": settings.cpus_per_replica, "GPU": settings.gpus_per_replica}
    config = vLLMEngineProcessorConfig(
        model_source=checkpoint.path,
        engine_kwargs=engine_arguments(task.images_per_prompt, settings),
        batch_size=rows_per_block(task, settings),
        max_concurrent_batches=settings.concurrent_batches,
        concurrency=(settings.replicas_min, settings.replicas_max),
        placement_group_config={"bundles": [bundle] * settings.tensor_parallel},
        runtime_env={"env_vars": environment},
        # What one prompt raises becomes that row's reason; a dead engine ends its actor, which Ray replaces
        # before the block is asked again.
        should_continue_on_error=True,
        # Its exporter needs Ray Serve.
        log_engine_metrics=False,
        prepare_multimodal_stage={"enabled": False},
        chat_template_stage={"enabled": False},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
    )
    stage = build_processor(config).get_stage_by_name("vLLMEngineStage")
    arguments = stage.get_dataset_map_batches_kwargs(config.batch_size, data_column="")
    token_ids = (checkpoint.yes_id, checkpoint.no_id)
    arguments["fn_constructor_kwargs"] |= {"task": task, "settings": settings, "token_ids": token_ids}
    return requests.map_batches_internal(
        RadiographEngine, batch_format="pyarrow", udf_modifying_row_count=False, **arguments
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
    if settings.gpus_per_replica == 0:
        # Compiling takes minutes on a CPU.
        arguments["enforce_eager"] = True
    elif settings.kv_cache_gib:
        arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
    return {**arguments, **settings.engine}


def sampling_parameters(kind: Kind, max_tokens: int, token_ids: tuple[int, int]) -> dict[str, Any]:
    """vLLM's sampling parameters of one prompt: greedy, and nothing but a reply of the wanted form.

    Naming is held to the JSON schema; detection to the two tokens `yes` and `no`, whose log-probabilities
    both come back.
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

    def __init__(
        self, *, task: Task, settings: MedgemmaSettings, token_ids: tuple[int, int], **engine: Any
    ) -> None:
        from transformers import AutoTokenizer

        # Found again: a hub name and the stand-in lie elsewhere on another node than on the driver's.
        path = str(find_checkpoint(settings.model, settings.download))
        super().__init__(**{**engine, "model": path})
        self.task, self.settings, self.token_ids = task, settings, token_ids
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.readers = ThreadPoolExecutor(max(1, int(settings.cpus_per_replica)))
        self.cached_tokens: dict[int, int] = {}
        self._generate = self.llm._generate_async
        self.llm._generate_async = self._generate_and_count  # type: ignore[method-assign]

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """A block of request rows with their replies."""
        rows = batch.to_pylist()
        shown = await self._read_images(rows)
        block = uuid.uuid4()
        replies = await asyncio.gather(*(self._reply(row, i, shown, block) for i, row in enumerate(rows)))
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
            return read_image(image_id, uri, self.settings.max_side, self.settings.max_pixels)
        except UnreadableImage as error:
            return str(error)

    async def _reply(
        self, row: dict[str, Any], number: int, shown: dict[str, Image.Image | str], block: uuid.UUID
    ) -> dict[str, Any]:
        parts = self.task.parts(row)
        ids = [part["image_id"] for part in parts if part["type"] == "image"]
        images = [shown[image_id] for image_id in ids]
        for image in images:
            if isinstance(image, str):
                return _failed(image)
        output = await self._generate_with_error_handling(
            {
                self.IDX_IN_BATCH_COLUMN: number,
                "prompt": chat_prompt(self.tokenizer, parts),
                "multimodal_data": {"image": images},
                "multimodal_uuids": {"image": ids},
                "sampling_params": sampling_parameters(self.task.kind, self.task.max_tokens, self.token_ids),
            },
            block,
        )
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

    async def _generate_and_count(self, request: Any) -> Any:
        # ray.data.llm drops how many of the prompt's tokens came out of the prefix cache.
        output = await self._generate(request)
        self.cached_tokens[request.request_id] = output.num_cached_tokens or 0
        return output

    def _p_yes(self, logprobs: list[dict[int, dict[str, Any]]]) -> float:
        yes, no = (logprobs[0][token]["logprob"] for token in self.token_ids)
        return 1 / (1 + math.exp(min(no - yes, 700.0)))


def _failed(reason: str) -> dict[str, Any]:
    tokens = dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), 0)
    return {"reply": None, "p_yes": None, "reason": reason, **tokens, "seconds": 0.0}
