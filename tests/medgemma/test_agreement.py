"""vLLM against Hugging Face transformers: the same prompts, probabilities and names, at float32.

vLLM's CPU attention knows no bidirectional mask within an image: image tokens are attended causally there, as
transformers does when it is given no `token_type_ids`. The difference between the two masks is printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from medsae_ray.config import MedgemmaSettings
from medsae_ray.labels import LABELS
from medsae_ray.medgemma.checkpoint import STAND_IN, Checkpoint, check_checkpoint
from medsae_ray.medgemma.images import read_image
from medsae_ray.medgemma.prompts import Task, chat_prompt, load_template
from medsae_ray.medgemma.replies import parse_name
from medsae_ray.radiographs.phantom import sample_images

pytestmark = pytest.mark.timeout(900)

SEED = 90_517
N_IMAGES, N_DETECTIONS, N_NAMINGS = 120, 56, 14
NEAR_TIE = 0.02


class Request(NamedTuple):
    kind: str
    prompt: str
    images: dict[str, str]
    """URI by image id, in the prompt's order."""


class Reply(NamedTuple):
    """What vLLM answered."""

    prompt_ids: list[int]
    cached: int
    text: str
    ids: list[int]
    p_yes: float | None


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small run many times faster on one thread where other processes want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], np.ndarray]:
    """Files of phantoms that no model has seen, and the findings truly there, [N_IMAGES, 14]."""
    folder = tmp_path_factory.mktemp("phantoms")
    pixels, findings, _ = sample_images(SEED, 1, N_IMAGES)
    files = []
    for number, image in enumerate(pixels):
        files.append(str(folder / f"{number}.png"))
        Image.fromarray(image).save(files[-1])
    return files, findings


def requests_of(checkpoint: Checkpoint, files: list[str], findings: np.ndarray) -> list[Request]:
    """Detections, two descriptions a radiograph, and namings of panels of 4 to 8 radiographs."""
    tokenizer = AutoProcessor.from_pretrained(checkpoint.path).tokenizer
    rng = np.random.default_rng(SEED)
    rows: list[tuple[Task, dict[str, Any]]] = []

    def row(images: list[int], description: str | None = None) -> dict[str, Any]:
        ids = [f"phantom_{number:04}" for number in images]
        uris = [files[number] for number in images]
        return {
            "image_ids": ids,
            "uris": uris,
            "n_contrast": 0,
            "concept": description,
            "description": description,
        }

    detect = Task("detect", load_template("detect", None), max_tokens=1, images_per_prompt=1)
    for number in rng.choice(N_IMAGES, N_DETECTIONS // 2, replace=False):
        present = rng.choice(np.flatnonzero(findings[number]))
        absent = rng.choice(np.flatnonzero(findings[number] == 0))
        rows += [(detect, row([number], f"signs of {LABELS[label].lower()}")) for label in (present, absent)]
    name = Task("name", load_template("name", None), max_tokens=200, images_per_prompt=8)
    for label in range(N_NAMINGS):
        showing = np.flatnonzero(findings[:, label])
        size = min(int(rng.integers(4, 9)), len(showing))
        rows.append((name, row(list(rng.choice(showing, size, replace=False)))))
    return [
        Request(
            task.kind,
            chat_prompt(tokenizer, task.parts(asked)),
            dict(zip(asked["image_ids"], asked["uris"], strict=True)),
        )
        for task, asked in rows
    ]


def ask_vllm(checkpoint: Checkpoint, requests: list[Request], folder: Path) -> list[Reply]:
    """Replies of an engine in a process of its own, float32 on the CPU."""
    choice_ids = (checkpoint.yes_ids[0], checkpoint.no_ids[0])
    job = {
        "settings": {
            "model": checkpoint.path,
            "dtype": "float32",
            "gpus_per_replica": 0,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            # The default on CPUs is 128: more than the part that prompts of one small image share.
            "engine": {"block_size": 32},
        },
        "choice_ids": choice_ids,
        "requests": [request._asdict() for request in requests],
    }
    (folder / "asked.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("engine_replies.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "asked.json"), str(folder / "answered.json")],
        env=os.environ
        | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # The same engine without processes of its own: up in a fifth of the time.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answered = json.loads((folder / "answered.json").read_text())
    replies = []
    for told in answered["replies"]:
        logprobs = told.pop("logprobs")
        p_yes = None
        if logprobs:
            yes, no = (logprobs[0][str(token)] for token in choice_ids)
            p_yes = 1 / (1 + float(np.exp(no - yes)))
        replies.append(Reply(**told, p_yes=p_yes))
    return replies


