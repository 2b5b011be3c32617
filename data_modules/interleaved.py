"""The data module: several data sets in shards, one interleaved stream, and the same stream again after a kill."""

from __future__ import annotations

import logging
from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from data_modules.benchmark import BenchmarkLoader, BenchmarkSource
from data_modules.folder import FolderSource
from data_modules.remote import RemoteShards
from data_modules.schedule import InterleavedSchedule
from data_modules.shard_reader import ShardIndex
from data_modules.source import ShardSource, SourceReader
from data_modules.stream import BadSamples, Place, StreamBatches, StreamLoader, StreamPlan, unpacked
from data_modules.transforms import Augmentation
from lit_matting.checks import InputError
from lit_matting.records import MattingBatch

logger = logging.getLogger(__name__)


class InterleavedDataModule(LightningDataModule):
    """Training data sets that take turns by a schedule, and benchmarks that show every phrase once.

    One iteration of the schedule is one optimizer step; with gradient accumulation (`trainer.accumulate_grad_batches`)
    all its micro-batches come from the same data set. The stream is a pure function of the seed and the iteration: the
    number of workers does not change it, and a run resumed from a checkpoint goes on with exactly the batches that the
    uninterrupted run would have seen.

    Args:
        train: Training data sets by name; the schedule uses these names.
        schedule: Which data set each iteration uses; null lets the training data sets take turns in the given order.
        val: Benchmarks for validation, by name.
        test: Benchmarks for testing, by name.
        predict: Images and phrases to make mattes for.
        image_size: Side of the square network input, in pixels.
        seed: Seed of everything random in the stream.
        augment: Random crops, flips and colours; null shows every training image whole and unchanged.
        detail_size: Side, in pixels, of an extra crop at the photograph's own resolution, for training the refiner; 0
            for none.
        epoch_iterations: Iterations that the trainer counts as one epoch; null takes all of `trainer.max_steps`, or,
            where that is not set either, one pass through the first data set.
        num_workers: Worker processes that make batches; 0 makes them in the training process.
        prefetch: Batches that each worker makes ahead.
        persistent_workers: Whether workers live on between epochs.
        pin_memory: Whether batches go to page-locked memory (faster copies to a GPU).
        on_bad_sample: What happens to a training sample that cannot be read: `raise` stops with its name, `skip` logs
            its name and takes another sample of the same shard.
        max_bad_fraction: With `skip`, the largest share of bad samples; above it training stops.
        missing_datasets: What happens when a scheduled data set is not in `train` or its shards are not there: `drop`
            warns how the shares of the others change, `raise` stops.
        verify: Whether checksums of all local shards are compared before training (reads everything once).
        cache_dir: Where shards from URLs are kept; null uses a folder of the system's temporary directory.
        cache_gigabytes: Largest size of that folder; the longest unused shards go first.
        retries: How often a failed download is tried again, waiting longer each time.
    """

    def __init__(
        self,
        train: dict[str, ShardSource] | None = None,
        schedule: InterleavedSchedule | None = None,
        val: dict[str, BenchmarkSource] | None = None,
        test: dict[str, BenchmarkSource] | None = None,
        predict: FolderSource | dict[str, BenchmarkSource] | None = None,
        image_size: int = 512,
        seed: int = 0,
        augment: Augmentation | None = None,
        detail_size: int = 0,
        epoch_iterations: int | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        persistent_workers: bool = True,
        pin_memory: bool = False,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        max_bad_fraction: float = 0.01,
        missing_datasets: Literal["drop", "raise"] = "drop",
        verify: bool = False,
        cache_dir: str | None = None,
        cache_gigabytes: float = 20.0,
        retries: int = 5,
    ) -> None:
        super().__init__()
        # a benchmark of fewer phrases than processes leaves some without a batch, which Lightning takes for a mistake
        self.allow_zero_length_dataloader_with_multiple_devices = True
        if image_size < 1 or detail_size < 0:
            raise InputError(
                f"`data.image_size` and `data.detail_size` are pixels, got {image_size} and {detail_size}."
            )
        self.train, self.val, self.test = dict(train or {}), dict(val or {}), dict(test or {})
        self.predict = predict
        self.schedule = schedule
        self.image_size, self.seed, self.augment, self.detail_size = image_size, seed, augment, detail_size
        self.epoch_iterations = epoch_iterations
        self.num_workers, self.prefetch = num_workers, prefetch
        self.persistent_workers, self.pin_memory = persistent_workers, pin_memory
        self.on_bad_sample, self.missing_datasets, self.verify = on_bad_sample, missing_datasets, verify
        self.remote = RemoteShards(cache_dir, cache_gigabytes, retries)
        self.bad_samples = BadSamples(max_bad_fraction)
        self._readers: dict[str, SourceReader] = {}
        self._benchmarks: dict[str, list[BenchmarkLoader]] = {}
        self._plan: StreamPlan | None = None
        self._loader: StreamLoader | None = None
        self._owner: Any = None
        self._seen_before = 0
        self._resumed: dict[str, Any] = {}

    # setup -----------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Open what the stage needs; opening checks formats and sizes, so a missing file is known before training."""
        if stage == "fit" and not self._readers:
            self._open_training()
        if stage in ("fit", "validate") and "val" not in self._benchmarks:
            self._benchmarks["val"] = self._open_benchmarks(self.val)
        if stage == "test" and "test" not in self._benchmarks:
            self._benchmarks["test"] = self._open_benchmarks(self.test)
        if stage == "predict" and isinstance(self.predict, dict) and "predict" not in self._benchmarks:
            self._benchmarks["predict"] = self._open_benchmarks(self.predict)

    def teardown(self, stage: str) -> None:
        """End the workers."""
        if stage == "fit" and self._loader is not None:
            self._loader.close()

    def _open_training(self) -> None:
        if not self.train:
            raise InputError("`data.train` is empty; name at least one training data set.")
        schedule = self.schedule or InterleavedSchedule(cycle=list(self.train), insert_every=0)
        for name in schedule.datasets:
            if name not in self.train:
                self._missing(f"data set '{name}' is in `data.schedule` but not in `data.train`.")
                continue
            source = self.train[name]
            try:
                index = self._index(source.shards)
            except FileNotFoundError as error:
                self._missing(f"data set '{name}': {error}")
                continue
            self._readers[name] = SourceReader(
                name,
                source,
                index,
                self.seed,
                self.image_size,
                self.augment,
                self.detail_size,
                self.on_bad_sample == "skip",
                self.remote.read,
            )
            if self._readers[name].lacks_phrases():
                logger.warning(
                    "Data set '%s' has no phrases of its own, so every one will be a template, not %.0f %%: caption it"
                    " (tools/caption.py) and name the file in its `captions`, or set `template_probability` to 1.",
                    name,
                    100 * source.policy.template_probability,
                )
        idle = sorted(set(self.train) - set(schedule.datasets))
        if idle:
            logger.warning("Never drawn, because `data.schedule` does not name them: %s.", ", ".join(idle))
        self._schedule = schedule.restricted(self._readers)

    def _missing(self, message: str) -> None:
        if self.missing_datasets == "raise":
            raise InputError(message)
        logger.warning("Left out: %s", message)

    def _index(self, shards: str | list[str]) -> ShardIndex:
        return ShardIndex.load(shards, self.verify, self.remote.read, self.remote.locate)

    def _open_benchmarks(self, sources: dict[str, BenchmarkSource]) -> list[BenchmarkLoader]:
        return [
            BenchmarkLoader(
                name,
                source,
                self._index(source.shards),
                self.image_size,
                *self._rank(),
                self.num_workers,
                self.prefetch,
            )
            for name, source in sources.items()
        ]

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    # the training stream ---------------------------------------------------------------------------------------------

    def train_dataloader(self) -> StreamLoader:
        """Return the loader of the training stream, beginning where the last one stopped or the checkpoint says."""
        rank, world_size = self._rank()
        accumulate = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        self._check_limit(accumulate)
        iteration, micro, used = self._position()
        if self._resumed:
            self._say_what_changed(world_size, accumulate)
            if self._resumed["accumulate"] != accumulate:
                # the trainer goes on counting inside its epoch; an iteration must end where it takes its step
                micro = self._progress().current.ready % accumulate if self.trainer is not None else 0
            self._resumed = {}
        images = {name: reader.source.images_per_batch for name, reader in self._readers.items()}
        if self.trainer is not None and self._owner is not self.trainer and not iteration:
            # a checkpoint without this data module's state still says which step comes next
            iteration = self.trainer.global_step
            used = StreamPlan(self._schedule, images, world_size, accumulate).moved((iteration, 0))
        self._plan = StreamPlan(self._schedule, images, world_size, accumulate, iteration, micro, used)
        self._owner = self.trainer
        self._loader = StreamLoader(
            StreamBatches(self._plan, self._readers, rank),
            self._place,
            self._length(accumulate),
            self.bad_samples,
            self.num_workers,
            self.prefetch,
            self.pin_memory,
            self.persistent_workers,
            # a trainer asks for floats when the batch is on its device
            unpack=self.trainer is None,
        )
        self._seen_before = self._seen()
        return self._loader

    def _check_limit(self, accumulate: int) -> None:
        limit = 1.0 if self.trainer is None or self.trainer.fast_dev_run else self.trainer.limit_train_batches
        # the trainer takes its step at the end of what it is limited to, be it in the middle of an iteration
        if accumulate > 1 and (limit % accumulate if isinstance(limit, int) else limit != 1.0):
            raise InputError(
                f"`trainer.limit_train_batches` = {limit} does not divide by `trainer.accumulate_grad_batches` ="
                f" {accumulate}, so that a step would mix data sets; set `data.epoch_iterations` instead."
            )

    def _length(self, accumulate: int) -> int | None:
        if self.epoch_iterations is not None:
            return self.epoch_iterations * accumulate
        if self.trainer is not None and self.trainer.max_steps > 0:
            return self.trainer.max_steps * accumulate
        if self.trainer is not None and self.trainer.fit_loop.max_epochs == -1:
            return None
        assert self._plan is not None
        first = self._schedule.datasets[0]
        per_visit = self._plan.images_per_batch[first] * self._plan.world_size * accumulate
        turns = -(-len(self._readers[first].index) // per_visit)
        return max(1, round(turns / self._schedule.shares()[first])) * accumulate

    def _progress(self) -> Any:
        return self.trainer.fit_loop.epoch_loop.batch_progress

    def _seen(self) -> int:
        """Micro-batches that training steps have finished, counted by the trainer where there is one.

        What a loader has handed out is no measure: it runs ahead of the steps.
        """
        if self.trainer is not None:
            return int(self._progress().total.processed)
        return self._loader.yielded if self._loader is not None else 0

    def _place(self) -> Place:
        assert self._plan is not None
        return self._plan.place(self._seen() - self._seen_before)

    def _position(self) -> tuple[int, int, dict[str, int]]:
        """Return iteration, micro-batch and draws used of the next micro-batch to be trained on."""
        if self._plan is None or self._owner is not self.trainer:
            # a new trainer counts from 0, and so does the stream unless a checkpoint was loaded
            state = self._resumed
            return state.get("iteration", 0), state.get("micro", 0), dict(state.get("used", {}))
        place = self._place()
        # a data set that this run left out keeps its place for a run that has it
        return *place, {**self._plan.used, **self._plan.moved(place)}

    # state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands: a handful of integers, the same on every rank."""
        if self._plan is None:
            return dict(self._resumed)
        iteration, micro, used = self._position()
        return {
            "iteration": iteration,
            "micro": micro,
            "used": used,
            "world_size": self._plan.world_size,
            "accumulate": self._plan.accumulate,
            "images_per_batch": dict(self._plan.images_per_batch),
            "samples": {name: len(reader.index) for name, reader in self._readers.items()},
            "seed": self.seed,
            "workers": self.num_workers,
            "drawn": self.bad_samples.drawn,
            "bad": self.bad_samples.bad,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from where :meth:`state_dict` was taken."""
        self._plan, self._loader = None, None
        self._resumed = dict(state_dict)
        self.bad_samples.drawn, self.bad_samples.bad = state_dict.get("drawn", 0), state_dict.get("bad", 0)

    def _say_what_changed(self, world_size: int, accumulate: int) -> None:
        before = self._resumed
        now = {name: reader.source.images_per_batch for name, reader in self._readers.items()}
        changes = []
        if before["world_size"] != world_size:
            changes.append(f"{before['world_size']} -> {world_size} processes")
        if before["accumulate"] != accumulate:
            changes.append(f"accumulation {before['accumulate']} -> {accumulate}")
        for name, count in before["images_per_batch"].items():
            if name in now and now[name] != count:
                changes.append(f"{name} {count} -> {now[name]} images per batch")
        if changes:
            logger.warning(
                "The stream goes on at iteration %d with %s: what the epoch has used is not repeated, but from here on"
                " the batches are others than an unchanged run would have seen.",
                before["iteration"],
                ", ".join(changes),
            )
        elif before.get("workers", self.num_workers) != self.num_workers:
            logger.warning(
                "The stream goes on at iteration %d with %d -> %d workers: the batches are the same.",
                before["iteration"],
                before["workers"],
                self.num_workers,
            )
        for name, count in before["samples"].items():
            if name in self._readers and len(self._readers[name].index) != count:
                logger.warning(
                    "Data set %s had %d samples at the checkpoint and has %d now: its order is a new one.",
                    name,
                    count,
                    len(self._readers[name].index),
                )
        if before["seed"] != self.seed:
            logger.warning("The seed was %d and is %d now: the stream's order is a new one.", before["seed"], self.seed)

    # benchmarks and prediction ---------------------------------------------------------------------------------------

    def val_dataloader(self) -> list[BenchmarkLoader]:
        """Return one loader for each benchmark of `val`, in the given order."""
        return self._benchmarks.get("val", [])

    def test_dataloader(self) -> list[BenchmarkLoader]:
        """Return one loader for each benchmark of `test`, in the given order."""
        return self._need("test")

    def predict_dataloader(self) -> Any:
        """Return the loader of what mattes are to be made for."""
        if self.predict is None:
            raise InputError("`data.predict` is not set; give it a folder of images and a phrase.")
        if isinstance(self.predict, FolderSource):
            return self.predict.loader(*self._rank(), self.num_workers, self.prefetch)
        return self._need("predict")

    def _need(self, stage: str) -> list[BenchmarkLoader]:
        if not self._benchmarks.get(stage):
            raise InputError(f"`data.{stage}` is empty; name at least one benchmark.")
        return self._benchmarks[stage]

    def transfer_batch_to_device(self, batch: MattingBatch, device: Any, dataloader_idx: int) -> MattingBatch:
        """Move a batch, without waiting for the copy when it comes from page-locked memory."""
        return batch.to(device, non_blocking=self.pin_memory)

    def on_after_batch_transfer(self, batch: MattingBatch, dataloader_idx: int) -> MattingBatch:
        """Turn a training batch from 8 bits to floats, on the device."""
        return unpacked(batch)
