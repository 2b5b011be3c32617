"""The five errors against worked-out numbers and against slow versions written straight from their definitions."""

from __future__ import annotations

import math
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from lit_matting.checks import InputError
from lit_matting.metrics import functional
from lit_matting.metrics.connectivity import connected_levels, levels_passed

ERRORS = [functional.sad, functional.mse, functional.mad, functional.grad, functional.conn]


def random_pair(rng: np.random.Generator, kind: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return an 8-bit prediction and truth of the named character."""
    noise = rng.integers(0, 256, size).astype(np.uint8)
    if kind == "speckle":
        return noise, rng.integers(0, 256, size).astype(np.uint8)
    if kind == "same":
        return noise, noise.copy()
    if kind == "smooth":
        soft = cv2.GaussianBlur(noise, (0, 0), 1.5).astype(int)
        truth = np.clip((soft - 128) * 4 + 128, 0, 255)
        return np.clip(truth + rng.integers(-40, 40, size), 0, 255).astype(np.uint8), truth.astype(np.uint8)
    if kind == "binary":
        truth = rng.random(size) < rng.random()
        return 255 * (truth & (rng.random(size) < 0.95)).astype(np.uint8), 255 * truth.astype(np.uint8)
    if kind == "exact thresholds":
        return tuple(rng.choice([0, 25, 26, 51, 102, 153, 204, 255], size).astype(np.uint8) for _ in range(2))
    raise ValueError(kind)


KINDS = ["speckle", "same", "smooth", "binary", "exact thresholds"]


def slow_levels(pred: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return the connectivity level of 8-bit mattes from the definition, in whole numbers."""
    level = np.full(pred.shape, -1)
    for step in range(1, 11):
        both = (10 * pred.astype(int) >= 255 * step) & (10 * alpha.astype(int) >= 255 * step)
        labels, count = ndimage.label(both)
        omega = np.zeros(pred.shape, bool)
        if count:
            omega = labels == 1 + np.bincount(labels.ravel())[1:].argmax()
        level[(level < 0) & ~omega] = step - 1
    level[level < 0] = 10
    return level


def slow_conn(pred: np.ndarray, alpha: np.ndarray, region: np.ndarray | None = None) -> float:
    level = slow_levels(pred, alpha)
    total = Fraction(0)
    for index in np.ndindex(pred.shape):
        if region is None or region[index]:
            base = Fraction(int(level[index]), 10)
            rises = [Fraction(int(matte[index]), 255) - base for matte in (pred, alpha)]
            phi = [1 - rise if rise >= Fraction(15, 100) else Fraction(1) for rise in rises]
            total += abs(phi[0] - phi[1])
    return float(total / 1000)


def slow_grad(pred: np.ndarray, alpha: np.ndarray, region: np.ndarray | None = None, stretch: bool = True) -> float:
    offsets = range(-4, 5)
    gauss = {t: math.exp(-(t**2) / (2 * 1.4**2)) for t in offsets}
    across = np.array([[gauss[i] * -j * gauss[j] for j in offsets] for i in offsets])
    across /= math.sqrt((across**2).sum())
    sizes = []
    for matte in (pred, alpha):
        values = matte / 255 if matte.dtype == np.uint8 else matte.astype(np.float64)
        if stretch:
            low, high = values.min(), values.max()
            values = (values - low) / (high - low) if high > low else np.zeros_like(values)
        parts = [ndimage.correlate(values, kernel, mode="nearest") for kernel in (across, across.T)]
        sizes.append(np.hypot(*parts))
    difference = (sizes[0] - sizes[1]) ** 2
    return float((difference if region is None else difference[region]).sum() / 1000)


@pytest.mark.parametrize("error", ERRORS)
def test_a_perfect_matte_has_no_error(error) -> None:
    matte = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    assert error(matte, matte) == 0
    assert error(matte / 255, matte / 255) == 0


@pytest.mark.parametrize("error", ERRORS)
def test_an_empty_region_gives_zero(error) -> None:
    rng = np.random.default_rng(0)
    pred, alpha = random_pair(rng, "speckle", (9, 9))
    assert error(pred, alpha, np.zeros((9, 9), bool)) == 0
    assert error(pred / 255, alpha / 255, torch.zeros(9, 9, dtype=torch.bool)) == 0


@pytest.mark.parametrize("error", ERRORS)
def test_an_image_without_pixels_gives_zero(error) -> None:
    assert error(np.zeros((0, 5), np.uint8), np.zeros((0, 5), np.uint8)) == 0


@pytest.mark.parametrize("error", ERRORS)
def test_arrays_tensors_8_bit_and_floats_agree(error) -> None:
    rng = np.random.default_rng(1)
    pred, alpha = random_pair(rng, "smooth", (33, 47))
    region = rng.random((33, 47)) < 0.5
    expected = error(pred, alpha, region)
    assert expected > 0
    assert error(torch.from_numpy(pred), torch.from_numpy(alpha), torch.from_numpy(region)) == expected
    assert error(pred / 255, alpha / 255, region) == pytest.approx(expected, rel=1e-12)
    assert error(pred / 255, alpha, region) == pytest.approx(expected, rel=1e-12)
    single = error(torch.from_numpy(pred).float() / 255, torch.from_numpy(alpha).float() / 255, region)
    assert single == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("error", ERRORS)
def test_a_sliced_and_a_flipped_view_are_read_as_they_look(error) -> None:
    pred, alpha = random_pair(np.random.default_rng(2), "smooth", (40, 60))
    assert error(pred[::2, ::-3], alpha[::2, ::-3]) == error(pred[::2, ::-3].copy(), alpha[::2, ::-3].copy())


def test_sad_mse_and_mad_of_worked_out_numbers() -> None:
    pred = np.array([[255, 0], [51, 102]], np.uint8)
    alpha = np.array([[0, 0], [0, 204]], np.uint8)
    assert functional.sad(pred, alpha) == pytest.approx((1 + 0.2 + 0.4) / 1000, rel=1e-15)
    assert functional.mad(pred, alpha) == pytest.approx(1.6 / 4, rel=1e-15)
    assert functional.mse(pred, alpha) == pytest.approx((1 + 0.04 + 0.16) / 4, rel=1e-15)
    inside = np.array([[False, False], [True, True]])
    assert functional.mad(pred, alpha, inside) == pytest.approx(0.3, rel=1e-15)


def test_8_bit_sums_are_exact_on_a_large_image() -> None:
    rng = np.random.default_rng(3)
    pred, alpha = random_pair(rng, "speckle", (1500, 3001))
    difference = np.abs(pred.astype(np.int64) - alpha.astype(np.int64))
    assert functional.sad(pred, alpha) == pytest.approx(int(difference.sum()) / 255 / 1000, rel=1e-15)
    assert functional.mse(pred, alpha) == pytest.approx(int((difference**2).sum()) / 65025 / pred.size, rel=1e-15)
    inside = rng.random(pred.shape) < 0.5
    assert functional.sad(pred, alpha, inside) == pytest.approx(int(difference[inside].sum()) / 255 / 1000, rel=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stretch", [True, False])
def test_grad_equals_two_full_correlations(kind, stretch) -> None:
    rng = np.random.default_rng(4)
    for size in [(1, 1), (3, 5), (40, 31), (150, 270)]:
        pred, alpha = random_pair(rng, kind, size)
        region = rng.random(size) < 0.6
        normalize = "minmax" if stretch else "none"
        assert functional.grad(pred, alpha, None, normalize) == pytest.approx(
            slow_grad(pred, alpha, None, stretch), abs=1e-9
        )
        assert functional.grad(pred, alpha, region, normalize) == pytest.approx(
            slow_grad(pred, alpha, region, stretch), abs=1e-9
        )


def test_grad_skips_only_tiles_without_a_difference() -> None:
    alpha = np.random.default_rng(5).integers(0, 256, (400, 500)).astype(np.uint8)
    for row, column in [(0, 0), (127, 127), (128, 256), (131, 124), (399, 499)]:
        pred = alpha.copy()
        pred[row, column] ^= 128
        assert functional.grad(pred, alpha) == pytest.approx(slow_grad(pred, alpha), abs=1e-12)


def test_grad_of_a_fainter_copy_is_zero_only_when_stretched() -> None:
    alpha = np.zeros((32, 32))
    alpha[8:24, 8:24] = 1
    assert functional.grad(0.5 * alpha + 0.2, alpha) == pytest.approx(0, abs=1e-20)
    assert functional.grad(0.5 * alpha + 0.2, alpha, normalize="none") > 0.01


def test_grad_of_a_constant_prediction_is_the_gradient_of_the_truth() -> None:
    alpha = np.zeros((40, 50), np.uint8)
    alpha[10:30, 20:35] = 200
    expected = slow_grad(np.zeros_like(alpha), alpha)
    for value in (0, 77, 255):
        assert functional.grad(np.full_like(alpha, value), alpha) == pytest.approx(expected, abs=1e-12)


def test_grad_replicates_the_border() -> None:
    """An object cut by the image border has no edge there; zero padding would invent one."""
    alpha = np.ones((30, 30))
    alpha[:, 15:] = 0
    tall = np.ones((90, 30))
    tall[:, 15:] = 0
    pred = np.zeros((30, 30))
    pred[:, :10] = 1
    tall_pred = np.zeros((90, 30))
    tall_pred[:, :10] = 1
    assert functional.grad(tall_pred, tall) == pytest.approx(3 * functional.grad(pred, alpha), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_conn_equals_the_definition_in_fractions(kind) -> None:
    rng = np.random.default_rng(6)
    for _ in range(12):
        size = tuple(rng.integers(1, 24, 2))
        pred, alpha = random_pair(rng, kind, size)
        region = rng.random(size) < 0.7
        assert functional.conn(pred, alpha) == pytest.approx(slow_conn(pred, alpha), abs=1e-15)
        assert functional.conn(pred, alpha, region) == pytest.approx(slow_conn(pred, alpha, region), abs=1e-15)
        assert functional.conn(pred / 255, alpha / 255) == pytest.approx(slow_conn(pred, alpha), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_connected_levels_equal_ten_labellings(kind) -> None:
    """Hundreds of small images reach every branch: certificates, ties, lost components, empty thresholds."""
    rng = np.random.default_rng(7)
    for _ in range(400):
        pred, alpha = random_pair(rng, kind, tuple(rng.integers(1, 26, 2)))
        levels = cv2.min(levels_passed(pred), levels_passed(alpha))
        np.testing.assert_array_equal(connected_levels(levels), slow_levels(pred, alpha))


def test_solid_bodies_with_holes_bridges_and_twins_keep_their_levels() -> None:
    """Large opaque areas are not walked through but counted: their sizes must still decide which is the largest."""
    rng = np.random.default_rng(8)
    for _ in range(150):
        height, width = rng.integers(40, 130, 2)
        alpha = np.zeros((height, width), np.uint8)
        for _ in range(rng.integers(1, 6)):
            top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
            tall, wide = rng.integers(17, 70, 2)
            alpha[top : top + tall, left : left + wide] = rng.choice([255, 255, 255, 153, 80])
        pred = alpha.copy()
        for _ in range(rng.integers(0, 8)):
            row, column = rng.integers(0, height), rng.integers(0, width)
            if rng.random() < 0.5:
                pred[row, column : column + rng.integers(1, 60)] = rng.choice([0, 26, 128, 255])
            else:
                pred[row : row + rng.integers(1, 60), column] = rng.choice([0, 26, 128, 255])
        levels = cv2.min(levels_passed(pred), levels_passed(alpha))
        np.testing.assert_array_equal(connected_levels(levels), slow_levels(pred, alpha))
    twins = np.zeros((40, 90), np.uint8)
    twins[2:38, 2:40] = twins[2:38, 50:88] = 255
    np.testing.assert_array_equal(connected_levels(levels_passed(twins)), slow_levels(twins, twins))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_thresholds_are_exact_for_8_bit_values_in_any_float_type(dtype) -> None:
    values = np.arange(256, dtype=np.uint8)[None]
    expected = (10 * np.arange(256) // 255)[None]
    np.testing.assert_array_equal(levels_passed(values), expected)
    np.testing.assert_array_equal(levels_passed(values.astype(dtype) / dtype(255)), expected)


def test_conn_passes_a_pixel_that_lies_exactly_on_a_threshold() -> None:
    """153 / 255 is 0.6: inside Omega_6, its level is 0.6, and a prediction of 1 rises 0.4 above it."""
    alpha = np.full((10, 10), 153, np.uint8)
    pred = np.full((10, 10), 255, np.uint8)
    assert functional.conn(pred, alpha) == pytest.approx(100 * 0.4 / 1000, rel=1e-12)


def test_conn_scores_a_completely_wrong_object_and_a_black_output() -> None:
    alpha = np.zeros((40, 40), np.uint8)
    alpha[5:15, 5:15] = 255
    wrong = np.zeros_like(alpha)
    wrong[25:35, 25:35] = 255
    assert functional.conn(wrong, alpha) == pytest.approx(0.2, rel=1e-12)
    assert functional.conn(np.zeros_like(alpha), alpha) == pytest.approx(0.1, rel=1e-12)


def test_conn_takes_the_first_of_two_components_of_one_size() -> None:
    """Both centres are 128 of 255. The left block is the component, so its centre drops out at 0.6 with level 0.5,
    and the truth rises 0.5 above it; all of the right block has level 0, and its centre misses 127 / 255 there.
    """
    alpha = np.zeros((3, 7), np.uint8)
    alpha[:, :3] = alpha[:, 4:] = 255
    pred = alpha.copy()
    pred[1, 1] = pred[1, 5] = 128
    assert functional.conn(pred, alpha) == pytest.approx((0.5 + 127 / 255) / 1000, rel=1e-12)


def test_conn_connects_over_the_whole_image_and_sums_over_the_region() -> None:
    alpha = np.zeros((20, 20), np.uint8)
    alpha[2:18, 2:18] = 255
    pred = alpha.copy()
    pred[10, :] = 0
    region = np.zeros((20, 20), bool)
    region[10] = True
    assert functional.conn(pred, alpha, region) == pytest.approx(16 / 1000, rel=1e-12)
    assert functional.conn(pred, alpha, ~region) == 0


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("pred", "alpha", "region", "words"),
    [
        (np.zeros((4, 4)), np.zeros((4, 5)), None, "resize the prediction"),
        (np.zeros((1, 4, 4)), np.zeros((4, 4)), None, r"shape \(H, W\)"),
        (np.full((4, 4), 2.0), np.zeros((4, 4)), None, "divide 8-bit values by 255"),
        (np.full((4, 4), np.nan), np.zeros((4, 4)), None, "must lie in"),
        (np.zeros((4, 4), np.uint16), np.zeros((4, 4)), None, "65535"),
        (np.zeros((4, 4)), np.zeros((4, 4)), np.zeros((4, 4), np.uint8), "trimap == 128"),
        (np.zeros((4, 4)), np.zeros((4, 4)), np.zeros((4, 3), bool), "`region` is"),
    ],
)
def test_wrong_input_is_named(error, pred, alpha, region, words) -> None:
    with pytest.raises(InputError, match=words):
        error(pred, alpha, region)


def test_boolean_masks_and_half_precision_are_mattes_too() -> None:
    mask = np.zeros((8, 8), bool)
    mask[2:6, 2:6] = True
    assert functional.sad(mask, np.zeros((8, 8))) == pytest.approx(0.016)
    half = torch.full((8, 8), 0.5, dtype=torch.bfloat16)
    assert functional.mad(half, torch.zeros(8, 8, dtype=torch.float16)) == 0.5


@pytest.mark.parametrize("index", [1, 9, 20])
def test_real_photographs_agree_with_the_slow_versions(shared_data, index) -> None:
    alpha = cv2.imread(str(shared_data / "real_alpha" / f"am_gt{index:02d}_alpha.png"), cv2.IMREAD_GRAYSCALE)
    alpha = cv2.resize(alpha, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    rng = np.random.default_rng(index)
    pred = np.clip(cv2.GaussianBlur(alpha, (0, 0), 1.2) + rng.normal(0, 6, alpha.shape), 0, 255).astype(np.uint8)
    assert functional.conn(pred, alpha) == pytest.approx(slow_conn(pred, alpha), abs=1e-12)
    assert functional.grad(pred, alpha) == pytest.approx(slow_grad(pred, alpha), abs=1e-9)
