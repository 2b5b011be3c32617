"""The refiner's network: a small U-Net on the active pixels only."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_matting.sparse import ActiveSet, InverseConv2d, SparseConv2d, SubmanifoldConv2d


class SparseUNet(nn.Module):
    """Submanifold convolutions on the active pixels and on the active 2 x 2 blocks; zero at the start.

    Args:
        in_channels: Channels of an active pixel.
        widths: Channels of the fine and of the coarse level.
        blocks: Residual blocks on the coarse level.
    """

    def __init__(self, in_channels: int, widths: tuple[int, int] = (32, 64), blocks: int = 2) -> None:
        super().__init__()
        fine, coarse = widths
        self.enter = SubmanifoldConv2d(in_channels, fine)
        self.down = SparseConv2d(fine, coarse)
        self.blocks = nn.ModuleList(SparseBlock(coarse) for _ in range(blocks))
        self.up = InverseConv2d(coarse, fine)
        self.join = SubmanifoldConv2d(2 * fine, fine)
        self.narrow = SubmanifoldConv2d(fine, max(8, fine // 2))
        self.leave = SubmanifoldConv2d(max(8, fine // 2), 1, kernel_size=1)
        # an untrained refiner is the identity
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, rows: Tensor, active: ActiveSet) -> Tensor:
        """Map rows (N, ``in_channels``) of the active pixels to corrections (N, 1)."""
        fine = F.leaky_relu(self.enter(rows, active), 0.1)
        coarse = F.leaky_relu(self.down(fine, active), 0.1)
        for block in self.blocks:
            coarse = block(coarse, active.strided())
        back = F.leaky_relu(self.up(coarse, active), 0.1)
        joined = F.leaky_relu(self.join(torch.cat([fine, back], 1), active), 0.1)
        return self.leave(F.leaky_relu(self.narrow(joined, active), 0.1), active)

    def dense(self, maps: Tensor, mask: Tensor) -> Tensor:
        """Return what `forward` gives on the active pixels, up to rounding, by dense convolutions: (B, 1, H, W).

        Faster where nearly all pixels are active, and without gradients only: it works in place.

        Args:
            maps: (B, ``in_channels``, H, W).
            mask: (B, H, W) bool, the active pixels.
        """
        on = mask[:, None].to(maps.dtype)
        cells = F.max_pool2d(on, 2, ceil_mode=True)
        # channels last: half the time of the default layout on a CPU
        maps = (maps * on).contiguous(memory_format=torch.channels_last)
        fine = F.leaky_relu_(self.enter.dense(maps), 0.1).mul_(on)
        coarse = F.leaky_relu_(self.down.dense(fine), 0.1).mul_(cells)
        for block in self.blocks:
            coarse = block.dense(coarse, cells)
        back = F.leaky_relu_(self.up.dense(coarse, maps.shape[2:]), 0.1).mul_(on)
        joined = F.leaky_relu_(self.join.dense(torch.cat([fine, back], 1)), 0.1).mul_(on)
        return self.leave.dense(F.leaky_relu_(self.narrow.dense(joined), 0.1))

    def halo(self) -> tuple[int, int]:
        """Return how many lines above and how many below a line it depends on, at most."""
        reached = [(line, *self.reads(line, line)) for line in (0, 1)]
        return max(line - first for line, first, _ in reached), max(last - line for line, _, last in reached)

    def reads(self, first: int, last: int) -> tuple[int, int]:
        """Return the first and last line of pixels that the corrections of lines ``first`` to ``last`` depend on.

        Lines outside of the image may be among them. Only what is computed from these lines is needed, but a part of
        an image must begin at an even line, where a 2 x 2 block begins.
        """
        for layer in (self.leave, self.narrow, self.join):
            first, last = layer.reads(first, last)
        coarse = self.up.reads(first, last)
        for block in reversed(self.blocks):
            coarse = block.reads(*coarse)
        deep = self.down.reads(*coarse)
        return self.enter.reads(min(first, deep[0]), max(last, deep[1]))


class SparseBlock(nn.Module):
    """Two submanifold convolutions with a residual connection, normalised per pixel.

    Per pixel, not per batch: batch statistics would differ between ranks and with the number of active pixels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.first = SubmanifoldConv2d(channels, channels)
        self.second = SubmanifoldConv2d(channels, channels)

    def forward(self, rows: Tensor, active: ActiveSet) -> Tensor:
        hidden = F.leaky_relu(self.first(self.norm(rows), active), 0.1)
        return rows + self.second(hidden, active)

    def dense(self, maps: Tensor, on: Tensor) -> Tensor:
        """As `SparseUNet.dense`; maps (B, C, H, W) and active pixels (B, 1, H, W) as numbers."""
        hidden = self.norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * on
        hidden = F.leaky_relu_(self.first.dense(hidden), 0.1).mul_(on)
        return self.second.dense(hidden).mul_(on).add_(maps)

    def reads(self, first: int, last: int) -> tuple[int, int]:
        """As `SparseUNet.reads`, in lines of blocks."""
        return self.first.reads(*self.second.reads(first, last))
