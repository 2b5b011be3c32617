"""What the loss tests share: outputs and targets with only the fields that a test is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets, targets_for


@pytest.fixture
def make_output() -> Callable[..., MattingOutput]:
    """Return a builder of outputs: every field that is not given is None or empty."""

    def build(**fields: Any) -> MattingOutput:
        names = ("alpha", "alpha_lr", "trimap", "coarse_trimap", "grounding")
        return MattingOutput(**{**dict.fromkeys(names), **fields})

    return build


@pytest.fixture
def make_targets() -> Callable[..., MattingTargets]:
    """Return a builder of targets for B images: every field that is not given is zero, every flag set."""

    def build(batch: int = 1, **fields: Any) -> MattingTargets:
        defaults = {
            "alpha": torch.zeros(batch, 1, 16, 16),
            "has_alpha": torch.ones(batch, dtype=torch.bool),
            "unknown": torch.zeros(batch, 1, 16, 16),
            "trimap": torch.zeros(batch, 1, 2, 2),
            "coarse_trimap": torch.zeros(batch, 1, 1, dtype=torch.long),
            "alpha_lr": torch.zeros(batch, 1, 2, 2),
            "has_phrase": torch.ones(batch, dtype=torch.bool),
        }
        return MattingTargets(**{**defaults, **fields})

    return build


@pytest.fixture
def disc() -> Tensor:
    """(1, 1, 64, 64): a disc with a soft edge, which has background, transition and foreground."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    return ((20 - torch.hypot(x - 30, y - 33)) / 4).clamp(0, 1)[None, None]


@pytest.fixture
def whole_case(disc: Tensor) -> Callable[..., tuple[MattingOutput, MattingTargets]]:
    """Return a builder of a random output with gradients for B images, and true targets for them."""

    def build(batch: int = 2, seed: int = 0) -> tuple[MattingOutput, MattingTargets]:
        draw = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, generator=draw)

        alpha = torch.cat([disc.roll(5 * index, -1) for index in range(batch)])
        targets = targets_for(alpha, torch.ones(batch, dtype=torch.bool), (8, 8), (4, 4), kernel_size=7)
        output = MattingOutput(
            alpha=random(batch, 1, 64, 64).requires_grad_(),
            alpha_lr=random(batch, 1, 8, 8).requires_grad_(),
            trimap=random(batch, 1, 8, 8).requires_grad_(),
            coarse_trimap=random(batch, 3, 4, 4).requires_grad_(),
            grounding=random(batch, 1, 8, 8).requires_grad_(),
            alphas=(random(batch, 1, 32, 32).requires_grad_(), random(batch, 1, 64, 64).requires_grad_()),
            active=(random(batch, 32, 32) > 0.5, random(batch, 64, 64) > 0.5),
        )
        return output, targets

    return build
