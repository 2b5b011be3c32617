"""An interruption: when processes ask for one, what is saved, and which checkpoint a run deletes at its end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks import Preemption
from lit_matting.checks import InputError


class SignalAtStep(pl.Callback):
    """Sends this process a signal while a step is computed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *call: object) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def fit(make_model: Callable, make_trainer: Callable, make_batch: Callable) -> Callable[..., pl.Trainer]:
    """Train some steps; ``setup`` is called with the trainer before."""

    def run(
        *callbacks: pl.Callback, resume: Path | None = None, setup: Callable = lambda trainer: None, **options: int
    ) -> pl.Trainer:
        trainer = make_trainer(callbacks, max_epochs=-1, enable_checkpointing=True, **options)
        setup(trainer)
        loader = DataLoader([make_batch()] * 4, batch_size=None)
        trainer.fit(make_model(), loader, ckpt_path=resume, weights_only=True)
        return trainer

    return run


def test_a_run_deletes_only_the_checkpoint_that_it_went_on_from(
    fit: Callable[..., pl.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted, other = tmp_path / "preempted.ckpt", tmp_path / "other.ckpt"
    with pytest.raises(SystemExit) as ended:
        fit(Preemption(), SignalAtStep(1), max_steps=3)
    assert ended.value.code == 75
    assert torch.load(preempted, weights_only=True)["global_step"] == 2
    other.write_bytes(preempted.read_bytes())

    fit(Preemption(), max_steps=1)  # a run from the beginning
    assert preempted.exists()
    fit(Preemption(), max_steps=3, resume=other)
    assert preempted.exists()
    monkeypatch.chdir(tmp_path)
    fit(Preemption(), max_steps=3, resume=Path("preempted.ckpt"))  # the same file by another name
    assert not preempted.exists()
    assert other.exists()


def test_processes_ask_each_other_at_every_nth_step_and_a_signal_waits_for_it(
    fit: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    asked: list[tuple[int, bool]] = []

    def record(trainer: pl.Trainer) -> None:
        def decide(decision: bool, all: bool = True) -> bool:
            asked.append((trainer.global_step, decision))
            return decision

        trainer.strategy.reduce_boolean_decision = decide

    # six batches make three steps ...
    fit(Preemption(every_n_steps=2), setup=record, max_steps=3, accumulate_grad_batches=2)
    assert asked == [(2, False)]
    asked.clear()
    # ... and the last step of a run is not asked about
    fit(Preemption(every_n_steps=3), setup=record, max_steps=9)
    assert asked == [(3, False), (6, False)]
    asked.clear()
    with pytest.raises(SystemExit):
        fit(Preemption(every_n_steps=3), SignalAtStep(3), setup=record, max_steps=9)
    assert asked == [(3, False), (6, True)]
    assert torch.load(tmp_path / "preempted.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.parametrize(
    ("job", "named"),
    [
        ({"SLURM_JOB_ID": "71"}, "71"),
        ({"SLURM_JOB_ID": "73", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}, "70_3"),
        ({}, None),
    ],
)
def test_inside_slurm_the_job_is_requeued_once_and_after_the_checkpoint_is_there(
    job: dict[str, str],
    named: str | None,
    fit: Callable[..., pl.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = fake_scontrol(tmp_path, monkeypatch, f"ls {tmp_path}/preempted.ckpt")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        fit(Preemption(), SignalAtStep(1), max_steps=3)
    assert ended.value.code == 75
    said = calls.read_text().splitlines() if calls.is_file() else []
    assert said == ([] if named is None else [f"requeue {named}", f"{tmp_path}/preempted.ckpt"])


def test_a_job_that_is_not_to_be_requeued_or_cannot_be_is_still_saved(
    fit: Callable[..., pl.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = fake_scontrol(tmp_path, monkeypatch, "echo no such job >&2; exit 1")
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    for asked in (False, True):
        with pytest.raises(SystemExit):
            fit(Preemption(requeue=asked), SignalAtStep(1), max_steps=3)
        assert (tmp_path / "preempted.ckpt").is_file()
        assert calls.is_file() == asked
    assert "The job could not be requeued (no such job): submit it again." in caplog.text


def fake_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, then: str) -> Path:
    """Put a command of this name before all others; it writes down what it is called with, and what ``then`` prints."""
    script = folder / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/bash\necho "$@" >> {folder}/calls\nexec >> {folder}/calls\n{then}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return folder / "calls"


def test_no_step_to_ask_at_is_refused() -> None:
    with pytest.raises(InputError, match=r"`every_n_steps` of Preemption must be 1 or more, got 0"):
        Preemption(every_n_steps=0)
