"""Stable Diffusion as a backbone: the contract, and parity with a straightforward computation by diffusers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_contract import BackboneContract
from diffusers_reference import straightforward
from tiny_models import save_tiny_pipeline, tiny_autoencoder, tiny_unet

from lit_matting.backbones import Backbone, StableDiffusion
from lit_matting.checks import InputError

SD1: dict[str, Any] = {
    "text": {"hidden_act": "quick_gelu"},
    "pad_token": "<|endoftext|>",
    "use_linear_projection": False,
    "attention_head_dim": 2,
    "upcast_attention": False,
}
"""What sets Stable Diffusion 1 apart from 2."""


@pytest.fixture(scope="module")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd2")
    save_tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd1")
    save_tiny_pipeline(folder, **SD1)
    return folder


class TestStableDiffusion(BackboneContract):
    @pytest.fixture(autouse=True)
    def _folder(self, sd2_folder: Path) -> None:
        self.folder = str(sd2_folder)

    def make(self) -> Backbone:
        return StableDiffusion(self.folder)


class TestFrozenStableDiffusion(BackboneContract):
    """The UNet frozen as well: only the text adapter trains."""

    @pytest.fixture(autouse=True)
    def _folder(self, sd1_folder: Path) -> None:
        self.folder = str(sd1_folder)

    def make(self) -> Backbone:
        return StableDiffusion(self.folder, train_unet=False, mask_padding=True, frozen_precision="bf16")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_everything_equals_diffusers_alone(family: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{family}_folder")
    image = torch.rand(2, 3, 128, 128)
    phrases = ["the red cat", "a small dog, left of the red umbrella"]
    features, maps, states = straightforward(folder, image, phrases, tokens=40)
    with torch.no_grad():
        output = StableDiffusion(str(folder), adapt_text=False).eval()(image, phrases)
    torch.testing.assert_close(output.text.tokens, states, rtol=0, atol=1e-5)
    assert list(output.features) == [8, 16, 32, 64]
    for feature, expected in zip(output.features.values(), reversed(features)):
        torch.testing.assert_close(feature, expected, rtol=0, atol=1e-5)
    assert set(output.attention) == set(maps)
    assert len(maps) == 16
    for name, expected in maps.items():
        torch.testing.assert_close(output.attention[name], expected, rtol=0, atol=1e-6)


def test_the_timestep_is_one_whatever_its_type(sd2_folder: Path) -> None:
    unet = StableDiffusion(str(sd2_folder)).unet.eval()
    latent, states = torch.randn(1, 4, 8, 8), torch.randn(1, 40, 32)
    whole, float_, tensor = (
        unet(latent, t, encoder_hidden_states=states).sample for t in (1, 1.0, torch.full((1,), 1.0))
    )
    assert torch.equal(whole, float_)
    assert torch.equal(whole, tensor)


def test_output_layers_are_gone(sd2_folder: Path) -> None:
    names = [name for name, _ in StableDiffusion(str(sd2_folder)).unet.named_parameters()]
    assert not [name for name in names if name.startswith(("conv_out", "conv_norm_out"))]


def test_the_text_adapter_starts_near_the_identity_and_learns(sd2_folder: Path) -> None:
    backbone = StableDiffusion(str(sd2_folder))
    tokens = torch.randn(1, 40, 32)
    adapted = backbone.adapter(tokens)
    assert 0 < (adapted - tokens).abs().max() < 1e-3
    adapted.square().sum().backward()
    assert backbone.adapter.gamma.grad.abs().sum() > 0


def test_gradients_pass_a_frozen_unet_to_the_adapter(sd2_folder: Path) -> None:
    backbone = StableDiffusion(str(sd2_folder), train_unet=False).train()
    backbone(torch.rand(1, 3, 64, 64), ["the cat"]).features[8].square().sum().backward()
    trained = {name for name, value in backbone.named_parameters() if value.grad is not None}
    assert trained == {name for name, _ in backbone.named_parameters() if name.startswith("adapter.")}
    assert "unet" in backbone.frozen_modules()
    assert not backbone.unet.training


def test_bfloat16_unet_hands_out_float32_features(sd2_folder: Path) -> None:
    image, phrases = torch.rand(1, 3, 64, 64), ["the red cat"]
    exact = StableDiffusion(str(sd2_folder))(image, phrases)
    rough = StableDiffusion(str(sd2_folder), unet_precision="bf16", frozen_precision="bf16")(image, phrases)
    for stride, feature in rough.features.items():
        assert feature.dtype == torch.float32
        error = (feature - exact.features[stride]).norm() / exact.features[stride].norm()
        assert 0 < error < 0.05
    assert all(maps.dtype == torch.float32 for maps in rough.attention.values())


def test_another_autoencoder_can_take_the_place_of_the_pipelines(sd2_folder: Path, tmp_path: Path) -> None:
    autoencoder = tiny_autoencoder()
    autoencoder.save_pretrained(tmp_path)
    backbone = StableDiffusion(str(sd2_folder), autoencoder=str(tmp_path))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = autoencoder.encode(2 * image - 1).latents
    torch.testing.assert_close(backbone.encode_image(image), expected, rtol=0, atol=1e-6)


def test_text_settings_reach_the_encoder(sd2_folder: Path) -> None:
    backbone = StableDiffusion(
        str(sd2_folder), text_tokens=77, text_layers=2, pad_token="<|endoftext|>", latent_scale=1.0
    )
    assert backbone.max_tokens == 77
    assert backbone.text_encoder.words.pad == backbone.text_encoder.words.vocabulary.end
    assert backbone.image_encoder.latent_scale == 1.0
    assert tuple(backbone.encode_text(["a cat"]).tokens.shape) == (1, 77, 32)


def test_an_inpainting_unet_is_refused(sd2_folder: Path, tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(sd2_folder / part)
    tiny_unet(in_channels=9).save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="reads 9 latent channels but the autoencoder gives 4"):
        StableDiffusion(str(tmp_path))


def test_a_text_encoder_of_another_width_is_refused(sd2_folder: Path, tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(sd2_folder / part)
    tiny_unet(cross_attention_dim=48).save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="32 channels but the UNet's cross-attention expects 48"):
        StableDiffusion(str(tmp_path))
