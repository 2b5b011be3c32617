"""Stable Diffusion XL as a backbone: the contract, and parity with diffusers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from backbone_contract import BackboneContract
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from tiny_models import (
    TINY_TEXT,
    TINY_VAE,
    TINY_XL_UNET,
    save_tiny_pipeline,
    save_tiny_xl_pipeline,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from lit_matting.backbones import Backbone, StableDiffusion, StableDiffusionXL
from lit_matting.backbones.architecture import read_architecture
from lit_matting.backbones.pruning import Pruning
from lit_matting.backbones.weights import NAMED
from lit_matting.checks import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("xl")
    save_tiny_xl_pipeline(path)
    return path


class TestStableDiffusionXL(BackboneContract):
    @pytest.fixture(autouse=True)
    def _folder(self, folder: Path) -> None:
        self.folder = str(folder)

    def make(self) -> Backbone:
        return StableDiffusionXL(self.folder)


def test_everything_equals_diffusers_own_pipeline(folder: Path) -> None:
    image, phrases = torch.rand(2, 3, 64, 96), ["the red cat", "a small dog, left of the red umbrella"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    features: list[Tensor] = []
    for block in pipeline.unet.up_blocks:
        last = block.attentions[-1] if hasattr(block, "attentions") else block.resnets[-1]
        last.register_forward_hook(
            lambda module, inputs, output: features.append(output if isinstance(output, Tensor) else output[0])
        )
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(phrases, device="cpu", do_classifier_free_guidance=False)
        latent = pipeline.vae.encode(2 * image - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
        sizes = torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)
        added = {"text_embeds": pooled, "time_ids": sizes}
        pipeline.unet(latent, 1, encoder_hidden_states=states, added_cond_kwargs=added)
        # diffusers pads to 77
        output = StableDiffusionXL(str(folder), text_tokens=77, adapt_text=False).eval()(image, phrases)
    torch.testing.assert_close(output.text.tokens, states, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.text.pooled[:, 32:], pooled, rtol=0, atol=1e-5)
    assert list(output.features) == [8, 16, 32]
    for feature, expected in zip(output.features.values(), reversed(features)):
        torch.testing.assert_close(feature, expected, rtol=0, atol=1e-5)
    # down: 2 x 2 + 2 x 3, mid: 3, up: 3 x 3 + 3 x 2
    assert len(output.attention) == 28


def test_the_architecture_has_the_published_parameter_counts() -> None:
    configs = read_architecture("sdxl")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**configs["unet"])
        second = CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"]))
    counts = {
        name: sum(value.numel() for value in model.parameters()) for name, model in (("unet", unet), ("2", second))
    }
    assert counts == {"unet": 2_567_463_684, "2": 694_659_840}
    assert NAMED["sdxl"].parameters["unet"] == counts["unet"]
    assert NAMED["sdxl"].parameters["text_encoder_2"] == counts["2"]


def test_a_student_keeps_the_levels_asked_for(folder: Path) -> None:
    student = StableDiffusionXL(str(folder), pruning=Pruning(layers_per_block=1, mid_block=False))
    assert student.channels == {8: 16, 16: 32, 32: 64}
    with torch.no_grad():
        assert len(student(torch.rand(1, 3, 64, 64), ["a cat"]).attention) == 2 + 3 + 2 * 3 + 2 * 2


def test_each_class_refuses_the_others_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="StableDiffusionXL is for Stable Diffusion XL"):
        StableDiffusion(str(folder))
    save_tiny_pipeline(tmp_path)
    with pytest.raises(InputError, match="text_encoder_2"):
        StableDiffusionXL(str(tmp_path))


def test_random_weights_build_from_an_architecture(folder: Path, tmp_path: Path) -> None:
    second = {**TINY_TEXT, "projection_dim": 32}
    parts = {"unet": TINY_XL_UNET, "vae": TINY_VAE, "text_encoder": TINY_TEXT, "text_encoder_2": second}
    (tmp_path / "tiny_xl.json").write_text(json.dumps(parts))
    backbone = StableDiffusionXL(None, str(tmp_path / "tiny_xl.json"))
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, 64, 64), ["a cat"]).features[8].isfinite().all()
    del parts["text_encoder_2"]
    (tmp_path / "tiny_xl.json").write_text(json.dumps(parts))
    with pytest.raises(InputError, match="has no `text_encoder_2`"):
        StableDiffusionXL(None, str(tmp_path / "tiny_xl.json"))
    with pytest.raises(InputError, match="needs an `architecture`"):
        StableDiffusionXL(None)
