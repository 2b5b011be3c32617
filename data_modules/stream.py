"""The interleaved training stream: which draws make up each batch, and the loader that hands them out in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_modules.schedule import InterleavedSchedule
from data_modules.shard_reader import SampleError
from data_modules.source import Shown, SourceReader
from data_modules.transforms import mattes, pictures
from lit_matting.checks import InputError
from lit_matting.records import Detail, MattingBatch

logger = logging.getLogger(__name__)

Place = tuple[int, int]
"""(iteration, micro-batch inside it)."""


@dataclass(frozen=True)
class StreamPlan:
    """Where every batch of the stream begins, in closed form.

    Counting starts at (``iteration``, ``micro``), where data set d has used ``used[d]`` draws; a fresh run starts at
    (0, 0) with none used, a resumed one where it was. So a changed number of processes, batch size or accumulation
    goes on without repeating or leaving out a draw.
    """

    schedule: InterleavedSchedule
    images_per_batch: Mapping[str, int]
    """Draws of one process in one micro-batch."""
    world_size: int = 1
    accumulate: int = 1
    """Micro-batches of one iteration."""
    iteration: int = 0
    micro: int = 0
    used: Mapping[str, int] = field(default_factory=dict)

    def used_before(self, dataset: str, place: Place) -> int:
        """Return how many draws of a data set all processes together have used before a micro-batch begins."""
        iteration, micro = place
        visits = self.schedule.visits(dataset, iteration) - self.schedule.visits(dataset, self.iteration)
        micros = visits * self.accumulate
        if self.schedule.dataset(self.iteration) == dataset:
            micros -= self.micro
        if self.schedule.dataset(iteration) == dataset:
            micros += micro
        return self.used.get(dataset, 0) + micros * self.images_per_batch[dataset] * self.world_size

    def draws(self, place: Place, rank: int) -> tuple[str, range]:
        """Return the data set of a micro-batch and the draws that one process takes from it."""
        dataset = self.schedule.dataset(place[0])
        count = self.images_per_batch[dataset]
        first = self.used_before(dataset, place) + rank * count
        return dataset, range(first, first + count)

    def place(self, consumed: int) -> Place:
        """Return the micro-batch that comes after ``consumed`` micro-batches since the plan's start."""
        iterations, micro = divmod(self.micro + consumed, self.accumulate)
        return self.iteration + iterations, micro

    def moved(self, place: Place) -> dict[str, int]:
        """Return the draws used by every data set before a micro-batch."""
        return {dataset: self.used_before(dataset, place) for dataset in self.schedule.datasets}


class StreamBatches(Dataset[tuple[MattingBatch, list[str]]]):
    """Makes the batch of any place in the stream; holds no state that a batch depends on.

    Returns ``(batch, lines about replaced bad samples)``.
    """

    def __init__(self, plan: StreamPlan, readers: Mapping[str, SourceReader], rank: int) -> None:
        self.plan, self.readers, self.rank = plan, dict(readers), rank

    def __getitem__(self, place: Place) -> tuple[MattingBatch, list[str]]:
        dataset, draws = self.plan.draws(place, self.rank)
        reader = self.readers[dataset]
        parts = BatchParts(reader.source.batch_size, reader.size, reader.detail_size)
        bad: list[str] = []
        for draw in draws:
            shown, lines = reader.show(draw, place[0])
            parts.add(shown)
            bad += lines
        return parts.batch(dataset, place[0]), bad


