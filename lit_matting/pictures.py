"""Photographs from anywhere, as upright sRGB.

Pictures come from cameras, phones, scanners and design programs: turned by a flag, in wide-gamut or printing colours,
grey, with a palette, with 16 bits, with an alpha channel of their own. The network was trained on plain upright sRGB,
and everything becomes that here.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from lit_matting.checks import InputError

log = logging.getLogger(__name__)

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".heic", ".heif", ".avif")
"""What is taken from a folder; a file named one by one may end in anything."""
MADE_BY = "lit_matting"
"""The software that every picture written here names in its file."""
_WRITTEN = (".png", ".webp", ".tif", ".tiff", ".jpg", ".jpeg")
WHITE_LEVEL: dict[str, int] = {"uint8": 255, "uint16": 65535, "float32": 1}
# what a decoder raises on a file that is damaged, or made to be
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError, OverflowError, struct.error)


@dataclass(frozen=True)
class Photo:
    """A photograph as upright sRGB."""

    colour: np.ndarray
    """(H, W, 3) sRGB; uint8, uint16 or float32 in [0, 1], whatever holds the source without loss."""
    opacity: np.ndarray | None = None
    """(H, W) float32 in [0, 1]: the photograph's own alpha channel, where it has one. The colours then lie on white."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        return self.colour.shape[0], self.colour.shape[1]

    def as_float(self) -> np.ndarray:
        """Return the colours as (H, W, 3) float32 in [0, 1]."""
        return as_float(self.colour)


def as_float(array: np.ndarray) -> np.ndarray:
    """Return integer or float values as float32 in [0, 1]."""
    level = WHITE_LEVEL[array.dtype.name]
    values = array.astype(np.float32)
    return values if level == 1 else np.divide(values, level, out=values)


def as_integers(values: np.ndarray, bits: int = 8) -> np.ndarray:
    """Return values in [0, 1] rounded to 8 or 16 bits.

    Example:
        >>> as_integers(np.array([0.0, 0.5, 1.0]), 16).tolist()
        [0, 32768, 65535]
    """
    level, dtype = (65535, np.uint16) if bits == 16 else (255, np.uint8)
    return np.rint(np.clip(values, 0, 1) * level).astype(dtype)


# --- finding --------------------------------------------------------------------------------------


def photographs_in(folder: Path) -> list[Path]:
    """Return the photographs of a folder and its subfolders, sorted: neither hidden ones nor what was written here."""
    found = sorted(item for item in folder.rglob("*") if item.suffix.lower() in PHOTO_SUFFIXES and not item.is_dir())
    shown = [item for item in found if not any(part.startswith(".") for part in item.relative_to(folder).parts)]
    return not_made_here(shown, str(folder))


def not_made_here(paths: Sequence[Path], place: str) -> list[Path]:
    """Return the pictures that earlier runs did not write, and log how many they wrote.

    Args:
        paths: The pictures.
        place: Where they were found.
    """
    kept = [path for path in paths if not _made_here(path)]
    if len(kept) < len(paths):
        log.warning(
            "%d of the pictures in '%s' were written by lit_matting and are left out; one that is meant must be named"
            " by itself.",
            len(paths) - len(kept),
            place,
        )
    return kept


def _made_here(path: Path) -> bool:
    if path.suffix.lower() not in _WRITTEN:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                # a PNG would be decoded for its EXIF data
                software = image.info.get("Software") if image.format == "PNG" else image.getexif().get(0x0131)
    except (*_DAMAGED, Image.DecompressionBombError):
        return False  # reading it says what is wrong
    return software == MADE_BY


# --- reading --------------------------------------------------------------------------------------


def read_photo(source: Any) -> Photo:
    """Return a photograph from a path, a PIL image, an array or a tensor.

    Args:
        source: A path; a :class:`Photo`, which is returned; a PIL image of any mode; an array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4); or a tensor (C, H, W) or (1, C, H, W). Arrays and tensors are uint8,
            uint16, bool, or floats in [0, 1].

    Raises:
        InputError: If there is no such file, it is no whole image, or the array has another shape or range.
    """
    if isinstance(source, Photo):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source))
    if isinstance(source, Image.Image):
        try:
            return _from_pil(source)
        except _DAMAGED as error:
            raise InputError(f"the image cannot be used: {reason(error)}.") from error
    if hasattr(source, "detach"):  # a tensor, told without importing torch
        tensor = source.detach().cpu()
        if tensor.ndim == 4 and tensor.shape[0] == 1:
            tensor = tensor[0]
        if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
            raise InputError(
                f"an image tensor must be (3, H, W), got {tuple(source.shape)}; for several images give a list."
            )
        source = (tensor.float() if tensor.is_floating_point() else tensor).permute(1, 2, 0).numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source)
    raise InputError(
        f"an image must be a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W), got {type(source).__name__}."
    )


