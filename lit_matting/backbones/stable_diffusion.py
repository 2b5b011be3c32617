"""A diffusion UNet as a one-pass backbone: fixed timestep, no noise, no output layers.

The UNet runs once at t = 1 on the image's latent; what is read are the features before each upsampler and the
cross-attention maps (VPD, Zhao et al. 2023, reads the same places). The published weights' output convolution is
removed: it would get no gradient, and its meaning (noise, v or image) would depend on the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from lit_matting.backbones.attention import AttentionStore, record_cross_attention
from lit_matting.backbones.base import Backbone, BackboneOutput, TextFeatures
from lit_matting.backbones.image import DTYPES, ImageEncoder, LatentCache, Precision, VAEEncoder
from lit_matting.backbones.loading import load_parts
from lit_matting.backbones.pruning import Pruning, block_map, prune, pruning_between
from lit_matting.backbones.text import MAX_TOKENS, CLIPEncoder, TextAdapter, TextEncoder
from lit_matting.checks import InputError

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
        train_unet: Train the UNet. Otherwise it is a frozen part as the encoders are, though gradients still pass
            through it to the text adapter.
        cached_latents: Images whose latents are remembered, known by their pixels; see
            :class:`~lit_matting.backbones.image.LatentCache`. Only for a frozen image encoder.
    """

    addition_embed_type: str | None = None
    """What the UNet may want to be told beside text and time, in diffusers' words; see :meth:`conditions`."""

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        unet: UNet2DConditionModel,
        adapt_text: bool = True,
        mask_padding: bool = False,
        fused_self_attention: bool = True,
        gradient_checkpointing: bool = False,
        train_unet: bool = True,
        cached_latents: int = 0,
    ) -> None:
        super().__init__()
        if cached_latents and not image_encoder.frozen:
            raise InputError("`cached_latents` must be 0 where the image encoder is trained: its latents change.")
        self.latents = LatentCache(cached_latents)
        _check_fit(unet, text_encoder, self.addition_embed_type)
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
        self.train_unet = train_unet
        if not train_unet:
            unet.eval().requires_grad_(False)

        widths = list(unet.config.block_out_channels)
        latent_stride = image_encoder.stride
        # the innermost up block works at the innermost width, every further one at its own
        self.channels = {latent_stride * 2**level: width for level, width in enumerate(widths)}
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
        if not self.latents.size:
            return self.image_encoder(image)
        # the encoder may have been converted alone, as inference in bf16 does
        return self.latents.look_up(image, self.image_encoder, self.image_encoder.changes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffusionBackbone:
        self.latents.clear()  # in another precision they may be others
        return super()._apply(fn, recurse)

    def encode_text(self, phrases: Sequence[str]) -> TextFeatures:
        return self.text_encoder(phrases)

    def decode(self, latent: Tensor, text: TextFeatures) -> BackboneOutput:
        """Run the UNet once; features have the latent's precision, or autocast's where that is on."""
        tokens = self.adapter(text.tokens)
        timestep = torch.full((latent.shape[0],), TIMESTEP, device=latent.device)
        dtype = self.unet.conv_in.weight.dtype
        self._before_upsampling.clear()
        with self.store.recording(tuple(latent.shape[-2:])):
            finest = self.unet(
                latent.to(dtype),
                timestep,
                encoder_hidden_states=tokens.to(dtype),
                encoder_attention_mask=text.valid if self.mask_padding else None,
                return_dict=False,
                **self.conditions(latent, text),
            )[0]
        levels = [*self._before_upsampling, finest]
        self._before_upsampling.clear()
        if not torch.is_autocast_enabled(latent.device.type):
            levels = [level.to(latent.dtype) for level in levels]
        features = dict(zip(self.channels, reversed(levels)))
        attention = self.store.take()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._check_gradients(attention)
        return BackboneOutput(features=features, attention=attention, text=text)

    def _check_gradients(self, attention: dict[str, Tensor]) -> None:
        """Refuse maps through which nothing would be learned: a loss on them would be a number like any other."""
        for name, maps in attention.items():
            if not maps.requires_grad and self.unet.get_submodule(f"{name}.attn2.to_q").weight.requires_grad:
                raise InputError(
                    f"the attention map of {name} carries no gradient, though its layer is trained: gradient"
                    " checkpointing of the UNet must be the kind with `use_reentrant=False`."
                )

    def conditions(self, latent: Tensor, text: TextFeatures) -> dict[str, Any]:
        """Return what else the UNet wants to be told; the phrase as a whole, if it has a place for it."""
        if self.unet.config.class_embed_type == "projection":
            return {"class_labels": text.pooled.to(self.unet.conv_in.weight.dtype)}
        return {}

    def blocks_from(self, teacher: Backbone) -> dict[str, str]:
        if not isinstance(teacher, DiffusionBackbone):
            return {}
        blocks = block_map(teacher.unet.config, pruning_between(teacher.unet.config, self.unet.config))
        # attention layers are named inside the UNet, parameters from the backbone on
        return {**blocks, **{f"unet.{name}": f"unet.{source}" for name, source in blocks.items()}}

    def frozen_modules(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {}
        if self.image_encoder.frozen:
            parts["image_encoder"] = self.image_encoder
        if self.text_encoder.frozen:
            parts["text_encoder"] = self.text_encoder
        if not self.train_unet:
            parts["unet"] = self.unet
        return parts


def _check_fit(unet: UNet2DConditionModel, text_encoder: TextEncoder, addition_embed_type: str | None) -> None:
    """Say what makes a UNet unusable here, before its first forward pass does."""
    config = unet.config
    if config.addition_embed_type != addition_embed_type:
        raise InputError(
            f"the UNet wants the addition {config.addition_embed_type!r}, this backbone gives {addition_embed_type!r}:"
            " StableDiffusionXL is for Stable Diffusion XL, StableDiffusion for 1.x and 2.x."
        )
    if text_encoder.channels != config.cross_attention_dim:
        raise InputError(
            f"the text encoder gives {text_encoder.channels} channels but the UNet's cross-attention expects"
            f" {config.cross_attention_dim}: they belong to different models."
        )
    if config.class_embed_type not in (None, "projection") or config.num_class_embeds is not None:
        raise InputError(
            f"the UNet wants class labels (class_embed_type {config.class_embed_type!r}), which a phrase does not give:"
            " take a text-to-image model."
        )
    if config.encoder_hid_dim_type is not None:
        raise InputError(
            f"the UNet wants its text as {config.encoder_hid_dim_type!r}: take a model that reads CLIP's token"
            " features."
        )


class StableDiffusion(DiffusionBackbone):
    """Stable Diffusion 1.x, 2.x, or any folder with a UNet2DConditionModel, an autoencoder and a CLIP text encoder.

    The image and the text encoder are frozen; the UNet is trained. Weights keep the licence they were published under,
    see :data:`lit_matting.backbones.weights.NAMED`.

    Args:
        pretrained: ``sd15``, ``sd21``, ``sd21_base``, ``sd_turbo``, a folder in diffusers' layout, a hub id
            ``owner/name``, a ``.safetensors`` or ``.ckpt`` file in the original layout; null builds random weights, the
            same in every process.
        architecture: What to build where the weights do not say it themselves (``pretrained: null``, single files): a
            name from ``lit_matting/backbones/architectures`` or a JSON file like those. Otherwise not read.
        tokenizer: Folder or hub id with the tokenizer, where ``pretrained`` is a single file.
        autoencoder: Folder or hub id of another autoencoder with the same latent, for example an AutoencoderTiny; null
            takes that of ``pretrained``.
        revision: Commit, tag or branch, where ``pretrained`` is downloaded.
        latent_scale: Factor of the latent. Null: the autoencoder's own, 0.18215 for Stable Diffusion.
        text_tokens: Tokens of a phrase, begin and end included; longer phrases are cut and counted. At most 77.
        text_layers: Use only the first so many layers of the text encoder; null uses all that the folder has, 23 for
            Stable Diffusion 2. The original OpenCLIP encoder has 24, of which Stable Diffusion 2 reads 23.
        pad_token: What fills short phrases. Null: "!" for Stable Diffusion 2, "<|endoftext|>" for 1.
        adapt_text: See :class:`DiffusionBackbone`.
        mask_padding: See :class:`DiffusionBackbone`.
        train_unet: See :class:`DiffusionBackbone`.
        gradient_checkpointing: See :class:`DiffusionBackbone`.
        unet_precision: Of the UNet's weights. ``fp32`` for training with AdamW, under autocast; ``bf16`` halves the
            memory for inference, or for plain SGD.
        frozen_precision: Of the autoencoder's and the text encoder's weights and arithmetic.
        pruning: Leave blocks of the UNet out: a student, initialised from the weights it was given.
        cached_phrases: Phrases whose text features are remembered.
        cached_latents: See :class:`~lit_matting.backbones.DiffusionBackbone`.
    """

    def __init__(
        self,
        pretrained: str | None,
        architecture: str | None = None,
        tokenizer: str | None = None,
        autoencoder: str | None = None,
        revision: str | None = None,
        latent_scale: float | None = None,
        text_tokens: int = MAX_TOKENS,
        text_layers: int | None = None,
        pad_token: str | None = None,
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
        parts = load_parts(
            pretrained,
            architecture,
            tokenizer=tokenizer,
            autoencoder=autoencoder,
            revision=revision,
            unet_dtype=DTYPES[unet_precision],
            frozen_dtype=DTYPES[frozen_precision],
        )
        if parts.unet.config.in_channels != parts.autoencoder.config.latent_channels:
            raise InputError(
                f"the UNet reads {parts.unet.config.in_channels} latent channels but the autoencoder gives"
                f" {parts.autoencoder.config.latent_channels}: inpainting and depth models do not fit, take a"
                " text-to-image model."
            )
        super().__init__(
            image_encoder=VAEEncoder(parts.autoencoder, latent_scale, frozen_precision),
            text_encoder=CLIPEncoder(
                parts.text_model,
                parts.vocabulary,
                max_tokens=text_tokens,
                layers=text_layers,
                pad_token=pad_token,
                precision=frozen_precision,
                cache_size=cached_phrases,
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
        """Of a student: its modules -> the teacher's; see :func:`~lit_matting.backbones.pruning.mapped`."""

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.pretrained or f'random {self.architecture}'})"
