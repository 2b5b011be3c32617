"""The tiny diffusion backbone keeps the contract."""

from __future__ import annotations

from backbone_contract import BackboneContract

from lit_matting.backbones import Backbone, TinyDiffusion


class TestTinyDiffusion(BackboneContract):
    def make(self) -> Backbone:
        return TinyDiffusion()
