"""The pictures the page shows: small enough for a screen, and plain about what is transparent."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from PIL import Image

from lit_matting.pictures import as_integers, background_colours
from lit_matting.results import MattingResult

LONGEST = 1400
"""Pixels of the longer side of what is shown; downloads have the photograph's own size."""
FOREGROUND = (0.10, 0.45, 0.95)
TRANSITION = (1.00, 0.62, 0.00)
"""Colours of the trimap's overlay: blue and orange, which look different to every kind of colour vision."""
_SQUARE = 12


def shown_size(size: tuple[int, int], longest: int = LONGEST) -> tuple[int, int]:
    """Return height and width at which a picture of ``size`` is shown; nothing is enlarged.

    Example:
        >>> shown_size((3000, 4000)), shown_size((30, 40)), shown_size((1, 5000))
        ((1050, 1400), (30, 40), (1, 1400))
    """
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def checkerboard(size: tuple[int, int]) -> np.ndarray:
    """Return the board that stands for transparency, (H, W, 3) uint8."""
    y, x = np.ogrid[: size[0], : size[1]]
    board = np.where((y // _SQUARE + x // _SQUARE) % 2 == 0, 255, 214).astype(np.uint8)
    return np.repeat(board[..., None], 3, -1)


def small_photo(result: MattingResult) -> Image.Image:
    """Return the photograph, small enough to be shown."""
    colour = result.photo.colour
    return _resized(Image.fromarray(colour if colour.dtype == np.uint8 else as_integers(result.photo.as_float())))


def small_cutout(cutout: Image.Image, background: Any = None) -> Image.Image:
    """Return a cut-out small enough to be shown, on a background or, where there is none, on a checkerboard.

    Args:
        cutout: RGBA.
        background: See :meth:`lit_matting.results.MattingResult.composite`; None: transparent.
    """
    small = _resized(cutout)  # PIL weighs the colours with their alpha
    size = (small.height, small.width)
    board = Image.fromarray(checkerboard(size))
    if background is not None:
        colours = np.broadcast_to(background_colours(background, size), (*size, 3))
        board = Image.fromarray(as_integers(colours))
    board.paste(small, (0, 0), small)
    return board


def trimap_overlay(photo: Image.Image, trimap: np.ndarray) -> Image.Image:
    """Return a photograph with its trimap: blue is the thing, orange the soft border, the rest is dimmed grey.

    Args:
        photo: RGB.
        trimap: (h, w) in [0, 1], of any size.
    """
    t = _fitted(trimap, photo)[..., None]
    soft = 1 - 2 * np.abs(t - 0.5)  # 1 in the middle of the border
    colour = np.asarray(photo, np.float32) / 255
    grey = 0.55 * colour.mean(-1, keepdims=True) + 0.1
    tint = soft * np.asarray(TRANSITION) + (1 - soft) * np.asarray(FOREGROUND)
    weight = 0.55 * np.minimum(1, 2 * t)
    return Image.fromarray(as_integers((1 - weight) * (t * colour + (1 - t) * grey) + weight * tint))


def grounding_overlay(photo: Image.Image, grounding: np.ndarray) -> Image.Image:
    """Return a photograph with the grounding map as a heat map: the brighter, the more likely the thing is there.

    Args:
        photo: RGB.
        grounding: (h, w) in [0, 1], of any size.
    """
    heat = _fitted(grounding, photo)
    colours = cv2.applyColorMap(as_integers(heat), cv2.COLORMAP_INFERNO)[..., ::-1].astype(np.float32) / 255
    grey = np.asarray(photo, np.float32).mean(-1, keepdims=True) / 255
    return Image.fromarray(as_integers(0.35 * grey + 0.65 * colours))


def _fitted(values: np.ndarray, photo: Image.Image) -> np.ndarray:
    resized = cv2.resize(values.astype(np.float32), photo.size, interpolation=cv2.INTER_LINEAR)
    return np.clip(resized, 0, 1)


def _resized(image: Image.Image) -> Image.Image:
    height, width = shown_size((image.height, image.width))
    if (width, height) == image.size:
        return image.copy()
    return image.resize((width, height), Image.Resampling.LANCZOS)
