"""The average of the weights: its value, what it leaves out, and that a resumed run has the same one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn as nn
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from callbacks import EMA
from lit_matting.backbones import TinyDiffusion
from lit_matting.checks import InputError
from lit_matting.module import LitMatting
from lit_matting.optimization import Constant
from lit_matting.records import MattingBatch

MakeModel = Callable[..., LitMatting]
MakeBatch = Callable[..., MattingBatch]
MakeTrainer = Callable[..., pl.Trainer]

WATCHED = "network.trimap_head.layers.0.weight"


class FrozenStem(TinyDiffusion):
    """A backbone one of whose parts is loaded and never trained, as an autoencoder is."""

    def __init__(self) -> None:
        super().__init__((16, 32), stem_channels=8, text_channels=16, max_tokens=6)
        self.image_encoder.requires_grad_(False)

    def frozen_modules(self) -> dict[str, nn.Module]:
        return {"image_encoder": self.image_encoder}


class Record(pl.Callback):
    """The watched weight after every step, and at every validation."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LitMatting, *rest: object) -> None:
        self.steps.append(pl_module.get_parameter(WATCHED).detach().clone())

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: LitMatting, *rest: object) -> None:
        self.validated.append(pl_module.get_parameter(WATCHED).detach().clone())


@pytest.fixture
def fit(make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch, tmp_path: Path) -> Callable:
    """Train some steps with the average on; return model, trainer, what was recorded, and the checkpoint's path."""

    def run(steps: int, ema: EMA, resume: Path | None = None, **options: object) -> tuple:
        torch.manual_seed(3)
        options.setdefault("backbone", FrozenStem())
        options.setdefault("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        options.setdefault("schedule", Constant())  # not a function of the last step
        model, record = make_model(**options), Record()
        model.load_state_dict(model.state_dict())  # a stage that freezes parts goes on from weights
        path = tmp_path / f"{steps}.ckpt"

        class Save(pl.Callback):
            def on_train_end(self, trainer: pl.Trainer, pl_module: LitMatting) -> None:
                trainer.save_checkpoint(path)

        # one epoch per step: a run that stops at any step stops between epochs
        trainer = make_trainer([Save(), ema, record], max_steps=steps, max_epochs=-1, num_sanity_val_steps=0)
        loader = DataLoader([make_batch()], batch_size=None)
        trainer.fit(model, loader, loader, ckpt_path=resume)
        return model, trainer, record, path

    return run


def closed_form(steps: list[torch.Tensor], decay: float) -> torch.Tensor:
    average = steps[0]
    for value in steps[1:]:
        average = decay * average + (1 - decay) * value
    return average


def test_average_is_the_closed_form_and_is_what_validation_sees(fit: Callable) -> None:
    model, _, record, _ = fit(3, EMA(decay=0.8))
    expected = [closed_form(record.steps[: count + 1], 0.8) for count in range(3)]
    assert not torch.allclose(record.steps[-1], expected[-1])
    for seen, value in zip(record.validated, expected):
        torch.testing.assert_close(seen, value)
    # the end of training leaves the average in the model
    torch.testing.assert_close(model.get_parameter(WATCHED), expected[-1])


def test_average_begins_where_it_is_told_to(fit: Callable) -> None:
    _, _, record, _ = fit(4, EMA(decay=0.8, start_step=2))
    torch.testing.assert_close(record.validated[-1], closed_form(record.steps[1:], 0.8))
    assert torch.equal(record.validated[0], record.steps[0])


def test_frozen_parts_are_not_copied(fit: Callable) -> None:
    ema = EMA()
    model, *_ = fit(1, ema)
    copied = sum(value.numel() for value in ema._average_model.state_dict().values()) - 1  # and one counter
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    stem = sum(parameter.numel() for parameter in model.network.backbone.image_encoder.parameters())
    assert copied == trained
    assert stem > 0
    assert copied + stem == sum(parameter.numel() for parameter in model.parameters())


def test_what_a_stage_froze_is_neither_copied_nor_changed_by_a_bit(fit: Callable, make_model: MakeModel) -> None:
    ema = EMA()
    model, _, _, path = fit(3, ema, trainable=["network.refiner", "network.project"])
    torch.manual_seed(3)
    backbone = FrozenStem()
    untrained = make_model(backbone=backbone).state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith(("network.refiner.", "network.project.")):
            assert torch.equal(value, untrained[name]), name
    assert all(name.startswith(("network.refiner.", "network.project.")) for name in ema._average_model.module.named())
    checkpoint = torch.load(path, weights_only=True)
    assert not any("image_encoder" in name for name in checkpoint["state_dict"])
    assert set(checkpoint["current_model_state"]) == set(ema._average_model.module.named())
    # the rest of the model is still in the checkpoint: a later stage starts from it
    assert WATCHED in checkpoint["state_dict"]


def test_checkpoint_holds_the_average_and_the_weights_to_go_on_from(fit: Callable) -> None:
    _, _, record, path = fit(3, EMA(decay=0.8))
    checkpoint = torch.load(path, weights_only=True)
    torch.testing.assert_close(checkpoint["state_dict"][WATCHED], closed_form(record.steps, 0.8))
    assert torch.equal(checkpoint["current_model_state"][WATCHED], record.steps[-1])


def test_checkpoint_after_the_end_of_training_holds_the_weights_to_go_on_from_too(fit: Callable) -> None:
    _, trainer, record, path = fit(3, EMA(decay=0.8))
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    torch.testing.assert_close(checkpoint["state_dict"][WATCHED], closed_form(record.steps, 0.8))
    assert torch.equal(checkpoint["current_model_state"][WATCHED], record.steps[-1])


def test_checkpoints_that_would_lose_the_average_are_refused(make_model: MakeModel, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer([EMA(), ModelCheckpoint(save_weights_only=True)], enable_checkpointing=True)
    with pytest.raises(InputError, match=r"`ModelCheckpoint.save_weights_only` leaves the callbacks out"):
        trainer.fit(make_model(), [])


def test_resumed_run_has_the_average_of_one_that_never_stopped(fit: Callable) -> None:
    _, _, whole, _ = fit(4, EMA(decay=0.8))
    _, _, _, path = fit(2, EMA(decay=0.8))
    _, _, resumed, _ = fit(4, EMA(decay=0.8), resume=path)
    assert len(resumed.steps) == 2
    for ours, theirs in zip(resumed.steps, whole.steps[2:]):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(resumed.validated[-1], whole.validated[-1])


def test_training_on_without_the_average_is_warned_about_and_other_uses_are_not(
    fit: Callable,
    make_model: MakeModel,
    make_trainer: MakeTrainer,
    make_batch: MakeBatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, _, record, path = fit(2, EMA(decay=0.8))
    loader = DataLoader([make_batch()], batch_size=None)

    def model() -> LitMatting:
        torch.manual_seed(3)  # its frozen parts are those of the checkpoint
        return make_model(backbone=FrozenStem())

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: LitMatting) -> None:
            self.start = pl_module.get_parameter(WATCHED).detach().clone()

    warning = "add callbacks.EMA to `trainer.callbacks`"
    with caplog.at_level("WARNING", logger="lit_matting.module"):
        for judge in ("validate", "test", "predict"):
            getattr(make_trainer(), judge)(model(), loader, ckpt_path=path, weights_only=True)
        make_model(backbone=model().network.backbone, initial_weights=str(path))
        fit(3, EMA(decay=0.8), resume=path)
        assert warning not in caplog.text
        watch = Watch()
        trainer = make_trainer([watch], max_steps=3, max_epochs=-1)
        trainer.fit(model(), loader, ckpt_path=path, weights_only=True)
    assert caplog.text.count(warning) == 1
    torch.testing.assert_close(watch.start, closed_form(record.steps, 0.8))  # as the warning says


def test_run_goes_on_from_a_checkpoint_without_an_average(
    fit: Callable, make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = make_model(backbone=FrozenStem())
    trainer = make_trainer(max_steps=1, max_epochs=-1)
    trainer.fit(model, DataLoader([make_batch()], batch_size=None))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    _, _, record, _ = fit(2, EMA(decay=0.8), resume=tmp_path / "plain.ckpt")
    torch.testing.assert_close(record.validated[-1], record.steps[-1])  # the first update copies


def test_average_stands_aside_where_parameters_are_sharded(
    make_model: MakeModel, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    ema, model = EMA(), make_model()
    trainer = make_trainer([ema])
    trainer.strategy.__class__ = type("Sharded", (ModelParallelStrategy,), {})
    with caplog.at_level("WARNING", logger="callbacks.ema"):
        ema.setup(trainer, model, "fit")
    assert "the strategy shards the parameters, so no average is kept" in caplog.text
    checkpoint = {"state_dict": model.state_dict()}
    ema.on_fit_start(trainer, model)
    ema.on_train_batch_end(trainer, model, None, None, 0)
    ema.on_validation_epoch_start(trainer, model)
    ema.on_train_end(trainer, model)
    ema.on_save_checkpoint(trainer, model, checkpoint)
    assert set(checkpoint) == {"state_dict"}


def test_sharding_goes_on_without_an_average_and_is_refused_with_one(
    make_model: MakeModel, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded: list[nn.Module] = []
    monkeypatch.setattr("lit_matting.module.shard", lambda network, mesh: sharded.append(network))
    monkeypatch.setattr(LitMatting, "device_mesh", {"data_parallel": None})
    ema, model = EMA(), make_model()
    model.trainer = trainer = make_trainer([ema])
    ema.setup(trainer, model, "fit")
    with pytest.raises(InputError, match="EMA cannot average weights that are spread over processes"):
        model.configure_model()
    assert not sharded
    aside = EMA()
    model.trainer = trainer = make_trainer([aside])
    trainer.strategy.__class__ = type("Sharded", (ModelParallelStrategy,), {})
    aside.setup(trainer, model, "fit")
    model.configure_model()
    assert sharded == [model.network]


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match=rf"`EMA.decay` must lie in \[0, 1\), got {decay}"):
        EMA(decay)
