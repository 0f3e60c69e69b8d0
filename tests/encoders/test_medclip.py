"""MedCLIP-ResNet-50 against an independent ResNet-50 that reads the same checkpoint."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from medsae_ray.encoders import load_encoder, preprocessing
from medsae_ray.encoders.base import Encoder
from medsae_ray.errors import InputError

RADIOGRAPHS = Path(__file__).parents[3] / "shared/radiographs/nih/images_1024"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def encoder(checkpoint_file: Path) -> Encoder:
    return load_encoder("medclip-resnet50", str(checkpoint_file))


def refusal(state: State, tmp_path: Path) -> str:
    file = tmp_path / "pytorch_model.bin"
    torch.save(state, file)
    with pytest.raises(InputError) as caught:
        load_encoder("medclip-resnet50", str(file))
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


def test_layout_is_the_real_one(state: State) -> None:
    vision = [key for key in state if key.startswith("vision_model.model.")]
    assert len(vision) == 53 + 53 * 5 + 1  # convolutions, batch normalisations, fc


def test_embeddings_equal_the_reference(
    encoder: Encoder, state: State, reference: dict[str, Callable], pixels: np.ndarray
) -> None:
    got = encoder.embed(pixels).embedding
    expected = reference["embedding"](state, reference["input"](pixels)).numpy()
    assert got.dtype == np.float32
    assert got.shape == (4, 512)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    # Random weights, yet the four pictures are told apart: the agreement is not that of a constant.
    assert np.linalg.norm(got[0] - got[1]) > 1e-2


def test_safetensors_and_folder_give_the_same(
    encoder: Encoder, state: State, checkpoint_file: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "model.safetensors")
    for weights in (tmp_path / "model.safetensors", tmp_path, checkpoint_file.parent):
        again = load_encoder("medclip-resnet50", str(weights))
        assert np.array_equal(again.embed(pixels[:1]).embedding, encoder.embed(pixels[:1]).embedding)


def test_shares_equal_the_reference_and_sum_to_the_embedding(
    encoder: Encoder, state: State, reference: dict[str, Callable], pixels: np.ndarray
) -> None:
    mask = np.array([True, False, True, True])
    got = encoder.embed(pixels, mask)
    f = reference["feature_map"](state, reference["input"](pixels)).double()
    parts = torch.einsum("bchw,dc->bhwd", f, state["vision_model.model.fc.weight"].double()) / 49
    parts = parts.flatten(1, 2) / parts.sum((1, 2)).norm(dim=1)[:, None, None]
    assert got.share_count == 3
    assert got.share_sum is not None
    assert got.share_sum.shape == (49, 512)
    np.testing.assert_allclose(got.share_sum, parts[mask].sum(0).numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.share_sum.sum(0), got.embedding[mask].sum(0), rtol=0, atol=1e-5)


def test_notes_and_identity(encoder: Encoder, checkpoint_file: Path) -> None:
    assert (encoder.name, encoder.stand_in, encoder.embedding_dim) == ("medclip-resnet50", False, 512)
    assert (encoder.image_size, encoder.grid) == (224, (7, 7))
    assert encoder.weights_sha256 == hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()


def test_wrong_shape_is_refused_by_name(state: State, tmp_path: Path) -> None:
    key = "vision_model.model.layer2.0.conv2.weight"
    message = refusal({**state, key: torch.zeros(128, 128, 1, 1)}, tmp_path)
    assert key in message
    assert "[128, 128, 1, 1] instead of [128, 128, 3, 3]" in message


@pytest.mark.parametrize(
    "key", ["vision_model.model.fc.weight", "vision_model.model.layer3.5.bn2.num_batches_tracked"]
)
def test_missing_key_is_refused_by_name(state: State, tmp_path: Path, key: str) -> None:
    assert f"lacks {key}" in refusal({k: v for k, v in state.items() if k != key}, tmp_path)


def test_unexpected_key_is_refused_by_name(state: State, tmp_path: Path) -> None:
    key = "vision_model.model.fc.bias"
    assert f"has {key}" in refusal({**state, key: torch.zeros(512)}, tmp_path)


def test_foreign_prefix_is_refused_by_name(state: State, tmp_path: Path) -> None:
    assert "optimizer.lr" in refusal({**state, "optimizer.lr": torch.tensor(1.0)}, tmp_path)


def test_vit_variant_is_refused_by_its_own_name(state: State, tmp_path: Path) -> None:
    swin = {"vision_model.projection_head.weight": torch.zeros(512, 768), "logit_scale": state["logit_scale"]}
    assert "ViT variant" in refusal(swin, tmp_path)


def test_values_that_are_not_finite_are_refused_by_name(state: State, tmp_path: Path) -> None:
    key = "vision_model.model.bn1.running_var"
    assert key in refusal({**state, key: torch.full((64,), torch.nan)}, tmp_path)


def test_text_half_is_not_needed(encoder: Encoder, state: State, pixels: np.ndarray, tmp_path: Path) -> None:
    torch.save({k: v for k, v in state.items() if k.startswith("vision_model.")}, tmp_path / "half.bin")
    half = load_encoder("medclip-resnet50", str(tmp_path / "half.bin"))
    assert np.array_equal(half.embed(pixels[:1]).embedding, encoder.embed(pixels[:1]).embedding)


def test_without_weights_says_where_to_look() -> None:
    with pytest.raises(InputError, match="medsae weights"):
        load_encoder("medclip-resnet50")


def test_real_rgba_radiograph_embeds_as_its_grey_self(encoder: Encoder) -> None:
    if not RADIOGRAPHS.is_dir():
        pytest.skip("no ../shared/radiographs/nih/images_1024 beside this repository")
    originals = [Image.open(file) for file in sorted(RADIOGRAPHS.glob("*.png"))]
    # NIH's RGBA originals repeat the grey value in red, green and blue; a copy may hold none of them.
    rgba = next((image for image in originals if image.mode == "RGBA"), originals[0].convert("RGBA"))
    preprocess = preprocessing("medclip-resnet50")
    embedded = encoder.embed(np.stack([preprocess(rgba), preprocess(rgba.getchannel("G"))])).embedding
    assert np.abs(embedded[0] - embedded[1]).max() < 1e-4


def test_bfloat16_on_cpu_stays_close(encoder: Encoder, checkpoint_file: Path, pixels: np.ndarray) -> None:
    half = load_encoder("medclip-resnet50", str(checkpoint_file), precision="bfloat16")
    cosine = (half.embed(pixels).embedding * encoder.embed(pixels).embedding).sum(1)
    assert cosine.min() >= 0.999
    assert half.embed(pixels).embedding.dtype == np.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_bfloat16_on_cuda_agrees(encoder: Encoder, checkpoint_file: Path, pixels: np.ndarray) -> None:
    cuda = load_encoder("medclip-resnet50", str(checkpoint_file), device="cuda", precision="bfloat16")
    mask = np.ones(len(pixels), bool)
    ours, theirs = encoder.embed(pixels, mask), cuda.embed(pixels, mask)
    assert (ours.embedding * theirs.embedding).sum(1).min() >= 0.999
    assert ours.share_sum is not None
    assert theirs.share_sum is not None
    assert np.corrcoef(ours.share_sum.ravel(), theirs.share_sum.ravel())[0, 1] >= 0.999
