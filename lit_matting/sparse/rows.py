"""Between images and rows: `gather` takes the active pixels of an image, `scatter` puts rows back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lit_matting.checks import check_shape
from lit_matting.sparse.active import ActiveSet, eager
from lit_matting.sparse.memory import fresh


@eager
def gather(image: Tensor, active: ActiveSet) -> Tensor:
    """Features of the active pixels, ``image.permute(0, 2, 3, 1)[active.mask]``.

    Args:
        image: (B, C, H, W), any dtype.
        active: The set to take, of the same B, H and W.

    Returns:
        (N, C), in batch-major raster order.

    Example:
        >>> import torch
        >>> active = ActiveSet.from_mask(torch.tensor([[[True, False], [False, True]]]))
        >>> gather(torch.arange(4.0).view(1, 1, 2, 2), active).tolist()
        [[0.0], [3.0]]
    """
    batch, height, width = active.shape
    check_shape(image, (batch, "C", height, width), "image")
    return _Gather.apply(image, active)


@eager
def scatter(features: Tensor, active: ActiveSet, background: Tensor | float = 0.0) -> Tensor:
    """An image with the features at the active pixels and the background, bit for bit, everywhere else.

    Args:
        features: (N, C), in batch-major raster order.
        active: The set that the rows belong to.
        background: (B, C, H, W), whose dtype the result has; or one number, then the dtype of `features`.

    Returns:
        (B, C, H, W), a new tensor.

    Example:
        >>> import torch
        >>> active = ActiveSet.from_mask(torch.tensor([[[True, False], [False, True]]]))
        >>> scatter(torch.tensor([[1.0], [2.0]]), active, background=9.0).tolist()
        [[[[1.0, 9.0], [9.0, 2.0]]]]
    """
    batch, height, width = active.shape
    channels = check_shape(features, (len(active), "C"), "features")["C"]
    if isinstance(background, Tensor):
        check_shape(background, (batch, channels, height, width), "background")
        features = features.to(background.dtype)
    return _Scatter.apply(features, active, background)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, active: ActiveSet) -> Tensor:
        ctx.active = active
        return _take(image, active)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _put(gradient, ctx.active, 0.0), None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, active: ActiveSet, background: Tensor | float) -> Tensor:
        ctx.active = active
        return _put(features, active, background)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        wants_features, _, wants_background = ctx.needs_input_grad
        rows = _take(gradient, ctx.active) if wants_features else None
        rest = None
        if wants_background:
            rest = gradient.masked_fill(ctx.active.mask[:, None], 0)
        return rows, None, rest


def _take(image: Tensor, active: ActiveSet) -> Tensor:
    rows = fresh(len(active), image.shape[1], like=image)
    for number, chunk, inside in _images(active):
        # indexing a transposed view is the fastest of seven ways on a CPU
        rows[chunk] = image[number].permute(1, 2, 0).flatten(0, 1)[inside]
    return rows


def _put(features: Tensor, active: ActiveSet, background: Tensor | float) -> Tensor:
    batch, height, width = active.shape
    image = fresh(batch, features.shape[1], height, width, like=features)
    image.copy_(background) if isinstance(background, Tensor) else image.fill_(background)
    for number, chunk, inside in _images(active):
        rows = features[chunk].t()
        image[number].flatten(1).scatter_(1, inside.expand(rows.shape), rows)
    return image


def _images(active: ActiveSet) -> Iterator[tuple[int, slice, Tensor]]:
    """Number, rows, and positions inside the image, of every image with active pixels."""
    _, height, width = active.shape
    for number, (start, end) in enumerate(zip(active.starts, active.starts[1:])):
        if end > start:
            inside = active.indices[start:end]
            yield number, slice(start, end), inside - number * height * width if number else inside
