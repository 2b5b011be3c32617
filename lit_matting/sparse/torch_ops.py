"""The default backend: plain PyTorch, any device, any floating dtype.

Two ways to the same sum, whichever moves less memory:

- *gather first*: copy the rows that a few hundred outputs read side by side into a buffer, one matrix product with the
  whole kernel. The buffer and the window of inputs stay in a cache; fresh or large buffers are what costs.
- *multiply first*: one matrix product of every input row with the whole kernel, then sum the few results that belong to
  each output. For layers that shrink the channels, above all the last one, and for the way back from half resolution.

No state outside of a call: buffers belong to the call, so any number of threads may compute at the same time. Matrix
products are filled up to a multiple of 64 rows, because BLAS libraries pick other kernels for few rows: so the result
of a row does not depend on how many other rows there are, and an image computed in overlapping bands gives the same
bits as in one go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_matting.sparse.memory import fresh
from lit_matting.sparse.rulebook import Reads, Rulebook

_BUFFER_BYTES = 640 * 1024
"""Gathered rows at a time on a CPU: fits a second-level cache of 1 to 2 MiB beside the window."""

_DEVICE_BUFFER_BYTES = 64 * 1024**2
"""The same on other devices: enough rows to fill them."""

_ROW_MULTIPLE = 64
"""Matrix products have a multiple of so many rows."""


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
        with torch.autocast(features.device.type, enabled=False):
            return _apply(features.contiguous(), weight.flatten(2), bias, rulebook.forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        forward, backward = ctx.rulebook.forward, ctx.rulebook.backward
        wants_features, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_features = grad_weight = grad_bias = None
        with torch.autocast(features.device.type, enabled=False):
            features, gradient = features.contiguous(), gradient.contiguous()
            transposed = weight.flatten(2).transpose(0, 1)
            shares = wants_features and wants_weight and not _multiplies_first(backward, transposed)
            total = _zero_total(backward, gradient, features) if shares else None
            if wants_features:
                grad_features = _apply(gradient, transposed, None, backward, features, total)
            if wants_weight:
                if total is not None:
                    grad_weight = _by_tap(total, backward).transpose(1, 2)
                elif _correlates_inputs(forward, backward, features.shape[1], gradient.shape[1]):
                    grad_weight = _by_tap(_correlate(features, gradient, forward), forward)
                else:
                    grad_weight = _by_tap(_correlate(gradient, features, backward), backward).transpose(1, 2)
                grad_weight = grad_weight.permute(2, 1, 0).reshape(weight.shape).to(weight.dtype)
            if wants_bias:
                grad_bias = gradient.sum(0)
        return grad_features, grad_weight, grad_bias, None


def _multiplies_first(reads: Reads, weight: Tensor) -> bool:
    return reads.columns is None or 2 * weight.shape[0] <= weight.shape[1]


def _correlates_inputs(forward: Reads, backward: Reads, inputs: int, outputs: int) -> bool:
    # whichever side has fewer numbers to gather; the fine side of a strided layer has no table by tap
    if forward.columns is None or backward.columns is None:
        return backward.columns is None
    return inputs <= outputs


def _apply(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reads: Reads,
    partner: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Sum over taps of weight (O, I, taps) times the rows (inputs, I) that they read: (outputs, O).

    With `total`, the gathered rows also go into the sum of `_correlate` with `partner`.
    """
    result = fresh(reads.outputs, weight.shape[0], like=rows)
    if _multiplies_first(reads, weight):
        _multiply_first(rows, weight, bias, reads, result)
        return result
    columns = list(reads.columns or ())
    matrix = weight[:, :, columns].permute(2, 1, 0).flatten(0, 1).contiguous()
    for chunk, gathered in _gather(rows, reads):
        count = chunk.stop - chunk.start
        if count == len(gathered):
            _product(bias, gathered, matrix, result[chunk])
        else:
            result[chunk] = _product(bias, gathered, matrix, rows.new_empty(len(gathered), len(weight)))[:count]
        if total is not None and partner is not None:
            _accumulate(total, gathered[:count], partner[chunk])
    return result


