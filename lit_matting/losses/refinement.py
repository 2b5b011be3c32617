"""R: the refined matte, where it is uncertain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_matting.checks import InputError
from lit_matting.losses.base import LossTerm, gradient_sum, laplacian_sum
from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets


class Refinement(LossTerm):
    """Error inside the unknown region, at every scale of the refiner, per pixel of that region.

    The unknown region is what the refiner worked on, joined with the true trimap's band: a refiner that is told too
    little must not be praised for leaving the rest alone. Dividing by its area is what lets a weight of 1 stand beside
    10 on whole-image means: a thin band of hair counts as much as a wide one.

    Args:
        weight: Factor of the term in the total (1 in the paper).
        scale_weights: Weight of each scale, coarse to fine; with a single scale the last one holds.
        levels: Levels of the Laplacian pyramid.
        laplacian: Share of the Laplacian part.
        gradient: Share of the gradient part.
    """

    needs = ("alphas",)

    def __init__(
        self,
        weight: float = 1.0,
        scale_weights: Sequence[float] = (0.5, 1.0),
        levels: int = 5,
        laplacian: float = 1.0,
        gradient: float = 0.05,
    ) -> None:
        super().__init__(weight)
        self.scale_weights = tuple(scale_weights)
        self.levels = levels
        self.laplacian = laplacian
        self.gradient = gradient

    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        total = targets.alpha.new_zeros(targets.alpha.shape[0])
        if len(output.alphas) > len(self.scale_weights):
            raise InputError(
                f"`scale_weights` of Refinement needs one weight for each scale of the refiner, got"
                f" {len(self.scale_weights)} for {len(output.alphas)} scales."
            )
        scale_weights = self.scale_weights[len(self.scale_weights) - len(output.alphas) :]
        rows = output.refined or (targets.has_alpha.new_ones(targets.has_alpha.shape),) * len(output.alphas)
        for scale_weight, alpha, active, worked in zip(scale_weights, output.alphas, output.active, rows):
            size = alpha.shape[-2:]
            truth, band = targets.alpha, targets.unknown
            if truth.shape[-2:] != size:
                truth = F.interpolate(truth, size=size, mode="area")
                band = F.adaptive_max_pool2d(band, size)
            unknown = torch.maximum(band, active[:, None].to(band.dtype))
            difference = (alpha.float() - truth) * unknown
            area = unknown.flatten(1).sum(1) + 1
            distance = difference.abs().flatten(1).sum(1)
            if self.laplacian:
                distance = distance + self.laplacian * laplacian_sum(difference, self.levels)
            if self.gradient:
                distance = distance + self.gradient * gradient_sum(difference)
            # a crop of a small photograph has no half scale, whatever the others of its batch have
            total = total + (scale_weight * distance / area).masked_fill(~worked, 0.0)
        return total

    def applies(self, targets: MattingTargets) -> Tensor:
        return targets.has_alpha

    def computed(self, output: MattingOutput) -> Tensor | None:
        return output.refined[-1] if output.refined else None  # what is worked on at all is so at full scale
