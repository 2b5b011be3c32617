"""What a loss term is, and the small pieces that several terms share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets


class LossTerm(nn.Module, ABC):
    """One term of the objective. Its name in the config is its name in the logs: ``losses.stm`` -> ``loss/stm``.

    Every term averages per image first and then over the images it applies to, so that the gradient does not depend on
    how a batch that it applies to as a whole is split over ranks. It is computed in float32, whatever autocast runs
    around it; outputs may come in half precision, so a term starts with ``.float()``.

    Args:
        weight: Factor of the term in the total.
    """

    needs: tuple[str, ...] = ()
    """Fields of :class:`MattingOutput` that the term reads; the model says which are missing before it trains."""
    needs_teacher: bool = False
    """Whether the term compares with a teacher's output, ``targets.teacher``."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        """Return the term of each image, (B,), before selection and weight."""

    def applies(self, targets: MattingTargets) -> Tensor:
        """Return which images the term applies to, (B,) bool; by default all."""
        return targets.has_alpha.new_ones(targets.has_alpha.shape)

    def computed(self, output: MattingOutput) -> Tensor | None:
        """Return for which images the network computed what the term reads, (B,) bool; None, the default: for all."""
        return None

    def forward(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        """Return the unweighted term: the mean over the images it applies to.

        Where it applies to none, the result is 0 but still attached to the graph, so that distributed training sees a
        gradient for every parameter on every step.
        """
        # autocast would run the pyramids' convolutions in half precision
        with torch.autocast(targets.alpha.device.type, enabled=False):
            chosen, computed = self.applies(targets), self.computed(output)
            return masked_mean(self.per_image(output, targets), chosen if computed is None else chosen & computed)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``values`` (B,) where ``mask`` (B,) holds, or an attached 0."""
    # a product would turn an infinite value of an ignored image into NaN
    chosen = values.masked_fill(~mask, 0.0)
    return chosen.sum() / mask.sum().clamp(min=1)


def laplacian_sum(difference: Tensor, levels: int) -> Tensor:
    """Return the L1 distance of two Laplacian pyramids, given the difference of the images; (B, 1, H, W) -> (B,).

    Level ``l`` counts 2^l times (Hou & Liu 2019, eq. 6); the sum is over pixels, and the last level is the coarse rest.
    A pyramid is linear, so the difference of two pyramids is the pyramid of the difference: half the work. Blur and
    expansion are Burt and Adelson's 5 binomial taps with replicated borders.
    """
    total = difference.new_zeros(difference.shape[0])
    current = difference
    for level in range(levels - 1):
        coarse = _halve(current)
        back = _expand(_expand(coarse, -2, current.shape[-2]), -1, current.shape[-1])
        total = total + 2.0**level * (current - back).abs().flatten(1).sum(1)
        current = coarse
    return total + 2.0 ** (levels - 1) * current.abs().flatten(1).sum(1)


def _halve(image: Tensor) -> Tensor:
    """Blur with the binomial taps 1 4 6 4 1 (replicated borders) and keep every second pixel.

    Written as sums of strided views: a one-channel convolution costs several times as much on a CPU.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
    taps = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
    rows = sum(tap * padded[..., k : k + height : 2, :] for k, tap in enumerate(taps))
    return sum(tap * rows[..., k : k + width : 2] for k, tap in enumerate(taps))


def _expand(image: Tensor, dimension: int, size: int) -> Tensor:
    """Undo the subsampling of :func:`_halve` along one dimension, to ``size`` pixels.

    Between two kept pixels lies their mean; a kept pixel itself is 1/8, 6/8, 1/8 of its neighbourhood.
    """
    last = image.shape[dimension] - 1
    before = torch.cat([image.narrow(dimension, 0, 1), image.narrow(dimension, 0, last)], dimension)
    after = torch.cat([image.narrow(dimension, 1, last), image.narrow(dimension, last, 1)], dimension)
    even = 0.125 * (before + after) + 0.75 * image
    odd = 0.5 * (image + after)
    place = dimension % image.ndim
    return torch.stack([even, odd], place + 1).flatten(place, place + 1).narrow(place, 0, size)


def gradient_sum(difference: Tensor) -> Tensor:
    """Return the sum of absolute forward differences, both directions; (B, 1, H, W) -> (B,)."""
    horizontal = (difference[..., :, 1:] - difference[..., :, :-1]).abs().flatten(1).sum(1)
    vertical = (difference[..., 1:, :] - difference[..., :-1, :]).abs().flatten(1).sum(1)
    return horizontal + vertical
