"""A tiny network with random weights, saved as training saves it, and photographs for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lit_matting.pipeline import MattingPipeline

EXPERIMENT = {
    "model": {
        "backbone": {
            "class_path": "lit_matting.backbones.TinyDiffusion",
            "init_args": {"block_channels": [16, 32], "stem_channels": 16, "text_channels": 16},
        },
        "image_size": 64,
        "neck": {"class_path": "lit_matting.networks.neck.Neck", "init_args": {"channels": 32}},
        "grounding_head": {
            "class_path": "lit_matting.networks.heads.GroundingHead",
            # the attention of untrained weights is flat, and standardising a flat map enlarges rounding errors only
            "init_args": {"similarity_scale": 4.0, "attention": False},
        },
        "refiner": {
            "class_path": "lit_matting.networks.refiner.SparseRefiner",
            "init_args": {"feature_channels": 8, "widths": [8, 16], "blocks": 1},
        },
        "losses": {"r": {"class_path": "lit_matting.losses.Refinement"}},
    },
    "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False},
}


@pytest.fixture
def experiment() -> dict[str, Any]:
    """The configuration that the checkpoint comes from."""
    return copy.deepcopy(EXPERIMENT)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Lightning writes for a model that the command line built, with weights that leave no part idle."""
    from lightning.pytorch.cli import LightningCLI

    from lit_matting.module import LitMatting

    folder = tmp_path_factory.mktemp("trained")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    cli = LightningCLI(
        LitMatting,
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        parser_kwargs={"parser_mode": "omegaconf"},
        args=["--config", str(folder / "experiment.yaml")],
    )
    generator = torch.Generator().manual_seed(3)
    network = cli.model.network
    with torch.no_grad():
        for scale in network.refiner.scales.values():  # zero until it is trained
            scale.leave.weight.normal_(0, 0.5, generator=generator)
        for head in (network.trimap_head, network.alpha_head):  # sure of some places, unsure of others
            head.layers[-1].weight.normal_(0, 2.0, generator=generator)
    cli.trainer.strategy.connect(cli.model)
    cli.trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.fixture(scope="session")
def matting(checkpoint: Path) -> MattingPipeline:
    """The pipeline of that checkpoint, in full precision."""
    return MattingPipeline.from_checkpoint(checkpoint, device="cpu", precision="fp32")


@pytest.fixture
def photograph() -> np.ndarray:
    """(93, 131, 3) uint8: smooth colours with some grain."""
    return _picture(93, 131)


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """Makes photographs of any size: picture(height, width, seed)."""
    return _picture


def _picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some grain, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(2 * np.pi * (x * a / width + y * b / height + c)) for a, b, c in rng.uniform(0, 2, (3, 3))]
    values = 127 + 90 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))
    return np.clip(values, 0, 255).astype(np.uint8)
