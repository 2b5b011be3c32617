"""A resumed run sees exactly the batches that an uninterrupted one would have seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("epoch_iterations", [None, 6])
def test_resumed_run_writes_the_lines_of_the_uninterrupted_one(
    runner: ModuleType, settings: dict[str, Any], tmp_path: Path, accumulate: int, epoch_iterations: int | None
) -> None:
    changes = {"trainer": {"accumulate_grad_batches": accumulate}, "data": {"epoch_iterations": epoch_iterations}}
    whole = runner.with_changes(settings, tmp_path, "whole", **changes, checkpoint_every=1)
    runner.run(whole)
    expected = runner.lines(Path(whole["journal"]))
    assert [line["iteration"] for line in expected] == [i for i in range(20) for _ in range(accumulate)]
    for step in (1, 6, 13, 18):
        resumed = runner.with_changes(
            settings, tmp_path, f"from{step}", **changes, resume=str(tmp_path / f"whole/step={step:04d}.ckpt")
        )
        runner.run(resumed)
        assert runner.lines(Path(resumed["journal"])) == expected[step * accumulate :]


def test_one_iteration_is_one_optimizer_step_of_one_data_set(
    runner: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    changed = runner.with_changes(settings, tmp_path, "run", trainer={"accumulate_grad_batches": 3})
    trainer = runner.run(changed)
    assert trainer.global_step == 20
    by_iteration: dict[int, set[str]] = {}
    for line in runner.lines(Path(changed["journal"])):
        by_iteration.setdefault(line["iteration"], set()).add(line["dataset"])
    assert [by_iteration[i] for i in range(5)] == [{"a"}, {"b"}, {"a"}, {"b"}, {"c"}]


def test_accumulated_micro_batches_are_one_large_batch_in_parts(
    runner: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    parts = runner.with_changes(settings, tmp_path, "parts", trainer={"accumulate_grad_batches": 2, "max_steps": 10})
    runner.run(parts)
    large = runner.with_changes(settings, tmp_path, "large", trainer={"max_steps": 10})
    large["train"] = {
        name: {**source, "batch_size": 2 * source["batch_size"]} for name, source in large["train"].items()
    }
    runner.run(large)
    halves = runner.lines(Path(parts["journal"]))
    joined = [first["keys"] + second["keys"] for first, second in zip(halves[::2], halves[1::2])]
    assert joined == [line["keys"] for line in runner.lines(Path(large["journal"]))]


def test_number_of_workers_does_not_change_the_stream(
    runner: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    journals = []
    for workers in (0, 1, 3):
        changed = runner.with_changes(settings, tmp_path, f"w{workers}", data={"num_workers": workers})
        runner.run(changed)
        journals.append(runner.lines(Path(changed["journal"])))
    assert journals[0] == journals[1] == journals[2]


def test_changed_accumulation_repeats_nothing_the_epoch_has_used(
    runner: ModuleType,
    settings: dict[str, Any],
    tmp_path: Path,
    pictures: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings["train"] = {"a": {"shards": str(pictures("long", 96)), "batch_size": 4}}
    settings.pop("schedule")
    first = runner.with_changes(settings, tmp_path, "first", trainer={"max_steps": 5}, checkpoint_every=5)
    runner.run(first)
    second = runner.with_changes(
        settings,
        tmp_path,
        "second",
        trainer={"max_steps": 8, "accumulate_grad_batches": 3},
        resume=str(tmp_path / "first/step=0005.ckpt"),
    )
    trainer = runner.run(second)
    assert trainer.global_step == 8
    assert "accumulation 1 -> 3" in caplog.text
    before = [key for line in runner.lines(Path(first["journal"])) for key in line["keys"]]
    after = [key for line in runner.lines(Path(second["journal"])) for key in line["keys"]]
    assert len(set(before + after)) == len(before) + len(after)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "accumulate", "processes", "seconds"), [(0, 2, 1, 0.05), (2, 1, 1, 0.0), (1, 2, 2, 0.02)]
)
def test_killed_run_goes_on_as_if_never_killed(
    runner: ModuleType,
    settings: dict[str, Any],
    tmp_path: Path,
    workers: int,
    accumulate: int,
    processes: int,
    seconds: float,
) -> None:
    changes: dict[str, Any] = {
        "trainer": {"max_steps": 24, "accumulate_grad_batches": accumulate},
        "data": {"num_workers": workers},
    }
    if processes > 1:
        changes["trainer"].update(devices=processes, strategy="ddp")
    whole = runner.with_changes(settings, tmp_path, "whole", **changes)
    runner.finish(whole)
    killed = runner.with_changes(settings, tmp_path, "killed", **changes, checkpoint_every=4, seconds=seconds)
    runner.kill_after(killed, count=15 * accumulate * processes)
    last = sorted((tmp_path / "killed").glob("*.ckpt"))[-1]
    step = int(last.stem.removeprefix("step="))
    resumed = runner.with_changes(settings, tmp_path, "resumed", **changes, resume=str(last))
    runner.finish(resumed)
    for rank in range(processes):
        expected = [line for line in runner.lines(Path(whole["journal"]), rank) if line["iteration"] >= step]
        assert expected
        assert runner.lines(Path(resumed["journal"]), rank) == expected


def test_fresh_trainer_begins_anew_with_the_same_data_module(
    runner: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    module = runner.data_module(settings)
    journals = []
    for name in ("first", "second"):
        run = runner.with_changes(settings, tmp_path, name, trainer={"max_steps": 4})
        runner.run(run, module)
        journals.append(runner.lines(Path(run["journal"])))
    assert journals[0] == journals[1]


def test_checkpoint_without_the_streams_state_still_says_which_iteration_comes_next(
    runner: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = runner.with_changes(settings, tmp_path, "whole", trainer={"max_steps": 9}, checkpoint_every=6)
    runner.run(whole)
    path = tmp_path / "whole/step=0006.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["InterleavedDataModule"]
    torch.save(checkpoint, path)
    resumed = runner.with_changes(settings, tmp_path, "resumed", trainer={"max_steps": 9}, resume=str(path))
    runner.run(resumed)
    assert runner.lines(Path(resumed["journal"])) == runner.lines(Path(whole["journal"]))[6:]
