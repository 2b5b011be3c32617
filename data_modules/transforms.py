"""From a decoded image to what the network is shown: crop, resize, flip, colour, new background."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from data_modules.phrases import TextRules
from lit_matting.checks import InputError

_LUMA = np.array([0.299, 0.587, 0.114])
_CROP_TRIES = 8
_UNIT = np.arange(256, dtype=np.float32) / np.float32(255)
"""Every 8-bit value in [0, 1]: a table is one pass where a conversion and a division are two."""


@dataclass(frozen=True)
class Box:
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, array: np.ndarray) -> np.ndarray:
        """Return this part of an array, as a view."""
        return array[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class View:
    """One draw of every augmentation: which part, mirrored or not, and an affine change of colour."""

    box: Box
    flip: bool = False
    colour: np.ndarray | None = None
    """(3, 4) matrix that maps (R, G, B, 1) in 8-bit units, or None for no change."""


INTERPOLATION = "area"
"""What :func:`resize` does, in the word that evaluation protocols have for it."""


def resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image or alpha: area means along a side that shrinks, linear along one that grows.

    A thin hair survives area means as a faint alpha; linear sampling would drop it.
    """
    smaller = (min(array.shape[0], height), min(array.shape[1], width))
    if array.shape[:2] != smaller:
        array = cv2.resize(array, smaller[::-1], interpolation=cv2.INTER_AREA)
    if smaller == (height, width):
        return array
    return cv2.resize(array, (width, height), interpolation=cv2.INTER_LINEAR)


def full_view(image: np.ndarray) -> View:
    """Return the view that shows everything unchanged."""
    return View(Box(0, 0, image.shape[0], image.shape[1]))