class BatchParts:
    """A batch in the making, in 8 bits: (B, H, W, 3) and (B, H, W), until :func:`unpacked` makes it what models read.

    Eight bits are a quarter of the bytes from worker to trainer and from there to the device, and floats are made where
    they are needed. Each image goes into the batch's memory as soon as it is decoded, so that the next one is decoded
    into the same warm memory.
    """

    def __init__(self, batch_size: int, size: int, detail_size: int) -> None:
        self.rows: list[tuple[Shown, int]] = []
        self.batch_size, self.size, self.detail_size = batch_size, size, detail_size
        self.image = np.empty((batch_size, size, size, 3), np.uint8)
        self.foreground: np.ndarray | None = np.empty_like(self.image)
        self.targets: list[np.ndarray] = []
        self.details: list[tuple[np.ndarray, np.ndarray, tuple[float, float, float, float]]] = []

    def add(self, shown: Shown) -> None:
        """Add an image with its phrases, as far as there is room."""
        for choice in range(min(len(shown.choices), self.batch_size - len(self.rows))):
            row = len(self.rows)
            self.image[row] = shown.image
            self.targets.append(shown.targets[choice])
            if shown.foregrounds is None or self.foreground is None:
                # one image without them leaves the batch without them
                self.foreground = None
            else:
                self.foreground[row] = shown.foregrounds[choice]
            if self.detail_size:
                self.details.append(shown.details[choice])
            self.rows.append((shown, choice))
        shown.release()

    def batch(self, dataset: str, iteration: int) -> MattingBatch:
        """Return the finished batch, still in 8 bits."""
        count, detail = len(self.rows), None
        if self.details:
            images, targets, boxes = zip(*self.details)
            detail = Detail(
                torch.from_numpy(np.stack(images)), _packed(targets), torch.tensor(boxes, dtype=torch.float32)
            )
        chosen = [(shown, choice, shown.choices[choice]) for shown, choice in self.rows]
        # the network encodes an image once for all its phrases, where every image has equally many
        counts = {len(list(rows)) for _, rows in groupby(self.rows, key=lambda row: id(row[0]))}
        return MattingBatch(
            image=torch.from_numpy(self.image[:count]),
            target=_packed(self.targets),
            has_alpha=torch.tensor([shown.has_alpha[choice] for shown, choice, _ in chosen]),
            prompts=tuple(one.phrase.text for _, _, one in chosen),
            prompt_kinds=tuple(one.phrase.kind for _, _, one in chosen),
            keys=tuple(shown.key for shown, _, _ in chosen),
            instance=torch.tensor([one.instance for _, _, one in chosen]),
            categories=tuple(shown.categories[choice] for shown, choice, _ in chosen),
            foreground=None if self.foreground is None else torch.from_numpy(self.foreground[:count]),
            detail=detail,
            dataset=dataset,
            iteration=iteration,
            phrases_per_image=counts.pop() if len(counts) == 1 else 1,
        )


def _packed(targets: Sequence[np.ndarray]) -> torch.Tensor:
    """Stack alphas as (B, H, W) uint8, or, where one of them has 16 bits, as the (B, 1, H, W) they will be."""
    if all(target.dtype == np.uint8 for target in targets):
        return torch.from_numpy(np.stack(targets))
    return mattes(targets)


