"""Fixtures every test may use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real photographs beside the checkout; tests that need it skip where it does not exist."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the optional real photographs in {folder}")
    return folder


@pytest.fixture(autouse=True)
def _same_draws_in_every_test() -> None:
    torch.manual_seed(0)


EXPERIMENT = """
seed_everything: 1
trainer: {accelerator: cpu, max_steps: 1, logger: false, enable_checkpointing: false, enable_progress_bar: false,
          enable_model_summary: false, default_root_dir: ROOT}
model:
  backbone:
    class_path: lit_matting.backbones.TinyDiffusion
    init_args: {block_channels: [16, 32], stem_channels: 8, text_channels: 16, max_tokens: 6}
  neck: {class_path: lit_matting.networks.neck.Neck, init_args: {channels: 16}}
  refiner:
    class_path: lit_matting.networks.refiner.SparseRefiner
    init_args: {feature_channels: 4, widths: [8, 8], blocks: 1}
  losses:
    stm: {class_path: lit_matting.losses.SemanticTrimap}
    ctm: {class_path: lit_matting.losses.CoarseTrimap}
    sg: {class_path: lit_matting.losses.SoftGrounding}
    alpha_lr: {class_path: lit_matting.losses.AlphaLowResolution}
    r: {class_path: lit_matting.losses.Refinement}
data: {class_path: two_discs.TwoDiscs, init_args: {image_size: 32}}
"""

EXPERIMENT_DATA = '''
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lit_matting.records import MattingBatch


class TwoDiscs(LightningDataModule):
    """One batch of two discs.

    Args:
        image_size: Side in pixels.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    def train_dataloader(self):
        y, x = torch.meshgrid(torch.arange(self.image_size), torch.arange(self.image_size), indexing="ij")
        alpha = ((9.0 - torch.hypot(x - 14.0, y - 15.0)) / 3).clamp(0, 1).expand(2, 1, -1, -1).contiguous()
        batch = MattingBatch(
            image=alpha.expand(-1, 3, -1, -1), target=alpha, has_alpha=torch.tensor([True, True]),
            prompts=("the disc", "the round thing"), prompt_kinds=("", ""), keys=("a", "b"),
            instance=torch.tensor([0, 0]), dataset="discs",
        )
        return DataLoader([batch], batch_size=None)
'''


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An experiment file that trains a very small model for one step, with its data module beside it on the path."""
    (tmp_path / "two_discs.py").write_text(EXPERIMENT_DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT.replace("ROOT", str(tmp_path)))
    yield path
    sys.modules.pop("two_discs", None)
