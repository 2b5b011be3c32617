"""Tar bytes, written the same way every time and read by offset without unpacking."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

BLOCK = 512
END_OF_ARCHIVE = b"\0" * (2 * BLOCK)
_TYPE_LONG_NAME, _TYPES_PAX = b"L", (b"x", b"g")
_TYPES_FILE = (b"0", b"\0")


class TarError(ValueError):
    """The bytes are not the tar archive they should be: cut short, overwritten, or not a tar at all."""


def member(name: str, data: bytes) -> bytes:
    """Return header, data and padding of one file, with nothing in them that depends on when or where they are made.

    Example:
        >>> len(member("a.txt", b"x"))
        1024
    """
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o644
    header = info.tobuf(tarfile.GNU_FORMAT, encoding="utf-8", errors="strict")
    return header + data + b"\0" * (-len(data) % BLOCK)


def members(data: bytes | memoryview, start: int = 0) -> Iterator[tuple[str, memoryview, int]]:
    """Yield ``(name, content, offset of its header)`` of every file in the bytes; contents are views, not copies.

    Stops at the end of the bytes or at the end-of-archive mark. Long names (GNU and pax) are understood; what is not
    a regular file is passed over.

    Raises:
        TarError: If a header is damaged or a file reaches beyond the bytes.
    """
    view = memoryview(data)
    position, long_name, begin = start, None, start
    while position < len(view):
        header = bytes(view[position : position + BLOCK])
        if len(header) < BLOCK:
            raise TarError(f"the archive ends inside a header at byte {position}")
        if header.count(0) == BLOCK:
            return
        if long_name is None:
            begin = position
        size = _checked_size(header, position)
        content = view[position + BLOCK : position + BLOCK + size]
        kind = header[156:157]
        if len(content) < size:
            name = long_name or _name(header)
            raise TarError(f"the archive ends inside {name!r}: {len(content)} of {size} bytes are there")
        position += BLOCK + size + (-size % BLOCK)
        if kind == _TYPE_LONG_NAME:
            long_name = bytes(content).rstrip(b"\0").decode("utf-8")
        elif kind in _TYPES_PAX:
            long_name = _pax_path(bytes(content)) or long_name
        else:
            if kind in _TYPES_FILE:
                yield long_name or _name(header), content, begin
            long_name = None


def _checked_size(header: bytes, position: int) -> int:
    try:
        stated = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
        field = header[124:136]
        # sizes above 8 GiB are stored as a binary number behind a set top bit
        size = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise TarError(f"no tar header at byte {position}") from error
    if sum(header) - sum(header[148:156]) + 8 * 32 != stated:
        raise TarError(f"the header at byte {position} does not match its checksum")
    return size


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8")


def _pax_path(records: bytes) -> str | None:
    path = None
    while records:
        length = int(records.split(b" ", 1)[0])
        key, _, value = records[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        if key == b"path":
            path = value.decode("utf-8")
        records = records[length:]
    return path
