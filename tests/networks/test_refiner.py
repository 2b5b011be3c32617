"""The refiner: nothing happens outside the active set, nothing jumps at its border, and nothing has corners."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_matting.checks import InputError
from lit_matting.losses import Refinement
from lit_matting.networks.matting_network import enlarge
from lit_matting.networks.refiner import Refined, SparseRefiner, feather
from lit_matting.networks.sampling import pixel_places, resample, sample_rows
from lit_matting.records import MattingOutput
from lit_matting.sparse import ActiveSet, gather
from lit_matting.targets import targets_for

MakeRefiner = Callable[..., SparseRefiner]
Disc = Callable[..., Tensor]


def maps(disc: Disc, grid: int = 16, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A low-resolution alpha, trimap and features, each (B, C, grid, grid)."""
    places = [(0.45, 0.5), (0.6, 0.4), (0.3, 0.35)][:batch]
    alpha = torch.cat([disc(grid, x=x, y=y) for x, y in places])
    trimap = torch.cat([disc(grid, x=x, y=y, radius=0.28) for x, y in places])
    return alpha, trimap, torch.randn(batch, 4, grid, grid)


def outermost(active: Tensor) -> Tensor:
    """Active pixels with an inactive one above, below, left or right of them, by comparing shifted copies."""
    padded = F.pad(active, (1, 1, 1, 1), value=True)
    beside = [padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]]
    return active & ~torch.stack(beside).all(0)


def dilated(mask: np.ndarray, kernel_size: int) -> np.ndarray:
    element = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (kernel_size, kernel_size))
    return cv2.dilate(mask.astype(np.uint8), element) > 0


# --- identity, and where it must hold ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 128), (97, 130)])
def test_untrained_refiner_is_the_identity(make_refiner: MakeRefiner, disc: Disc, size: tuple[int, int]) -> None:
    alpha, trimap, features = maps(disc)
    refined = make_refiner(awake=False)(torch.rand(1, 3, *size), alpha, trimap, features)
    assert refined.active[0].any()
    assert torch.equal(refined.alpha, enlarge(alpha, size))


def test_alpha_outside_the_active_set_is_the_enlarged_alpha_bit_for_bit(make_refiner: MakeRefiner, disc: Disc) -> None:
    alpha, trimap, features = maps(disc, batch=3)
    refined = make_refiner()(torch.rand(3, 3, 128, 128), alpha, trimap, features)
    before, active = enlarge(alpha, (128, 128)), refined.active[0][:, None]
    assert 0.1 < active.float().mean() < 0.6
    assert torch.equal(refined.alpha[~active], before[~active])
    assert (refined.alpha - before)[active].abs().mean() > 0.05  # while inside it does change
    assert 0 <= refined.alpha.min() <= refined.alpha.max() <= 1


def test_alpha_is_continuous_at_the_border_of_the_active_set(make_refiner: MakeRefiner, disc: Disc) -> None:
    # whatever the weights say: the outermost ring is untouched, the next one moves at most half way
    alpha, trimap, features = maps(disc, batch=3)
    refined = make_refiner()(torch.rand(3, 3, 128, 128), alpha, trimap, features)
    before, active = enlarge(alpha, (128, 128)), refined.active[0]
    first = outermost(active)
    second = outermost(active & ~first)
    assert first.sum() > 300
    assert torch.equal(refined.alpha[first[:, None]], before[first[:, None]])
    moved = (refined.alpha - before).abs()
    assert 0 < moved[second[:, None]].max() <= 0.5
    assert moved.max() > 0.5


