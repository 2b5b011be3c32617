"""Refinement under a memory budget: bands that give exactly the alpha that one go gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_matting.checks import InputError
from lit_matting.networks import bands_and_tiles
from lit_matting.networks import refiner as refiner_module
from lit_matting.networks.bands_and_tiles import full_tiles, plan_bands
from lit_matting.networks.refiner import Refined, SparseRefiner
from lit_matting.networks.sampling import resample, resample_part
from lit_matting.networks.sparse_unet import SparseUNet
from lit_matting.sparse import ActiveSet, InverseConv2d, SparseConv2d, SubmanifoldConv2d, gather

MakeRefiner = Callable[..., SparseRefiner]
Disc = Callable[..., Tensor]


def inputs(disc: Disc, size: tuple[int, int], batch: int = 1, channels: int = 4) -> tuple[Tensor, ...]:
    """An image (B, 3, H, W) and maps of 16 x 16; a speckled alpha, so that the active set is ragged."""
    places = [(0.45, 0.5), (0.6, 0.4), (0.3, 0.35)][:batch]
    alpha = torch.cat([disc(16, x=x, y=y) for x, y in places])
    alpha = torch.where(torch.rand_like(alpha) < 0.15, 0.5, alpha)
    trimap = torch.cat([disc(16, x=x, y=y, radius=0.28) for x, y in places])
    return torch.rand(batch, 3, *size), alpha, trimap, torch.randn(batch, channels, 16, 16)


@torch.no_grad()
def refine(
    refiner: SparseRefiner, budget: int | None, given: tuple[Tensor, ...], dense_above: float | None = None
) -> Refined:
    refiner.max_active_pixels, refiner.dense_above = budget, dense_above
    return refiner(*given)


def same(first: Refined, second: Refined) -> bool:
    pairs = [(first.alpha, second.alpha), *zip(first.alphas, second.alphas), *zip(first.active, second.active)]
    return len(first.alphas) == len(second.alphas) and all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("budget", [1, 700, 1800])
@pytest.mark.parametrize(
    ("size", "batch", "options"),
    [
        ((96, 70), 1, {}),
        ((57, 91), 2, {"half_scale_above": 64}),
        ((61, 33), 3, {"blocks": 0, "kernel_size": 45}),
        ((64, 48), 1, {"blocks": 3, "widths": (16, 12), "max_long_edge": 57}),
    ],
)
def test_bands_give_exactly_the_alpha_of_one_go(
    make_refiner: MakeRefiner,
    disc: Disc,
    monkeypatch: pytest.MonkeyPatch,
    budget: int,
    size: tuple[int, int],
    batch: int,
    options: dict[str, Any],
) -> None:
    refiner, given = make_refiner(**options), inputs(disc, size, batch)
    planned = []
    monkeypatch.setattr(
        refiner_module, "plan_bands", lambda *arguments: planned.append(plan_bands(*arguments)) or planned[-1]
    )
    whole = refine(refiner, None, given)
    assert [len(bands) for bands in planned] == [1] * len(whole.alphas)
    monkeypatch.setattr(refiner_module, "MAP_PIXELS", 500)
    copies = [tensor.clone() for tensor in given]
    banded = refine(refiner, budget, given)
    assert len(planned[-1]) >= 2
    assert same(whole, banded)
    assert all(torch.equal(one, other) for one, other in zip(copies, given))
    assert (whole.alpha - resample(given[1], size)).abs().max() > 0.3  # it did refine


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bands_are_exact_with_the_default_widths(disc: Disc, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        refiner = SparseRefiner(feature_channels=32, half_scale_above=100).eval()
        for unet in refiner.scales.values():
            nn.init.normal_(unet.leave.weight, std=2.0)
        given = inputs(disc, (170, 120), channels=32)
        whole = refine(refiner, None, given)
        assert whole.active[-1].sum() > 6_000
        for budget in (4000, 6000):
            assert same(whole, refine(refiner, budget, given))
    finally:
        torch.set_num_threads(before)


def test_bands_of_a_crop_are_exact(make_refiner: MakeRefiner, disc: Disc) -> None:
    box = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.3, 0.0, 0.5, 0.6]])
    refiner, given = make_refiner(half_scale_above=100), (*inputs(disc, (80, 96), 2), box)
    assert same(refine(refiner, None, given), refine(refiner, 900, given))


def test_without_gradients_the_alpha_is_that_of_training(make_refiner: MakeRefiner, disc: Disc) -> None:
    refiner, given = make_refiner(half_scale_above=64), inputs(disc, (90, 110), 2)
    refiner.max_active_pixels = 500
    assert same(refiner(*given), refine(refiner, 500, given))


def test_a_smaller_halo_would_not_do(make_refiner: MakeRefiner, disc: Disc, monkeypatch: pytest.MonkeyPatch) -> None:
    refiner, given = make_refiner(half_scale_above=None), inputs(disc, (96, 70))
    whole = refine(refiner, None, given)
    above, below = next(iter(refiner.scales.values())).halo()
    for less in ((3, 0), (0, 2)):
        monkeypatch.setattr(SparseUNet, "halo", lambda _, less=less: (above - less[0], below - less[1]))
        assert not same(whole, refine(refiner, 700, given))


def support(gradient: Tensor) -> tuple[int, int]:
    lines = gradient.abs().sum((0, 2)).nonzero().flatten()
    return int(lines.min()), int(lines.max())


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_lines_that_the_unet_reads_are_those_its_gradient_reaches(blocks: int) -> None:
    unet = SparseUNet(3, (8, 8), blocks).double()
    nn.init.normal_(unet.leave.weight)
    active = ActiveSet.from_mask(torch.ones(1, 70, 6, dtype=torch.bool))
    rows = torch.randn(len(active), 3, dtype=torch.float64, requires_grad=True)
    lines = unet(rows, active).view(70, 6)
    for line in (30, 31):
        (gradient,) = torch.autograd.grad(lines[line].square().sum(), rows, retain_graph=True)
        assert support(gradient.view(70, 6, 3).transpose(0, 1)) == unet.reads(line, line)
    above, below = unet.halo()
    assert (31 - above, 31 + below) == (min(unet.reads(n, n)[0] + 31 - n for n in (30, 31)), unet.reads(31, 31)[1])


@pytest.mark.parametrize(
    ("layer", "per_line"),
    [
        (SubmanifoldConv2d(2, 2), 1),
        (SubmanifoldConv2d(2, 2, kernel_size=5), 1),
        (SparseConv2d(2, 2), 2),
        (InverseConv2d(2, 2), 0.5),
        (InverseConv2d(2, 2, kernel_size=2), 0.5),
    ],
    ids=str,
)
def test_lines_that_a_layer_reads_are_those_its_gradient_reaches(layer: nn.Module, per_line: float) -> None:
    active = ActiveSet.from_mask(torch.ones(1, 40, 4, dtype=torch.bool))
    height, width = (20, 2) if per_line == 0.5 else (40, 4)
    rows = torch.randn(height * width, 2, requires_grad=True)
    outputs = layer(rows, active)
    lines = outputs.view(-1, 2 if per_line == 2 else 4, 2)
    for first, last in ((8, 8), (9, 9), (8, 11), (9, 12)):
        (gradient,) = torch.autograd.grad(lines[first : last + 1].square().sum(), rows, retain_graph=True)
        assert support(gradient.view(height, width, 2).transpose(0, 1)) == layer.reads(first, last)


def test_strided_layer_of_size_two_reads_its_own_cells() -> None:
    assert SparseConv2d(2, 2, kernel_size=2).reads(3, 5) == (6, 11)


def test_bands_cover_every_line_once_and_keep_to_the_budget() -> None:
    costs = torch.randint(0, 50, (137,)).tolist()
    for budget, halo in ((60, (3, 5)), (400, (13, 13)), (2000, (0, 2)), (None, (9, 9))):
        bands = plan_bands(costs, budget, halo)
        assert [line for band in bands for line in range(band.first, band.end)] == list(range(137))
        for band in bands:
            assert band.top % 2 == 0
            assert band.top <= max(band.first - halo[0], 0)
            assert band.bottom == min(band.end + halo[1], 137)
            if band.end - band.first > 1:
                assert budget is None or sum(costs[band.top : band.bottom]) <= budget
    assert len(plan_bands(costs, None, (9, 9))) == 1


def test_part_of_a_resampled_map_does_not_depend_on_the_rest_and_equals_it() -> None:
    maps, size, everything = torch.randn(2, 3, 7, 5), (50, 41), slice(0, 50)
    for box in (None, torch.tensor([[0.1, 0.2, 0.5, 0.7], [0.4, 0.0, 0.6, 1.0]])):
        whole = resample_part(maps, size, everything, everything, box)
        torch.testing.assert_close(whole, resample(maps, size, box), rtol=0, atol=1e-5)
        for rows, columns in ((slice(0, 1), everything), (slice(13, 29), slice(3, 40)), (slice(49, 50), slice(40, 41))):
            assert torch.equal(resample_part(maps, size, rows, columns, box), whole[:, :, rows, columns])


# --- dense tiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 10), (13, 9)])
def test_dense_unet_equals_the_sparse_one_on_active_pixels(size: tuple[int, int]) -> None:
    unet = SparseUNet(5, (8, 12), 2)
    nn.init.normal_(unet.leave.weight)
    mask, maps = torch.rand(2, *size) < 0.4, torch.randn(2, 5, *size)
    active = ActiveSet.from_mask(mask)
    with torch.no_grad():
        rows, image = unet(gather(maps, active), active), unet.dense(maps, mask)
    torch.testing.assert_close(gather(image, active), rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
@pytest.mark.parametrize(
    ("size", "batch", "boxed"), [((120, 101), 1, False), ((90, 75), 2, False), ((64, 80), 2, True)]
)
def test_dense_tiles_give_the_alpha_of_sparse_layers_and_bands_keep_its_bits(
    make_refiner: MakeRefiner,
    disc: Disc,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    size: tuple[int, int],
    batch: int,
    boxed: bool,
) -> None:
    monkeypatch.setattr(bands_and_tiles, "TILE", 24)
    refiner, given = make_refiner(half_scale_above=70), inputs(disc, size, batch)
    if boxed:
        given = (*given, torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.3, 0.0, 0.5, 0.6]]))
    sparse = refine(refiner, None, given)
    worked = []
    dense = SparseUNet.dense
    monkeypatch.setattr(SparseUNet, "dense", lambda *arguments: worked.append(1) or dense(*arguments))
    whole = refine(refiner, None, given, share)
    tiles = batch * (-(-size[0] // 24)) * (-(-size[1] // 24))
    assert 0 < len(worked) < 2 * tiles
    for one, other in zip(whole.alphas, sparse.alphas):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert torch.equal(whole.active[0], sparse.active[0])
    outside = ~whole.active[0][:, None]
    assert torch.equal(whole.alphas[0][outside], sparse.alphas[0][outside])
    assert same(whole, refine(refiner, 600, given, share))


def test_full_tiles_leave_to_the_sparse_layers_what_others_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands_and_tiles, "TILE", 10)
    mask = torch.ones(1, 25, 30, dtype=torch.bool)
    mask[:, 12:, 12:] = False
    tiles, rest = full_tiles(mask, 0.5, halo=2)
    assert [(tile.rows.start, tile.columns.start) for tile in tiles] == [(0, 0), (0, 10), (0, 20), (10, 0), (20, 0)]
    full = torch.zeros_like(mask)
    for tile in tiles:
        full[0, tile.rows, tile.columns] = True
    # a pixel may go if none of its neighbours within the halo belongs to another tile
    near = nn.functional.max_pool2d((~full).float(), 5, 1, 2) > 0
    assert not (mask & near & ~rest).any()
    assert not (rest & ~mask).any()
    assert rest.sum() < 0.5 * mask.sum()
    assert full_tiles(mask, None, 2)[1] is mask
    assert full_tiles(mask[:, 12:, 12:], 0.5, 2)[0] == []


def test_training_keeps_to_the_sparse_layers(make_refiner: MakeRefiner, disc: Disc) -> None:
    refiner, given = make_refiner(dense_above=0.0), inputs(disc, (40, 40))
    refiner(*given).alpha.sum().backward()
    assert all(parameter.grad is not None for parameter in refiner.scales["full_scale"].parameters())


def test_impossible_options_are_refused(make_refiner: MakeRefiner) -> None:
    with pytest.raises(InputError, match=r"`dense_above` must be in \[0, 1\], or null for never, got 1.5"):
        make_refiner(dense_above=1.5)
    with pytest.raises(InputError, match="`max_active_pixels` must be at least 1, or null for no limit, got 0"):
        make_refiner(max_active_pixels=0)
