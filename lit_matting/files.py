"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; what was written takes the final name when the block ends.

    If the block raises, what stood under the final name is still there, and nothing else. The folder is made if
    missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # not the name itself: with anything added, a long one would pass the file system's limit
    temporary = path.with_name(f".{os.getpid()}.{zlib.crc32(path.name.encode()):08x}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(data: bytes, path: Path) -> None:
    """Write bytes to a file so that it appears whole or not at all; see :func:`whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)
