"""Run as a process: asks a real vLLM engine what a JSON file lists, and writes its replies to another.

With the engine's and the sampler's settings of the package itself (medgemma/engine.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(asked: str, answered: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from medsae_ray.config import MedgemmaSettings
    from medsae_ray.medgemma.engine import engine_arguments, sampling_parameters
    from medsae_ray.medgemma.images import read_image

    job: dict[str, Any] = json.loads(Path(asked).read_text())
    settings = MedgemmaSettings(**job["settings"])
    most = max(len(request["images"]) for request in job["requests"])
    engine = LLM(model=settings.model, **engine_arguments(most, settings))
    prompts, parameters = [], []
    for request in job["requests"]:
        images = [
            read_image(image_id, uri, settings.max_side, settings.max_pixels)
            for image_id, uri in request["images"].items()
        ]
        prompts.append(
            {
                "prompt": request["prompt"],
                "multi_modal_data": {"image": images},
                "multi_modal_uuids": {"image": list(request["images"])},
            }
        )
        given = sampling_parameters(request["kind"], 200, tuple(job["choice_ids"]))
        if held := given.pop("structured_outputs", None):
            given["structured_outputs"] = StructuredOutputsParams(**held)
        parameters.append(SamplingParams(**given))
    replies = [
        {
            "prompt_ids": list(output.prompt_token_ids or []),
            "cached": output.num_cached_tokens or 0,
            "text": output.outputs[0].text,
            "ids": list(output.outputs[0].token_ids),
            "logprobs": [
                {token: told.logprob for token, told in step.items()}
                for step in output.outputs[0].logprobs or []
            ],
        }
        for output in engine.generate(prompts, parameters, use_tqdm=False)  # type: ignore[arg-type]
    ]
    cache = engine.llm_engine.vllm_config.cache_config
    Path(answered).write_text(json.dumps({"replies": replies, "block_size": cache.block_size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
