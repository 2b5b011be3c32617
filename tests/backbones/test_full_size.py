"""Stable Diffusion 2.1 at full size, on CPU, with random weights: it runs, fits, and equals diffusers alone."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers_reference import straightforward
from tiny_models import write_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from lit_matting.backbones import StableDiffusion
from lit_matting.backbones.architecture import random_model, read_architecture

HERE = Path(__file__).resolve().parent
OUTPUT_LAYERS = 2 * 320 + (320 * 4 * 9 + 4)
"""Parameters of ``conv_norm_out`` and ``conv_out``."""


@pytest.mark.slow
def test_a_training_step_and_a_prediction_fit_into_16_gib() -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    run = subprocess.run([sys.executable, HERE / "full_size.py"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    print(report)  # the figures, for `pytest -s`
    assert report["unet_parameters"] == 865_910_724 - OUTPUT_LAYERS
    assert report["shapes"] == {
        "trimap": [1, 1, 64, 64],
        "coarse_trimap": [1, 3, 16, 16],
        "grounding": [1, 1, 64, 64],
        "alpha_lr": [1, 1, 64, 64],
        "alpha": [1, 1, 512, 512],
    }
    assert report["maps"] == 16
    assert report["without_gradient"] == []
    assert report["unet_moved"]
    assert report["finite"]
    assert report["peak_gib"] < 16


@pytest.mark.slow
def test_everything_equals_diffusers_alone_at_full_width() -> None:
    configs = read_architecture("sd21")
    image, phrases = torch.rand(1, 3, 128, 128), ["the red cat"]
    # deleted at once: five gigabytes are too many to keep for three sessions, as pytest's own folders are
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        half = torch.bfloat16
        StableDiffusionPipeline(
            vae=random_model(lambda: AutoencoderKL(**configs["vae"]), half),
            text_encoder=random_model(lambda: CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])), half),
            tokenizer=write_tokenizer(folder / "written_tokenizer"),
            unet=random_model(lambda: UNet2DConditionModel(**configs["unet"]), half),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
        gc.collect()
        features, maps, states = straightforward(folder, image, phrases, tokens=40)
        gc.collect()
        backbone = StableDiffusion(str(folder), adapt_text=False).eval()
    assert sum(parameter.numel() for parameter in backbone.unet.parameters()) == 865_910_724 - OUTPUT_LAYERS
    assert backbone.channels == {8: 320, 16: 640, 32: 1280, 64: 1280}
    with torch.no_grad():
        output = backbone(image, phrases)
    torch.testing.assert_close(output.text.tokens, states, rtol=0, atol=1e-5)
    for feature, expected in zip(output.features.values(), reversed(features)):
        torch.testing.assert_close(feature, expected, rtol=0, atol=1e-5)
    assert set(output.attention) == set(maps)
    for layer, expected in maps.items():
        torch.testing.assert_close(output.attention[layer], expected, rtol=0, atol=1e-6)
