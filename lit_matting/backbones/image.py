"""Image encoders: (B, 3, H, W) in [0, 1] -> the latent that a diffusion UNet reads."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn as nn
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
