"""Finding shards: from what a configuration names to index entries and paths."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_modules.shard_format import FORMAT, ShardInfo, describe_shard
from lit_matting.checks import InputError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:(//|\S)")
_NUMBERED = re.compile(r"-\d+\.tar$")


class ShardsMissing(InputError, FileNotFoundError):
    """Nothing is where the shards should be."""


def is_url(path: str) -> bool:
    """Say whether a path is for webdataset to open rather than a local file.

    Example:
        >>> is_url("http://host/train.index.json"), is_url("pipe:cat x.tar"), is_url("shards/train.index.json")
        (True, True, False)
    """
    return _URL.match(path) is not None


def expand_braces(pattern: str) -> list[str]:
    """Write out brace patterns.

    Example:
        >>> expand_braces("a-{00..02}.tar")
        ['a-00.tar', 'a-01.tar', 'a-02.tar']
    """
    from braceexpand import braceexpand

    return list(braceexpand(pattern))


def expand(source: str) -> list[tuple[str, list[str] | None]]:
    """Turn one given source into pairs of ``(index path, wanted shard paths or None for all)``.

    A tar without an index beside it stands for its own index.

    Raises:
        InputError: If a folder holds several indexes.
    """
    names = expand_braces(source) if "{" in source else [source]
    if len(names) == 1 and not is_url(source):
        if os.path.isdir(source):
            found = sorted(glob.glob(os.path.join(glob.escape(source), "*.index.json")))
            if len(found) > 1:
                listed = ", ".join(os.path.basename(path) for path in found)
                raise InputError(f"folder '{source}' has {len(found)} indexes ({listed}); name the one you mean.")
            names = found or sorted(glob.glob(os.path.join(glob.escape(source), "*.tar")))
        elif not os.path.exists(source):
            names = sorted(glob.glob(source))
    groups: OrderedDict[str, list[str] | None] = OrderedDict()
    for name in names:
        if name.endswith(".json"):
            groups[name] = None
        else:
            wanted = groups.setdefault(_NUMBERED.sub(".index.json", name), [])
            if wanted is not None:
                wanted.append(name)
    return list(groups.items())


def load_index(
    index_path: str,
    wanted: list[str] | None,
    open_url: Callable[[str], bytes] | None,
    locate: Callable[[str, ShardInfo], str] | None,
) -> tuple[tuple[str, str], list[tuple[ShardInfo, str]]]:
    """Read one index and return ``((data set, split), [(entry, path or URL of the shard), ...])``.

    Raises:
        ShardsMissing: If it does not exist.
        InputError: If it cannot be read or has another format.
    """
    if not is_url(index_path) and (index_path.endswith(".tar") or not os.path.exists(index_path)):
        if wanted is None:
            raise ShardsMissing(f"index '{index_path}' does not exist.")
        return (Path(wanted[0]).stem, ""), [(describe_shard(path), path) for path in wanted]
    if is_url(index_path):
        if open_url is None:
            raise InputError(f"index '{index_path}' is a URL, and there is no way to fetch it here; give a local file.")
        text = open_url(index_path)
    else:
        text = Path(index_path).read_bytes()
    try:
        index = json.loads(text)
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            stated = index.get("format") if isinstance(index, dict) else None
            raise InputError(
                f"index '{index_path}' has format {stated!r}, expected {FORMAT!r}; write the shards again."
            )
        folder = index_path.rpartition("/")[0]
        found = []
        for entry in index["shards"]:
            offsets = np.asarray(entry["offsets"], dtype=np.int64)
            info = ShardInfo(
                entry["file"], entry["samples"], entry["bytes"], entry["sha256"], offsets, entry.get("instances", 0)
            )
            if info.samples != len(offsets) or info.samples == 0:
                raise InputError(
                    f"index '{index_path}', shard '{info.file}': {info.samples} samples, {len(offsets)} offsets."
                )
            found.append((info, f"{folder}/{info.file}" if folder else info.file))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"index '{index_path}' cannot be read ({error}); write it again.") from error
    if wanted is not None:
        by_name = {path.rpartition("/")[2]: (info, path) for info, path in found}
        missing = [path for path in wanted if path.rpartition("/")[2] not in by_name]
        if missing:
            raise InputError(f"shard '{missing[0]}' is not in its index '{index_path}'.")
        found = [by_name[path.rpartition("/")[2]] for path in wanted]
    return (str(index.get("dataset", "")), str(index.get("split", ""))), found


def verify_shard(info: ShardInfo, path: str, checksum: bool) -> None:
    """Compare a local shard's size, and its checksum where asked for, with its index entry.

    Raises:
        InputError: If they differ or the shard is not there.
    """
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise InputError(
            f"shard '{path}' is in the index but does not exist; restore it or write the shards again."
        ) from None
    if size != info.bytes:
        raise InputError(
            f"shard '{path}' has {size} bytes but its index says {info.bytes}; it is cut short or another file."
        )
    if checksum:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        if digest.hexdigest() != info.sha256:
            raise InputError(f"shard '{path}' does not match the checksum in its index; copy it again.")


def listed(given: Sequence[str | Path]) -> str:
    """Return paths as an error names them."""
    return ", ".join(f"'{item}'" for item in given)
