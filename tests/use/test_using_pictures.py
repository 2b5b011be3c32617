"""The picture of docs/USING.md: a row for each phrase, and only photographs that may be published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_matting.pipeline import MattingPipeline
from tools import using_pictures
from tools.using_pictures import GAP, HEIGHT, Question, draw, main, photographs, scenes


def test_only_photographs_that_may_be_published_are_shown(
    picture: Callable[..., np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(using_pictures, "SHOWN_PHOTOGRAPHS", ("free", "bound"))
    entries = []
    for name, licence in (("free", "permissive"), ("bound", "non_commercial"), ("other", "permissive")):
        Image.fromarray(picture(40, 60)).save(tmp_path / f"{name}.png")
        files = {"image": f"{name}.png", "alpha": f"{name}.png"}
        entries.append({"id": name, **files, "expressions": [f"the {name}", "x"], "licence_class": licence})
    (tmp_path / "index.json").write_text(json.dumps(entries))
    assert [(question.photo.stem, question.phrases) for question in photographs(tmp_path)] == [
        ("free", ("the free", "the foreground"))
    ]


def test_every_phrase_has_a_row_and_the_row_shows_its_photo(
    matting: MattingPipeline, picture: Callable[..., np.ndarray]
) -> None:
    grey = np.full((HEIGHT, 2 * HEIGHT, 3), 77, np.uint8)
    sheet = np.asarray(draw(matting, [Question(picture(40, 60), ("a dog",)), Question(grey, ("a", "b"))]))
    assert sheet.shape == (24 + 3 * (HEIGHT + GAP), using_pictures.WORDS + 5 * (2 * HEIGHT + GAP), 3)
    for row in (1, 2):  # of its own size: shown as it is
        top = 24 + row * (HEIGHT + GAP)
        assert np.array_equal(sheet[top : top + HEIGHT, using_pictures.WORDS :][:, : 2 * HEIGHT], grey)


def test_scenes_are_asked_for_two_things_each_and_are_always_the_same(checkpoint: Path, tmp_path: Path) -> None:
    asked = scenes()
    assert [len(set(question.phrases)) for question in asked] == [2, 2]
    assert [question.phrases for question in scenes()] == [question.phrases for question in asked]
    assert main([str(checkpoint), "--out", str(tmp_path / "using.jpg")]) == 0
    assert Image.open(tmp_path / "using.jpg").height == 24 + 4 * (HEIGHT + GAP)
    assert main([str(tmp_path / "none.ckpt")]) == 2
