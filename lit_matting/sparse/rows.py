"""Between images and rows: `gather` takes the active pixels of an image, `scatter` puts them back."""

from __future__ import annotations

from torch import Tensor

from lit_matting.checks import check_shape
from lit_matting.sparse.active import ActiveSet, eager


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
    return image.permute(0, 2, 3, 1)[active.mask]


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
    check_shape(features, (len(active), "C"), "features")
    shape = (batch, features.shape[1], height, width)
    if not isinstance(background, Tensor):
        background = features.new_full(shape, background)
    check_shape(background, shape, "background")
    image = background.clone()
    rows = features.to(image.dtype)
    image.permute(0, 2, 3, 1)[active.mask] = rows
    return image