class Augmentation:
    """Random views of an image that keep its phrases true.

    A phrase with left or right forbids the flip (or changes its words with it, with `swap_sides`); a phrase with a
    place word (left, top, middle, ...) forbids crops below `place_crop_scale`; a phrase with a colour word holds every
    hue change within `colour_word_hue` and allows no brightening (bright colours would clip and change their hue). A
    crop keeps at least `keep_visible` of every instance that a phrase of the image names.

    Args:
        crop_probability: How often a part is shown instead of the whole image.
        crop_scale: Smallest and largest area of that part, as fractions of the image.
        crop_ratio: Smallest and largest width / height of that part, relative to the image's own.
        keep_visible: Least part of a named instance's alpha that must stay inside a crop.
        place_crop_scale: Smallest crop for phrases that name a place.
        flip_probability: How often the image is mirrored.
        swap_sides: Whether an image whose phrases say left or right may be mirrored all the same, the words changed
            over; phrases of which that is not sure (`right behind`, `3 o'clock`) still forbid it.
        brightness: Largest relative change of brightness.
        contrast: Largest relative change of contrast.
        saturation: Largest relative change of saturation.
        hue: Largest change of hue, as a fraction of the colour circle.
        colour_word_hue: Largest change of hue for phrases with a colour word, as a fraction of the colour circle.
        recompose_probability: How often an image with foreground colours is put onto another background, for sources
            that have `backgrounds`.
    """

    def __init__(
        self,
        crop_probability: float = 0.5,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        crop_ratio: tuple[float, float] = (0.8, 1.25),
        keep_visible: float = 0.8,
        place_crop_scale: float = 1.0,
        flip_probability: float = 0.5,
        swap_sides: bool = False,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.05,
        colour_word_hue: float = 0.01,
        recompose_probability: float = 0.5,
    ) -> None:
        for name in (
            "crop_probability",
            "keep_visible",
            "place_crop_scale",
            "flip_probability",
            "recompose_probability",
        ):
            if not 0 <= locals()[name] <= 1:
                raise InputError(f"`augment.{name}` must lie in [0, 1], got {locals()[name]}.")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= locals()[name] < 1:
                raise InputError(f"`augment.{name}` must lie in [0, 1), got {locals()[name]}.")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(
                f"`augment.crop_scale` must be two fractions in (0, 1], small one first, got {crop_scale}."
            )
        if not 0 < crop_ratio[0] <= crop_ratio[1]:
            raise InputError(f"`augment.crop_ratio` must be two positive ratios, small one first, got {crop_ratio}.")
        if not 0 <= colour_word_hue <= 0.02:
            raise InputError(f"`augment.colour_word_hue` must lie in [0, 0.02], got {colour_word_hue}.")
        self.crop_probability, self.crop_scale, self.crop_ratio = crop_probability, tuple(crop_scale), tuple(crop_ratio)
        self.keep_visible, self.place_crop_scale = keep_visible, place_crop_scale
        self.flip_probability, self.swap_sides = flip_probability, swap_sides
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation
        self.hue, self.colour_word_hue = hue, colour_word_hue
        self.recompose_probability = recompose_probability

    def draw(
        self, image: np.ndarray, targets: Mapping[int, np.ndarray], rules: TextRules, generator: np.random.Generator
    ) -> View:
        """Draw one view of an image (H, W, 3) whose named instances have the targets (H, W)."""
        box = self._crop(image, targets, rules, generator)
        # drawn even when it is not allowed: one phrase more or less must not shift every draw after it
        flip = bool(generator.random() < self.flip_probability)
        flip = flip and (not rules.names_side or (self.swap_sides and rules.can_be_mirrored))
        return View(box, flip, self._colour(rules, generator))

    def _crop(
        self, image: np.ndarray, targets: Mapping[int, np.ndarray], rules: TextRules, generator: np.random.Generator
    ) -> Box:
        height, width = image.shape[:2]
        whole = Box(0, 0, height, width)
        low, high = self.crop_scale
        if rules.names_place:
            low, high = max(low, self.place_crop_scale), max(high, self.place_crop_scale)
        if generator.random() >= self.crop_probability or low >= 1:
            return whole
        sums = {number: float(cv2.sumElems(target)[0]) for number, target in targets.items()}
        for _ in range(_CROP_TRIES):
            scale = generator.uniform(low, high)
            ratio = math.exp(generator.uniform(math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])))
            box_height = min(height, max(1, round(height * math.sqrt(scale / ratio))))
            box_width = min(width, max(1, round(width * math.sqrt(scale * ratio))))
            top = int(generator.integers(height - box_height + 1))
            left = int(generator.integers(width - box_width + 1))
            box = Box(top, left, box_height, box_width)
            if all(cv2.sumElems(box.cut(targets[n]))[0] >= self.keep_visible * total for n, total in sums.items()):
                return box
        return whole

    def _colour(self, rules: TextRules, generator: np.random.Generator) -> np.ndarray | None:
        brightness, contrast, saturation, hue = generator.uniform(-1, 1, size=4)
        limit = self.hue
        if rules.names_colour:
            # upward changes clip bright channels, which turns orange towards yellow
            brightness, contrast, saturation = -abs(brightness), -abs(contrast), -abs(saturation)
            limit = min(self.hue, self.colour_word_hue)
        gains = (1 + brightness * self.brightness, 1 + contrast * self.contrast, 1 + saturation * self.saturation)
        if gains == (1, 1, 1) and limit == 0:
            return None
        return colour_matrix(*gains, hue * limit)


