"""A diffusion backbone small enough to learn from nothing on a laptop: same UNet code, trainable stem and words."""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from lit_matting.backbones.base import TextFeatures
from lit_matting.backbones.image import ImageEncoder
from lit_matting.backbones.stable_diffusion import DiffusionBackbone
from lit_matting.backbones.text import TextEncoder
from lit_matting.checks import check_prompt

log = logging.getLogger(__name__)


class TinyDiffusion(DiffusionBackbone):
    """A UNet of the Stable Diffusion family small enough to learn from scratch in minutes on a laptop.

    The same class and the same forward pass as the real one; only the image stem and the text encoder are trained
    along, because there is no autoencoder and no CLIP at this size. The phrase also enters as a whole, added to the
    time embedding (``class_embed_type="projection"``): from scratch, cross-attention alone does not leave chance.

    Args:
        block_channels: Widths of the UNet's levels, finest first.
        attention_levels: Which of them have cross- and self-attention.
        layers_per_block: Residual layers of each down block.
        head_channels: Channels of one attention head.
        stem_channels: Channels of the image latent, two of which are the cell's own coordinates.
        stem_blocks: Residual blocks of the image stem. They are cheap where an image has several phrases: the stem sees
            it once, the UNet once for each of them.
        text_channels: Channels of a word.
        max_tokens: Longest phrase, in words and a begin token; longer ones are cut and counted.
        gradient_checkpointing: See :class:`DiffusionBackbone`.
        film: Let the phrase scale and shift the features of every residual layer, instead of only shifting them.
        middle: Keep the UNet's middle block.
    """

    def __init__(
        self,
        block_channels: tuple[int, ...] = (32, 64),
        attention_levels: tuple[int, ...] = (1,),
        layers_per_block: int = 1,
        head_channels: int = 16,
        stem_channels: int = 64,
        stem_blocks: int = 2,
        text_channels: int = 64,
        max_tokens: int = 12,
        gradient_checkpointing: bool = False,
        film: bool = True,
        middle: bool = True,
    ) -> None:
        attends = [level in attention_levels for level in range(len(block_channels))]
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=stem_channels,
            out_channels=stem_channels,
            block_out_channels=tuple(block_channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attends)),
            cross_attention_dim=text_channels,
            attention_head_dim=[max(1, width // head_channels) for width in block_channels],
            norm_num_groups=8,
            mid_block_type="UNetMidBlock2DCrossAttn" if middle else None,
            class_embed_type="projection",
            resnet_time_scale_shift="scale_shift" if film else "default",
            projection_class_embeddings_input_dim=text_channels,
        )
        super().__init__(
            image_encoder=ConvStem(stem_channels, stem_blocks),
            text_encoder=WordEncoder(text_channels, max_tokens),
            unet=unet,
            adapt_text=False,
            mask_padding=True,
            fused_self_attention=False,
            gradient_checkpointing=gradient_checkpointing,
        )


class ConvStem(ImageEncoder):
    """A small trainable encoder to stride 8, with the cell's coordinates as the last two channels.

    Coordinates are what makes "the leftmost" learnable for a network this shallow.

    Args:
        channels: Latent channels, coordinates included.
        blocks: Residual blocks at stride 8: what tells shapes and materials apart.
    """

    stride = 8
    frozen = False

    def __init__(self, channels: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.enter = nn.Sequential(
            nn.Conv2d(12, 64, 4, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.Conv2d(64, 96, 4, stride=2, padding=1),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, 96),
                nn.ReLU(),
                nn.Conv2d(96, 96, 3, padding=1),
                nn.GroupNorm(8, 96),
                nn.ReLU(),
                nn.Conv2d(96, 96, 3, padding=1),
            )
            for _ in range(blocks)
        )
        for block in self.blocks:
            nn.init.zeros_(block[-1].weight)  # a block begins as the identity: colour is there from the first step
            nn.init.zeros_(block[-1].bias)
        self.leave = nn.Sequential(nn.GroupNorm(8, 96), nn.ReLU(), nn.Conv2d(96, channels - 2, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        # 2 x 2 pixels become channels: a convolution at full size would cost more than everything after it
        latent = self.enter(F.pixel_unshuffle(2 * image - 1, 2))
        for block in self.blocks:
            latent = latent + block(latent)
        latent = self.leave(latent)
        height, width = latent.shape[-2:]
        y = torch.linspace(-1, 1, height, device=latent.device, dtype=latent.dtype)
        x = torch.linspace(-1, 1, width, device=latent.device, dtype=latent.dtype)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(latent.shape[0], -1, -1, -1)
        return torch.cat([latent, grid], 1)


class WordEncoder(TextEncoder):
    """A trainable text encoder without a vocabulary file, for training from scratch.

    Each word is the sum of two rows of two tables, chosen by two hashes: a table of 1024 rows has collisions, a pair of
    them practically none (hash embeddings, Svenstrup et al. 2017). One transformer layer mixes the words. A learned
    begin token goes before them, as CLIP has one: a cell that no word concerns can look there. Without it the words'
    probabilities would add up to 1 in every cell, and their average would say nothing.

    Args:
        channels: Channels of a word.
        max_tokens: Longest phrase, in words and the begin token; longer ones are cut, and the first cut is logged.
        rows: Rows of each table.
    """

    frozen = False

    def __init__(self, channels: int = 64, max_tokens: int = 12, rows: int = 1024) -> None:
        super().__init__()
        self.channels = channels
        self.max_tokens = max_tokens
        self.truncated = 0
        self.tables = nn.ModuleList(nn.Embedding(rows, channels) for _ in range(2))
        self.begin = nn.Parameter(torch.randn(channels))
        self.position = nn.Parameter(0.1 * torch.randn(max_tokens, channels))
        self.mixer = nn.TransformerEncoderLayer(
            channels, max(1, channels // 16), 2 * channels, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, phrases: Sequence[str]) -> TextFeatures:
        return self.read(**{name: value.to(self.position.device) for name, value in self.spell(phrases).items()})

    def spell(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        longest = self.max_tokens - 1
        rows = torch.zeros(len(phrases), 2, self.max_tokens, dtype=torch.long)
        valid = torch.zeros(len(phrases), self.max_tokens, dtype=torch.bool)
        for index, phrase in enumerate(phrases):
            spelled = re.findall(r"\w+", check_prompt(phrase).lower())
            if len(spelled) > longest:
                self.truncated += 1
                if self.truncated == 1:
                    log.warning("cut %r to its first %d words (`max_tokens`).", phrase, longest)
                spelled = spelled[:longest]
            for place, word in enumerate(spelled, start=1):
                for which, table in enumerate(self.tables):
                    rows[index, which, place] = zlib.crc32(f"{which}{word}".encode()) % table.num_embeddings
            valid[index, : len(spelled) + 1] = True
        return {"rows": rows, "valid": valid}

    def read(self, rows: Tensor, valid: Tensor) -> TextFeatures:  # type: ignore[override]
        words = valid & (torch.arange(self.max_tokens, device=valid.device) > 0)
        tokens = sum(table(rows[:, which]) for which, table in enumerate(self.tables))
        tokens = torch.where(words[..., None], tokens, self.begin) + self.position
        tokens = self.norm(self.mixer(tokens, src_key_padding_mask=~valid))
        share = words.to(tokens.dtype)[..., None]
        pooled = (tokens * share).sum(1) / share.sum(1)
        return TextFeatures(tokens=tokens, words=words, valid=valid, pooled=pooled)
