"""The active set: which pixels a sparse layer computes, and which rows are whose neighbours.

A sparse image is a table of features (N, C), one row per active pixel, in batch-major raster order: the order of
``image.permute(0, 2, 3, 1)[mask]``. Everything else that the layers need (who is next to whom, the set at half
resolution) depends on the mask alone, so it lives here, is built when first asked for, and is shared by every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lit_matting.checks import check_shape
from lit_matting.sparse import rulebook
from lit_matting.sparse.rulebook import Rulebook

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


class ActiveSet:
    """The active pixels of a batch of images; build it with `from_mask`.

    Tables are built on first use and kept. Two threads that ask at the same moment both build the same table and keep
    one, so no lock is needed and a set can be pickled.

    Attributes:
        mask: (B, H, W) bool.
        indices: (N,) int64, position of every active pixel in the flattened mask, ascending.
        shape: (B, H, W).
    """

    def __init__(self, mask: Tensor, indices: Tensor) -> None:
        self.mask = mask
        self.indices = indices
        self.shape: tuple[int, int, int] = (mask.shape[0], mask.shape[1], mask.shape[2])
        self._cache: dict[Hashable, Any] = {}

    @classmethod
    @eager
    def from_mask(cls, mask: Tensor) -> ActiveSet:
        """The active set of a mask.

        Args:
            mask: (B, H, W) bool, on any device; it may be all False. It is kept, not copied: do not change it later.

        Raises:
            ValueError: If the mask is not boolean, not (B, H, W), or has more than 2**30 pixels.

        Example:
            >>> active = ActiveSet.from_mask(torch.tensor([[[True, False], [True, True]]]))
            >>> len(active), active.indices.tolist()
            (3, [0, 2, 3])
        """
        check_shape(mask, ("B", "H", "W"), "mask")
        if mask.dtype != torch.bool:
            raise ValueError(f"`mask` must be boolean, got {mask.dtype} (compare it with a threshold first).")
        if mask.numel() > 2**30:
            raise ValueError(f"`mask` must have at most 2**30 pixels, got {tuple(mask.shape)} (work in bands).")
        mask = mask.detach().contiguous()
        if mask.device.type == "cpu":
            # four times as fast as Tensor.nonzero
            indices = torch.from_numpy(np.flatnonzero(mask.numpy()))
        else:
            indices = mask.view(-1).nonzero().view(-1)
        return cls(mask, indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"ActiveSet({len(self)} of {self.mask.numel()} pixels, shape={self.shape}, device={self.device})"

    @property
    def device(self) -> torch.device:
        """Where the mask and all tables are."""
        return self.indices.device

    @property
    @eager
    def coordinates(self) -> Tensor:
        """(N, 3) int32, contiguous: image, row and column of every active pixel."""
        return self.cached("coordinates", self._coordinates)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of every image, and at the end the number of rows."""
        return self.cached("starts", self._starts)

    def neighbours(self, kernel_size: int) -> Tensor:
        """The rows around every row, in the raster order of an odd square kernel: the readable form of `submanifold`.

        Returns:
            (N, kernel_size**2) int64; N stands for a pixel that is not active or outside the image.

        Example:
            >>> active = ActiveSet.from_mask(torch.tensor([[[True, True], [False, True]]]))
            >>> active.neighbours(3)[2].tolist()  # the pixel at the lower right
            [0, 1, 3, 3, 2, 3, 3, 3, 3]
        """
        reads = self.submanifold(kernel_size).forward
        own = torch.arange(len(self), device=self.device)[:, None]
        # rows of one place in the window are a capacity apart; a neighbour is nearer, and on the side of its column
        after = torch.arange(kernel_size**2, device=self.device) >= kernel_size**2 // 2
        distance = torch.where(after, (reads.table - own) % reads.capacity, -((own - reads.table) % reads.capacity))
        return torch.where(reads.table < reads.capacity, own + distance, len(self))

    def submanifold(self, kernel_size: int) -> Rulebook:
        """The rulebook of a convolution that stays on this set."""
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` of a submanifold convolution must be odd, got {kernel_size}.")
        return self.cached(("submanifold", kernel_size), lambda: rulebook.submanifold(self._pixels(), kernel_size))

    def downsampling(self, kernel_size: int) -> Rulebook:
        """The rulebook of a convolution of stride 2 from this set to `strided`, of kernel size 2 or 3."""
        if kernel_size not in (2, 3):
            raise ValueError(f"`kernel_size` of a strided convolution must be 2 or 3, got {kernel_size}.")
        return self.cached(
            ("downsampling", kernel_size),
            lambda: rulebook.downsampling(self._pixels(), self.strided()._pixels(), kernel_size),
        )

    @eager
    def strided(self) -> ActiveSet:
        """The active set at half resolution, (B, ceil(H / 2), ceil(W / 2)): every 2x2 cell with an active pixel in it.

        The same set serves kernel sizes 2 and 3. For size 3 it is a choice: spconv also activates outputs that see an
        active pixel only through the first row or column of the kernel, which belong to the cell before; a cell without
        an active pixel has no fine pixel to return to, so such outputs would only make the set grow.
        """
        return self.cached("strided", self._strided)

    def _strided(self) -> ActiveSet:
        _, height, width = self.shape
        even = torch.nn.functional.pad(self.mask, (0, width % 2, 0, height % 2))
        rows = even[:, 0::2] | even[:, 1::2]
        # two bytes read as one number: the fastest way to ask for either of two neighbours
        return ActiveSet.from_mask(rows.view(torch.int16) != 0)

    def _pixels(self) -> rulebook.Pixels:
        batch, height, width = self.shape
        rows = self.indices.div(width, rounding_mode="floor")
        x = self.indices - rows * width
        if batch == 1:
            return rulebook.Pixels(0, rows, x, height, width)
        image = rows.div(height, rounding_mode="floor")
        return rulebook.Pixels(image, rows - image * height, x, height, width)

    def _starts(self) -> tuple[int, ...]:
        batch, height, width = self.shape
        if batch == 1:
            return (0, len(self))
        edges = torch.arange(batch + 1, device=self.device) * (height * width)
        return tuple(torch.searchsorted(self.indices, edges).tolist())

    def _coordinates(self) -> Tensor:
        pixels = self._pixels()
        image = torch.zeros_like(pixels.y) if isinstance(pixels.image, int) else pixels.image
        return torch.stack((image, pixels.y, pixels.x), dim=1).int().contiguous()

    def cached(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """What belongs to this set under a key, built on first use; backends keep their own tables here."""
        if key not in self._cache:
            # setdefault: of two threads that built it, the first one's is kept by both
            self._cache.setdefault(key, build())
        return self._cache[key]

    def recall(self, key: Hashable) -> Any | None:
        """What `cached` has kept under a key, or None."""
        return self._cache.get(key)
