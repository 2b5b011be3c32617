"""The connectivity error: how much of a matte has come loose from its largest connected part.

Rhemann et al., "A Perceptually Motivated Online Benchmark for Image Matting" (CVPR 2009), in the form of the Deep
Image Matting release: with Omega_j the largest 4-connected component of {p >= j/10 and a >= j/10}, a pixel's level is
the last j up to which it stayed inside, and the error compares how far prediction and truth rise above that level.

Labelling the whole image at ten thresholds is what makes the obvious version slow. Here a few facts are used:

- Omega_{j+1} is connected and lies in the set that Omega_j is a component of, so it is either inside Omega_j or
  disjoint from it; once it is disjoint, no pixel can rise further and the rest need not be looked at;
- a component that holds more than half of its set is the largest without comparing, and one flood fill from a pixel of
  it measures it; so is one that holds more than half of what is left of the previous Omega, and more than the largest
  component outside of that;
- thresholds between which no pixel lies have the same Omega;
- the inside of a solid rectangle is in the component of its rim, and needs no walking through.

Only where no such certificate holds are components labelled.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

STEPS = 10
SCALE = 2550
"""Pixel values (n / 255) and thresholds (j / 10) are both whole numbers of 1 / 2550."""
BLOCK = 16
"""Pixels on a side of the blocks that are looked at as a whole; at most 22, whose mean is exact in 8 bits."""
SEEDS = 2
"""Places to try a flood fill from before all components are labelled."""
MARGIN = 0.15
"""A pixel counts as loose when it rises at least this far above its level."""


def thresholds(dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Return the 11 thresholds 0, 0.1, ..., 1 in a matte's own type.

    Rounded to the type and not computed in float64: so 153 / 255 passes 0.6 in float16 and float32 as well.
    """
    if dtype == np.uint8:
        return np.array([-(-255 * step // STEPS) for step in range(STEPS + 1)], np.uint8)
    return np.array([step / STEPS for step in range(STEPS + 1)]).astype(dtype)


@lru_cache(maxsize=1)
def _level_table() -> NDArray[np.uint8]:
    return (np.searchsorted(thresholds(np.dtype(np.uint8)), np.arange(256), side="right") - 1).astype(np.uint8)


def levels_passed(matte: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return how many of the thresholds 0.1, ..., 1 each pixel passes, (H, W) in 0..10, exactly."""
    if matte.dtype == np.uint8:
        return cv2.LUT(matte, _level_table())
    bounds = np.append(thresholds(matte.dtype), np.array(np.inf, matte.dtype))
    level = (matte * matte.dtype.type(STEPS)).astype(np.uint8)
    # the product is off by at most one rounding: the comparison with the threshold itself decides
    level -= matte < bounds[level]
    level += matte >= bounds[level + 1]
    return level


class _Hollowed:
    """A level map without the insides of its solid blocks, which no fill needs to walk through.

    All pixels of a rectangle at the highest level are in one component at every threshold, and its rim alone connects
    them and whatever touches them. So only the rim stays in the map; the inside counts through the rim's first pixel,
    and takes its value at the end.
    """

    def __init__(self, levels: NDArray[np.uint8]) -> None:
        rows, columns = (size // BLOCK for size in levels.shape)
        self.levels = levels.copy()
        self.insides: list[tuple[slice, slice]] = []
        places = np.zeros((0, 2), np.intp)
        if rows and columns:
            top = (levels[: rows * BLOCK, : columns * BLOCK] == STEPS).view(np.uint8) * np.uint8(255)
            solid = np.zeros((rows, columns + 2), np.int8)
            solid[:, 1:-1] = cv2.resize(top, (columns, rows), interpolation=cv2.INTER_AREA) == 255
            change = np.diff(solid, axis=1)
            starts, ends = np.argwhere(change == 1), np.argwhere(change == -1)
            places = starts * BLOCK
            for (row, left), (_, right) in zip(places.tolist(), (ends * BLOCK).tolist()):
                inside = slice(row + 1, row + BLOCK - 1), slice(left + 1, right - 1)
                self.insides.append(inside)
                self.levels[inside] = 0
        self.rims = places[:, 0], places[:, 1]
        self.weights = np.array([(y.stop - y.start) * (x.stop - x.start) for y, x in self.insides], np.int64)

    def hidden(self, mask: NDArray[np.uint8]) -> int:
        """Return how many pixels a mask of the map stands for beyond its own."""
        return int(self.weights[mask[self.rims] > 0].sum())

    def fill(self, values: NDArray[np.uint8]) -> None:
        """Give the insides the value of their rims."""
        for inside, value in zip(self.insides, values[self.rims].tolist()):
            values[inside] = value

    def flood(self, seed: tuple[int, int], step: int) -> tuple[NDArray[np.uint8], int]:
        """Return the component of {levels >= step} that holds the pixel (row, column), and its area."""
        height, width = self.levels.shape
        mask = np.zeros((height + 2, width + 2), np.uint8)
        base = int(self.levels[seed])
        flags = 4 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | (1 << 8)
        area, *_ = cv2.floodFill(self.levels, mask, seed[::-1], 0, base - step, STEPS - base, flags)
        component = mask[1:-1, 1:-1]
        return component, area + self.hidden(component)

    def largest(self, step: int) -> tuple[NDArray[np.uint8], int, int]:
        """Return the largest component of {levels >= step}, its area, and the next largest area.

        Of components of one size the first in row-major order is taken. There must be one.
        """
        _, labels = cv2.connectedComponents((self.levels >= step).view(np.uint8), connectivity=4)
        flat = labels.ravel()
        areas = np.bincount(flat)
        areas[0] = 0
        np.add.at(areas, labels[self.rims], self.weights)
        chosen = int(areas.argmax())
        area = int(areas[chosen])
        tied = np.flatnonzero(areas == area)
        if tied.size > 1:
            chosen = int(flat[np.isin(flat, tied).argmax()])
        areas[chosen] = 0
        return (labels == chosen).view(np.uint8), area, int(areas.max())

    def seeds(self, omega: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
        """Yield pixels of omega that are probably in the largest component at the next step."""
        if self.weights.size:
            index = int(self.weights.argmax())
            yield int(self.rims[0][index]), int(self.rims[1][index])
        inside = cv2.bitwise_and(self.levels, self.levels, mask=omega)
        rows, columns = (max(1, size // BLOCK) for size in inside.shape)
        coarse = cv2.resize(inside, (columns, rows), interpolation=cv2.INTER_AREA).ravel()
        for index in np.argsort(-coarse.astype(np.int16), kind="stable")[:SEEDS]:
            row, column = divmod(int(index), columns)
            top, left = row * inside.shape[0] // rows, column * inside.shape[1] // columns
            bottom, right = (row + 1) * inside.shape[0] // rows, (column + 1) * inside.shape[1] // columns
            row, column = divmod(int(inside[top:bottom, left:right].argmax()), right - left)
            yield top + row, left + column


def connected_levels(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return, per pixel, the last step up to which it stayed in the largest component, (H, W) in 0..10.

    Args:
        levels: (H, W) in 0..10: how many thresholds both mattes pass.
    """
    connected = np.zeros_like(levels)
    left, top, width, height = cv2.boundingRect(levels)
    if width:
        window = np.s_[top : top + height, left : left + width]
        connected[window] = _connected_levels(levels[window])
    return connected


def _connected_levels(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    levels = np.ascontiguousarray(levels)
    counts = [levels.size, *(int(np.count_nonzero(levels >= step)) for step in range(1, STEPS + 1))]
    connected = np.zeros_like(levels)
    hollowed = _Hollowed(levels)
    omega = np.ones_like(levels)
    # no component outside omega is larger than this
    rival = 0
    seed = (0, 0)
    for step in range(1, STEPS + 1):
        if counts[step] == 0:
            break
        if step == 1 or counts[step] < counts[step - 1]:
            candidate, area = omega, 0
            for place in itertools.chain([seed], hollowed.seeds(omega)):
                if omega[place] and hollowed.levels[place] >= step:
                    component, size = hollowed.flood(place, step)
                    if size > area:
                        candidate, area, seed = component, size, place
                if 2 * area > counts[step]:
                    break
            if 2 * area > counts[step]:
                rival = counts[step] - area
            else:
                inside = cv2.bitwise_and(hollowed.levels, hollowed.levels, mask=omega)
                within = int(np.count_nonzero(inside >= step)) + hollowed.hidden(omega)
                if within == 0:
                    break
                if area > rival and 2 * area > within:
                    rival = max(rival, within - area)
                else:
                    candidate, area, rival = hollowed.largest(step)
                    row, column = divmod(int(candidate.argmax()), candidate.shape[1])
                    if not omega[row, column]:
                        break
                    if not candidate[seed]:
                        seed = row, column
            omega = candidate
        connected += omega
    hollowed.fill(connected)
    return connected


@lru_cache(maxsize=1)
def _looseness_table() -> NDArray[np.int64]:
    """Return 2550 (1 - phi) for each level and 8-bit value, (11, 256): whole numbers, so that sums are exact."""
    rise = STEPS * np.arange(256)[None, :] - 255 * np.arange(STEPS + 1)[:, None]
    return np.where(rise >= MARGIN * SCALE, rise, 0)


def _difference_8bit(
    pred: NDArray[np.uint8],
    alpha: NDArray[np.uint8],
    connected: NDArray[np.uint8],
    region: NDArray[np.bool_] | None,
) -> float:
    """Return the sum of |phi(pred) - phi(alpha)| of 8-bit mattes, exactly.

    At one level phi never rises with the value, so the absolute difference is phi(smaller) - phi(larger): two counts of
    (level, value) pairs hold all there is to sum.
    """
    differs = (pred != alpha if region is None else (pred != alpha) & region).view(np.uint8)
    left, top, width, height = cv2.boundingRect(differs)
    if width == 0:
        return 0.0
    # counts are float32 in OpenCV, exact up to 2^24: larger images are counted in bands
    rows = max(1, 2**24 // width)
    total = 0
    for start in range(top, top + height, rows):
        band = np.s_[start : min(start + rows, top + height), left : left + width]
        larger, smaller = (
            cv2.calcHist([connected[band], one], [0, 1], differs[band], [STEPS + 1, 256], [0, STEPS + 1, 0, 256])
            for one in (cv2.max(pred[band], alpha[band]), cv2.min(pred[band], alpha[band]))
        )
        total += int(((larger.astype(np.int64) - smaller.astype(np.int64)) * _looseness_table()).sum())
    return total / SCALE


def connectivity_error(
    pred: NDArray[np.generic], alpha: NDArray[np.generic], region: NDArray[np.bool_] | None = None
) -> float:
    """Return the sum of |phi(pred) - phi(alpha)| over the region, not yet divided by 1000.

    Args:
        pred: (H, W) uint8, or float in [0, 1].
        alpha: (H, W), the same.
        region: (H, W) bool, where to sum; the components are those of the whole image.
    """
    if alpha.size == 0:
        return 0.0
    connected = connected_levels(cv2.min(levels_passed(pred), levels_passed(alpha)))
    if pred.dtype == alpha.dtype == np.uint8:
        return _difference_8bit(pred, alpha, connected, region)
    base = connected / STEPS
    rises = [(matte / 255.0 if matte.dtype == np.uint8 else matte.astype(np.float64)) - base for matte in (pred, alpha)]
    difference = np.abs(rises[0] * (rises[0] >= MARGIN) - rises[1] * (rises[1] >= MARGIN))
    return float(difference.sum() if region is None else difference[region].sum())
