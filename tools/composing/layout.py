"""Where cut-outs go in an image, and the matting equation that puts them there."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from tools.composing.cutouts import resize_colours

Array = np.ndarray

# transparent (or, at a cut side, repeated) pixels around a cut-out before it is resized: antialiases the edge of a
# tight crop, and keeps the edge of a cut side opaque
_MARGIN = 2


@dataclass(frozen=True)
class Layer:
    """One cut-out as it lies in the image: full-size colours and alpha before anything occludes it."""

    foreground: Array
    """(S, S, 3) float32 in [0, 1]."""
    alpha: Array
    """(S, S) float32 in [0, 1]."""
    scale: float
    """Pixels of the image per pixel of the cut-out."""
    flipped: bool
    corner: tuple[int, int]
    """Left, top of the resized cut-out's frame, in pixels; negative where it hangs over the border."""


@dataclass(frozen=True)
class Geometry:
    """Where one instance is, of what can be seen of it. Lengths are shares of the image's side."""

    x: float
    """Centre of mass of the visible alpha."""
    y: float
    box: tuple[float, float, float, float]
    """Left, top, width, height of the pixels with visible alpha above 0.1."""
    area: float
    """Share of the image's pixels with visible alpha above 0.1."""
    visible: float
    """Visible alpha over the instance's own alpha inside the image."""


@dataclass(frozen=True)
class Composite:
    """A finished image, all 8 bit."""

    image: Array
    """(S, S, 3) RGB."""
    alphas: Array
    """(K, S, S): what can be seen of each instance; their sum is at most 255 everywhere."""
    foregrounds: Array
    """(K, S, S, 3) RGB."""
    background: Array
    """(S, S, 3) RGB."""
    geometry: tuple[Geometry, ...]
    occlusion: Array
    """(K, K): [i, j] is the share of j's alpha that i hides (0 where i lies below j)."""


def resize_cutout(foreground: Array, alpha: Array, scale: float, cut: tuple[str, ...]) -> tuple[Array, Array, int]:
    """Resize a cut-out inside a thin margin; returns colours, alpha, and how wide the margin became."""
    pad = [(_MARGIN, _MARGIN), (_MARGIN, _MARGIN)]
    alpha = np.pad(alpha, pad)
    for side in cut:
        view = alpha if side in ("top", "bottom") else alpha.T
        view = view if side in ("top", "left") else view[::-1]
        view[:_MARGIN] = view[_MARGIN]
    foreground = np.pad(foreground, [*pad, (0, 0)], mode="edge")
    size = (max(2, round(alpha.shape[1] * scale)), max(2, round(alpha.shape[0] * scale)))
    colours, soft = resize_colours(foreground, alpha, size)
    # less than half of an 8-bit step is nothing
    soft[soft < 0.5 / 255] = 0
    return colours, soft, int(np.ceil(_MARGIN * scale)) + 1


def mirrored(cut: tuple[str, ...]) -> tuple[str, ...]:
    """The cut sides after a horizontal flip."""
    return tuple({"left": "right", "right": "left"}.get(side, side) for side in cut)


def choose_scale(
    shape: tuple[int, int], cut: tuple[str, ...], size: int, count: int, max_upscale: float, rng: np.random.Generator
) -> float:
    """A natural size for the cut-out: a share of the image, no blurry enlargement; spanning where it was cut twice."""
    height, width = shape
    spans = [
        size / (length - 4)
        for length, ends in ((height, ("top", "bottom")), (width, ("left", "right")))
        if set(ends) <= set(cut)
    ]
    if spans:
        return max(spans) * rng.uniform(1.03, 1.1)
    # an object that the frame cut was close to the camera
    low, high = (0.45, 0.85) if cut else (0.32, 0.72)
    if count != 2:
        # what a photograph is of fills it; three have to share
        factor = 1.45 if count == 1 else 0.85
        low, high = factor * low, factor * high
    target = rng.uniform(low, high) * size
    # long thin things would otherwise be nothing but thin
    length = max(height, width) ** 0.7 * np.sqrt(height * width) ** 0.3
    scale = min(target / length, 0.95 * size / max(height, width))
    return float(min(scale, max_upscale))


def _place_axis(
    length: int, margin: int, size: int, low_cut: bool, high_cut: bool, wanted: float, rng: np.random.Generator
) -> int:
    """Offset of a frame along one axis: cut ends beyond the border, free ends inside, the centre near ``wanted``."""
    hang = rng.uniform(0, 0.05)
    if low_cut and high_cut:
        first, last = size + margin - length, -margin
        return int(rng.integers(min(first, last), max(first, last) + 1))
    if low_cut:
        return -margin - int(hang * length)
    if high_cut:
        return size + margin - length + int(hang * length)
    first, last = sorted((0, size - length))
    return int(np.clip(round(wanted * size - length / 2), first, last))


