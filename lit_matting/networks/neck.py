"""The neck: a feature pyramid and cross-attention maps in, one fine feature map out."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_matting.backbones import BackboneOutput


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm: batch statistics would alternate with the data sets of the schedule."""
    return nn.GroupNorm(min(32, channels // 4), channels)


class FuseBlock(nn.Module):
    """Two 3 x 3 convolutions with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)


class Neck(nn.Module):
    """Top-down fusion of the pyramid: each level is projected, joined by the coarser one, and mixed.

    The head-averaged cross-attention maps are concatenated to the level of their size before its projection, as VPD
    does.

    Args:
        in_channels: Stride -> channels of the backbone's pyramid.
        max_tokens: Attention maps per layer; 0 leaves attention out.
        channels: Width of every fused level.
        levels: How many levels to use, counted from the finest; None uses all.
    """

    def __init__(
        self, in_channels: dict[int, int], max_tokens: int, channels: int = 256, levels: int | None = None
    ) -> None:
        super().__init__()
        self.strides = sorted(in_channels)[:levels]
        self.channels = channels
        self.max_tokens = max_tokens
        self.project = nn.ModuleDict(
            {str(stride): nn.Conv2d(in_channels[stride] + max_tokens, channels, 1) for stride in self.strides}
        )
        self.fuse = nn.ModuleDict({str(stride): FuseBlock(channels) for stride in self.strides})

    def forward(self, backbone: BackboneOutput) -> dict[int, Tensor]:
        """Return stride -> (B, ``channels``, H / stride, W / stride), all levels fused top-down."""
        levels: dict[int, Tensor] = {}
        above: Tensor | None = None
        for stride in reversed(self.strides):
            features = backbone.features[stride]
            if self.max_tokens:
                features = torch.cat([features, self._attention(backbone, features)], 1)
            features = self.project[str(stride)](features)
            if above is not None:
                features = features + F.interpolate(above, size=features.shape[-2:], mode="nearest")
            above = levels[stride] = self.fuse[str(stride)](features)
        return levels

    def _attention(self, backbone: BackboneOutput, features: Tensor) -> Tensor:
        size = features.shape[-2:]
        maps = [value for value in backbone.attention.values() if value.shape[-2:] == size]
        if not maps:
            return features.new_zeros(features.shape[0], self.max_tokens, *size)
        # a probability over T tokens averages 1 / T: brought to the order of the features
        return (sum(maps) / len(maps)).to(features.dtype) * self.max_tokens
