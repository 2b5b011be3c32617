"""The interleaved training stream: which draws make up each batch, and the loader that hands them out in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_modules.schedule import InterleavedSchedule
from data_modules.shard_reader import SampleError
from data_modules.source import Shown, SourceReader
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


class StreamBatches(Dataset[tuple["MattingBatch | InputError", list[str]]]):
    """Makes the batch of any place in the stream; holds no state that a batch depends on.

    Returns ``(batch, lines about replaced bad samples)``. A mistake in the data comes back as the error in the batch's
    place: raised in a worker it would arrive wrapped in a stack trace.
    """

    def __init__(self, plan: StreamPlan, readers: Mapping[str, SourceReader], rank: int) -> None:
        self.plan, self.readers, self.rank = plan, dict(readers), rank

    def __getitem__(self, place: Place) -> tuple[MattingBatch | InputError, list[str]]:
        try:
            return self._batch(place)
        except InputError as error:
            return error, []

    def _batch(self, place: Place) -> tuple[MattingBatch, list[str]]:
        dataset, draws = self.plan.draws(place, self.rank)
        reader = self.readers[dataset]
        shown, bad = [], []
        for draw in draws:
            one, lines = reader.show(draw, place[0])
            shown.append(one)
            bad += lines
        return assemble(shown, reader.source.batch_size, dataset, place[0]), bad


def assemble(shown: Sequence[Shown], batch_size: int, dataset: str, iteration: int) -> MattingBatch:
    """Put images and their targets into one batch of at most ``batch_size`` samples."""
    rows = [(one, choice) for one in shown for choice in range(len(one.choices))][:batch_size]
    image = _pictures([one.image for one, _ in rows])
    target = torch.from_numpy(np.stack([one.targets[choice] for one, choice in rows]))[:, None]
    foreground = None
    if all(one.foregrounds is not None for one, _ in rows):
        foreground = _pictures([one.foregrounds[choice] for one, choice in rows])  # type: ignore[index]
    detail = None
    if all(one.details for one, _ in rows):
        parts = [one.details[choice] for one, choice in rows]
        detail = Detail(
            image=_pictures([part[0] for part in parts]),
            target=torch.from_numpy(np.stack([part[1] for part in parts]))[:, None],
            box=torch.tensor([part[2] for part in parts], dtype=torch.float32),
        )
    counts = {len(one.choices) for one in shown}
    # the network encodes an image once for all its phrases, where every image has equally many
    even = len(counts) == 1 and len(rows) % min(counts) == 0
    return MattingBatch(
        image=image,
        target=target,
        has_alpha=torch.tensor([one.has_alpha[choice] for one, choice in rows]),
        prompts=tuple(one.choices[choice].phrase.text for one, choice in rows),
        prompt_kinds=tuple(one.choices[choice].phrase.kind for one, choice in rows),
        keys=tuple(one.key for one, _ in rows),
        instance=torch.tensor([one.choices[choice].instance for one, choice in rows]),
        categories=tuple(one.categories[choice] for one, choice in rows),
        foreground=foreground,
        detail=detail,
        dataset=dataset,
        iteration=iteration,
        phrases_per_image=counts.pop() if even else 1,
    )


def _pictures(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Stack (H, W, 3) uint8 into (B, 3, H, W) float in [0, 1]."""
    stacked = np.empty((len(images), 3, *images[0].shape[:2]), np.uint8)
    for number, image in enumerate(images):
        # a repeated image (several phrases) is rearranged once
        if number and image is images[number - 1]:
            stacked[number] = stacked[number - 1]
        else:
            stacked[number] = image.transpose(2, 0, 1)
    return torch.from_numpy(stacked).float().div_(255)


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
    ) -> None:
        self.batches, self.length, self.on_bad = batches, length, on_bad
        self.loader = DataLoader(
            batches,
            batch_size=None,
            sampler=_Places(start, batches.plan.accumulate),
            num_workers=workers,
            collate_fn=as_is,
            pin_memory=pin_memory,
            worker_init_fn=one_thread if workers else None,
            prefetch_factor=prefetch if workers else None,
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
            for passed, (batch, bad) in enumerate(self.loader, start=1):
                if isinstance(batch, InputError):
                    raise batch
                self.on_bad(bad, len(batch))
                self.yielded += 1
                whole = passed == self.length
                yield batch
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
