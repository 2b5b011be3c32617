"""How an image is cut where it is not refined in one go: into bands of lines, or into square tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch.nn.functional as F
from torch import Tensor

TILE = 256
"""Side of a tile in pixels, even."""


@dataclass(frozen=True)
class Band:
    """Lines ``first`` to ``end - 1`` of an image, and lines ``top`` to ``bottom - 1``, which they depend on."""

    first: int
    end: int
    top: int
    bottom: int


def plan_bands(costs: Sequence[float], budget: float | None, halo: tuple[int, int]) -> list[Band]:
    """Cut an image into as few bands as possible; one that costs more than the budget has a single line.

    Args:
        costs: Of every line.
        budget: What a band with its halo may cost; None: anything.
        halo: Lines above and below that a line depends on.

    Example:
        >>> plan_bands([1.0] * 10, 7, (2, 1))
        [Band(first=0, end=6, top=0, bottom=7), Band(first=6, end=10, top=4, bottom=10)]
    """
    height = len(costs)
    total = [0.0, *accumulate(costs)]

    def band(first: int, end: int) -> Band:
        # a 2 x 2 block of the half resolution begins at an even line
        top = max(first - halo[0], 0) // 2 * 2
        return Band(first, end, top, min(end + halo[1], height))

    bands: list[Band] = []
    while not bands or bands[-1].end < height:
        best = band(bands[-1].end if bands else 0, height)
        if budget is not None and total[best.bottom] - total[best.top] > budget:
            best = band(best.first, best.first + 1)
            while best.end < height:
                longer = band(best.first, best.end + 1)
                if total[longer.bottom] - total[longer.top] > budget:
                    break
                best = longer
        bands.append(best)
    return bands


@dataclass(frozen=True)
class Tile:
    """Pixels of one image of a batch: a tile, or what is around it too."""

    image: int
    rows: slice
    columns: slice

    def around(self, halo: int) -> Tile:
        """Return the tile with so many pixels more on every side, from an even line and column on."""
        rows, columns = (
            slice(max(part.start - halo, 0) // 2 * 2, part.stop + halo) for part in (self.rows, self.columns)
        )
        return Tile(self.image, rows, columns)

    def of(self, maps: Tensor) -> Tensor:
        """Return these pixels of maps (B, ..., H, W), as a batch of one."""
        return maps[self.image : self.image + 1, ..., self.rows, self.columns]

    def part(self, tile: Tile, maps: Tensor) -> Tensor:
        """Return the pixels of a tile inside of this one from maps (..., h, w) of this one."""
        top, left = tile.rows.start - self.rows.start, tile.columns.start - self.columns.start
        height, width = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        return maps[..., top : top + height, left : left + width]


def full_tiles(mask: Tensor, share: float | None, halo: int) -> tuple[list[Tile], Tensor]:
    """Find the tiles of which more than a share is active.

    Args:
        mask: (B, H, W) bool.
        share: In [0, 1]; None: no tile is taken.
        halo: Pixels on every side that a pixel depends on; where it is more than a tile, no tile is taken.

    Returns:
        The tiles, and the mask without the pixels that only they need: (B, H, W), the mask itself where there are none.
    """
    if share is None or halo > TILE:
        return [], mask
    batch, height, width = mask.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    full: set[tuple[int, int, int]] = set()
    for row in range(rows):
        lines = mask[:, row * TILE : (row + 1) * TILE]
        counts = F.pad(lines.sum(1), (0, columns * TILE - width)).view(batch, columns, TILE).sum(2).tolist()
        for image in range(batch):
            for column, count in enumerate(counts[image]):
                if count > share * lines.shape[1] * min(TILE, width - column * TILE):
                    full.add((image, row, column))
    if not full:
        return [], mask
    rest = mask.clone()
    tiles = []
    for image, row, column in sorted(full):
        first, left = row * TILE, column * TILE
        tile = Tile(image, slice(first, min(first + TILE, height)), slice(left, min(left + TILE, width)))
        tiles.append(tile)

        def needed(near: Iterator[tuple[int, int]], image: int = image) -> int:
            # pixels at a side are needed where a tile beside it is not among the full ones
            inside = ((y, x) for y, x in near if 0 <= y < rows and 0 <= x < columns)
            return halo if any((image, y, x) not in full for y, x in inside) else 0

        beside = (-1, 0, 1)
        above, below = (needed((row + side, column + i) for i in beside) for side in (-1, 1))
        before, after = (needed((row + i, column + side) for i in beside) for side in (-1, 1))
        last, right = max(tile.rows.stop - below, first + above), max(tile.columns.stop - after, left + before)
        rest[image, first + above : last, left + before : right] = False
    return tiles, rest
