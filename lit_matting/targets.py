"""From an alpha or a mask to everything the network is trained on: one place, so that training and judging agree.

All functions take the *augmented, resized* alpha (B, 1, H, W) in [0, 1]; a hard mask is an alpha of zeros and ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_matting.checks import check_shape
from lit_matting.records import MattingOutput

REFERENCE_SIZE = 512
"""The input size, in pixels, that the paper states its kernel of 15 pixels for."""
REFERENCE_KERNEL = 15

OPAQUE = 254.5 / 255
"""Alphas from here on count as pure foreground: 255 in 8 bits, whatever the rounding."""
CLEAR = 0.5 / 255
"""Alphas up to here count as pure background: 0 in 8 bits, whatever the rounding."""


def scaled_kernel(size: int, kernel_size: int = REFERENCE_KERNEL, reference_size: int = REFERENCE_SIZE) -> int:
    """Return the odd kernel size, in pixels, that covers at ``size`` what ``kernel_size`` covers at ``reference_size``.

    Example:
        >>> scaled_kernel(512), scaled_kernel(1024), scaled_kernel(128)
        (15, 29, 3)
    """
    return max(3, 2 * round((kernel_size * size / reference_size - 1) / 2) + 1)


@lru_cache(maxsize=64)
def ellipse_half_widths(kernel_size: int) -> tuple[int, ...]:
    """Return, for each row of the elliptical structuring element, how far it reaches to each side of its centre.

    The element is the disc of ``kernel_size`` pixels that OpenCV's ``MORPH_ELLIPSE`` draws: row ``dy`` reaches
    ``round(r sqrt(1 - dy^2 / r^2))`` with ``r = kernel_size // 2``.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd and positive, got {kernel_size}.")
    radius = kernel_size // 2
    if radius == 0:
        return (0,)
    return tuple(round(math.sqrt(radius**2 - dy**2)) for dy in range(-radius, radius + 1))


def dilate(mask: Tensor, kernel_size: int) -> Tensor:
    """Dilate a mask (B, 1, H, W), bool or zeros and ones, by an elliptical kernel; outside the image is 0.

    A disc is not separable, but each of its rows is a line, and a longer line is a shorter one and two more shifts:
    about 4 k bytewise "or"s instead of k^2 comparisons of floats.
    """
    on = mask > 0
    height, width = on.shape[-2:]
    half_widths = ellipse_half_widths(kernel_size)
    lines, line = {0: on}, on
    for half in range(1, max(half_widths) + 1):
        line = line.clone()
        if half < width:
            line[..., half:] |= on[..., :-half]
            line[..., :-half] |= on[..., half:]
        lines[half] = line
    result = torch.zeros_like(on)
    radius = kernel_size // 2
    for dy, half in zip(range(-radius, radius + 1), half_widths):
        if abs(dy) < height:
            result[..., max(0, dy) : height + min(0, dy), :] |= lines[half][..., max(0, -dy) : height + min(0, -dy), :]
    return result.to(mask.dtype)


def erode(mask: Tensor, kernel_size: int) -> Tensor:
    """Erode a mask (B, 1, H, W), bool or float, by an elliptical kernel; outside the image does not erode it.

    An object cut by the image border is whole there: erosion must not invent a band along the border.
    """
    if mask.dtype == torch.bool:
        return ~dilate(~mask, kernel_size)
    return 1 - dilate(1 - mask, kernel_size)


def trimap_from_alpha(alpha: Tensor, kernel_size: int) -> Tensor:
    """Return the trimap of an alpha: 1 on certain foreground, 0 on certain background, 0.5 in the unknown band between.

    Foreground is ``erode(alpha >= 254.5/255)``, background is outside ``dilate(alpha > 0.5/255)``, elliptical kernel;
    the rule of the AM-2k release with the paper's kernel of 15 pixels at 512.

    Args:
        alpha: (B, 1, H, W) in [0, 1].
        kernel_size: Odd, in pixels; see :func:`scaled_kernel`.

    Returns:
        (B, 1, H, W) with values 0, 0.5 and 1.

    Example:
        >>> alpha = torch.zeros(1, 1, 1, 9)
        >>> alpha[..., 4:] = 1
        >>> trimap_from_alpha(alpha, 3).flatten().tolist()
        [0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    """
    check_shape(alpha, ("B", 1, "H", "W"), "alpha")
    foreground = erode((alpha >= OPAQUE).float(), kernel_size)
    possible = dilate((alpha > CLEAR).float(), kernel_size)
    return 0.5 * (foreground + possible)


def area_mean(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the mean of ``image`` over the cells of a coarser grid, (B, C, H, W) -> (B, C, h, w)."""
    return F.adaptive_avg_pool2d(image, size)


def block_classes(trimap: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the class of each block, (B, h, w) int64: 2 all foreground, 0 all background, 1 anything else."""
    smallest = -F.adaptive_max_pool2d(-trimap, size)
    largest = F.adaptive_max_pool2d(trimap, size)
    return ((smallest >= 1).long() + (largest > 0).long()).squeeze(1)


@dataclass(frozen=True)
class MattingTargets:
    """What the losses compare the network's output with; sizes follow the output's own grids."""

    alpha: Tensor
    """(B, 1, H, W) in [0, 1]: the full-size alpha, or the mask where ``has_alpha`` is False."""
    has_alpha: Tensor
    """(B,) bool."""
    unknown: Tensor
    """(B, 1, H, W) in {0, 1}: the trimap's unknown band at full size."""
    trimap: Tensor
    """(B, 1, h, w) in [0, 1]: area mean of the three-level trimap over the latent cells."""
    coarse_trimap: Tensor
    """(B, h', w') int64: 0 background, 1 transition, 2 foreground."""
    alpha_lr: Tensor
    """(B, 1, h, w) in [0, 1]: area mean of the alpha over the latent cells, also the soft grounding target."""
    has_phrase: Tensor
    """(B,) bool: False where a sample comes without words to ground."""
    teacher: MattingOutput | None = None
    """What a teacher says about the same images and phrases, where a student is distilled."""


def targets_for(
    target: Tensor,
    has_alpha: Tensor,
    grid: tuple[int, int],
    coarse_grid: tuple[int, int],
    kernel_size: int | None = None,
    has_phrase: Tensor | None = None,
) -> MattingTargets:
    """Compute every training target from the alphas or masks of a batch.

    Args:
        target: (B, 1, H, W) in [0, 1].
        has_alpha: (B,) bool.
        grid: (h, w) of the latent grid.
        coarse_grid: (h', w') of the coarse trimap.
        kernel_size: Of the trimap, in pixels; default: 15 at 512, scaled with the longer side.
        has_phrase: (B,) bool; default: all have one.
    """
    check_shape(target, ("B", 1, "H", "W"), "target")
    kernel = kernel_size or scaled_kernel(max(target.shape[-2:]))
    trimap = trimap_from_alpha(target, kernel)
    return MattingTargets(
        alpha=target,
        has_alpha=has_alpha,
        unknown=(trimap == 0.5).to(target.dtype),
        trimap=area_mean(trimap, grid),
        coarse_trimap=block_classes(trimap, coarse_grid),
        alpha_lr=area_mean(target, grid),
        has_phrase=torch.ones_like(has_alpha) if has_phrase is None else has_phrase,
    )
