"""The inspector finds what spoils a training: damage, hard masks sold as alphas, test images in the training set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_modules.shards import InstanceEntry, ShardWriter
from tools import inspect_shards

Pictures = Callable[..., Path]


def _photograph(number: int, size: int = 96) -> np.ndarray:
    rng = np.random.default_rng(number)
    return cv2.resize(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)


def _alpha(soft: bool, size: int = 96) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size] - size / 2
    width = 12 if soft else 1
    return np.rint(np.clip((30 - np.hypot(rows, columns)) / width + 0.5, 0, 1) * 255).astype(np.uint8)


def _write(folder: Path, images: list[np.ndarray], alpha: np.ndarray, kind: str = "alpha") -> str:
    with ShardWriter(folder, prefix=folder.name, dataset=folder.name, split="train", tool="t") as writer:
        for number, image in enumerate(images):
            entry = InstanceEntry("k", alpha, kind, phrases=[("a ball", "basic"), ("the <b>", "colour")])  # type: ignore[arg-type]
            writer.write(f"{number}", image, "jpg", [entry])
    return str(folder)


def test_counts_and_histograms_are_those_of_the_shards(
    pictures: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pictures("a", 7)
    code = inspect_shards.main(
        [str(path), "--json", str(tmp_path / "found.json"), "--sheet", str(tmp_path / "sheet.html")]
    )
    found = json.loads((tmp_path / "found.json").read_text())["sets"][0]
    assert code == 0
    assert (found["images"], found["instances"], found["phrases"]) == (7, {"alpha": 14}, {"basic": 14, "colour": 14})
    assert found["long_edge"]["0-256"] == 7
    # stripes over half the image whose edges are ramps of six pixels: coverage just above a quarter
    assert found["coverage"]["0.1-0.3"] + found["coverage"]["0.3-1"] == 14
    assert "7 images, instances: alpha 14" in capsys.readouterr().out
    sheet = (tmp_path / "sheet.html").read_text()
    assert sheet.count("<section>") == 7
    assert sheet.count("data:image/jpeg") == 7 * 3
    assert "7 images, instances: alpha 14" in sheet
    assert "http" not in sheet


def test_hard_masks_that_claim_to_be_alphas_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [_photograph(number) for number in range(3)]
    hard = _write(tmp_path / "hard", images, _alpha(soft=False))
    soft = _write(tmp_path / "soft", images, _alpha(soft=True))
    mask = _write(tmp_path / "mask", images, (_alpha(soft=False) > 127).astype(np.uint8) * 255, "mask")
    assert inspect_shards.main([hard]) == 1
    assert "3 of 3 alphas are hard masks" in capsys.readouterr().out
    assert inspect_shards.main([soft, mask]) == 0


@pytest.mark.parametrize("change", ["same", "encoded", "smaller", "mirrored", "brighter"])
def test_test_image_in_the_training_set_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    image = _photograph(3)
    changed = {
        "same": image,
        "encoded": cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR),
        "smaller": cv2.resize(image, (96, 96), interpolation=cv2.INTER_AREA),
        "mirrored": image[:, ::-1],
        "brighter": np.clip(image * 0.8 + 30, 0, 255).astype(np.uint8),
    }[change]
    train = _write(tmp_path / "train", [_photograph(number) for number in range(40)], _alpha(soft=True))
    clean = _write(tmp_path / "clean", [_photograph(number) for number in range(100, 140)], _alpha(soft=True))
    leaky = _write(tmp_path / "leaky", [_photograph(200), np.ascontiguousarray(changed)], _alpha(soft=True))
    assert inspect_shards.main([train, "--against", clean]) == 0
    assert "No near-duplicates" in capsys.readouterr().out
    assert inspect_shards.main([train, "--against", leaky]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NEAR-DUPLICATE")]
    assert len(lines) == 1
    assert "sample '3'" in lines[0]
    assert "sample '1'" in lines[0]


def test_damage_is_named_and_ends_non_zero(pictures: Pictures, capsys: pytest.CaptureFixture[str]) -> None:
    path = pictures("a", 7)
    shard = path.parent / "a-000001.tar"
    data = bytearray(shard.read_bytes())
    data[1800] ^= 255
    shard.write_bytes(data)
    assert inspect_shards.main([str(path)]) == 1
    assert "a-000001.tar' does not match the checksum" in capsys.readouterr().err
    assert inspect_shards.main(["/nowhere"]) == 1
    assert "no shards found" in capsys.readouterr().err
