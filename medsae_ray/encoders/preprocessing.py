"""From a decoded radiograph to an encoder's square of grey pixels: PIL and NumPy only.

Decoding tasks import this without PyTorch; scaling and normalisation follow in `Encoder.embed`.
"""

import numpy as np
from PIL import Image


def pad_and_resize(image: Image.Image, size: int = 224) -> np.ndarray:
    """MedCLIP's own preprocessing up to its last 8-bit step: any image -> uint8 [size, size].

    Grey, centred on a black square of side max(size, width, height), reduced with PIL's bicubic filter
    (`MedCLIPFeatureExtractor` of RyanWangZf/MedCLIP, medclip/dataset.py; its centre crop of the same size
    changes nothing). Colour becomes luma and transparency is dropped, as in PIL's `convert("L")`.
    """
    side = max(size, *image.size)
    square = Image.new("L", (side, side))
    left, top = ((side - extent) // 2 for extent in image.size)
    square.paste(image.convert("L"), (left, top))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
