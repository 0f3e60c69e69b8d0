"""The stand-in encoder: MedCLIP's interface, labelled a stand-in, made for this version of the phantoms."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from medsae_ray.encoders.base import PooledEncoder
from medsae_ray.encoders.standin import WEIGHTS, StandInEncoder
from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.radiographs.phantom import PHANTOM_VERSION, sample_images

SHIPPED = Path(str(files("medsae_ray.encoders") / WEIGHTS))


@pytest.fixture(scope="module")
def encoder() -> StandInEncoder:
    return StandInEncoder.load()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return sample_images(1_000_021, 1, 8)[0]


def test_shipped_weights_say_what_they_are(encoder: StandInEncoder) -> None:
    assert SHIPPED.stat().st_size <= 4_000_000
    assert encoder.stand_in
    assert encoder.notes["stand_in"] == "true"
    assert encoder.notes["training"].startswith("python standins/train_encoder.py")
    assert int(encoder.notes["seed"]) == 1_000_003
    assert len(encoder.weights_sha256) == 64


def test_shipped_weights_belong_to_this_version_of_the_phantoms(encoder: StandInEncoder) -> None:
    assert encoder.notes["phantom_version"] == str(PHANTOM_VERSION), (
        "retrain the stand-in: python standins/train_encoder.py"
    )


def test_embedding_is_the_normalised_projection_of_the_mean(
    encoder: StandInEncoder, pixels: np.ndarray
) -> None:
    assert isinstance(encoder, PooledEncoder)
    with torch.no_grad():
        f = encoder.feature_map(encoder.normalise(pixels)).numpy()
    assert f.shape == (8, 192, *encoder.grid)
    e = f.mean((2, 3)) @ encoder.projection.weight.numpy().T
    expected = e / np.linalg.norm(e, axis=1, keepdims=True)
    embedded = encoder.embed(pixels, np.ones(8, bool))
    assert embedded.embedding.shape == (8, encoder.embedding_dim) == (8, 512)
    np.testing.assert_allclose(embedded.embedding, expected, atol=1e-6)
    assert embedded.share_sum is not None
    np.testing.assert_allclose(embedded.share_sum.sum(0), expected.sum(0), atol=1e-5)


def test_folding_the_batch_norms_changes_nothing(pixels: np.ndarray) -> None:
    plain = StandInEncoder().eval()
    plain.load_state_dict(load_file(SHIPPED))
    x = plain.normalise(pixels)
    with torch.no_grad():
        expected = plain.feature_map(x)
        plain.fold_batch_norms()
        folded = plain.feature_map(x)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())
    torch.testing.assert_close(folded, expected, atol=1e-4, rtol=1e-4)


def test_first_layer_sees_the_image_halved(encoder: StandInEncoder, pixels: np.ndarray) -> None:
    """Against scipy's correlation: the mean of 2 x 2 pixels, then every second position of the filter."""
    grey = (pixels[0] / 255 - encoder.mean) / encoder.std
    halved = grey.reshape(112, 2, 112, 2).mean((1, 3))
    filters, bias = encoder.backbone[0].weight[:, 0].numpy(), encoder.backbone[0].bias.numpy()
    expected = [
        ndimage.correlate(halved, k, mode="constant")[::2, ::2] + b
        for k, b in zip(filters, bias, strict=True)
    ]
    with torch.no_grad():
        found = encoder.backbone[0](F.avg_pool2d(encoder.normalise(pixels[:1])[:, :1], 2))[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_bfloat16_agrees(encoder: StandInEncoder, pixels: np.ndarray) -> None:
    half = StandInEncoder.load(precision="bfloat16").embed(pixels).embedding
    assert ((half * encoder.embed(pixels).embedding).sum(1) > 0.99).all()


def test_embedding_tells_findings_apart(encoder: StandInEncoder) -> None:
    """A ridge regression on 500 phantoms of a seed it has not seen reads each finding from 250 others."""
    images, findings, _ = sample_images(1_000_022, 1, 750)
    x = np.concatenate([encoder.embed(block).embedding for block in np.array_split(images, 15)])
    x = x - x[:500].mean(0)
    y = findings - findings[:500].mean(0)
    w = np.linalg.solve(x[:500].T @ x[:500] + 0.05 * np.eye(512), x[:500].T @ y[:500])
    scores = {name: roc_auc_score(findings[500:, i], x[500:] @ w[:, i]) for i, name in enumerate(LABELS)}
    assert sum(score > 0.9 for score in scores.values()) >= 11, scores


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_other_weights_are_refused(fault: str, tmp_path: Path) -> None:
    tensors = load_file(SHIPPED)
    if fault == "missing":
        del tensors["projection.weight"]
    elif fault == "unexpected":
        tensors["head.weight"] = torch.zeros(1)
    else:
        tensors["projection.weight"] = torch.zeros(512, 64)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"projection\.weight|head\.weight"):
        StandInEncoder.load(str(tmp_path / "other.safetensors"))
