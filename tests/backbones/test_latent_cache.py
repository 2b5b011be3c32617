"""Remembered latents are those that the encoder gives, whoever asks, and no more of them than were allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_pipeline

from lit_matting.backbones import StableDiffusion, TinyDiffusion
from lit_matting.backbones.image import LatentCache
from lit_matting.checks import InputError


def test_features_with_a_cache_equal_those_without_and_known_images_are_not_encoded_again(tmp_path: Path) -> None:
    save_tiny_pipeline(tmp_path)
    plain, cached = (StableDiffusion(str(tmp_path), adapt_text=False, cached_latents=size) for size in (0, 8))
    asked: list[int] = []
    cached.image_encoder.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    images = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():  # as a validation before training would
        cached(images, ["a cat"] * 3)
    with torch.no_grad():
        latents = plain.encode_image(images)
    for order in ([0, 1, 2], [2, 2, 0]):
        assert torch.equal(cached.encode_image(images[order]), latents[order])
        found = cached(images[order], ["red"] * 3)
        expected = plain.decode(latents[order], plain.encode_text(["red"] * 3))
        for stride, features in found.features.items():
            torch.testing.assert_close(features, expected.features[stride], atol=1e-5, rtol=1e-5)
    found.features[8].sum().backward()
    assert asked == [3]
    cached(torch.cat([images[:1], images[:1] + 1 / 255]), ["red"] * 2)
    assert asked == [3, 1], "one changed image is one new image"
    cached.double().float()
    assert len(cached.latents) == 0


def test_an_encoder_that_was_changed_alone_is_asked_again(tmp_path: Path) -> None:
    save_tiny_pipeline(tmp_path)
    plain, cached = (StableDiffusion(str(tmp_path), adapt_text=False, cached_latents=size) for size in (0, 8))
    image = torch.rand(1, 3, 64, 64)
    whole = {name: value.clone() for name, value in plain.state_dict().items()}
    changes = (
        lambda backbone: backbone,
        lambda backbone: backbone.image_encoder.to(torch.bfloat16),
        lambda backbone: backbone.image_encoder.float(),  # of rounded weights
        lambda backbone: backbone.load_state_dict(whole),
    )
    seen = []
    for change in changes:
        change(plain)
        change(cached)
        assert torch.equal(cached.encode_image(image), plain.encode_image(image))
        seen.append(cached.encode_image(image))
    assert torch.equal(seen[0], seen[3])
    assert len({tuple(latent.flatten().tolist()) for latent in seen}) == 3


def test_the_cache_forgets_the_image_unused_for_longest() -> None:
    cache, asked = LatentCache(2), []

    def encode(image: torch.Tensor) -> torch.Tensor:
        asked.extend(image[:, 0, 0, 0].tolist())
        return 2 * image

    one, two, three = (torch.full((1, 3, 2, 2), float(value)) for value in (1, 2, 3))
    for image in (one, two, one, three, one, two):
        assert torch.equal(cache.look_up(image, encode), 2 * image)
    assert asked == [1.0, 2.0, 3.0, 2.0]
    assert len(cache) == 2


def test_a_trained_encoder_has_no_cache() -> None:
    tiny = TinyDiffusion((16, 32), stem_channels=8, text_channels=16)
    parts = (tiny.image_encoder, tiny.text_encoder, tiny.unet)
    with pytest.raises(InputError, match="`cached_latents` must be 0 where the image encoder is trained"):
        super(TinyDiffusion, tiny).__init__(*parts, cached_latents=4)
    with pytest.raises(InputError, match="`cached_latents` must be 0 or more, got -1"):
        LatentCache(-1)
