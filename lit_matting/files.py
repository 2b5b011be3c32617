"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PART = re.compile(r"\.\d+\.[0-9a-f]{8}\.part")
_STALE_S = 24 * 3600
"""Nobody writes to a file for so long without changing it; a process id says nothing where machines share a folder."""
_cleared: set[Path] = set()


def _clear(folder: Path) -> None:
    """Remove what processes that were killed left in a folder; looked for once, as folders can hold very much."""
    folder = folder.absolute()
    if folder in _cleared:
        return
    _cleared.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # another process was quicker, or the file is another user's
                if _PART.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > _STALE_S:
                    os.unlink(entry.path)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; what was written takes the final name when the block ends.

    If the block raises, what stood under the final name is still there, and nothing else. If the process is killed,
    the temporary file stays, until a day later somebody writes into that folder. The folder is made if missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path.parent)
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
