"""The CUDA backend: spconv behind the same interface and the same weights."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from lit_matting.sparse.active import ActiveSet

_DTYPES = (torch.float16, torch.float32)


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether the spconv package can be imported (it is not imported to find out)."""
    return importlib.util.find_spec("spconv") is not None


def chosen(backend: str, features: Tensor) -> bool:
    """Whether spconv computes this call.

    'auto' takes it for CUDA features of fp16 or fp32 when it is installed: its CPU code races with two threads and it
    has no bf16 kernels.

    Raises:
        ValueError: If 'spconv' was asked for and cannot do it.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        return features.is_cuda and features.dtype in _DTYPES and installed()
    if not installed():
        raise ValueError("`backend` is 'spconv' but the package is not installed (pip install 'lit_matting[spconv]').")
    if features.dtype not in _DTYPES:
        raise ValueError(f"`backend` 'spconv' computes in fp16 or fp32, got {features.dtype} (take backend='torch').")
    return True


def submanifold(features: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet) -> Tensor:
    raise NotImplementedError


def downsample(features: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet) -> Tensor:
    raise NotImplementedError


def upsample(features: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet) -> Tensor:
    raise NotImplementedError
