"""Targets against OpenCV's morphology and against small cases worked out by hand."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from lit_matting.targets import (
    area_mean,
    block_classes,
    dilate,
    ellipse_half_widths,
    erode,
    scaled_kernel,
    targets_for,
    trimap_from_alpha,
)


def element(size: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))


def blobs(height: int, width: int, seed: int = 0, cell: int = 6) -> np.ndarray:
    """A soft alpha in bytes, with opaque, clear and intermediate parts that reach the border."""
    noise = np.random.default_rng(seed).random((height // cell + 2, width // cell + 2)).astype(np.float32)
    smooth = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.round(np.clip((smooth - 0.4) * 4, 0, 1) * 255).astype(np.uint8)


def as_mask(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))[None, None]


# --- morphology -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5, 7, 9, 11, 15, 21, 29, 31])
def test_structuring_element_is_opencvs_ellipse(size: int) -> None:
    drawn = np.zeros((size, size), np.uint8)
    for row, half in enumerate(ellipse_half_widths(size)):
        drawn[row, size // 2 - half : size // 2 + half + 1] = 1
    assert np.array_equal(drawn, element(size))


@pytest.mark.parametrize("size", [0, 2, 14, -3])
def test_even_kernels_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="must be odd and positive"):
        ellipse_half_widths(size)


@pytest.mark.parametrize("kernel", [3, 7, 15, 29])
@pytest.mark.parametrize("shape", [(40, 56), (17, 90), (5, 5)])
def test_dilation_and_erosion_equal_opencvs(kernel: int, shape: tuple[int, int]) -> None:
    mask = blobs(*shape) > 128
    # OpenCV: outside the image counts as 0 for dilation and as 1 for erosion
    wanted = cv2.dilate(mask.astype(np.uint8), element(kernel)), cv2.erode(mask.astype(np.uint8), element(kernel))
    assert np.array_equal(dilate(as_mask(mask), kernel)[0, 0].numpy(), wanted[0])
    assert np.array_equal(erode(as_mask(mask), kernel)[0, 0].numpy(), wanted[1])


def test_kernel_of_15_at_512_is_scaled_with_the_image_and_stays_odd() -> None:
    assert [scaled_kernel(size) for size in (32, 128, 256, 384, 512, 768, 1024, 2048)] == [3, 3, 7, 11, 15, 23, 29, 61]
    assert scaled_kernel(512, 25) == 25


# --- the trimap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [3, 15])
def test_trimap_equals_opencvs_erosion_and_dilation_of_the_bytes(kernel: int) -> None:
    alpha = blobs(160, 200, seed=4, cell=50)
    foreground = cv2.erode((alpha == 255).astype(np.uint8), element(kernel))
    possible = cv2.dilate((alpha > 0).astype(np.uint8), element(kernel))
    wanted = np.where(foreground == 1, 1.0, np.where(possible == 0, 0.0, 0.5))
    got = trimap_from_alpha(as_mask(alpha) / 255, kernel)[0, 0].numpy()
    assert np.array_equal(got, wanted)
    assert set(np.unique(got)) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_254_and_1_are_unknown_whatever_the_rounding(dtype: torch.dtype) -> None:
    values = (torch.tensor([0.0, 1.0, 254.0, 255.0]) / 255).to(dtype).repeat_interleave(9).view(1, 1, 1, 36)
    centres = trimap_from_alpha(values, 1)[0, 0, 0, 4::9]
    # half precision cannot tell 254/255 from 1; the others can
    wanted = [0.0, 0.5, 1.0 if dtype == torch.bfloat16 else 0.5, 1.0]
    assert centres.tolist() == wanted


def test_object_cut_off_by_the_image_has_no_band_along_the_cut() -> None:
    alpha = torch.zeros(1, 1, 40, 40)
    alpha[..., 20:, :] = 1
    trimap = trimap_from_alpha(alpha, 15)
    assert trimap[0, 0, :, 0].tolist() == [0.0] * 13 + [0.5] * 14 + [1.0] * 13


def test_empty_and_full_images_have_no_band() -> None:
    assert torch.equal(trimap_from_alpha(torch.zeros(1, 1, 9, 9), 5), torch.zeros(1, 1, 9, 9))
    assert torch.equal(trimap_from_alpha(torch.ones(1, 1, 9, 9), 5), torch.ones(1, 1, 9, 9))


def test_kernel_of_15_holds_a_whole_latent_cell_for_7_of_8_alignments_of_a_hard_edge() -> None:
    # why 15: the transition class must survive the way to an 8-pixel grid even for hard masks
    def alignments(kernel: int) -> int:
        count = 0
        for shift in range(8):
            mask = torch.zeros(1, 1, 64, 64)
            mask[..., 32 + shift :] = 1
            cells = area_mean(trimap_from_alpha(mask, kernel), (8, 8))
            whole = (cells == 0.5) & (block_classes(trimap_from_alpha(mask, kernel), (8, 8)) == 1)[:, None]
            count += bool(whole[0, 0, 4].any())
        return count

    assert alignments(15) == 7
    assert alignments(9) == 1


# --- the coarser targets ----------------------------------------------------------------------------------------------


def test_area_mean_is_the_mean_of_each_cell() -> None:
    image = torch.tensor([[0.0, 1.0, 0.5, 0.5], [1.0, 0.0, 1.0, 0.0]])[None, None]
    assert area_mean(image, (1, 2)).tolist() == [[[[0.5, 0.5]]]]
    assert area_mean(image, (2, 2)).flatten().tolist() == [0.5, 0.5, 0.5, 0.5]
    assert area_mean(image, (1, 1)).item() == 0.5


def test_block_is_foreground_or_background_only_if_all_of_it_is() -> None:
    trimap = torch.tensor(
        [
            [1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.5, 1.0, 0.0],
            [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
        ]
    )[None, None]
    assert block_classes(trimap, (1, 5)).tolist() == [[[2, 1, 0, 1, 1]]]


def test_targets_of_a_hard_edge_worked_out_by_hand() -> None:
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, :, 32:] = 1
    targets = targets_for(mask, torch.tensor([True, False]), (8, 8), (2, 2), kernel_size=15)
    # a band of 7 pixels on each side of the edge at column 32: columns 25 to 38
    row = targets.unknown[0, 0, 5]
    assert row.nonzero().flatten().tolist() == list(range(25, 39))
    # cells of 8 columns: 3 has 7 of 8 columns at 1/2, 4 has 7 columns at 1/2 and one at 1
    assert targets.trimap[0, 0, 0].tolist() == [0, 0, 0, 7 * 0.5 / 8, (7 * 0.5 + 1) / 8, 1, 1, 1]
    assert targets.alpha_lr[0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert targets.coarse_trimap[0].tolist() == [[1, 1], [1, 1]]
    assert targets.coarse_trimap[1].tolist() == [[0, 0], [0, 0]]
    assert targets.has_alpha.tolist() == [True, False]
    assert targets.has_phrase.tolist() == [True, True]
    assert torch.equal(targets.alpha, mask)


def test_targets_choose_the_kernel_by_the_longer_side() -> None:
    mask = torch.zeros(1, 1, 64, 512)
    mask[..., 256:] = 1
    assert targets_for(mask, torch.tensor([True]), (8, 64), (2, 16)).unknown[0, 0, 0].sum().item() == 14


def test_targets_of_a_batch_are_those_of_its_images() -> None:
    alpha = torch.cat([as_mask(blobs(64, 64, seed)) / 255 for seed in range(3)])
    flags = torch.tensor([True, False, True])
    together = targets_for(alpha, flags, (8, 8), (2, 2))
    for index in range(3):
        alone = targets_for(alpha[index : index + 1], flags[index : index + 1], (8, 8), (2, 2))
        for name in ("unknown", "trimap", "coarse_trimap", "alpha_lr"):
            assert torch.equal(getattr(together, name)[index : index + 1], getattr(alone, name))


def test_target_without_a_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`target` must have shape \(B, 1, H, W\)"):
        targets_for(torch.zeros(2, 64, 64), torch.tensor([True, True]), (8, 8), (2, 2))
