"""Data sets in shards, the interleaved training stream, benchmarks, and folders of photographs.

Sees nothing of the model, so a loader worker never imports one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_modules.benchmark import BenchmarkSource
from data_modules.folder import FolderSource
from data_modules.schedule import InterleavedSchedule
from data_modules.source import ShardSource
from data_modules.transforms import Augmentation

if TYPE_CHECKING:
    from data_modules.interleaved import InterleavedDataModule
    from data_modules.prediction_shards import PredictionShards

__all__ = [
    "Augmentation",
    "BenchmarkSource",
    "FolderSource",
    "InterleavedDataModule",
    "InterleavedSchedule",
    "PredictionShards",
    "ShardSource",
]


def __getattr__(name: str) -> Any:
    # a worker process needs the classes above only; the data module brings Lightning, and Lightning half of the world
    if name == "InterleavedDataModule":
        from data_modules.interleaved import InterleavedDataModule

        return InterleavedDataModule
    if name == "PredictionShards":
        from data_modules.prediction_shards import PredictionShards

        return PredictionShards
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
