"""The CUDA backend: spconv behind the same interface and the same weights.

What spconv 2.3.8 needs to be told, all found by comparison with the PyTorch backend:

- coordinates are int32 and *contiguous*: anything else is read as if it were, without an error;
- weights are (O, kh, kw, I), except that a 1x1 kernel is used as (I, O): such layers are a matrix product here;
- no bf16 kernels, and no empty sets; under autocast it would cast fp32 to fp16 by itself, which is switched off;
- on a CPU the forward pass is exact with one thread only and the backward pass does not exist: for tests. Its CPU build
  bears the same name as the others and has nothing for CUDA.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_matting.sparse.active import ActiveSet

if TYPE_CHECKING:
    from spconv.pytorch import SparseConvTensor

DTYPES = (torch.float16, torch.float32)
"""What spconv computes in."""


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether the spconv package can be imported (it is not imported to find out)."""
    return importlib.util.find_spec("spconv") is not None


@lru_cache(maxsize=1)
def computes_on_cuda() -> bool:
    """Whether the installed build has CUDA kernels; it is imported to find out."""
    from spconv.cppconstants import CPU_ONLY_BUILD

    return not CPU_ONLY_BUILD


def chosen(backend: str, features: Tensor) -> bool:
    """Whether spconv computes this call.

    'auto' takes it for CUDA features of fp16 or fp32 when its CUDA build is installed. An empty set is left to the
    PyTorch backend.

    Raises:
        ValueError: If 'spconv' was asked for and cannot do it.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        fits = features.is_cuda and features.dtype in DTYPES and len(features) > 0
        return fits and installed() and computes_on_cuda()
    if not installed():
        raise ValueError("`backend` is 'spconv' but that package is not installed (pip install 'lit_matting[spconv]').")
    if features.is_cuda and not computes_on_cuda():
        raise ValueError("`backend` is 'spconv' but its CPU build is installed (pip install 'lit_matting[spconv]').")
    if features.dtype not in DTYPES:
        raise ValueError(f"`backend` 'spconv' computes in fp16 or fp32, got {features.dtype} (take backend='torch').")
    return len(features) > 0


def submanifold(features: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet) -> Tensor:
    """As `torch_ops.convolve` with `ActiveSet.submanifold`."""
    size = weight.shape[-1]
    with torch.autocast(features.device.type, enabled=False):
        if size == 1:
            return _plus(features @ weight.flatten(1).t(), bias)
        rows = _tensor(features, active.coordinates, active.shape)
        key = ("spconv", "submanifold", size)
        pairs = active.recall(key)
        if pairs is not None:
            rows.indice_dict["pairs"] = pairs
        result = _run("submanifold", rows, weight)
        active.cached(key, lambda: result.indice_dict["pairs"])
        return _plus(result.features, bias)


def downsample(features: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet) -> Tensor:
    """As `torch_ops.convolve` with `ActiveSet.downsampling`."""
    with torch.autocast(features.device.type, enabled=False):
        result, order = _strided(features, weight, active)
        return _plus(result.features[order], bias)


def upsample(features: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet) -> Tensor:
    """As `torch_ops.convolve` with the reverse of `ActiveSet.downsampling`."""
    size = weight.shape[-1]

    def links() -> tuple[Any, Tensor, Tensor]:
        # the pairs of a strided convolution on this set; spconv makes them only while it computes one
        nothing = features.new_zeros(len(active), 8, dtype=torch.float32)
        result, order = _strided(nothing, weight.new_zeros(8, 8, size, size, dtype=torch.float32), active)
        return result.indice_dict["pairs"], result.indices, order

    with torch.autocast(features.device.type, enabled=False):
        with torch.no_grad():
            pairs, coordinates, order = active.cached(("spconv", "downsampling", size), links)
        # spconv's coarse set is larger than ours: its other rows are zero
        full = features.new_zeros(len(coordinates), features.shape[1]).index_copy(0, order, features)
        rows = _tensor(full, coordinates, active.strided().shape)
        rows.indice_dict["pairs"] = pairs
        return _plus(_run("upsampling", rows, weight).features, bias)


def _strided(features: Tensor, weight: Tensor, active: ActiveSet) -> tuple[SparseConvTensor, Tensor]:
    """spconv's own result, and which of its rows are the rows of ``active.strided()``, in order."""
    batch, height, width = active.shape
    # size 2 without padding would leave out the last row and column of an odd image
    even = (batch, height + height % 2, width + width % 2) if weight.shape[-1] == 2 else active.shape
    result = _run("downsampling", _tensor(features, active.coordinates, even), weight)
    coarse = active.strided()
    image, y, x = result.indices.long().unbind(1)
    found = (image * coarse.shape[1] + y) * coarse.shape[2] + x
    ascending, order = found.sort()
    return result, order[torch.searchsorted(ascending, coarse.indices)]


def _tensor(features: Tensor, coordinates: Tensor, shape: tuple[int, int, int]) -> SparseConvTensor:
    from spconv.pytorch import SparseConvTensor

    return SparseConvTensor(features.contiguous(), coordinates.contiguous(), list(shape[1:]), shape[0])


def _run(kind: Literal["submanifold", "downsampling", "upsampling"], rows: Any, weight: Tensor) -> SparseConvTensor:
    layer = _layer(kind, weight.shape[1], weight.shape[0], weight.shape[-1], rows.features.is_cuda)
    # as in training, always: pairs made for inference lack the backward half and could not be shared
    return layer._conv_forward(True, rows, weight.permute(0, 2, 3, 1).contiguous(), None)


@lru_cache(maxsize=256)
def _layer(kind: str, in_channels: int, out_channels: int, size: int, on_cuda: bool) -> Any:
    """A layer of spconv without weights of its own: it only holds sizes, so any thread may use it."""
    from spconv.pytorch import ConvAlgo, SparseConv2d, SparseInverseConv2d, SubMConv2d

    common: dict[str, Any] = {"bias": False, "indice_key": "pairs", "algo": None if on_cuda else ConvAlgo.Native}
    if kind == "submanifold":
        layer = SubMConv2d(in_channels, out_channels, size, **common)
    elif kind == "downsampling":
        layer = SparseConv2d(in_channels, out_channels, size, stride=2, padding=size // 3, **common)
    else:
        layer = SparseInverseConv2d(in_channels, out_channels, size, **common)
    layer.weight = None
    return layer


def _plus(features: Tensor, bias: Tensor | None) -> Tensor:
    return features if bias is None else features + bias
