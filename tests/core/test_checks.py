"""Checks say what was wrong, what was expected, and where."""

from __future__ import annotations

import pytest
import torch

from lit_matting.checks import InputError, check_prompt, check_range, check_shape


def test_letters_are_bound_and_must_hold_everywhere() -> None:
    sizes = check_shape(torch.zeros(2, 3, 4, 6), ("B", 3, "H", "W"), "image")
    assert sizes == {"B": 2, "H": 4, "W": 6}
    assert check_shape(torch.zeros(2, 1, 4, 6), ("B", 1, "H", "W"), "alpha", sizes) == sizes
    with pytest.raises(
        ValueError, match=r"`alpha` must have shape \(B, 1, H, W\) with B=2, H=4, W=6, got \(2, 1, 4, 5\)"
    ):
        check_shape(torch.zeros(2, 1, 4, 5), ("B", 1, "H", "W"), "alpha", sizes)


def test_same_letter_twice_means_the_same_size() -> None:
    assert check_shape(torch.zeros(5, 5), ("N", "N"), "kernel") == {"N": 5}
    with pytest.raises(ValueError, match=r"`kernel` must have shape \(N, N\) with N=5, got \(5, 4\)"):
        check_shape(torch.zeros(5, 4), ("N", "N"), "kernel")


def test_wrong_number_of_dimensions_is_said() -> None:
    with pytest.raises(ValueError, match=r"`mask` must have shape \(H, W\), got \(1, 4, 5\) with 3 dimensions"):
        check_shape(torch.zeros(1, 4, 5), ("H", "W"), "mask")


def test_wrong_fixed_size_is_said_without_letters() -> None:
    with pytest.raises(ValueError, match=r"`box` must have shape \(4\), got \(3,\)"):
        check_shape(torch.zeros(3), (4,), "box")


def test_letters_bound_before_are_not_changed_by_a_check() -> None:
    before = {"B": 2}
    check_shape(torch.zeros(2, 7), ("B", "C"), "features", before)
    assert before == {"B": 2}


def test_range_is_said_with_the_values_found() -> None:
    with pytest.raises(ValueError, match=r"`alpha` must lie in \[0, 1\], got values from 0 to 255.*division by 255"):
        check_range(torch.tensor([0, 128, 255]), 0, 1, "alpha")
    with pytest.raises(ValueError, match=r"got values from -0\.5 to 1"):
        check_range(torch.tensor([-0.5, 1.0]), 0, 1, "alpha")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_out_of_range(bad: float) -> None:
    with pytest.raises(ValueError, match="`alpha` must lie in"):
        check_range(torch.tensor([0.5, bad, 0.5]), 0, 1, "alpha")


def test_bounds_are_in_the_range_and_nothing_at_all_is_too() -> None:
    check_range(torch.tensor([0.0, 1.0]), 0, 1, "alpha")
    check_range(torch.zeros(0, 1), 0, 1, "alpha")
    check_range(torch.tensor([0.2], requires_grad=True), 0, 1, "alpha")


@pytest.mark.parametrize("phrase", ["", "   ", "\n\t", "!?", "--", "…"])
def test_phrase_without_words_is_refused_with_an_example(phrase: str) -> None:
    with pytest.raises(InputError, match=r"`--phrase` has no words: got .*for example 'the red umbrella'"):
        check_prompt(phrase, "--phrase")


@pytest.mark.parametrize(
    ("given", "kept"),
    [(" the  red\tone\n", "the red one"), ("红色的伞", "红色的伞"), ("été 2", "été 2"), ("3", "3"), ("C++!", "C++!")],
)
def test_phrase_keeps_its_words_and_loses_its_blanks(given: str, kept: str) -> None:
    assert check_prompt(given) == kept


def test_users_mistake_is_a_value_error_to_python() -> None:
    assert issubclass(InputError, ValueError)
