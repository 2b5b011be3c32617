"""A resumed run sees exactly the batches that an uninterrupted one would have seen."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).with_name("train_runner.py")


def _runner() -> Any:
    spec = importlib.util.spec_from_file_location("train_runner", RUNNER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(journal: Path, rank: int | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in journal.read_text().splitlines()]
    return [line for line in found if rank is None or line["rank"] == rank]


@pytest.fixture
def settings(tmp_path: Path, pictures: Callable[..., Path]) -> dict[str, Any]:
    """Three data sets of different size, the smallest of which ends its epoch several times."""
    return {
        "train": {
            "a": {"shards": str(pictures("a", 13)), "batch_size": 4, "phrases_per_image": 2},
            "b": {"shards": str(pictures("b", 11, kind="mask")), "batch_size": 3, "mix_shards": 1},
            "c": {"shards": str(pictures("c", 2)), "batch_size": 3},
        },
        "schedule": {"cycle": ["a", "b"], "insert_every": 4, "insert": ["c"]},
        "trainer": {"max_steps": 20},
        "folder": str(tmp_path),
        "journal": str(tmp_path / "journal.jsonl"),
    }


def with_changes(settings: dict[str, Any], tmp_path: Path, name: str, **changes: Any) -> dict[str, Any]:
    trainer = {**settings["trainer"], **changes.pop("trainer", {})}
    data = {**settings.get("data", {}), **changes.pop("data", {})}
    return {
        **settings,
        "folder": str(tmp_path / name),
        "journal": str(tmp_path / f"{name}.jsonl"),
        "trainer": trainer,
        "data": data,
        **changes,
    }


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("epoch_iterations", [None, 6])
def test_resumed_run_writes_the_lines_of_the_uninterrupted_one(
    settings: dict[str, Any], tmp_path: Path, accumulate: int, epoch_iterations: int | None
) -> None:
    run = _runner().run
    changes = {"trainer": {"accumulate_grad_batches": accumulate}, "data": {"epoch_iterations": epoch_iterations}}
    whole = with_changes(settings, tmp_path, "whole", **changes, checkpoint_every=1)
    run(whole)
    expected = lines(Path(whole["journal"]))
    assert [line["iteration"] for line in expected] == [i for i in range(20) for _ in range(accumulate)]
    for step in (1, 6, 13, 18):
        resumed = with_changes(
            settings, tmp_path, f"from{step}", **changes, resume=str(tmp_path / f"whole/step={step:04d}.ckpt")
        )
        run(resumed)
        assert lines(Path(resumed["journal"])) == expected[step * accumulate :]


def test_one_iteration_is_one_optimizer_step_of_one_data_set(settings: dict[str, Any], tmp_path: Path) -> None:
    changed = with_changes(settings, tmp_path, "run", trainer={"accumulate_grad_batches": 3})
    trainer = _runner().run(changed)
    assert trainer.global_step == 20
    by_iteration: dict[int, set[str]] = {}
    for line in lines(Path(changed["journal"])):
        by_iteration.setdefault(line["iteration"], set()).add(line["dataset"])
    assert [by_iteration[i] for i in range(5)] == [{"a"}, {"b"}, {"a"}, {"b"}, {"c"}]


def test_accumulated_micro_batches_are_one_large_batch_in_parts(settings: dict[str, Any], tmp_path: Path) -> None:
    run = _runner().run
    parts = with_changes(settings, tmp_path, "parts", trainer={"accumulate_grad_batches": 2, "max_steps": 10})
    run(parts)
    large = with_changes(settings, tmp_path, "large", trainer={"max_steps": 10})
    large["train"] = {
        name: {**source, "batch_size": 2 * source["batch_size"]} for name, source in large["train"].items()
    }
    run(large)
    halves = lines(Path(parts["journal"]))
    joined = [first["keys"] + second["keys"] for first, second in zip(halves[::2], halves[1::2])]
    assert joined == [line["keys"] for line in lines(Path(large["journal"]))]


def test_number_of_workers_does_not_change_the_stream(settings: dict[str, Any], tmp_path: Path) -> None:
    run = _runner().run
    journals = []
    for workers in (0, 1, 3):
        changed = with_changes(settings, tmp_path, f"w{workers}", data={"num_workers": workers})
        run(changed)
        journals.append(lines(Path(changed["journal"])))
    assert journals[0] == journals[1] == journals[2]


def test_changed_accumulation_repeats_nothing_the_epoch_has_used(
    settings: dict[str, Any], tmp_path: Path, pictures: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = _runner().run
    settings["train"] = {"a": {"shards": str(pictures("long", 96)), "batch_size": 4}}
    settings.pop("schedule")
    first = with_changes(settings, tmp_path, "first", trainer={"max_steps": 5}, checkpoint_every=5)
    run(first)
    second = with_changes(
        settings,
        tmp_path,
        "second",
        trainer={"max_steps": 8, "accumulate_grad_batches": 3},
        resume=str(tmp_path / "first/step=0005.ckpt"),
    )
    trainer = run(second)
    assert trainer.global_step == 8
    assert "accumulation 1 -> 3" in caplog.text
    before = [key for line in lines(Path(first["journal"])) for key in line["keys"]]
    after = [key for line in lines(Path(second["journal"])) for key in line["keys"]]
    assert len(set(before + after)) == len(before) + len(after)


def _start(settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    log = open(folder / "log.txt", "wb")  # noqa: SIM115
    return subprocess.Popen(
        [sys.executable, str(RUNNER), str(folder / "settings.json")],
        stdout=log,
        stderr=log,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(settings: dict[str, Any], timeout_s: float = 180) -> None:
    process = _start(settings)
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code = "no end"
    assert code == 0, (Path(settings["folder"]) / "log.txt").read_text()[-3000:]


def kill_after(settings: dict[str, Any], count: int, timeout_s: float = 120) -> None:
    """Start a run and kill all its processes once its journal has `count` lines."""
    process = _start(settings)
    journal, end = Path(settings["journal"]), time.monotonic() + timeout_s
    while not journal.exists() or len(journal.read_bytes().splitlines()) < count:
        stuck = process.poll() is not None or time.monotonic() > end
        assert not stuck, (Path(settings["folder"]) / "log.txt").read_text()[-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "accumulate", "processes", "seconds"), [(0, 2, 1, 0.05), (2, 1, 1, 0.0), (1, 2, 2, 0.02)]
)
def test_killed_run_goes_on_as_if_never_killed(
    settings: dict[str, Any], tmp_path: Path, workers: int, accumulate: int, processes: int, seconds: float
) -> None:
    changes: dict[str, Any] = {
        "trainer": {"max_steps": 24, "accumulate_grad_batches": accumulate},
        "data": {"num_workers": workers},
    }
    if processes > 1:
        changes["trainer"].update(devices=processes, strategy="ddp")
    whole = with_changes(settings, tmp_path, "whole", **changes)
    finish(whole)
    killed = with_changes(settings, tmp_path, "killed", **changes, checkpoint_every=4, seconds=seconds)
    kill_after(killed, count=15 * accumulate * processes)
    last = sorted((tmp_path / "killed").glob("*.ckpt"))[-1]
    step = int(last.stem.removeprefix("step="))
    resumed = with_changes(settings, tmp_path, "resumed", **changes, resume=str(last))
    finish(resumed)
    for rank in range(processes):
        expected = [line for line in lines(Path(whole["journal"]), rank) if line["iteration"] >= step]
        assert expected
        assert lines(Path(resumed["journal"]), rank) == expected
