"""Shards behind URLs: fetched whole, checked, and kept in a bounded folder that all processes of a machine share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import logging
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_modules.shard_format import ShardInfo
from lit_matting.checks import InputError

logger = logging.getLogger(__name__)

_CHUNK = 2**20
_TIMEOUT_S = 60.0
_LONGEST_WAIT_S = 60.0
_FINAL_STATUS = (400, 401, 403, 404, 405, 410)
_NOTHING_LEFT = 416
"""What a server answers that is asked for bytes beyond the file's end."""


class RemoteShards:
    """Fetches shards and indexes from any URL that webdataset opens.

    http and https go through Python's own client, which takes up a broken transfer where it stopped; every other scheme
    (`pipe:`, `gs:`, `hf:`, ...) through webdataset's `gopen`. A shard counts only when its size and checksum are those
    of the index.

    Args:
        folder: Where shards are kept; None uses a folder in the system's temporary directory.
        gigabytes: Largest size of the folder; the longest unused shards go first.
        retries: How often a failed transfer is tried again.
        first_wait_s: Seconds before the first new try; doubled each time.
    """

    def __init__(
        self, folder: str | None = None, gigabytes: float = 20.0, retries: int = 5, first_wait_s: float = 1.0
    ) -> None:
        self.folder = Path(folder or os.path.join(tempfile.gettempdir(), f"lit_matting-shards-{os.getuid()}"))
        self.max_bytes = int(gigabytes * 2**30)
        self.retries, self.first_wait_s = retries, first_wait_s

    def read(self, url: str) -> bytes:
        """Return the bytes behind a URL, for small files such as an index.

        Raises:
            InputError: If it cannot be fetched.
        """
        with tempfile.TemporaryFile() as file:
            self._fetch(url, file, None)
            file.seek(0)
            return file.read()

    def locate(self, url: str, info: ShardInfo) -> str:
        """Return the path of a local copy of a shard, fetching it if need be; processes that want it together wait.

        Raises:
            InputError: If it cannot be fetched whole.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # the checksum is part of the name: a changed set never reads an old copy
        path = self.folder / f"{info.sha256[:32]}.tar"
        with _locked(self.folder / f"{info.sha256[:32]}.lock"):
            if not path.exists() or path.stat().st_size != info.bytes:
                partial = path.with_suffix(".partial")
                with open(partial, "w+b") as file:
                    self._fetch(url, file, info)
                os.replace(partial, path)
            os.utime(path)
        self._make_room(path)
        return str(path)

    def _fetch(self, url: str, file: BinaryIO, info: ShardInfo | None) -> None:
        wait, problem = self.first_wait_s, ""
        for attempt in range(self.retries + 1):
            if attempt:
                logger.warning("Trying '%s' again in %.1f s (%s).", url, wait, problem)
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)
            try:
                self._transfer(url, file)
            except urllib.error.HTTPError as error:
                problem = f"the server answers {error.code} {error.reason}"
                if error.code in _FINAL_STATUS:
                    break
                if error.code == _NOTHING_LEFT:
                    _empty(file)
                continue
            # HTTPException: a chunked transfer that breaks off, or an answer that is not HTTP
            except (OSError, EOFError, ValueError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
                continue
            problem = _difference(file, info)
            if not problem:
                return
            _empty(file)
        raise InputError(f"'{url}' cannot be fetched ({problem}; {attempt + 1} tries); check the URL and the server.")

    def _transfer(self, url: str, file: BinaryIO) -> None:
        if not url.startswith(("http://", "https://")):
            import webdataset

            _empty(file)
            with webdataset.gopen(url) as stream:
                while block := stream.read(_CHUNK):
                    file.write(block)
            return
        begin = file.seek(0, os.SEEK_END)
        request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            if begin and response.status != 206:
                _empty(file)
            expected = response.headers.get("Content-Length")
            received = 0
            while block := response.read(_CHUNK):
                file.write(block)
                received += len(block)
        if expected is not None and received != int(expected):
            raise EOFError(f"the transfer stopped after {received} of {expected} bytes")

    def _make_room(self, keep: Path) -> None:
        with contextlib.suppress(OSError):
            shards = [(path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob("*.tar")]
            total = sum(size for _, size, _ in shards)
            for _, size, path in sorted(shards):
                if total <= self.max_bytes:
                    break
                if path != keep:
                    # a process that still reads it keeps its open file
                    path.unlink(missing_ok=True)
                    total -= size


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _difference(file: BinaryIO, info: ShardInfo | None) -> str:
    if info is None:
        return ""
    size = file.seek(0, os.SEEK_END)
    if size != info.bytes:
        return f"{size} bytes came, its index says {info.bytes}"
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(_CHUNK):
        digest.update(block)
    return "" if digest.hexdigest() == info.sha256 else "its checksum is not the index's"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
