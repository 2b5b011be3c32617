"""A backbone without diffusion: any feature network and any text encoder, joined by cross-attention.

Both parts are pre-trained and frozen by default; what is trained is the joint, a million parameters that learn to
follow a phrase on a laptop. It is also the proof that the rest of the network needs nothing of diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_matting.backbones.base import Backbone, BackboneOutput, TextFeatures
from lit_matting.backbones.features import EfficientNetLite0, FeatureNetwork
from lit_matting.backbones.sentences import SentenceEncoder
from lit_matting.backbones.text import TextEncoder
from lit_matting.checks import InputError


class Compact(Backbone):
    """A feature network and a text encoder; coarse to fine, each level looks at the phrase and at the level above it.

    Args:
        features: The feature network. Null: :class:`~lit_matting.backbones.features.EfficientNetLite0`.
        text_encoder: The text encoder. Null: :class:`~lit_matting.backbones.sentences.SentenceEncoder`.
        width: Channels of every level that is handed on.
        heads: Attention heads.
        self_attention_from: Finest stride, in pixels, at which cells look at each other as well, which is what "the
            left one" needs: at 512 pixels, 16 is a grid of 32 x 32.
        text_noise: In training, noise on the text features, up to this many of their own standard deviations. What
            learns from a hundred names takes every other word for something that is not there; noise makes room around
            the names it knows.
    """

    def __init__(
        self,
        features: FeatureNetwork | None = None,
        text_encoder: TextEncoder | None = None,
        width: int = 128,
        heads: int = 4,
        self_attention_from: int = 16,
        text_noise: float = 0.0,
    ) -> None:
        super().__init__()
        if width % (4 * heads):
            raise InputError(f"`width` must be a multiple of 4 x `heads` = {4 * heads}, got {width}.")
        if text_noise < 0:
            raise InputError(
                f"`text_noise` is a number of standard deviations and must be 0 or more, got {text_noise}."
            )
        self.text_noise = text_noise
        self.features = features or EfficientNetLite0()
        self.text_encoder = text_encoder or SentenceEncoder()
        self.strides = sorted(self.features.channels)
        self.coarsest = self.strides[-1]
        if any(self.coarsest % stride for stride in self.strides):
            raise InputError(f"the strides of `features` must divide each other, got {self.strides}.")
        self.channels = dict.fromkeys(self.strides, width)
        self.text_channels = self.text_encoder.channels
        self.max_tokens = self.text_encoder.max_tokens
        self.size_multiple = self.coarsest
        self.text_projection = nn.Sequential(nn.LayerNorm(self.text_channels), nn.Linear(self.text_channels, width))
        self.phrase_projection = nn.Sequential(nn.LayerNorm(self.text_channels), nn.Linear(self.text_channels, width))
        self.levels = nn.ModuleDict(
            {
                str(stride): JointLevel(channels, width, heads, stride >= self_attention_from)
                for stride, channels in self.features.channels.items()
            }
        )

    def encode_image(self, image: Tensor) -> Tensor:
        """Return the whole pyramid as one tensor on its coarsest grid, finer cells folded into channels."""
        pyramid = self.features(image)
        return torch.cat([F.pixel_unshuffle(pyramid[stride], self.coarsest // stride) for stride in self.strides], 1)

    def encode_text(self, phrases: Sequence[str]) -> TextFeatures:
        text = self.text_encoder(phrases)
        if not self.training or self.text_noise == 0:
            return text
        # one strength for each phrase: many stay nearly as they are
        strength = self.text_noise * torch.rand(len(text.pooled), 1, device=text.pooled.device)
        noisy = [
            value + amount * value.std(-1, keepdim=True) * torch.randn_like(value)
            for value, amount in ((text.tokens, strength[..., None]), (text.pooled, strength))
        ]
        return replace(text, tokens=noisy[0], pooled=noisy[1])

    def decode(self, latent: Tensor, text: TextFeatures) -> BackboneOutput:
        folds = {stride: self.coarsest // stride for stride in self.strides}
        sizes = [self.features.channels[stride] * folds[stride] ** 2 for stride in self.strides]
        pyramid = {
            stride: F.pixel_shuffle(part, folds[stride]) for stride, part in zip(self.strides, latent.split(sizes, 1))
        }
        tokens, phrase = self.text_projection(text.tokens), self.phrase_projection(text.pooled)
        above: Tensor | None = None
        features: dict[int, Tensor] = {}
        attention: dict[str, Tensor] = {}
        for stride in reversed(self.strides):
            above, maps = self.levels[str(stride)](pyramid[stride], above, tokens, phrase, text.valid)
            features[stride] = above
            attention[f"levels.{stride}"] = maps
        return BackboneOutput(
            features={stride: features[stride] for stride in self.strides}, attention=attention, text=text
        )

    def frozen_modules(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"features": self.features, "text_encoder": self.text_encoder}
        return {name: part for name, part in parts.items() if part.frozen}


class JointLevel(nn.Module):
    """One level: projected features, the coarser level, the cell's place, the phrase as a whole, then its words.

    Args:
        in_channels: Of the feature network's level.
        width: Of the result and of the text.
        heads: Attention heads.
        self_attention: Let cells look at each other.
    """

    def __init__(self, in_channels: int, width: int, heads: int, self_attention: bool) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(in_channels + 2, width, 1), nn.GroupNorm(heads, width))
        # the phrase as a whole scales and shifts every channel; the identity at first
        self.modulate = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)
        self.enter = ConvBlock(width)
        self.words_norm, self.words = nn.LayerNorm(width), CrossAttention(width, heads)
        self.cells_norm, self.cells = (
            (nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True))
            if self_attention
            else (None, None)
        )
        self.leave = ConvBlock(width)

    def forward(
        self, features: Tensor, above: Tensor | None, tokens: Tensor, phrase: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return features (B, ``width``, h, w) and the words' maps (B, T, h, w)."""
        batch, _, height, width = features.shape
        y = torch.linspace(-1, 1, height, device=features.device, dtype=features.dtype)
        x = torch.linspace(-1, 1, width, device=features.device, dtype=features.dtype)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(batch, -1, -1, -1)
        joined = self.project(torch.cat([features, grid], 1))
        if above is not None:
            joined = joined + F.interpolate(above, size=(height, width), mode="bilinear")
        scale, shift = self.modulate(phrase)[:, :, None, None].chunk(2, 1)
        joined = self.enter(joined * (1 + scale) + shift)
        rows = joined.flatten(2).transpose(1, 2)
        told, maps = self.words(self.words_norm(rows), tokens, valid)
        rows = rows + told
        if self.cells is not None:
            query = self.cells_norm(rows)
            rows = rows + self.cells(query, query, query, need_weights=False)[0]
        joined = rows.transpose(1, 2).unflatten(2, (height, width))
        return self.leave(joined), maps.transpose(1, 2).unflatten(2, (height, width))


class CrossAttention(nn.Module):
    """Cells look at tokens; the probabilities, averaged over heads, are handed out in float32."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, cells: Tensor, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, N, C) and probabilities (B, N, T) for cells (B, N, C) and tokens (B, T, C)."""
        query, key, value = (
            layer(rows).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, rows in ((self.query, cells), (self.key, tokens), (self.value, tokens))
        )
        with torch.autocast(query.device.type, enabled=False):
            scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * query.shape[-1] ** -0.5
            probabilities = scores.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
        mixed = torch.matmul(probabilities.to(value.dtype), value).transpose(1, 2).flatten(2)
        return self.out(mixed), probabilities.mean(1)


class ConvBlock(nn.Module):
    """A 3 x 3 depthwise and a 1 x 1 convolution with a residual connection: what a processor without a GPU affords."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.GroupNorm(4, width),
            nn.Conv2d(width, 2 * width, 1),
            nn.SiLU(),
            nn.Conv2d(2 * width, width, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)
