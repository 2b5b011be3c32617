"""Who reads whom: neighbour tables in the form that the PyTorch backend streams through.

A convolution on rows reads, for every output row, a handful of input rows. Both sides are in raster order, so the
inputs that a block of consecutive outputs needs lie close together: a *window* of a few image rows slides over the
inputs while the outputs are computed. Tables name a place in that window (input row modulo its capacity) and not an
input row, so the backend keeps the window, and nothing else, in a buffer of the size of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_matting.sparse.memory import fresh

BLOCK_ROWS = 1024
"""Outputs computed, and inputs taken into the window, at a time on a CPU."""

DEVICE_BLOCK_ROWS = 2**18
"""The same on other devices: large enough to fill them, small enough to bound the memory."""

_GRID_PIXELS = 2**19
"""Pixels of the look-up grid at a time: 2 MiB stay in a cache, a whole image does not."""

_LOOKUP_BLOCKS = 16
"""At most so many blocks are looked up at a time: it bounds the memory where every pixel is active."""


@dataclass(frozen=True)
class Reads:
    """What every output row reads from the input rows."""

    inputs: int
    """Number of input rows."""
    outputs: int
    """Number of output rows."""
    table: Tensor
    """(outputs, width) int32: the place in the window that a column reads, `capacity` where that pixel is not active.
    Without `columns`: place * taps + tap of everything that is read, filled up with capacity * taps."""
    columns: tuple[int, ...] | None
    """The kernel tap that each column of the table stands for."""
    taps: int
    """Number of kernel taps."""
    block: int
    """Rows of a block, of outputs as of inputs."""
    capacity: int
    """Rows of the window: whole blocks."""
    taken: tuple[int, ...]
    """For every block of outputs, how many blocks of inputs must have been taken into the window before it."""


@dataclass(frozen=True)
class Rulebook:
    """One sparse convolution in both directions, so that no backward pass has to scatter."""

    forward: Reads
    """What the outputs read from the inputs."""
    backward: Reads
    """What the gradients of the inputs read from the gradients of the outputs."""

    def reversed(self) -> Rulebook:
        """The transposed convolution, from the outputs back to the inputs."""
        return Rulebook(self.backward, self.forward)


@dataclass(frozen=True)
class Pixels:
    """The active pixels of a batch of images, in raster order."""

    image: Tensor | int
    """(N,) int64, or 0 for a single image."""
    y: Tensor
    """(N,) int64."""
    x: Tensor
    """(N,) int64."""
    height: int
    width: int

    def step(self, reach: int) -> int:
        """Distance between a pixel and the one below it in the flat positions of `at`."""
        return self.width + reach

    def at(self, reach: int, image: Tensor | int, y: Tensor, x: Tensor) -> Tensor:
        """Flat int64 positions with `reach` inactive pixels after every row and `reach` such rows before every image.

        So every step of up to `reach` pixels in y and x ends at a pixel of the same image or at one that is not active,
        and no look-up has to compare coordinates.
        """
        return ((image * (self.height + reach) + y + reach) * self.step(reach) + x).add_(reach)


def submanifold(pixels: Pixels, kernel_size: int) -> Rulebook:
    """The rulebook of an odd kernel that stays on its set."""
    reach = kernel_size // 2
    positions = pixels.at(reach, pixels.image, pixels.y, pixels.x)
    window = range(-reach, reach + 1)
    offsets = [dy * pixels.step(reach) + dx for dy in window for dx in window]
    taps = tuple(range(kernel_size**2))
    forward = _look_up(positions, positions, offsets, taps)
    # the pixel that reads me through a tap is the one that I see through the mirrored tap
    return Rulebook(forward, replace(forward, columns=taps[::-1]))


def downsampling(fine: Pixels, coarse: Pixels, kernel_size: int) -> Rulebook:
    """The rulebook of a kernel of size 2 or 3 and stride 2.

    Tap (i, j) of output (y, x) reads input (2y + i, 2x + j) for size 2, and (2y + i - 1, 2x + j - 1) for size 3.
    """
    first = -(kernel_size // 3)
    window = range(first, first + kernel_size)
    forward = _look_up(
        fine.at(1, fine.image, fine.y, fine.x),
        fine.at(1, coarse.image, coarse.y * 2, coarse.x * 2),
        [dy * fine.step(1) + dx for dy in window for dx in window],
        tuple(range(kernel_size**2)),
    )
    # a fine pixel belongs to one output in every direction, or to two if the kernel overlaps and its parity is odd
    around = range(kernel_size - 1)
    places = [(dy, dx) for dy in around for dx in around]
    found = _look_up(
        coarse.at(1, coarse.image, coarse.y, coarse.x),
        coarse.at(1, fine.image, fine.y >> 1, fine.x >> 1),
        [dy * coarse.step(1) + dx for dy, dx in places],
        tuple(range(len(places))),
    )
    taps = kernel_size**2
    nothing = found.capacity * taps
    # the tap that links a fine pixel of a parity to each of its places, none where it would lie before the kernel
    links = [[(y - 2 * dy - first, x - 2 * dx - first) for dy, dx in places] for y in (0, 1) for x in (0, 1)]
    tap = [[i * kernel_size + j if min(i, j) >= 0 else nothing for i, j in row] for row in links]
    parity = ((fine.y & 1) << 1) | (fine.x & 1)
    codes = torch.tensor(tap, dtype=torch.int32, device=parity.device)[parity]
    codes.add_(found.table, alpha=taps).clamp_(max=nothing)
    return Rulebook(forward, replace(found, table=codes, columns=None, taps=taps))


def _look_up(sources: Tensor, anchors: Tensor, offsets: list[int], columns: tuple[int, ...]) -> Reads:
    """Find the source row at ``anchor + offset``, for all anchors and offsets.

    Args:
        sources: (inputs,) int64, ascending positions of the input rows.
        anchors: (outputs,) int64, positions in the same flat image, ascending as far as makes the window small.
        offsets: One per column.
        columns: The tap of each column.
    """
    inputs, outputs = len(sources), len(anchors)
    most = BLOCK_ROWS if sources.device.type == "cpu" else DEVICE_BLOCK_ROWS
    block = min(most, max(inputs, outputs, 1))
    low, high = _spans(anchors, block, min(offsets), max(offsets))
    capacity, taken = _window(sources, low, high, block)

    places = torch.arange(inputs, dtype=torch.int32, device=sources.device).remainder_(capacity)
    table = fresh(outputs, len(offsets), like=places)
    steps = torch.tensor(offsets, dtype=torch.int32, device=sources.device)
    groups = _groups(low.tolist(), high.tolist())
    edges = torch.tensor([edge for _, _, start, end in groups for edge in (start, end)], device=sources.device)
    rows = torch.searchsorted(sources, edges.long()).tolist()
    grid = places[:0]
    for number, (first, last, start, end) in enumerate(groups):
        if end - start > len(grid):
            grid = places.new_empty(end - start)
        grid[: end - start] = capacity
        inside = slice(rows[2 * number], rows[2 * number + 1])
        grid.scatter_(0, sources[inside] - start, places[inside])
        chunk = slice(first * block, last * block)
        wanted = (anchors[chunk] - start).int()[:, None] + steps
        torch.index_select(grid, 0, wanted.view(-1), out=table[chunk].view(-1))
    return Reads(inputs, outputs, table, columns, len(columns), block, capacity, taken)


def _spans(anchors: Tensor, block: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The lowest position that every block of anchors looks at, and the highest."""
    missing = -len(anchors) % block
    blocks = torch.cat((anchors, anchors[-1:].expand(missing))).view(-1, block)
    lowest, highest = torch.aminmax(blocks, dim=1) if len(blocks) else (anchors, anchors)
    return lowest + low, highest + high


def _window(sources: Tensor, low: Tensor, high: Tensor, block: int) -> tuple[int, tuple[int, ...]]:
    """Capacity of the window in rows, and the blocks of sources taken before every block of anchors."""
    if len(low) == 0:
        return block, ()
    first = torch.searchsorted(sources, low).div_(block, rounding_mode="floor")
    end = torch.searchsorted(sources, high, right=True).add_(block - 1).div_(block, rounding_mode="floor")
    taken = torch.cummax(end, 0).values
    return max(int((taken - first).max()), 1) * block, tuple(taken.tolist())


def _groups(low: list[int], high: list[int]) -> list[tuple[int, int, int, int]]:
    """Consecutive blocks that look at a small grid together: first block, end block, first position, end position."""
    groups: list[tuple[int, int, int, int]] = []
    for number, (lowest, highest) in enumerate(zip(low, high)):
        if groups:
            first, _, start, end = groups[-1]
            wider = (min(start, lowest), max(end, highest + 1))
            if number - first < _LOOKUP_BLOCKS and wider[1] - wider[0] <= _GRID_PIXELS:
                groups[-1] = (first, number + 1, *wider)
                continue
        groups.append((number, number + 1, lowest, highest + 1))
    return groups
