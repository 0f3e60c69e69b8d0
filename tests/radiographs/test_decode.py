import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medsae_ray.radiographs.decode import DecodeError, decode

GREY = np.random.default_rng(0).integers(0, 256, (24, 17), dtype=np.uint8)


def encode(image, format_="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format_, **options)
    return buffer.getvalue()


def pixels(data, **limits):
    image = decode(data, **limits)
    assert image.mode == "L"
    return np.asarray(image)


def png(width, height, depth=8, colour=0, content=b"\0" * 100):
    """A PNG of that header, whose pixels, at filter byte 0, are `content`."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_grey_content_is_the_same_in_every_mode(mode):
    assert np.array_equal(pixels(encode(Image.fromarray(GREY).convert(mode))), GREY)


def test_transparency_is_ignored():
    image = Image.fromarray(GREY).convert("RGBA")
    image.putalpha(Image.fromarray(255 - GREY))
    assert np.array_equal(pixels(encode(image)), GREY)


def test_a_palette_is_looked_up_not_read_as_grey_levels():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 10, 10, 200, 200, 200])
    image.putdata([0, 1])
    assert pixels(encode(image)).tolist() == [[10, 200]]
    assert pixels(encode(image, transparency=bytes([0, 255]))).tolist() == [[10, 200]]


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_a_channel_keep_the_upper_eight(colour, channels):
    assert pixels(png(1, 1, 16, colour, b"\0" + b"\x7b\x55" * channels)).tolist() == [[0x7B]]


def test_one_bit():
    assert pixels(encode(Image.fromarray(GREY > 127))).tolist() == ((GREY > 127) * 255).tolist()


def test_colours_become_luma():
    colour = np.random.default_rng(1).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(pixels(encode(colour)) - luma).max() <= 0.51


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_sixteen_bit_grey_is_scaled_by_the_range_it_uses(bits):
    full = 2**bits - 1
    values = np.random.default_rng(2).integers(0, full + 1, (20, 20)).astype(np.uint16)
    values[0, 0] = full
    assert np.abs(pixels(encode(values)) - values / full * 255).max() <= 0.5


def test_a_dark_sixteen_bit_image_is_not_stretched_to_its_own_maximum():
    values = np.full((4, 4), 2048, np.uint16)
    assert pixels(encode(values)).tolist() == [[128] * 4] * 4


def test_an_all_black_sixteen_bit_image():
    assert pixels(encode(np.zeros((3, 3), np.uint16))).max() == 0


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(mode):
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    found = pixels(encode(Image.fromarray(smooth).convert(mode), "JPEG", quality=95))
    assert np.abs(found.astype(int) - smooth).max() <= 6


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda x: x),
        (2, np.fliplr),
        (3, lambda x: np.rot90(x, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).T),
        (8, np.rot90),
    ],
)
@pytest.mark.parametrize("format_", ["PNG", "JPEG"])
def test_exif_rotation(orientation, turn, format_):
    exif = Image.Exif()
    exif[0x0112] = orientation
    corners = np.kron(np.array([[0, 80], [160, 240], [40, 200]], np.uint8), np.ones((16, 16), np.uint8))
    found = pixels(encode(corners, format_, exif=exif))
    assert found.shape == turn(corners).shape
    assert np.abs(found.astype(int) - turn(corners)).max() <= 8


def test_damaged_exif_costs_neither_the_image_nor_a_warning():
    truncated = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(encode(np.zeros((8, 8), np.uint8), "JPEG", exif=truncated)).max() == 0


def test_sixteen_bit_with_rotation():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    assert np.abs(pixels(encode(values, exif=exif)) - np.rot90(values, -1) / 257).max() <= 0.5


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello", "not an image"),
        (b"\0" * 200, "not an image"),
        (b"\0" * 128 + b"DICM" + b"\0" * 100, "DICOM is not read"),
        (encode(GREY, "GIF"), "unsupported format GIF"),
        (encode(GREY, "BMP"), "unsupported format BMP"),
        (encode(GREY, "TIFF"), "unsupported format TIFF"),
        (b"\x89PNG\r\n\x1a\n", "truncated or corrupt PNG"),
        (b"\xff\xd8\xff", "truncated or corrupt JPEG"),
        (encode(GREY)[:-100], "truncated or corrupt PNG"),
        (encode(np.tile(GREY, (20, 20)), "JPEG")[:2000], "truncated or corrupt JPEG"),
        (png(64, 64), "truncated or corrupt PNG"),
        (png(0, 5), "truncated or corrupt PNG"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(DecodeError, match=reason):
        decode(data)


@pytest.mark.parametrize(
    ("width", "height", "said"),
    [(30000, 30000, "30000 x 30000"), (100_001, 1000, "100001 x 1000"), (2**31 - 1, 2**31 - 1, "2147483647")],
)
def test_a_bomb_is_refused_by_its_header_alone(width, height, said, monkeypatch):
    monkeypatch.setattr(Image.core, "zip_decoder", None)  # decompressing anything would fail otherwise
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DecodeError, match=rf"too large: {said}.* px exceed 100 megapixels"):
            decode(png(width, height))


def test_the_limits_are_settings():
    data = encode(GREY)
    assert np.array_equal(pixels(data, max_pixels=GREY.size, max_bytes=len(data)), GREY)
    with pytest.raises(DecodeError, match="17 x 24 px"):
        decode(data, max_pixels=GREY.size - 1)
    with pytest.raises(DecodeError, match=r"too large: .* MiB"):
        decode(data, max_bytes=len(data) - 1)


def test_a_large_image_within_the_limit_raises_no_warning_and_leaves_pillows_limit_alone(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(encode(GREY)), GREY)
    assert Image.MAX_IMAGE_PIXELS == 10


GOOD = [encode(GREY), encode(GREY.astype(np.uint16) * 257), encode(GREY, "JPEG", exif=Image.Exif())]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(GOOD), st.data())
def test_damage_never_raises_anything_else(data, draw):
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    damaged = damaged[: draw.draw(st.integers(0, len(data)))]
    # A damaged header may ask for a large but permitted image: a small limit keeps the test quick.
    with contextlib.suppress(DecodeError):
        assert decode(bytes(damaged), max_pixels=10**6).mode == "L"
