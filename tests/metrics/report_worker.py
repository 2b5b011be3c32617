"""A test run with the report callback on a stand-in for the network; test_benchmark_report imports and starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from callbacks.benchmark_report import BenchmarkReport
from lit_matting.metrics.referring import ReferringScore
from lit_matting.records import MattingBatch


def instances_of(image: int, side: int = 48) -> torch.Tensor:
    """Return two squares that lie elsewhere in each image, (2, side, side)."""
    alphas = torch.zeros(2, side, side)
    alphas[0, 2 + image % 5 : 14, 2:16] = 1
    alphas[1, 20:44, 20 + image % 7 : 44] = 0.9
    return alphas


class Phrases(Dataset):
    """Two images' worth of phrases for each of two instances, as batches of four."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, image: int) -> MattingBatch:
        alphas = instances_of(image)
        instance = torch.tensor([0, 0, 1, 1])
        return MattingBatch(
            image=torch.rand(4, 3, *alphas.shape[1:], generator=torch.Generator().manual_seed(image)),
            target=alphas[instance][:, None],
            has_alpha=torch.ones(4, dtype=torch.bool),
            prompts=("red | one", "left one", "grey one", "right one"),
            prompt_kinds=("colour", "position") * 2,
            keys=(f"squares/000/{image}",) * 4,
            instance=instance,
            categories=("square", "square", "", ""),
            instances=(alphas,) * 4,
            dataset="squares",
        )


class StandIn(pl.LightningModule):
    """Knows colours, and takes every position for the first instance; worse in later images."""

    image_size = 48

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.test_scores = torch.nn.ModuleDict({"alpha": ReferringScore(), "trimap": ReferringScore(baselines=False)})

    def test_step(self, batch: MattingBatch, index: int) -> None:
        """Score one batch."""
        image = int(batch.keys[0].split("/")[-1])
        chosen = torch.where(torch.tensor([kind == "colour" for kind in batch.prompt_kinds]), batch.instance.cpu(), 0)
        alpha = torch.stack([batch.instances[row][instance] for row, instance in enumerate(chosen)])
        alpha = (alpha * (1 - 0.02 * image)).clamp(0, 1)
        for score in self.test_scores.values():
            score.update(
                alpha,
                batch.instances,
                batch.instance,
                batch.keys,
                batch.prompts,
                batch.prompt_kinds,
                batch.categories,
            )


def as_is(items: list[MattingBatch]) -> MattingBatch:
    """Return the only batch of the list."""
    return items[0]


class Shares(pl.LightningDataModule):
    """Hands each process its share of the images, none twice.

    Args:
        images: How many.
        told: What the loader says of itself, as that of a BenchmarkSource does.
    """

    def __init__(self, images: int, told: dict[str, object] | None = None) -> None:
        super().__init__()
        self.images, self.told = images, told or {}

    def test_dataloader(self) -> DataLoader:
        """Return this process's loader."""
        world = self.trainer.world_size
        sampler = DistributedSampler(
            Phrases(self.images), world, self.trainer.global_rank, shuffle=False, drop_last=True
        )
        loader = DataLoader(Phrases(self.images), batch_size=1, collate_fn=as_is, sampler=sampler)
        for name, value in self.told.items():
            setattr(loader, name, value)
        return loader


def trainer(folder: Path, devices: int = 1, **options: object) -> pl.Trainer:
    """Return a trainer that writes a report with the callback's options."""
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[BenchmarkReport(str(folder), **options)],
    )


def run(
    folder: Path,
    images: int,
    devices: int = 1,
    checkpoint: str | None = None,
    told: dict[str, object] | None = None,
    **options: object,
) -> pl.Trainer:
    """Test the stand-in and return the trainer."""
    tester = trainer(folder, devices, **options)
    tester.test(StandIn(), Shares(images, told), ckpt_path=checkpoint, verbose=False)
    return tester


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), images=int(sys.argv[2]), devices=2)
