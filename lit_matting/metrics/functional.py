"""The five matting errors, as the Deep Image Matting release (Xu et al., CVPR 2017) defines them in MATLAB.

Each takes one prediction and one truth, (H, W), as uint8 (meaning value / 255) or as floats in [0, 1], and an optional
bool region to sum over. On 8-bit mattes every sum is a sum of whole numbers and therefore exact. ``docs/METRICS.md``
has the formulas, and the ways in which common copies deviate; ``dialect`` reproduces two of those.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from lit_matting.metrics import dialects
from lit_matting.metrics.connectivity import connectivity_error
from lit_matting.metrics.gradient import gradient_error
from lit_matting.metrics.mattes import Matte, Region, as_unit, read_pair

Dialect: TypeAlias = Literal["matlab", "python_port", "p3m"]
Normalize: TypeAlias = Literal["minmax", "none"]


def sad(pred: Matte, alpha: Matte, region: Region = None) -> float:
    """Return the sum of absolute differences in thousands: ``sum |p - a| / 1000``.

    Args:
        pred: (H, W) uint8, or float in [0, 1].
        alpha: (H, W), the truth, the same.
        region: (H, W) bool: where to sum; default: everywhere.

    Raises:
        InputError: If a size, type or range is wrong.

    Example:
        >>> sad(np.full((100, 100), 255, np.uint8), np.zeros((100, 100), np.uint8))
        10.0
    """
    return _absolute(*read_pair(pred, alpha, region)) / 1000


def mad(pred: Matte, alpha: Matte, region: Region = None) -> float:
    """Return the mean absolute difference over the region, 0 for an empty one; arguments as :func:`sad`.

    Example:
        >>> mad(np.ones((2, 2)), np.array([[1.0, 1.0], [1.0, 0.0]]))
        0.25
    """
    predicted, truth, inside = read_pair(pred, alpha, region)
    count = _count(truth, inside)
    return _absolute(predicted, truth, inside) / count if count else 0.0


def mse(pred: Matte, alpha: Matte, region: Region = None) -> float:
    """Return the mean squared difference over the region, 0 for an empty one; arguments as :func:`sad`.

    Example:
        >>> mse(np.full((2, 2), 0.5), np.zeros((2, 2)))
        0.25
    """
    predicted, truth, inside = read_pair(pred, alpha, region)
    count = _count(truth, inside)
    if not count:
        return 0.0
    if predicted.dtype == truth.dtype == np.uint8:
        return _norm(predicted, truth, inside, cv2.NORM_L2SQR) / (255 * 255 * count)
    return float(np.square(_difference(predicted, truth, inside)).sum() / count)


def grad(
    pred: Matte,
    alpha: Matte,
    region: Region = None,
    normalize: Normalize = "minmax",
    dialect: Dialect = "matlab",
) -> float:
    """Return the gradient error in thousands: ``sum (G(p') - G(a'))^2 / 1000``, filtered on the whole image.

    Args:
        pred: (H, W) uint8, or float in [0, 1].
        alpha: (H, W), the truth, the same.
        region: (H, W) bool: where to sum; default: everywhere.
        normalize: "minmax" stretches each matte to [0, 1] first, as the MATLAB code does; "none" takes it as it is.
        dialect: Whose numbers to reproduce: "matlab" is the definition; "python_port" never stretches; "p3m" never
            stretches, uses another kernel and border, and divides by 10. These two ignore ``normalize``.

    Example:
        >>> edge = np.repeat([0.0, 1.0], 10)[None].repeat(20, 0)
        >>> grad(edge, edge)
        0.0
    """
    predicted, truth, inside = read_pair(pred, alpha, region)
    if normalize not in ("minmax", "none"):
        raise ValueError(f"`normalize` must be 'minmax' or 'none', got {normalize!r}.")
    if dialects.check(dialect) == "p3m":
        return dialects.p3m_gradient(as_unit(predicted), as_unit(truth), inside)
    stretch = dialect == "matlab" and normalize == "minmax"
    return gradient_error(predicted, truth, inside, stretch) / 1000


def conn(pred: Matte, alpha: Matte, region: Region = None, dialect: Dialect = "matlab") -> float:
    """Return the connectivity error in thousands: ``sum |phi(p) - phi(a)| / 1000``, connected on the whole image.

    Args:
        pred: (H, W) uint8, or float in [0, 1].
        alpha: (H, W), the truth, the same.
        region: (H, W) bool: where to sum; default: everywhere.
        dialect: Whose numbers to reproduce: "matlab" is the definition; "python_port" counts the background as a
            component; "p3m" keeps a pixel's level at thresholds where nothing is left. Both miss pixels that lie
            exactly on some thresholds.

    Example:
        >>> conn(np.ones((100, 100)), np.zeros((100, 100))), conn(np.ones((100, 100)), np.zeros((100, 100)),
        ...     dialect="python_port")
        (10.0, 0.0)
    """
    predicted, truth, inside = read_pair(pred, alpha, region)
    if dialects.check(dialect) == "matlab":
        return connectivity_error(predicted, truth, inside) / 1000
    return dialects.connectivity(as_unit(predicted), as_unit(truth), inside, dialect)


def _count(truth: NDArray[np.generic], inside: NDArray[np.bool_] | None) -> int:
    return truth.size if inside is None else int(np.count_nonzero(inside))


def _absolute(predicted: NDArray[np.generic], truth: NDArray[np.generic], inside: NDArray[np.bool_] | None) -> float:
    if truth.size == 0:
        return 0.0
    if predicted.dtype == truth.dtype == np.uint8:
        return _norm(predicted, truth, inside, cv2.NORM_L1) / 255
    return float(np.abs(_difference(predicted, truth, inside)).sum())


def _norm(
    predicted: NDArray[np.generic], truth: NDArray[np.generic], inside: NDArray[np.bool_] | None, kind: int
) -> float:
    if inside is None:
        return cv2.norm(predicted, truth, kind)
    return cv2.norm(predicted, truth, kind, inside.view(np.uint8))


def _difference(
    predicted: NDArray[np.generic], truth: NDArray[np.generic], inside: NDArray[np.bool_] | None
) -> NDArray[np.float64]:
    difference = as_unit(predicted) - as_unit(truth)
    return difference if inside is None else difference[inside]
