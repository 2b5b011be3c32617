"""The ramp of loss terms: a function of the step alone."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from callbacks import LossRamp
from lit_matting.checks import InputError
from lit_matting.module import LitMatting
from lit_matting.records import MattingBatch


def test_factor_is_zero_then_linear_then_one() -> None:
    assert [LossRamp.factor(step, 10, 14) for step in (0, 9, 10, 11, 13, 14, 99)] == [0, 0, 0, 0.25, 0.75, 1, 1]


def test_equal_ends_are_a_switch() -> None:
    assert [LossRamp.factor(step, 5, 5) for step in (4, 5, 6)] == [0, 1, 1]
    assert LossRamp.factor(0, 0, 0) == 1


@pytest.mark.parametrize("ends", [(5, 4), (-1, 4)])
def test_ends_out_of_order_are_refused(ends: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"`LossRamp.ramps.r` must be \[start, end\] with 0 <= start <= end"):
        LossRamp({"r": ends})


def test_ramp_of_an_unknown_term_is_refused_before_training(
    make_model: Callable[..., LitMatting], make_trainer: Callable[..., pl.Trainer], make_batch: Callable
) -> None:
    with pytest.raises(InputError, match=r"names \['rr'\], but the losses are \['alpha_lr', 'ctm', 'r', 'sg', 'stm'\]"):
        make_trainer([LossRamp({"rr": (0, 1)})]).fit(make_model(), DataLoader([make_batch()], batch_size=None))


def test_terms_enter_in_their_turn_and_the_refiner_waits_for_its_own(
    make_model: Callable[..., LitMatting],
    make_trainer: Callable[..., pl.Trainer],
    make_batch: Callable[..., MattingBatch],
) -> None:
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LitMatting, *rest: object) -> None:
            seen.append((pl_module.objective.ramps["alpha_lr"], pl_module.objective.ramps["r"], pl_module.refining))

    trainer = make_trainer([LossRamp({"alpha_lr": (0, 2), "r": (2, 3)}), Watch()], max_steps=5)
    trainer.fit(make_model(), DataLoader([make_batch()] * 5, batch_size=None))
    assert seen == [(0.0, 0.0, False), (0.5, 0.0, False), (1.0, 0.0, False), (1.0, 1.0, True), (1.0, 1.0, True)]
