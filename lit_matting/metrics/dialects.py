"""Two deviating evaluation codes, reproduced so that the numbers published with them can be compared.

Both are the field's de facto scripts, found copied in dozens of repositories; the deviations are theirs, on purpose
kept here. Nothing else in the package uses this module. ``docs/METRICS.md`` says what each does to a score.

- ``python_port``: the Python translation of the Deep Image Matting scripts that came with context-aware and guided
  contextual matting code;
- ``p3m``: the whole-image scripts of the GFM, AM-2k and P3M-10k releases.
"""

from __future__ import annotations

import itertools

import cv2
import numpy as np
from numpy.typing import NDArray

DIALECTS = ("matlab", "python_port", "p3m")


def check(dialect: str) -> str:
    """Return the dialect's name, or say which there are.

    Raises:
        ValueError: If there is none of that name.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"`dialect` must be one of {', '.join(DIALECTS)}, got {dialect!r}.")
    return dialect


def connectivity(
    pred: NDArray[np.float64], alpha: NDArray[np.float64], region: NDArray[np.bool_] | None, dialect: str
) -> float:
    """Return the connectivity error in thousands, as the dialect computes it.

    Args:
        pred: (H, W) in [0, 1].
        alpha: (H, W) in [0, 1].
        region: (H, W) bool, where to sum.
        dialect: "python_port" or "p3m".
    """
    # not j / 10: the accumulated 0.30000000000000004, 0.6000000000000001 and 0.7000000000000001 drop pixels on them
    steps = np.arange(0, 1.1, 0.1)
    level = np.full(alpha.shape, -1.0)
    for before, step in itertools.pairwise(steps):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(
            ((pred >= step) & (alpha >= step)).astype(np.uint8), connectivity=4
        )
        areas = stats[:, cv2.CC_STAT_AREA].copy()
        if dialect == "p3m":
            if areas.size == 1:
                continue
            areas[0] = 0
        # in the port, label 0 competes: where the background is larger, it is "the component"
        level[(level == -1) & (labels != _first_largest(labels, areas))] = before
    level[level == -1] = 1

    def phi(matte: NDArray[np.float64]) -> NDArray[np.float64]:
        rise = matte - level
        return 1 - rise * (rise >= 0.15)

    difference = np.abs(phi(pred) - phi(alpha))
    return float(difference.sum() if region is None else difference[region].sum()) / 1000


def _first_largest(labels: NDArray[np.int32], areas: NDArray[np.int32]) -> int:
    """Return the label with the largest area; background first, then in row-major order of first pixels."""
    tied = np.flatnonzero(areas == areas.max())
    if tied.size == 1 or tied[0] == 0:
        return int(tied[0])
    flat = labels.ravel()
    return int(flat[np.isin(flat, tied).argmax()])


def p3m_gradient(pred: NDArray[np.float64], alpha: NDArray[np.float64], region: NDArray[np.bool_] | None) -> float:
    """Return the gradient error of the P3M family: unit-sum Gaussian, mirrored border, in tens and not in thousands.

    Args:
        pred: (H, W) in [0, 1].
        alpha: (H, W) in [0, 1].
        region: (H, W) bool, where to sum.
    """
    from scipy.ndimage import gaussian_filter

    def size(matte: NDArray[np.float64]) -> NDArray[np.float32]:
        down, across = (gaussian_filter(matte, 1.4, order=order, output=np.float32) for order in ((1, 0), (0, 1)))
        return np.sqrt(down**2 + across**2)

    difference = np.square(size(pred) - size(alpha))
    return float(difference.sum() if region is None else difference[region].sum()) / 10
