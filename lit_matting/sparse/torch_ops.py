"""The default backend: plain PyTorch, any device, any floating dtype.

Two ways to the same sum, whichever moves less memory:

- *gather first*: copy the rows that a few hundred outputs read side by side into a buffer, one matrix product with the
  whole kernel. The buffer and the window of inputs stay in a cache; fresh or large buffers are what costs.
- *multiply first*: one matrix product of every input row with the whole kernel, then sum the few results that belong to
  each output. For layers that shrink the channels, above all the last one, and for the way back from half resolution.

No state outside of a call: buffers belong to the call, so any number of threads may compute at the same time. The bits
of a row do not depend on which other rows there are, because every matrix product of a layer has the same shape (the
last one is filled up): so an image computed in overlapping bands gives exactly what it gives in one go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lit_matting.sparse.memory import fresh
from lit_matting.sparse.rulebook import Reads, Rulebook

_BUFFER_BYTES = 640 * 1024
"""Gathered rows at a time on a CPU: fits a second-level cache of 1 to 2 MiB beside the window."""

_DEVICE_BUFFER_BYTES = 64 * 1024**2
"""The same on other devices: enough rows to fill them."""

_FEWEST_ROWS = 64
"""Rows of a matrix product at least."""

_MOST_ROWS = 1024
"""The same at most on a CPU: a block of the rulebook, so that few are cut short."""

_DEVICE_MOST_ROWS = 2**18
"""The same on other devices."""


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


def pointwise(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution of rows with a 1x1 kernel, which needs no neighbours; otherwise as `convolve`."""
    return _Pointwise.apply(features, weight, bias)


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


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(features, weight)
        with torch.autocast(features.device.type, enabled=False):
            return _apply_pointwise(features.contiguous(), weight.flatten(1), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        features, weight = ctx.saved_tensors
        wants_features, wants_weight, wants_bias = ctx.needs_input_grad
        with torch.autocast(features.device.type, enabled=False):
            gradient = gradient.contiguous()
            grad_features = _apply_pointwise(gradient, weight.flatten(1).t(), None) if wants_features else None
            grad_weight = (gradient.t() @ features).view(weight.shape) if wants_weight else None
            grad_bias = gradient.sum(0) if wants_bias else None
        return grad_features, grad_weight, grad_bias


def _multiplies_first(reads: Reads, weight: Tensor) -> bool:
    # measured: at half the channels both take the same time
    return reads.columns is None or 4 * weight.shape[0] <= weight.shape[1]


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
    product = _Product(weight[:, :, list(reads.columns or ())].permute(2, 1, 0).flatten(0, 1), bias)
    size = _chunk_rows(rows, reads)
    results = result.split(size)
    partners = None if partner is None else partner.split(size)
    for number, gathered in _gather(rows, reads, size):
        product.into(results[number], gathered)
        if total is not None and partners is not None:
            _accumulate(total, gathered, partners[number])
    return result


class _Product:
    """``rows @ matrix + bias`` with the same bits for a row, whatever other rows there are.

    BLAS libraries take other kernels, which round differently, for other numbers of rows and for a single column. So
    all products with one matrix have one number of rows, filled up with zeros, and a single column gets a second one.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        self.columns = matrix.shape[1]
        if self.columns == 1:
            matrix = pad(matrix, (0, 1))
            bias = None if bias is None else pad(bias, (0, 1))
        self.matrix = matrix.contiguous()
        self.bias = bias
        self.rows = _product_rows(self.matrix, self.matrix.shape[0])

    def into(self, out: Tensor, rows: Tensor) -> None:
        """Compute ``out`` (n, columns) from rows (n, K)."""
        if len(rows) > self.rows:
            for part, target in zip(rows.split(self.rows), out.split(self.rows)):
                self.into(target, part)
        elif len(rows) < self.rows or self.columns == 1:
            filled = pad(rows, (0, 0, 0, self.rows - len(rows)))
            out.copy_(self._compute(filled)[: len(rows), : self.columns])
        else:
            self._compute(rows, out)

    def _compute(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        result = torch.mm(rows, self.matrix, out=out)
        # addmm would first copy the bias into all of the result: three times as slow as adding it at the end
        return result if self.bias is None else result.add_(self.bias)


def _product_rows(like: Tensor, width: int) -> int:
    """Rows of `width` numbers that are multiplied at a time: the largest power of two that the buffer holds."""
    on_cpu = like.device.type == "cpu"
    budget = _BUFFER_BYTES if on_cpu else _DEVICE_BUFFER_BYTES
    fitting = budget // (max(width, 1) * like.element_size())
    return min(max(1 << max(fitting, 1).bit_length() - 1, _FEWEST_ROWS), _MOST_ROWS if on_cpu else _DEVICE_MOST_ROWS)


def _chunk_rows(rows: Tensor, reads: Reads) -> int:
    """Outputs whose reads are gathered at a time: those of one product, or a whole block."""
    size = min(_product_rows(rows, reads.table.shape[1] * rows.shape[1]), reads.block)
    return size if len(reads.taken) < 2 or reads.block % size == 0 else reads.block


def _gather(rows: Tensor, reads: Reads, size: int) -> Iterator[tuple[int, Tensor]]:
    """For `size` outputs at a time, all rows that each of them reads, side by side: number, (size, width * I).

    One buffer, filled again for the next ones. Everything that can be prepared is, because a few microseconds for each
    of hundreds of chunks would add a tenth to the time.
    """
    channels = rows.shape[1]
    width = reads.table.shape[1]
    tables = reads.table.view(-1).split(size * width)
    buffer = rows.new_empty(size * width, channels)
    side_by_side = buffer.view(size, width * channels)
    window = rows.new_empty(reads.capacity + 1, channels)
    window[reads.capacity] = 0
    taken = number = 0
    for end, needed in enumerate(reads.taken, start=1):
        for part, places in _blocks(rows, reads, taken, needed):
            window[places] = part
        taken = needed
        while number < len(tables) and number * size < end * reads.block:
            table = tables[number]
            if len(table) == len(buffer):
                torch.index_select(window, 0, table, out=buffer)
                yield number, side_by_side
            else:
                torch.index_select(window, 0, table, out=buffer[: len(table)])
                yield number, side_by_side[: len(table) // width]
            number += 1


def _blocks(rows: Tensor, reads: Reads, taken: int, needed: int) -> Iterator[tuple[Tensor, slice]]:
    """The blocks of rows that come into the window next, and their places in it."""
    for block in range(taken, needed):
        part = rows[block * reads.block : (block + 1) * reads.block]
        place = block * reads.block % reads.capacity
        yield part, slice(place, place + len(part))


def _multiply_first(rows: Tensor, weight: Tensor, bias: Tensor | None, reads: Reads, result: Tensor) -> None:
    channels, width = weight.shape[0], reads.table.shape[1]
    if reads.columns is not None:
        weight = weight[:, :, list(reads.columns)]
    product = _Product(weight.permute(1, 2, 0).flatten(1), None)
    window = rows.new_empty(reads.capacity + 1, product.columns)
    # what is read where no pixel is active
    window[reads.capacity] = 0
    products = window.view(-1, channels)
    column = torch.arange(width, dtype=torch.int32, device=rows.device)
    bags = torch.arange(0, reads.block * width, width, dtype=torch.int32, device=rows.device)
    codes = torch.empty(reads.block, width, dtype=torch.int32, device=rows.device)
    taken = 0
    for needed, table, out in zip(reads.taken, reads.table.split(reads.block), result.split(reads.block)):
        for part, places in _blocks(rows, reads, taken, needed):
            product.into(window[places], part)
        taken = needed
        if reads.columns is not None:
            table = torch.add(column, table, alpha=width, out=codes[: len(table)])
        # the sum of the rows that each bag lists, without ever writing them side by side
        total = torch.embedding_bag(products, table.view(-1), bags[: len(table)], mode=0)[0]
        if bias is None:
            out.copy_(total)
        else:
            torch.add(total, bias, out=out)


def _apply_pointwise(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows (N, I) times weight (O, I)."""
    result = fresh(len(rows), len(weight), like=rows)
    _Product(weight.t(), bias).into(result, rows)
    return result


def _zero_total(reads: Reads, rows: Tensor, partner: Tensor) -> Tensor:
    # half precision would lose a sum over many chunks
    precise = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_zeros(reads.table.shape[1] * rows.shape[1], partner.shape[1], dtype=precise)


def _correlate(rows: Tensor, partner: Tensor, reads: Reads) -> Tensor:
    """Sum over outputs p of ``gathered[p]`` times ``partner[p]``, (width * I, P)."""
    total = _zero_total(reads, rows, partner)
    size = _chunk_rows(rows, reads)
    partners = partner.split(size)
    for number, gathered in _gather(rows, reads, size):
        _accumulate(total, gathered, partners[number])
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
