"""Loggers that are used where they can be had."""

from __future__ import annotations

import importlib.util

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger


def tensorboard_if_installed(save_dir: str, name: str = "tensorboard") -> Logger:
    """Return a TensorBoard logger, or one that does nothing where the package is not installed.

    Beside a CSVLogger in ``trainer.logger``: figures are always written, curves where they can be looked at.

    Args:
        save_dir: Folder of the run.
        name: Folder inside it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return DummyLogger()
    return TensorBoardLogger(save_dir, name)
