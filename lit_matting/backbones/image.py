"""Image encoders: (B, 3, H, W) in [0, 1] -> the latent that a diffusion UNet reads."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

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

    changes = 0
    """How often weights were loaded, converted or moved: what it said before, it may say no more."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ImageEncoder:
        self.changes += 1
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.changes += 1
        super()._load_from_state_dict(*args, **kwargs)


class LatentCache:
    """Remembers the latents of images: a frozen encoder repeats its answers.

    Images are known by their pixels, not by a name, so a changed one is another image: the cache is never wrong, and of
    no use where augmentation makes every image new. It pays for validation sets, for data sets without augmentation and
    for several phrases of one photograph. Least recently used latents are dropped first; they lie in main memory.

    Args:
        size: Latents to remember, 64 KB each for Stable Diffusion at 512 pixels; 0 remembers none.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise InputError(f"`cached_latents` must be 0 or more, got {size}.")
        self.size = size
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def look_up(self, image: Tensor, encode: Callable[[Tensor], Tensor], changes: int = 0) -> Tensor:
        """Return the latents of images (B, 3, H, W); ``encode`` is asked about unknown ones only, each once.

        With another number of ``changes`` (:attr:`ImageEncoder.changes`) all images are unknown.
        """
        keys = [self._key(row, changes) for row in image]
        missing = {key: index for index, key in enumerate(keys) if key not in self._known}
        found = {key: self._known[key] for key in keys if key in self._known}
        if missing:
            # a validation's inference mode must not leave tensors behind that training may not use
            with torch.inference_mode(False), torch.no_grad():
                latents = encode(image[list(missing.values())].clone())
            found.update((key, latent.cpu()) for key, latent in zip(missing, latents))
        for key in keys:
            self._known[key] = found[key]
            self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        return torch.stack([found[key] for key in keys]).to(image.device)

    @staticmethod
    def _key(image: Tensor, changes: int) -> bytes:
        pixels = image.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{changes} {pixels.dtype} {tuple(pixels.shape)}".encode())
        digest.update(pixels.flatten().view(torch.uint8).numpy().data)
        return digest.digest()

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()


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
