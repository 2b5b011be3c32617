"""The network as three graphs of tensors alone, cut where the backbone's own three steps are.

    image: pixels -> latent                         once per photograph
    text:  token ids -> text features               once per phrase
    matte: latent, text features -> low-resolution  once per pair
           alpha, trimap, grounding, features

The refiner stays outside: its sparse convolutions work on a list of pixels whose length depends on the matte, and on
the photograph at its own size. It takes exactly what the last graph gives.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize

from lit_matting.backbones import TextFeatures
from lit_matting.checks import InputError
from lit_matting.networks.matting_network import MattingNetwork

Weights = Literal["fp32", "bf16", "int8"]
WEIGHTS: tuple[Weights, ...] = ("fp32", "bf16", "int8")
TEXT_FIELDS = ("tokens", "words", "valid", "pooled")
MATTE_FIELDS = ("alpha", "trimap", "grounding", "features")
_SMALL = 1024
"""Weights with fewer values than this stay as they are: nothing would be saved."""


def _without(module: nn.Module, *names: str) -> nn.Module:
    """Return a module that shares everything with another but some of its parts, whose weights a file need not hold."""
    result = copy.copy(module)
    result._modules = {name: part for name, part in module._modules.items() if name not in names}
    return result


class ImageBranch(nn.Module):
    """(B, 3, S, S) RGB in [0, 1] -> latent (B, C, h, w)."""

    def __init__(self, network: MattingNetwork) -> None:
        super().__init__()
        self.backbone = _without(network.backbone, "text_encoder", "unet", "adapter")

    def forward(self, image: Tensor) -> Tensor:
        return self.backbone.encode_image(image)


class TextBranch(nn.Module):
    """What the text encoder's ``spell`` gives -> the fields of :class:`TextFeatures`."""

    def __init__(self, network: MattingNetwork, names: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder = network.backbone.text_encoder
        self.names = names

    def forward(self, *numbers: Tensor) -> tuple[Tensor, ...]:
        features = self.encoder.read(**dict(zip(self.names, numbers)))
        # an output that is an input itself would be no node of the graph
        return tuple(getattr(features, name).clone() for name in TEXT_FIELDS)


class MatteBranch(nn.Module):
    """Latent and text features -> alpha and trimap in [0, 1], grounding logits, and what the refiner reads."""

    def __init__(self, network: MattingNetwork) -> None:
        super().__init__()
        self.network = _without(network, "refiner")
        self.network.backbone = _without(network.backbone, "image_encoder", "text_encoder")

    def forward(
        self, latent: Tensor, tokens: Tensor, words: Tensor, valid: Tensor, pooled: Tensor
    ) -> tuple[Tensor, ...]:
        network = self.network
        height, width = (side * network.fine_stride for side in latent.shape[-2:])
        seen = latent.new_zeros(1).expand(latent.shape[0], 3, height, width)
        output = network.matte(seen, latent, TextFeatures(tokens, words, valid, pooled), refine=False)
        features = output.features if network.project is None else network.project(output.features)
        return output.alpha_lr, output.trimap, output.grounding, features


@dataclass(frozen=True)
class Graph:
    """One graph to be exported."""

    name: str
    module: nn.Module
    examples: tuple[Tensor, ...]
    """Inputs with a batch of two: a batch of one would be taken for a constant."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def graphs(network: MattingNetwork, image_size: int) -> list[Graph]:
    """Return the three graphs of a network in eval mode, with examples of their inputs.

    Raises:
        InputError: If the backbone's text encoder does not tell its numbers from its features.
    """
    encoder = getattr(network.backbone, "text_encoder", None)
    if encoder is None:
        raise InputError(f"{network.backbone.name} cannot be exported: it has no text encoder that spells phrases.")
    numbers = encoder.spell(["the red umbrella", "glass"])
    image_branch, text_branch = ImageBranch(network), TextBranch(network, tuple(numbers))
    image = torch.zeros(2, 3, image_size, image_size)
    with torch.no_grad():
        # what is traced is the shape; one image is encoded, because that is the costly part
        latent = image_branch(image[:1]).repeat(2, 1, 1, 1)
        text = text_branch(*numbers.values())
    return [
        Graph("image", image_branch, (image,), ("image",), ("latent",)),
        # an input and an output of one name would be one tensor to ONNX
        Graph("text", text_branch, tuple(numbers.values()), tuple(f"phrase_{name}" for name in numbers), TEXT_FIELDS),
        Graph("matte", MatteBranch(network), (latent, *text), ("latent", *TEXT_FIELDS), MATTE_FIELDS),
    ]


# --- smaller weights ------------------------------------------------------------------------------


class _BFloat16Weight(nn.Module):
    """A weight kept in bfloat16 and used in float32."""

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        return (weight.to(torch.bfloat16),)

    def forward(self, kept: Tensor) -> Tensor:
        return kept.to(torch.float32)


class _Int8Weight(nn.Module):
    """A weight kept as 8-bit integers with one factor for each output channel, and used in float32."""

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        largest = weight.abs().flatten(1).amax(1).clamp(min=1e-12)
        factor = (largest / 127).view(-1, *[1] * (weight.ndim - 1))
        return (weight / factor).round().clamp(-127, 127).to(torch.int8), factor

    def forward(self, kept: Tensor, factor: Tensor) -> Tensor:
        return kept.to(torch.float32) * factor


def shrink_weights(network: MattingNetwork, weights: Weights) -> None:
    """Keep the weights of every convolution, linear layer and embedding outside the refiner in fewer bits, in place.

    Only how they are kept changes: all arithmetic stays in float32.
    """
    if weights == "fp32":
        return
    kind = {"bf16": _BFloat16Weight, "int8": _Int8Weight}[weights]
    network.requires_grad_(False)
    for name, module in network.named_modules():
        if name.startswith("refiner") or not isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            continue
        if module.weight.numel() >= _SMALL and module.weight.dtype == torch.float32:
            parametrize.register_parametrization(module, "weight", kind(), unsafe=True)
