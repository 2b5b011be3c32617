"""Generated scenes: named objects with true fractional alpha on textured backgrounds, and phrases that pick one.

Where no data set can be had, a scene is worth more than a photograph: its alphas are exact, its phrases are provably
unambiguous, and its distractors can be chosen so that only reading helps. A scene is a pure function of
(seed, index, size); no file is read.

Objects have a shape, a colour, a material, a size and a position. Materials differ in their alpha: *solid* has an
antialiased edge, *furry* a fringe of strands, *glass* a transparent body with a denser rim, *smoky* no edge at all. The
image is composited by the matting equation ``I = alpha F + (1 - alpha) B``, back to front, and the alpha stored for an
object is what an observer can still see of it: ``a_i prod_j (1 - a_j)`` over the objects ``j`` in front of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

Array = np.ndarray

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (0.82, 0.13, 0.12),
    "orange": (0.95, 0.52, 0.08),
    "yellow": (0.95, 0.87, 0.16),
    "green": (0.15, 0.62, 0.20),
    "blue": (0.12, 0.28, 0.85),
    "purple": (0.52, 0.16, 0.66),
    "white": (0.95, 0.95, 0.94),
    "black": (0.07, 0.07, 0.08),
}
MATERIALS = ("solid", "furry", "glass", "smoky")
KINDS = ("colour", "shape", "material", "position", "size", "compound")
"""What a phrase tells its object by; ``compound`` needs two attributes because each alone fits two objects."""

_HEADS = ("one", "thing", "object", "item")
_POSITIONS = {
    "left": ("the {head} on the left", "the leftmost {head}", "the {head} on the left side"),
    "right": ("the {head} on the right", "the rightmost {head}", "the {head} on the right side"),
    "top": ("the {head} at the top", "the topmost {head}", "the highest {head}"),
    "bottom": ("the {head} at the bottom", "the lowest {head}", "the {head} down at the bottom"),
}
_SIZES = {
    "large": ("the largest {head}", "the big {head}", "the biggest {head}"),
    "small": ("the smallest {head}", "the small {head}", "the little {head}"),
}
# the next object must be this far away, as a share of the image, before "leftmost" means anything to an eye
_POSITION_MARGIN = 0.12
_SIZE_MARGIN = 1.3
# an object of which less than this share is still visible cannot fairly be asked for
_VISIBLE_SHARE = 0.6


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene. Lengths are shares of the image's side."""

    shape: str
    colour: str
    material: str
    x: float
    y: float
    radius: float
    angle: float
    """Radians."""


@dataclass(frozen=True)
class Scene:
    """A generated image with everything known about it."""

    image: Array
    """(H, W, 3) float32 RGB in [0, 1]."""
    alphas: Array
    """(K, H, W) float32 in [0, 1]: the visible alpha of each object, occluders accounted for."""
    foregrounds: Array
    """(K, H, W, 3) float32: each object's own colours."""
    background: Array
    """(H, W, 3) float32."""
    objects: tuple[SceneObject, ...]
    """Back to front."""
    phrases: tuple[tuple[tuple[str, str], ...], ...]
    """For each object its (phrase, kind) pairs, every one true of this object alone."""


def generate(seed: int, index: int, size: int = 128) -> Scene:
    """Return scene ``index`` of the stream ``seed``, ``size`` pixels on a side."""
    rng = np.random.default_rng([seed, index])
    while True:
        objects = _arrange(rng)
        layers = [_render(item, size, rng) for item in objects]
        alphas = visible_alphas(np.stack([alpha for alpha, _ in layers]))
        visible = alphas.sum((1, 2)) / np.array([alpha.sum() + 1e-6 for alpha, _ in layers])
        phrases = tuple(_phrases(objects, k, rng) for k in range(len(objects)))
        if visible.min() >= _VISIBLE_SHARE and all(phrases):
            break
    background = _background(size, rng)
    image = background
    for alpha, colours in layers:
        image = alpha[..., None] * colours + (1 - alpha[..., None]) * image
    return Scene(image, alphas, np.stack([colours for _, colours in layers]), background, objects, phrases)


