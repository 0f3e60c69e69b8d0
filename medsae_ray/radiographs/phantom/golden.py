"""The look of PHANTOM_VERSION, kept as small thumbnails in the tests.

`python -m medsae_ray.radiographs.phantom.golden tests/radiographs` rewrites them.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medsae_ray.radiographs.phantom.render import PHANTOM_VERSION, sample_images

GOLDEN = "golden_phantoms.npz"


def thumbnails() -> NDArray[np.uint8]:
    """uint8 [40, 28, 28]: the first phantoms of seed 7, each the mean of 8 x 8 pixels."""
    pixels = sample_images(7, 1, 40)[0].astype(np.float64)
    return np.rint(pixels.reshape(-1, 28, 8, 28, 8).mean((2, 4))).astype(np.uint8)


if __name__ == "__main__":
    np.savez_compressed(Path(sys.argv[1]) / GOLDEN, thumbnails=thumbnails(), version=PHANTOM_VERSION)
