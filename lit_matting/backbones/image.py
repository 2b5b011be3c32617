"""Image encoders: (B, 3, H, W) in [0, 1] -> the latent that a diffusion UNet reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn as nn
from torch import Tensor

from lit_matting.checks import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ImageEncoder(nn.Module, ABC):
    """Base of image encoders."""

    stride: int
    """Pixels per latent cell, along each side."""
    frozen: bool
    """True for loaded weights that are never trained."""

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Return the latent (B, C, H / stride, W / stride) of images (B, 3, H, W) in [0, 1]."""


class VAEEncoder(ImageEncoder):
    """The frozen encoder of Stable Diffusion's autoencoder: its mode, times the latent scale.

    The decoder is dropped: it holds 49.5 of 83.7 million parameters, and nothing here decodes. The mode is taken, not a
    sample: a matte must not depend on a die. Autocast is switched off, because the activations of this network overflow
    float16; bfloat16 has the range and can be chosen, at about three significant digits.

    Args:
        autoencoder: AutoencoderKL, or the distilled AutoencoderTiny.
        latent_scale: Factor of the latent. None: the autoencoder's own, 0.18215 for Stable Diffusion 1 and 2 and 1 for
            AutoencoderTiny. Weights trained on unscaled latents, as VPD's, need 1.
        precision: Of its weights and arithmetic.
    """

    frozen = True

    def __init__(
        self,
        autoencoder: AutoencoderKL | AutoencoderTiny,
        latent_scale: float | None = None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        config = autoencoder.config
        widths = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
        self.stride = 2 ** (len(widths) - 1)
        self.channels: int = config.latent_channels
        self.latent_scale = float(config.scaling_factor if latent_scale is None else latent_scale)
        self.encoder = autoencoder.encoder
        self.quant_conv = getattr(autoencoder, "quant_conv", None) or nn.Identity()
        # AutoencoderKL's moments are mean and log-variance; the tiny one has no distribution
        self.has_variance = not hasattr(config, "encoder_block_out_channels")
        self.to(DTYPES[precision]).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Return the latent, float32, whatever autocast runs around it.

        Raises:
            InputError: If the module was converted to float16.
        """
        dtype = self.dtype
        if dtype == torch.float16:
            raise InputError(
                "the image encoder (`vae`) was converted to float16, where its activations overflow: use"
                " `trainer.precision` bf16-mixed or 16-mixed instead of 16-true."
            )
        with torch.autocast(image.device.type, enabled=False):
            # both kinds of diffusers' autoencoders take [-1, 1]; the tiny one goes back to [0, 1] by itself
            moments = self.quant_conv(self.encoder(2 * image.to(dtype) - 1))
        mode = moments.chunk(2, 1)[0] if self.has_variance else moments
        return mode.float() * self.latent_scale

    @property
    def dtype(self) -> torch.dtype:
        """The precision it runs in."""
        return next(self.encoder.parameters()).dtype
