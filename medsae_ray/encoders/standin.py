"""A small ResNet that stands in for MedCLIP in demos and tests. It has seen phantoms only, never a patient.

The interface is MedCLIP-ResNet's: 512-d unit embeddings, a 7x7 feature map, average pooling and a projection
without bias. The weights that ship with the package come from `standins/train_encoder.py`.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from medsae_ray.encoders.base import PooledEncoder
from medsae_ray.encoders.checkpoints import Checkpoint, match_keys, read_checkpoint

WEIGHTS = "standin_encoder.safetensors"


class StandInEncoder(PooledEncoder):
    """512-d embeddings of 224x224 grey radiographs, which it halves to 112x112; 0.9 M parameters."""

    name, stand_in, image_size, grid = "stand-in", True, 224, (7, 7)
    mean, std = 0.4, 0.25

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            ResidualBlock(16, 32, stride=2),
            ResidualBlock(32, 96, stride=2),
            ResidualBlock(96, 96),
            ResidualBlock(96, 192, stride=2),
        )
        self.projection = nn.Linear(192, 512, bias=False)

    def feature_map(self, x: Tensor) -> Tensor:
        # One channel is enough: the three are alike.
        return self.backbone(F.avg_pool2d(x[:, :1], 2))

    @classmethod
    def load(cls, weights: str | None = None, *, device: str = "cpu", precision: str = "float32") -> Self:
        """The shipped weights, or those of a safetensors file written by `standins/train_encoder.py`."""
        path = weights or str(files("medsae_ray.encoders") / WEIGHTS)
        return cls.from_checkpoint(read_checkpoint(path)).place(device, precision)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read strictly: raises `InputError` naming the key that is missing, unexpected or misshapen."""
        encoder = cls().eval()
        match_keys(checkpoint, checkpoint.tensors, encoder.state_dict())
        encoder.load_state_dict(checkpoint.tensors)
        encoder.weights_sha256 = checkpoint.sha256
        encoder.notes = dict(checkpoint.metadata)
        encoder.fold_batch_norms()
        return encoder

    @torch.no_grad()
    def fold_batch_norms(self) -> None:
        """Fold the frozen batch normalisations into their convolutions: the same function in fewer passes."""
        for sequence in self.backbone.modules():
            if isinstance(sequence, nn.Sequential) and isinstance(sequence[1], nn.BatchNorm2d):
                convolution = sequence[0]
                assert isinstance(convolution, nn.Conv2d)
                sequence[0] = fuse_conv_bn_eval(convolution, sequence[1])
                sequence[1] = nn.Identity()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, arXiv:1512.03385, fig. 2)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.second = nn.Sequential(
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x), inplace=True)
        return F.relu(self.second(hidden) + self.shortcut(x), inplace=True)
