"""What the page does with photographs: look at one once, cut out of it often, and say in words what went wrong."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from lit_matting.checks import InputError, check_prompt
from lit_matting.pictures import Photo, colour_values, read_photo, register_opener
from lit_matting.pipeline import EncodedPhoto, MattingPipeline
from lit_matting.results import MattingResult

log = logging.getLogger(__name__)
Made = TypeVar("Made")

_KEPT = 4
"""Photographs the network has looked at that are kept for further phrases."""


class Sorry(Exception):
    """What to tell the person in front of the page; one or two sentences."""


class Desk:
    """Reads photographs and cuts out of them; every mistake comes out as :class:`Sorry`.

    Args:
        matting: The pipeline.
        max_megapixels: Larger pictures are refused before they are decoded.
    """

    def __init__(self, matting: MattingPipeline, max_megapixels: float) -> None:
        self.matting = matting
        self.max_megapixels = max_megapixels
        self._encoded: OrderedDict[str, EncodedPhoto] = OrderedDict()
        # who presses the button while the photograph is still being looked at waits for that, and looks no second time
        self._lock = threading.Lock()

    def look(self, path: str) -> EncodedPhoto:
        """Return the photograph the network has looked at; again for the same file at no cost."""
        with self._lock:
            if path in self._encoded:
                self._encoded.move_to_end(path)
                return self._encoded[path]
            encoded = _in_words(lambda: self._encode(path), path)
            self._encoded[path] = encoded
            while len(self._encoded) > _KEPT:
                self._encoded.popitem(last=False)
            return encoded

    def cut(self, path: str | None, phrase: str) -> MattingResult:
        """Return what the phrase names in the photograph."""
        if not path:
            raise Sorry("First choose a photo: drop it on the field, or click the field.")
        try:
            phrase = check_prompt(phrase or "", "phrase")
        except InputError:
            raise Sorry("Type what to cut out, for example “the red umbrella”.") from None
        encoded = self.look(path)
        result = _in_words(lambda: self.matting(encoded, phrase), path)
        _in_words(lambda: result.foreground, path)  # the costly part, while this is the one place that waits
        return result

    def background(self, kind: str, colour: str, picture: str | None) -> tuple[int, ...] | np.ndarray | None:
        """Return the background chosen, as :meth:`MattingResult.composite` takes it; None is transparent.

        Args:
            kind: `transparent`, `colour` or `picture`.
            colour: `#rrggbb`, or `rgba(...)` as some browsers' colour fields say it.
            picture: The file; without one the background stays transparent.
        """
        if kind == "colour":
            return _three_numbers(colour)
        if kind == "picture" and picture:
            return _in_words(lambda: self._colours(picture), picture)
        return None

    def _encode(self, path: str) -> EncodedPhoto:
        photo = self._photo(path)
        return self.matting.encode(photo)

    def _colours(self, path: str) -> np.ndarray:
        return self._photo(path).colour

    def _photo(self, path: str) -> Photo:
        self._look_at_header(path)
        photo = read_photo(path)
        self._check_size(*photo.size)  # whatever the header said
        return photo

    def _look_at_header(self, path: str) -> None:
        """Refuse a picture with too many pixels before they take up memory."""
        register_opener(Path(path))  # without its plug-in PIL knows nothing of a file, and reading it asks nobody
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    self._check_size(image.height, image.width)
        except Image.DecompressionBombError:
            raise Sorry(f"That picture has too many pixels; {self._limit}") from None
        except OSError:
            pass  # reading it says what is wrong

    @property
    def _limit(self) -> str:
        return f"up to {self.max_megapixels:g} megapixels are fine. Make it smaller and try again."

    def _check_size(self, height: int, width: int) -> None:
        if width * height > self.max_megapixels * 1e6:
            millions = width * height / 1e6
            raise Sorry(f"That picture has {width} × {height} pixels ({millions:.3g} megapixels); {self._limit}")


def _in_words(work: Callable[[], Made], path: str) -> Made:
    """Return what ``work`` returns; what it raises becomes a sentence without the server's folders."""
    name = Path(path).name
    try:
        return work()
    except Sorry:
        raise
    except InputError as error:
        said = str(error).replace(repr(path), f"“{name}”").replace(path, name)
        raise Sorry(f"That file cannot be used: {said} JPEG, PNG, WebP and TIFF photos work.") from error
    except Exception as error:
        import torch

        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise Sorry("That photo needs more memory than there is. Make it smaller and try again.") from error
        log.exception("the page failed on a photograph")
        raise Sorry("Something went wrong here, and it is not your photo's fault. Please try again.") from error


def _three_numbers(colour: str) -> tuple[int, ...]:
    text = colour.strip()
    try:
        if text.startswith("rgb"):
            red, green, blue = text[text.index("(") + 1 : text.index(")")].split(",")[:3]
            return tuple(min(255, max(0, round(float(value)))) for value in (red, green, blue))
        return tuple(round(255 * value) for value in colour_values(text))
    except (ValueError, InputError):
        raise Sorry("That is no colour; pick one from the field.") from None


def verdict(result: MattingResult) -> tuple[str, str]:
    """Return what to say about a result: a kind (`found`, `missing` or `nothing`), and a sentence."""
    empty = result.alpha.max() < 0.5
    if result.found is False:
        return "missing", (
            f"“{result.phrase}” does not seem to be in this photo (confidence {result.confidence:.3f}; from"
            f" {result.threshold:.3f} on it counts as found).{'' if empty else ' Shown is the best guess.'}"
        )
    if empty:
        return "nothing", f"Nothing in this photo matched “{result.phrase}”. Try other words, or name its colour."
    share = 100 * float(result.alpha.mean())
    covers = f"{share:.0f} %" if share >= 1 else "less than 1 %"
    sure = "" if result.found is None else f" Confidence {result.confidence:.2f}."
    return "found", f"Cut out: “{result.phrase}”, {covers} of the photo.{sure}"
