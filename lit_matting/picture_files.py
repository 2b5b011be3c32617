"""Mattes and cut-outs to files, with 8 or 16 bits, whole or not at all."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lit_matting.checks import InputError
from lit_matting.pictures import MADE_BY, as_integers, reason

DEEP_SUFFIXES = (".png", ".tif", ".tiff")
"""Formats written with 16 bits a channel."""
OPAQUE_SUFFIXES = (".jpg", ".jpeg", ".bmp")
"""Formats written without an alpha channel."""
SUFFIXES = (".png", ".webp", ".tif", ".tiff", *OPAQUE_SUFFIXES)
"""Formats written."""


def check_format(suffix: str, bits: int, alpha_channel: bool) -> None:
    """Raise :class:`InputError` unless files of this suffix can hold so many bits, and an alpha channel if asked."""
    if suffix not in SUFFIXES:
        raise InputError(
            f"pictures are written as {', '.join(SUFFIXES)}, not as {suffix or 'a file without suffix'!r}."
        )
    if bits == 16 and suffix not in DEEP_SUFFIXES:
        raise InputError(f"16 bits need {' or '.join(DEEP_SUFFIXES)}, {suffix} has 8.")
    if alpha_channel and suffix in OPAQUE_SUFFIXES:
        raise InputError(f"{suffix} has no transparency: write .png, .webp or .tif, or give a background.")


def signature(suffix: str) -> dict[str, Any]:
    """Return the arguments of PIL's ``save`` by which a file names the software that wrote it; a BMP cannot."""
    if suffix == ".bmp":
        return {}
    if suffix == ".png":
        text = PngInfo()
        text.add_text("Software", MADE_BY)
        return {"pnginfo": text}
    exif = Image.Exif()
    exif[0x0131] = MADE_BY
    return {"exif": exif}


def encode_picture(values: np.ndarray, suffix: str, bits: int = 8) -> bytes:
    """Return the file of a picture.

    Args:
        values: (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA with straight alpha, floats in [0, 1].
        suffix: Of the file name; chooses the format. WebP is lossless, JPEG has quality 95.
        bits: A channel: 8 or 16.

    Raises:
        InputError: If the format cannot hold it.
    """
    suffix = suffix.lower()
    check_format(suffix, bits, values.ndim == 3 and values.shape[-1] == 4)
    array = as_integers(values, bits)
    if bits == 16:
        return _encode_deep(array, suffix)
    options: dict[str, Any] = {
        ".png": {"format": "PNG", "compress_level": 4},
        # exact: keep the colours of invisible pixels, which resizing programs mix into the edge
        ".webp": {"format": "WEBP", "lossless": True, "exact": True, "quality": 40},
        ".bmp": {"format": "BMP"},
        ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    }.get({".jpeg": ".jpg"}.get(suffix, suffix), {"format": "TIFF", "compression": "tiff_adobe_deflate"})
    buffer = io.BytesIO()
    try:
        Image.fromarray(array).save(buffer, **options, **signature(suffix))
    except (OSError, ValueError) as error:
        height, width = array.shape[:2]
        raise InputError(f"a picture of {width} x {height} cannot be written as {suffix}: {reason(error)}.") from error
    return buffer.getvalue()


def _encode_deep(array: np.ndarray, suffix: str) -> bytes:
    if suffix != ".png":
        return _deep_tiff(array)
    import cv2

    if array.ndim == 3:
        array = cv2.cvtColor(array, cv2.COLOR_RGBA2BGRA if array.shape[-1] == 4 else cv2.COLOR_RGB2BGR)
    whole, data = cv2.imencode(suffix, array)
    if not whole:
        raise InputError(f"a picture of {array.shape[1]} x {array.shape[0]} cannot be written as {suffix} in 16 bits.")
    text = f"Software\0{MADE_BY}".encode("latin-1")
    chunk = struct.pack(">I", len(text)) + b"tEXt" + text + struct.pack(">I", zlib.crc32(b"tEXt" + text))
    whole_file = data.tobytes()
    return whole_file[:33] + chunk + whole_file[33:]  # behind the signature and the header


def _deep_tiff(array: np.ndarray) -> bytes:
    """Return a 16-bit TIFF of one strip, deflated; OpenCV does not mark the fourth channel as straight alpha."""
    height, width = array.shape[:2]
    channels = 1 if array.ndim == 2 else array.shape[2]
    pixels = zlib.compress(array.astype("<u2").tobytes(), 6)
    # tag, type (2: text, 3: 16 bits, 4: 32 bits), values
    tags: list[tuple[int, int, tuple[int, ...]]] = [
        (256, 4, (width,)),
        (257, 4, (height,)),
        (258, 3, (16,) * channels),
        (259, 3, (8,)),  # compression: deflate
        (262, 3, (1 if channels == 1 else 2,)),  # grey or RGB
        (273, 4, (8,)),  # the strip follows the header
        (277, 3, (channels,)),
        (278, 4, (height,)),  # rows in the strip
        (279, 4, (len(pixels),)),
        (284, 3, (1,)),  # channels interleaved
        (305, 2, (*MADE_BY.encode(), 0)),
    ]
    if channels == 4:
        tags.append((338, 3, (2,)))  # straight alpha
    directory = 8 + len(pixels) + len(pixels) % 2
    behind = directory + 2 + 12 * len(tags) + 4
    entries, more = b"", b""
    for tag, kind, values in tags:
        data = struct.pack(f"<{len(values)}{' BHI'[kind - 1]}", *values)
        if len(data) > 4:  # does not fit into the entry
            place, more = struct.pack("<I", behind + len(more)), more + data
        else:
            place = data.ljust(4, b"\0")
        entries += struct.pack("<HHI", tag, kind, len(values)) + place
    header = b"II*\0" + struct.pack("<I", directory)
    return b"".join([header, pixels, bytes(len(pixels) % 2), struct.pack("<H", len(tags)), entries, bytes(4), more])
