"""STM: the soft semantic trimap on the latent grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lit_matting.losses.base import LossTerm
from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets


class SemanticTrimap(LossTerm):
    """Mean of ``w (trimap - target)^2``, with a heavier weight where the target is neither background nor foreground.

    The paper states the term's weight of 10; the regression form is ours: under a weight of 10 only a mean-reduced
    regression keeps the balance with the other four terms.

    Args:
        weight: Factor of the term in the total.
        band_weight: Weight of latent cells inside the transition band; cells outside weigh 1.
    """

    needs = ("trimap",)

    def __init__(self, weight: float = 10.0, band_weight: float = 2.0) -> None:
        super().__init__(weight)
        self.band_weight = band_weight

    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        target = targets.trimap
        weights = 1 + (self.band_weight - 1) * ((target > 0) & (target < 1)).to(target.dtype)
        return (weights * (output.trimap.float() - target).square()).flatten(1).mean(1)


class SemanticTrimapCrossEntropy(LossTerm):
    """Binary cross-entropy of the soft trimap against the soft target: the alternative reading of STM.

    Args:
        weight: Factor of the term in the total. Cross-entropy is about ten times the squared error, hence the default.
    """

    needs = ("trimap",)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)

    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        # not the logits form: the network hands out probabilities; the clamp bounds the gradient instead
        trimap = output.trimap.float().clamp(1e-4, 1 - 1e-4)
        logits = trimap.logit()
        return F.binary_cross_entropy_with_logits(logits, targets.trimap, reduction="none").flatten(1).mean(1)
