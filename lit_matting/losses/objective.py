"""The objective: named terms, their weights, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn as nn
from torch import Tensor

from lit_matting.losses.base import LossTerm
from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets


class Objective(nn.Module):
    """The weighted sum of named loss terms.

    Args:
        terms: Name -> term. The name is the log's ``loss/<name>``.
    """

    def __init__(self, terms: Mapping[str, LossTerm]) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.ramps: dict[str, float] = dict.fromkeys(self.terms, 1.0)
        """Momentary factor of each term; a callback moves it, 1 otherwise."""

    def forward(self, output: MattingOutput, targets: MattingTargets) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total, ``sum(ramp * weight * term)``, and each unweighted term."""
        values = {name: term(output, targets) for name, term in self.terms.items()}
        total = sum(self.ramps[name] * self.terms[name].weight * value for name, value in values.items())
        return total + _anchor(output), values


def _anchor(output: MattingOutput) -> Tensor:
    """Return a 0 that depends on every output.

    On a step whose data set has no alpha, nothing reaches the alpha head; distributed training would wait for its
    gradient for ever.
    """
    outputs = (output.alpha, output.alpha_lr, output.trimap, output.coarse_trimap, output.grounding, *output.alphas)
    return sum(0.0 * value.float().sum() for value in outputs if value is not None and value.requires_grad)
