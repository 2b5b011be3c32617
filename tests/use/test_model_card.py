"""The model card of a saved folder says how the very weights beside it were judged, or nothing."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_modules.shards import InstanceEntry, ShardWriter
from lit_matting.checkpoints import store_threshold
from lit_matting.checks import InputError
from lit_matting.cli import main
from lit_matting.metrics.protocol import LOCKED
from lit_matting.metrics.report import figure, file_digest
from lit_matting.pipeline import MattingPipeline

PROTOCOL = "refmatte-test"


@pytest.fixture(scope="module")
def judged(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and what `python -m lit_matting test` reported of it."""
    own, rng = yaml.safe_load((checkpoint.parent / "experiment.yaml").read_text()), np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("judged")
    shutil.copy(checkpoint, folder / "last.ckpt")
    left = np.tile(np.repeat(np.uint8([255, 0]), 32), (64, 1))
    with ShardWriter(folder / "shards", prefix="test", dataset="halves", split="test", tool="test 1") as writer:
        for number in range(2):
            entries = [
                InstanceEntry(id=name, target=alpha, kind="alpha", phrases=[(f"the {name} half", "position")])
                for name, alpha in {"left": left, "right": 255 - left}.items()
            ]
            writer.write(
                f"{number}", image=rng.integers(0, 256, (64, 64, 3), np.uint8), image_ext="png", instances=entries
            )
    report = {"folder": str(folder / "report"), "protocol": PROTOCOL, "pictures": 0}
    benchmark = {"shards": str(folder / "shards" / "test.index.json"), "image_size": None}
    experiment = {
        "model": {name: value for name, value in own["model"].items() if name != "image_size"},
        "trainer": {
            **own["trainer"],
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": "callbacks.BenchmarkReport", "init_args": report}],
        },
        "data": {
            "class_path": "data_modules.InterleavedDataModule",
            "init_args": {
                "image_size": 64,
                "test": {"halves": {"class_path": "data_modules.BenchmarkSource", "init_args": benchmark}},
            },
        },
    }
    (folder / "test.yaml").write_text(yaml.safe_dump(experiment))
    assert main(["test", "--config", str(folder / "test.yaml"), "--ckpt_path", str(folder / "last.ckpt")]) == 0
    return folder


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_card_shows_the_protocol_the_scores_and_the_checkpoint_of_a_real_report(judged: Path, tmp_path: Path) -> None:
    report = judged / "report" / "report.json"
    sha256 = file_digest(judged / "last.ckpt")
    matting = MattingPipeline.from_checkpoint(judged / "last.ckpt", device="cpu", precision="fp32")
    matting.save_pretrained(tmp_path / "model", model_card_kwargs={"report": str(report), "results": {"mIoU": 0.7}})
    _, results = card_of(tmp_path / "model").split("## Results\n\n")
    assert results.startswith(
        f"DEVIATES from protocol {PROTOCOL} ({LOCKED[PROTOCOL][:12]}): data set halves/test instead"
    )
    assert "; 2 of 2500 images" in results.splitlines()[0]
    assert f"| Protocol | {PROTOCOL} (SHA-256 {LOCKED[PROTOCOL]}) |" in results
    assert f"| Checkpoint judged | SHA-256 {sha256} |" in results
    assert "| mIoU | 0.7 |" in results
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in results.splitlines() if "|" in line]
    header = next(cells for cells in table if "grounding" in cells)
    rows = {cells[0]: dict(zip(header, cells)) for cells in table}
    for method, scores in json.loads(report.read_text())["scores"].items():
        overall = scores["overall"]
        shown = [figure(overall.get(name)) for name in ("grounding_accuracy", "soft_iou", "sad")]
        assert [rows[method][column] for column in ("grounding", "soft IoU", "SAD")] == shown, method
    assert str(judged) not in (tmp_path / "model" / "config.json").read_text(), (
        "whose folder it was is nobody's business"
    )

    # from the folder the weights are known too, and calibration changes the file but not them
    again = MattingPipeline.from_pretrained(tmp_path / "model", device="cpu", precision="fp32")
    again.save_pretrained(tmp_path / "again", model_card_kwargs={"report": report, "results": {"mIoU": 0.7}})
    assert card_of(tmp_path / "again") == card_of(tmp_path / "model")
    shutil.copy(judged / "last.ckpt", tmp_path / "calibrated.ckpt")
    for threshold in (0.2, 0.3):
        store_threshold(tmp_path / "calibrated.ckpt", threshold)
    calibrated = MattingPipeline.from_checkpoint(tmp_path / "calibrated.ckpt", device="cpu", precision="fp32")
    calibrated.save_pretrained(tmp_path / "calibrated", model_card_kwargs={"report": report})
    assert f"SHA-256 {sha256}" in card_of(tmp_path / "calibrated")
    assert "Known sha256" not in card_of(tmp_path / "calibrated")


def altered(report: Path, place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(report.read_text())
    change(content)
    place.write_text(json.dumps(content))
    return place


def test_scores_of_other_weights_are_refused_before_anything_is_written(
    judged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = judged / "report" / "report.json"
    matting = MattingPipeline.from_checkpoint(judged / "last.ckpt", device="cpu", precision="fp32")

    def refusal(given: Path, of: MattingPipeline = matting) -> str:
        with pytest.raises(InputError) as caught:
            of.save_pretrained(tmp_path / "model", model_card_kwargs={"report": given})
        assert not (tmp_path / "model").exists()
        return str(caught.value)

    own = file_digest(judged / "last.ckpt")[:12]
    other = altered(report, tmp_path / "other.json", lambda content: content["run"].update(checkpoint_sha256="ab" * 32))
    assert refusal(other) == (
        f"the report {str(other)!r} judged checkpoint abababababab, but these weights are of {own}: judge them by"
        " `python -m lit_matting test --ckpt_path CKPT`, and give that report."
    )
    memory = altered(report, tmp_path / "memory.json", lambda content: content["run"].update(checkpoint_sha256=None))
    assert "judged weights in memory, but these weights are of" in refusal(memory)
    (tmp_path / "list.json").write_text("[]")
    for path in (
        altered(report, tmp_path / "less.json", lambda content: content.pop("scores")),
        tmp_path / "list.json",
        judged / "last.ckpt",
    ):
        assert "is not the report.json of `python -m lit_matting test`" in refusal(path)
    assert "none.json' cannot be read: No such file" in refusal(tmp_path / "none.json")

    # training went on, and the file now holds other weights than the pipeline
    shutil.copy(judged / "last.ckpt", tmp_path / "last.ckpt")
    opened = MattingPipeline.from_checkpoint(tmp_path / "last.ckpt", device="cpu", precision="fp32")
    (tmp_path / "new.ckpt").write_bytes(b"later")
    (tmp_path / "new.ckpt").replace(tmp_path / "last.ckpt")
    assert "these weights are of a file that is not known any more" in refusal(report, opened)

    matting.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        matting.save_pretrained(tmp_path / "model", model_card_kwargs={"report": report})
    assert "README.md was there before and stays; remove it for a new one" in caplog.text
    assert "Not evaluated, or not stated." in card_of(tmp_path / "model")
