"""A moving average of the trained weights, which validation and checkpoints then use."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn as nn
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lit_matting.checks import InputError

log = logging.getLogger(__name__)


class EMA(WeightAveraging):
    """Lightning's weight averaging over trained parameters only: frozen ones are neither copied nor averaged.

    A copy of Stable Diffusion 2.1's autoencoder and text encoder would cost 1.5 GB and say nothing, and an average of
    equal numbers is not always exactly that number. Buffers stay those of the current model. The checkpoint's
    ``state_dict`` holds the average, ``current_model_state`` the trained weights as they are, to train on from.

    Where a strategy shards the parameters there is nothing whole to average: it stands aside, and says so.

    Args:
        decay: Share of the average that a step keeps.
        start_step: Optimizer step from which to average; before it the average follows the weights.
        device: Where the average lives; null: beside the model. "cpu" saves the card's memory and costs time.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"`EMA.decay` must lie in [0, 1), got {decay}.")
        super().__init__(device=device, use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.start_step = start_step
        self._ended = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            log.warning("EMA: the strategy shards the parameters, so no average is kept; checkpoints hold the weights.")
            return
        if any(isinstance(item, ModelCheckpoint) and item.save_weights_only for item in trainer.callbacks):
            raise InputError(
                "`ModelCheckpoint.save_weights_only` leaves the callbacks out, so that EMA's average would be lost:"
                " drop it, or EMA, from `trainer.callbacks`."
            )
        self._ended = False
        super().setup(trainer, _Trained(pl_module), stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # the average was made before the model went to its device
        if self._average_model is not None:
            self._average_model.to(self._device or pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._average_model is None:
            return
        if trainer.global_step <= self.start_step:
            self._average_model.n_averaged.zero_()  # the next update copies
        super().on_train_batch_end(trainer, _Trained(pl_module), outputs, batch, batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average_model is not None:
            # not only copied: a checkpoint that is saved from now on must still hold what to train on from
            self._swap_models(_Trained(pl_module))
            self._ended = True

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_start(trainer, _Trained(pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, _Trained(pl_module))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is None:
            return
        state = checkpoint["state_dict"]
        average = self._average_model.module.named()
        current = {name: state[name] for name in average}
        if self._ended:
            average, current = current, average
        checkpoint["current_model_state"] = current
        checkpoint["state_dict"] = {**state, **average}
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is None:  # judging: the state dict is the average already
            return
        average = self._average_model.module.named()
        if missing := sorted(set(average) - set(checkpoint["state_dict"])):
            raise InputError(
                f"the checkpoint to go on from has no {missing[0]!r}: it was trained with another network."
            )
        with torch.no_grad():
            for name, value in average.items():
                value.copy_(checkpoint["state_dict"][name])
        if "averaging_state" in checkpoint:
            self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
            # what the module has loaded is the average; it goes on from where it was
            pl_module.load_state_dict({**checkpoint["state_dict"], **checkpoint["current_model_state"]})


class _Trained(pl.LightningModule):
    """The trained parameters of a module, and nothing else of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)

    def named(self) -> dict[str, torch.Tensor]:
        """Return the parameters' values under their names in the module."""
        return {name.replace("/", "."): parameter.data for name, parameter in self.named_parameters()}
