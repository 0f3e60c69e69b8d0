"""The pooled encoder's arithmetic and `load_encoder`, on a small encoder of a user's own."""

import sys
import warnings
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from medsae_ray.encoders import load_encoder, preprocessing
from medsae_ray.encoders.base import PooledEncoder
from medsae_ray.errors import InputError


class Tiny(PooledEncoder):
    """16×16 pixels -> 5 dimensions over a 4×3 feature map."""

    name, stand_in, image_size, grid = "tiny", False, 16, (4, 3)
    mean, std = 0.4, 0.3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, (4, 5), stride=(4, 5))
        self.projection = nn.Linear(8, 5, bias=False)

    def feature_map(self, x: Tensor) -> Tensor:
        return self.convolution(x).relu()

    @classmethod
    def load(cls, weights: str | None, *, device: str = "cpu", precision: str = "float32") -> Self:
        return cls().place(device, precision)


TINY = load_encoder(f"{__name__}:Tiny")


def batch(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 16, 16), dtype=np.uint8)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), mask=st.lists(st.booleans(), min_size=1, max_size=9))
def test_shares_sum_to_the_embeddings(seed: int, mask: list[bool]) -> None:
    got = TINY.embed(batch(seed, len(mask)), np.array(mask))
    assert got.share_sum is not None
    assert got.share_sum.shape == (12, 5)
    assert got.share_count == sum(mask)
    np.testing.assert_allclose(got.share_sum.sum(0), got.embedding[mask].sum(0), rtol=0, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 9), data=st.data())
def test_shares_add_over_batches(seed: int, n: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, n - 1))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    pixels = batch(seed, n)
    whole, first, rest = (TINY.embed(pixels[s], mask[s]) for s in (slice(n), slice(cut), slice(cut, n)))
    np.testing.assert_allclose(whole.share_sum, first.share_sum + rest.share_sum, rtol=0, atol=1e-5)
    assert whole.share_count == first.share_count + rest.share_count
    np.testing.assert_allclose(whole.embedding, np.vstack([first.embedding, rest.embedding]), atol=1e-5)


def test_positions_are_row_major() -> None:
    """Only the lower left patch of the picture is lit: its share alone differs from the others'."""
    pixels = np.zeros((1, 16, 16), np.uint8)
    pixels[0, 12:16, 0:5] = 255
    share = TINY.embed(pixels, np.array([True])).share_sum
    assert share is not None
    odd = np.abs(share - share[0]).max(1) > 1e-6
    assert np.flatnonzero(odd).tolist() == [3 * 3 + 0]


def test_an_image_without_direction_is_left_out_of_the_shares() -> None:
    blind = Tiny().place()
    nn.init.constant_(blind.convolution.bias, -0.5)
    nn.init.constant_(blind.convolution.weight, 0.01)
    pixels = np.stack([np.zeros((16, 16), np.uint8), np.full((16, 16), 255, np.uint8)])
    got = blind.embed(pixels, np.array([True, True]))
    assert not np.isfinite(got.embedding[0]).any()
    assert got.share_count == 1
    np.testing.assert_allclose(got.share_sum.sum(0), got.embedding[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1, 32, 33, 70])
def test_batches_beyond_what_the_cpu_takes_at_once(n: int) -> None:
    pixels = batch(3, n)
    whole = TINY.embed(pixels)
    singly = np.vstack([TINY.embed(pixels[i : i + 1]).embedding for i in range(n)])
    np.testing.assert_allclose(whole.embedding, singly, rtol=0, atol=1e-6)


def test_empty_batch() -> None:
    got = TINY.embed(batch(0, 0), np.zeros(0, bool))
    assert got.embedding.shape == (0, 5)
    assert got.share_count == 0
    assert got.share_sum is not None
    assert not got.share_sum.any()


def test_no_shares_unless_asked_for() -> None:
    got = TINY.embed(batch(0, 3))
    assert got.share_sum is None
    assert got.share_count == 0


def test_scaling_is_bit_for_bit_float32() -> None:
    pixels = batch(1, 2)
    by_hand = (pixels.astype(np.float32) / np.float32(255) - np.float32(0.4)) / np.float32(0.3)
    got = TINY.normalise(pixels).numpy()
    assert np.array_equal(got, np.repeat(by_hand[:, None], 3, axis=1))


def test_read_only_pixels_embed_without_warning() -> None:
    pixels = batch(2, 2)
    pixels.flags.writeable = False  # as every batch out of an object store is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TINY.embed(pixels)


def test_frozen() -> None:
    assert not TINY.training
    assert not any(parameter.requires_grad for parameter in TINY.parameters())


def test_own_preprocessing_is_found_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_encoder.py").write_text(
        "import numpy as np\n"
        "from medsae_ray.encoders.base import PooledEncoder\n"
        "class Own(PooledEncoder):\n"
        "    @staticmethod\n"
        "    def preprocess(image):\n"
        "        return np.full((9, 9), image.width, np.uint8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert preprocessing("own_encoder:Own")(Image.new("L", (7, 3)))[0, 0] == 7
    sys.modules.pop("own_encoder")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("medclip-resnet", "did you mean 'medclip-resnet50'"),
        ("standin", "did you mean 'stand-in'"),
        ("", "unknown"),
        ("no_such_module:X", "cannot be imported"),
        ("json:NoSuchClass", "cannot be imported"),
        (":X", "cannot be imported"),
        ("json:JSONDecoder", "not a subclass"),
    ],
)
def test_unknown_encoders_are_refused(name: str, says: str) -> None:
    for found in (load_encoder, preprocessing):
        with pytest.raises(InputError, match=says):
            found(name)


def test_unusable_precision_and_device_are_refused() -> None:
    with pytest.raises(InputError, match="float32, bfloat16"):
        load_encoder(f"{__name__}:Tiny", precision="float16")
    with pytest.raises(InputError, match="device 'abacus'"):
        load_encoder(f"{__name__}:Tiny", device="abacus")
