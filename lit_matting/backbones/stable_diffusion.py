"""A diffusion UNet as a one-pass backbone: fixed timestep, no noise, no output layers.

The UNet runs once at t = 1 on the image's latent; what is read are the features before each upsampler and the
cross-attention maps (VPD, Zhao et al. 2023, reads the same places). The published weights' output convolution is
removed: it would get no gradient, and its meaning (noise, v or image) would depend on the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from lit_matting.backbones.attention import AttentionStore, record_cross_attention
from lit_matting.backbones.base import Backbone, BackboneOutput, TextFeatures
from lit_matting.backbones.image import ImageEncoder
from lit_matting.backbones.text import TextAdapter, TextEncoder

TIMESTEP = 1.0
"""The paper's fixed timestep, in training and inference; the UNet's own scale of 0 to 999."""


class DiffusionBackbone(Backbone):
    """Any UNet2DConditionModel between an image encoder and a text encoder.

    Args:
        image_encoder: (B, 3, H, W) in [0, 1] -> the UNet's input latent.
        text_encoder: Phrases -> token features of the UNet's ``cross_attention_dim``.
        unet: The UNet; its output layers are removed.
        adapt_text: Learn a small correction of the text features, ``c + gamma MLP(c)`` (VPD).
        mask_padding: Keep cross-attention off padding tokens. Stable Diffusion was trained without such a mask.
        fused_self_attention: Leave self-attention to PyTorch's fused kernel. On CPU in bfloat16 at small sizes the
            explicit form has the faster backward pass.
        gradient_checkpointing: Recompute UNet blocks in the backward pass: less memory, about a third more time.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        unet: UNet2DConditionModel,
        adapt_text: bool = True,
        mask_padding: bool = False,
        fused_self_attention: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if text_encoder.channels != unet.config.cross_attention_dim:
            raise ValueError(
                f"the text encoder gives {text_encoder.channels} channels but the UNet's cross-attention expects"
                f" {unet.config.cross_attention_dim}: they belong to different models."
            )
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.adapter = TextAdapter(text_encoder.channels) if adapt_text else nn.Identity()
        self.mask_padding = mask_padding
        # diffusers treats both as optional; an identity keeps the last up block's features as the UNet's output
        unet.conv_norm_out, unet.conv_act, unet.conv_out = None, nn.Identity(), nn.Identity()
        self.unet = unet
        if not fused_self_attention:
            unet.set_attn_processor(AttnProcessor())
        self.store = AttentionStore()
        self.layers = record_cross_attention(unet, self.store)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()

        widths = list(unet.config.block_out_channels)
        latent_stride = image_encoder.stride
        self.channels = {latent_stride * 2**level: width for level, width in enumerate(widths)}
        # the innermost up block works at the innermost width, every further one at its own
        self.text_channels = text_encoder.channels
        self.max_tokens = text_encoder.max_tokens
        self.size_multiple = latent_stride * 2 ** (len(widths) - 1)
        self._before_upsampling: list[Tensor] = []
        for block in unet.up_blocks:
            for upsampler in block.upsamplers or ():
                upsampler.register_forward_pre_hook(self._keep_input)

    def _keep_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._before_upsampling.append(inputs[0])

    def encode_image(self, image: Tensor) -> Tensor:
        return self.image_encoder(image)

    def encode_text(self, phrases: Sequence[str]) -> TextFeatures:
        return self.text_encoder(phrases)

    def decode(self, latent: Tensor, text: TextFeatures) -> BackboneOutput:
        tokens = self.adapter(text.tokens)
        timestep = torch.full((latent.shape[0],), TIMESTEP, device=latent.device)
        self._before_upsampling.clear()
        with self.store.recording(tuple(latent.shape[-2:])):
            finest = self.unet(
                latent,
                timestep,
                encoder_hidden_states=tokens,
                encoder_attention_mask=text.valid if self.mask_padding else None,
                class_labels=text.pooled if self.unet.config.class_embed_type == "projection" else None,
                return_dict=False,
            )[0]
        levels = [*self._before_upsampling, finest]
        self._before_upsampling.clear()
        features = dict(zip(self.channels, reversed(levels)))
        return BackboneOutput(features=features, attention=self.store.take(), text=text)

    def frozen_modules(self) -> dict[str, nn.Module]:
        parts = {"image_encoder": self.image_encoder, "text_encoder": self.text_encoder}
        return {name: part for name, part in parts.items() if part.frozen}