def scenes(seed: int, count: int, size: int = 128, start: int = 0) -> Iterator[Scene]:
    """Yield scenes ``start`` to ``start + count - 1`` of a stream."""
    for index in range(start, start + count):
        yield generate(seed, index, size)


def visible_alphas(alphas: Array) -> Array:
    """Return what remains visible of layers (K, H, W) ordered back to front: ``a_i prod_{j > i} (1 - a_j)``.

    Example:
        >>> visible_alphas(np.array([[[1.0]], [[0.25]]])).flatten().tolist()
        [0.75, 0.25]
    """
    clear = np.ones_like(alphas[0])
    result = np.empty_like(alphas)
    for index in range(len(alphas) - 1, -1, -1):
        result[index] = alphas[index] * clear
        clear = clear * (1 - alphas[index])
    return result


# --- what stands where ------------------------------------------------------------------------------------------------


def _arrange(rng: np.random.Generator) -> tuple[SceneObject, ...]:
    count = int(rng.integers(2, 4))
    traits = [
        [str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), str(rng.choice(MATERIALS))] for _ in range(count)
    ]
    # distractors share an attribute, so that half a phrase does not find the thing
    for k in range(1, count):
        if rng.random() < 0.65:
            which = int(rng.integers(3))
            traits[k][which] = traits[int(rng.integers(k))][which]
    placed: list[SceneObject] = []
    while len(placed) < count:
        radius = float(rng.uniform(0.1, 0.23))
        x, y = (float(value) for value in rng.uniform(radius * 0.8, 1 - radius * 0.8, 2))
        # neighbours may touch and overlap a little: occlusion is part of the matter
        if all(math.hypot(x - o.x, y - o.y) > 0.8 * (radius + o.radius) for o in placed):
            shape, colour, material = traits[len(placed)]
            angle = float(rng.uniform(-0.4, 0.4))
            placed.append(SceneObject(shape, colour, material, x, y, radius, angle))
        elif rng.random() < 0.02:
            placed.clear()
    return tuple(placed)


