"""A small experiment on files, for runs of several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_modules.shards import InstanceEntry, ShardWriter


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Index of ten pictures whose left half is one thing and whose right half another."""
    left = np.tile(np.repeat(np.uint8([255, 128, 0]), [14, 4, 14]), (32, 1))
    with ShardWriter(tmp_path / "shards", prefix="halves", dataset="halves", split="train", tool="test 1") as writer:
        for number in range(10):
            image = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            writer.write(
                f"{number:06d}",
                image=image,
                image_ext="png",
                instances=[
                    InstanceEntry(id=name, target=alpha, kind="alpha", phrases=[(f"the {name} half", "position")])
                    for name, alpha in {"left": left, "right": 255 - left}.items()
                ],
            )
    return tmp_path / "shards" / "halves.index.json"


@pytest.fixture
def experiment(halves: Path) -> Callable[..., Path]:
    """Writes an experiment file: experiment(folder, batch_size, **trainer) gives its path."""

    def write(folder: Path, batch_size: int, wait_s: float = 0.0, **trainer: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        losses = {
            "stm": "SemanticTrimap",
            "ctm": "CoarseTrimap",
            "sg": "SoftGrounding",
            "alpha_lr": "AlphaLowResolution",
            "r": "Refinement",
        }
        content = {
            "seed_everything": 1,
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 4,
                "max_epochs": -1,
                "num_sanity_val_steps": 0,
                "val_check_interval": 4,
                "check_val_every_n_epoch": None,
                "gradient_clip_val": 1.0,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "default_root_dir": str(folder),
                "callbacks": [
                    {
                        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                        "init_args": {
                            "dirpath": str(folder),
                            "filename": "{step}",
                            "every_n_train_steps": 2,
                            "save_top_k": -1,
                        },
                    },
                    {"class_path": "callbacks.SampleJournal", "init_args": {"path": str(folder / "journal.jsonl")}},
                    {"class_path": "callbacks.BenchmarkReport", "init_args": {"folder": str(folder)}},
                    {"class_path": "callbacks.Preemption", "init_args": {"every_n_steps": 2}},
                    {
                        "class_path": "process_runner.Keep",
                        "init_args": {"folder": str(folder), "wait_s": wait_s},
                    },
                ],
                **trainer,
            },
            "model": {
                "backbone": {
                    "class_path": "lit_matting.backbones.TinyDiffusion",
                    "init_args": {
                        "block_channels": [16, 32],
                        "stem_channels": 8,
                        "text_channels": 16,
                        "max_tokens": 6,
                        "gradient_checkpointing": True,
                    },
                },
                "neck": {"class_path": "lit_matting.networks.neck.Neck", "init_args": {"channels": 16}},
                # the attention of untrained weights is flat: standardising it enlarges rounding errors and nothing else
                "grounding_head": {
                    "class_path": "lit_matting.networks.heads.GroundingHead",
                    "init_args": {"similarity_scale": 4.0, "attention": False},
                },
                "refiner": {
                    "class_path": "lit_matting.networks.refiner.SparseRefiner",
                    "init_args": {"feature_channels": 4, "widths": [8, 8], "blocks": 1, "half_scale_above": None},
                },
                "losses": {name: {"class_path": f"lit_matting.losses.{kind}"} for name, kind in losses.items()},
                # where AdamW divides by the size of a gradient that is next to nothing, rounding decides
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3, "eps": 1.0e-3}},
                "schedule": {"class_path": "lit_matting.optimization.Cosine"},
            },
            "data": {
                "class_path": "data_modules.InterleavedDataModule",
                "init_args": {
                    "image_size": 32,
                    "train": {
                        "halves": {
                            "class_path": "data_modules.ShardSource",
                            "init_args": {"shards": str(halves), "batch_size": batch_size},
                        }
                    },
                    **{
                        stage: {
                            "halves": {
                                "class_path": "data_modules.BenchmarkSource",
                                "init_args": {"shards": str(halves), "batch_size": 3},
                            }
                        }
                        for stage in ("val", "test")
                    },
                },
            },
        }
        path = folder / "experiment.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write
