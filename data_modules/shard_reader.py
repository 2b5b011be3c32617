"""Random access to the samples of a set of shards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_modules import tar
from data_modules.shard_format import IMAGE_EXTENSIONS, Phrase, ShardInfo
from data_modules.shard_location import ShardsMissing, expand, is_url, listed, load_index, verify_shard
from lit_matting.checks import InputError

_MAX_OPEN_FILES = 32
_HEADER_BYTES = 8192


class SampleError(InputError):
    """One sample cannot be used: a member is missing, damaged, or does not fit the others."""


@dataclass(frozen=True)
class Instance:
    """What a sample's JSON says about one instance."""

    id: str
    target: str
    kind: str
    phrases: tuple[Phrase, ...]
    category: str
    foreground: str | None
    fields: dict[str, Any]
    """The whole JSON entry, extra fields included."""


class RawSample:
    """One image with its instances, read but not decoded.

    ``members`` maps ``jpg``, ``0.alpha.png``, ... to views of the bytes; ``meta`` is the JSON.
    """

    def __init__(self, key: str, shard: str, members: dict[str, memoryview]) -> None:
        self.key = key
        self.shard = shard.removesuffix(".tar")
        self.where = where = f"shard '{shard}', sample {key!r}"
        self.members = members
        try:
            self.meta: dict[str, Any] = json.loads(bytes(members["json"]), parse_constant=_no_number)
            self.instances = tuple(_instance(entry) for entry in self.meta["instances"])
        except KeyError as error:
            raise SampleError(f"{where}: {error} is missing.") from error
        except (ValueError, TypeError) as error:
            raise SampleError(f"{where}: its JSON cannot be used ({error}).") from error
        if not self.instances:
            raise SampleError(f"{where}: it has no instances.")

    def add_phrases(self, phrases: Mapping[tuple[str, str], Sequence[Phrase]]) -> None:
        """Give instances further phrases, found by ``(sample key, instance id)``."""
        self.instances = tuple(
            dataclasses.replace(instance, phrases=(*instance.phrases, *phrases.get((self.key, instance.id), ())))
            for instance in self.instances
        )

    @property
    def image_name(self) -> str:
        """Member name of the image: ``jpg``, ``png``, ..."""
        for extension in IMAGE_EXTENSIONS:
            if extension in self.members:
                return extension
        raise SampleError(f"{self.where}: it has no image ({', '.join(IMAGE_EXTENSIONS)}).")

    def member(self, name: str) -> memoryview:
        """Return the bytes of a member.

        Raises:
            SampleError: If it is not there.
        """
        try:
            return self.members[name]
        except KeyError:
            raise SampleError(f"{self.where}: member {name!r} is missing.") from None


