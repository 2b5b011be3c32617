"""Text encoders: phrases -> token features, which tokens are words, and the phrase as a whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from lit_matting.backbones.base import TextFeatures


class TextEncoder(nn.Module, ABC):
    """Base of text encoders."""

    channels: int
    """C of :class:`TextFeatures`."""
    max_tokens: int
    """T of :class:`TextFeatures`: every phrase is padded or cut to this many tokens."""
    frozen: bool
    """True for loaded weights that are never trained."""

    @abstractmethod
    def forward(self, phrases: Sequence[str]) -> TextFeatures:
        """Return the features of phrases."""


class TextAdapter(nn.Module):
    """A learned correction of frozen text features, ``c + gamma MLP(c)`` with gamma starting at 1e-4 (VPD)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))
        self.gamma = nn.Parameter(torch.full((channels,), 1e-4))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.gamma * self.mlp(tokens)
