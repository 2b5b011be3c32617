"""What a shard and its index are made of; :mod:`data_modules.shards` describes the format."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_modules import tar
from lit_matting.checks import InputError

FORMAT = "lit_matting.shards/1"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Phrase:
    """One way of naming an instance."""

    text: str
    kind: str = "caption"


@dataclass(frozen=True)
class ShardInfo:
    """One finished shard, as its index describes it."""

    file: str
    samples: int
    bytes: int
    sha256: str
    offsets: np.ndarray
    """(samples,) int64: byte offset of the first tar header of every sample."""
    instances: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the entry of this shard in the index."""
        return {
            "file": self.file,
            "samples": self.samples,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "instances": self.instances,
            "offsets": self.offsets.tolist(),
        }


def describe_shard(path: str | Path) -> ShardInfo:
    """Return the index entry of a finished shard by reading it once.

    Raises:
        InputError: If the file is not a whole tar of samples; the message says where it breaks.
    """
    path = Path(path)
    data = path.read_bytes()
    offsets: list[int] = []
    instances, last, seen = 0, None, set()
    try:
        for name, content, offset in tar.members(data):
            key, _, member = os.path.basename(name).partition(".")
            if key != last:
                if key in seen:
                    raise InputError(f"shard '{path}': the members of sample {key!r} do not lie together.")
                seen.add(key)
                offsets.append(offset)
                last = key
            if member == "json":
                instances += len(json.loads(bytes(content)).get("instances", ()))
    except (tar.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"shard '{path}' is damaged: {error}; write it again.") from error
    digest = hashlib.sha256(data).hexdigest()
    return ShardInfo(path.name, len(offsets), len(data), digest, np.asarray(offsets, dtype=np.int64), instances)
