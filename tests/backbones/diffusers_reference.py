"""The backbone's features and maps by a straightforward computation, with nothing but diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor


def straightforward(
    folder: Path, image: Tensor, phrases: list[str], tokens: int
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Return features before each upsampler, coarse to fine, cross-attention maps by layer, and text states."""
    # weights may be stored in half precision, and the parts do not agree on what to make of that
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    unet = pipeline.unet
    ids = pipeline.tokenizer(
        phrases, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt"
    ).input_ids
    features: list[Tensor] = []
    maps: dict[str, Tensor] = {}

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        features.append(output if isinstance(output, Tensor) else output[0])

    def probabilities(name: str) -> Any:
        def hook(attn: torch.nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            query = attn.head_to_batch_dim(attn.to_q(args[0]))
            key = attn.head_to_batch_dim(attn.to_k(kwargs["encoder_hidden_states"]))
            scores = attn.get_attention_scores(query, key)
            mean = scores.view(len(phrases), attn.heads, *scores.shape[1:]).mean(1)
            side = int(mean.shape[1] ** 0.5)
            maps[name] = mean.transpose(1, 2).reshape(len(phrases), tokens, side, side)

        return hook

    for block in unet.up_blocks:
        last = block.attentions[-1] if hasattr(block, "attentions") else block.resnets[-1]
        last.register_forward_hook(keep)
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_hook(probabilities(name.removesuffix(".attn2")), with_kwargs=True)
    with torch.no_grad():
        states = pipeline.text_encoder(ids)[0]
        latent = pipeline.vae.encode(2 * image - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
        unet(latent, 1, encoder_hidden_states=states)
    return features, maps, states
