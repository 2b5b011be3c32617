"""Predictions to shards: what large sets are kept in, and what training reads."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter

from data_modules.shard_writer import InstanceEntry, ShardWriter
from lit_matting.checks import InputError
from lit_matting.records import MattingBatch, MattingOutput


class PredictionShards(BasePredictionWriter):
    """Write every predicted matte as a sample of shards: the image, one instance with its alpha, and the phrase.

    Each process writes shards and an index of its own, so nothing waits and nothing is written twice; all of them
    together are read by the glob ``<folder>/<prefix>*.index.json``. A shard has its name only when it is whole, and the
    index comes last.

    Args:
        folder: Where the shards go; made if missing.
        prefix: First part of their names; with several processes the process number follows.
        image_ext: How images are kept: ``jpg`` at quality 95, or ``png`` without loss.
        max_samples: Mattes in one shard at most.
    """

    def __init__(
        self, folder: str, prefix: str = "mattes", image_ext: Literal["jpg", "png"] = "jpg", max_samples: int = 1000
    ) -> None:
        super().__init__(write_interval="batch")
        self.folder, self.prefix, self.image_ext, self.max_samples = folder, prefix, image_ext, max_samples
        self._writer: ShardWriter | None = None
        self._asked: Counter[str] = Counter()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin this process's shards.

        Raises:
            InputError: If shards of an earlier run with another number of processes would be read beside these.
        """
        alone = trainer.world_size == 1
        prefix = self.prefix if alone else f"{self.prefix}-{trainer.global_rank}"
        ours = {self.prefix} if alone else {f"{self.prefix}-{rank}" for rank in range(trainer.world_size)}
        for path in sorted(Path(self.folder).glob("*.index.json")):
            name = path.name.removesuffix(".index.json")
            if re.fullmatch(re.escape(self.prefix) + r"(-\d+)?", name) and name not in ours:
                raise InputError(f"'{path}' is of an earlier run, with another number of processes: remove its shards.")
        (Path(self.folder) / f"{prefix}.index.json").unlink(missing_ok=True)  # a share may be empty this time
        writer = ShardWriter(self.folder, prefix, self.prefix, "predict", "lit_matting predict", self.max_samples)
        self._writer = writer.__enter__()
        self._asked.clear()

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
        for row, (key, phrase) in enumerate(zip(batch.keys, batch.prompts)):
            instance = str(int(batch.instance[row]))
            entry = InstanceEntry(
                id=instance,
                target=_bytes(prediction.alpha[row, 0]),
                phrases=[(phrase, batch.prompt_kinds[row] or "given")],
                category=batch.categories[row] if batch.categories else "",
            )
            pixels = _bytes(batch.image[row].movedim(0, -1))
            source = {"source": {"key": key}}
            name = sample_key(key, instance, phrase)
            self._asked[name] += 1
            if self._asked[name] > 1:  # two people have described the same thing in the same words
                name = f"{name}-{self._asked[name]}"
            self._writer.write(name, pixels, self.image_ext, [entry], source)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the last shard and write the index; a process that had nothing to do writes none."""
        if self._writer is not None and (self._writer.shards or self._writer._open is not None):
            self._writer.__exit__(None, None, None)
        self._writer = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the unfinished shard."""
        if self._writer is not None:
            self._writer.__exit__(type(exception), exception, exception.__traceback__)
        self._writer = None


def sample_key(key: str, instance: str, phrase: str) -> str:
    """Return a sample's name: what can be read of the image's key, and a mark of image, instance and phrase.

    Example:
        >>> sample_key("trip/photo 1.jpg", "0", "a dog")
        'trip-photo-1-jpg-7c257477'
    """
    mark = zlib.crc32("\n".join([key, instance, phrase]).encode())
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", key).strip("-")[:80]
    return f"{readable or 'image'}-{mark:08x}"


def _bytes(values: object) -> np.ndarray:
    """Return a tensor in [0, 1] as uint8."""
    return (values.float().clamp(0, 1) * 255).round().byte().cpu().numpy()  # type: ignore[attr-defined]
