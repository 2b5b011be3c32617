"""A small training run, here or in processes of its own that can be killed: `python train_runner.py SETTINGS.json`."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from callbacks.sample_journal import SampleJournal
from data_modules import Augmentation, BenchmarkSource, InterleavedDataModule, InterleavedSchedule, ShardSource
from lit_matting.backbones import TinyDiffusion
from lit_matting.losses import AlphaLowResolution, CoarseTrimap, Refinement, SemanticTrimap, SoftGrounding
from lit_matting.module import LitMatting
from lit_matting.networks.heads import GroundingHead
from lit_matting.networks.neck import Neck
from lit_matting.networks.refiner import SparseRefiner
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

    def validation_step(self, batch: MattingBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._note("seen", batch)

    def test_step(self, batch: MattingBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._note("tested", batch)

    def _note(self, what: str, batch: MattingBatch) -> None:
        rows = zip(batch.keys, batch.instance.tolist(), batch.prompts)
        folder = Path(self.trainer.default_root_dir)
        with open(folder / f"{what}{self.global_rank}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps([self.global_step, *row]) + "\n" for row in rows)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def matting_model() -> LitMatting:
    """The real module with its five terms, very small, and plain gradient descent: steps as large as gradients."""
    torch.manual_seed(0)
    return LitMatting(
        backbone=TinyDiffusion((16, 32), stem_channels=8, text_channels=16, max_tokens=16),
        losses={
            "stm": SemanticTrimap(),
            "ctm": CoarseTrimap(),
            "sg": SoftGrounding(),
            "alpha_lr": AlphaLowResolution(),
            "r": Refinement(),
        },
        image_size=32,
        neck=partial(Neck, channels=16),
        # the tiny backbone's attention over all of a phrase's words sums to 1 everywhere: its standardised map is noise
        grounding_head=partial(GroundingHead, similarity_scale=8.0, attention=False),
        refiner=SparseRefiner(feature_channels=4, widths=(8, 8), blocks=1, half_scale_above=64),
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    )


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
        val={name: BenchmarkSource(**source) for name, source in settings.get("val", {}).items()},
        test={name: BenchmarkSource(**source) for name, source in settings.get("test", {}).items()},
        schedule=InterleavedSchedule(**settings["schedule"]) if "schedule" in settings else None,
        augment=Augmentation() if settings.get("augment", True) else None,
        image_size=settings.get("image_size", 16),
        **settings.get("data", {}),
    )


def run(settings: dict[str, Any], module: InterleavedDataModule | None = None) -> Trainer:
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
    model = matting_model() if settings.get("model") == "matting" else Small()
    module = module or data_module(settings)
    trainer.fit(model, module, ckpt_path=settings.get("resume"), weights_only=True)
    if module.test:
        trainer.test(model, module)
    if trainer.is_global_zero:
        torch.save(model.state_dict(), folder / "weights.pt")
    return trainer


def lines(journal: Path, rank: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a journal, of one rank or of all."""
    found = [json.loads(line) for line in journal.read_text().splitlines()]
    return [line for line in found if rank is None or line["rank"] == rank]


def with_changes(settings: dict[str, Any], tmp_path: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Return the settings of another run, in its own folder."""
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


def _start(settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    log = open(folder / "log.txt", "wb")  # noqa: SIM115
    return subprocess.Popen(
        [sys.executable, __file__, str(folder / "settings.json")],
        stdout=log,
        stderr=log,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(settings: dict[str, Any], timeout_s: float = 500) -> None:
    """Run in a process of its own until it ends well."""
    process = _start(settings)
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code = "no end"
    assert code == 0, (Path(settings["folder"]) / "log.txt").read_text()[-3000:]


def kill_after(settings: dict[str, Any], count: int, timeout_s: float = 500) -> None:
    """Start a run and kill all its processes once its journal has `count` lines."""
    process = _start(settings)
    journal, end = Path(settings["journal"]), time.monotonic() + timeout_s
    while not journal.exists() or len(journal.read_bytes().splitlines()) < count:
        stuck = process.poll() is not None or time.monotonic() > end
        assert not stuck, (Path(settings["folder"]) / "log.txt").read_text()[-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    run(json.loads(Path(sys.argv[1]).read_text()))
