"""Scoring real photographs: means by hand, the truth as a perfect model, and a document whose other lines stay."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from tools import evaluate_photographs
from tools.evaluate_photographs import band_of, errors_of, main, means


class Oracle:
    """A pipeline that knows the truth of every photograph, and shows it for its own phrases only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def encode(self, image: Path) -> Path:
        return image

    def __call__(self, image: Path, phrases: list[str]) -> list[Any]:
        alpha = cv2.imread(str(self.folder / f"{image.stem}_alpha.png"), cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255
        return [
            SimpleNamespace(phrase=phrase, alpha=alpha if image.stem in phrase else np.zeros_like(alpha))
            for phrase in phrases
        ]


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two photographs of group `a` with the left and the right half opaque, and one of group `b`."""
    entries = []
    for name, left in (("a_1", True), ("a_2", False), ("b_1", True)):
        alpha = np.zeros((40, 60), np.uint8)
        alpha[:, :30] = 255
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((40, 60, 3), 90, np.uint8))
        cv2.imwrite(str(tmp_path / f"{name}_alpha.png"), alpha if left else 255 - alpha)
        phrases = [f"the {name}", f"{name} there"]
        entries.append({"id": name, "image": f"{name}.png", "alpha": f"{name}_alpha.png", "expressions": phrases})
    (tmp_path / "index.json").write_text(json.dumps(entries))
    monkeypatch.setattr(evaluate_photographs.MattingPipeline, "from_checkpoint", lambda path: Oracle(tmp_path))
    return tmp_path


def test_a_model_that_knows_the_truth_is_perfect_and_the_blind_ones_are_what_they_must_be(
    photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = photographs / "out"
    assert main(["--checkpoint", "x.ckpt", "--data", str(photographs), "--out", str(out)]) == 0
    found = json.loads((out / "photographs.json").read_text())["means"]
    assert found["model"]["a"] == {"mae": 0.0, "band_mae": 0.0, "soft_iou": 1.0}
    # half of every photograph is opaque
    assert found["nothing"]["a"] == {"mae": 0.5, "band_mae": pytest.approx(0.5, abs=0.01), "soft_iou": 0.0}
    assert found["everything"]["b"]["soft_iou"] == pytest.approx(0.5)
    # the mean of the only other one is its opposite
    assert found["the mean alpha of the others"]["a"]["mae"] == pytest.approx(1.0)
    # and another photograph's phrases find nothing
    assert found["the phrases of another photograph"] == found["nothing"]
    first = capsys.readouterr().out
    assert "| compact, by phrase" in first
    # the same table again, without a model
    assert main(["--checkpoint", "none", "--data", str(photographs), "--out", str(out), "--collect"]) == 0
    assert capsys.readouterr().out == first


def test_a_photograph_with_many_phrases_counts_as_much_as_one_with_few() -> None:
    rows = [
        {"key": key, "group": "a", "method": "model", "mae": value, "band_mae": value, "soft_iou": value}
        for key, value in (("a_1", 0.0), ("a_1", 0.2), ("a_1", 0.4), ("a_2", 0.8))
    ]
    assert means(rows)["model"]["a"]["mae"] == pytest.approx((0.2 + 0.8) / 2)


def test_errors_by_hand() -> None:
    alpha = np.zeros((1, 4), np.float32)
    alpha[0, 2:] = 1
    matte = np.array([[0, 0.5, 0.5, 1]], np.float32)
    found = errors_of(matte, alpha, np.array([[False, True, True, False]]))
    assert found == {"mae": 0.25, "band_mae": 0.5, "soft_iou": pytest.approx(1.5 / 2.5)}


def test_the_band_lies_about_the_outline() -> None:
    alpha = np.zeros((512, 512), np.float32)
    alpha[:, 256:] = 1
    columns = np.flatnonzero(band_of(alpha).all(0))
    assert columns.tolist() == list(range(249, 263))  # the kernel of 15 reaches 7 to each side


def test_mistakes_are_one_sentence(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "doc.md").write_text("no markers")
    base = ["--checkpoint", "x.ckpt"]
    assert main([*base, "--data", str(tmp_path / "nowhere")]) == 2
    assert main([*base, "--data", str(photographs), "--document", str(tmp_path / "doc.md")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "index.json" in lines[0]
    assert "<!-- compact: begin -->" in lines[1]