def _read_file(path: Path) -> Photo:
    if not path.exists():
        raise InputError(f"there is no image {str(path)!r}.")
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder, not an image.")
    register_opener(path)
    try:
        with warnings.catch_warnings():
            # of a picture with many pixels; what is too many is an error all the same
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if _has_deep_colours(image) and not _needs_conversion(image.info.get("icc_profile")):
                    return _read_deep(path, image)
                return _from_pil(image)
    except UnidentifiedImageError as error:
        what = "is empty" if path.stat().st_size == 0 else "is not an image of a known format"
        raise InputError(f"{str(path)!r} {what}.") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{str(path)!r} has more pixels than is safe to open ({error}); raise PIL.Image.MAX_IMAGE_PIXELS if you"
            " trust it."
        ) from error
    except _DAMAGED as error:
        raise InputError(f"{str(path)!r} cannot be read: {reason(error)}.") from error


def reason(error: BaseException) -> str:
    """Return a library's message as part of a sentence."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def register_opener(path: Path) -> None:
    """Let PIL open a file of this name, where that needs a plug-in.

    Raises:
        InputError: If the plug-in is not installed.
    """
    if path.suffix.lower() not in (".heic", ".heif"):
        return
    try:
        import pillow_heif
    except ImportError as error:
        raise InputError(f"{str(path)!r} is a HEIC file; `pip install pillow-heif` to read it.") from error
    pillow_heif.register_heif_opener()


def _from_pil(image: Image.Image) -> Photo:
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if not image.width or not image.height:
        raise ValueError("it has no pixels")
    if image.mode.startswith(("I", "F")):
        return Photo(_three(_grey_levels(np.asarray(image))))
    opacity = None
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("RGBA")  # also undoes premultiplied alpha, and looks the palette up
        opacity = np.asarray(image.getchannel("A"))
        image = image.convert("RGB")
    colour = np.asarray(_to_srgb(image, profile, grey))
    return _on_white(colour, as_float(opacity)) if opacity is not None else Photo(colour)


def _grey_levels(array: np.ndarray) -> np.ndarray:
    """Return what PIL's modes I;16, I and F hold as uint16 or float32."""
    if array.dtype.kind == "f":
        smallest, largest = float(array.min()), float(array.max())
        if not (smallest >= 0 and largest <= 1):
            raise ValueError(f"its floating-point values must lie in [0, 1], they go from {smallest:g} to {largest:g}")
        return array.astype(np.float32)
    if array.min() < 0 or array.max() > 65535:
        raise ValueError(f"its values go from {array.min()} to {array.max()}, which is more than 16 bits")
    return array.astype(np.uint16)


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


def _on_white(colour: np.ndarray, opacity: np.ndarray) -> Photo:
    """Lay colours on white, as a viewer shows them: what is invisible can hold any colour."""
    if (opacity == 1).all():
        return Photo(colour)
    shown = as_float(colour) * opacity[..., None] + (1 - opacity[..., None])
    if colour.dtype != np.float32:
        shown = as_integers(shown, 8 * colour.dtype.itemsize)
    return Photo(shown, opacity)


def _from_array(array: np.ndarray) -> Photo:
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise InputError(f"an image array must be (H, W, 3), got {shape}{hint}.")
    if not array.size:
        raise InputError(f"the image has no pixels: its shape is {shape}.")
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
        smallest, largest = float(array.min()), float(array.max())
        if not (smallest >= 0 and largest <= 1):  # written so that NaN fails it
            raise InputError(
                f"an image array of floats must lie in [0, 1], got values from {smallest:g} to {largest:g}"
                " (8-bit values need a division by 255)."
            )
    elif array.dtype.name not in WHITE_LEVEL:
        raise InputError(f"an image array must be uint8, uint16 or floating point, got {array.dtype}.")
    if array.shape[-1] == 4:
        return _on_white(np.ascontiguousarray(array[..., :3]), as_float(array[..., 3]))
    return Photo(np.array(array) if array.shape[-1] == 3 else _three(array[..., 0]))


