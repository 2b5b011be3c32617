"""The gradient error: where a matte is sharper or softer than the truth.

Rhemann et al., "A Perceptually Motivated Online Benchmark for Image Matting" (CVPR 2009), in the form of the Deep
Image Matting release. The 9 x 9 kernel is an outer product, so two lines of 9 taps replace its 81; and where two mattes
agree on a neighbourhood their gradients cancel exactly, so only tiles near a difference are filtered at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

SIGMA = 1.4
RADIUS = 4
TILE = 64
RUN = 512
"""Pixels: tiles of 64 x 64 are looked at, up to 64 x 512 are filtered at once and stay in the processor's cache."""


@lru_cache(maxsize=1)
def taps() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the Gaussian and its derivative whose outer product is the kernel of unit L2 norm, each (9, 1).

    The norm of an outer product is the product of the norms, so each factor is normalised alone.
    """
    offsets = np.arange(-RADIUS, RADIUS + 1, dtype=np.float64)
    smooth = np.exp(-(offsets**2) / (2 * SIGMA**2))
    derivative = -offsets * smooth
    return (smooth / math.sqrt((smooth**2).sum()))[:, None], (derivative / math.sqrt((derivative**2).sum()))[:, None]


def magnitude(matte: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return the gradient magnitude of a matte (H, W), replicated at the border, in the matte's own units."""
    smooth, derivative = taps()
    across = cv2.sepFilter2D(matte, cv2.CV_64F, derivative, smooth, borderType=cv2.BORDER_REPLICATE)
    down = cv2.sepFilter2D(matte, cv2.CV_64F, smooth, derivative, borderType=cv2.BORDER_REPLICATE)
    return cv2.magnitude(across, down)


def _range(matte: NDArray[np.generic], normalize: bool) -> tuple[float, float]:
    """Return the matte's lowest value, and what its gradient is to be divided by (infinity for a constant one)."""
    low, high, *_ = cv2.minMaxLoc(matte)
    if not normalize:
        return low, 255.0 if matte.dtype == np.uint8 else 1.0
    return low, high - low if high > low else math.inf


def gradient_error(
    pred: NDArray[np.generic],
    alpha: NDArray[np.generic],
    region: NDArray[np.bool_] | None = None,
    normalize: bool = True,
) -> float:
    """Return the sum over the region of (G(pred) - G(alpha))^2, not yet divided by 1000.

    A constant offset has no gradient and a factor passes through the filter, so the mattes are filtered as they come,
    8-bit ones without a conversion, and stretched (MATLAB's mat2gray) afterwards by a factor.

    Args:
        pred: (H, W) uint8, or float in [0, 1].
        alpha: (H, W), the same.
        region: (H, W) bool, where to sum; the mattes are filtered as a whole.
        normalize: Stretch each matte to [0, 1] first; a constant one has no gradient.
    """
    if alpha.size == 0:
        return 0.0
    mattes = [matte if matte.dtype == np.uint8 else matte.astype(np.float64) for matte in (pred, alpha)]
    (low_1, spread_1), (low_2, spread_2) = (_range(matte, normalize) for matte in mattes)
    alike = mattes[0].dtype == mattes[1].dtype and spread_1 == spread_2
    if alike:
        busy = (mattes[0] != mattes[1]).view(np.uint8)
    else:
        # no tile cancels, but one where both mattes lie at their lowest has no gradient
        busy = ((mattes[0] != low_1) | (mattes[1] != low_2)).view(np.uint8)
    padded = [cv2.copyMakeBorder(matte, *[RADIUS] * 4, cv2.BORDER_REPLICATE) for matte in mattes]
    total = 0.0
    for rows, columns in _busy_windows(busy):
        halo = np.s_[rows.start : rows.stop + 2 * RADIUS, columns.start : columns.stop + 2 * RADIUS]
        first, second = (magnitude(matte[halo])[RADIUS:-RADIUS, RADIUS:-RADIUS] for matte in padded)
        if not alike:
            first, second = first / spread_1, second / spread_2
        if region is None:
            total += cv2.norm(first, second, cv2.NORM_L2SQR)
        else:
            total += cv2.norm(first, second, cv2.NORM_L2SQR, region[rows, columns].view(np.uint8))
    return total / spread_1**2 if alike else total


def _busy_windows(busy: NDArray[np.uint8]) -> Iterator[tuple[slice, slice]]:
    """Yield windows that together hold every pixel whose kernel reaches a busy one, each pixel at most once.

    Neighbouring tiles of a row are joined, up to ``RUN`` pixels, to save their halos.
    """
    height, width = busy.shape
    for top in range(0, height, TILE):
        rows = slice(top, min(top + TILE, height))
        start = stop = 0
        for left in range(0, width, TILE):
            right = min(left + TILE, width)
            reach = busy[max(0, top - RADIUS) : rows.stop + RADIUS, max(0, left - RADIUS) : right + RADIUS]
            if not cv2.hasNonZero(reach):
                continue
            if start < stop == left and right - start <= RUN:
                stop = right
                continue
            if start < stop:
                yield rows, slice(start, stop)
            start, stop = left, right
        if start < stop:
            yield rows, slice(start, stop)
