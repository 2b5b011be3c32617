"""The default backend: plain PyTorch, any device, any floating dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_matting.sparse.active import Rulebook, TapGroup

CHUNK_ROWS = 512
"""Rows gathered at once: 512 x 288 x 4 bytes stay in a second-level cache."""


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, rulebook: Rulebook) -> Tensor:
    """Convolution of rows.

    Args:
        features: (inputs, I).
        weight: (O, I, kh, kw), of the dtype of `features`.
        bias: (O,) or None, of the dtype of `features`.
        rulebook: Who reads whom.

    Returns:
        (outputs, O), of the dtype of `features`.
    """
    return _Convolution.apply(features, weight, bias, rulebook)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, rulebook: Rulebook) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.rulebook = rulebook
        ctx.has_bias = bias is not None
        with torch.autocast(features.device.type, enabled=False):
            return _apply(features, weight.flatten(2), bias, rulebook.outputs, rulebook.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        rulebook: Rulebook = ctx.rulebook
        wants_features, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_features = grad_weight = grad_bias = None
        with torch.autocast(features.device.type, enabled=False):
            gradient = gradient.contiguous()
            if wants_features:
                transposed = weight.flatten(2).transpose(0, 1)
                grad_features = _apply(gradient, transposed, None, rulebook.inputs, rulebook.backward_groups)
            if wants_weight:
                grad_weight = _weight_gradient(features, gradient, weight, rulebook)
            if wants_bias and ctx.has_bias:
                grad_bias = gradient.sum(0)
        return grad_features, grad_weight, grad_bias, None


def _with_zero_row(features: Tensor) -> Tensor:
    # the row that stands for every pixel which is not active
    return torch.cat((features, features.new_zeros(1, features.shape[1])))


def _chunks(group: TapGroup, channels: int, like: Tensor) -> Any:
    """Gathered rows of a group, chunk by chunk, in one reused buffer of this call."""
    count, taps = group.table.shape
    buffer = like.new_empty(min(CHUNK_ROWS, count) * taps, channels)
    for start in range(0, count, CHUNK_ROWS):
        table = group.table[start : start + CHUNK_ROWS]
        yield slice(start, start + len(table)), table, buffer[: len(table) * taps]


def _apply(features: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, groups: tuple[TapGroup, ...]) -> Tensor:
    """Sum over taps of weight (O, I, taps) times the rows that the taps read."""
    features = _with_zero_row(features.detach())
    result = features.new_empty(outputs, weight.shape[0])
    for group in groups:
        matrix = weight[:, :, list(group.taps)].permute(2, 1, 0).flatten(0, 1).contiguous()
        for chunk, table, buffer in _chunks(group, features.shape[1], features):
            torch.index_select(features, 0, table.reshape(-1), out=buffer)
            rows = buffer.view(len(table), -1)
            if group.rows is None:
                torch.mm(rows, matrix, out=result[chunk])
            else:
                result[group.rows[chunk]] = rows @ matrix
    return result if bias is None else result.add_(bias)


def _weight_gradient(features: Tensor, gradient: Tensor, weight: Tensor, rulebook: Rulebook) -> Tensor:
    features = _with_zero_row(features)
    # half precision would lose a sum over many chunks
    precise = torch.promote_types(weight.dtype, torch.float32)
    out_channels, in_channels, height, width = weight.shape
    total = torch.zeros(height * width, in_channels, out_channels, dtype=precise, device=weight.device)
    for group in rulebook.groups:
        for chunk, table, buffer in _chunks(group, in_channels, features):
            torch.index_select(features, 0, table.reshape(-1), out=buffer)
            upstream = gradient[chunk] if group.rows is None else gradient[group.rows[chunk]]
            part = buffer.view(len(table), -1).t() @ upstream
            total[list(group.taps)] += part.view(len(group.taps), in_channels, out_channels).to(precise)
    return total.permute(2, 1, 0).reshape(weight.shape).to(weight.dtype)
