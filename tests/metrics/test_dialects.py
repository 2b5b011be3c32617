"""The two deviating codes, against small transcriptions of what they do, and what their deviations do to a score."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scipy import ndimage

from lit_matting.checks import InputError
from lit_matting.metrics import functional
from lit_matting.metrics.matting import MAD, MSE, SAD, Conn, Grad


def object_at(top: int, left: int, side: int = 10) -> np.ndarray:
    alpha = np.zeros((40, 40), np.uint8)
    alpha[top : top + side, left : left + side] = 255
    return alpha


def transcribed_conn(pred: np.ndarray, alpha: np.ndarray, dialect: str) -> float:
    pred, alpha = pred / 255, alpha / 255
    steps = np.arange(0, 1.1, 0.1)
    level = -np.ones_like(pred)
    for index in range(1, len(steps)):
        labels, count = ndimage.label((pred >= steps[index]) & (alpha >= steps[index]))
        sizes = np.bincount(labels.ravel())
        if dialect == "p3m":
            if count == 0:
                continue
            omega = labels == 1 + sizes[1:].argmax()
        else:
            omega = labels == sizes.argmax()
        level[(level == -1) & ~omega] = steps[index - 1]
    level[level == -1] = 1
    rises = [pred - level, alpha - level]
    phi = [1 - rise * (rise >= 0.15) for rise in rises]
    return float(np.abs(phi[0] - phi[1]).sum() / 1000)


@pytest.mark.parametrize("dialect", ["python_port", "p3m"])
def test_conn_follows_the_transcription(dialect) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        size = tuple(rng.integers(2, 30, 2))
        alpha = rng.choice([0, 40, 77, 153, 179, 255], size).astype(np.uint8)
        pred = np.where(rng.random(size) < 0.7, alpha, rng.integers(0, 256, size)).astype(np.uint8)
        assert functional.conn(pred, alpha, dialect=dialect) == pytest.approx(
            transcribed_conn(pred, alpha, dialect), abs=1e-12
        )


def test_the_port_scores_a_completely_wrong_object_and_a_black_output_as_perfect() -> None:
    alpha, wrong = object_at(5, 5), object_at(25, 25)
    for pred in (wrong, np.zeros_like(alpha)):
        assert functional.conn(pred, alpha, dialect="python_port") == 0
        assert functional.conn(pred, alpha) >= 0.1


def test_the_p3m_code_scores_a_black_output_as_perfect() -> None:
    """Where nothing is left at any threshold it never sets a level, and all pixels end at level 1."""
    assert functional.conn(np.zeros((40, 40), np.uint8), object_at(5, 5), dialect="p3m") == 0


@pytest.mark.parametrize("dialect", ["python_port", "p3m"])
def test_accumulated_thresholds_drop_153_of_255(dialect) -> None:
    """0.6 fails 0.6000000000000001: the level is 0.5, and 0.1 less than it should be."""
    alpha = np.full((10, 10), 153, np.uint8)
    alpha[0, 0] = 255
    pred = np.full((10, 10), 255, np.uint8)
    exact = functional.conn(pred, alpha)
    assert exact == pytest.approx(99 * 0.4 / 1000, rel=1e-12)
    assert functional.conn(pred, alpha, dialect=dialect) != pytest.approx(exact, rel=1e-3)


def test_the_port_never_stretches() -> None:
    alpha = object_at(10, 10, 20)
    pred = (alpha * 0.5).astype(np.uint8)
    assert functional.grad(pred, alpha, dialect="python_port") == functional.grad(pred, alpha, normalize="none")
    assert functional.grad(pred, alpha) == pytest.approx(0, abs=1e-20)


def test_the_p3m_gradient_is_a_unit_sum_gaussian_in_tens() -> None:
    alpha, pred = object_at(10, 10, 20) / 255, object_at(12, 9, 20) / 255
    sizes = []
    for matte in (pred, alpha):
        parts = [ndimage.gaussian_filter(matte, 1.4, order=order) for order in ([1, 0], [0, 1])]
        sizes.append(np.hypot(*parts))
    expected = ((sizes[0] - sizes[1]) ** 2).sum() / 10
    assert functional.grad(pred, alpha, dialect="p3m") == pytest.approx(expected, rel=1e-5)
    # the smaller kernel and the smaller divisor nearly cancel: close enough to be mistaken for the definition
    assert functional.grad(pred, alpha) == pytest.approx(expected, rel=0.1)
    assert functional.grad(pred, alpha) != pytest.approx(expected, rel=0.01)


def test_zero_padding_would_invent_an_edge_along_the_image_border() -> None:
    """Two constant mattes have no gradient anywhere; with zeros around them they have one, and it differs."""
    pred, alpha = np.full((30, 30), 1.0), np.full((30, 30), 0.5)
    assert functional.grad(pred, alpha, normalize="none") == pytest.approx(0, abs=1e-25)
    padded = functional.grad(np.pad(pred, 8), np.pad(alpha, 8), normalize="none")
    assert padded > 0.01


def test_mirroring_and_replicating_the_border_differ() -> None:
    ramp = np.linspace(0, 1, 40)[None].repeat(40, 0)
    inside = np.zeros((40, 40), bool)
    inside[:, :4] = True
    mirrored = functional.grad(ramp, 0 * ramp, inside, dialect="p3m")
    replicated = functional.grad(ramp, 0 * ramp, inside, normalize="none")
    centre = np.zeros((40, 40), bool)
    centre[:, 18:22] = True
    scale = functional.grad(ramp, 0 * ramp, centre, dialect="p3m") / functional.grad(
        ramp, 0 * ramp, centre, normalize="none"
    )
    assert mirrored / replicated != pytest.approx(scale, rel=0.05)


def test_the_region_trimap_above_zero_takes_the_foreground_in() -> None:
    alpha = object_at(10, 10, 20)
    trimap = alpha.copy()
    trimap[8:12, 8:32] = 128
    pred = alpha.copy()
    pred[20:25, 20:25] = 0
    assert functional.sad(pred, alpha, trimap == 128) == 0
    assert functional.sad(pred, alpha, trimap > 0) == pytest.approx(0.025)


@pytest.mark.parametrize("name", ["sad", "mse", "mad", "grad", "conn"])
def test_neither_truth_nor_prediction_is_resized_silently(name) -> None:
    """Where other code resizes the truth to the prediction, functions and classes alike refuse."""
    alpha = cv2.GaussianBlur(object_at(10, 10, 20), (0, 0), 2)
    other = cv2.resize(alpha, (60, 60), interpolation=cv2.INTER_AREA)
    error, whole = getattr(functional, name), {"SAD": SAD, "MSE": MSE, "MAD": MAD, "GRAD": Grad, "CONN": Conn}
    for pred, truth in ((other, alpha), (alpha, other), (alpha.T[:30], alpha)):
        with pytest.raises(InputError, match="never the truth"):
            error(pred, truth)
        with pytest.raises(InputError, match="never the truth"):
            whole[name.upper()]().update([pred], [truth])
    with pytest.raises(InputError, match="region"):
        error(alpha, alpha, other == 128)


def test_sums_are_in_thousands_and_means_are_plain() -> None:
    """Published numbers are 1000 times these for MSE and MAD, and for the three others where nobody divided."""
    pred, alpha = np.full((50, 100), 255, np.uint8), np.zeros((50, 100), np.uint8)
    pixels = 5000
    assert functional.sad(pred, alpha) == pixels / 1000
    assert functional.mad(pred, alpha) == functional.mse(pred, alpha) == 1
    # nothing is connected to anything, so the level is 0, phi(p) = 0 and phi(a) = 1 at every pixel
    assert functional.conn(pred, alpha) == pixels / 1000
    half = np.zeros((50, 100))
    half[:, :50] = 0.5
    assert functional.mse(half, 0 * half) == 0.125
    assert functional.mad(half, 0 * half) == 0.25
    assert functional.sad(half, 0 * half) == 1.25
    # an upright edge of height 1: 50 rows, each of the sum of the squared smoothed steps, by the definition's kernel
    offsets = np.arange(-4, 5)
    gauss = np.exp(-(offsets**2) / (2 * 1.4**2))
    slope = -offsets * gauss / np.sqrt((gauss**2).sum() * ((offsets * gauss) ** 2).sum())
    step = np.convolve(np.pad((np.arange(100) < 50).astype(float), 4, "edge"), slope, "valid") * gauss.sum()
    assert functional.grad(half * 2, 0 * half) == pytest.approx(50 * (step**2).sum() / 1000, rel=1e-9)


def test_a_uniformly_too_faint_matte_scores_almost_nothing_in_the_p3m_code() -> None:
    """Above the factor nothing is left, and there that code sets no level: all pixels end at 1, as if right."""
    hard = object_at(8, 8, 24)
    for factor in (0.85, 0.65, 0.35):
        faint = np.rint(factor * hard).astype(np.uint8)
        assert functional.conn(faint, hard, dialect="p3m") == 0
        # by the definition the body is at the last level that both pass, where the truth rises above it and p does not
        assert functional.conn(faint, hard) == pytest.approx(24 * 24 * (1 - (factor - 0.05)) / 1000, rel=1e-9)
    soft = cv2.GaussianBlur(hard, (0, 0), 1.5)
    faint = np.rint(0.85 * soft).astype(np.uint8)
    assert functional.conn(faint, soft, dialect="p3m") < 0.05 * functional.conn(faint, soft)


def test_an_unknown_dialect_is_named() -> None:
    for error in (functional.grad, functional.conn):
        with pytest.raises(ValueError, match="python_port"):
            error(np.zeros((2, 2)), np.zeros((2, 2)), dialect="octave")