def _phrases(objects: tuple[SceneObject, ...], k: int, rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
    """Return one phrase of every kind that singles out object ``k``."""
    me, others = objects[k], [item for index, item in enumerate(objects) if index != k]

    def head() -> str:
        return str(rng.choice(_HEADS))

    def alone(*attributes: str) -> bool:
        return not any(all(getattr(other, a) == getattr(me, a) for a in attributes) for other in others)

    found: list[tuple[str, str]] = []
    if alone("colour"):
        found.append((f"the {me.colour} {head()}", "colour"))
    if alone("shape"):
        found.append((f"the {me.shape}", "shape"))
    if alone("material"):
        found.append((f"the {me.material} {head()}", "material"))
    margins = {
        "left": min(other.x for other in others) - me.x,
        "right": me.x - max(other.x for other in others),
        "top": min(other.y for other in others) - me.y,
        "bottom": me.y - max(other.y for other in others),
    }
    places = [place for place, margin in margins.items() if margin > _POSITION_MARGIN]
    if places:
        template = str(rng.choice(_POSITIONS[str(rng.choice(places))]))
        found.append((template.format(head=head()), "position"))
    if me.radius > _SIZE_MARGIN * max(other.radius for other in others):
        found.append((str(rng.choice(_SIZES["large"])).format(head=head()), "size"))
    if me.radius * _SIZE_MARGIN < min(other.radius for other in others):
        found.append((str(rng.choice(_SIZES["small"])).format(head=head()), "size"))
    pairs = [("colour", "shape"), ("material", "shape"), ("colour", "material")]
    needed = [pair for pair in pairs if alone(*pair) and not alone(pair[0]) and not alone(pair[1])]
    helpful = [pair for pair in pairs if alone(*pair) and not (alone(pair[0]) and alone(pair[1]))]
    for choices in (needed, helpful):
        if choices:
            first, second = choices[int(rng.integers(len(choices)))]
            noun = me.shape if second == "shape" else f"{me.material} {head()}"
            found.append((f"the {getattr(me, first)} {noun}", "compound"))
            break
    return tuple(found)


# --- what it looks like -----------------------------------------------------------------------------------------------


def _noise(size: int, cells: int, rng: np.random.Generator, channels: int = 1) -> Array:
    """Return smooth noise (size, size, channels) in about [0, 1] with features of ``size / cells`` pixels."""
    coarse = rng.random((cells + 2, cells + 2, channels), dtype=np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC).reshape(size, size, channels)


def _background(size: int, rng: np.random.Generator) -> Array:
    # muted: saturated colours belong to the objects
    image = rng.uniform(0.2, 0.8) + rng.normal(0, 0.05, 3)
    cells = int(rng.integers(1, 4))
    image = image + 0.25 * (_noise(size, cells, rng) - 0.5) + 0.2 * (_noise(size, cells, rng, 3) - 0.5)
    for cells in (6, 14, 30):
        image = image + rng.uniform(0.03, 0.16) * (_noise(size, cells, rng) - 0.5)
    if rng.random() < 0.5:  # planks, tiles, blinds
        angle, period = rng.uniform(0, math.pi), rng.uniform(0.06, 0.25) * size
        yy, xx = np.mgrid[:size, :size].astype(np.float32)
        wave = np.sin((xx * math.cos(angle) + yy * math.sin(angle)) * 2 * math.pi / period + rng.uniform(0, 6))
        image = image + rng.uniform(0.03, 0.12) * np.tanh(rng.uniform(1, 4) * wave)[..., None]
    return np.clip(image, 0, 1).astype(np.float32)


def _distance(shape: str, u: Array, v: Array) -> Array:
    """Return the signed distance (about; negative inside) to the outline of a shape of unit radius."""
    if shape == "circle":
        return np.hypot(u, v) - 1.0
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.85
    if shape == "triangle":  # three half-planes at 120 degrees, point upwards
        sides = [u * math.cos(a) + v * math.sin(a) for a in (math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6)]
        return np.maximum.reduce(sides) - 0.58
    if shape == "star":  # folded into one tenth: the line from an outer to an inner corner
        angle = np.abs((np.arctan2(u, -v) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
        radius = np.hypot(u, v)
        outer = np.array([1.15, 0.0])
        inner = 0.5 * np.array([math.cos(math.pi / 5), math.sin(math.pi / 5)])
        along = (inner - outer) / np.linalg.norm(inner - outer)
        return (radius * np.cos(angle) - outer[0]) * along[1] - (radius * np.sin(angle) - outer[1]) * along[0]
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.74) - 0.28
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 1.05, b - 0.33), np.maximum(b - 1.05, a - 0.33))
    raise ValueError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}.")


