"""Sampling small maps on the pixels of a photograph: whole maps, some of their lines, or single pixels.

Lines and pixels get the same bits whichever others are asked for, so that a photograph can be worked in bands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_matting.sparse import ActiveSet


def resample(maps: Tensor, size: tuple[int, int], box: Tensor | None = None) -> Tensor:
    """Resample maps (B, C, h, w) bilinearly to ``size``, or the part of them inside ``box`` (B, 4)."""
    if box is None:
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
    top, left, height, width = box.to(maps.dtype).unbind(1)
    y = (torch.arange(size[0], device=maps.device) + 0.5) / size[0] * height[:, None] + top[:, None]
    x = (torch.arange(size[1], device=maps.device) + 0.5) / size[1] * width[:, None] + left[:, None]
    grid = torch.stack([x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], -1)
    return F.grid_sample(maps, 2 * grid - 1, mode="bilinear", padding_mode="border", align_corners=False)


def resample_part(
    maps: Tensor, size: tuple[int, int], rows: slice, columns: slice, box: Tensor | None = None
) -> Tensor:
    """Return some rows and columns of what `resample` gives, up to rounding: (B, C, rows, columns)."""
    y = (torch.arange(size[0], device=maps.device)[rows] + 0.5) / size[0]
    x = (torch.arange(size[1], device=maps.device)[columns] + 0.5) / size[1]
    result = maps.new_empty(*maps.shape[:2], len(y), len(x))
    for number, small in enumerate(maps):
        down, across = y, x
        if box is not None:
            top, left, height, width = box[number].to(maps.dtype).unbind()
            down, across = top + y * height, left + x * width
        low, high, share = _between(across, small.shape[2])
        lines = _mix(small[:, :, low], small[:, :, high], share)
        low, high, share = _between(down, small.shape[1])
        result[number] = _mix(lines[:, low], lines[:, high], share[:, None])
    return result


def pixel_places(
    active: ActiveSet, size: tuple[int, int], box: Tensor | None = None, top: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where every active pixel lies: image (N,), vertical and horizontal place (N,) in shares of the maps.

    Args:
        active: In an image of ``size``, or in a band of it.
        size: Height and width of the whole image, in pixels.
        box: (B, 4), the part of the maps that the image covers.
        top: The band's first line.
    """
    image, row, column = active.coordinates.long().unbind(1)
    y, x = (row + (top + 0.5)) / size[0], (column + 0.5) / size[1]
    if box is not None:
        start, left, height, width = box.to(y.dtype)[image].unbind(1)
        y, x = start + y * height, left + x * width
    return image, y, x


def sample_rows(maps: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Sample maps (B, C, h, w) bilinearly at N places and return rows (N, C).

    The same values as enlarging the maps and gathering, without ever holding C full-size maps: at 24 megapixels those
    would take 3 GB.
    """
    batch, channels, height, width = maps.shape
    table = maps.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
    top, bottom, dy = _between(y, height)
    left, right, dx = _between(x, width)
    start = image * (height * width)
    upper = _mix(table[start + top * width + left], table[start + top * width + right], dx[:, None])
    lower = _mix(table[start + bottom * width + left], table[start + bottom * width + right], dx[:, None])
    return _mix(upper, lower, dy[:, None])


def _between(places: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cells on both sides of places given in shares, and how far each lies from the first to the second."""
    places = (places * length - 0.5).clamp(0, length - 1)
    low = places.floor()
    share = places - low
    low = low.long()
    return low, (low + 1).clamp(max=length - 1), share


def _mix(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Return ``first + share * (second - first)``; ``second`` is overwritten.

    Not torch.lerp: whether that rounds once or twice depends on where in memory a number lies.
    """
    return second.sub_(first).mul_(share).add_(first)
