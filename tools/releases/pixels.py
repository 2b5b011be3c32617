"""Reading a release's images and mattes: bytes as they were where possible, every quirk named where not."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from data_modules.decode import decode_rgb

Array = np.ndarray

_ORIENTATION = 0x0112
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# JPEG-compressed masks differ a little between channels; more than this is not one mask
_CHANNEL_TOLERANCE = 8


class BadFile(ValueError):
    """A file that cannot be used; the message names it."""


@dataclass(frozen=True)
class ImageFile:
    """An image as it goes into the shard."""

    data: bytes
    extension: str
    width: int
    height: int
    notes: tuple[str, ...]


def _read(root: Path, name: str) -> bytes:
    try:
        return (root / name).read_bytes()
    except OSError as error:
        raise BadFile(f"{name}: {error.strerror or error}") from None


def _decode(data: bytes, flags: int, name: str) -> Array:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error as error:
        raise BadFile(f"{name}: OpenCV cannot read it ({error.err})") from None
    if pixels is None or not pixels.size:
        raise BadFile(f"{name}: not a picture ({len(data)} bytes)")
    return pixels


def read_image(root: Path, name: str, target_size: Callable[[tuple[int, int]], tuple[int, int] | None]) -> ImageFile:
    """Read an image; its bytes stay as they are unless they must not.

    An orientation tag turns the picture for some readers and not for others, so releases disagree on it: the image is
    taken as a viewer shows it, unless its matte fits only the stored pixels; then the tag is set to "not turned".

    Args:
        root: The release's folder.
        name: The file below it.
        target_size: Given the shown (width, height), returns the (width, height) of the image's mattes, or None.

    Raises:
        BadFile: If the file is missing, cut short or no picture.
    """
    data = _read(root, name)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            form, stored, turn = opened.format or "", opened.size, opened.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise BadFile(f"{name}: cannot be read as a picture ({error})") from None
    try:
        pixels = decode_rgb(data)
    except ValueError as error:
        raise BadFile(f"{name}: {error}") from None
    notes = []
    shown = (stored[1], stored[0]) if turn in (5, 6, 7, 8) else stored
    extension = _KEPT.get(form, "")
    if turn in range(2, 9):
        wanted = target_size(shown)
        ignore = wanted is not None and wanted != shown and wanted == stored
        notes.append(
            "orientation tag ignored: the matte fits the stored pixels" if ignore else "orientation tag applied"
        )
        if ignore:
            shown = stored
        if form in ("JPEG", "MPO"):
            data = without_orientation(data) if ignore else data
            pixels = decode_rgb(data)
        else:
            # few readers look for the tag outside of JPEG: better to have none
            upright = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, name)
            pixels = _turned(upright[..., ::-1], 1 if ignore else turn)
            extension = ""
    if not extension:
        notes.append(f"re-encoded from {form}")
        data, extension = cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))[1].tobytes(), "png"
    if (pixels.shape[1], pixels.shape[0]) != shown:
        raise BadFile(f"{name}: decodes to {pixels.shape[1]}x{pixels.shape[0]}, its header says {shown[0]}x{shown[1]}")
    return ImageFile(data, extension, shown[0], shown[1], tuple(notes))


def _turned(pixels: Array, turn: int) -> Array:
    if turn in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def without_orientation(data: bytes) -> bytes:
    """The JPEG with its orientation tag set to 1 (not turned); nothing else changes."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        size = int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            start = position + 10
            order = "little" if data[start : start + 2] == b"II" else "big"
            first = start + int.from_bytes(data[start + 4 : start + 8], order)
            for entry in range(int.from_bytes(data[first : first + 2], order)):
                field = first + 2 + 12 * entry
                if int.from_bytes(data[field : field + 2], order) == _ORIENTATION:
                    return data[: field + 8] + (1).to_bytes(2, order) + data[field + 10 :]
        position += 2 + size
    return data


def png_size(root: Path, name: str) -> tuple[int, int]:
    """(width, height) of a matte from its header.

    Raises:
        BadFile: If it is missing or no picture.
    """
    data = _read(root, name)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return opened.size
    except (OSError, SyntaxError, ValueError) as error:
        raise BadFile(f"{name}: cannot be read as a picture ({error})") from None


