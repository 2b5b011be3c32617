"""Augmentation: image and alpha move together, and no phrase becomes false."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_modules.phrases import TextRules
from data_modules.transforms import (
    Augmentation,
    Box,
    View,
    colour_matrix,
    detail_box,
    full_view,
    mattes,
    pictures,
    recompose,
    resize,
    show,
    show_target,
)
from lit_matting.checks import InputError

PLAIN = TextRules(False, False, False)


def _disc(size: int = 64, x: int = 20, y: int = 40, radius: int = 10) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return (np.clip(radius - np.hypot(rows - y, columns - x), 0, 1) * 255).astype(np.uint8)


def test_shrinking_takes_area_means() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(resize(image, 16, 16).astype(float) - expected).max() <= 0.5


def test_side_that_shrinks_takes_area_means_even_where_the_other_grows() -> None:
    tall = np.random.default_rng(0).random((640, 16), dtype=np.float32)
    means = tall.reshape(64, 10, 16).mean(1)
    middles = resize(tall, 64, 32)[:, 1:-1]
    # twice as wide: a quarter of the way to the neighbour, and three
    left, right = means[:, :-1], means[:, 1:]
    assert np.allclose(middles[:, 0::2], 0.75 * left + 0.25 * right, atol=1e-6)
    assert np.allclose(middles[:, 1::2], 0.25 * left + 0.75 * right, atol=1e-6)


def test_alpha_follows_the_image_through_every_view() -> None:
    """An image whose red channel is the alpha must still have it as its red channel."""
    alpha = _disc()
    image = np.stack([alpha, np.zeros_like(alpha), np.zeros_like(alpha)], axis=2)
    augmentation = Augmentation(crop_probability=1, brightness=0, contrast=0, saturation=0, hue=0)
    seen = set()
    for draw in range(40):
        view = augmentation.draw(image, {0: alpha}, PLAIN, np.random.default_rng(draw))
        shown = show(view, image, 48, 48)[..., 0] / 255
        assert np.abs(shown - show_target(view, alpha, 48, 48, hard=False) / 255).max() <= 1 / 255
        seen.add((view.flip, view.box))
    assert {flip for flip, _ in seen} == {True, False}
    assert len({box for _, box in seen}) > 20


def test_sixteen_bit_and_eight_bit_alphas_are_the_same_matte() -> None:
    alpha = _disc()
    view = full_view(alpha)
    narrow, wide = (mattes([show_target(view, a, 32, 32, False)]) for a in (alpha, alpha.astype(np.uint16) * 257))
    assert (narrow - wide).abs().max() < 0.003
    assert torch.equal(mattes([np.array([[0, 65535]], np.uint16)]), torch.tensor([[[[0.0, 1.0]]]]))


def test_every_eight_bit_value_becomes_its_255th() -> None:
    image = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    expected = torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255
    assert torch.equal(pictures([image, image, image[::-1]])[1], expected)
    assert torch.equal(mattes([image[..., 0]])[0, 0], expected[0])


def test_hard_masks_stay_hard() -> None:
    shown = show_target(full_view(_disc()), (_disc() > 127).astype(np.uint8) * 255, 20, 20, hard=True)
    assert set(np.unique(shown)) == {0, 255}


def test_crops_keep_the_named_instance_mostly_visible() -> None:
    alpha = _disc(x=8, y=8, radius=8)
    image = np.zeros((64, 64, 3), np.uint8)
    augmentation = Augmentation(crop_probability=1, crop_scale=(0.2, 0.5), keep_visible=0.9)
    for draw in range(200):
        box = augmentation.draw(image, {0: alpha}, PLAIN, np.random.default_rng(draw)).box
        assert box.cut(alpha).sum() >= 0.9 * alpha.sum()


def test_phrases_with_a_side_are_never_mirrored_and_with_a_place_never_cropped() -> None:
    alpha, image = _disc(), np.zeros((64, 64, 3), np.uint8)
    augmentation = Augmentation(crop_probability=1, flip_probability=1)
    side = TextRules.of(["the left one"])
    top = TextRules.of(["the top one"])
    for draw in range(50):
        view = augmentation.draw(image, {0: alpha}, side, np.random.default_rng(draw))
        assert (view.flip, view.box) == (False, Box(0, 0, 64, 64))
        view = augmentation.draw(image, {0: alpha}, top, np.random.default_rng(draw))
        assert (view.flip, view.box) == (True, Box(0, 0, 64, 64))


def test_with_swapped_sides_only_sure_phrases_are_mirrored() -> None:
    alpha, image = _disc(), np.zeros((64, 64, 3), np.uint8)
    augmentation = Augmentation(crop_probability=0, flip_probability=1, swap_sides=True)
    for phrases, flipped in (
        (["the left one"], True),
        (["a thing"], True),
        (["the one right behind the door"], False),
        (["the horse at 3 o'clock"], False),
        (["the left one", "the one right behind the door"], False),
    ):
        view = augmentation.draw(image, {0: alpha}, TextRules.of(phrases), np.random.default_rng(0))
        assert view.flip == flipped


def test_mirrored_images_are_called_by_phrases_that_are_true_of_them(pictures: Callable[..., Path]) -> None:
    """Of two stripes the one whose alpha lies left is called left, in every batch, mirrored or not."""
    from data_modules import InterleavedDataModule, ShardSource

    def sided(number: int, instance: int) -> list[tuple[str, str]]:
        return [(f"the {('left', 'right')[instance]} one", "absolute")]

    path = pictures("sided", 12, phrases=sided)
    mirrored = 0
    for swap in (True, False):
        module = InterleavedDataModule(
            {"s": ShardSource(str(path), batch_size=12)},
            image_size=24,
            epoch_iterations=4,
            augment=Augmentation(0, brightness=0, contrast=0, saturation=0, hue=0, swap_sides=swap),
        )
        module.setup("fit")
        for batch in module.train_dataloader():
            for target, instance, prompt in zip(batch.target, batch.instance.tolist(), batch.prompts):
                lies_left = bool(target[..., :12].sum() > target[..., 12:].sum())
                assert prompt == ("the left one" if lies_left else "the right one")
                mirrored += swap and lies_left != (instance == 0)
                assert swap or lies_left == (instance == 0)
    assert 10 < mirrored < 38


def test_colour_words_hold_hue_changes_within_two_percent() -> None:
    """Measured on every saturated colour, after 8-bit rounding and clipping, by Python's own HSV."""
    hues = [
        colorsys.hsv_to_rgb(step / 24, saturation, value)
        for step in range(24)
        for saturation in (0.6, 1)
        for value in (0.6, 1)
    ]
    image = np.rint(np.array(hues)[None] * 255).astype(np.uint8)
    augmentation = Augmentation(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.3)
    worst = {True: 0.0, False: 0.0}
    for named in (True, False):
        rules = TextRules(False, False, names_colour=named)
        for draw in range(100):
            view = augmentation.draw(image, {}, rules, np.random.default_rng(draw))
            shown = show(View(Box(0, 0, *image.shape[:2]), colour=view.colour), image, *image.shape[:2])
            for before, after in zip(image[0] / 255, shown[0] / 255):
                change = abs(colorsys.rgb_to_hsv(*before)[0] - colorsys.rgb_to_hsv(*after)[0])
                worst[named] = max(worst[named], min(change, 1 - change))
    assert worst[True] <= 0.02
    assert worst[False] > 0.2


