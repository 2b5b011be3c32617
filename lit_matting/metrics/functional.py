"""The five matting errors, as the Deep Image Matting release (Xu et al., CVPR 2017) defines them in MATLAB.

Each takes one prediction and one truth, (H, W), as uint8 (meaning value / 255) or as floats in [0, 1], and an optional
bool region to sum over. ``docs/METRICS.md`` has the formulas and the ways in which common copies deviate.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lit_matting.metrics.connectivity import connectivity_error
from lit_matting.metrics.gradient import gradient_error
from lit_matting.metrics.mattes import Matte, Region, as_unit, read_pair


def sad(pred: Matte, alpha: Matte, region: Region = None) -> float:
    """Return the sum of absolute differences in thousands: ``sum |p - a| / 1000``.

    Example:
        >>> sad(np.full((100, 100), 255, np.uint8), np.zeros((100, 100), np.uint8))
        10.0
    """
    predicted, truth, inside = read_pair(pred, alpha, region)
    difference = np.abs(as_unit(predicted) - as_unit(truth))
    return float(difference.sum() if inside is None else difference[inside].sum()) / 1000


def mad(pred: Matte, alpha: Matte, region: Region = None) -> float:
    """Return the mean absolute difference over the region; 0 for an empty one.

    Example:
        >>> mad(np.ones((2, 2)), np.array([[1.0, 1.0], [1.0, 0.0]]))
        0.25
    """
    _, truth, inside = read_pair(pred, alpha, region)
    count = truth.size if inside is None else int(inside.sum())
    return 1000 * sad(pred, alpha, region) / count if count else 0.0


def mse(pred: Matte, alpha: Matte, region: Region = None) -> float:
    """Return the mean squared difference over the region; 0 for an empty one.

    Example:
        >>> mse(np.full((2, 2), 0.5), np.zeros((2, 2)))
        0.25
    """
    predicted, truth, inside = read_pair(pred, alpha, region)
    difference = (as_unit(predicted) - as_unit(truth)) ** 2
    if inside is not None:
        difference = difference[inside]
    return float(difference.mean()) if difference.size else 0.0


def grad(pred: Matte, alpha: Matte, region: Region = None, normalize: Literal["minmax", "none"] = "minmax") -> float:
    """Return the gradient error in thousands: ``sum (G(p') - G(a'))^2 / 1000``, filtered on the whole image.

    Args:
        pred: (H, W) in [0, 1], or uint8.
        alpha: (H, W) in [0, 1], or uint8.
        region: (H, W) bool: where to sum.
        normalize: "minmax" stretches each matte to [0, 1] first, as the MATLAB code does; "none" takes it as it is.
    """
    predicted, truth, inside = read_pair(pred, alpha, region)
    return gradient_error(predicted, truth, inside, normalize == "minmax") / 1000


def conn(pred: Matte, alpha: Matte, region: Region = None) -> float:
    """Return the connectivity error in thousands: ``sum |phi(p) - phi(a)| / 1000``, connected on the whole image."""
    predicted, truth, inside = read_pair(pred, alpha, region)
    return connectivity_error(predicted, truth, inside) / 1000
