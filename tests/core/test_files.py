"""What is left in a folder by processes that were killed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lit_matting import files
from lit_matting.files import write_whole


def test_what_a_killed_process_left_goes_with_the_next_write_a_day_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour = 3600
    ages = {
        ".17.0123abcd.part": 25 * hour,
        ".18.0123abcd.part": 23 * hour,  # a process of another machine may be at it
        "17.0123abcd.part": 99 * hour,  # and these are somebody else's
        ".film.part": 99 * hour,
        ".17.0123abcd.part.txt": 99 * hour,
    }
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / ".19.0123abcd.part").mkdir()
    os.utime(tmp_path / ".19.0123abcd.part", (0, 0))
    write_whole(b"1", tmp_path / "a")
    left = {*ages, ".19.0123abcd.part", "a"} - {".17.0123abcd.part"}
    assert {path.name for path in tmp_path.iterdir()} == left

    monkeypatch.setattr(files.os, "scandir", pytest.fail)  # every folder is looked through once
    write_whole(b"2", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"2"
