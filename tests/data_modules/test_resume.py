"""A resumed run sees exactly the batches that an uninterrupted one would have seen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from callbacks.sample_journal import digest
from lit_matting.checks import InputError
from lit_matting.records import MattingBatch


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
    ("workers", "accumulate", "processes", "seconds"), [(0, 2, 1, 0.05), (2, 1, 1, 0.0), (2, 2, 2, 0.02)]
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


@pytest.mark.parametrize("workers", [(0, 2), (2, 0)])
def test_another_number_of_workers_goes_on_with_the_same_batches_and_says_so(
    runner: ModuleType,
    settings: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    workers: tuple[int, int],
) -> None:
    before, after = workers
    run = {"trainer": {"max_steps": 12}}
    whole = runner.with_changes(settings, tmp_path, "whole", **run, data={"num_workers": before}, checkpoint_every=5)
    runner.run(whole)
    resume = str(tmp_path / "whole/step=0005.ckpt")
    resumed = runner.with_changes(settings, tmp_path, "resumed", **run, data={"num_workers": after}, resume=resume)
    runner.run(resumed)
    assert runner.lines(Path(resumed["journal"])) == runner.lines(Path(whole["journal"]))[5:]
    said = [record.message for record in caplog.records if "goes on" in record.message]
    assert said == [f"The stream goes on at iteration 5 with {before} -> {after} workers: the batches are the same."]


def test_limits_that_would_end_in_the_middle_of_an_iteration_are_refused(
    runner: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    def run(name: str, **trainer: Any) -> None:
        runner.run(runner.with_changes(settings, tmp_path, name, trainer={"max_steps": 4, **trainer}))

    with pytest.raises(InputError, match=r"a step would mix data sets; set `data\.epoch_iterations` instead"):
        run("odd", accumulate_grad_batches=2, limit_train_batches=3)
    run("even", accumulate_grad_batches=2, limit_train_batches=4)
    run("quick", accumulate_grad_batches=2, fast_dev_run=True)


def test_journal_lines_have_exactly_the_stated_fields(
    runner: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = runner.with_changes(settings, tmp_path, "run", trainer={"max_steps": 3})
    runner.run(run)
    text = Path(run["journal"]).read_text()
    for number, line in enumerate(text.splitlines()):
        entry = json.loads(line)
        assert list(entry) == ["iteration", "rank", "dataset", "keys", "digest"]
        assert (entry["iteration"], entry["rank"], entry["dataset"]) == (number, 0, "aba"[number])
        assert all(key.startswith(entry["dataset"] + "/") for key in entry["keys"])
        assert len(entry["keys"]) == {"a": 4, "b": 3}[entry["dataset"]]
        assert re.fullmatch("[0-9a-f]{40}", entry["digest"])


def test_digest_changes_with_every_tensor_and_phrase() -> None:
    def batch(**changes: Any) -> MattingBatch:
        fields: dict[str, Any] = {
            "image": torch.full((2, 3, 4, 4), 0.5),
            "target": torch.full((2, 1, 4, 4), 0.5),
            "has_alpha": torch.tensor([True, True]),
            "prompts": ("a cat", "a dog"),
            "prompt_kinds": ("", ""),
            "keys": ("s/0/a", "s/0/b"),
            "instance": torch.tensor([0, 1]),
        }
        return MattingBatch(**{**fields, **changes})

    one_pixel = torch.full((2, 3, 4, 4), 0.5)
    one_pixel[1, 2, 3, 3] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    others = [
        batch(image=one_pixel),
        batch(target=one_pixel[:, :1] + 0.25),
        batch(has_alpha=torch.tensor([True, False])),
        batch(prompts=("a dog", "a cat")),
        batch(instance=torch.tensor([1, 0])),
        batch(foreground=torch.full((2, 3, 4, 4), 0.5)),
    ]
    digests = {digest(item) for item in [batch(), *others]}
    assert len(digests) == 1 + len(others)
    assert digest(batch()) == digest(batch())