def test_colour_matrix_turns_saturates_and_darkens() -> None:
    red = np.array([255.0, 0, 0, 1])
    np.testing.assert_allclose(colour_matrix(1, 1, 1, 1 / 3) @ red, [0, 255, 0], atol=1e-9)
    np.testing.assert_allclose(colour_matrix(1, 1, 0, 0) @ red, [0.299 * 255] * 3)
    np.testing.assert_allclose(colour_matrix(0.5, 1, 1, 0) @ red, [127.5, 0, 0])
    np.testing.assert_allclose(colour_matrix(1, 0, 1, 0) @ red, [127.5] * 3)


def test_recomposition_is_the_matting_equation() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 128, (8, 8), dtype=np.uint8)
    second = rng.integers(0, 128, (8, 8), dtype=np.uint8)
    colours = {k: rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for k in (0, 1)}
    back = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    a, b = first[..., None] / 255, second[..., None] / 255
    expected = a * colours[0] + b * colours[1] + (1 - a - b) * back
    found = recompose(colours, {0: first, 1: second}, back)
    assert np.abs(found - expected).max() <= 0.51


def test_background_keeps_its_shape_when_it_fills_another() -> None:
    back = np.zeros((40, 80, 3), np.uint8)
    back[:, 20:60] = 200
    shown = recompose({0: np.zeros((10, 10, 3), np.uint8)}, {0: np.zeros((10, 10), np.uint8)}, back)
    assert (shown == 200).all()


def test_detail_lies_on_the_soft_border_inside_the_view() -> None:
    alpha = _disc(size=200, x=100, y=100, radius=50)
    view = View(Box(20, 30, 150, 160), flip=True)
    for draw in range(50):
        box = detail_box(view, alpha, 32, np.random.default_rng(draw))
        assert (box.height, box.width) == (32, 32)
        assert box.top >= 20
        assert box.left >= 30
        assert box.top + 32 <= 170
        assert box.left + 32 <= 190
        part = box.cut(alpha)
        assert part.min() < 250
        assert part.max() > 5


def test_impossible_augmentations_are_refused() -> None:
    with pytest.raises(InputError, match="flip_probability"):
        Augmentation(flip_probability=1.5)
    with pytest.raises(InputError, match="colour_word_hue"):
        Augmentation(colour_word_hue=0.1)
    with pytest.raises(InputError, match="crop_scale"):
        Augmentation(crop_scale=(0.9, 0.5))


def test_detail_is_the_part_of_the_picture_that_its_box_names(pictures: Callable[..., Path]) -> None:
    from data_modules import InterleavedDataModule, ShardSource

    path = pictures("d", 8, size=96)
    module = InterleavedDataModule(
        train={"d": ShardSource(str(path), batch_size=16)},
        image_size=96,
        detail_size=24,
        augment=Augmentation(crop_scale=(0.6, 0.9), crop_ratio=(1.0, 1.0), crop_probability=1),
    )
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch.detail is not None
    assert batch.detail.image.shape == (16, 3, 24, 24)
    for row in range(16):
        top, left, height, width = batch.detail.box[row].tolist()
        # the same part of the small picture, found by sampling, against the alpha of the detail
        ys = torch.linspace(0.5, 23.5, 24) / 24 * height + top
        xs = torch.linspace(0.5, 23.5, 24) / 24 * width + left
        grid = torch.stack([xs[None].expand(24, 24), ys[:, None].expand(24, 24)], dim=-1)[None] * 2 - 1
        sampled = F.grid_sample(batch.target[row : row + 1], grid, align_corners=False)
        assert (sampled - batch.detail.target[row : row + 1]).abs().mean() < 0.03
