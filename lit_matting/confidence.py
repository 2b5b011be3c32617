"""Is the phrase's thing in the photograph at all: a number, and where to cut it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_matting.checks import InputError


def confidence_of(grounding: Tensor, alpha: Tensor) -> Tensor:
    """Return how sure the network is that the phrase's thing is there, (B,) in [0, 1].

    *Agreement* times *presence*. Agreement is the soft intersection over union of grounding and low-resolution matte,
    ``sum min(g, a) / sum max(g, a)``: both were trained towards the same target, and fall apart where the network
    guesses. Presence is twice the mean grounding probability of the strongest 1 % of cells (at least four), at most 1:
    a thing that is there is beyond doubt somewhere, however small it is, and two faint maps that agree prove nothing.

    The number orders phrases; it is no probability. Where to cut is found by
    :meth:`lit_matting.pipeline.MattingPipeline.calibrate`.

    Args:
        grounding: (B, 1, h, w) in [0, 1].
        alpha: (B, 1, h, w) in [0, 1].

    Example:
        >>> perfect = torch.zeros(1, 1, 8, 8)
        >>> perfect[..., 2:6, 2:6] = 1
        >>> confidence_of(perfect, perfect).item(), confidence_of(perfect, 0 * perfect).item()
        (1.0, 0.0)
    """
    g, a = grounding.float().flatten(1), alpha.float().flatten(1)
    strongest = min(g.shape[1], max(4, g.shape[1] // 100))
    presence = (2 * g.topk(strongest, 1).values.mean(1)).clamp(max=1)
    # the floor is one thousandth of a cell: two maps of nothing agree on nothing
    agreement = torch.minimum(g, a).sum(1) / torch.maximum(g, a).sum(1).clamp(min=1e-3)
    return agreement * presence


@dataclass(frozen=True)
class Calibration:
    """Where to cut the confidence, and how well that tells phrases for present things from phrases for absent ones."""

    threshold: float
    balanced_accuracy: float
    """The mean of the shares of present things found and of absent things rejected."""
    found: float
    """Share of the present things that are found."""
    rejected: float
    """Share of the absent things that are rejected."""
    present: int
    absent: int


def best_threshold(measured: Sequence[tuple[float, bool]]) -> Calibration:
    """Return the cut between confidences of present (True) and absent (False) things; see ``calibrate``.

    Raises:
        InputError: If one of the two kinds is missing.

    Example:
        >>> best_threshold([(0.9, True), (0.6, True), (0.2, False), (0.1, False)]).threshold
        0.4
    """
    present = [value for value, there in measured if there]
    absent = [value for value, there in measured if not there]
    if not present or not absent:
        raise InputError(
            f"calibration needs phrases for things that are there and for things that are not, got {len(present)} and"
            f" {len(absent)}."
        )
    values = sorted({value for value, _ in measured})
    # between neighbours, and outside all of them; the widest gap wins among equals
    edges = [(values[0] - 1e-6, 0.0), *(((low + high) / 2, high - low) for low, high in itertools.pairwise(values))]
    edges.append((values[-1] + 1e-6, 0.0))

    def shares(threshold: float) -> tuple[float, float]:
        found = sum(value >= threshold for value in present) / len(present)
        rejected = sum(value < threshold for value in absent) / len(absent)
        return found, rejected

    threshold, _ = max(edges, key=lambda edge: (sum(shares(edge[0])), edge[1]))
    found, rejected = shares(threshold)
    return Calibration(threshold, (found + rejected) / 2, found, rejected, len(present), len(absent))
