"""Large fresh tensors on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_HUGE_BYTES = 4 * 1024**2
_ALIGNMENT = 64


def fresh(*shape: int, like: Tensor) -> Tensor:
    """An uninitialised tensor of the dtype and device of `like`.

    The first touch of fresh memory can cost more than the arithmetic on it: a page fault for every 4 KiB, 40 ms for
    100 MB. NumPy asks Linux for 2 MiB pages for its large arrays and PyTorch does not, so large CPU tensors are taken
    from NumPy.

    Example:
        >>> fresh(2, 3, like=torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    size = like.element_size()
    for length in shape:
        size *= length
    if like.device.type != "cpu" or size < _HUGE_BYTES:
        return like.new_empty(shape)
    store = torch.from_numpy(np.empty(size + _ALIGNMENT, dtype=np.uint8))
    start = -store.data_ptr() % _ALIGNMENT // like.element_size()
    # not as a view: autograd forbids to change in place the view that a custom function returns
    return like.new_empty(0).set_(store.untyped_storage(), start, shape)
