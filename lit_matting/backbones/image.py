"""Image encoders: (B, 3, H, W) in [0, 1] -> the latent that a diffusion UNet reads."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class ImageEncoder(nn.Module, ABC):
    """Base of image encoders."""

    stride: int
    """Pixels per latent cell, along each side."""
    frozen: bool
    """True for loaded weights that are never trained."""

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Return the latent (B, C, H / stride, W / stride) of images (B, 3, H, W) in [0, 1]."""


class ConvStem(ImageEncoder):
    """A small trainable encoder to stride 8, with the cell's coordinates as the last two channels.

    Coordinates are what makes "the leftmost" learnable for a network this shallow.

    Args:
        channels: Latent channels, coordinates included.
    """

    stride = 8
    frozen = False

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(12, 64, 4, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.Conv2d(64, 96, 4, stride=2, padding=1),
            nn.GroupNorm(8, 96),
            nn.ReLU(),
            nn.Conv2d(96, channels - 2, 3, padding=1),
        )

    def forward(self, image: Tensor) -> Tensor:
        # 2 x 2 pixels become channels: a convolution at full size would cost more than everything after it
        latent = self.layers(F.pixel_unshuffle(2 * image - 1, 2))
        height, width = latent.shape[-2:]
        y = torch.linspace(-1, 1, height, device=latent.device, dtype=latent.dtype)
        x = torch.linspace(-1, 1, width, device=latent.device, dtype=latent.dtype)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(latent.shape[0], -1, -1, -1)
        return torch.cat([latent, grid], 1)
