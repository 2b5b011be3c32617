"""Stable Diffusion XL as a backbone: two text encoders, and a UNet that is told the image's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_matting.backbones.base import TextFeatures
from lit_matting.backbones.image import DTYPES, Precision, VAEEncoder
from lit_matting.backbones.loading import load_xl_parts
from lit_matting.backbones.pruning import Pruning, block_map, prune
from lit_matting.backbones.stable_diffusion import DiffusionBackbone
from lit_matting.backbones.text import MAX_TOKENS, CLIPWords, FrozenTextEncoder, Vocabulary
from lit_matting.checks import InputError


class StableDiffusionXL(DiffusionBackbone):
    """Stable Diffusion XL, or any folder with its parts: features at strides 8, 16 and 32.

    The phrase as a whole is the first encoder's end token and the second's projected one, side by side; the UNet is
    given the second, as it was trained, with the size of the image and no cropping.

    Args:
        pretrained: ``sdxl``, a folder in diffusers' layout or a hub id; null builds random weights.
        architecture: What to build with ``pretrained: null``: ``sdxl`` or a JSON file like it.
        revision: Commit, tag or branch, where ``pretrained`` is downloaded.
        latent_scale: Factor of the latent. Null: the autoencoder's own, 0.13025.
        text_tokens: Tokens of a phrase, begin and end included; longer phrases are cut and counted. At most 77.
        adapt_text: See :class:`~lit_matting.backbones.DiffusionBackbone`.
        mask_padding: See :class:`~lit_matting.backbones.DiffusionBackbone`.
        train_unet: See :class:`~lit_matting.backbones.DiffusionBackbone`.
        gradient_checkpointing: See :class:`~lit_matting.backbones.DiffusionBackbone`.
        unet_precision: Of the UNet's weights.
        frozen_precision: Of the autoencoder's and the text encoders' weights and arithmetic.
        pruning: Leave blocks of the UNet out.
        cached_phrases: Phrases whose text features are remembered.
        cached_latents: See :class:`~lit_matting.backbones.DiffusionBackbone`.
    """

    addition_embed_type = "text_time"

    def __init__(
        self,
        pretrained: str | None,
        architecture: str | None = None,
        revision: str | None = None,
        latent_scale: float | None = None,
        text_tokens: int = MAX_TOKENS,
        adapt_text: bool = True,
        mask_padding: bool = False,
        train_unet: bool = True,
        gradient_checkpointing: bool = False,
        unet_precision: Precision = "fp32",
        frozen_precision: Precision = "fp32",
        pruning: Pruning | None = None,
        cached_phrases: int = 1024,
        cached_latents: int = 0,
    ) -> None:
        parts = load_xl_parts(pretrained, architecture, revision, DTYPES[unet_precision], DTYPES[frozen_precision])
        super().__init__(
            image_encoder=VAEEncoder(parts.autoencoder, latent_scale, frozen_precision),
            text_encoder=TwoCLIPEncoders(
                parts.text_models, parts.vocabulary, text_tokens, frozen_precision, cached_phrases
            ),
            unet=parts.unet if pruning is None else prune(parts.unet, pruning),
            adapt_text=adapt_text,
            mask_padding=mask_padding,
            gradient_checkpointing=gradient_checkpointing,
            train_unet=train_unet,
            cached_latents=cached_latents,
        )
        self.pretrained = pretrained
        self.architecture = architecture
        self.pruning = pruning
        self.teacher_blocks = None if pruning is None else block_map(parts.unet.config, pruning)

    def conditions(self, latent: Tensor, text: TextFeatures) -> dict[str, Any]:
        height, width = (side * self.image_encoder.stride for side in latent.shape[-2:])
        # the original size, where it was cropped, the size it is shown at
        sizes = torch.tensor([height, width, 0, 0, height, width], device=latent.device, dtype=torch.float32)
        phrase = text.pooled[:, -self.text_encoder.projected_channels :]
        return {"added_cond_kwargs": {"text_embeds": phrase, "time_ids": sizes.expand(latent.shape[0], -1)}}

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.pretrained or f'random {self.architecture}'})"


class TwoCLIPEncoders(FrozenTextEncoder):
    """Stable Diffusion XL's two frozen text encoders: the penultimate states of both, without the final normalisation.

    Args:
        models: transformers' CLIPTextModel and CLIPTextModelWithProjection.
        vocabulary: Words -> ids; both models have the same.
        max_tokens: T, begin and end included.
        precision: Of the models' weights and arithmetic; features are float32.
        cache_size: Phrases whose features are remembered, about 330 KB each at 40 tokens.
    """

    def __init__(
        self,
        models: tuple[Any, Any],
        vocabulary: Vocabulary,
        max_tokens: int = MAX_TOKENS,
        precision: Precision = "fp32",
        cache_size: int = 1024,
    ) -> None:
        super().__init__(cache_size)
        positions = min(model.config.max_position_embeddings for model in models)
        if max_tokens > positions:
            raise InputError(f"`text_tokens` is {max_tokens}, but the text encoders have {positions} positions.")
        self.max_tokens = max_tokens
        # OpenAI's encoder pads with the end token, OpenCLIP's with "!"
        self.words = [CLIPWords(vocabulary, max_tokens, token) for token in ("<|endoftext|>", "!")]
        dtype = DTYPES[precision]
        self.first, self.second = (model.to(dtype).eval().requires_grad_(False) for model in models)
        self.projected_channels: int = self.second.config.projection_dim
        self.channels: int = self.first.config.hidden_size + self.second.config.hidden_size
        if self.projected_channels != self.second.config.hidden_size:
            raise InputError(
                f"the second text encoder projects {self.second.config.hidden_size} channels to"
                f" {self.projected_channels}: this is not Stable Diffusion XL's."
            )

    def encode(self, phrases: list[str]) -> tuple[TextFeatures, Sequence[bool]]:
        device = next(self.first.parameters()).device
        tokens: list[Tensor] = []
        ends: list[Tensor] = []

        def keep_input(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            tokens.append(inputs[0] if inputs else named["hidden_states"])

        for model, words in zip((self.first, self.second), self.words):
            numbers = words(phrases)
            # what enters the last layer; transformers' own way of asking for it leaves hooks that cannot be pickled
            last = getattr(model, "text_model", model).encoder.layers[-1]
            handle = last.register_forward_pre_hook(keep_input, with_kwargs=True)
            try:
                with torch.autocast(device.type, enabled=False):
                    states = model(input_ids=numbers.ids.to(device)).last_hidden_state
                    at_end = states[torch.arange(len(phrases), device=device), numbers.ends.to(device)]
                    ends.append(model.text_projection(at_end) if hasattr(model, "text_projection") else at_end)
            finally:
                handle.remove()
        features = TextFeatures(
            tokens=torch.cat(tokens, 2).float(),
            words=numbers.words.to(device),
            valid=numbers.valid.to(device),
            pooled=torch.cat(ends, 1).float(),
        )
        return features, numbers.cut
