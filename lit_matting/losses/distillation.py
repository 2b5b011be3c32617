"""Distillation: a student's outputs, features and attention against its teacher's on the same image and phrase.

The three terms stand beside the five of the paper in a student's loss map. They apply to every image, hard masks
included: the teacher has an opinion about transparency even where the data set has none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_matting.checks import InputError
from lit_matting.losses.base import LossTerm
from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets


class OutputDistillation(LossTerm):
    """Squared distance of the neck's features and of the trimaps, absolute distance of the low-resolution alphas.

    Each is a mean over its own cells and channels.

    Args:
        weight: Factor of the term in the total.
        features: Share of the neck's features, which must have the teacher's width; 0 leaves them out.
        trimap: Share of the trimap.
        alpha_lr: Share of the alpha.
    """

    needs_teacher = True

    def __init__(self, weight: float = 1.0, features: float = 1.0, trimap: float = 1.0, alpha_lr: float = 1.0) -> None:
        super().__init__(weight)
        self.features = features
        self.trimap = trimap
        self.alpha_lr = alpha_lr

    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        teacher = targets.teacher
        total = self.trimap * (output.trimap.float() - teacher.trimap.float()).square().flatten(1).mean(1)
        total = total + self.alpha_lr * (output.alpha_lr.float() - teacher.alpha_lr.float()).abs().flatten(1).mean(1)
        if not self.features:
            return total
        if output.features.shape != teacher.features.shape:
            raise InputError(
                f"OutputDistillation compares the neck's features, but the student has {output.features.shape[1]}"
                f" channels and the teacher {teacher.features.shape[1]}: set `features: 0` or the same"
                " `model.neck.channels`."
            )
        return total + self.features * (output.features.float() - teacher.features.float()).square().flatten(1).mean(1)


class FeatureDistillation(LossTerm):
    """Mean over the backbone's levels of the squared distance between normalised features.

    Levels are matched by stride; one whose width differs from the teacher's is left out. Each level of each image is
    brought to mean 0 and deviation 1 first, because activations of different levels differ in size by orders: the
    distance is then ``2 (1 - correlation)``.

    Args:
        weight: Factor of the term in the total; published values for sums over levels lie between 0.01 and 1.
    """

    needs_teacher = True

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__(weight)

    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        pairs = [
            (features, targets.teacher.pyramid[stride])
            for stride, features in output.pyramid.items()
            if stride in targets.teacher.pyramid and features.shape == targets.teacher.pyramid[stride].shape
        ]
        if not pairs:
            raise InputError(
                "FeatureDistillation finds no level at which student and teacher have the same width: drop the term."
            )
        distances = [(_normalised(ours) - _normalised(theirs)).square().flatten(1).mean(1) for ours, theirs in pairs]
        return torch.stack(distances).mean(0)


class AttentionDistillation(LossTerm):
    """Mean over the attention layers of ``KL(teacher || student)``, each map read as a distribution over its cells.

    What is compared is where the phrase's words look, not how much of their probability other tokens take. Layers are
    matched by the block map of student and teacher; two grids of different size are compared on the coarser one.

    Args:
        weight: Factor of the term in the total.
    """

    needs_teacher = True

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__(weight)

    def per_image(self, output: MattingOutput, targets: MattingTargets) -> Tensor:
        layers = [layer for layer in output.attention if layer in targets.teacher.attention]
        if not layers:
            raise InputError(
                "AttentionDistillation finds no attention layer that student and teacher have in common: drop the term."
            )
        distances = []
        for layer in layers:
            ours, theirs = output.attention[layer], targets.teacher.attention[layer]
            size = [min(sides) for sides in zip(ours.shape[-2:], theirs.shape[-2:])]
            ours, theirs = (_log_distribution(F.adaptive_avg_pool2d(maps.float(), size)) for maps in (ours, theirs))
            distances.append((theirs.exp() * (theirs - ours)).sum(1))
        return torch.stack(distances).mean(0)


def _normalised(features: Tensor) -> Tensor:
    return F.layer_norm(features.float(), features.shape[1:])


def _log_distribution(maps: Tensor) -> Tensor:
    """Return maps (B, h, w) >= 0 as logarithms of distributions over the cells, (B, h w)."""
    flat = maps.flatten(1).clamp(min=1e-8)
    return (flat / flat.sum(1, keepdim=True)).log()
