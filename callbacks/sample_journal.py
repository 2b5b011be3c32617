"""The audit trail of training: which samples every batch held, and a digest of its exact contents."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_matting.checks import InputError
from lit_matting.records import MattingBatch


class SampleJournal(Callback):
    """Writes one JSON line for every training batch and process, before the batch is trained on.

    A line is `{"iteration", "rank", "dataset", "keys": [...], "digest"}`; the digest is the SHA-1 of the tensors and
    phrases. Two runs saw the same data exactly where their lines are equal, which is how a resumed run is compared
    with an uninterrupted one. A resumed run appends; where an iteration occurs twice, the later line counts.

    Args:
        path: The file to append to; its folder is made if need be. All processes of one machine write to the same file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._file: int | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: MattingBatch, batch_idx: int
    ) -> None:
        """Write the line of this batch."""
        line = {
            "iteration": batch.iteration,
            "rank": trainer.global_rank,
            "dataset": batch.dataset,
            "keys": list(batch.keys),
            "digest": digest(batch),
        }
        # one write call of a file opened for appending: lines of several processes never mix, and a kill loses none
        os.write(self._descriptor(), (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _descriptor(self) -> int:
        if self._file is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            except OSError as error:
                raise InputError(
                    f"journal '{self.path}' cannot be written: {error.strerror}; choose another path."
                ) from error
        return self._file


def digest(batch: MattingBatch) -> str:
    """Return the SHA-1 of a batch's tensors, phrases and keys, whatever device the tensors are on.

    Example:
        >>> sample = dict(has_alpha=torch.tensor([True]), instance=torch.tensor([0]), prompt_kinds=("",), keys=("a",))
        >>> one = MattingBatch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2), prompts=("a cat",), **sample)
        >>> two = MattingBatch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2), prompts=("a dog",), **sample)
        >>> digest(one) == digest(one), digest(one) == digest(two)
        (True, False)
    """
    sha1 = hashlib.sha1(usedforsecurity=False)
    _feed(sha1, batch)
    return sha1.hexdigest()


def _feed(sha1: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        sha1.update(f"{array.dtype}{tuple(array.shape)}".encode())
        sha1.update(array.view(torch.uint8).numpy() if array.numel() else b"")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            sha1.update(field.name.encode())
            _feed(sha1, getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        sha1.update(str(len(value)).encode())
        for item in value:
            _feed(sha1, item)
    else:
        sha1.update(repr(value).encode())