def test_trained_refiner_is_continuous_at_the_border_of_the_active_set(make_refiner: MakeRefiner, disc: Disc) -> None:
    # taught a disc that ends where the active set does not: it would like to jump, and cannot
    refiner = make_refiner(awake=False, half_scale_above=None).train()
    alpha, trimap, features = maps(disc)
    image = torch.rand(1, 3, 64, 64)
    truth = (disc(64, x=0.62) > 0.5).float()
    optimizer = torch.optim.Adam(refiner.parameters(), lr=0.03)
    losses = []
    for _ in range(25):
        refined = refiner(image, alpha, trimap, features)
        losses.append((refined.alpha - truth)[refined.active[0][:, None]].abs().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    refined = refiner.eval()(image, alpha, trimap, features)
    before, after, active = enlarge(alpha, (64, 64)), refined.alpha, refined.active[0]
    assert (after - before).abs().max() > 0.5
    first = outermost(active)
    second = outermost(active & ~first)
    assert torch.equal(after[first[:, None]], before[first[:, None]])
    assert (after - before).abs()[second[:, None]].max() <= 0.5
    # from an active to an inactive neighbour alpha steps exactly as much as the enlarged alpha does
    for axis in (1, 2):
        crossing = active ^ active.roll(1, axis)
        crossing.select(axis, 0).fill_(False)
        steps = [(one - one.roll(1, axis + 1))[crossing[:, None]] for one in (after, before)]
        assert len(steps[0]) > 50
        assert torch.equal(*steps)


def test_feather_rises_over_two_pixels_and_ignores_the_images_border() -> None:
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[:, 3:, 2:9] = True  # cut off by the image on two sides
    row = feather(mask)[0, 0, 6]
    assert row.tolist() == [0, 0, 0, 0.5, 1, 1, 1, 1, 1]
    assert feather(mask)[0, 0, :, 6].tolist() == [0, 0, 0, 0, 0.5, 1, 1, 1, 1]


def test_empty_active_set_leaves_the_enlarged_alpha_alone(make_refiner: MakeRefiner) -> None:
    alpha = torch.zeros(2, 1, 8, 8)
    refined = make_refiner()(torch.rand(2, 3, 64, 64), alpha, alpha, torch.randn(2, 4, 8, 8))
    assert not refined.active[0].any()
    assert torch.equal(refined.alpha, torch.zeros(2, 1, 64, 64))


def test_image_without_uncertain_pixels_is_untouched_beside_one_with(make_refiner: MakeRefiner, disc: Disc) -> None:
    alpha, trimap, features = maps(disc, batch=2)
    alpha[1], trimap[1] = 1.0, 1.0
    refined = make_refiner()(torch.rand(2, 3, 128, 128), alpha, trimap, features)
    assert refined.active[0].flatten(1).any(1).tolist() == [True, False]
    assert torch.equal(refined.alpha[1], torch.ones(1, 128, 128))


# --- the active set ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 128), (512, 300), (700, 512)])
def test_active_set_is_a_dilation_of_the_uncertain_set(
    make_refiner: MakeRefiner, disc: Disc, size: tuple[int, int]
) -> None:
    alpha, trimap = enlarge(disc(16), size), enlarge(disc(16, x=0.6, radius=0.2), size)
    active = make_refiner().active_pixels(alpha, trimap)[0].numpy()
    a, t = alpha[0, 0].numpy(), trimap[0, 0].numpy()
    uncertain = ((a > 0.01) & (a < 0.99)) | ((t > 0.25) & (t < 0.75))
    kernel = {128: 3, 512: 15, 700: 15}[max(size)]  # 15 at 512, in proportion below, no larger above
    assert np.array_equal(active, dilated(uncertain, kernel))


def test_active_set_has_no_grid(make_refiner: MakeRefiner, disc: Disc) -> None:
    # published refiners leave rectangular holes, because they choose by blocks; a dilation moves with its image
    refiner = make_refiner(kernel_size=45)
    alpha = enlarge(disc(12, radius=0.2), (96, 96))
    canvas = F.pad(alpha, (24, 24, 24, 24))
    active = refiner.active_pixels(canvas, canvas)
    for dy, dx in ((1, 0), (0, 1), (2, 3), (5, 7), (8, 8)):
        moved = canvas.roll((dy, dx), (-2, -1))
        assert torch.equal(refiner.active_pixels(moved, moved), active.roll((dy, dx), (-2, -1)))


def test_outline_of_the_active_set_has_no_straight_edges_where_the_matte_has_none(
    make_refiner: MakeRefiner, disc: Disc
) -> None:
    # around a disc the set is a ring: as round as a disc is, and without a hole in it
    alpha = disc(512)
    active = make_refiner().active_pixels(alpha, alpha)[0].numpy().astype(np.uint8)
    contours, _ = cv2.findContours(active, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    assert len(contours) == 2  # its outer and its inner edge
    for contour in contours:
        area, length = cv2.contourArea(contour), cv2.arcLength(contour, True)
        assert 4 * np.pi * area / length**2 > 0.85  # a square has 0.785


def test_no_uncertain_pixel_is_left_out(make_refiner: MakeRefiner, disc: Disc) -> None:
    alpha, trimap, features = maps(disc, batch=3)
    refined = make_refiner()(torch.rand(3, 3, 128, 128), alpha, trimap, features)
    before = enlarge(alpha, (128, 128))[:, 0]
    assert refined.active[0][(before > 0.01) & (before < 0.99)].all()


# --- scales -----------------------------------------------------------------------------------------------------------


def test_large_image_is_refined_at_half_scale_first(make_refiner: MakeRefiner, disc: Disc) -> None:
    alpha, trimap, features = maps(disc)
    refined = make_refiner(half_scale_above=64)(torch.rand(1, 3, 101, 67), alpha, trimap, features)
    assert [tuple(item.shape) for item in refined.alphas] == [(1, 1, 50, 34), (1, 1, 101, 67)]
    assert [tuple(item.shape) for item in refined.active] == [(1, 50, 34), (1, 101, 67)]
    assert torch.equal(refined.alpha, refined.alphas[-1])
    # full scale starts from what half scale made of it, and keeps it where it has nothing to do
    before = enlarge(refined.alphas[0], (101, 67))
    untouched = ~refined.active[1][:, None]
    assert torch.equal(refined.alpha[untouched], before[untouched])


def test_image_up_to_the_limit_is_refined_at_full_scale_only(make_refiner: MakeRefiner, disc: Disc) -> None:
    alpha, trimap, features = maps(disc)
    refined = make_refiner(half_scale_above=64)(torch.rand(1, 3, 64, 48), alpha, trimap, features)
    assert [tuple(item.shape) for item in refined.alphas] == [(1, 1, 64, 48)]


def test_the_two_scales_have_weights_of_their_own(make_refiner: MakeRefiner, disc: Disc) -> None:
    refiner = make_refiner(awake=False, half_scale_above=64)
    inputs = (torch.rand(1, 3, 128, 128), *maps(disc))
    before = refiner(*inputs)
    torch.nn.init.constant_(refiner.scales["half_scale"].leave.bias, 1.0)
    after = refiner(*inputs)
    assert not torch.equal(after.alphas[0], before.alphas[0])
    torch.nn.init.constant_(refiner.scales["half_scale"].leave.bias, 0.0)
    torch.nn.init.constant_(refiner.scales["full_scale"].leave.bias, 1.0)
    after = refiner(*inputs)
    assert torch.equal(after.alphas[0], before.alphas[0])
    assert not torch.equal(after.alphas[1], before.alphas[1])


def test_long_edge_can_be_capped_and_the_result_still_has_the_images_size(
    make_refiner: MakeRefiner, disc: Disc
) -> None:
    alpha, trimap, features = maps(disc)
    refined = make_refiner(max_long_edge=64)(torch.rand(1, 3, 128, 96), alpha, trimap, features)
    assert [tuple(item.shape) for item in refined.alphas] == [(1, 1, 64, 48)]
    assert torch.equal(refined.alpha, enlarge(refined.alphas[0], (128, 96)))


# --- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"half_scale_above": None}, {"half_scale_above": 150}])
def test_refining_a_crop_equals_cropping_the_refined_image(
    make_refiner: MakeRefiner, disc: Disc, options: dict[str, int | None]
) -> None:
    refiner = make_refiner(**options)
    image, (alpha, trimap, features) = torch.rand(2, 3, 256, 256), maps(disc, batch=2)
    whole = refiner(image, alpha, trimap, features)
    places = ((32, 16), (64, 48))
    box = torch.tensor([[top / 256, left / 256, 0.5, 0.5] for top, left in places])
    crops = [(slice(top, top + 128), slice(left, left + 128)) for top, left in places]
    crop = torch.stack([picture[:, rows, columns] for picture, (rows, columns) in zip(image, crops)])
    part = refiner(crop, alpha, trimap, features, box)
    assert len(part.alphas) == len(whole.alphas)
    margin = 32  # the crop's own border is no border of the whole
    for index, (rows, columns) in enumerate(crops):
        wanted, got = whole.alpha[index, 0, rows, columns], part.alpha[index, 0]
        inner = slice(margin, -margin)
        assert (wanted != enlarge(alpha, (256, 256))[index, 0, rows, columns])[inner, inner].any()
        assert torch.allclose(got[inner, inner], wanted[inner, inner], atol=1e-5)
        wanted_active, got_active = whole.active[-1][index, rows, columns], part.active[-1][index]
        assert torch.equal(got_active[inner, inner], wanted_active[inner, inner])


def crops_of(edges: list[int], side: int = 64) -> Tensor:
    """Boxes (B, 4) of square crops of ``side`` pixels, of square photographs whose long edges are given."""
    return torch.tensor([[0.3, 0.25, side / edge, side / edge] for edge in edges])


@pytest.mark.parametrize("train_images", [None, 3])
@pytest.mark.parametrize("options", [{"half_scale_above": 150}, {"half_scale_above": None, "kernel_size": 45}])
def test_crops_of_small_and_large_photographs_in_one_batch_are_refined_as_each_alone(
    make_refiner: MakeRefiner, disc: Disc, options: dict[str, int | None], train_images: int | None
) -> None:
    edges = [90, 200, 128, 400]
    refiner = make_refiner(**options).train()
    image, (alpha, trimap, features) = torch.rand(4, 3, 64, 64), maps(disc, batch=3)
    alpha, trimap, features = (torch.cat([item, item[:1].flip(-1)]) for item in (alpha, trimap, features))
    inputs = (image, alpha, trimap, features.requires_grad_(), crops_of(edges))
    truth = torch.rand(4, 1, 64, 64)
    flags = torch.ones(4, dtype=torch.bool)

    def learn(rows: slice, count: int | None) -> tuple[Refined, Tensor, list[Tensor]]:
        refiner.train_images = count
        refined = refiner(*(item[rows] for item in inputs))
        output = MattingOutput(*([None] * 5), alphas=refined.alphas, active=refined.active, refined=refined.worked)
        targets = targets_for(truth[rows], flags[rows], (8, 8), (4, 4))
        loss = Refinement()(output, targets)
        (loss + 0.0 * refined.alpha.sum()).backward()
        leaves = [features, *refiner.parameters()]
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return refined, loss, gradients

    count = train_images or 4
    together, loss, gradients = learn(slice(None), train_images)
    alone = [learn(slice(row, row + 1), None) for row in range(count)]
    scales = [1, 2, 1, 2] if options["half_scale_above"] else [1, 1, 1, 1]
    assert len(together.alphas) == max(scales)
    for row, (refined, _, _) in enumerate(alone):
        torch.testing.assert_close(together.alpha[row], refined.alpha[0], rtol=0, atol=1e-5)
        assert len(refined.alphas) == scales[row]
        for scale in range(-scales[row], 0):
            torch.testing.assert_close(together.alphas[scale][row], refined.alphas[scale][0], rtol=0, atol=1e-5)
            assert torch.equal(together.active[scale][row], refined.active[scale][0])
    worked = [[row < count and scales[row] >= -scale for row in range(4)] for scale in range(-max(scales), 0)]
    assert [rows.tolist() for rows in together.worked] == worked
    assert [active.flatten(1).any(1).tolist() for active in together.active] == worked
    torch.testing.assert_close(loss, torch.stack([item[1] for item in alone]).mean())
    for index, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, torch.stack([item[2][index] for item in alone]).mean(0))
        assert gradient.any()


def test_crops_that_are_refined_alike_are_refined_in_one_go(
    make_refiner: MakeRefiner, disc: Disc, monkeypatch: pytest.MonkeyPatch
) -> None:
    # equal boxes, and unequal ones that lead to the same scales and kernels: one pass over the whole batch
    refiner, seen = make_refiner(half_scale_above=1024), []
    monkeypatch.setattr(
        refiner, "_scale", lambda unet, inputs, alpha, *rest: seen.append(len(inputs.image)) or (alpha, alpha[:, 0] > 2)
    )
    for edges, passes in (([700] * 3, [3]), ([700, 900, 1024], [3]), ([2000, 1500, 1100], [3, 3])):
        refiner(torch.rand(3, 3, 64, 64), *maps(disc, batch=3), crops_of(edges))
        assert seen == passes
        seen.clear()
    refiner(torch.rand(3, 3, 64, 64), *maps(disc, batch=3), crops_of([2000, 700, 1100]))
    assert seen == [2, 2, 1]


def test_crops_that_a_cap_shrinks_differently_are_put_together_at_the_largest_size(
    make_refiner: MakeRefiner, disc: Disc
) -> None:
    refiner = make_refiner(half_scale_above=None, max_long_edge=100)
    inputs = (torch.rand(2, 3, 64, 64), *maps(disc, batch=2), crops_of([200, 128]))
    refined = refiner(*inputs)
    assert refined.alphas[0].shape == (2, 1, 50, 50)
    assert refined.active[0].shape == (2, 50, 50)
    for row in range(2):
        alone = refiner(*(item[row : row + 1] for item in inputs))
        torch.testing.assert_close(refined.alpha[row], alone.alpha[0], rtol=0, atol=1e-5)
        assert alone.alphas[0].shape[-1] == (32, 50)[row]


def test_resampling_a_box_equals_resampling_all_and_cropping() -> None:
    source = torch.randn(2, 3, 8, 8)
    enlarged = resample(source, (64, 64))
    box = torch.tensor([[0.25, 0.125, 0.5, 0.75], [0.0, 0.25, 0.5, 0.75]])
    part = resample(source, (32, 48), box)
    assert torch.allclose(part[0], enlarged[0, :, 16:48, 8:56], atol=1e-5)
    assert torch.allclose(part[1], enlarged[1, :, 0:32, 16:64], atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (37, 50)])
