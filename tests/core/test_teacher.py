"""The teacher of a student: what the student takes over, and that nothing of the teacher trains or is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from callbacks import EMA
from lit_matting.backbones import TinyDiffusion
from lit_matting.checks import InputError
from lit_matting.cli import main
from lit_matting.losses import FeatureDistillation, OutputDistillation, SemanticTrimap
from lit_matting.module import LitMatting
from lit_matting.records import MattingBatch
from lit_matting.teacher import Teacher

MakeModel = Callable[..., LitMatting]
MakeBatch = Callable[..., MattingBatch]
TINY = {"block_channels": (16, 32), "stem_channels": 8, "text_channels": 16, "max_tokens": 6, "stem_blocks": 0}


class FrozenStem(TinyDiffusion):
    """A backbone whose image encoder is loaded and never trained; every instance has the same one."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{**TINY, **options})
        torch.manual_seed(9)
        for parameter in self.image_encoder.parameters():
            nn.init.normal_(parameter, std=0.1).requires_grad_(False)

    def frozen_modules(self) -> dict[str, nn.Module]:
        return {"image_encoder": self.image_encoder}


@pytest.fixture
def teacher_model(make_model: MakeModel) -> LitMatting:
    torch.manual_seed(1)
    return make_model(backbone=TinyDiffusion(**TINY, layers_per_block=2))


@pytest.fixture
def student_model(make_model: MakeModel) -> LitMatting:
    torch.manual_seed(2)
    losses = {"stm": SemanticTrimap(), "output": OutputDistillation(), "pyramid": FeatureDistillation()}
    return make_model(backbone=TinyDiffusion(**TINY, middle=False), losses=losses)


def test_student_starts_from_the_blocks_of_its_teacher(teacher_model: LitMatting, student_model: LitMatting) -> None:
    theirs, ours = teacher_model.network, student_model.network
    assert Teacher(theirs, ours).start(ours) == 1
    weights = theirs.state_dict()
    assert sum(value.numel() for value in weights.values()) > 1.4 * sum(p.numel() for p in ours.parameters())
    up = "backbone.unet.up_blocks.0.resnets"
    # by hand: of three layers on the way up the first and the last stay
    expected = {f"{up}.0": f"{up}.0", f"{up}.1": f"{up}.2", "trimap_head": "trimap_head", "neck": "neck"}
    for name, value in ours.state_dict().items():
        prefix = next((mine for mine in expected if name.startswith(mine + ".")), None)
        source = name if prefix is None else expected[prefix] + name.removeprefix(prefix)
        if "up_blocks" not in name or prefix is not None:
            assert torch.equal(value, weights[source]), name


def test_narrower_student_takes_what_fits(teacher_model: LitMatting, make_model: MakeModel) -> None:
    student = make_model(backbone=TinyDiffusion(**{**TINY, "block_channels": (8, 32)})).network
    before = {name: value.clone() for name, value in student.state_dict().items()}
    share = Teacher(teacher_model.network, student).start(student)
    assert 0.3 < share < 1
    weights = teacher_model.network.state_dict()
    assert torch.equal(student.trimap_head.layers[0].weight, weights["trimap_head.layers.0.weight"])
    narrow = "backbone.unet.conv_in.weight"
    assert torch.equal(student.state_dict()[narrow], before[narrow])


def test_teacher_answers_as_it_would_alone_under_the_students_names(
    teacher_model: LitMatting, student_model: LitMatting, make_batch: MakeBatch
) -> None:
    batch = make_batch()
    teacher = Teacher(teacher_model.network, student_model.network)
    answer = teacher(batch, student_model.network(batch.image, batch.prompts))
    alone = teacher_model.network(batch.image, batch.prompts, refine=False)
    assert torch.equal(answer.alpha_lr, alone.alpha_lr)
    assert not answer.alpha_lr.requires_grad
    last = "up_blocks.0.attentions.{}.transformer_blocks.0"
    assert torch.equal(answer.attention[last.format(1)], alone.attention[last.format(2)])
    assert not any(name.startswith("mid_block") for name in answer.attention)
    assert set(answer.pyramid) == {8, 16}


