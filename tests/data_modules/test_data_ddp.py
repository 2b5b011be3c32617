"""Two processes share the stream: nothing twice, nothing waits, the same weights as one process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TWO = {"devices": 2, "strategy": "ddp"}


def _keys(lines: list[dict[str, Any]]) -> list[str]:
    return [key for line in lines for key in line["keys"]]


@pytest.mark.slow
def test_two_processes_train_validate_and_resume_like_one(
    runner: ModuleType,
    settings: dict[str, Any],
    tmp_path: Path,
    pictures: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # 13 samples in shards of 5, 5, 3; 11 in 5, 5, 1; 2 in one shard, fewer than processes x workers
    settings["val"] = {"v": {"shards": str(pictures("v", 7, instances=1)), "batch_size": 3}}
    # one phrase alone: the second process has nothing to test, and nobody waits for it
    lonely = pictures("lonely", 1, instances=1, phrases=lambda number, instance: [("it", "basic")])
    settings["test"] = {"t": {"shards": str(pictures("t", 5)), "batch_size": 3}, "lonely": {"shards": str(lonely)}}
    settings["augment"] = False
    changes = {"trainer": {"max_steps": 12, **TWO, "val_check_interval": 12}, "data": {"num_workers": 2}}
    two = runner.with_changes(settings, tmp_path, "two", **changes, checkpoint_every=6)
    runner.finish(two)

    # the same weights as one process with batches twice as large
    one = runner.with_changes(settings, tmp_path, "one", trainer={"max_steps": 12}, checkpoint_every=3)
    one["train"] = {name: {**s, "batch_size": 2 * s["batch_size"]} for name, s in one["train"].items()}
    runner.run(one)
    expected, found = (torch.load(Path(run["folder"]) / "weights.pt") for run in (one, two))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)

    # both read the global batch of one process, in disjoint halves
    whole = runner.lines(Path(one["journal"]))
    halves = [runner.lines(Path(two["journal"]), rank) for rank in (0, 1)]
    assert [line["keys"] for line in whole] == [a["keys"] + b["keys"] for a, b in zip(*halves)]

    # validation: 7 images, one instance, two phrases each, every one once over both processes
    final = Counter(tuple(row[1:]) for row in _rows(tmp_path / "two", "seen") if row[0] == 12)
    assert len(final) == 14
    assert set(final.values()) == {1}
    tested = Counter(tuple(row[1:]) for row in _rows(tmp_path / "two", "tested"))
    assert len(tested) == 5 * 2 * 2 + 1
    assert set(tested.values()) == {1}

    # going on with one process, from the two processes' checkpoint: epochs stay whole
    alone = runner.with_changes(
        settings, tmp_path, "alone", trainer={"max_steps": 12}, resume=str(tmp_path / "two/step=0006.ckpt")
    )
    runner.run(alone)
    assert "2 -> 1 processes" in caplog.text
    before = [line for half in halves for line in half if line["iteration"] < 6]
    after = runner.lines(Path(alone["journal"]))
    for dataset, samples in (("a", 13), ("b", 11)):
        used = _epoch(before + after, dataset, samples)
        assert len(used) == len(set(used))


def _rows(folder: Path, what: str) -> list[list[Any]]:
    return [json.loads(line) for rank in (0, 1) for line in (folder / f"{what}{rank}.jsonl").open()]


def _epoch(lines: list[dict[str, Any]], dataset: str, samples: int) -> list[str]:
    """The images of a data set's first epoch, in the order they were used; pairs of phrases count once."""
    images = []
    for line in sorted((line for line in lines if line["dataset"] == dataset), key=lambda line: line["iteration"]):
        images += list(dict.fromkeys(line["keys"])) if dataset == "a" else line["keys"]
    return images[:samples]


@pytest.mark.slow
def test_twelve_steps_of_the_real_model_on_two_processes_are_those_of_one(
    runner: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"model": "matting", "image_size": 32, "trainer": {"max_steps": 12}}
    two = runner.with_changes(settings, tmp_path, "two", trainer=TWO)
    runner.finish(two)
    one = runner.with_changes(settings, tmp_path, "one")
    one["train"] = {name: {**s, "batch_size": 2 * s["batch_size"]} for name, s in one["train"].items()}
    runner.run(one)
    assert [line["dataset"] for line in runner.lines(Path(one["journal"]))] == list("ababcababcab")
    expected, found = (torch.load(Path(run["folder"]) / "weights.pt") for run in (one, two))
    start = runner.matting_model().state_dict()
    moved = 0.0
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name], weight, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
        moved = max(moved, float((weight - start[name]).abs().max()))
    assert moved > 1e-2, "the steps must change the weights by more than what is allowed between the two"


@pytest.mark.slow
def test_one_process_goes_on_as_two_without_repeating(
    runner: ModuleType, settings: dict[str, Any], tmp_path: Path, pictures: Callable[..., Path]
) -> None:
    settings["train"] = {"long": {"shards": str(pictures("long", 48)), "batch_size": 4}}
    settings.pop("schedule")
    one = runner.with_changes(settings, tmp_path, "one", trainer={"max_steps": 3}, checkpoint_every=3)
    runner.run(one)
    resume = str(tmp_path / "one/step=0003.ckpt")
    two = runner.with_changes(settings, tmp_path, "two", trainer={"max_steps": 6, **TWO}, resume=resume)
    runner.finish(two)
    used = _keys(runner.lines(Path(one["journal"])) + runner.lines(Path(two["journal"])))
    assert len(used) == 3 * 4 + 3 * 8
    assert len(set(used)) == len(used)
