"""Active sets, and the way between images and rows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_matting.sparse import ActiveSet, gather, rulebook, scatter

SHAPES = [(1, 1, 1), (1, 1, 7), (2, 5, 1), (3, 9, 12)]
FRACTIONS = [0.0, 0.4, 1.0]


@pytest.fixture(params=[(shape, fraction) for shape in SHAPES for fraction in FRACTIONS], ids=str)
def mask(request: pytest.FixtureRequest) -> Tensor:
    shape, fraction = request.param
    return torch.rand(shape) < fraction


def slow_neighbours(mask: Tensor, kernel_size: int) -> list[list[int]]:
    """By a dictionary from coordinates to rows."""
    pixels = [tuple(pixel) for pixel in mask.nonzero().tolist()]
    rows = {pixel: row for row, pixel in enumerate(pixels)}
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    return [[rows.get((b, y + dy, x + dx), len(rows)) for dy in reach for dx in reach] for b, y, x in pixels]


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_neighbours_are_those_of_a_dictionary(mask: Tensor, kernel_size: int) -> None:
    assert ActiveSet.from_mask(mask).neighbours(kernel_size).tolist() == slow_neighbours(mask, kernel_size)


def test_neighbours_are_right_across_windows_of_very_different_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rulebook, "BLOCK_ROWS", 8)
    monkeypatch.setattr(rulebook, "_GRID_PIXELS", 50)
    mask = torch.zeros(2, 30, 40, dtype=torch.bool)
    mask[0, 0, 39] = mask[0, 29, 0] = True
    mask[0, 1] = mask[0, 2, ::2] = mask[0, 15, 20:] = mask[1, 0] = mask[1, 29] = True
    assert ActiveSet.from_mask(mask).neighbours(3).tolist() == slow_neighbours(mask, 3)


def test_rows_are_in_the_order_of_a_boolean_index(mask: Tensor) -> None:
    active = ActiveSet.from_mask(mask)
    assert len(active) == int(mask.sum())
    assert active.coordinates.tolist() == mask.nonzero().tolist()
    assert active.coordinates.dtype == torch.int32
    assert active.coordinates.is_contiguous()
    counts = mask.flatten(1).sum(1).tolist()
    assert list(active.starts) == [sum(counts[:number]) for number in range(len(counts) + 1)]


def test_strided_set_has_every_cell_with_an_active_pixel(mask: Tensor) -> None:
    active = ActiveSet.from_mask(mask)
    expected = F.max_pool2d(mask[:, None].float(), 2, ceil_mode=True)[:, 0] > 0
    assert torch.equal(active.strided().mask, expected)
    assert active.strided() is active.strided()


def test_tables_are_built_once_and_shared() -> None:
    active = ActiveSet.from_mask(torch.rand(1, 9, 9) < 0.5)
    assert active.submanifold(3) is active.submanifold(3)
    assert active.downsampling(3) is active.downsampling(3)


def test_a_set_can_be_copied_and_pickled() -> None:
    active = ActiveSet.from_mask(torch.rand(1, 9, 9) < 0.5)
    active.submanifold(3)
    for twin in (copy.deepcopy(active), pickle.loads(pickle.dumps(active))):
        assert torch.equal(twin.mask, active.mask)
        assert torch.equal(twin.neighbours(3), active.neighbours(3))


def test_masks_that_are_not_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="must be boolean"):
        ActiveSet.from_mask(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="must have shape"):
        ActiveSet.from_mask(torch.zeros(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "cropped"])
def test_gather_takes_what_a_boolean_index_takes(mask: Tensor, layout: str) -> None:
    batch, height, width = mask.shape
    image = torch.randn(batch, 3, height + 2, width + 2)[:, :, 1:-1, 1:-1]
    if layout == "contiguous":
        image = image.contiguous()
    elif layout == "channels last":
        image = image.contiguous(memory_format=torch.channels_last)
    assert torch.equal(gather(image, ActiveSet.from_mask(mask)), image.permute(0, 2, 3, 1)[mask])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16])
def test_gather_and_scatter_take_any_dtype(dtype: torch.dtype) -> None:
    mask = torch.rand(2, 6, 5) < 0.5
    active = ActiveSet.from_mask(mask)
    image = (torch.rand(2, 3, 6, 5) * 9).to(dtype)
    assert torch.equal(scatter(gather(image, active), active, image), image)


def test_scatter_changes_active_pixels_only(mask: Tensor) -> None:
    active = ActiveSet.from_mask(mask)
    background = torch.randn(mask.shape[0], 2, *mask.shape[1:])
    kept = background.clone()
    features = torch.randn(len(active), 2)
    image = scatter(features, active, background)
    assert torch.equal(image.permute(0, 2, 3, 1)[mask], features)
    assert torch.equal(image.permute(0, 2, 3, 1)[~mask], background.permute(0, 2, 3, 1)[~mask])
    assert torch.equal(background, kept)
    expected = torch.full_like(background, 7)
    expected.permute(0, 2, 3, 1)[mask] = features
    assert torch.equal(scatter(features, active, 7.0), expected)


def test_scatter_has_the_dtype_of_the_background() -> None:
    active = ActiveSet.from_mask(torch.ones(1, 2, 2, dtype=torch.bool))
    features = torch.rand(4, 1, dtype=torch.float64)
    assert scatter(features, active, torch.zeros(1, 1, 2, 2)).dtype == torch.float32
    assert scatter(features, active).dtype == torch.float64


def test_gradients_of_gather_and_scatter_pass_gradcheck() -> None:
    mask = torch.rand(2, 4, 3) < 0.5
    active = ActiveSet.from_mask(mask)
    image = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(len(active), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda image: gather(image, active), image)
    assert torch.autograd.gradcheck(lambda features, image: scatter(features, active, image), (features, image))
    assert torch.autograd.gradcheck(lambda features: scatter(features, active, 2.0), features)


def test_image_of_another_size_is_refused() -> None:
    active = ActiveSet.from_mask(torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="`image` must have shape"):
        gather(torch.zeros(1, 3, 2, 3), active)
    with pytest.raises(ValueError, match="`features` must have shape"):
        scatter(torch.zeros(3, 1), active)
    with pytest.raises(ValueError, match="`background` must have shape"):
        scatter(torch.zeros(4, 1), active, torch.zeros(1, 2, 2, 2))
