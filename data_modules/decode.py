"""From the bytes of a sample to arrays, with every mismatch named.

JPEG goes through simplejpeg (libjpeg-turbo, straight to RGB, strict: a cut-short file is an error, where OpenCV fills
the rest with grey), everything else through OpenCV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from data_modules.shard_reader import Instance, RawSample, SampleError

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG"
# RGB straight from libjpeg; CMYK files go the long way
_PLAIN = ("RGB", "Gray", "YCbCr")
_EXIF_TURNS = {
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
    2: lambda image: cv2.flip(image, 1),
    4: lambda image: cv2.flip(image, 0),
    5: lambda image: cv2.transpose(image),
    7: lambda image: cv2.flip(cv2.transpose(image), -1),
}


@dataclass
class DecodedImage:
    """An image and the instances that were asked for, at the image's own size."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    targets: dict[int, np.ndarray]
    """Instance number -> (H, W) uint8 or uint16."""
    foregrounds: dict[int, np.ndarray]
    """Instance number -> (H, W, 3) uint8 RGB, where the sample has them."""


def decode_rgb(data: bytes | memoryview) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB, turned the way a viewer shows it.

    Grey, CMYK, palette, 16-bit and alpha-carrying files are converted; an alpha channel is dropped.

    Raises:
        ValueError: If the bytes are not a whole image.
    """
    if bytes(data[:2]) == _JPEG:
        try:
            _, _, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if colorspace in _PLAIN:
                image = simplejpeg.decode_jpeg(data, "RGB")
                turn = _EXIF_TURNS.get(exif_orientation(data))
                return image if turn is None else turn(image)
        except ValueError as error:
            raise ValueError(f"its JPEG is damaged ({error})") from error
    image = _decode(data, cv2.IMREAD_COLOR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def decode_grey(data: bytes | memoryview) -> np.ndarray:
    """Decode an alpha or mask file to (H, W) uint8 or uint16; of several channels the first is taken.

    Raises:
        ValueError: If the bytes are not a whole image.
    """
    image = _decode(data, cv2.IMREAD_UNCHANGED)
    if image.ndim == 3:
        # OpenCV's order is blue, green, red
        image = np.ascontiguousarray(image[..., min(2, image.shape[2] - 1)])
    return image


def exif_orientation(data: bytes | memoryview) -> int:
    """Return the EXIF orientation (1 to 8) of a JPEG, 1 where it has none; reads the header only."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, size = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA or size < 2:
            break
        if marker == 0xE1 and bytes(data[position + 4 : position + 10]) == b"Exif\0\0":
            return _tiff_orientation(bytes(data[position + 10 : position + 2 + size]))
        position += 2 + size
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order = "little" if tiff[:2] == b"II" else "big"
    first = int.from_bytes(tiff[4:8], order)
    for entry in range(int.from_bytes(tiff[first : first + 2], order)):
        start = first + 2 + 12 * entry
        if int.from_bytes(tiff[start : start + 2], order) == 0x0112:
            value = int.from_bytes(tiff[start + 8 : start + 10], order)
            return value if value in range(1, 9) else 1
    return 1


def _decode(data: bytes | memoryview, flags: int) -> np.ndarray:
    if bytes(data[:4]) == _PNG and b"IEND" not in bytes(data[-16:]):
        raise ValueError("its PNG is cut short")
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags) if len(data) else None
    except cv2.error as error:
        raise ValueError(f"OpenCV cannot read it ({error.err})") from error
    if image is None or image.size == 0:
        raise ValueError(f"it is not a readable image ({len(data)} bytes)")
    return image


def decode_sample(
    sample: RawSample, wanted: Sequence[int], foregrounds: Sequence[int] = (), empty_is_error: bool = True
) -> DecodedImage:
    """Decode the image of a sample and only those instances that are wanted.

    Args:
        sample: The sample.
        wanted: Numbers of the instances whose alpha or mask is wanted.
        foregrounds: Numbers of the instances whose foreground colours are wanted, where they have them.
        empty_is_error: Whether a target without a single foreground pixel counts as damaged.

    Raises:
        SampleError: If a member is missing, damaged or of another size; the message names shard, sample and member.
    """
    name = sample.image_name
    image = _named(decode_rgb, sample, name, "image")
    size = image.shape[:2]
    targets, colours = {}, {}
    for number in wanted:
        instance = sample.instances[number]
        target = targets[number] = _named(decode_grey, sample, instance.target, instance.kind)
        _check_size(sample, target, size, instance.kind, instance)
        if empty_is_error and not cv2.hasNonZero(target):
            raise SampleError(f"{sample.where}: {instance.kind} of instance {instance.id!r} is empty.")
    for number in foregrounds:
        instance = sample.instances[number]
        if instance.foreground is not None:
            colours[number] = _named(decode_rgb, sample, instance.foreground, "foreground")
            _check_size(sample, colours[number], size, "foreground", instance)
    return DecodedImage(image, targets, colours)


def _named(function: object, sample: RawSample, name: str, what: str) -> np.ndarray:
    data = sample.member(name)
    try:
        return function(data)  # type: ignore[operator]
    except ValueError as error:
        raise SampleError(f"{sample.where}: {what} {name!r}: {error}.") from error


def _check_size(sample: RawSample, array: np.ndarray, size: tuple[int, ...], what: str, instance: Instance) -> None:
    if array.shape[:2] != size:
        raise SampleError(
            f"{sample.where}: {what} of instance {instance.id!r} is {array.shape[1]}x{array.shape[0]}"
            f" but the image is {size[1]}x{size[0]}."
        )
