"""What a loss term is, and the small pieces that several terms share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets


class LossTerm(nn.Module, ABC):
    """One term of the objective. Its name in the config is its name in the logs: ``losses.stm`` -> ``loss/stm``.

    Every term averages per image first and then over the images it applies to, so that the value does not depend on how
    a global batch is split over ranks.

    Args:
        weight: Factor of the term in the total.
    """

    needs: tuple[str, ...] = ()
    """Fields of :class:`MattingOutput` that the term reads; the model says which are missing before it trains."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        """Return the term of each image, (B,), before selection and weight."""

    def applies(self, targets: MattingTargets) -> Tensor:
        """Return which images the term applies to, (B,) bool; by default all."""
        return targets.has_alpha.new_ones(targets.has_alpha.shape)

    def forward(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        """Return the unweighted term: the mean over the images it applies to.

        Where it applies to none, the result is 0 but still attached to the graph, so that distributed training sees a
        gradient for every parameter on every step.
        """
        return masked_mean(self.per_image(output, targets), self.applies(targets))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``values`` (B,) where ``mask`` (B,) holds, or an attached 0."""
    # a product would turn an infinite value of an ignored image into NaN
    chosen = values.masked_fill(~mask, 0.0)
    return chosen.sum() / mask.sum().clamp(min=1)


def laplacian_sum(difference: Tensor, levels: int) -> Tensor:
    """Return the L1 distance of two Laplacian pyramids, given the difference of the images; (B, 1, H, W) -> (B,).

    Level ``l`` counts 2^l times (Hou & Liu 2019, eq. 6); the sum is over pixels, and the last level is the coarse rest.
    A pyramid is linear, so the difference of two pyramids is the pyramid of the difference: half the work.
    """
    total = difference.new_zeros(difference.shape[0])
    current = difference
    for level in range(levels - 1):
        coarse = _blur(current)[..., ::2, ::2]
        back = F.interpolate(coarse, size=current.shape[-2:], mode="bilinear", align_corners=False)
        total = total + 2.0**level * (current - back).abs().flatten(1).sum(1)
        current = coarse
    return total + 2.0 ** (levels - 1) * current.abs().flatten(1).sum(1)


def _blur(image: Tensor) -> Tensor:
    """Binomial 5-tap blur with replicated borders."""
    taps = image.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, 5)), taps.view(1, 1, 5, 1))


def gradient_sum(difference: Tensor) -> Tensor:
    """Return the sum of absolute forward differences, both directions; (B, 1, H, W) -> (B,)."""
    horizontal = (difference[..., :, 1:] - difference[..., :, :-1]).abs().flatten(1).sum(1)
    vertical = (difference[..., 1:, :] - difference[..., :-1, :]).abs().flatten(1).sum(1)
    return horizontal + vertical
