"""Mattes to files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from lit_matting.records import MattingBatch, MattingOutput


class PredictionWriter(BasePredictionWriter):
    """Write one alpha PNG per (image, phrase), at the image's own size, as soon as it is computed.

    A file appears under its final name only when it is whole.

    Args:
        folder: Where to write; made if missing.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(write_interval="batch")
        self.folder = Path(folder)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: MattingOutput,
        batch_indices: Sequence[int] | None,
        batch: MattingBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for alpha, key, prompt in zip(prediction.alpha, batch.keys, batch.prompts):
            write_alpha(alpha[0].float().cpu().numpy(), self.folder / file_name(key, prompt))


def file_name(key: str, prompt: str) -> str:
    """Return a file name for a matte: the image's name and the phrase, as far as file systems allow.

    Example:
        >>> file_name("folder/photo_1", "the woman's hair")
        'photo_1.the-woman-s-hair.png'
    """
    phrase = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:80]
    return f"{key.rsplit('/', 1)[-1]}.{phrase or 'matte'}.png"


def write_alpha(alpha: Any, path: Path) -> None:
    """Write an alpha (H, W) in [0, 1] as an 8-bit grey PNG, all or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        Image.fromarray(np.rint(np.clip(alpha, 0, 1) * 255).astype(np.uint8)).save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
