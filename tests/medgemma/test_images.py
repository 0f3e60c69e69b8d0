"""Radiographs as the model is shown them."""

import numpy as np
import pytest
from PIL import Image

from medsae_ray.medgemma.images import UnreadableImage, read_image


def test_a_film_is_shrunk_to_the_longer_side_and_rgb(tmp_path):
    grey = np.tile(np.linspace(0, 255, 300).astype(np.uint8), (200, 1))
    path = tmp_path / "film.png"
    Image.fromarray(grey).save(path)
    shown = read_image("phantom-1", str(path), 150, 10**6)
    assert (shown.mode, shown.size) == ("RGB", (150, 100))
    assert abs(np.asarray(shown).mean() - grey.mean()) < 1
    untouched = read_image("phantom-1", str(path), 1024, 10**6)
    assert np.array_equal(np.asarray(untouched)[..., 0], grey)


def test_what_cannot_be_shown_is_named_by_its_id_alone(tmp_path):
    folder = tmp_path / "patient00042"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"no image")
    Image.new("L", (2000, 2000)).save(folder / "big.png")
    for name, told in (("bad.png", "not an image"), ("big.png", "too large"), ("gone.png", "cannot be read")):
        with pytest.raises(UnreadableImage, match=told) as caught:
            read_image("phantom-7", str(folder / name), 64, 10**6)
        assert "phantom-7" in str(caught.value)
        assert "patient00042" not in str(caught.value)