def read_matte(
    root: Path, name: str, kind: str, size: tuple[int, int], channel: str = "auto", tolerance: int = 3
) -> tuple[bytes | Array, list[str]]:
    """Read an alpha or mask as PNG bytes (its own, if they are plain) or an array, with notes on what was put right.

    Args:
        root: The release's folder.
        name: The file below it.
        kind: ``alpha`` or ``mask``.
        size: (width, height) of the image.
        channel: Which channel of a colour file is the matte: ``first``, ``alpha``, or ``auto``, which asks only where
            both could be.
        tolerance: The matte may differ from the image by so many pixels and is then resized.

    Raises:
        BadFile: If it is missing, damaged, empty, of another size, or not one matte; the message says what to do.
    """
    data = _read(root, name)
    pixels = _decode(data, cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION, name)
    notes = []
    if pixels.dtype not in (np.uint8, np.uint16):
        raise BadFile(f"{name}: {pixels.dtype} values; 8 or 16 bit are needed")
    if data[:4] == b"\x89PNG" and b"IEND" not in data[-16:]:
        raise BadFile(f"{name}: the PNG is cut short")
    plain = data[:4] == b"\x89PNG" and pixels.ndim == 2 and data[24] in (8, 16) and data[25] == 0
    if pixels.ndim == 3:
        notes.append(f"matte has {pixels.shape[2]} channels")
        pixels = _one_channel(pixels, channel, name)
    top = int(pixels.max())
    if top == 0:
        raise BadFile(f"{name}: the {kind} is empty (all zero)")
    if top == 1:
        notes.append("matte stored as 0 and 1")
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype == np.uint16 and top <= 255:
        notes.append("8-bit matte stored in 16 bits")
        pixels = pixels.astype(np.uint8)
    found = (pixels.shape[1], pixels.shape[0])
    if found != size:
        if max(abs(found[0] - size[0]), abs(found[1] - size[1])) > tolerance:
            raise BadFile(f"{name}: the {kind} is {found[0]}x{found[1]} but the image is {size[0]}x{size[1]}")
        notes.append("matte resized by a few pixels")
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    if kind == "mask":
        full = 65535 if pixels.dtype == np.uint16 else 255
        hard = (pixels > full // 2).astype(np.uint8) * 255
        if not np.isin(pixels, (0, full)).all():
            notes.append("soft mask made hard")
        elif plain and pixels.dtype == np.uint8 and not notes:
            return data, notes
        if not hard.any():
            raise BadFile(f"{name}: the mask is empty (nothing above half)")
        return hard, notes
    return (data if plain and not notes else pixels), notes


def _one_channel(pixels: Array, channel: str, name: str) -> Array:
    """The matte among the channels of a colour file (in OpenCV's order)."""
    colours, alpha = pixels[..., :3], pixels[..., 3] if pixels.shape[2] == 4 else None
    first = np.ascontiguousarray(colours[..., -1])
    if channel == "first":
        return first
    if channel == "alpha":
        if alpha is None:
            raise BadFile(f"{name}: has no alpha channel; use --mask-channel first")
        return np.ascontiguousarray(alpha)
    is_grey = int(np.ptp(colours.astype(np.int32), axis=2).max()) <= _CHANNEL_TOLERANCE
    if alpha is not None and alpha.min() < np.iinfo(alpha.dtype).max:
        if np.ptp(colours.reshape(-1, 3), axis=0).max() == 0:
            return np.ascontiguousarray(alpha)
        if not is_grey or int(np.abs(alpha.astype(np.int32) - first).max()) > _CHANNEL_TOLERANCE:
            raise BadFile(
                f"{name}: both its colours and its alpha could be the matte; say --mask-channel first or alpha"
            )
    if not is_grey:
        raise BadFile(f"{name}: a colour picture, not a matte; if the first channel is meant, say --mask-channel first")
    return first


def read_shapes(shapes: Any, size: tuple[int, int], name: str) -> Array:
    """The union of COCO polygons or run lengths as a 0/255 mask (H, W).

    Polygons of one object may overlap; the union keeps the overlap, where the widely used ``sum == 1`` cuts a hole.

    Raises:
        BadFile: If nothing is inside.
    """
    from pycocotools import mask as coco  # an extra: only RefCOCO needs it

    width, height = size
    try:
        if isinstance(shapes, dict):
            runs = coco.frPyObjects(shapes, height, width) if isinstance(shapes["counts"], list) else shapes
        else:
            # fewer than three points enclose nothing, and pycocotools reads 4 numbers as a box
            polygons = [[float(value) for value in polygon] for polygon in shapes if len(polygon) >= 6]
            if not polygons:
                raise ValueError("no polygon of three points or more")
            runs = coco.merge(coco.frPyObjects(polygons, height, width))
        if list(runs["size"]) != [height, width]:
            raise ValueError(
                f"its run lengths are for {runs['size'][1]}x{runs['size'][0]}, the image is {width}x{height}"
            )
        mask = coco.decode(runs) > 0
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise BadFile(f"{name}: its segmentation cannot be decoded ({error})") from None
    if not mask.any():
        raise BadFile(f"{name}: its segmentation is empty")
    return mask.astype(np.uint8) * 255


def read_foreground(root: Path, name: str, size: tuple[int, int]) -> tuple[bytes | Array, list[str]]:
    """Foreground colours as PNG bytes (their own, if plain RGB) or an (H, W, 3) array.

    Raises:
        BadFile: If the file is missing, damaged or of another size.
    """
    data = _read(root, name)
    pixels = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, name)
    found = (pixels.shape[1], pixels.shape[0])
    if found != size:
        raise BadFile(f"{name}: the foreground is {found[0]}x{found[1]} but the image is {size[0]}x{size[1]}")
    plain = data[:4] == b"\x89PNG" and data[24] == 8 and data[25] == 2 and b"IEND" in data[-16:]
    return (data, []) if plain else (np.ascontiguousarray(pixels[..., ::-1]), ["foreground re-encoded"])


def read_background(root: Path, name: str) -> bytes:
    """A background as JPEG bytes, re-encoded if it is no JPEG.

    Raises:
        BadFile: If the file is missing or damaged.
    """
    data = _read(root, name)
    if data[:2] == b"\xff\xd8":
        return data
    pixels = _decode(data, cv2.IMREAD_COLOR, name)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
