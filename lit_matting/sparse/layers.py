"""Sparse convolutions as modules, called as ``layer(features, active)``.

Precision: a layer computes in the dtype of its features and returns that dtype; weights and bias are cast to it for the
call. Autocast changes nothing here, forward or backward: cast the features to choose.

State dicts hold ``weight`` (O, I, kh, kw) and ``bias`` (O,), whatever the backend, so a model trained with one
runs with the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_matting.checks import check_shape
from lit_matting.sparse import spconv_ops, torch_ops
from lit_matting.sparse.active import ActiveSet, Rulebook, eager

Backend = Literal["auto", "torch", "spconv"]


class _SparseLayer(nn.Module):
    """Weights and bias, initialised as `torch.nn.Conv2d` does, and the choice of the backend."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool, backend: Backend) -> None:
        super().__init__()
        if backend not in ("auto", "torch", "spconv"):
            raise ValueError(f"`backend` must be 'auto', 'torch' or 'spconv', got {backend!r}.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.backend: Backend = backend
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, uniform with the bound 1 / sqrt(fan-in)."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * self.kernel_size**2)
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        backend = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}{bias}{backend}"

    def _cast(self, features: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
        check_shape(features, (rows, self.in_channels), "features")
        if not features.is_floating_point():
            raise ValueError(f"`features` must be floating point, got {features.dtype}.")
        return self.weight.to(features.dtype), None if self.bias is None else self.bias.to(features.dtype)


class SubmanifoldConv2d(_SparseLayer):
    """Convolution that computes the active pixels only and reads inactive ones as zero.

    On the active set it equals ``F.conv2d(image * mask, weight, bias, padding=kernel_size // 2)``; the set never grows.

    Args:
        in_channels: Channels of the input rows.
        out_channels: Channels of the output rows.
        kernel_size: Odd side of the square kernel.
        bias: Add a learned bias.
        backend: 'auto' takes spconv where it is installed and fits (CUDA, fp16 or fp32), else torch.

    Example:
        >>> active = ActiveSet.from_mask(torch.ones(1, 4, 4, dtype=torch.bool))
        >>> SubmanifoldConv2d(3, 8)(torch.zeros(16, 3), active).shape
        torch.Size([16, 8])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = True, backend: Backend = "auto"
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` of SubmanifoldConv2d must be odd, got {kernel_size}.")
        super().__init__(in_channels, out_channels, kernel_size, bias, backend)

    @eager
    def forward(self, features: Tensor, active: ActiveSet) -> Tensor:
        """(N, in_channels) on `active` -> (N, out_channels) on `active`."""
        weight, bias = self._cast(features, len(active))
        if spconv_ops.chosen(self.backend, features):
            return spconv_ops.submanifold(features, weight, bias, active)
        if self.kernel_size == 1:
            return torch_ops.pointwise(features, weight, bias)
        return torch_ops.convolve(features, weight, bias, active.submanifold(self.kernel_size))

    def dense(self, image: Tensor) -> Tensor:
        """The same convolution of all pixels, (B, I, H, W) -> (B, O, H, W); give inactive ones as zero."""
        return F.conv2d(image, self.weight, self.bias, padding=self.kernel_size // 2)

    def reads(self, first: int, last: int) -> tuple[int, int]:
        """The first and last line of input pixels that output lines ``first`` to ``last`` depend on."""
        return first - self.kernel_size // 2, last + self.kernel_size // 2


class SparseConv2d(_SparseLayer):
    """Convolution of stride 2 onto `ActiveSet.strided`: every 2x2 cell that holds an active pixel.

    On that set it equals ``F.conv2d(image * mask, weight, bias, stride=2, padding=kernel_size // 3)``, an odd height or
    width filled up with zeros.

    Args:
        in_channels: Channels of the input rows.
        out_channels: Channels of the output rows.
        kernel_size: 2 or 3.
        stride: 2, the only one there is.
        bias: Add a learned bias.
        backend: 'auto' takes spconv where it is installed and fits (CUDA, fp16 or fp32), else torch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 2,
        bias: bool = True,
        backend: Backend = "auto",
    ) -> None:
        if kernel_size not in (2, 3):
            raise ValueError(f"`kernel_size` of SparseConv2d must be 2 or 3, got {kernel_size}.")
        if stride != 2:
            raise ValueError(f"`stride` of SparseConv2d must be 2, got {stride} (for 1 take SubmanifoldConv2d).")
        super().__init__(in_channels, out_channels, kernel_size, bias, backend)

    @eager
    def forward(self, features: Tensor, active: ActiveSet) -> Tensor:
        """(N, in_channels) on `active` -> (M, out_channels) on ``active.strided()``."""
        weight, bias = self._cast(features, len(active))
        if spconv_ops.chosen(self.backend, features):
            return spconv_ops.downsample(features, weight, bias, active)
        return torch_ops.convolve(features, weight, bias, active.downsampling(self.kernel_size))

    def dense(self, image: Tensor) -> Tensor:
        """The same convolution of all pixels, (B, I, H, W) -> (B, O, h, w) with halves rounded up."""
        even = F.pad(image, (0, image.shape[3] % 2, 0, image.shape[2] % 2))
        return F.conv2d(even, self.weight, self.bias, stride=2, padding=self.kernel_size // 3)

    def reads(self, first: int, last: int) -> tuple[int, int]:
        """The first and last line of input pixels that output lines ``first`` to ``last`` depend on.

        Both lines of an output's own cell are among them: they decide whether it is active.
        """
        start = 2 * first - self.kernel_size // 3
        return start, max(2 * last + 1, 2 * last - self.kernel_size // 3 + self.kernel_size - 1)


class InverseConv2d(_SparseLayer):
    """The way back of `SparseConv2d`: from ``active.strided()`` to exactly the pixels of `active`.

    Tap (i, j) leads from coarse pixel (y, x) to the fine pixel that tap (i, j) of the strided convolution reads there:
    ``F.conv_transpose2d(coarse, weight.transpose(0, 1), bias, stride=2, padding=kernel_size // 3)`` on the active set.

    Args:
        in_channels: Channels of the input rows.
        out_channels: Channels of the output rows.
        kernel_size: 2 or 3.
        bias: Add a learned bias.
        backend: 'auto' takes spconv where it is installed and fits (CUDA, fp16 or fp32), else torch.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = True, backend: Backend = "auto"
    ) -> None:
        if kernel_size not in (2, 3):
            raise ValueError(f"`kernel_size` of InverseConv2d must be 2 or 3, got {kernel_size}.")
        super().__init__(in_channels, out_channels, kernel_size, bias, backend)

    @eager
    def forward(self, features: Tensor, active: ActiveSet) -> Tensor:
        """(M, in_channels) on ``active.strided()`` -> (N, out_channels) on `active`, the finer set."""
        weight, bias = self._cast(features, len(active.strided()))
        if spconv_ops.chosen(self.backend, features):
            return spconv_ops.upsample(features, weight, bias, active)
        rulebook: Rulebook = active.downsampling(self.kernel_size).reversed()
        return torch_ops.convolve(features, weight, bias, rulebook)

    def dense(self, coarse: Tensor, size: Sequence[int]) -> Tensor:
        """The same convolution of all pixels, (B, I, h, w) -> (B, O, H, W) with ``size`` = (H, W)."""
        padding = self.kernel_size // 3
        weight = self.weight.transpose(0, 1)
        image = F.conv_transpose2d(coarse, weight, self.bias, stride=2, padding=padding, output_padding=padding)
        return image[:, :, : size[0], : size[1]]

    def reads(self, first: int, last: int) -> tuple[int, int]:
        """The first and last line of coarse pixels that fine lines ``first`` to ``last`` depend on."""
        # tap i leads from coarse line y to fine line 2 y + i - kernel_size // 3
        reach = self.kernel_size // 3
        return -((self.kernel_size - 1 - reach - first) // 2), (last + reach) // 2
