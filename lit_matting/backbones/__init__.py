"""Backbones: (image, phrases) -> feature pyramid + cross-attention maps."""

from lit_matting.backbones.base import Backbone, BackboneOutput, TextFeatures
from lit_matting.backbones.compact import Compact
from lit_matting.backbones.stable_diffusion import DiffusionBackbone, StableDiffusion
from lit_matting.backbones.stable_diffusion_xl import StableDiffusionXL
from lit_matting.backbones.tiny import TinyDiffusion

__all__ = [
    "Backbone",
    "BackboneOutput",
    "Compact",
    "DiffusionBackbone",
    "StableDiffusion",
    "StableDiffusionXL",
    "TextFeatures",
    "TinyDiffusion",
]