def _has_deep_colours(image: Image.Image) -> bool:
    """Whether a file holds 16 bits for each of several channels, of which PIL would keep 8."""
    if image.format == "PNG":
        return any(str(tile[3]).startswith(("RGB;16", "RGBA;16")) for tile in image.tile)
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, ())  # BitsPerSample
        return len(bits) in (3, 4) and set(bits) == {16}
    return False


def _read_deep(path: Path, image: Image.Image) -> Photo:
    import cv2

    # OpenCV turns a TIFF upright by itself and leaves a PNG as it lies
    turn = image.getexif().get(0x0112, 1) if image.format == "PNG" else 1
    array = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.dtype != np.uint16 or array.ndim != 3:
        raise ValueError("its 16-bit data are damaged")
    order = cv2.COLOR_BGRA2RGBA if array.shape[-1] == 4 else cv2.COLOR_BGR2RGB
    return _from_array(_turned(cv2.cvtColor(array, order), turn))


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an array (H, W, C) upright by its EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


# --- colour ---------------------------------------------------------------------------------------


_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""The mode of a picture that a profile of this colour space describes."""
_ROUNDING = 2
"""Of 255, by which profiles of sRGB differ from each other: their numbers are rounded in more than one way."""


def _needs_conversion(profile: bytes | None) -> bool:
    """Whether a profile changes colours, which its name does not tell: there is a "Linear sRGB"."""
    if not profile:
        return False
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(opened.profile.xcolor_space.strip())
        if mode not in ("RGB", "L"):
            return mode is not None
        steps = np.array([0, 8, 24, 64, 128, 192, 255], np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        patches = Image.fromarray(colours if mode == "RGB" else colours[..., 0])
        shown = np.asarray(_through(patches, opened), np.int16)
        return bool(np.abs(shown - np.asarray(patches.convert("RGB"))).max() > _ROUNDING)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        log.warning("an image's colour profile is damaged and was ignored (%s).", reason(error))
        return False


def _through(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Return an image of this profile as sRGB."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")


def _to_srgb(image: Image.Image, profile: bytes | None, grey: bool) -> Image.Image:
    """Return the image as sRGB: through its ICC profile where it has a usable one, else by its mode."""
    if profile and _needs_conversion(profile):
        try:
            opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = _MODES.get(opened.profile.xcolor_space.strip())
            # a profile for colours that the image does not have says nothing about it
            plain = image.mode not in ("CMYK", "LAB")
            if mode == image.mode or (mode == "RGB" and plain) or (mode == "L" and grey):
                return _through(image.convert(mode), opened)
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            log.warning("the image's colour profile is damaged and was ignored (%s).", reason(error))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return image.convert("RGB")


def colour_values(colour: str | tuple[int, ...]) -> tuple[float, float, float]:
    """Return a colour given by name, as `#rrggbb`, or as three numbers from 0 to 255, in [0, 1].

    Raises:
        InputError: If it is no colour.

    Example:
        >>> colour_values("#ff0000"), colour_values((0, 255, 0))
        ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    """
    try:
        values = ImageColor.getrgb(colour) if isinstance(colour, str) else tuple(colour)
    except ValueError as error:
        raise InputError(f"{colour!r} is no colour: give a name as 'white', or '#rrggbb'.") from error
    if len(values) not in (3, 4) or not all(0 <= value <= 255 for value in values):
        raise InputError(f"{colour!r} is no colour: give three numbers from 0 to 255.")
    red, green, blue = (value / 255 for value in values[:3])
    return red, green, blue


def background_colours(background: Any, size: tuple[int, int]) -> np.ndarray:
    """Return a background of ``size`` (height, width) as float32 (H, W, 3) in [0, 1], or (3,) for a plain colour.

    Args:
        background: A colour (see :func:`colour_values`), or anything :func:`read_photo` takes; an image is scaled to
            cover the size and cut at its centre.
        size: Height and width, in pixels.
    """
    if isinstance(background, (tuple, list)) or (isinstance(background, str) and not os.path.isfile(background)):
        try:
            return np.asarray(colour_values(background), np.float32)
        except InputError:
            if isinstance(background, str) and ("." in background or "/" in background):
                raise InputError(f"there is no background image {background!r}.") from None
            raise
    photo = read_photo(background)
    if photo.size == tuple(size):
        return photo.as_float()
    image = Image.fromarray(photo.colour if photo.colour.dtype == np.uint8 else as_integers(photo.as_float()))
    return as_float(np.asarray(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)))
