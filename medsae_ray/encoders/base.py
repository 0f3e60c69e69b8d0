"""What an encoder is: grey pixels in, unit embeddings out, and each position's share of the embedding.

A user's own encoder subclasses `PooledEncoder` when its embedding is a bias-free linear projection of an
average-pooled feature map, and `Encoder` otherwise::

    class MyEncoder(PooledEncoder):
        name, stand_in, image_size, grid = "my-encoder", False, 224, (7, 7)
        mean, std = 0.5, 0.25                              # of pixels scaled to [0, 1]

        def __init__(self) -> None:
            super().__init__()
            self.backbone = ...                            # any nn.Module
            self.projection = nn.Linear(2048, 512, bias=False)

        def feature_map(self, x: Tensor) -> Tensor:        # [B, 3, S, S] -> [B, C, h, w]
            return self.backbone(x)

        @classmethod
        def load(cls, weights, *, device="cpu", precision="float32") -> "MyEncoder":
            encoder = cls()
            ...                                            # read `weights`, set weights_sha256
            return encoder.place(device, precision)

and is then found by its import path, `load_encoder("my_package.my_module:MyEncoder")`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from medsae_ray.encoders.preprocessing import pad_and_resize
from medsae_ray.errors import InputError

PRECISIONS = ("float32", "bfloat16")


class Embedded(NamedTuple):
    """Embeddings of one batch of B images, and the summed shares of the P = h·w feature-map positions.

    `share_sum` adds up, over the images asked for, W f_ij / (P ‖e‖): position (i, j)'s part of the
    embedding, with f the last feature map, W the projection and e = W·mean(f). Over the P positions
    (row-major) it sums to the sum of those images' embeddings, so shares of batches simply add.
    """

    embedding: np.ndarray
    """float32 [B, d], rows of unit L2 norm; not finite where the encoder gave no usable direction."""
    share_sum: np.ndarray | None
    """float64 [P, d]; None where no shares were asked for or the encoder has no feature map."""
    share_count: int
    """Number of images in `share_sum`; those without a finite embedding are left out."""


class Encoder(ABC):
    """A frozen image encoder. `preprocess` needs no weights, so decoding runs apart from `embed`."""

    name: str
    stand_in: bool = False
    """True for weights that only stand in for a medical encoder: every table and page says so."""
    embedding_dim: int
    image_size: int
    """Side S, in pixels, of the square that `preprocess` returns."""
    grid: tuple[int, int] | None = None
    """(h, w) of the feature map that the embedding averages; None where there is none."""
    weights_sha256: str = ""
    notes: dict[str, str]
    """What else belongs to the record of a run, e.g. the version of the phantoms a stand-in has seen."""

    @staticmethod
    @abstractmethod
    def preprocess(image: Image.Image) -> np.ndarray:
        """One radiograph of any size -> uint8 [S, S]."""

    @classmethod
    @abstractmethod
    def load(cls, weights: str | None, *, device: str = "cpu", precision: str = "float32") -> Self:
        """The encoder with its weights, on `device`; raises `InputError` for unusable weights."""

    @abstractmethod
    def embed(self, pixels: np.ndarray, share_mask: np.ndarray | None = None) -> Embedded:
        """uint8 [B, S, S] -> embeddings; `share_mask` (bool [B]) chooses the images of `share_sum`."""


class PooledEncoder(nn.Module, Encoder):
    """An encoder whose embedding is `projection` of the average over positions of `feature_map`.

    The feature map runs in the chosen precision; pooling, projection and normalisation always in float32.
    """

    mean: ClassVar[float]
    std: ClassVar[float]
    """Centre and scale of the network's input, for pixels in [0, 1]."""
    cpu_batch: ClassVar[int] = 32
    """Images that pass the network at once on a CPU, however many `embed` is given; a GPU takes them all."""
    projection: nn.Linear
    """[C -> d], without bias: with one, positions would not sum to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = {}
        self._device = torch.device("cpu")
        self._precision = "float32"

    preprocess = staticmethod(pad_and_resize)

    @abstractmethod
    def feature_map(self, x: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> last feature map [B, C, h, w]."""

    @property
    def embedding_dim(self) -> int:  # type: ignore[override]
        return self.projection.out_features

    def place(self, device: str = "cpu", precision: str = "float32") -> Self:
        """Freeze, move to `device` and choose the precision of the feature map; returns self."""
        if precision not in PRECISIONS:
            raise InputError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}.")
        try:
            self._device = torch.device(device)
            # Channels-last is the layout of tensor cores and of oneDNN's fastest kernels: see
            # benchmarks/encoder.py.
            self.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
        self._precision = precision
        return self.requires_grad_(False).eval()

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """uint8 [B, S, S] -> the network's input, float32 [B, 3, S, S], all channels alike."""
        # uint8 crosses to the device, a quarter of the bytes of float32 and a twelfth of three channels.
        x = torch.tensor(pixels, device=self._device)
        x = x.float().div_(255).sub_(self.mean).div_(self.std)
        return x.unsqueeze(1).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)

    def _features(self, pixels: np.ndarray) -> Tensor:
        """uint8 [B, S, S] -> feature map, float32 [B, C, P]."""
        x = self.normalise(pixels)
        parts = x.split(self.cpu_batch) if self._device.type == "cpu" else (x,)
        half = self._precision == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            f = torch.cat([self.feature_map(part) for part in parts])
        return f.float().flatten(2)

    @torch.inference_mode()
    def shares(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S] -> c, float32 [B, P, d]: W f_ij / (P ‖e‖), position (i, j)'s part of the embedding.

        Over the P positions (row-major) they sum to the embedding; not finite where that is not.
        """
        f = self._features(pixels)
        c = self.projection(f.transpose(1, 2)) / f.shape[2]
        return (c / c.sum(1).norm(dim=1)[:, None, None]).cpu().numpy()

    @torch.inference_mode()
    def embed(self, pixels: np.ndarray, share_mask: np.ndarray | None = None) -> Embedded:
        f = self._features(pixels)
        e = self.projection(f.mean(2))
        norm = e.norm(dim=1)
        embedding = (e / norm[:, None]).cpu().numpy()
        if share_mask is None:
            return Embedded(embedding, None, 0)

        chosen = np.flatnonzero(share_mask & np.isfinite(embedding).all(axis=1))
        index = torch.from_numpy(chosen).to(self._device)
        positions = f.shape[2]
        # W is linear: adding up the weighted feature maps first leaves one product with it a batch.
        weight = 1 / (positions * norm[index])
        weighted = torch.einsum("bcp,b->pc", f[index], weight)
        share_sum = self.projection(weighted).double().cpu().numpy()
        return Embedded(embedding, share_sum, len(chosen))
