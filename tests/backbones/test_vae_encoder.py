"""The frozen image encoder against diffusers' own encode()."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_autoencoder, tiny_vae

from lit_matting.backbones.image import VAEEncoder
from lit_matting.checks import InputError


def test_latent_is_the_mode_of_diffusers_times_the_scale() -> None:
    vae = tiny_vae()
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = vae.encode(2 * image - 1).latent_dist.mode() * 0.18215
    latent = VAEEncoder(vae)(image)
    assert latent.shape == (2, 4, 8, 12)
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-6)


def test_latent_scale_of_one_gives_the_unscaled_latent() -> None:
    vae = tiny_vae()
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(
        VAEEncoder(vae, latent_scale=1.0)(image) * 0.18215, VAEEncoder(vae)(image), rtol=1e-6, atol=1e-7
    )


def test_tiny_autoencoder_sees_the_image_between_zero_and_one() -> None:
    autoencoder = tiny_autoencoder()
    image = torch.rand(1, 3, 32, 32)
    encoder = VAEEncoder(autoencoder)
    with torch.no_grad():
        # its layers want [0, 1]; its encode() takes [-1, 1] and converts
        straight = autoencoder.encoder.layers(image)
        torch.testing.assert_close(autoencoder.encode(2 * image - 1).latents, straight, rtol=0, atol=1e-5)
    assert encoder.stride == 8
    assert encoder.latent_scale == 1.0
    torch.testing.assert_close(encoder(image), straight, rtol=0, atol=1e-5)


def test_the_decoder_is_gone() -> None:
    vae = tiny_vae()
    encoder = VAEEncoder(vae)
    kept = sum(parameter.numel() for parameter in encoder.parameters())
    expected = sum(p.numel() for part in (vae.encoder, vae.quant_conv) for p in part.parameters())
    assert kept == expected
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_autocast_around_the_encoder_changes_nothing() -> None:
    encoder = VAEEncoder(tiny_vae())
    image = torch.rand(1, 3, 64, 64)
    plain = encoder(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(image), plain)


def test_bfloat16_stays_close_and_comes_out_as_float32() -> None:
    vae = tiny_vae()
    image = torch.rand(1, 3, 64, 64)
    exact = VAEEncoder(vae)(image)
    rough = VAEEncoder(vae, precision="bf16")(image)
    assert rough.dtype == torch.float32
    error = (rough - exact).square().mean() / exact.square().mean()
    assert 0 < error < 1e-3


def test_half_precision_weights_are_refused_in_words() -> None:
    encoder = VAEEncoder(tiny_vae()).half()
    with pytest.raises(InputError, match=r"overflow.*bf16-mixed"):
        encoder(torch.rand(1, 3, 32, 32))