def _render(item: SceneObject, size: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return the object's own alpha (H, W) and colours (H, W, 3), before anything stands in front of it."""
    # only the window that the object can reach is drawn, supersampled: strands are thinner than a pixel
    scale, reach = 2, item.radius * size
    margin = 1.6 * reach + 2
    left, right = (int(np.clip(round(item.x * size + side * margin), 0, size)) for side in (-1, 1))
    top, bottom = (int(np.clip(round(item.y * size + side * margin), 0, size)) for side in (-1, 1))
    yy, xx = np.mgrid[top * scale : bottom * scale, left * scale : right * scale].astype(np.float32) + 0.5
    dx, dy = xx / scale - item.x * size, yy / scale - item.y * size
    u = (dx * math.cos(item.angle) + dy * math.sin(item.angle)) / reach
    v = (-dx * math.sin(item.angle) + dy * math.cos(item.angle)) / reach
    distance = (_distance(item.shape, u, v) * reach * scale).astype(np.float32)  # in supersampled pixels
    drawn = cv2.resize(
        _material_alpha(item.material, distance, reach * scale, rng),
        (right - left, bottom - top),
        interpolation=cv2.INTER_AREA,
    )
    alpha = np.zeros((size, size), np.float32)
    alpha[top:bottom, left:right] = np.where(drawn < 1 / 255, 0, drawn)

    base = np.array(COLOURS[item.colour]) + rng.normal(0, 0.025, 3)
    shade = 0.26 * (_noise(size, 5, rng) - 0.5) + 0.14 * (_noise(size, 24, rng) - 0.5)
    light = rng.normal(0, 0.1, 2)
    yy, xx = np.mgrid[:size, :size].astype(np.float32) / size
    shade = shade + (light[0] * (xx - item.x) + light[1] * (yy - item.y))[..., None] / item.radius
    if item.material == "glass":  # a highlight, as on a bottle
        near = np.hypot(xx - item.x + 0.35 * item.radius, yy - item.y + 0.35 * item.radius) / item.radius
        shade = shade + 0.5 * np.exp(-((near / 0.25) ** 2))[..., None]
    if item.material == "furry":
        shade = shade + 0.25 * (rng.random((size, size, 1), dtype=np.float32) - 0.5)
    return alpha, np.clip(base + shade, 0, 1).astype(np.float32)


def _material_alpha(material: str, distance: Array, reach: float, rng: np.random.Generator) -> Array:
    """Return the alpha of a material around an outline, from the signed distance to it in supersampled pixels."""
    solid = np.clip(0.5 - distance, 0, 1)
    if material == "solid":
        return solid
    if material == "furry":
        return np.maximum(np.clip(0.5 - (distance + 1.5) / 2, 0, 1), _strands(distance, reach, rng))
    if material == "glass":
        rim = np.exp(-(((distance + 0.07 * reach) / (0.07 * reach)) ** 2))
        return solid * np.clip(rng.uniform(0.3, 0.5) + 0.45 * rim, 0, 1)
    softness = rng.uniform(0.16, 0.26) * reach
    side = max(distance.shape)
    cells = max(3, round(side / (0.35 * reach)))
    puffs = np.clip(0.55 + 0.9 * (_noise(side, cells, rng)[: distance.shape[0], : distance.shape[1], 0] - 0.2), 0.25, 1)
    alpha = puffs / (1 + np.exp(np.clip((distance + 0.3 * softness) / (0.5 * softness), -30, 30)))
    return np.where(alpha < 0.02, 0, 0.92 * alpha).astype(np.float32)


def _strands(distance: Array, reach: float, rng: np.random.Generator) -> Array:
    """Return the alpha of strands that grow outwards from an outline; ``distance`` is supersampled."""
    edge_y, edge_x = np.nonzero(np.abs(distance + 2) < 1.5)
    if not len(edge_x):
        return np.zeros_like(distance)
    chosen = rng.integers(len(edge_x), size=int(4.5 * reach))
    y, x = edge_y[chosen], edge_x[chosen]
    height, width = distance.shape
    gx = distance[y, np.minimum(x + 1, width - 1)] - distance[y, np.maximum(x - 1, 0)]
    gy = distance[np.minimum(y + 1, height - 1), x] - distance[np.maximum(y - 1, 0), x]
    heading = np.arctan2(gy, gx) + rng.normal(0, 0.35, len(x))
    bend = rng.normal(0, 0.5, len(x))
    length = reach * rng.uniform(0.12, 0.38, len(x))
    steps = np.linspace(0, 1, 5)
    turning = heading[:, None] + bend[:, None] * steps
    px = x[:, None] + length[:, None] * steps * np.cos(turning)
    py = y[:, None] + length[:, None] * steps * np.sin(turning)
    lines = np.round(np.stack([px, py], -1) * 16).astype(np.int32)  # four fractional bits
    canvas = np.zeros((height, width), np.uint8)
    cv2.polylines(canvas, list(lines), False, 255, 1, cv2.LINE_AA, 4)
    return canvas.astype(np.float32) / 255
