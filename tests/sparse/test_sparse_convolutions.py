"""Sparse convolutions against the masked dense convolution, which is their definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_matting.sparse import ActiveSet, InverseConv2d, SparseConv2d, SubmanifoldConv2d

SHAPES = [(1, 1, 1), (1, 1, 7), (2, 5, 1), (1, 2, 2), (3, 9, 12), (2, 40, 33)]
FRACTIONS = [0.0, 0.05, 0.5, 1.0]


@pytest.fixture(params=[(shape, fraction) for shape in SHAPES for fraction in FRACTIONS], ids=str)
def mask(request: pytest.FixtureRequest) -> Tensor:
    shape, fraction = request.param
    return torch.rand(shape) < fraction


def at(image: Tensor, mask: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1)[mask]


def cells(mask: Tensor) -> Tensor:
    """2x2 cells with an active pixel, by max pooling."""
    return F.max_pool2d(mask[:, None].double(), 2, ceil_mode=True)[:, 0] > 0


def dense_submanifold(image: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return at(F.conv2d(image * mask[:, None], weight, bias, padding=weight.shape[-1] // 2), mask)


def dense_down(image: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    even = F.pad(image * mask[:, None], (0, image.shape[3] % 2, 0, image.shape[2] % 2))
    return at(F.conv2d(even, weight, bias, stride=2, padding=weight.shape[-1] // 3), cells(mask))


def dense_up(coarse: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = weight.shape[-1] // 3
    transposed = weight.transpose(0, 1)
    image = F.conv_transpose2d(
        coarse * cells(mask)[:, None], transposed, bias, stride=2, padding=padding, output_padding=padding
    )
    return at(image[:, :, : mask.shape[1], : mask.shape[2]], mask)


def layers(**kwargs: object) -> Iterator[tuple]:
    yield SubmanifoldConv2d(5, 4, **kwargs), dense_submanifold, False
    yield SubmanifoldConv2d(5, 4, kernel_size=1, **kwargs), dense_submanifold, False
    yield SubmanifoldConv2d(3, 6, kernel_size=5, **kwargs), dense_submanifold, False
    yield SubmanifoldConv2d(16, 1, bias=False, **kwargs), dense_submanifold, False
    for kernel_size in (2, 3):
        yield SparseConv2d(5, 4, kernel_size=kernel_size, **kwargs), dense_down, False
        yield InverseConv2d(5, 4, kernel_size=kernel_size, **kwargs), dense_up, True


def image_for(layer: torch.nn.Module, mask: Tensor, coarse: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    support = cells(mask) if coarse else mask
    image = torch.randn(support.shape[0], layer.in_channels, *support.shape[1:], dtype=dtype)
    return image, support


def test_values_equal_the_masked_dense_convolution(mask: Tensor) -> None:
    active = ActiveSet.from_mask(mask)
    for layer, dense, coarse in layers():
        image, support = image_for(layer, mask, coarse, torch.float32)
        expected = dense(image, mask, layer.weight, layer.bias)
        torch.testing.assert_close(layer(at(image, support), active), expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_the_masked_dense_convolution(mask: Tensor) -> None:
    active = ActiveSet.from_mask(mask)
    for layer, dense, coarse in layers():
        layer = layer.double()
        image, support = image_for(layer, mask, coarse, torch.float64)
        image.requires_grad_()
        results = []
        for output in (dense(image, mask, layer.weight, layer.bias), layer(at(image, support), active)):
            upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).cos().view_as(output)
            results.append(torch.autograd.grad(output, [image, *layer.parameters()], upstream))
        for expected, found in zip(*results):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
