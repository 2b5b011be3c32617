"""Running the network on a photograph of any size: the network sees it small, the refiner at its own size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.records import MattingOutput

INTERPOLATION = "area"
"""What :func:`square` does, in the word that evaluation protocols have for it."""


def square(image: Tensor, side: int) -> Tensor:
    """Stretch photographs in [0, 1] to the square the network sees, as training data are: (B, C, H, W) -> (B, C, S, S).

    Area means where they shrink, as ``cv2.INTER_AREA`` takes them: a pixel that two cells share counts in each by its
    share. (``F.interpolate(mode="area")`` counts it in both, whole.) Bilinear along a side that grows.
    """
    for dim in (-2, -1):
        if image.shape[dim] > side:
            image = _cell_means(image, dim, side).clamp(0, 1)  # against rounding
    if image.shape[-2:] == (side, side):
        return image
    return F.interpolate(image, size=(side, side), mode="bilinear", align_corners=False)


def _cell_means(image: Tensor, dim: int, cells: int) -> Tensor:
    """Return the mean of ``image`` over each of so many cells of equal length along a dimension."""
    length = image.shape[dim]
    # double, and so on the CPU: among 4,000 pixels, single precision misplaces borders by shares that can be seen
    borders = torch.arange(cells + 1, dtype=torch.float64) * (length / cells)
    start, end = borders[:-1], borders[1:]
    first = start.floor()
    along = (-1,) + (1,) * (-dim - 1)
    total = image.new_zeros(())
    for step in range(math.ceil(length / cells) + 1):
        pixel = first + step
        share = (torch.minimum(end, pixel + 1) - torch.maximum(start, pixel)).clamp(min=0) * (cells / length)
        part = image.index_select(dim, pixel.long().clamp(max=length - 1).to(image.device))
        total = total + part * share.to(image).view(along)
    return total


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
    latent = network.backbone.encode_image(square(image, image_size))
    text = network.backbone.encode_text(phrases)
    if image.shape[0] == 1 and len(phrases) > 1:
        latent = latent.expand(len(phrases), *latent.shape[1:])
        image = image.expand(len(phrases), *image.shape[1:])
    output = network.matte(image, latent, text)
    return dataclasses.replace(output, alpha=output.alpha.clamp(0, 1), pyramid={})
