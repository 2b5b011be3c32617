"""What the network tests share: a network that builds and runs in milliseconds, and a disc to look at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from lit_matting.backbones import TinyDiffusion
from lit_matting.networks.heads import GroundingHead
from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.networks.neck import Neck
from lit_matting.networks.refiner import SparseRefiner


@pytest.fixture
def make_refiner() -> Callable[..., SparseRefiner]:
    """Return a builder of small refiners; ``awake`` ones have random weights, also in the layer that starts at zero."""

    def build(awake: bool = True, **options: Any) -> SparseRefiner:
        refiner = SparseRefiner(**{"feature_channels": 4, "widths": (8, 8), "blocks": 1, **options})
        if awake:
            for unet in refiner.scales.values():
                # large, so that a wrong place would show
                nn.init.normal_(unet.leave.weight, std=2.0)
                nn.init.normal_(unet.leave.bias, std=2.0)
        return refiner.eval()

    return build


@pytest.fixture
def make_network(make_refiner: Callable[..., SparseRefiner]) -> Callable[..., MattingNetwork]:
    """Return a builder of small networks in eval mode; ``refiner=None`` builds one without."""

    def build(**options: Any) -> MattingNetwork:
        backbone = TinyDiffusion((16, 32), stem_channels=8, text_channels=16, max_tokens=6)
        options.setdefault("refiner", make_refiner())
        # all tokens that this backbone attends to are words, so their mean is uniform: noise, once it is standardised
        options.setdefault("grounding_head", partial(GroundingHead, similarity_scale=8.0, attention=False))
        return MattingNetwork(backbone, **{"neck": partial(Neck, channels=16), **options}).eval()

    return build


@pytest.fixture
def disc() -> Callable[..., Tensor]:
    """Return a builder of discs with a soft edge, (1, 1, H, W); all lengths are shares of the height."""

    def build(height: int, width: int | None = None, x: float = 0.45, y: float = 0.5, radius: float = 0.3) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width or height), indexing="ij")
        distance = torch.hypot((columns + 0.5) / height - x, (rows + 0.5) / height - y)
        return ((radius - distance) / 0.1 + 0.5).clamp(0, 1)[None, None]

    return build