def place(
    cutouts: list[tuple[Array, Array, tuple[str, ...]]],
    may_flip: list[bool],
    size: int,
    max_upscale: float,
    rng: np.random.Generator,
) -> list[Layer]:
    """Lay cut-outs (colours, alpha, cut sides) out at random, spread over the image; one layer each, in their order."""
    count = len(cutouts)
    flips = [bool(flip and rng.random() < 0.5) for flip in may_flip]
    cuts = [mirrored(cut) if flip else cut for (_, _, cut), flip in zip(cutouts, flips)]
    # one column each, so that left and right mean something; things cut at the left stand in the left column
    order = sorted(range(count), key=lambda i: ("right" in cuts[i]) - ("left" in cuts[i]) + 0.5 * rng.random())
    layers: list[Layer] = []
    for i, (foreground, alpha, _) in enumerate(cutouts):
        if flips[i]:
            foreground, alpha = foreground[:, ::-1], alpha[:, ::-1]
        scale = choose_scale(alpha.shape, cuts[i], size, count, max_upscale, rng)
        colours, soft, margin = resize_cutout(foreground, alpha, scale, cuts[i])
        height, width = soft.shape
        x = (order.index(i) + 0.5) / count + rng.normal(0, 0.1)
        # things stand lower more often than they hang
        y = rng.beta(2.4, 1.8)
        left = _place_axis(width, margin, size, "left" in cuts[i], "right" in cuts[i], x, rng)
        top = _place_axis(height, margin, size, "top" in cuts[i], "bottom" in cuts[i], y, rng)
        full_alpha, full_colour = np.zeros((size, size), np.float32), np.zeros((size, size, 3), np.float32)
        y0, y1, x0, x1 = max(top, 0), min(top + height, size), max(left, 0), min(left + width, size)
        source = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
        full_alpha[y0:y1, x0:x1], full_colour[y0:y1, x0:x1] = soft[source], colours[source]
        layers.append(Layer(full_colour, full_alpha, scale, flips[i], (left, top)))
    return layers


def stack_order(layers: list[Layer], rng: np.random.Generator) -> list[int]:
    """Instances from the front to the back: small things mostly in front of large ones, or they would vanish."""
    return sorted(range(len(layers)), key=lambda i: float(layers[i].alpha.sum()) * rng.uniform(0.6, 1.6))


def composite(layers: list[Layer], front_to_back: list[int], background: Array) -> Composite:
    """Composite by the matting equation ``I = sum_i a_i F_i + (1 - sum_i a_i) B`` with visible alphas.

    The visible alpha of instance i is ``alpha_i prod_j (1 - alpha_j)`` over those in front of it. The equation is
    applied to the stored (gamma-encoded) values, as RefMatte, Deep Image Matting and the colour estimators that a
    cut-out is later made with all do: in linear light the same soft edge would have another alpha, and a model trained
    on it would disagree with every benchmark.

    Visible alphas are rounded as differences of the rounded cumulative cover, and the image is made from the rounded
    values: the stored alphas never sum to more than 255, and the stored equation holds to half a step.

    Args:
        layers: One per instance.
        front_to_back: Their indices, nearest first.
        background: (S, S, 3) uint8.
    """
    count, size = len(layers), background.shape[0]
    alphas = np.zeros((count, size, size), np.uint8)
    clear = np.ones((size, size), np.float64)
    covered = np.zeros((size, size), np.int64)
    occlusion = np.zeros((count, count))
    for position, i in enumerate(front_to_back):
        own = layers[i].alpha.astype(np.float64)
        for j in front_to_back[:position]:
            occlusion[j, i] = float((own * layers[j].alpha).sum() / max(own.sum(), 1e-9))
        clear *= 1 - own
        total = np.rint(255 * (1 - clear)).astype(np.int64)
        alphas[i] = total - covered
        covered = total
    foregrounds = np.stack([np.rint(255 * layer.foreground).astype(np.uint8) for layer in layers])
    weights = alphas.astype(np.float64)[..., None] / 255
    blend = (weights * foregrounds).sum(axis=0) + (1 - weights.sum(axis=0)) * background
    image = np.clip(np.rint(blend), 0, 255).astype(np.uint8)
    geometry = tuple(measure(alphas[i], layers[i].alpha) for i in range(count))
    return Composite(image, alphas, foregrounds, background, geometry, occlusion)


def measure(visible: Array, own: Array) -> Geometry:
    """Where an instance is, from its visible 8-bit alpha (S, S) and its own alpha (S, S) in [0, 1]."""
    size = visible.shape[0]
    mass = visible.astype(np.float64)
    total = mass.sum()
    if total == 0:
        return Geometry(0.5, 0.5, (0.0, 0.0, 0.0, 0.0), 0.0, 0.0)
    places = (np.arange(size) + 0.5) / size
    seen = visible > 25
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    box = (0.0, 0.0, 0.0, 0.0)
    if rows.size:
        box = (
            columns[0] / size,
            rows[0] / size,
            (columns[-1] + 1 - columns[0]) / size,
            (rows[-1] + 1 - rows[0]) / size,
        )
    return Geometry(
        x=float((mass.sum(axis=0) * places).sum() / total),
        y=float((mass.sum(axis=1) * places).sum() / total),
        box=tuple(float(value) for value in box),  # type: ignore[arg-type]
        area=float(seen.mean()),
        visible=float(total / 255 / max(float(own.sum()), 1e-9)),
    )


def crop_background(picture: Array, size: int, rng: np.random.Generator) -> tuple[Array, dict[str, object]]:
    """A random square of a picture (H, W, 3) uint8 at the wanted size, and what was taken from where."""
    height, width = picture.shape[:2]
    short = min(height, width)
    side = round(short * rng.uniform(0.75, 1.0))
    # a blurry background behind sharp objects gives them away
    side = max(side, min(short, int(np.ceil(size / 1.4))))
    top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    flipped = bool(rng.random() < 0.5)
    crop = picture[top : top + side, left : left + side]
    if flipped:
        crop = crop[:, ::-1]
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    resized = cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=method)
    return resized, {"crop": [left, top, side, side], "flipped": flipped}
