"""alpha_lr: the low-resolution matte on the latent grid."""

from __future__ import annotations

from torch import Tensor

from lit_matting.losses.base import LossTerm, laplacian_sum
from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets


class AlphaLowResolution(LossTerm):
    """L1 plus a share of the Laplacian pyramid distance, both as means over the latent cells.

    Args:
        weight: Factor of the term in the total (10 in the paper).
        laplacian: Share of the Laplacian part.
        levels: Levels of the pyramid.
    """

    needs = ("alpha_lr",)

    def __init__(self, weight: float = 10.0, laplacian: float = 0.25, levels: int = 3) -> None:
        super().__init__(weight)
        self.laplacian = laplacian
        self.levels = levels

    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        difference = output.alpha_lr.float() - targets.alpha_lr
        cells = difference.shape[-2] * difference.shape[-1]
        distance = difference.abs().flatten(1).sum(1) + self.laplacian * laplacian_sum(difference, self.levels)
        return distance / cells

    def applies(self, targets: MattingTargets) -> Tensor:
        return targets.has_alpha
