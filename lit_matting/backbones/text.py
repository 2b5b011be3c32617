"""Text encoders: phrases -> token features, which tokens are words, and the phrase as a whole."""

from __future__ import annotations

import logging
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from lit_matting.backbones.base import TextFeatures
from lit_matting.checks import check_prompt

log = logging.getLogger(__name__)


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


class WordEncoder(TextEncoder):
    """A trainable text encoder without a vocabulary file, for training from scratch.

    Each word is the sum of two rows of two tables, chosen by two hashes: a table of 1024 rows has collisions, a pair of
    them practically none (hash embeddings, Svenstrup et al. 2017). One transformer layer mixes the words.

    Args:
        channels: Channels of a word.
        max_tokens: Longest phrase, in words; longer ones are cut, and the first cut is logged.
        rows: Rows of each table.
    """

    frozen = False

    def __init__(self, channels: int = 64, max_tokens: int = 12, rows: int = 1024) -> None:
        super().__init__()
        self.channels = channels
        self.max_tokens = max_tokens
        self.truncated = 0
        self.tables = nn.ModuleList(nn.Embedding(rows, channels) for _ in range(2))
        self.position = nn.Parameter(0.1 * torch.randn(max_tokens, channels))
        self.mixer = nn.TransformerEncoderLayer(
            channels, max(1, channels // 16), 2 * channels, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, phrases: Sequence[str]) -> TextFeatures:
        device = self.position.device
        rows = torch.zeros(len(phrases), 2, self.max_tokens, dtype=torch.long)
        words = torch.zeros(len(phrases), self.max_tokens, dtype=torch.bool)
        for index, phrase in enumerate(phrases):
            spelled = re.findall(r"\w+", check_prompt(phrase).lower())
            if len(spelled) > self.max_tokens:
                self.truncated += 1
                if self.truncated == 1:
                    log.warning("cut %r to its first %d words (`max_tokens`).", phrase, self.max_tokens)
                spelled = spelled[: self.max_tokens]
            for place, word in enumerate(spelled):
                for which, table in enumerate(self.tables):
                    rows[index, which, place] = zlib.crc32(f"{which}{word}".encode()) % table.num_embeddings
            words[index, : len(spelled)] = True
        rows, words = rows.to(device), words.to(device)
        tokens = sum(table(rows[:, which]) for which, table in enumerate(self.tables)) + self.position
        tokens = self.norm(self.mixer(tokens, src_key_padding_mask=~words))
        share = words.to(tokens.dtype)[..., None]
        pooled = (tokens * share).sum(1) / share.sum(1)
        return TextFeatures(tokens=tokens, words=words, valid=words, pooled=pooled)