def test_sampled_rows_equal_enlarging_and_gathering(size: tuple[int, int]) -> None:
    source = torch.randn(2, 5, 8, 6)
    active = ActiveSet.from_mask(torch.rand(2, *size) > 0.7)
    rows = sample_rows(source, *pixel_places(active, size))
    assert torch.allclose(rows, gather(resample(source, size), active), atol=1e-5)


def test_sampled_rows_of_a_box_equal_enlarging_the_box_and_gathering() -> None:
    source, box = torch.randn(2, 5, 8, 6), torch.tensor([[0.1, 0.2, 0.3, 0.5], [0.6, 0.0, 0.4, 1.0]])
    active = ActiveSet.from_mask(torch.rand(2, 40, 30) > 0.7)
    rows = sample_rows(source, *pixel_places(active, (40, 30), box))
    assert torch.allclose(rows, gather(resample(source, (40, 30), box), active), atol=1e-5)


# --- batches and precision --------------------------------------------------------------------------------------------


def test_image_is_refined_alike_alone_and_in_a_batch(make_refiner: MakeRefiner, disc: Disc) -> None:
    refiner, image, (alpha, trimap, features) = make_refiner(), torch.rand(3, 3, 128, 128), maps(disc, batch=3)
    together = refiner(image, alpha, trimap, features).alpha
    for index in range(3):
        one = slice(index, index + 1)
        alone = refiner(image[one], alpha[one], trimap[one], features[one]).alpha
        assert torch.allclose(alone, together[one], atol=1e-5)


