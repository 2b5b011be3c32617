"""The active set: which pixels a sparse layer computes, and which rows are whose neighbours.

A sparse image is a table of features (N, C), one row per active pixel, in batch-major raster order: the order of
``image.permute(0, 2, 3, 1)[mask]``. Everything else that the layers need (who is next to whom, the set at half
resolution) depends on the mask alone, so it lives here, is built when first asked for, and is shared by every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_matting.checks import check_shape

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Keep ``torch.compile`` out of a function whose shapes depend on data.

    ``torch.compiler.disable`` imports the compiler (about a second) when it decorates; this waits for a compilation.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


@dataclass(frozen=True)
class TapGroup:
    """Output rows that read the same kernel taps."""

    taps: tuple[int, ...]
    """Positions in the raster order of the kernel, one per column of ``table``."""
    table: Tensor
    """(n, len(taps)) int32: the input row that a tap reads, or ``inputs`` where that pixel is not active."""
    rows: Tensor | None = None
    """(n,) int64: the output rows of this group; None: all of them, in order."""


@dataclass(frozen=True)
class Rulebook:
    """Who reads whom in one sparse convolution, in both directions, so that no backward pass has to scatter."""

    inputs: int
    """Number of input rows."""
    outputs: int
    """Number of output rows."""
    groups: tuple[TapGroup, ...]
    """What every output row reads from the inputs."""
    backward_groups: tuple[TapGroup, ...]
    """What the gradient of every input row reads from the gradients of the outputs."""

    def reversed(self) -> Rulebook:
        """The rulebook from outputs back to inputs: the transposed convolution."""
        return Rulebook(self.outputs, self.inputs, self.backward_groups, self.groups)


class ActiveSet:
    """The active pixels of a batch of images; build it with `from_mask`.

    Tables are built on first use and kept. Two threads that ask at the same moment both build the same table and keep
    one, so no lock is needed and a set can be pickled.

    Attributes:
        mask: (B, H, W) bool.
        indices: (N,) int64, position of every active pixel in the flattened mask, ascending.
        shape: (B, H, W).
        counts: Number of active pixels of every image.
    """

    def __init__(self, mask: Tensor, indices: Tensor, counts: tuple[int, ...]) -> None:
        self.mask = mask
        self.indices = indices
        self.shape: tuple[int, int, int] = (mask.shape[0], mask.shape[1], mask.shape[2])
        self.counts = counts
        self._cache: dict[Any, Any] = {}

    @classmethod
    @eager
    def from_mask(cls, mask: Tensor) -> ActiveSet:
        """The active set of a mask.

        Args:
            mask: (B, H, W) bool, on any device; it may be all False. It is kept, not copied: do not change it later.

        Raises:
            ValueError: If the mask is not boolean, not (B, H, W), or has more than 2**31 - 1 pixels.

        Example:
            >>> active = ActiveSet.from_mask(torch.tensor([[[True, False], [True, True]]]))
            >>> len(active), active.indices.tolist()
            (3, [0, 2, 3])
        """
        check_shape(mask, ("B", "H", "W"), "mask")
        if mask.dtype != torch.bool:
            raise ValueError(f"`mask` must be boolean, got {mask.dtype} (compare it with a threshold first).")
        if mask.numel() > 2**31 - 1:
            raise ValueError(f"`mask` must have at most 2**31 - 1 pixels, got {tuple(mask.shape)} (work in bands).")
        mask = mask.detach().contiguous()
        indices = mask.view(-1).nonzero().view(-1)
        counts = (len(indices),) if len(mask) == 1 else tuple(mask.flatten(1).sum(1).tolist())
        return cls(mask, indices, counts)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"ActiveSet({len(self)} of {self.mask.numel()} pixels, shape={self.shape}, device={self.device})"

    @property
    def device(self) -> torch.device:
        """Where the mask and all tables are."""
        return self.indices.device

    @property
    def coordinates(self) -> Tensor:
        """(N, 3) int32, contiguous: image, row and column of every active pixel."""
        return self._once("coordinates", self._coordinates)

    def neighbours(self, kernel_size: int) -> Tensor:
        """The rows around every row, in the raster order of an odd square kernel.

        Returns:
            (N, kernel_size**2) int32; N stands for a pixel that is not active or outside the image.

        Example:
            >>> active = ActiveSet.from_mask(torch.tensor([[[True, True], [False, True]]]))
            >>> active.neighbours(3)[2].tolist()  # the pixel at the lower right
            [0, 1, 3, 3, 2, 3, 3, 3, 3]
        """
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` of a submanifold convolution must be odd, got {kernel_size}.")
        reach = kernel_size // 2
        offsets = range(-reach, reach + 1)
        return self._once(
            ("neighbours", kernel_size),
            lambda: self._lookup(self.coordinates, 1, [(dy, dx) for dy in offsets for dx in offsets]),
        )

    def submanifold(self, kernel_size: int) -> Rulebook:
        """The rulebook of a convolution that stays on this set."""

        def build() -> Rulebook:
            table = self.neighbours(kernel_size)
            taps = tuple(range(kernel_size**2))
            # the pixel that reads me through a tap is the one that I see through the mirrored tap
            mirrored = TapGroup(taps[::-1], table)
            return Rulebook(len(self), len(self), (TapGroup(taps, table),), (mirrored,))

        return self._once(("submanifold", kernel_size), build)

    def strided(self) -> ActiveSet:
        """The active set at half resolution, (B, ceil(H / 2), ceil(W / 2)): every 2x2 cell with an active pixel in it.

        The same set serves kernel sizes 2 and 3. For size 3 it is a choice: spconv also activates outputs that see an
        active pixel only through the first row or column of the kernel, which belong to the cell before; a cell without
        an active pixel has no fine pixel to return to, so such outputs would only make the set grow.
        """

        def build() -> ActiveSet:
            _, height, width = self.shape
            padded = torch.nn.functional.pad(self.mask, (0, width % 2, 0, height % 2))
            rows = padded[:, 0::2] | padded[:, 1::2]
            return ActiveSet.from_mask(rows[:, :, 0::2] | rows[:, :, 1::2])

        return self._once("strided", build)

    def downsampling(self, kernel_size: int) -> Rulebook:
        """The rulebook of a convolution of stride 2 from this set to `strided`.

        Tap (i, j) of output (y, x) reads input (2y + i, 2x + j) for size 2, and (2y + i - 1, 2x + j - 1) for size 3.
        """
        if kernel_size not in (2, 3):
            raise ValueError(f"`kernel_size` of a strided convolution must be 2 or 3, got {kernel_size}.")
        return self._once(("downsampling", kernel_size), lambda: self._downsampling(kernel_size))

    def _downsampling(self, kernel_size: int) -> Rulebook:
        coarse = self.strided()
        first = -(kernel_size // 3)
        window = range(first, first + kernel_size)
        down = self._lookup(coarse.coordinates, 2, [(dy, dx) for dy in window for dx in window])
        forward = (TapGroup(tuple(range(kernel_size**2)), down),)
        # a fine pixel belongs to 1, 2 or 4 outputs, by the parity of its position
        y, x = self.coordinates[:, 1], self.coordinates[:, 2]
        backward = []
        for row_parity in (0, 1):
            for column_parity in (0, 1):
                rows = ((y % 2 == row_parity) & (x % 2 == column_parity)).nonzero().view(-1)
                reads = [
                    (i * kernel_size + j, (row_parity - first - i) // 2, (column_parity - first - j) // 2)
                    for i in range(kernel_size)
                    for j in range(kernel_size)
                    if (row_parity - first - i) % 2 == 0 and (column_parity - first - j) % 2 == 0
                ]
                places = self.coordinates[rows]
                places[:, 1:] //= 2
                # tap (i, j) links fine row Y and coarse row y where Y = 2y + i + first
                table = coarse._lookup(places, 1, [(dy, dx) for _, dy, dx in reads])
                backward.append(TapGroup(tuple(tap for tap, _, _ in reads), table, rows))
        return Rulebook(len(self), len(coarse), forward, tuple(backward))

    def _coordinates(self) -> Tensor:
        _, height, width = self.shape
        rows = self.indices.div(width, rounding_mode="floor")
        images = rows.div(height, rounding_mode="floor")
        return torch.stack((images, rows - images * height, self.indices - rows * width), dim=1).int().contiguous()

    def _lookup(self, places: Tensor, stride: int, offsets: list[tuple[int, int]]) -> Tensor:
        """(n, len(offsets)) int32: the row of this set at ``stride * place + offset`` for every (image, y, x) place."""
        batch, height, width = self.shape
        # a border as wide as the kernel reaches makes every look-up fall inside the grid
        border = max((abs(step) for offset in offsets for step in offset), default=0) + stride
        padded_height, padded_width = height + 2 * border, width + 2 * border
        grid = torch.full((batch, padded_height, padded_width), len(self), dtype=torch.int32, device=self.device)
        number = torch.arange(len(self), dtype=torch.int32, device=self.device)
        grid[:, border : border + height, border : border + width][self.mask] = number
        image, y, x = places.long().unbind(1)
        flat = (image * padded_height + y * stride + border) * padded_width + x * stride + border
        table = torch.empty((len(places), len(offsets)), dtype=torch.int32, device=self.device)
        for column, (dy, dx) in enumerate(offsets):
            table[:, column] = grid.view(-1)[flat + (dy * padded_width + dx)]
        return table

    def _once(self, key: Any, build: Callable[[], Any]) -> Any:
        if key not in self._cache:
            # setdefault: of two threads that built it, the first one's table is kept by both
            self._cache.setdefault(key, build())
        return self._cache[key]
