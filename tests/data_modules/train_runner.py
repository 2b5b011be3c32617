"""A small training run in a process of its own, for tests that kill it: `python train_runner.py SETTINGS.json`."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from callbacks.sample_journal import SampleJournal
from data_modules import Augmentation, InterleavedDataModule, InterleavedSchedule, ShardSource
from lit_matting.records import MattingBatch


class Small(LightningModule):
    """Two convolutions; the second is trained by samples with an alpha only."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.mask = nn.Conv2d(3, 1, 3, padding=1)
        self.alpha = nn.Conv2d(3, 1, 3, padding=1)

    def training_step(self, batch: MattingBatch, batch_idx: int) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(self.mask(batch.image), batch.target)
        error = (self.alpha(batch.image) - batch.target).abs().mean((1, 2, 3))
        return loss + (error * batch.has_alpha).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Slow(Callback):
    """Makes every step long enough for a kill to come in between."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(self.seconds)


def data_module(settings: dict[str, Any]) -> InterleavedDataModule:
    """Build the data module of a run."""
    return InterleavedDataModule(
        train={name: ShardSource(**source) for name, source in settings["train"].items()},
        schedule=InterleavedSchedule(**settings["schedule"]) if "schedule" in settings else None,
        augment=Augmentation() if settings.get("augment", True) else None,
        image_size=settings.get("image_size", 16),
        **settings.get("data", {}),
    )


def run(settings: dict[str, Any]) -> Trainer:
    """Fit, and leave the last weights in the run's folder."""
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    callbacks: list[Callback] = [SampleJournal(settings["journal"])]
    if settings.get("seconds"):
        callbacks.append(Slow(settings["seconds"]))
    every = settings.get("checkpoint_every", 0)
    if every:
        callbacks.append(
            ModelCheckpoint(folder, filename="{step:04d}", every_n_train_steps=every, save_top_k=-1, monitor=None)
        )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(every),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=folder,
        **settings["trainer"],
    )
    model = Small()
    trainer.fit(model, data_module(settings), ckpt_path=settings.get("resume"), weights_only=True)
    if trainer.is_global_zero:
        torch.save(model.state_dict(), folder / "weights.pt")
    return trainer


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    run(json.loads(Path(sys.argv[1]).read_text()))
