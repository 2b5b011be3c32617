"""A page of the worst and of the median samples of a test, in a bounded amount of memory."""

from __future__ import annotations

import heapq
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

Picture = NDArray[np.uint8]
MARGIN = 8
CAPTION = 30


@dataclass(frozen=True)
class SamplePicture:
    """One sample, small: image (h, w, 3), truth (h, w) and matte (h, w), uint8."""

    error: float
    caption: str
    image: Picture
    truth: Picture
    matte: Picture


class SamplePictures:
    """Keeps small pictures of the samples with the largest errors, and of a fair random choice of all samples.

    Which sample is the median one is known only at the end, so the median page shows those of the random choice that
    come closest to it: with 256 kept of any number, they lie within a few percent of the middle.

    Args:
        count: Pictures of each sort.
        reserve: Random samples to keep for the median.
        side: Longest side of a picture in pixels.
        seed: Of the random choice.
    """

    def __init__(self, count: int = 16, reserve: int = 256, side: int = 160, seed: int = 0) -> None:
        self.count, self.reserve, self.side = count, reserve, side
        self.worst: list[tuple[float, int, SamplePicture]] = []
        self.chosen: list[SamplePicture] = []
        self._seen = 0
        self._draws = np.random.default_rng(seed)
        self._order = itertools.count()

    def offer(self, error: float, caption: str, image: Tensor, truth: Tensor, matte: Tensor) -> None:
        """Look at one sample and keep a small copy if it is among the worst or drawn by chance.

        Args:
            error: The larger the worse.
            caption: What stands above its pictures.
            image: (3, H, W) in [0, 1].
            truth: (H, W) in [0, 1].
            matte: (H, W) in [0, 1].
        """
        is_worst = self.count > 0 and (len(self.worst) < self.count or error > self.worst[0][0])
        # every sample so far is equally likely to be among the chosen (reservoir sampling)
        place = self._seen if self._seen < self.reserve else int(self._draws.integers(0, self._seen + 1))
        self._seen += 1
        if not is_worst and place >= self.reserve:
            return
        small = [_shrink(item, self.side) for item in (image, truth[None], matte[None])]
        picture = SamplePicture(error, caption, small[0], small[1][..., 0], small[2][..., 0])
        if is_worst:
            push = heapq.heappush if len(self.worst) < self.count else heapq.heapreplace
            push(self.worst, (error, next(self._order), picture))
        if place < self.reserve:
            self.chosen[place : place + 1] = [picture]

    def share(self, median: float) -> tuple[list[SamplePicture], list[SamplePicture]]:
        """Return this process's worst samples and those nearest to the median error."""
        return [picture for _, _, picture in self.worst], nearest(self.chosen, median, self.count)


def nearest(pictures: Sequence[SamplePicture], error: float, count: int) -> list[SamplePicture]:
    """Return the pictures whose errors are nearest to a value, nearest first."""
    return sorted(pictures, key=lambda picture: abs(picture.error - error))[:count]


def page(columns: Sequence[tuple[str, Sequence[SamplePicture]]], side: int) -> bytes:
    """Return a PNG with one titled column per list: image, truth, matte and their difference in each row."""
    width = MARGIN + 4 * (side + MARGIN)
    rows = max((len(pictures) for _, pictures in columns), default=0)
    title_height, row_height = 40, CAPTION + side + MARGIN
    sheet = Image.new("RGB", (width * len(columns), title_height + row_height * rows + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(18), ImageFont.load_default(13)
    for number, (title, pictures) in enumerate(columns):
        left = number * width + MARGIN
        draw.text((left, 10), title, fill="black", font=large)
        for row, picture in enumerate(pictures):
            top = title_height + row * row_height
            draw.text((left, top + 8), _fitting(draw, picture.caption, small, width - 2 * MARGIN), "black", small)
            difference = np.abs(picture.truth.astype(np.int16) - picture.matte).astype(np.uint8)
            for place, array in enumerate((picture.image, picture.truth, picture.matte, difference)):
                sheet.paste(_framed(array, side), (left + place * (side + MARGIN), top + CAPTION))
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    return content.getvalue()


def _framed(array: Picture, side: int) -> Image.Image:
    """Return a picture as large as fits into a square of ``side``."""
    picture = Image.fromarray(array)
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def _shrink(image: Tensor, side: int) -> Picture:
    """Return a (C, H, W) image in [0, 1] as (h, w, C) uint8 with its longer side at most ``side``."""
    image = image.detach().float()[None]
    scale = side / max(image.shape[-2:])
    if scale < 1:
        size = [max(1, round(length * scale)) for length in image.shape[-2:]]
        image = interpolate(image, size=size, mode="bilinear", antialias=True)
    return (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
