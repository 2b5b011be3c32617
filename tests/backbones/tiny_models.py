"""The real parts of Stable Diffusion at a size that runs in milliseconds, and pipelines as diffusers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MERGES = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>")]

TINY_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 32,
    "attention_head_dim": [2, 4, 8, 8],
    "use_linear_projection": True,
    "upcast_attention": True,
}
"""The topology of Stable Diffusion 2.1, every layer of it, at a twentieth of its width."""

TINY_XL_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32, 64],
    "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 3],
    "cross_attention_dim": 64,
    "attention_head_dim": [2, 4, 8],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
"""The topology of Stable Diffusion XL."""

TINY_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

TINY_TEXT: dict[str, Any] = {
    "vocab_size": 512 + len(MERGES) + 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}


def byte_letters() -> list[str]:
    """The 256 letters that CLIP's vocabulary writes bytes with, in its order: "!" first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]


def write_tokenizer(folder: Path, pad_token: str = "!") -> CLIPTokenizer:
    """Write a byte-pair vocabulary in CLIP's form, with a handful of merges, and return its tokenizer."""
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
        "model_max_length": 77,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(**TINY_VAE).eval()


def tiny_autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()


def tiny_text_model(**changes: Any) -> CLIPTextModel:
    vocabulary = changes.get("vocab_size", TINY_TEXT["vocab_size"])
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": 0}
    return CLIPTextModel(CLIPTextConfig(**{**TINY_TEXT, **ends, **changes})).eval()


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{**TINY_UNET, **changes}).eval()


def save_tiny_pipeline(
    folder: Path, pad_token: str = "!", text: dict[str, Any] | None = None, **unet: Any
) -> StableDiffusionPipeline:
    """Save a pipeline of random weights by diffusers' own hand and return it."""
    torch.manual_seed(1)
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_model(**(text or {})),
        tokenizer=write_tokenizer(folder / "written_tokenizer", pad_token),
        unet=tiny_unet(**unet),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def save_tiny_xl_pipeline(folder: Path) -> None:
    """Save a whole Stable Diffusion XL with random weights, as diffusers does."""
    torch.manual_seed(1)
    vocabulary = TINY_TEXT["vocab_size"]
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": 0}
    StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_model(hidden_act="quick_gelu"),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TINY_TEXT, **ends, projection_dim=32)).eval(),
        tokenizer=write_tokenizer(folder / "written_1", "<|endoftext|>"),
        tokenizer_2=write_tokenizer(folder / "written_2", "!"),
        unet=UNet2DConditionModel(**TINY_XL_UNET),
        scheduler=EulerDiscreteScheduler(),
    ).save_pretrained(folder)