def unpacked(batch: MattingBatch) -> MattingBatch:
    """Return a batch from 8 bits as floats in [0, 1], channels first, on the device it is on; others as they are."""

    def picture(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        if tensor.device.type == "cpu":
            return pictures(list(tensor.numpy()))
        return tensor.permute(0, 3, 1, 2).contiguous().float().div_(255)

    def matte(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        return mattes(list(tensor.numpy())) if tensor.device.type == "cpu" else tensor[:, None].float().div_(255)

    detail = batch.detail
    return replace(
        batch,
        image=picture(batch.image),
        target=matte(batch.target),
        foreground=None if batch.foreground is None else picture(batch.foreground),
        detail=None if detail is None else replace(detail, image=picture(detail.image), target=matte(detail.target)),
    )


class _Places(Sampler[Place]):
    def __init__(self, start: Callable[[], Place], accumulate: int) -> None:
        self.start, self.accumulate = start, accumulate

    def __iter__(self) -> Iterator[Place]:
        iteration, micro = self.start()
        while True:
            yield iteration, micro
            micro += 1
            if micro == self.accumulate:
                iteration, micro = iteration + 1, 0


class StreamLoader:
    """Hands out the stream's batches in order, from the place that ``start`` names when iteration begins.

    Not a torch DataLoader on purpose: Lightning would put a distributed sampler into one. Workers take the batches in
    turn, and a batch depends on nothing but its place, so any number of workers gives the same stream.

    Args:
        batches: Makes the batches.
        start: Returns the place to begin at.
        length: Micro-batches of one pass over the loader; None never ends.
        on_bad: Called with the lines about replaced samples and the number of samples of every batch.
        workers: Number of worker processes; 0 makes the batches in this process.
        prefetch: Batches that each worker makes ahead.
        pin_memory: Whether batches go to page-locked memory.
        persistent_workers: Whether workers live on between passes.
        unpack: Whether batches are handed out as floats; else in 8 bits, for :func:`unpacked` on the device.
    """

    def __init__(
        self,
        batches: StreamBatches,
        start: Callable[[], Place],
        length: int | None,
        on_bad: Callable[[list[str], int], None],
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        persistent_workers: bool = True,
        unpack: bool = True,
    ) -> None:
        self.batches, self.length, self.on_bad, self.unpack = batches, length, on_bad, unpack
        self.loader = whole_batches(
            batches,
            workers,
            prefetch,
            sampler=_Places(start, batches.plan.accumulate),
            pin_memory=pin_memory,
            persistent_workers=persistent_workers and workers > 0,
        )
        self.yielded = 0
        """Batches handed out so far, over all passes."""
        if length is not None:
            # only a loader with an end has a length; Lightning asks by looking for the method
            self.__class__ = _SizedStreamLoader

    def __iter__(self) -> Iterator[MattingBatch]:
        whole = False
        try:
            for passed, (batch, bad) in enumerate(received(self.loader), start=1):
                self.on_bad(bad, len(batch))
                self.yielded += 1
                whole = passed == self.length
                yield unpacked(batch) if self.unpack else batch
                if whole:
                    return
        finally:
            if not whole:
                self.close()

    def close(self) -> None:
        """End the workers that live on between passes.

        Left to the garbage collector, they are told too late and waited for in vain, five seconds each.
        """
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        self.loader._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module holds the state; the method tells Lightning that resuming is provided for."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing, see :meth:`state_dict`."""


class _SizedStreamLoader(StreamLoader):
    def __len__(self) -> int:
        assert self.length is not None
        return self.length


def whole_batches(dataset: Dataset[Any], workers: int, prefetch: int, **options: Any) -> DataLoader[Any]:
    """Return the loader of a data set whose items are batches already; read it through :func:`received`."""
    return DataLoader(
        _ErrorsAsItems(dataset),
        batch_size=None,
        num_workers=workers,
        collate_fn=as_is,
        worker_init_fn=one_thread if workers else None,
        prefetch_factor=prefetch if workers else None,
        **options,
    )


class _ErrorsAsItems(Dataset[Any]):
    """Gives a mistake in the data in the place of its item: raised in a worker it would arrive as a stack trace."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, place: Any) -> Any:
        try:
            return self.dataset[place]
        except InputError as error:
            return error


def received(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield what :func:`whole_batches` loads.

    Raises:
        InputError: The one that was met where a batch was made.
    """
    for item in loader:
        if isinstance(item, InputError):
            raise item
        yield item


def as_is(item: object) -> object:
    """Return the item; datasets here make whole batches (a function, not a lambda, so that workers can be spawned)."""
    return item


def one_thread(worker: int) -> None:
    """Keep a worker to one thread: parallel workers are faster than threads inside them."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


class BadSamples:
    """Counts and logs the samples that had to be replaced, and stops above a fraction.

    Args:
        max_fraction: Largest share of bad samples among all drawn, judged from 100 samples on.
    """

    def __init__(self, max_fraction: float) -> None:
        self.max_fraction = max_fraction
        self.drawn = 0
        self.bad = 0

    def __call__(self, lines: list[str], samples: int) -> None:
        """Count one batch.

        Raises:
            SampleError: If there are too many.
        """
        self.drawn += samples
        for line in lines:
            self.bad += 1
            logger.warning("Replaced a bad sample (%d so far): %s", self.bad, line)
        if lines and self.drawn >= 100 and self.bad > self.max_fraction * self.drawn:
            raise SampleError(
                f"{self.bad} bad samples among {self.drawn} are more than `data.max_bad_fraction`"
                f" = {self.max_fraction:g}; last: {lines[-1]} Repair the shards or raise the fraction."
            )
