"""Two processes train, resume, validate and test like one; a signal interrupts them and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import process_runner
import pytest
import torch

from lit_matting.cli import main

DDP = {"devices": 2, "strategy": "ddp"}
FSDP = {
    "devices": 2,
    "strategy": {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
    },
}
Experiment = Callable[..., Path]


def same_weights(one: Path, two: Path, atol: float) -> None:
    expected, found = (torch.load(folder / "weights.pt", weights_only=True) for folder in (one, two))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name], weight, atol=atol, rtol=0, msg=lambda said, name=name: f"{name}: {said}"
        )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


@pytest.fixture
def one(experiment: Experiment, tmp_path: Path) -> Path:
    """Folder of a run of one process on the whole batch: four steps, then validation and test."""
    folder = tmp_path / "one"
    config = str(experiment(folder, batch_size=4))
    checkpoint = str(folder / "step=4.ckpt")
    assert main(["fit", "--config", config]) == 0
    assert main(["test", "--config", config, "--ckpt_path", checkpoint]) == 0
    return folder


def report(folder: Path) -> dict[str, Any]:
    """The figures of a report, without what names the run and its time."""
    content = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in content.items() if isinstance(value, (dict, list)) and key != "run"}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_fit_resume_validate_and_test_like_one(
    experiment: Experiment, tmp_path: Path, one: Path, strategy: dict[str, Any]
) -> None:
    folder = tmp_path / "two"
    config = str(experiment(folder, batch_size=2, **strategy))
    half = ["--ckpt_path", str(folder / "step=2.ckpt")]
    resumed = tmp_path / "resumed"
    again = str(experiment(resumed, batch_size=2, **strategy))
    commands = [
        ["fit", "--config", config],
        ["test", "--config", config, "--ckpt_path", str(folder / "step=4.ckpt")],
        ["fit", "--config", again, *half],
        ["validate", "--config", again, "--ckpt_path", str(folder / "step=4.ckpt")],
    ]
    process_runner.finish(folder, process_runner.start(folder, commands))

    same_weights(one, folder, atol=2e-5)
    same_weights(folder, resumed, atol=1e-6)
    # a checkpoint of two processes is a checkpoint of one
    alone = torch.load(one / "step=4.ckpt", weights_only=True)["state_dict"]
    assert torch.load(folder / "step=4.ckpt", weights_only=True)["state_dict"].keys() == alone.keys()
    validated = [json.loads((place / "validation.json").read_text()) for place in (one, folder, resumed)]
    assert "metric/soft_iou" in validated[0]
    for found in validated[1:]:
        for name in ("metric/grounding_accuracy", "metric/soft_iou", "metric/band_mae"):
            assert found[name] == pytest.approx(validated[0][name], abs=1e-4), name
    assert_close(report(folder), report(one))


def assert_close(found: Any, expected: Any, where: str = "report") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_close(found[index], value, f"{where}.{index}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=2e-3, rel=2e-3), where


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_saves_both_and_the_run_goes_on_as_if_never_interrupted(
    experiment: Experiment, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "interrupted"
    steps = {"max_steps": 12, "val_check_interval": 12, "limit_val_batches": 0}
    config = str(experiment(folder, batch_size=2, wait_s=0.2, **steps, **DDP))
    process = process_runner.start(folder, [["fit", "--config", config]])
    deadline = time.monotonic() + 300
    while not (folder / "journal.jsonl").exists() or len(lines(folder)) < 5:
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGUSR1)
    process_runner.finish(folder, process, status=75)
    saved = torch.load(folder / "preempted.ckpt", weights_only=True)
    assert saved["global_step"] in range(2, 12, 2), "they ask each other at every second step"
    assert not (folder / "weights.pt").exists(), "the run was not to end by itself"

    # on with one process on the batch of two: the other half of the promise
    uninterrupted = str(experiment(whole, batch_size=4, **steps))
    resumed = str(experiment(folder, batch_size=4, **steps))
    assert main(["fit", "--config", uninterrupted]) == 0
    assert main(["fit", "--config", resumed, "--ckpt_path", str(folder / "preempted.ckpt")]) == 0
    same_weights(whole, folder, atol=1e-4)
    assert not (folder / "preempted.ckpt").exists(), "nothing is left to go on with"
    seen: dict[int, set[str]] = {}
    for line in lines(folder):
        seen.setdefault(line["iteration"], set()).update(line["keys"])
    assert seen == {line["iteration"]: set(line["keys"]) for line in lines(whole)}
