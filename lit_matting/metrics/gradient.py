"""The gradient error: where a matte is sharper or softer than the truth.

Rhemann et al., "A Perceptually Motivated Online Benchmark for Image Matting" (CVPR 2009), in the form of the Deep
Image Matting release.
"""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from lit_matting.metrics.mattes import as_unit

SIGMA = 1.4
RADIUS = 4


@lru_cache(maxsize=1)
def taps() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the Gaussian and its derivative whose outer product is the kernel of unit L2 norm, each (9, 1).

    The norm of an outer product is the product of the norms, so each factor is normalised alone.
    """
    offsets = np.arange(-RADIUS, RADIUS + 1, dtype=np.float64)
    smooth = np.exp(-(offsets**2) / (2 * SIGMA**2))
    derivative = -offsets * smooth
    return (smooth / math.sqrt((smooth**2).sum()))[:, None], (derivative / math.sqrt((derivative**2).sum()))[:, None]


def magnitude(matte: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the gradient magnitude of a matte, replicated at the border."""
    smooth, derivative = taps()
    across = cv2.sepFilter2D(matte, cv2.CV_64F, derivative, smooth, borderType=cv2.BORDER_REPLICATE)
    down = cv2.sepFilter2D(matte, cv2.CV_64F, smooth, derivative, borderType=cv2.BORDER_REPLICATE)
    return np.sqrt(across**2 + down**2)


def stretch(matte: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matte stretched to fill [0, 1] (MATLAB's mat2gray); a constant one becomes 0."""
    low, high = matte.min(), matte.max()
    return (matte - low) / (high - low) if high > low else np.zeros_like(matte)


def gradient_error(
    pred: NDArray[np.generic],
    alpha: NDArray[np.generic],
    region: NDArray[np.bool_] | None = None,
    normalize: bool = True,
) -> float:
    """Return the sum over the region of (G(pred) - G(alpha))^2, not yet divided by 1000."""
    if alpha.size == 0:
        return 0.0
    predicted, truth = as_unit(pred), as_unit(alpha)
    if normalize:
        predicted, truth = stretch(predicted), stretch(truth)
    difference = (magnitude(predicted) - magnitude(truth)) ** 2
    return float(difference.sum() if region is None else difference[region].sum())
