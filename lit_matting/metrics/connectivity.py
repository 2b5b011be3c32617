"""The connectivity error: how much of a matte has come loose from its largest connected part.

Rhemann et al., "A Perceptually Motivated Online Benchmark for Image Matting" (CVPR 2009), in the form of the Deep
Image Matting release.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from lit_matting.metrics.mattes import as_unit

STEPS = 10


def level_map(pred: NDArray[np.generic], alpha: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return the number of thresholds that both mattes pass at each pixel, (H, W) in 0..10."""
    levels = np.zeros(pred.shape, np.uint8)
    for step in range(1, STEPS + 1):
        levels += at_least(pred, step) & at_least(alpha, step)
    return levels


def at_least(matte: NDArray[np.generic], step: int) -> NDArray[np.bool_]:
    """Return where the matte is >= step / 10, exactly: 153 of 255 is 0.6 and passes."""
    if matte.dtype == np.uint8:
        return matte >= np.uint8(-(-255 * step // STEPS))
    # the threshold is rounded to the matte's own type, so that 153 / 255 passes 0.6 in float16 and float32 too
    return matte >= matte.dtype.type(step / STEPS)


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest 4-connected component of a mask; the first in row-major order where several are as large."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if areas.size == 0:
        return np.zeros_like(mask)
    tied = 1 + np.flatnonzero(areas == areas.max())
    if tied.size > 1:
        first = np.flatnonzero(np.isin(labels.ravel(), tied))[0]
        return labels == labels.ravel()[first]
    return labels == tied[0]


def connected_level(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return, per pixel, the last threshold up to which it stayed in the largest component, (H, W) in 0..10."""
    connected = np.zeros_like(levels)
    alive = np.ones(levels.shape, bool)
    for step in range(1, STEPS + 1):
        alive &= largest_component(levels >= step)
        connected += alive
    return connected


def connectivity_error(
    pred: NDArray[np.generic], alpha: NDArray[np.generic], region: NDArray[np.bool_] | None = None
) -> float:
    """Return the sum of |phi(pred) - phi(alpha)| over the region, not yet divided by 1000."""
    base = connected_level(level_map(pred, alpha)) / STEPS

    def phi(matte: NDArray[np.generic]) -> NDArray[np.float64]:
        distance = as_unit(matte) - base
        return 1 - distance * (distance >= 0.15)

    difference = np.abs(phi(pred) - phi(alpha))
    return float(difference.sum() if region is None else difference[region].sum())
