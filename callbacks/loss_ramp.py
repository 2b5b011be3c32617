"""Loss terms that enter one after the other."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lit_matting.checks import InputError


class LossRamp(pl.Callback):
    """Raise the factor of loss terms from 0 to 1 between two optimizer steps: semantics first, transparency second.

    The factor is a function of the step alone, so a resumed run continues on the same ramp.

    Args:
        ramps: Name of the term -> [last step with the factor 0, first step with the full factor]; both the same switch
            the term on at that step.
    """

    def __init__(self, ramps: dict[str, tuple[int, int]]) -> None:
        for name, (start, end) in ramps.items():
            if not 0 <= start <= end:
                raise InputError(
                    f"`LossRamp.ramps.{name}` must be [start, end] with 0 <= start <= end, got {[start, end]}."
                )
        self.ramps = ramps

    @staticmethod
    def factor(step: int, start: int, end: int) -> float:
        """Return the factor at ``step``: 1 from ``end`` on, else 0 up to ``start``, linear between.

        Example:
            >>> [LossRamp.factor(step, 10, 20) for step in (0, 10, 15, 20, 30)]
            [0.0, 0.0, 0.5, 1.0, 1.0]
        """
        if step >= end:
            return 1.0
        return 0.0 if step <= start else (step - start) / (end - start)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = set(pl_module.objective.terms)
        if unknown := set(self.ramps) - known:
            raise InputError(f"`LossRamp.ramps` names {sorted(unknown)}, but the losses are {sorted(known)}.")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for name, (start, end) in self.ramps.items():
            pl_module.objective.ramps[name] = self.factor(trainer.global_step, start, end)