def test_equal_frozen_parts_are_kept_once_and_run_once(make_model: MakeModel, make_batch: MakeBatch) -> None:
    theirs, student = make_model(backbone=FrozenStem()).network, make_model(backbone=FrozenStem(middle=False))
    student.objective.terms["output"] = OutputDistillation()
    student.objective.ramps["output"] = 1.0
    student.teacher = Teacher(theirs, student.network)
    assert theirs.backbone.image_encoder is student.network.backbone.image_encoder
    runs = []
    student.network.backbone.image_encoder.register_forward_hook(lambda *call: runs.append(call[1][0].shape[0]))
    student.training_step(make_batch(phrases_per_image=2), 0)
    assert runs == [1]
    other = FrozenStem()
    other.image_encoder.enter[0].bias.data += 1
    assert Teacher(make_model(backbone=other).network, student.network).shared == ()


def test_student_learns_from_its_teacher_and_the_teacher_from_nobody(
    teacher_model: LitMatting, student_model: LitMatting, make_batch: MakeBatch, make_trainer: Callable, tmp_path: Path
) -> None:
    student_model.teacher = Teacher(teacher_model.network, student_model.network)
    batch = make_batch()
    before = {name: value.clone() for name, value in teacher_model.network.state_dict().items()}

    def distance() -> float:
        output = student_model.network(batch.image, batch.prompts)
        targets = student_model.targets(batch, output)
        object.__setattr__(targets, "teacher", student_model.teacher(batch, output))
        return OutputDistillation()(output, targets).item()

    far, ema = distance(), EMA(decay=0.5)
    student_model.make_optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)
    trainer = make_trainer([ema], max_steps=30, max_epochs=-1)
    trainer.fit(student_model, torch.utils.data.DataLoader([batch] * 30, batch_size=None))
    assert distance() < 0.5 * far
    for name, value in teacher_model.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad for parameter in teacher_model.network.parameters())
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)
    own = sum(parameter.numel() for parameter in student_model.parameters())
    assert sum(value.numel() for value in saved["state_dict"].values()) == own
    assert copy.deepcopy(student_model).teacher is student_model.teacher


def test_terms_without_a_teacher_and_a_teacher_without_terms_are_refused(
    student_model: LitMatting, teacher_model: LitMatting, make_batch: MakeBatch, make_trainer: Callable
) -> None:
    loader = torch.utils.data.DataLoader([make_batch()], batch_size=None)
    with pytest.raises(InputError, match=r"`model.losses.output` compares with a teacher: add --model.teacher CKPT"):
        make_trainer().fit(student_model, loader)
    teacher_model.teacher = Teacher(student_model.network, teacher_model.network)
    with pytest.raises(InputError, match=r"`model.teacher` is given, but none of the losses compares with it"):
        make_trainer().fit(teacher_model, loader)


def test_student_is_trained_resumed_and_loaded_by_the_command_line(experiment: Path) -> None:
    folder = experiment.parent
    fit = ["fit", "--config", str(experiment), "--trainer.enable_checkpointing=true"]
    assert main([*fit, f"--trainer.default_root_dir={folder / 'teacher'}"]) == 0
    (teacher,) = (folder / "teacher").rglob("*.ckpt")
    student = folder / "student.yaml"
    text = experiment.read_text().replace("max_tokens: 6", "max_tokens: 6, middle: false")
    term = "    out: {class_path: lit_matting.losses.OutputDistillation}\n    r:"
    student.write_text(text.replace("    r:", term))
    fit[2] = str(student)
    asked = [f"--model.teacher={teacher}", f"--trainer.default_root_dir={folder / 'student'}"]
    assert main([*fit, *asked]) == 0
    (checkpoint,) = (folder / "student").rglob("*.ckpt")
    assert "teacher" not in torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert main([*fit, *asked, f"--ckpt_path={checkpoint}", "--trainer.max_steps=2"]) == 0
    teacher.unlink()  # the student is of use without it
    model = LitMatting.load_from_checkpoint(checkpoint)
    assert model.teacher is None
    assert "output" not in model.objective.terms
    assert model.objective.terms["out"].needs_teacher


def test_checkpoint_is_loaded_without_following_where_it_began(experiment: Path) -> None:
    folder = experiment.parent
    fit = ["fit", "--config", str(experiment), "--trainer.enable_checkpointing=true"]
    assert main([*fit, f"--trainer.default_root_dir={folder / 'first'}"]) == 0
    (first,) = (folder / "first").rglob("*.ckpt")
    started = [f"--model.initial_weights={first}", f"--trainer.default_root_dir={folder / 'second'}"]
    assert main([*fit, *started]) == 0
    (second,) = (folder / "second").rglob("*.ckpt")
    first.unlink()
    stored = torch.load(second, weights_only=True)["state_dict"]
    for name, value in LitMatting.load_from_checkpoint(second).state_dict().items():
        assert torch.equal(value, stored[name])