def test_refiner_stays_in_float32_under_autocast(make_refiner: MakeRefiner, disc: Disc) -> None:
    refiner, inputs = make_refiner(), (torch.rand(1, 3, 128, 128), *maps(disc))
    plain = refiner(*inputs).alpha
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = refiner(*inputs).alpha
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [True, False])
def test_gradient_leaves_the_refiner_only_if_asked_to(make_refiner: MakeRefiner, disc: Disc, detach: bool) -> None:
    alpha, trimap, features = (item.requires_grad_() for item in maps(disc))
    refiner = make_refiner(detach_inputs=detach).train()
    refiner(torch.rand(1, 3, 64, 64), alpha, trimap, features).alpha.square().sum().backward()
    if detach:
        assert alpha.grad is None
        assert trimap.grad is None
    else:
        assert alpha.grad.abs().sum() > 0
        assert trimap.grad.abs().sum() > 0
    # the projection that makes the features is the refiner's own, and has no other teacher
    assert features.grad.abs().sum() > 0


def test_pixel_pushed_beyond_one_can_come_back(make_refiner: MakeRefiner, disc: Disc) -> None:
    refiner = make_refiner(awake=False, half_scale_above=None)
    bias = refiner.scales["full_scale"].leave.bias
    torch.nn.init.constant_(bias, 1.0)
    alpha, trimap, features = maps(disc)
    refined = refiner(torch.rand(1, 3, 64, 64), alpha, trimap, features).alpha
    pushed = (
        (enlarge(alpha, (64, 64)) > 0.3) & (refined == 1.0) & refiner.active_pixels(*[enlarge(alpha, (64, 64))] * 2)
    )
    assert pushed.sum() > 20
    refined[pushed].sum().backward()
    assert bias.grad.item() > 0


