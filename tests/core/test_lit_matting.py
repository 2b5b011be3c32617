"""LitMatting: what trains, what is frozen, what is saved, and that no parameter is ever left without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader

from lit_matting import module as module_file
from lit_matting.backbones import TinyDiffusion
from lit_matting.checks import InputError
from lit_matting.losses import SemanticTrimap, SoftAlpha
from lit_matting.module import LitMatting
from lit_matting.optimization import Cosine
from lit_matting.records import MattingBatch, MattingOutput

MakeModel = Callable[..., LitMatting]
MakeBatch = Callable[..., MattingBatch]
MakeTrainer = Callable[..., pl.Trainer]

pytestmark = pytest.mark.filterwarnings("ignore:.*self.log.*:UserWarning", "ignore:.*val_dataloader.*:UserWarning")
REFINER_STAGE = ["network.refiner", "network.project"]


class FrozenStem(TinyDiffusion):
    """A backbone one of whose parts is loaded and never trained, as an autoencoder is."""

    def __init__(self) -> None:
        super().__init__((16, 32), stem_channels=8, text_channels=16, max_tokens=6)
        self.image_encoder.requires_grad_(False)

    def frozen_modules(self) -> dict[str, nn.Module]:
        return {"image_encoder": self.image_encoder}


def loader(*batches: MattingBatch) -> DataLoader:
    return DataLoader(list(batches), batch_size=None)


# --- what trains ------------------------------------------------------------------------------------------------------


def test_by_default_everything_trains_but_the_backbones_frozen_parts(make_model: MakeModel) -> None:
    model = make_model(backbone=FrozenStem())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(name.startswith("network.backbone.image_encoder.") for name in frozen)


def test_stage_trains_the_modules_it_names_and_no_other(make_model: MakeModel) -> None:
    model = make_model(trainable=REFINER_STAGE)
    trained = {".".join(n.split(".")[:2]) for n, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(REFINER_STAGE)


def test_stage_never_thaws_what_the_backbone_froze(make_model: MakeModel) -> None:
    model = make_model(backbone=FrozenStem(), trainable=["network"])
    assert not any(parameter.requires_grad for parameter in model.network.backbone.image_encoder.parameters())
    assert all(parameter.requires_grad for parameter in model.network.neck.parameters())


def test_unknown_module_of_a_stage_is_refused_with_the_known_ones(make_model: MakeModel) -> None:
    with pytest.raises(InputError, match=r"names 'network.refine', which is no part.*network.project, network.refiner"):
        make_model(trainable=["network.refine"])


def test_frozen_modules_are_in_eval_mode_while_the_trainer_trains(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    # the trainer does not call train(): it keeps the modes it finds, also after validation
    model = make_model(trainable=REFINER_STAGE)
    model.load_state_dict(model.state_dict())  # a stage goes on from weights
    modes: list[dict[str, bool]] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: LitMatting, *rest: object) -> None:
            modes.append({name: part.training for name, part in pl_module.network.named_modules()})

    trainer = make_trainer([Watch()], max_steps=3, val_check_interval=1)
    trainer.fit(model, loader(*[make_batch()] * 3), loader(make_batch()))
    assert len(modes) == 3
    for mode in modes:
        training = {name.split(".")[0] for name, on in mode.items() if on and name}
        assert training == {"refiner", "project"}
        # dropout has no parameters of its own, and is frozen with the module it is part of
        dropouts = [name for name, part in model.network.named_modules() if isinstance(part, nn.Dropout)]
        assert dropouts
        assert not any(mode[name] for name in dropouts)


def test_backbones_frozen_parts_stay_in_eval_mode(make_model: MakeModel) -> None:
    model = make_model(backbone=FrozenStem()).train()
    assert not model.network.backbone.image_encoder.training
    assert model.network.backbone.unet.training
    assert not model.eval().network.neck.training


def test_optimizer_holds_trained_parameters_only_with_scaled_rates(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    model = make_model(
        backbone=FrozenStem(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        learning_rate_scales={"network.backbone.unet": 0.1},
        schedule=Cosine(warmup_steps=2),
    )
    trainer = make_trainer(max_steps=1)
    trainer.fit(model, loader(make_batch()))
    held = {id(p): group for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert set(held) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    unet, head = model.network.backbone.unet.conv_in.weight, model.network.trimap_head.layers[0].weight
    assert held[id(unet)]["initial_lr"] == pytest.approx(1e-3)
    assert held[id(head)]["initial_lr"] == pytest.approx(1e-2)
    assert (held[id(head)]["weight_decay"], held[id(model.network.grounding_head.offset)]["weight_decay"]) == (0.1, 0)


def test_learning_rate_follows_the_schedule_over_the_trainers_steps(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *rest: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = make_model(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0), schedule=Cosine())
    make_trainer([Watch()], max_steps=4).fit(model, loader(*[make_batch()] * 4))
    assert rates == pytest.approx([1.0, 0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5])


def test_run_without_an_end_is_refused(make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch) -> None:
    with pytest.raises(InputError, match=r"`trainer\.max_steps` must be set"):
        make_trainer(max_steps=-1, max_epochs=-1).fit(make_model(), loader(make_batch()))


# --- one training step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refining", [True, False], ids=["refining", "refiner-waits"])
@pytest.mark.parametrize(
    "fields", [{}, {"has_alpha": False}, {"detail": 24}, {"has_alpha": False, "detail": 24}, {"phrases_per_image": 2}],
    ids=["alpha", "masks-only", "detail", "masks-only-detail", "two-phrases"],
)  # fmt: skip
def test_every_trainable_parameter_has_a_gradient_on_every_step(
    make_model: MakeModel, make_batch: MakeBatch, fields: dict, refining: bool
) -> None:
    # distributed training waits for the gradient of every parameter; one that never comes hangs all ranks
    model = make_model()
    model.objective.ramps["r"] = float(refining)
    model.training_step(make_batch(**fields), 0).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("has_alpha", [True, False])
def test_stage_of_the_refiner_alone_gives_gradients_to_it_alone(
    make_model: MakeModel, make_batch: MakeBatch, has_alpha: bool
) -> None:
    model = make_model(trainable=REFINER_STAGE)
    model.training_step(make_batch(has_alpha=has_alpha), 0).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(tuple(f"{part}." for part in REFINER_STAGE)), name


def test_batch_of_masks_teaches_no_alpha(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model()
    model.training_step(make_batch(has_alpha=False), 0).backward()
    for part, taught in (("alpha_head", False), ("refiner", False), ("project", False), ("trimap_head", True)):
        gradient = sum(parameter.grad.abs().sum() for parameter in getattr(model.network, part).parameters())
        assert (gradient > 0) == taught, part


def test_refiner_runs_only_while_a_term_with_weight_needs_it(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model()
    runs = []
    model.network.refiner.register_forward_hook(lambda *call: runs.append(1))
    assert model.refining
    model.training_step(make_batch(), 0)
    assert len(runs) == 1
    model.objective.ramps["r"] = 0.0
    assert not model.refining
    model.training_step(make_batch(), 0)
    model.objective.ramps["r"] = 0.5
    model.objective.terms["r"].weight = 0.0
    assert not model.refining
    model.training_step(make_batch(), 0)
    assert len(runs) == 1
    assert not make_model(losses={"stm": SemanticTrimap(), "whole": SoftAlpha()}).refining


def test_logged_terms_add_up_to_the_logged_total(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model, logged = make_model(), {}
    model.log_dict = lambda values, **options: logged.update(values)  # type: ignore[method-assign]
    model.log = lambda name, value, **options: logged.update({name: value})  # type: ignore[method-assign]
    total = model.training_step(make_batch(), 0)
    weights = {"stm": 10, "ctm": 0.1, "sg": 0.5, "alpha_lr": 10, "r": 1}
    assert set(logged) == {*(f"loss/{name}" for name in weights), "loss/total"}
    assert torch.equal(logged["loss/total"], total)
    assert total.item() == pytest.approx(
        sum(weight * logged[f"loss/{name}"].item() for name, weight in weights.items())
    )


def test_refiner_is_compared_with_the_crop_it_worked_on(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model, batch, whole = make_model(), make_batch(detail=24), make_batch()
    output = model.network(batch.image, batch.prompts, detail=batch.detail)
    targets, without = model.targets(batch, output), model.targets(whole, output)
    assert torch.equal(targets.alpha, batch.detail.target)
    assert targets.unknown.shape == (2, 1, 24, 24)
    # the rest is still about the whole image
    for name in ("trimap", "coarse_trimap", "alpha_lr"):
        assert torch.equal(getattr(targets, name), getattr(without, name))


def test_samples_without_words_have_nothing_to_ground(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model()
    output = model.network(make_batch().image, make_batch().prompts)
    assert model.targets(make_batch(prompts=("the red disc", "")), output).has_phrase.tolist() == [True, False]


def test_some_steps_on_one_batch_lower_the_loss(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    losses = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LitMatting, outputs: dict, *rest: object) -> None:
            losses.append(outputs["loss"].item())

    model = make_model(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3))
    make_trainer([Watch()], max_steps=12).fit(model, loader(*[make_batch()] * 12))
    assert losses[-1] < 0.7 * losses[0]


def test_mixed_precision_trains_and_pure_half_precision_is_refused(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    model = make_model()
    before = model.network.trimap_head.layers[0].weight.detach().clone()
    make_trainer(precision="bf16-mixed", max_steps=1).fit(model, loader(make_batch()))
    after = model.network.trimap_head.layers[0].weight
    assert after.dtype == torch.float32
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    for precision in ("bf16-true", "64-true"):
        with pytest.raises(InputError, match=f"`trainer.precision` must be .*, got {precision}"):
            make_trainer(precision=precision).fit(make_model(), loader(make_batch()))


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch, make_batch: MakeBatch) -> None:
    """Let the network answer with the truth of ``make_batch``'s discs."""

    def answer(network: nn.Module, image: Tensor, phrases: tuple[str, ...], image_size: int) -> MattingOutput:
        alpha = make_batch().target
        small = nn.functional.avg_pool2d(alpha, 8)
        return MattingOutput(alpha, small, small, torch.zeros(2, 3, 2, 2), 20 * small - 10)

    monkeypatch.setattr(module_file, "matte_at_native_size", answer)


