"""Running the network on a photograph of any size: the network sees it small, the refiner at its own size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.records import MattingOutput

INTERPOLATION = "antialiased bilinear"
"""How a photograph of another size gets to the square that the network sees."""


def matte_at_native_size(
    network: MattingNetwork, image: Tensor, phrases: Sequence[str], image_size: int
) -> MattingOutput:
    """Return the mattes of one photograph for several phrases, at the photograph's own size.

    The photograph is stretched to the square that the network was trained on; the refiner then works on its own pixels,
    and every map lies on it exactly (half-pixel centres throughout, so the way back is the exact inverse).

    Args:
        network: In eval mode.
        image: (1, 3, H, W) RGB in [0, 1], any H and W; or (B, 3, H, W) with one phrase per image.
        phrases: B phrases, or any number for a single image, which is then encoded once.
        image_size: Side, in pixels, of the square the network sees.

    Returns:
        The output for each phrase; ``alpha`` is (B, 1, H, W).
    """
    small = image
    if image.shape[-2:] != (image_size, image_size):
        small = F.interpolate(
            image, size=(image_size, image_size), mode="bilinear", antialias=True, align_corners=False
        )
    latent = network.backbone.encode_image(small.clamp(0, 1))
    text = network.backbone.encode_text(phrases)
    if image.shape[0] == 1 and len(phrases) > 1:
        latent = latent.expand(len(phrases), *latent.shape[1:])
        image = image.expand(len(phrases), *image.shape[1:])
    output = network.matte(image, latent, text)
    return dataclasses.replace(output, alpha=output.alpha.clamp(0, 1), pyramid={})
