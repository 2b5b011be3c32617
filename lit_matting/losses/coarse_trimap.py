"""CTM: the coarse trimap as a classification of blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_matting.losses.base import LossTerm
from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets


class CoarseTrimap(LossTerm):
    """Class-weighted cross-entropy of background, transition and foreground on the coarse level.

    Class weights are ``1 / sqrt(share of the class in this image)``, scaled to mean 1 over its blocks and bounded.

    Args:
        weight: Factor of the term in the total (0.1 in the paper).
        weight_range: Bounds of a class weight.
    """

    needs = ("coarse_trimap",)

    def __init__(self, weight: float = 0.1, weight_range: tuple[float, float] = (0.5, 4.0)) -> None:
        super().__init__(weight)
        self.weight_range = weight_range

    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        classes = targets.coarse_trimap
        one_hot = F.one_hot(classes, 3).flatten(1, 2).float()
        share = one_hot.mean(1)
        weights = torch.where(share > 0, share.clamp(min=1e-6).rsqrt(), torch.zeros_like(share))
        weights = (weights / (weights * share).sum(1, keepdim=True)).clamp(*self.weight_range)
        per_block = torch.einsum("bnc,bc->bn", one_hot, weights)
        entropy = F.cross_entropy(output.coarse_trimap.float(), classes, reduction="none").flatten(1)
        return (per_block * entropy).sum(1) / per_block.sum(1)


class CoarseTrimapConsistency(LossTerm):
    """L1 between the soft trimap and the one that the predicted low-resolution alpha implies: another reading of CTM.

    The implied trimap is a constant here: the alpha teaches the trimap, not the other way round.

    Args:
        weight: Factor of the term in the total.
    """

    needs = ("trimap", "alpha_lr")

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__(weight)

    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        alpha = output.alpha_lr.detach().float()
        implied = 0.5 * ((alpha > 0.05).float() + (alpha > 0.95).float())
        return (output.trimap.float() - implied).abs().flatten(1).mean(1)

    def applies(self, targets: MattingTargets) -> Tensor:
        return targets.has_alpha
