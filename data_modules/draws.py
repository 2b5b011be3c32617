"""The endless, shuffled sequence of a data set's samples, any place of which is found at once."""

from __future__ import annotations

import zlib
from collections import OrderedDict

import numpy as np

_SHARD_ORDER, _SAMPLE_ORDER, _SAMPLE = 0, 1, 2


class Draws:
    """The j-th draw of a data set, as a pure function of (seed, data set, j).

    An epoch visits every sample once. Its shards are shuffled, `mix_shards` of them at a time are taken together, and
    their samples shuffled: near in the stream is near on disk, so a remote set needs only a few shards at a time, and
    finding a place costs one permutation of `mix_shards` shards however many there are.

    Args:
        counts: Number of samples in each shard.
        seed: Seed of the whole stream.
        dataset: Name of the data set; data sets are shuffled independently.
        mix_shards: How many shards are mixed at a time.
    """

    def __init__(self, counts: np.ndarray, seed: int, dataset: str, mix_shards: int = 16) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.samples = int(self.counts.sum())
        self.seed, self.stream, self.mix_shards = seed, zlib.crc32(dataset.encode()), mix_shards
        self._orders: OrderedDict[tuple[int, ...], tuple[np.ndarray, ...]] = OrderedDict()

    def generator(self, *words: int) -> np.random.Generator:
        """Return the generator that belongs to these numbers, this data set and this seed."""
        return np.random.default_rng((self.seed, self.stream, *words))

    def __getitem__(self, draw: int) -> tuple[int, int]:
        """Return ``(epoch, sample number)`` of a draw."""
        epoch, position = divmod(draw, self.samples)
        order, ends = self._shard_order(epoch)
        group = int(np.searchsorted(ends, position, side="right"))
        begin = int(ends[group - 1]) if group else 0
        return epoch, int(self._sample_order(epoch, group, order)[position - begin])

    def next_shards(self, draw: int) -> tuple[tuple[int, int], list[int]]:
        """Return ``(epoch, group)`` of a draw and the shards that are mixed after that group."""
        epoch, position = divmod(draw, self.samples)
        order, ends = self._shard_order(epoch)
        group = int(np.searchsorted(ends, position, side="right"))
        after = order[(group + 1) * self.mix_shards : (group + 2) * self.mix_shards]
        if not len(after):
            after = self._shard_order(epoch + 1)[0][: self.mix_shards]
        return (epoch, group), after.tolist()

    def sample_generator(self, epoch: int, sample: int, attempt: int = 0) -> np.random.Generator:
        """Return the generator for everything random about one visit to one sample."""
        return self.generator(_SAMPLE, epoch, sample, attempt)

    def substitute(self, epoch: int, sample: int, attempt: int) -> int:
        """Return what takes the place of a sample that cannot be used: of the same shard, the same on every run."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        generator = self.generator(_SAMPLE, epoch, sample, attempt, 1)
        return int(self.starts[shard] + generator.integers(self.counts[shard]))

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        def make() -> tuple[np.ndarray, np.ndarray]:
            order = self.generator(_SHARD_ORDER, epoch).permutation(len(self.counts))
            ends = np.cumsum(self.counts[order])
            return order, np.append(ends[self.mix_shards - 1 : -1 : self.mix_shards], ends[-1])

        return self._cached((epoch,), make)  # type: ignore[return-value]

    def _sample_order(self, epoch: int, group: int, order: np.ndarray) -> np.ndarray:
        def make() -> tuple[np.ndarray]:
            shards = order[group * self.mix_shards : (group + 1) * self.mix_shards]
            samples = np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in shards])
            return (self.generator(_SAMPLE_ORDER, epoch, group).permutation(samples),)

        return self._cached((epoch, group), make)[0]

    def _cached(self, key: tuple[int, ...], make: object) -> tuple[np.ndarray, ...]:
        if key not in self._orders:
            # an epoch's end and the next one's beginning can meet in one batch
            while len(self._orders) >= 8:
                self._orders.popitem(last=False)
            self._orders[key] = make()  # type: ignore[operator]
        self._orders.move_to_end(key)
        return self._orders[key]