@pytest.mark.usefixtures("oracle")
def test_perfect_mattes_validate_perfectly(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    (logged,) = make_trainer().validate(make_model(), loader(make_batch()), verbose=False)
    assert logged == {"metric/grounding_accuracy": 1.0, "metric/soft_iou": 1.0, "metric/band_mae": 0.0}


@pytest.mark.usefixtures("oracle")
def test_test_scores_the_alpha_and_what_each_part_reached(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    model = make_model()
    make_trainer().test(model, loader(make_batch()), verbose=False)
    cards = {name: score.compute()["overall"] for name, score in model.test_scores.items()}
    assert set(cards) == {"alpha", "alpha_lr", "trimap", "grounding"}
    assert cards["alpha"]["soft_iou"] == 1.0
    assert 0.3 < cards["alpha_lr"]["soft_iou"] < 1.0  # enlarged eight times
    assert all(card["grounding_accuracy"] == 1.0 for card in cards.values())


@pytest.mark.usefixtures("oracle")
def test_several_benchmarks_are_judged_together(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    model = make_model()
    both = [loader(make_batch()), loader(make_batch())]
    make_trainer().validate(model, both, verbose=False)
    make_trainer().test(model, both, verbose=False)
    assert model.test_scores["alpha"].compute()["overall"]["count"] == 2 * len(make_batch())


def test_validation_without_instances_says_what_to_use(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    with pytest.raises(InputError, match=r"the batch of discs holds no instances.*BenchmarkSource"):
        make_trainer().validate(make_model(), loader(make_batch(instances=None)), verbose=False)


def test_prediction_has_the_photographs_size(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    photograph = make_batch(image=torch.rand(2, 3, 45, 70), target=torch.zeros(2, 1, 45, 70))
    (output,) = make_trainer().predict(make_model(), loader(photograph))
    assert output.alpha.shape == (2, 1, 45, 70)
    assert 0 <= output.alpha.min() <= output.alpha.max() <= 1


# --- checkpoints ------------------------------------------------------------------------------------------------------


def saved(model: LitMatting, make_trainer: MakeTrainer, batch: MattingBatch, path: Path) -> dict:
    trainer = make_trainer(max_steps=1)
    trainer.fit(model, loader(batch))
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def test_checkpoint_leaves_frozen_parts_out_and_names_the_backbone(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch, tmp_path: Path
) -> None:
    model = make_model(backbone=FrozenStem())
    checkpoint = saved(model, make_trainer, make_batch(), tmp_path / "a.ckpt")
    kept = set(checkpoint["state_dict"])
    assert kept == {key for key in model.state_dict() if not key.startswith("network.backbone.image_encoder.")}
    assert len(kept) < len(model.state_dict())
    assert checkpoint["lit_matting"]["backbone"] == "FrozenStem"
    assert checkpoint["lit_matting"]["image_size"] == 32
    assert checkpoint["lit_matting"]["frozen"] == model.network.backbone.frozen_hashes()


def test_checkpoint_of_another_frozen_part_is_refused_and_one_of_the_same_is_not(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch, tmp_path: Path
) -> None:
    model, path = make_model(backbone=FrozenStem()), tmp_path / "a.ckpt"
    saved(model, make_trainer, make_batch(), path)
    torch.manual_seed(5)
    other = make_model(backbone=FrozenStem())
    with pytest.raises(InputError, match=r"the checkpoint belongs to a backbone with another image_encoder than Froz"):
        make_trainer().fit(other, loader(make_batch()), ckpt_path=path, weights_only=True)
    other.network.backbone.image_encoder.load_state_dict(model.network.backbone.image_encoder.state_dict())
    other.network.backbone._frozen_hashes = None
    make_trainer(max_steps=2).fit(other, loader(make_batch()), ckpt_path=path, weights_only=True)


def test_stage_that_starts_from_weights_of_another_frozen_part_says_so(
    make_model: MakeModel,
    make_trainer: MakeTrainer,
    make_batch: MakeBatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(make_model(backbone=FrozenStem()), make_trainer, make_batch(), tmp_path / "a.ckpt")
    torch.manual_seed(5)
    make_model(backbone=FrozenStem(), initial_weights=str(tmp_path / "a.ckpt"))
    assert "another image_encoder" in caplog.text


def test_checkpoint_of_a_stage_keeps_what_only_the_stage_froze(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch, tmp_path: Path
) -> None:
    model = make_model(trainable=REFINER_STAGE)
    model.load_state_dict(model.state_dict())  # a stage goes on from weights
    checkpoint = saved(model, make_trainer, make_batch(), tmp_path / "a.ckpt")
    assert set(checkpoint["state_dict"]) == set(model.state_dict())


def test_next_stage_starts_from_the_last_ones_weights(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch, tmp_path: Path
) -> None:
    first = make_model(backbone=FrozenStem())
    saved(first, make_trainer, make_batch(), tmp_path / "a.ckpt")
    torch.manual_seed(5)
    second = make_model(backbone=FrozenStem(), trainable=REFINER_STAGE, initial_weights=str(tmp_path / "a.ckpt"))
    for name, value in second.state_dict().items():
        same = torch.equal(value, first.state_dict()[name])
        # what is not in the checkpoint is as its own backbone made it
        assert same or name.startswith("network.backbone.image_encoder."), name


def test_stage_that_would_train_on_frozen_random_parts_is_refused(
    make_model: MakeModel, make_trainer: MakeTrainer, make_batch: MakeBatch, tmp_path: Path
) -> None:
    whole, path = make_model(), tmp_path / "a.ckpt"
    saved(whole, make_trainer, make_batch(), path)
    said = (
        r"`model.trainable` leaves neck, coarse_trimap_head, grounding_head, trimap_head, alpha_head as built, with"
        r" random weights: add --model.initial_weights CKPT"
    )
    with pytest.raises(InputError, match=said):
        make_trainer().fit(make_model(trainable=REFINER_STAGE), loader(make_batch()))
    # from the last stage's weights it trains, and a backbone of published weights may be frozen from the start
    make_trainer().fit(make_model(trainable=REFINER_STAGE, initial_weights=str(path)), loader(make_batch()))
    parts = [name for name, _ in whole.network.named_children()]
    heads = [f"network.{name}" for name in parts if name != "backbone"]
    make_trainer().fit(make_model(trainable=heads), loader(make_batch()))
    # what waits for a later stage takes no part in this one
    early = [f"network.{name}" for name in parts if name not in ("alpha_head", "refiner", "project")]
    make_trainer().fit(make_model(trainable=early), loader(make_batch()))
    with pytest.raises(InputError, match="leaves neck as built"):
        make_trainer().fit(make_model(trainable=["network.backbone"]), loader(make_batch()))
    # and so it does where a stage goes on from its own checkpoint
    resumed = make_model(trainable=REFINER_STAGE, initial_weights=str(path))
    own = tmp_path / "own.ckpt"
    saved(resumed, make_trainer, make_batch(), own)
    again = make_model(trainable=REFINER_STAGE)
    make_trainer(max_steps=2).fit(again, loader(make_batch()), ckpt_path=own, weights_only=True)
    assert again.global_step == 2


def test_weights_to_start_from_are_mapped_and_not_read(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": make_model().state_dict()}, tmp_path / "a.ckpt")
    given: list[dict[str, object]] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: given.append(options) or load(path, **options))
    make_model(initial_weights=str(tmp_path / "a.ckpt"))
    assert given == [{"map_location": "cpu", "weights_only": True, "mmap": True}]


def test_missing_and_unexpected_weights_are_counted_and_named(make_model: MakeModel) -> None:
    model = make_model(backbone=FrozenStem())
    state = model.state_dict()
    del state["network.trimap_head.layers.0.weight"]
    state["network.surplus"] = torch.zeros(1)
    with pytest.raises(
        InputError,
        match=r"another network than the config describes: 1 weights are missing \(first: "
        r"network.trimap_head.layers.0.weight\), 1 are unexpected \(first: network.surplus\)",
    ):
        model.load_state_dict(state)


def test_weights_of_another_size_are_refused_with_both_sizes(make_model: MakeModel) -> None:
    model = make_model()
    state = model.state_dict()
    state["network.project.bias"] = torch.zeros(7)
    with pytest.raises(InputError, match=r"another network.*project.bias.*\[7\].*\[4\]"):
        model.load_state_dict(state)


def test_bad_initial_weights_are_refused_in_a_sentence(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("this is no checkpoint")
    torch.save({"weights": {}}, tmp_path / "other.ckpt")
    for path, said in (
        ("gone.ckpt", "there is no file"),
        ("text.ckpt", "is no checkpoint that torch can read"),
        ("other.ckpt", "holds no `state_dict`"),
        (".", "is no checkpoint that torch can read"),
    ):
        with pytest.raises(InputError, match=rf"`model.initial_weights`: .*{said}"):
            make_model(initial_weights=str(tmp_path / path))


def test_image_size_that_does_not_suit_the_backbone_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"`data\.image_size` must be a multiple of 16 for TinyDiffusion, got 40 x 40"):
        make_model(image_size=40)


def test_loss_of_the_refiner_without_a_refiner_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(InputError, match=r"`model\.losses\.r` .* but `model.refiner` is null"):
        make_model(refiner=None)
