"""MedCLIP's ResNet-50 image encoder (Wang et al. 2022, github.com/RyanWangZf/MedCLIP), frozen.

The network is torchvision's ResNet-50 with `fc = Linear(2048, 512, bias=False)`, the embedding its output at
unit L2 norm. It is built here from transformers' `ResNetModel`, and read from MedCLIP's own checkpoint of the
whole dual encoder, whose image half uses torchvision's names under `vision_model.model.`.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import ResNetConfig, ResNetModel

from medsae_ray.encoders.base import PooledEncoder
from medsae_ray.encoders.checkpoints import Checkpoint, match_keys, read_checkpoint
from medsae_ray.errors import InputError

PREFIX = "vision_model.model."


class SplitKeys(NamedTuple):
    """The keys of a MedCLIP checkpoint: the image encoder's tensors, and what is known but not used."""

    vision: dict[str, Tensor]
    """Under their full names, `vision_model.` included."""
    skipped: list[str]
    """`text_model.*`, `logit_scale` and `position_ids` buffers."""


class MedClipResNet50(PooledEncoder):
    """512-d embeddings of 224×224 grey radiographs, averaged over a 7×7 feature map."""

    name, stand_in, image_size, grid = "medclip-resnet50", False, 224, (7, 7)
    mean, std = 0.5862785803043838, 0.27950088968644304  # medclip/constants.py
    # The largest map of 8 images is 24.5 MiB. glibc gives blocks above 32 MiB back to the system at once, and
    # having them anew for each layer costs a third of the time at 32 images.
    cpu_batch = 8

    def __init__(self) -> None:
        super().__init__()
        # transformers' defaults are ResNet-50; named here are those on which torchvision's layout hangs: the
        # stride sits in the 3×3 convolution, and the first stage does not halve the map.
        self.backbone = ResNetModel(
            ResNetConfig(
                layer_type="bottleneck",
                depths=[3, 4, 6, 3],
                hidden_sizes=[256, 512, 1024, 2048],
                downsample_in_first_stage=False,
                downsample_in_bottleneck=False,
            )
        )
        self.projection = nn.Linear(2048, 512, bias=False)

    def feature_map(self, x: Tensor) -> Tensor:
        return self.backbone.encoder(self.backbone.embedder(x)).last_hidden_state

    @classmethod
    def load(cls, weights: str | None, *, device: str = "cpu", precision: str = "float32") -> Self:
        if weights is None:
            raise InputError(
                f"{cls.name} needs a weight file, which you fetch yourself: `medsae weights` says where."
            )
        return cls.from_checkpoint(read_checkpoint(weights)).place(device, precision)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read strictly: raises `InputError` naming the key that is missing, unexpected or misshapen."""
        encoder = cls().eval()
        own = {torchvision_key(key): value for key, value in encoder.state_dict().items()}
        vision = split_keys(checkpoint).vision
        match_keys(checkpoint, vision, own)
        encoder.load_state_dict({key: vision[torchvision_key(key)] for key in encoder.state_dict()})
        encoder.weights_sha256 = checkpoint.sha256
        fold_batch_norms(encoder.backbone)
        return encoder


def split_keys(checkpoint: Checkpoint) -> SplitKeys:
    """Set aside what belongs to MedCLIP's text half; raises `InputError` for a key of neither half."""
    vision, skipped = {}, []
    for key, value in checkpoint.tensors.items():
        if key.startswith("text_model.") or key == "logit_scale" or key.split(".")[-1] == "position_ids":
            skipped.append(key)
        elif key.startswith("vision_model."):
            vision[key] = value
        else:
            raise InputError(
                f"{checkpoint.path}: the key {key} is neither of vision_model. nor of text_model.: "
                "use MedCLIP's own pytorch_model.bin."
            )
    if "vision_model.projection_head.weight" in vision:
        raise InputError(
            f"{checkpoint.path} is MedCLIP's ViT variant (it has vision_model.projection_head.weight): "
            "use the ResNet's."
        )
    return SplitKeys(vision, skipped)


_LAYER = re.compile(r"backbone\.encoder\.stages\.(\d)\.layers\.(\d)\.(?:layer\.(\d)|shortcut)\.(.*)")


def torchvision_key(key: str) -> str:
    """MedCLIP's name of one of our tensors, e.g. `vision_model.model.layer1.0.conv2.weight`."""
    if key == "projection.weight":
        return PREFIX + "fc.weight"
    kind, leaf = key.split(".")[-2:]
    if key.startswith("backbone.embedder."):
        return f"{PREFIX}{'conv1' if kind == 'convolution' else 'bn1'}.{leaf}"
    match = _LAYER.fullmatch(key)
    assert match is not None, key
    stage, block, layer = match.group(1, 2, 3)
    if layer is None:
        module = f"downsample.{0 if kind == 'convolution' else 1}"
    else:
        module = f"{'conv' if kind == 'convolution' else 'bn'}{int(layer) + 1}"
    return f"{PREFIX}layer{int(stage) + 1}.{block}.{module}.{leaf}"


@torch.no_grad()
def fold_batch_norms(backbone: nn.Module) -> None:
    """Fold each frozen batch normalisation of a transformers ResNet into its convolution, in place.

    The function stays the same up to rounding; a pass over each feature map is saved.
    """
    for module in backbone.modules():
        convolution, normalization = (getattr(module, n, None) for n in ("convolution", "normalization"))
        if isinstance(convolution, nn.Conv2d) and isinstance(normalization, nn.BatchNorm2d):
            module.convolution = fuse_conv_bn_eval(convolution, normalization)
            module.normalization = nn.Identity()