class ShardIndex:
    """A data set's shards, opened for reading any sample by number.

    Build it with :meth:`load`. ``len(index)`` is the number of samples; sample ``n`` is read by ``index.read(n)``.

    Args:
        dataset: Name of the data set.
        split: Name of the split.
        shards: The shards in order.
        paths: Where each shard is: a local path or a URL.
        locate: Turns a URL into the path of a local copy; needed only when there are URLs.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        shards: Sequence[ShardInfo],
        paths: Sequence[str],
        locate: Callable[[str, ShardInfo], str] | None = None,
    ) -> None:
        self.dataset, self.split = dataset, split
        self.shards, self.paths = tuple(shards), tuple(paths)
        self.locate = locate
        self.remote = any(is_url(path) for path in paths)
        """Whether any shard is behind a URL."""
        self.counts = np.array([shard.samples for shard in shards], dtype=np.int64)
        """(number of shards,) samples in each shard."""
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        """(number of shards + 1,) number of the first sample of each shard."""
        self._files: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def load(
        cls,
        shards: str | Path | Sequence[str | Path],
        verify: bool = False,
        open_url: Callable[[str], bytes] | None = None,
        locate: Callable[[str, ShardInfo], str] | None = None,
    ) -> ShardIndex:
        """Open shards given as an index file, a folder with one index, a glob, braces, URLs, or a list of these.

        Tar files without an index are read through once to make one in memory.

        Args:
            shards: Where the shards are.
            verify: Also compare every local shard with its checksum (reads everything).
            open_url: Returns the bytes of an index behind a URL.
            locate: Returns a local copy of the shard behind a URL.

        Raises:
            InputError: If nothing is there, the format is another one, or a shard does not have the stated size.
        """
        given = [shards] if isinstance(shards, (str, Path)) else list(shards)
        infos: list[ShardInfo] = []
        paths: list[str] = []
        names: list[tuple[str, str]] = []
        for source in given:
            for index_path, wanted in expand(str(source)):
                name, found = load_index(index_path, wanted, open_url, locate)
                names.append(name)
                infos += [info for info, _ in found]
                paths += [path for _, path in found]
        if not infos:
            raise ShardsMissing(
                f"no shards found at {listed(given)}; give an index file, a folder, a glob or a URL. Shards are made by"
                " tools/scene_shards.py (generated scenes), make_shards.py (public releases) and compose_shards.py."
            )
        for info, path in zip(infos, paths):
            if not is_url(path):
                verify_shard(info, path, verify)
        datasets = dict.fromkeys(name for name, _ in names)
        splits = dict.fromkeys(split for _, split in names)
        return cls("+".join(datasets), "+".join(splits), infos, paths, locate)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # open files belong to one process
        return {**self.__dict__, "_files": OrderedDict()}

    def where(self, number: int) -> tuple[int, int]:
        """Return ``(shard, position inside it)`` of a sample."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in {self.dataset!r}")
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])

    def read(self, number: int) -> RawSample:
        """Read sample ``number`` (counted over all shards).

        Raises:
            SampleError: If its bytes are damaged; the message names shard and sample.
        """
        return self.read_at(*self.where(number))

    def read_header(self, number: int) -> RawSample:
        """Read only the JSON of sample ``number``: enough to know its instances and phrases, not to decode anything."""
        shard, position = self.where(number)
        info = self.shards[shard]
        start = int(info.offsets[position])
        stop = int(info.offsets[position + 1]) if position + 1 < info.samples else info.bytes
        size = _HEADER_BYTES
        while size < stop - start:
            data = os.pread(self._descriptor(shard), size, start)
            with contextlib.suppress(tar.TarError):
                name, content, _ = next(tar.members(data))
                key, _, member = name.rpartition("/")[2].partition(".")
                if member != "json":
                    break
                return RawSample(key, info.file, {"json": content})
            size *= 8
        return self.read_at(shard, position)

    def read_at(self, shard: int, position: int) -> RawSample:
        """Read the sample at ``position`` of shard number ``shard``."""
        info = self.shards[shard]
        start = int(info.offsets[position])
        stop = int(info.offsets[position + 1]) if position + 1 < info.samples else info.bytes
        data = os.pread(self._descriptor(shard), stop - start, start)
        return self._parse(info, position, data)

    def fetch(self, shards: Sequence[int]) -> None:
        """Fetch the shards that are behind URLs, so that reading them later does not wait."""
        for shard in shards:
            if self.locate is not None and is_url(self.paths[shard]):
                self.locate(self.paths[shard], self.shards[shard])

    def __iter__(self) -> Iterator[RawSample]:
        for number in range(len(self)):
            yield self.read(number)

    def close(self) -> None:
        """Close the open shard files; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _parse(self, info: ShardInfo, position: int, data: bytes) -> RawSample:
        members: dict[str, memoryview] = {}
        key = None
        try:
            for name, content, _ in tar.members(data):
                found, _, member = name.rpartition("/")[2].partition(".")
                if key is None:
                    key = found
                elif found != key:
                    break
                members[member] = content
        except (tar.TarError, UnicodeDecodeError) as error:
            raise SampleError(f"shard '{info.file}', sample {key or f'number {position}'!r}: {error}.") from error
        if key is None:
            raise SampleError(
                f"shard '{info.file}': nothing at byte {int(info.offsets[position])}; its index is of another file."
            )
        return RawSample(key, info.file, members)

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        info, path = self.shards[shard], self.paths[shard]
        if is_url(path):
            if self.locate is None:
                raise InputError(f"shard '{path}' is a URL, and this index was opened without a way to fetch it.")
            path = self.locate(path, info)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            if self.locate is None or not is_url(self.paths[shard]):
                raise InputError(f"shard '{path}' was there when its index was opened and is gone now.") from None
            # another process made room in the cache just now
            descriptor = os.open(self.locate(self.paths[shard], info), os.O_RDONLY)
        self._files[shard] = descriptor
        if len(self._files) > _MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor


def _instance(entry: dict[str, Any]) -> Instance:
    phrases = tuple(Phrase(phrase["text"], phrase.get("kind", "")) for phrase in entry.get("phrases", ()))
    for phrase in phrases:
        if not any(character.isalnum() for character in phrase.text):
            raise ValueError(f"a phrase of instance {entry['id']!r} has no words: {phrase.text!r}")
    return Instance(
        str(entry["id"]),
        entry["target"],
        entry["kind"],
        phrases,
        entry.get("category", ""),
        entry.get("foreground"),
        entry,
    )


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")