def colour_matrix(brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """Return the (3, 4) matrix of a colour change on 8-bit RGB.

    All four are linear, so one pass over the image does them together: hue turns the colour about the grey axis by
    ``hue`` of a full circle, saturation moves it towards its own grey, contrast towards mid grey (127.5), brightness
    towards black.

    Example:
        >>> colour_matrix(1, 1, 1, 0).round(6).tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    """
    angle = 2 * math.pi * hue
    third, root = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    turn = np.eye(3) * math.cos(angle) + third + root * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    grey = np.tile(_LUMA, (3, 1))
    mixed = (grey + saturation * (np.eye(3) - grey)) @ turn
    return np.concatenate([brightness * contrast * mixed, np.full((3, 1), brightness * (1 - contrast) * 127.5)], axis=1)


def show(view: View, image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the view of an image (H, W, 3) uint8 at the given size."""
    shown = resize(view.box.cut(image), height, width)
    if view.flip:
        shown = cv2.flip(shown, 1)
    # after the resize: fewer pixels, and both steps are linear
    return shown if view.colour is None else cv2.transform(shown, view.colour)


def show_target(view: View, target: np.ndarray, height: int, width: int, hard: bool) -> np.ndarray:
    """Return the view of an alpha or mask (H, W) at the given size, in its own type; a hard mask stays hard."""
    shown = resize(view.box.cut(target), height, width)
    if hard:
        most = 65535 if shown.dtype == np.uint16 else 255
        shown = cv2.threshold(shown, most // 2, most, cv2.THRESH_BINARY)[1]
    return cv2.flip(shown, 1) if view.flip else shown


def pictures(images: Sequence[np.ndarray]) -> Tensor:
    """Return images (H, W, 3) uint8 of one size as (B, 3, H, W) float32 in [0, 1]."""
    height, width = images[0].shape[:2]
    # numpy asks for huge pages: fresh memory in small ones costs as much in page faults as the arithmetic
    batch = np.empty((len(images), 3, height, width), np.float32)
    planes = [np.empty((height, width), np.uint8) for _ in range(3)]
    for row, image in zip(batch, images):
        cv2.split(image, planes)
        for channel, plane in enumerate(planes):
            cv2.LUT(plane, _UNIT, dst=row[channel])
    return torch.from_numpy(batch)


def mattes(targets: Sequence[np.ndarray]) -> Tensor:
    """Return alphas or masks (H, W) uint8 or uint16 of one size as (B, 1, H, W) float32 in [0, 1]."""
    batch = np.empty((len(targets), 1, *targets[0].shape), np.float32)
    for row, target in zip(batch, targets):
        if target.dtype == np.uint8:
            cv2.LUT(target, _UNIT, dst=row[0])
        else:
            np.divide(target, np.float32(65535), out=row[0])
    return torch.from_numpy(batch)


def recompose(
    foregrounds: Mapping[int, np.ndarray], targets: Mapping[int, np.ndarray], background: np.ndarray
) -> np.ndarray:
    """Put all instances of an image onto another background by the matting equation.

    Their alphas already account for one another, so the colours simply add up: sum a_i F_i + (1 - sum a_i) B.

    Args:
        foregrounds: (H, W, 3) uint8 colours of every instance.
        targets: (H, W) uint8 or uint16 alpha of every instance.
        background: (h, w, 3) uint8; its middle part of the image's shape is used, resized.
    """
    height, width = next(iter(targets.values())).shape
    scale = max(height / background.shape[0], width / background.shape[1])
    cut_height, cut_width = (
        min(background.shape[0], round(height / scale)),
        min(background.shape[1], round(width / scale)),
    )
    top, left = (background.shape[0] - cut_height) // 2, (background.shape[1] - cut_width) // 2
    back = resize(background[top : top + cut_height, left : left + cut_width], height, width).astype(np.float32)
    left_over = np.ones((height, width, 1), np.float32)
    image = np.zeros((height, width, 3), np.float32)
    for number, target in targets.items():
        alpha = target[..., None] * np.float32(1 / 65535 if target.dtype == np.uint16 else 1 / 255)
        image += alpha * foregrounds[number]
        left_over -= alpha
    image += np.maximum(left_over, 0) * back
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def detail_box(view: View, target: np.ndarray, size: int, generator: np.random.Generator) -> Box:
    """Return where a native-resolution crop of `size` pixels lies: inside the view, on the target's soft border.

    Its centre is drawn from the pixels that are neither clear nor opaque; of a hard mask, from its outline. Where the
    view is smaller than the crop, the crop is as large as the view.
    """
    part = view.box.cut(target)
    top_value = 65535 if part.dtype == np.uint16 else 255
    soft = ((part > 0.01 * top_value) & (part < 0.99 * top_value)).astype(np.uint8)
    if not cv2.hasNonZero(soft):
        hard = (part > top_value // 2).astype(np.uint8)
        soft = cv2.morphologyEx(hard, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    rows, columns = np.nonzero(soft)
    height, width = min(size, part.shape[0]), min(size, part.shape[1])
    if len(rows):
        chosen = int(generator.integers(len(rows)))
        middle = rows[chosen], columns[chosen]
    else:
        middle = part.shape[0] // 2, part.shape[1] // 2
    top = int(np.clip(middle[0] - height // 2, 0, part.shape[0] - height))
    left = int(np.clip(middle[1] - width // 2, 0, part.shape[1] - width))
    return Box(view.box.top + top, view.box.left + left, height, width)
