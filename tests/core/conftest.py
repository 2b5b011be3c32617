"""What the tests of the module share: a model that builds and trains in milliseconds, and batches for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lit_matting.backbones import TinyDiffusion
from lit_matting.losses import AlphaLowResolution, CoarseTrimap, Refinement, SemanticTrimap, SoftGrounding
from lit_matting.module import LitMatting
from lit_matting.networks.neck import Neck
from lit_matting.networks.refiner import SparseRefiner
from lit_matting.records import Detail, MattingBatch


@pytest.fixture
def make_model() -> Callable[..., LitMatting]:
    """Return a builder of small models with the five terms; any argument of LitMatting can be given."""

    def build(**options: Any) -> LitMatting:
        defaults = {
            "backbone": TinyDiffusion((16, 32), stem_channels=8, text_channels=16, max_tokens=6),
            "losses": {
                "stm": SemanticTrimap(),
                "ctm": CoarseTrimap(),
                "sg": SoftGrounding(),
                "alpha_lr": AlphaLowResolution(),
                "r": Refinement(),
            },
            "image_size": 32,
            "neck": partial(Neck, channels=16),
            "refiner": SparseRefiner(feature_channels=4, widths=(8, 8), blocks=1, half_scale_above=64),
        }
        return LitMatting(**{**defaults, **options})

    return build


@pytest.fixture
def make_batch() -> Callable[..., MattingBatch]:
    """Return a builder of batches: two images of two discs each, one phrase per image."""

    def build(has_alpha: bool = True, detail: int = 0, **fields: Any) -> MattingBatch:
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        discs = torch.stack([((7 - torch.hypot(x - at, y - 15)) / 3).clamp(0, 1) for at in (8, 23)])
        target = discs[:, None] if has_alpha else discs[:, None].round()
        colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.2, 0.9]])
        image = (discs[:, None] * colours[:, :, None, None]).sum(0).expand(2, -1, -1, -1).contiguous()
        defaults = {
            "image": image,
            "target": target,
            "has_alpha": torch.tensor([has_alpha] * 2),
            "prompts": ("the red disc", "the blue disc"),
            "prompt_kinds": ("colour", "colour"),
            "keys": ("discs/0/a", "discs/0/a"),
            "instance": torch.tensor([0, 1]),
            "categories": ("", ""),
            "instances": (discs, discs),
            "dataset": "discs",
        }
        if detail:
            defaults["detail"] = Detail(
                torch.rand(2, 3, detail, detail),
                torch.rand(2, 1, detail, detail),
                torch.tensor([[0.25, 0.25, 0.5, 0.5]] * 2),
            )
        return MattingBatch(**{**defaults, **fields})

    return build


@pytest.fixture
def make_trainer(tmp_path: Any) -> Callable[..., pl.Trainer]:
    """Return a builder of quiet trainers on the CPU."""

    def build(callbacks: Iterable[pl.Callback] = (), **options: Any) -> pl.Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_steps": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
        }
        return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return build
