"""Calibration asks for things that are provably not there, and what it chooses is what the pipeline then uses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_modules.scenes import COLOURS, MATERIALS, SHAPES, generate
from data_modules.shards import ShardIndex
from lit_matting.checkpoints import read_checkpoint
from lit_matting.pipeline import MattingPipeline
from tools.calibrate import main, questions
from tools.scene_shards import write_split

SEED = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    write_split(folder, "val", SEED, 5, 64, 1, lambda _: None)
    return folder / "val.index.json"


def test_absent_phrases_fit_no_object_of_the_scene_and_present_ones_are_its_own(shards: Path) -> None:
    asked = questions(ShardIndex.load(shards), 100)
    assert len(asked) == 5
    parts = {
        **dict.fromkeys(COLOURS, "colour"),
        **dict.fromkeys(SHAPES, "shape"),
        **dict.fromkeys(MATERIALS, "material"),
    }
    for item in asked:
        scene = generate(SEED, item.sample, 64)
        own = {text for phrases in scene.phrases for text, _ in phrases}
        assert set(item.present) == own
        assert 0 < len(item.absent) <= len(item.present)
        for phrase in item.absent:
            wanted = {parts[word]: word for word in phrase.split() if word in parts}
            assert wanted, f"{phrase!r} fits anywhere"
            assert not any(
                all(getattr(thing, part) == word for part, word in wanted.items()) for thing in scene.objects
            ), f"{phrase!r} is there"
    assert asked == questions(ShardIndex.load(shards), 100)
    assert sum(len(item.present) for item in questions(ShardIndex.load(shards), 7)) == 7


def test_the_threshold_is_stored_and_is_the_best_for_the_phrases_asked(
    shards: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copy(checkpoint, tmp_path / "own.ckpt")
    words = [str(own), "--shards", str(shards), "--judge", str(shards), "--phrases", "12"]
    assert main([*words, "--out", str(tmp_path / "calibration.json")]) == 0
    report = json.loads((tmp_path / "calibration.json").read_text())
    assert read_checkpoint(own).threshold == report["threshold"]
    assert f"balanced accuracy {report['judged_on']['balanced_accuracy']:.3f}" in capsys.readouterr().out
    assert report["judged_on"] == report["chosen_on"], "the same images"

    matting = MattingPipeline.from_checkpoint(own, device="cpu", precision="fp32")
    index = ShardIndex.load(shards)
    right: dict[bool, list[bool]] = {True: [], False: []}
    for item in questions(index, 12):
        image = (generate(SEED, item.sample, 64).image * 255).round().astype(np.uint8)
        for phrase in item.present:
            right[True].append(matting(image, phrase).found is True)
        for phrase in item.absent:
            right[False].append(matting(image, phrase).found is False)
    shares = [np.mean(values) for values in right.values()]
    # the shards hold JPEGs: a confidence beside the threshold may fall on its other side
    assert np.mean(shares) == pytest.approx(report["chosen_on"]["balanced_accuracy"], abs=0.15)
    assert report["chosen_on"]["balanced_accuracy"] >= 0.5


def test_what_cannot_be_calibrated_is_one_sentence(
    shards: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in {
        (str(tmp_path), "--shards", str(shards)): "is a folder: calibrate the checkpoint",
        (str(checkpoint), "--shards", str(tmp_path / "none.index.json")): "none.index.json",
    }.items():
        assert main([*words]) == 2
        printed = capsys.readouterr().err
        assert sentence in printed
        assert printed.count("\n") == 1
    assert read_checkpoint(checkpoint).threshold is None
