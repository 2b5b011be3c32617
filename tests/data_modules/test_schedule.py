"""The schedule is a pure function of the iteration, and its closed forms agree with counting."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from data_modules.schedule import InterleavedSchedule
from lit_matting.checks import InputError


def test_paper_default_is_r_c_r_c_and_one_of_three_in_rotation() -> None:
    schedule = InterleavedSchedule()
    names = {"refmatte": "R", "refcoco": "C", "p3m10k": "1", "am2k": "2", "rm1k": "3"}
    assert "".join(names[schedule.dataset(i)] for i in range(20)) == "RCRC1RCRC2RCRC3RCRC1"


def _by_hand(cycle: list[str], insert_every: int, insert: list[str], count: int) -> list[str]:
    """The obvious generator: take turns, and after every few turns insert one."""
    written: list[str] = []
    turns = inserted = 0
    while len(written) < count:
        written.append(cycle[turns % len(cycle)])
        turns += 1
        if insert and insert_every and turns % insert_every == 0:
            written.append(insert[inserted % len(insert)])
            inserted += 1
    return written[:count]


@pytest.mark.parametrize(
    ("cycle", "insert_every", "insert"),
    [
        (["a"], 4, []),
        (["a", "b"], 4, ["c"]),
        (["a", "b", "c"], 4, ["x", "y"]),
        (["a", "a", "b"], 2, ["x", "y", "z"]),
        (["a", "b"], 0, ["x"]),
        (["a", "b"], 1, ["a"]),
    ],
)
def test_schedule_and_visit_counts_agree_with_a_generator(
    cycle: list[str], insert_every: int, insert: list[str]
) -> None:
    schedule = InterleavedSchedule(cycle, insert_every, insert)
    expected = _by_hand(cycle, insert_every, insert, 200)
    assert [schedule.dataset(i) for i in range(200)] == expected
    for i in range(200):
        assert {name: schedule.visits(name, i) for name in schedule.datasets} == {
            name: expected[:i].count(name) for name in schedule.datasets
        }


def test_weights_are_turns_per_round_spread_evenly() -> None:
    schedule = InterleavedSchedule(["a", "b"], 0, weights={"a": 3})
    assert "".join(schedule.dataset(i) for i in range(8)) == "aabaaaba"
    rotation = InterleavedSchedule(["a"], 1, ["x", "y"], weights={"x": 2})
    assert Counter(rotation.dataset(i) for i in range(12)) == {"a": 6, "x": 4, "y": 2}


def test_missing_data_sets_are_dropped_with_their_shares(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        left = InterleavedSchedule().restricted(["refmatte", "refcoco", "am2k"])
    assert "".join(left.dataset(i)[3] for i in range(10)) == "mcmckmcmck"
    assert "p3m10k, rm1k" in caplog.text
    assert "am2k 6.7% -> 20.0%" in caplog.text
    assert "p3m10k 6.7% -> 0.0%" in caplog.text


def test_inserted_data_sets_take_over_when_the_cycle_is_missing() -> None:
    left = InterleavedSchedule().restricted(["am2k", "rm1k"])
    assert [left.dataset(i) for i in range(4)] == ["am2k", "rm1k", "am2k", "rm1k"]


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(InputError, match="name the same data sets in both"):
        InterleavedSchedule().restricted(["other"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cycle": []}, "cycle` is empty"),
        ({"insert_every": -1}, "must be 0 or more"),
        ({"weights": {"other": 2}}, "'other' is not in the schedule"),
        ({"weights": {"am2k": 0}}, "every weight must lie in"),
        ({"weights": {"am2k": 10**7}}, "every weight must lie in"),
        ({"weights": {"refmatte": 997, "refcoco": 991, "am2k": 983}}, "repeats only after"),
    ],
)
def test_impossible_schedules_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        InterleavedSchedule(**settings)
