"""What the metrics accept as a matte: 8-bit or floating point, array or tensor, always (H, W)."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_matting.checks import InputError

Matte: TypeAlias = "NDArray[np.generic] | Tensor"
"""(H, W) in [0, 1] as any float, or uint8 meaning value / 255."""
Region: TypeAlias = "NDArray[np.bool_] | Tensor | None"
"""(H, W) bool, or None for the whole image."""


def read_matte(matte: Matte, name: str) -> NDArray[np.generic]:
    """Return the matte as a contiguous (H, W) array of uint8, float16, float32 or float64; the values are untouched.

    bfloat16, which NumPy lacks, becomes float32 without a change of value; booleans become 0 and 255.

    Raises:
        InputError: If it is not (H, W), is of another type, or a float lies outside [0, 1] or is not a number.
    """
    if isinstance(matte, Tensor):
        matte = matte.detach().cpu()
        array = (matte.float() if matte.dtype == torch.bfloat16 else matte).numpy()
    else:
        array = np.asarray(matte)
    if array.ndim != 2:
        raise InputError(f"`{name}` must have shape (H, W), got {array.shape}; pass one matte at a time.")
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(
            f"`{name}` must be uint8 or a float in [0, 1], got {array.dtype}; divide 16-bit mattes by 65535 first."
        )
    if array.size:
        smallest, largest = array.min(), array.max()
        # the comparison is written so that NaN fails it
        if not (smallest >= 0 and largest <= 1):
            raise InputError(
                f"`{name}` must lie in [0, 1], got values from {smallest:g} to {largest:g}; clamp it, or divide 8-bit"
                " values by 255."
            )
    return np.ascontiguousarray(array)


def read_region(region: Region, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """Return the region as a contiguous (H, W) bool array, or None for the whole image.

    Raises:
        InputError: If it is not bool or has another size.
    """
    if region is None:
        return None
    array = region.detach().cpu().numpy() if isinstance(region, Tensor) else np.asarray(region)
    if array.dtype != np.bool_:
        raise InputError(f"`region` must be a bool mask, got {array.dtype}; for a trimap pass `trimap == 128`.")
    if array.shape != shape:
        raise InputError(f"`region` is {array.shape} but the mattes are {shape}.")
    return np.ascontiguousarray(array)


def read_pair(
    pred: Matte, alpha: Matte, region: Region = None
) -> tuple[NDArray[np.generic], NDArray[np.generic], NDArray[np.bool_] | None]:
    """Return prediction, truth and region as arrays of one size.

    Raises:
        InputError: As :func:`read_matte` and :func:`read_region`, or if the two mattes differ in size.
    """
    predicted, truth = read_matte(pred, "pred"), read_matte(alpha, "alpha")
    if predicted.shape != truth.shape:
        raise InputError(
            f"`pred` is {predicted.shape} but `alpha` is {truth.shape}; resize the prediction, never the truth."
        )
    return predicted, truth, read_region(region, truth.shape)


def as_unit(matte: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return the matte in [0, 1] as float64."""
    return matte / 255.0 if matte.dtype == np.uint8 else matte.astype(np.float64)