class HuggingFace:
    """transformers on the same requests, one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.choice_ids = [checkpoint.yes_ids[0], checkpoint.no_ids[0]]
        self.processor = AutoProcessor.from_pretrained(checkpoint.path)
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
        self.settings = MedgemmaSettings()

    def inputs(self, request: Request, *, causal: bool) -> dict[str, Tensor]:
        limits = (self.settings.max_side, self.settings.max_pixels)
        images = [read_image(image_id, uri, *limits) for image_id, uri in request.images.items()]
        inputs = dict(self.processor(text=request.prompt, images=[images], return_tensors="pt"))
        if causal:
            # They mark image tokens, and without them every token is attended causally.
            del inputs["token_type_ids"]
        return inputs

    @torch.inference_mode()
    def logprobs(self, inputs: dict[str, Tensor], reply: list[int]) -> Tensor:
        """Log-probabilities of the token after the prompt and `reply`, [vocabulary]."""
        ids = torch.tensor([reply], dtype=torch.long)
        longer = inputs | {
            key: torch.cat([inputs[key], extra], 1)
            for key, extra in (
                ("input_ids", ids),
                ("attention_mask", torch.ones_like(ids)),
                ("token_type_ids", torch.zeros_like(ids)),
            )
            if key in inputs
        }
        return self.model(**longer).logits[0, -1].log_softmax(-1)

    def p_yes(self, request: Request, *, causal: bool) -> float:
        """The probability of yes, renormalised over yes and no."""
        logprobs = self.logprobs(self.inputs(request, causal=causal), [])
        return float(logprobs[self.choice_ids].softmax(0)[0])

    @torch.inference_mode()
    def greedy(self, inputs: dict[str, Tensor], most: int = 200) -> list[int]:
        """The greedy reply, held to no schema, with its end-of-turn token."""
        ids = self.model.generate(**inputs, max_new_tokens=most, do_sample=False, top_k=None, top_p=None)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()


def compare_detections(reference: HuggingFace, requests: list[Request], replies: list[Reply]) -> str:
    """Asserts that detections agree under the engine's mask; returns a line on the model's own."""
    pairs = [(q, r) for q, r in zip(requests, replies, strict=True) if q.kind == "detect"]
    assert len(pairs) >= 40
    engine = np.array([reply.p_yes for _, reply in pairs])
    causal = np.array([reference.p_yes(request, causal=True) for request, _ in pairs])
    own = np.array([reference.p_yes(request, causal=False) for request, _ in pairs])
    assert np.abs(engine - causal).max() <= 0.02
    sure = np.abs(causal - 0.5) > NEAR_TIE
    assert ((engine > 0.5) == (causal > 0.5))[sure].all()
    # What was said is what the probabilities say.
    assert [reply.text for _, reply in pairs] == ["yes" if p > 0.5 else "no" for p in engine]
    assert all(len(reply.ids) == 1 for _, reply in pairs)
    # The reference can tell prompts apart: agreement on a constant would say little.
    assert causal.std() > 0.02
    difference = np.abs(own - causal)
    # The two masks are two, and the model minds it little.
    assert difference.max() > 1e-4
    assert difference.mean() < 0.1
    return (
        f"{len(pairs)} detections: |p_yes(vLLM) - p_yes(HF, causal)| at most "
        f"{np.abs(engine - causal).max():.1e}; |p_yes(HF, bidirectional) - p_yes(HF, causal)| mean "
        f"{difference.mean():.3f}, at most {difference.max():.3f}, other answers "
        f"{np.sum((own > 0.5) != (causal > 0.5))} of {len(pairs)}"
    )


def assert_same_prompts(reference: HuggingFace, requests: list[Request], replies: list[Reply]) -> None:
    for request, reply in zip(requests, replies, strict=True):
        assert reference.inputs(request, causal=True)["input_ids"][0].tolist() == reply.prompt_ids


def test_the_stand_in_agrees(
    phantoms: tuple[list[str], np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = check_checkpoint(STAND_IN, download=False)
    assert checkpoint.stand_in
    requests = requests_of(checkpoint, *phantoms)
    replies = ask_vllm(checkpoint, requests, tmp_path)
    reference = HuggingFace(checkpoint)
    assert_same_prompts(reference, requests, replies)
    # Two prompts share each radiograph, and with it its tokens and the instruction before the description.
    assert sum(reply.cached for q, reply in zip(requests, replies, strict=True) if q.kind == "detect") > 0
    lines = [compare_detections(reference, requests, replies)]

    namings = [(q, r) for q, r in zip(requests, replies, strict=True) if q.kind == "name"]
    assert len(namings) >= 12
    assert all(len(request.images) > 1 for request, _ in namings)
    ties, other = 0, 0
    for request, reply in namings:
        assert parse_name(reply.text, None).status == "answered"
        inputs = reference.inputs(request, causal=True)
        ids = reference.greedy(inputs)
        if ids != reply.ids:
            first = next(n for n, (a, b) in enumerate(zip(ids, reply.ids, strict=False)) if a != b)
            logprobs = reference.logprobs(inputs, ids[:first])
            assert abs(logprobs[ids[first]] - logprobs[reply.ids[first]]) < NEAR_TIE
            ties += 1
        other += reference.greedy(reference.inputs(request, causal=False)) != ids
    lines.append(
        f"{len(namings)} namings: {len(namings) - ties} the same tokens as HF's greedy reply, {ties} parting "
        f"at a near tie; HF's reply under its bidirectional mask is another in {other}"
    )
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_sliding_windows_and_the_real_layout_agree(
    layout: Path,
    phantoms: tuple[list[str], np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = check_checkpoint(str(layout), download=False)
    requests = requests_of(checkpoint, *phantoms)
    replies = ask_vllm(checkpoint, requests, tmp_path)
    reference = HuggingFace(checkpoint)
    window = reference.model.config.text_config.sliding_window
    assert all(len(reply.prompt_ids) > 2 * window for reply in replies)
    assert_same_prompts(reference, requests, replies)
    line = compare_detections(reference, requests, replies)
    with capsys.disabled():
        print(f"\nrandom weights, MedGemma's layout, {line}")
