"""MedCLIP's preprocessing, bit for bit against its description written out once more."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from medsae_ray.encoders import ENCODERS, preprocessing
from medsae_ray.encoders.preprocessing import pad_and_resize

SIZES = [(224, 224), (100, 60), (60, 223), (225, 224), (301, 200), (199, 300), (1024, 840), (1, 1)]


def drawn(width: int, height: int, mode: str) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    if mode == "L":
        return Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
    colours = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode == "RGBA":
        colours.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
        return colours
    return colours.quantize(17) if mode == "P" else colours


def luma(image: Image.Image) -> np.ndarray:
    """ITU-R 601 grey in 16-bit fixed point, rounded, from RGB; transparency plays no part."""
    if image.mode == "L":
        return np.asarray(image)
    if image.mode == "P":
        palette = np.array(image.getpalette()).reshape(-1, 3)
        rgb = palette[np.asarray(image)]
    else:
        rgb = np.asarray(image)[..., :3]
    r, g, b = np.moveaxis(rgb.astype(np.int64), -1, 0)
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).astype(np.uint8)


def padded(image: Image.Image) -> np.ndarray:
    x, y = image.size
    size = max(224, x, y)
    square = np.zeros((size, size), np.uint8)
    left, top = int((size - x) / 2), int((size - y) / 2)
    square[top : top + y, left : left + x] = luma(image)
    return square


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_equal_the_description(size: tuple[int, int], mode: str) -> None:
    image = drawn(*size, mode)
    expected = np.asarray(Image.fromarray(padded(image)).resize((224, 224), Image.Resampling.BICUBIC))
    got = pad_and_resize(image)
    assert got.dtype == np.uint8
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_whole_chain_equals_transformers_clip_processor(size: tuple[int, int]) -> None:
    """After the padding MedCLIP's processor is CLIP's own, with one grey channel."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    mean, std = 0.5862785803043838, 0.27950088968644304
    processor = CLIPImageProcessorPil(do_convert_rgb=False, image_mean=[mean] * 3, image_std=[std] * 3)
    image = drawn(*size, "RGB")
    stacked = np.repeat(padded(image)[..., None], 3, axis=2)
    expected = np.asarray(processor(Image.fromarray(stacked), return_tensors="np")["pixel_values"][0])
    ours = (pad_and_resize(image).astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    assert expected.shape == (3, 224, 224)
    # The last bit differs: CLIP multiplies by 1/255 where MedCLIP's generation of it divided by 255.
    np.testing.assert_allclose(np.broadcast_to(ours, expected.shape), expected, rtol=0, atol=5e-7)


def test_found_by_name_without_importing_torch_or_transformers() -> None:
    program = (
        "import sys; from medsae_ray.encoders import preprocessing, ENCODERS;"
        "[preprocessing(name) for name in ENCODERS];"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_same_function_as_the_encoder_itself() -> None:
    from medsae_ray.encoders.medclip import MedClipResNet50

    assert preprocessing("medclip-resnet50") is MedClipResNet50.preprocess
    assert list(ENCODERS) == ["medclip-resnet50", "stand-in"]