@pytest.mark.parametrize("nothing_to_do", [False, True])
def test_every_parameter_has_a_gradient_on_every_training_step(
    make_refiner: MakeRefiner, disc: Disc, nothing_to_do: bool
) -> None:
    # half scale does not run at this size, and with a certain matte neither does full scale
    refiner = make_refiner(half_scale_above=128).train()
    alpha, trimap, features = maps(disc)
    if nothing_to_do:
        alpha, trimap = torch.zeros_like(alpha), torch.zeros_like(trimap)
    features.requires_grad_()
    refined = refiner(torch.rand(1, 3, 64, 64), alpha, trimap, features)
    assert refined.active[0].any() != nothing_to_do
    refined.alpha.sum().backward()
    assert [name for name, parameter in refiner.named_parameters() if parameter.grad is None] == []
    assert features.grad is not None


def test_in_training_only_the_first_images_are_refined_if_asked(make_refiner: MakeRefiner, disc: Disc) -> None:
    refiner, inputs = make_refiner(train_images=2), (torch.rand(3, 3, 64, 64), *maps(disc, batch=3))
    everything = refiner(*inputs)
    refiner.train()
    some = refiner(*inputs)
    assert some.active[0].flatten(1).any(1).tolist() == [True, True, False]
    assert torch.allclose(some.alpha[:2], everything.alpha[:2], atol=1e-5)
    assert torch.equal(some.alpha[2:], enlarge(inputs[1], (64, 64))[2:])
    assert everything.active[0].flatten(1).any(1).all()
    assert everything.worked == ()
    assert [rows.tolist() for rows in some.worked] == [[True, True, False]]


@pytest.mark.parametrize("bad", [0, -1])
def test_no_row_to_train_on_is_refused(make_refiner: MakeRefiner, bad: int) -> None:
    with pytest.raises(InputError, match="`train_images` must be at least 1"):
        make_refiner(train_images=bad)
