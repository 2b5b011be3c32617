"""What a run leaves to look at: gradient norms, learning rates, pictures, with TensorBoard and without it."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch.utils.data import DataLoader

from callbacks import GradientNorms, Preview, tensorboard_if_installed
from lit_matting.cli import main
from lit_matting.module import LitMatting
from lit_matting.optimization import Constant
from lit_matting.records import MattingBatch, MattingOutput


def test_norms_and_rates_of_every_group_are_in_the_csv(
    make_model: Callable[..., LitMatting], make_trainer: Callable[..., pl.Trainer], make_batch: Callable, tmp_path: Path
) -> None:
    norms: dict[str, float] = {}

    class Slow(pl.Callback):
        """The same norms by a loop over parameters, after clipping has not happened yet."""

        def on_before_optimizer_step(self, trainer: pl.Trainer, module: LitMatting, optimizer: torch.optim.Optimizer):
            for group in optimizer.param_groups:
                squares = sum(float((parameter.grad.double() ** 2).sum()) for parameter in group["params"])
                norms[group["name"]] = squares**0.5

    model = make_model(
        learning_rate_scales={"network.backbone.unet": 0.1},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        schedule=Constant(),
    )
    trainer = make_trainer(
        [GradientNorms(), LearningRateMonitor(), Slow()],
        max_steps=1,
        logger=CSVLogger(tmp_path, name="logs"),
        log_every_n_steps=1,
        gradient_clip_val=1e-3,
    )
    trainer.fit(model, DataLoader([make_batch()], batch_size=None))
    rows = list(csv.DictReader((tmp_path / "logs/version_0/metrics.csv").open()))
    logged = {key: float(value) for row in rows for key, value in row.items() if value}
    unet = "network.backbone.unet"
    assert set(norms) == {unet, f"{unet}/no_decay", "rest", "rest/tables", "rest/no_decay"}
    for name, norm in norms.items():
        assert norm > 1e-3  # clipping comes later
        assert logged[f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-4)
        assert logged[f"lr-AdamW/{name}"] == pytest.approx(1e-4 if name.startswith(unet) else 1e-3)
    assert {f"loss/{name}" for name in ("stm", "ctm", "sg", "alpha_lr", "r", "total")} <= set(logged)


def test_preview_shows_each_map_in_its_place(make_batch: Callable[..., MattingBatch], tmp_path: Path) -> None:
    batch = make_batch(image=torch.zeros(2, 3, 32, 32), target=torch.ones(2, 1, 32, 32))
    half, quarter = torch.full((2, 1, 4, 4), 0.5), torch.full((2, 1, 32, 32), 0.25)
    output = MattingOutput(quarter, None, half, None, torch.full((2, 1, 4, 4), -20.0))
    sheet = np.asarray(Preview(str(tmp_path), side=40).draw(batch, output))
    assert sheet.shape == (20 + 2 * (20 + 40 + 4), 5 * 44, 3)
    for row in range(2):
        middle = sheet[40 + row * 64 + 20, 20::44]
        # image, truth, grounding, trimap, alpha
        assert middle[:, 0].tolist() == [0, 255, 0, 128, 64]
        assert (sheet[22 + row * 64 : 38 + row * 64] < 128).any(), "the phrase"


def test_preview_is_drawn_at_every_validation_and_goes_to_tensorboard(
    make_model: Callable[..., LitMatting], make_trainer: Callable[..., pl.Trainer], make_batch: Callable, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    logger = tensorboard_if_installed(str(tmp_path))
    assert isinstance(logger, TensorBoardLogger)
    seen = []
    logger.experiment.add_image = lambda name, *rest, **options: seen.append((name, rest[1]))
    trainer = make_trainer(
        [Preview(str(tmp_path / "preview"), count=1)], max_steps=2, val_check_interval=1, logger=[logger]
    )
    loader = DataLoader([make_batch()] * 2, batch_size=None)
    trainer.fit(make_model(), loader, loader)
    assert [path.name for path in sorted((tmp_path / "preview").iterdir())] == ["step_0000001.png", "step_0000002.png"]
    assert seen == [("preview", 1), ("preview", 2)]
    with Image.open(tmp_path / "preview" / "step_0000001.png") as picture:
        assert picture.height == 20 + 20 + 160 + 4


def test_both_loggers_are_named_in_a_config_and_write(experiment: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = experiment.parent
    loggers = (
        f"[{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {folder}, name: logs}}}},"
        f" {{class_path: callbacks.tensorboard_if_installed, init_args: {{save_dir: {folder}}}}}]"
    )
    flags = [f"--trainer.logger={loggers}", "--trainer.log_every_n_steps=1"]
    assert main(["fit", "--config", str(experiment), *flags]) == 0
    assert "loss/total" in (folder / "logs/version_0/metrics.csv").read_text()
    assert list((folder / "tensorboard" / "version_0").glob("events.out.tfevents.*"))


def test_without_tensorboard_the_other_loggers_still_write(
    make_model: Callable[..., LitMatting],
    make_trainer: Callable[..., pl.Trainer],
    make_batch: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name))
    loggers = [CSVLogger(tmp_path, name="logs"), tensorboard_if_installed(str(tmp_path))]
    trainer = make_trainer(
        [Preview(str(tmp_path / "preview")), LearningRateMonitor()], max_steps=1, logger=loggers, log_every_n_steps=1
    )
    loader = DataLoader([make_batch()], batch_size=None)
    trainer.fit(make_model(), loader, loader)
    assert "loss/total" in (tmp_path / "logs/version_0/metrics.csv").read_text()
    assert not (tmp_path / "tensorboard").exists()
    assert len(list((tmp_path / "preview").iterdir())) == 1