def _product(bias: Tensor | None, rows: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    return torch.mm(rows, matrix, out=out) if bias is None else torch.addmm(bias, rows, matrix, out=out)


def _gather(rows: Tensor, reads: Reads) -> Iterator[tuple[slice, Tensor]]:
    """For a few outputs at a time, all rows that each of them reads, side by side: (outputs, width * I).

    The buffer is filled again for the next ones. Rows beyond the outputs, up to a multiple of 64, hold anything.
    """
    channels = rows.shape[1]
    width = reads.table.shape[1]
    budget = _BUFFER_BYTES if rows.device.type == "cpu" else _DEVICE_BUFFER_BYTES
    fitting = budget // (width * channels * rows.element_size())
    size = _whole(min(max(fitting, 1), reads.block, max(reads.outputs, 1)))
    buffer = rows.new_empty(size * width, channels)
    window = rows.new_empty(reads.capacity + 1, channels)
    window[reads.capacity] = 0
    taken = 0
    for number, needed in enumerate(reads.taken):
        for block in range(taken, needed):
            part = rows[block * reads.block : (block + 1) * reads.block]
            place = block * reads.block % reads.capacity
            window[place : place + len(part)] = part
        taken = max(taken, needed)
        end = min((number + 1) * reads.block, reads.outputs)
        for start in range(number * reads.block, end, size):
            chunk = slice(start, min(start + size, end))
            count = chunk.stop - chunk.start
            torch.index_select(window, 0, reads.table[chunk].view(-1), out=buffer[: count * width])
            yield chunk, buffer[: _whole(count) * width].view(-1, width * channels)


def _whole(count: int) -> int:
    return -(-count // _ROW_MULTIPLE) * _ROW_MULTIPLE


def _multiply_first(rows: Tensor, weight: Tensor, bias: Tensor | None, reads: Reads, result: Tensor) -> None:
    channels, width = weight.shape[0], reads.table.shape[1]
    if reads.columns is not None:
        weight = weight[:, :, list(reads.columns)]
    matrix = weight.permute(1, 2, 0).flatten(1).contiguous()
    products = rows.new_empty(reads.capacity + 1, matrix.shape[1])
    # what is read where no pixel is active
    products[reads.capacity] = 0
    parts = products.view(-1, channels)
    column = torch.arange(width, dtype=torch.int32, device=rows.device)
    bags = torch.arange(0, reads.block * width, width, dtype=torch.int32, device=rows.device)
    codes = torch.empty(reads.block, width, dtype=torch.int32, device=rows.device)
    taken = 0
    for number, needed in enumerate(reads.taken):
        for block in range(taken, needed):
            part = rows[block * reads.block : (block + 1) * reads.block]
            place = block * reads.block % reads.capacity
            if len(part) == _whole(len(part)):
                torch.mm(part, matrix, out=products[place : place + len(part)])
            else:
                filled = torch.nn.functional.pad(part, (0, 0, 0, _whole(len(part)) - len(part)))
                products[place : place + len(part)] = (filled @ matrix)[: len(part)]
        taken = max(taken, needed)
        chunk = slice(number * reads.block, min((number + 1) * reads.block, reads.outputs))
        table = reads.table[chunk]
        if reads.columns is not None:
            table = torch.add(column, table, alpha=width, out=codes[: len(table)])
        total = torch.embedding_bag(parts, table.view(-1), bags[: len(table)], mode=0)[0]
        result[chunk] = total if bias is None else total.add_(bias)


def _zero_total(reads: Reads, rows: Tensor, partner: Tensor) -> Tensor:
    # half precision would lose a sum over many chunks
    precise = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_zeros(reads.table.shape[1] * rows.shape[1], partner.shape[1], dtype=precise)


def _correlate(rows: Tensor, partner: Tensor, reads: Reads) -> Tensor:
    """Sum over outputs p of ``gathered[p]`` times ``partner[p]``, (width * I, P)."""
    total = _zero_total(reads, rows, partner)
    for chunk, gathered in _gather(rows, reads):
        _accumulate(total, gathered[: chunk.stop - chunk.start], partner[chunk])
    return total


def _accumulate(total: Tensor, gathered: Tensor, partner: Tensor) -> None:
    if total.dtype == gathered.dtype:
        total.addmm_(gathered.t(), partner)
    else:
        total += gathered.t() @ partner


def _by_tap(total: Tensor, reads: Reads) -> Tensor:
    """(width * I, P), in the order of the table's columns, to (taps, I, P)."""
    if reads.columns is None:
        raise ValueError("a table without columns cannot give the gradient of a weight")
    order = torch.tensor(reads.columns, device=total.device).argsort()
    return total.view(len(reads.columns), -1, total.shape[1])[order]
