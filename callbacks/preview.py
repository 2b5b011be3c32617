"""What the model sees at each validation, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from lit_matting.files import whole_file
from lit_matting.records import MattingBatch, MattingOutput

GAP = 4
CAPTION = 20
COLUMNS = ("image", "truth", "grounding", "trimap", "alpha")


class Preview(pl.Callback):
    """Draw image, truth, grounding map, trimap and alpha of the first validation phrases.

    One PNG per validation, ``step_0005000.png``, and the same in TensorBoard where that logger is used. With weight
    averaging on, what is drawn is what the averaged weights say.

    Args:
        folder: Where to write; made if missing.
        count: Phrases to draw; no more than the first batch has.
        side: Side of each picture, in pixels.
    """

    def __init__(self, folder: str, count: int = 8, side: int = 160) -> None:
        self.folder = Path(folder)
        self.count = count
        self.side = side

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: MattingBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or dataloader_idx or trainer.sanity_checking:
            return
        # on every process: a model whose parameters are shared out cannot run on one of them alone
        with trainer.precision_plugin.forward_context():
            output: MattingOutput = pl_module(batch.image[: self.count], batch.prompts[: self.count])
        if not trainer.is_global_zero:
            return
        sheet = self.draw(batch, output)
        with whole_file(self.folder / f"step_{trainer.global_step:07d}.png") as temporary:
            sheet.save(temporary, format="PNG")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("preview", np.asarray(sheet), trainer.global_step, dataformats="HWC")

    def draw(self, batch: MattingBatch, output: MattingOutput) -> Image.Image:
        """Return one row per phrase of ``output``, its phrase above it, under the columns' names."""
        grounding = output.grounding.float().sigmoid()
        columns = (batch.image, batch.target, grounding, output.trimap, output.alpha)
        rows = output.alpha.shape[0]
        height = CAPTION + self.side + GAP
        sheet = Image.new("RGB", (len(columns) * (self.side + GAP), CAPTION + rows * height), "white")
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
        for place, (title, maps) in enumerate(zip(COLUMNS, columns)):
            left = place * (self.side + GAP)
            pen.text((left, 2), title, "black", font)
            for row in range(rows):
                sheet.paste(_picture(maps[row], self.side), (left, CAPTION + row * height + CAPTION))
        for row, phrase in enumerate(batch.prompts[:rows]):
            pen.text((0, CAPTION + row * height + 2), phrase, "black", font)
        return sheet


def _picture(maps: Tensor, side: int) -> Image.Image:
    """Return a map (1 or 3, H, W) in [0, 1] as a square picture; small maps show their cells."""
    maps, size = maps[None].detach().float(), (side, side)
    if max(maps.shape[-2:]) > side:
        resized = interpolate(maps, size, mode="bilinear", antialias=True)[0]
    else:
        resized = interpolate(maps, size, mode="nearest")[0]
    pixels = (resized.clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
