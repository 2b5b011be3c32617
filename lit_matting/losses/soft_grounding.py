"""SG: the grounding map against the soft matte on the latent grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_matting.losses.base import LossTerm
from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets


class SoftGrounding(LossTerm):
    """Binary cross-entropy with logits plus soft Dice, of the grounding map against the area mean of the matte.

    The logits form, because CUDA autocast refuses cross-entropy on probabilities; Dice with a smoothing of 1, because
    an image may hold nothing of what the phrase names.

    Args:
        weight: Factor of the term in the total (0.5 in the paper).
        dice: Share of the Dice part.
    """

    needs = ("grounding",)

    def __init__(self, weight: float = 0.5, dice: float = 1.0) -> None:
        super().__init__(weight)
        self.dice = dice

    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        logits, target = output.grounding.float(), targets.alpha_lr
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1)
        return entropy + self.dice * soft_dice_loss(logits.sigmoid(), target)

    def applies(self, targets: MattingTargets) -> Tensor:
        return targets.has_phrase


def soft_dice_loss(map: Tensor, target: Tensor) -> Tensor:
    """Return ``1 - (2 sum(m t) + 1) / (sum(m^2) + sum(t^2) + 1)`` of each image, (B,).

    With squares in the denominator a soft target is matched best by itself, not by a hardened copy.
    """
    map, target = map.flatten(1), target.flatten(1)
    return 1 - (2 * (map * target).sum(1) + 1) / (map.square().sum(1) + target.square().sum(1) + 1)


class SoftAlpha(LossTerm):
    """L1 of the final alpha over the whole image: the reading of SG as "soft grounding by the matte itself".

    Args:
        weight: Factor of the term in the total.
    """

    needs = ("alpha",)

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__(weight)

    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        return torch.abs(output.alpha.float() - targets.alpha).flatten(1).mean(1)

    def applies(self, targets: MattingTargets) -> Tensor:
        return targets.has_alpha & targets.has_phrase
