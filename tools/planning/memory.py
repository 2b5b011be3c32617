"""How much tensor memory is alive, moment by moment, for real tensors and for fake ones that hold nothing."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of every tensor storage that an operation returns until nobody holds it any more.

    It sees what PyTorch's operators hand out, not what their kernels use while they run, nor an allocator's gaps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """Most bytes alive at once since :meth:`restart`."""
        self.peak_moment = ""
        """What :attr:`moment` was then."""
        self.moment = ""
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak, self.peak_moment = self.live, self.moment

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that existed before the tracker."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = (weakref.ref(storage, forget), size)
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_moment = self.live, self.moment

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


class FusedAttentionOnCPU(TorchDispatchMode):
    """Has scaled dot-product attention choose as it would for real tensors on a processor: the fused kernel.

    For tensors without contents PyTorch chooses the explicit product, whose maps would be most of the memory.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten._fused_sdp_choice.default:
            return 1  # SDPBackend.FLASH_ATTENTION
        return function(*args, **(kwargs or {}))
