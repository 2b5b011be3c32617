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


def test_no_step_to_ask_at_is_refused() -> None:
    with pytest.raises(InputError, match=r"`every_n_steps` of Preemption must be 1 or more, got 0"):
        Preemption(every_n_steps=0)
