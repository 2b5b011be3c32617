"""What is made of a matte: clean colours, cut-outs and composites, on photographs whose truth is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_matting.checks import InputError
from lit_matting.confidence import best_threshold, confidence_of
from lit_matting.pictures import Photo
from lit_matting.results import MattingResult, estimate_foreground


def result_of(alpha: np.ndarray, colour: np.ndarray, **fields: object) -> MattingResult:
    return MattingResult(
        **{
            "alpha": alpha.astype(np.float32),
            "phrase": "the disc",
            "confidence": 0.5,
            "threshold": None,
            "photo": Photo(colour),
            "trimap_lr": np.float32([[0, 1], [0.5, 0]]),
            "grounding_lr": np.float32([[0, 1], [0, 0]]),
            **fields,
        }
    )


@pytest.fixture
def disc() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A red disc with an edge ten pixels soft before green: the photograph, the true alpha, the true colours."""
    y, x = np.mgrid[0:120, 0:160]
    alpha = np.clip((40 - np.hypot(y - 60, x - 80)) / 10 + 0.5, 0, 1)
    foreground = np.stack([0.8 + 0.1 * np.sin(x / 9), 0.1 + 0 * x, 0.2 + 0.1 * np.cos(y / 7)], -1)
    background = np.stack([0.1 + 0 * x, 0.7 + 0.1 * np.sin(y / 11), 0.1 + 0 * x], -1)
    photo = alpha[..., None] * foreground + (1 - alpha[..., None]) * background
    return np.rint(255 * photo).astype(np.uint8), alpha, foreground


def test_the_old_background_is_gone_from_the_soft_edge(disc: tuple[np.ndarray, ...]) -> None:
    photo, alpha, foreground = disc
    edge = (alpha > 0.05) & (alpha < 0.95)
    clean = result_of(alpha, photo).foreground
    fringe = np.abs(photo / 255 - foreground)[edge].mean()
    assert fringe > 0.2, "the example has a fringe to begin with"
    assert np.abs(clean - foreground)[edge].mean() < 0.1 * fringe
    # and so on a new background, where the eye would see it
    blue = np.float32([0.1, 0.1, 0.9])
    truth = alpha[..., None] * foreground + (1 - alpha[..., None]) * blue
    new = np.asarray(result_of(alpha, photo).composite((26, 26, 230))) / 255
    naive = np.asarray(result_of(alpha, photo, clean_colours=False).composite((26, 26, 230))) / 255
    assert np.abs(new - truth)[edge].mean() < 0.15 * np.abs(naive - truth)[edge].mean()


def test_opaque_pixels_keep_the_photographs_own_values(disc: tuple[np.ndarray, ...]) -> None:
    photo, alpha, _ = disc
    cutout = np.asarray(result_of(alpha, photo).cutout)
    opaque = alpha == 1
    assert np.array_equal(cutout[opaque][:, :3], photo[opaque])
    assert np.array_equal(cutout[..., 3], np.rint(255 * alpha.astype(np.float32)))


def test_a_composite_is_the_matting_equation(disc: tuple[np.ndarray, ...]) -> None:
    photo, alpha, _ = disc
    result = result_of(alpha, photo)
    background = np.random.default_rng(0).integers(0, 256, photo.shape, dtype=np.uint8)
    for given, values in {
        "colour": ((10, 200, 30), np.array([10, 200, 30])),
        "image": (background, background),
    }.values():
        exact = 255 * alpha[..., None] * result.foreground.astype(float) + (1 - alpha[..., None]) * values
        composite = np.asarray(result.composite(given))
        assert composite.shape == photo.shape
        assert np.abs(composite - exact).max() <= 0.5 + 1e-3


def test_a_matte_of_nothing_shows_the_background_and_a_matte_of_all_the_photograph(
    disc: tuple[np.ndarray, ...],
) -> None:
    photo, alpha, _ = disc
    nothing, everything = result_of(0 * alpha, photo), result_of(0 * alpha + 1, photo)
    assert (np.asarray(nothing.composite("white")) == 255).all()
    assert (np.asarray(nothing.cutout) == 0).all()
    assert np.array_equal(np.asarray(everything.composite("white")), photo)


def test_colours_are_estimated_only_around_the_matte(disc: tuple[np.ndarray, ...]) -> None:
    photo, alpha, foreground = disc
    wide = np.zeros((400, 500, 3), np.uint8)
    wide[200:320, 300:460] = photo
    matte = np.zeros((400, 500), np.float32)
    matte[200:320, 300:460] = alpha
    estimate = estimate_foreground(wide, matte)
    edge = (alpha > 0.05) & (alpha < 0.95)
    assert np.abs(estimate[200:320, 300:460] - foreground)[edge].mean() < 0.03
    assert (estimate[:150] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (2, 2)])
