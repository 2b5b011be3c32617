"""Pruned UNets: exact sizes, weights from where the map says, and the contract."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from backbone_contract import BackboneContract
from diffusers import UNet2DConditionModel
from tiny_models import save_tiny_pipeline, tiny_unet

from lit_matting.backbones import Backbone, StableDiffusion
from lit_matting.backbones.architecture import read_architecture
from lit_matting.backbones.pruning import Pruning, block_map, mapped, prune, pruned_config, pruning_between
from lit_matting.checks import InputError
from lit_matting.losses import AttentionDistillation, FeatureDistillation, OutputDistillation
from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.networks.neck import Neck
from lit_matting.records import MattingBatch
from lit_matting.targets import targets_for
from lit_matting.teacher import Teacher

STUDENTS = {
    "base": Pruning(layers_per_block=1),
    "small": Pruning(layers_per_block=1, mid_block=False),
    "tiny_mid": Pruning(layers_per_block=1, levels=3),
    "tiny": Pruning(layers_per_block=1, mid_block=False, levels=3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    save_tiny_pipeline(path)
    return path


class TestTinyStudent(BackboneContract):
    """The smallest of the four: the innermost level and the mid block gone."""

    @pytest.fixture(autouse=True)
    def _folder(self, folder: Path) -> None:
        self.folder = str(folder)

    def make(self) -> Backbone:
        return StableDiffusion(self.folder, pruning=STUDENTS["tiny"])


class TestMidlessStudent(BackboneContract):
    @pytest.fixture(autouse=True)
    def _folder(self, folder: Path) -> None:
        self.folder = str(folder)

    def make(self) -> Backbone:
        return StableDiffusion(self.folder, pruning=STUDENTS["small"])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("base", 583_480_964), ("small", 485_787_524), ("tiny_mid", 424_519_044), ("tiny", 326_825_604)],
)
def test_students_of_sd21_have_the_published_sizes(name: str, parameters: int) -> None:
    config = pruned_config(read_architecture("sd21")["unet"], STUDENTS[name])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert sum(value.numel() for value in unet.parameters()) == parameters


def test_nothing_left_out_is_an_exact_copy() -> None:
    teacher = tiny_unet()
    student = prune(teacher, Pruning())
    latent, states = torch.randn(1, 4, 8, 8), torch.randn(1, 40, 32)
    with torch.no_grad():
        expected = teacher(latent, 1, encoder_hidden_states=states).sample
        assert torch.equal(student(latent, 1, encoder_hidden_states=states).sample, expected)
        for parameter in student.parameters():
            parameter.zero_()
        assert torch.equal(teacher(latent, 1, encoder_hidden_states=states).sample, expected)


def test_the_block_map_of_the_base_student_written_out() -> None:
    # one level of each kind, by hand: the first of two down pairs; the first and the last of three up pairs
    blocks = block_map(read_architecture("sd21")["unet"], STUDENTS["base"])
    assert {name: source for name, source in blocks.items() if name.startswith("up_blocks.2.")} == {
        "up_blocks.2.resnets.0": "up_blocks.2.resnets.0",
        "up_blocks.2.attentions.0": "up_blocks.2.attentions.0",
        "up_blocks.2.resnets.1": "up_blocks.2.resnets.2",
        "up_blocks.2.attentions.1": "up_blocks.2.attentions.2",
        "up_blocks.2.upsamplers.0": "up_blocks.2.upsamplers.0",
    }
    assert [name for name in blocks if name.startswith("down_blocks.3")] == ["down_blocks.3.resnets.0"]
    assert blocks["mid_block"] == "mid_block"


def test_the_block_map_without_the_innermost_level_shifts_the_up_blocks() -> None:
    blocks = block_map(read_architecture("sd21")["unet"], STUDENTS["tiny"])
    assert blocks["up_blocks.0.attentions.1"] == "up_blocks.1.attentions.2"
    assert blocks["up_blocks.2.resnets.0"] == "up_blocks.3.resnets.0"
    assert blocks["up_blocks.1.upsamplers.0"] == "up_blocks.2.upsamplers.0"
    # nothing is coarser than the last level, nothing finer than the first
    assert "down_blocks.2.downsamplers.0" not in blocks
    assert "up_blocks.2.upsamplers.0" not in blocks
    assert "mid_block" not in blocks


@pytest.mark.parametrize("name", STUDENTS)
def test_every_weight_of_a_student_is_its_teachers(name: str) -> None:
    teacher = tiny_unet()
    student = prune(teacher, STUDENTS[name])
    blocks = block_map(teacher.config, STUDENTS[name])
    weights = teacher.state_dict()
    for parameter, value in student.state_dict().items():
        assert torch.equal(value, weights[mapped(parameter, blocks)]), parameter
    modules = dict(student.named_modules())
    assert set(blocks) <= set(modules)


@pytest.mark.parametrize("name", STUDENTS)
def test_attention_layers_of_a_student_have_a_layer_of_the_same_size_in_the_teacher(name: str, folder: Path) -> None:
    teacher, student = (
        StableDiffusion(str(folder), adapt_text=False, pruning=pruning) for pruning in (None, STUDENTS[name])
    )
    image, phrases = torch.rand(1, 3, 128, 128), ["the red cat"]
    with torch.no_grad():
        theirs, ours = teacher(image, phrases), student(image, phrases)
    for layer, maps in ours.attention.items():
        same_size = theirs.attention[mapped(layer, student.teacher_blocks)].shape == maps.shape
        assert same_size or (name == "tiny_mid" and layer.startswith("mid_block"))
    # the first layer sees the same input with the same weights
    first = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert torch.equal(ours.attention[first], theirs.attention[first])
    assert set(ours.features) <= set(theirs.features)


def test_fewer_levels_end_the_pyramid_earlier(folder: Path) -> None:
    student = StableDiffusion(str(folder), pruning=Pruning(levels=3))
    assert student.channels == {8: 16, 16: 32, 32: 64}
    assert student.size_multiple == 32


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (Pruning(layers_per_block=3), "`pruning.layers_per_block` must be between 1 and the UNet's 2, got 3"),
        (Pruning(levels=5), "`pruning.levels` must be between 2 and the UNet's 4, got 5"),
        (Pruning(levels=2), "does not fit this UNet.*keep more `levels`"),
    ],
)
def test_what_cannot_be_pruned_is_refused(pruning: Pruning, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(tiny_unet(), pruning)


@pytest.mark.parametrize("name", STUDENTS)
def test_two_unets_say_what_was_pruned_between_them(name: str) -> None:
    config = read_architecture("sd21")["unet"]
    student = pruned_config(config, STUDENTS[name])
    student.setdefault("mid_block_type", "UNetMidBlock2DCrossAttn")
    assert block_map(config, pruning_between(config, student)) == block_map(config, STUDENTS[name])


def test_a_students_backbone_finds_its_blocks_in_its_teachers(folder: Path) -> None:
    teacher, student = (StableDiffusion(str(folder), pruning=pruning) for pruning in (None, STUDENTS["tiny"]))
    blocks = student.blocks_from(teacher)
    assert {key: value for key, value in blocks.items() if not key.startswith("unet.")} == student.teacher_blocks
    weights = teacher.state_dict()
    trained = [name for name in student.state_dict() if name.startswith("unet.")]
    for name in trained:
        assert torch.equal(student.state_dict()[name], weights[mapped(name, blocks)]), name
    # and a backbone of another kind has none
    assert student.blocks_from(teacher.text_encoder) == {}


@pytest.mark.parametrize("name", ["base", "tiny_mid"])
def test_student_in_a_whole_network_is_taught_by_the_blocks_it_came_from(name: str, folder: Path) -> None:
    torch.manual_seed(4)
    teacher, student = (
        MattingNetwork(StableDiffusion(str(folder), pruning=pruning), neck=partial(Neck, channels=16))
        for pruning in (None, STUDENTS[name])
    )
    teaching = Teacher(teacher, student)
    # one autoencoder and one text encoder serve both
    assert teaching.shared == ("image_encoder", "text_encoder")
    assert teaching.start(student) == 1
    batch = MattingBatch(
        image=torch.rand(1, 3, 64, 64),
        target=torch.zeros(1, 1, 64, 64),
        has_alpha=torch.tensor([True]),
        prompts=("the red cat",),
        prompt_kinds=("",),
        keys=("a",),
        instance=torch.tensor([0]),
    )
    latent = teaching.latent(student, batch)
    output = student(batch.image, batch.prompts, refine=False, latent=latent)
    theirs = teaching(batch, output, latent)
    assert theirs.attention.keys() == output.attention.keys()
    targets = replace(targets_for(batch.target, batch.has_alpha, (8, 8), (2, 2)), teacher=theirs)
    for term in (OutputDistillation(), FeatureDistillation(), AttentionDistillation()):
        value = term(output, targets)
        assert value > 0
        value.backward(retain_graph=True)
