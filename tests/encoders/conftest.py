"""A checkpoint of MedCLIP's real layout with random weights, and an independent ResNet-50 that reads it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = (3, 4, 6, 3)
WIDTHS = (64, 128, 256, 512)


def medclip_state(seed: int = 0) -> dict[str, Tensor]:
    """The tensors of MedCLIP's pytorch_model.bin, torchvision-style, with realistic random statistics."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def convolution(key: str, out: int, into: int, size: int) -> None:
        scale = (2 / (into * size * size)) ** 0.5
        state[key + ".weight"] = torch.randn(out, into, size, size, generator=generator) * scale

    def batch_norm(key: str, width: int) -> None:
        state[key + ".weight"] = 0.5 + torch.rand(width, generator=generator)
        state[key + ".bias"] = 0.2 * torch.randn(width, generator=generator)
        state[key + ".running_mean"] = 0.3 * torch.randn(width, generator=generator)
        state[key + ".running_var"] = 0.5 + torch.rand(width, generator=generator)
        state[key + ".num_batches_tracked"] = torch.tensor(4321)

    root = "vision_model.model."
    convolution(root + "conv1", 64, 3, 7)
    batch_norm(root + "bn1", 64)
    into = 64
    for stage, (blocks, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True), start=1):
        for block in range(blocks):
            key = f"{root}layer{stage}.{block}."
            for n, (a, b, size) in enumerate(((into, width, 1), (width, width, 3), (width, 4 * width, 1)), 1):
                convolution(f"{key}conv{n}", b, a, size)
                batch_norm(f"{key}bn{n}", b)
            if block == 0:
                convolution(key + "downsample.0", 4 * width, into, 1)
                batch_norm(key + "downsample.1", 4 * width)
            into = 4 * width
    state[root + "fc.weight"] = torch.randn(512, 2048, generator=generator) * 0.02
    state["text_model.model.embeddings.position_ids"] = torch.arange(512)[None]
    state["text_model.model.embeddings.word_embeddings.weight"] = torch.randn(30, 768, generator=generator)
    state["text_model.projection_head.weight"] = torch.randn(512, 768, generator=generator)
    state["text_model.projection_head.bias"] = torch.zeros(512)
    state["logit_scale"] = torch.tensor(2.66)
    return state


def reference_feature_map(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """torchvision's ResNet-50 (v1.5: stride in the 3×3), functions only, from its own names."""
    root = "vision_model.model."

    def bn(x: Tensor, key: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{key}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)

    x = F.relu(bn(F.conv2d(x, state[root + "conv1.weight"], stride=2, padding=3), root + "bn1"))
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for stage, blocks in enumerate(BLOCKS, start=1):
        for block in range(blocks):
            key = f"{root}layer{stage}.{block}."
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.relu(bn(F.conv2d(x, state[key + "conv1.weight"]), key + "bn1"))
            y = F.relu(bn(F.conv2d(y, state[key + "conv2.weight"], stride=stride, padding=1), key + "bn2"))
            y = bn(F.conv2d(y, state[key + "conv3.weight"]), key + "bn3")
            if block == 0:
                x = bn(F.conv2d(x, state[key + "downsample.0.weight"], stride=stride), key + "downsample.1")
            x = F.relu(x + y)
    return x


def reference_embedding(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Unit rows, as MedCLIP's `encode_image` returns them."""
    pooled = F.adaptive_avg_pool2d(reference_feature_map(state, x), 1).flatten(1)
    e = F.linear(pooled, state["vision_model.model.fc.weight"])
    return e / e.norm(dim=-1, keepdim=True)


def reference_input(pixels: np.ndarray) -> Tensor:
    """uint8 [B, 224, 224] -> float32 [B, 3, 224, 224], as MedCLIP's processor scales it."""
    scaled = (pixels.astype(np.float32) / np.float32(255) - np.float32(0.5862785803043838)) / np.float32(
        0.27950088968644304
    )
    return torch.from_numpy(np.repeat(scaled[:, None], 3, axis=1))


@pytest.fixture(scope="session")
def state() -> dict[str, Tensor]:
    return medclip_state()


@pytest.fixture(scope="session")
def reference() -> dict[str, Callable]:
    return {"feature_map": reference_feature_map, "embedding": reference_embedding, "input": reference_input}


@pytest.fixture(scope="session")
def checkpoint_file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("medclip") / "pytorch_model.bin"
    torch.save(state, file)
    return file


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """Four smooth, chest-sized pictures with noise, uint8 [4, 224, 224]."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (4, 1, 6, 6)))
    smooth = F.interpolate(coarse, size=(224, 224), mode="bicubic").numpy()[:, 0]
    return np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
