"""Mattes to files."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from lit_matting.files import whole_file
from lit_matting.picture_files import signature
from lit_matting.pictures import as_integers
from lit_matting.records import MattingBatch, MattingOutput

_PHRASE_BYTES = 80
"""Of a file name, which may have 255 bytes in all."""


class PredictionWriter(BasePredictionWriter):
    """Write one alpha PNG per (image, phrase), at the image's own size, as soon as it is computed.

    The mattes lie in the same subfolders as their images. A file appears under its final name only when it is whole.

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
        for alpha, key, prompt in zip(prediction.alpha, batch.keys, batch.prompts):
            write_alpha(alpha[0].float().cpu().numpy(), self.folder / file_name(key, prompt))


def file_name(key: str, prompt: str) -> str:
    """Return where a matte belongs inside the folder: the image's key and the phrase, as far as file systems allow.

    What a file name cannot say is told by a mark, so that no two mattes have one name; it depends on nothing else,
    because no process knows what the others write.

    Example:
        >>> file_name("holiday/photo_1", "the woman's hair")
        'holiday/photo_1.the-woman-s-hair.png'
        >>> file_name("holiday/photo_1", "The woman's hair!")
        'holiday/photo_1.the-woman-s-hair-de2b48e2.png'
    """
    # a key may come from a table of the user's: it must not lead out of the folder
    parts = [part for part in key.split("/") if part not in ("", ".", "..")] or ["matte"]
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-") or "matte"
    short = words.encode()[:_PHRASE_BYTES].decode(errors="ignore")
    # the one phrase that the name says without a mark; a single s is a genitive
    said = re.sub(r"-s(?=-|$)", "'s", short).replace("-", " ")
    if said != prompt or "/".join(parts) != key:
        mark = zlib.crc32("\n".join([key, prompt]).encode())
        short = f"{short}-{mark:08x}"
    *folders, name = parts
    return "/".join([*folders, f"{name}.{short}.png"])


def write_alpha(alpha: Any, path: Path) -> None:
    """Write an alpha (H, W) in [0, 1] as an 8-bit grey PNG, all or nothing; its folder is made if missing."""
    picture = Image.fromarray(as_integers(alpha))
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG", **signature(".png"))