def test_the_smallest_photographs_have_colours_too(size: tuple[int, int]) -> None:
    colour = np.full((*size, 3), 100, np.uint8)
    result = result_of(np.full(size, 0.5), colour)
    assert result.cutout.size == size[::-1]
    assert np.abs(result.foreground - 100 / 255).max() < 0.02


def test_estimating_colours_leaves_the_number_of_threads_alone() -> None:
    # in a process of its own, because it is the first call that starts the estimator's threads
    code = (
        "import numpy, torch; from lit_matting.results import estimate_foreground; torch.set_num_threads(1);"
        "estimate_foreground(numpy.zeros((9, 9, 3), numpy.uint8), numpy.ones((9, 9), numpy.float32));"
        "assert torch.get_num_threads() == 1, torch.get_num_threads()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_maps_are_enlarged_to_the_photograph(disc: tuple[np.ndarray, ...]) -> None:
    photo, alpha, _ = disc
    result = result_of(alpha, photo)
    assert result.trimap.shape == result.grounding.shape == (120, 160)
    # half-pixel centres: the outer quarter of a 2 x 2 map is constant, and its middle the mean of all four
    assert np.allclose(result.grounding[:30, 120:], 1)
    assert np.isclose(result.grounding[59:61, 79:81].mean(), 0.25)


def test_found_is_unknown_without_calibration() -> None:
    colour, alpha = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4))
    assert result_of(alpha, colour).found is None
    assert result_of(alpha, colour, threshold=0.5).found is True
    assert result_of(alpha, colour, threshold=0.6).found is False


def test_saving_chooses_what_the_name_and_the_arguments_say(tmp_path: Path, disc: tuple[np.ndarray, ...]) -> None:
    photo, alpha, _ = disc
    result = result_of(alpha, photo)
    result.save(tmp_path / "new" / "cut.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "cut.png")), np.asarray(result.cutout))
    result.save(tmp_path / "matte.png", alpha_only=True, bits=16)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "matte.png")), np.rint(result.alpha * 65535))
    result.save(tmp_path / "white.png", background="white")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "white.png")), np.asarray(result.composite("white")))
    with pytest.raises(InputError, match="no transparency"):
        result.save(tmp_path / "cut.jpg")
    assert not (tmp_path / "cut.jpg").exists()


# --- confidence -----------------------------------------------------------------------------------


def maps(*values: float) -> torch.Tensor:
    """(1, 1, 4, 8): the given values first, then zeros."""
    flat = torch.zeros(32)
    flat[: len(values)] = torch.tensor(values)
    return flat.view(1, 1, 4, 8)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_confidence_is_agreement_times_presence(scale: float) -> None:
    grounding, alpha = scale * maps(0.8, 0.8, 0.6, 0.6, 0.2), scale * maps(1, 0.5, 0.6, 0, 0)
    agreement = (0.8 + 0.5 + 0.6) / (1 + 0.8 + 0.6 + 0.6 + 0.2)
    presence = min(1, 2 * scale * (0.8 + 0.8 + 0.6 + 0.6) / 4)
    assert torch.allclose(confidence_of(grounding, alpha), torch.tensor([agreement * presence]))


def test_nothing_found_anywhere_is_no_confidence() -> None:
    nothing, thing = maps(), maps(1, 1, 1, 1)
    pairs = [(nothing, nothing), (nothing, thing), (thing, nothing), (thing, thing)]
    assert [confidence_of(*pair).item() for pair in pairs] == [0, 0, 0, 1]


def test_the_threshold_is_where_no_other_cut_does_better() -> None:
    rng = np.random.default_rng(0)
    measured = [(float(value), True) for value in rng.normal(0.6, 0.15, 60)]
    measured += [(float(value), False) for value in rng.normal(0.3, 0.15, 40)]
    chosen = best_threshold(measured)

    def balanced(cut: float) -> float:
        present = [value >= cut for value, there in measured if there]
        absent = [value < cut for value, there in measured if not there]
        return (sum(present) / 60 + sum(absent) / 40) / 2

    assert chosen.balanced_accuracy == pytest.approx(balanced(chosen.threshold))
    assert chosen.balanced_accuracy == pytest.approx(max(balanced(cut) for cut in np.linspace(-0.2, 1.2, 5001)))
    assert (chosen.present, chosen.absent) == (60, 40)
    with pytest.raises(InputError, match="got 2 and 0"):
        best_threshold([(0.1, True), (0.2, True)])
