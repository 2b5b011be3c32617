"""Making one image: which cut-outs share it, laying them out until every one can be seen and named, and encoding it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_modules.shards import InstanceEntry, Phrase
from lit_matting.checks import InputError
from tools.composing.cutouts import Background, Cutout
from tools.composing.layout import Composite, Layer, composite, crop_background, place, stack_order
from tools.composing.phrases import are_similar, compose_phrases, has_side

Array = np.ndarray

SPLITS = ("train", "val")
# layouts of one group before another group is tried, and groups before giving up
_LAYOUTS, _GROUPS = 24, 40


@dataclass(frozen=True)
class Plan:
    """Everything that decides an image besides its split and number."""

    backgrounds_folder: str
    colours_folder: str
    """Holds ``<cut-out id>.png``: RGBA with the cut-out's own colours."""
    cutouts: dict[str, list[Cutout]]
    """By split."""
    backgrounds: dict[str, list[Background]]
    """By split."""
    cuts: dict[str, tuple[str, ...]]
    """Cut sides by cut-out id."""
    similar: dict[str, frozenset[str]]
    """By cut-out id: the cut-outs, and as ``background/<id>`` the backgrounds, that its phrases might be read as."""
    seed: int
    size: int
    counts: tuple[int, ...]
    similar_share: float
    min_visible: float
    min_area: float
    max_upscale: float
    phrases_per_kind: int
    image_format: str
    quality: int
    with_layers: bool


@dataclass(frozen=True)
class Task:
    """One image to make."""

    split: str
    number: int
    group: tuple[str, ...]
    """Ids of the cut-outs it should hold."""


@dataclass(frozen=True)
class Made:
    """One finished image: what goes into the shard, and its entry in the manifest."""

    key: str
    image: bytes
    instances: list[InstanceEntry]
    background: bytes | None
    source: dict[str, Any]
    record: dict[str, Any]


@dataclass(frozen=True)
class _Scene:
    layers: list[Layer]
    front_to_back: list[int]
    made: Composite
    phrases: list[list[Phrase]]
    background: Background
    crop: dict[str, Any]


@lru_cache(maxsize=256)
def _colours(folder: str, name: str) -> tuple[Array, Array]:
    pixels = cv2.imread(str(Path(folder) / f"{name}.png"), cv2.IMREAD_UNCHANGED).astype(np.float32) / 255
    return pixels[..., 2::-1], pixels[..., 3]


@lru_cache(maxsize=32)
def _picture(path: str) -> Array:
    picture = cv2.imread(path, cv2.IMREAD_COLOR)
    if picture is None:
        raise InputError(f"background {path!r} is not a picture that OpenCV can read.")
    return picture[..., ::-1]


def find_similar(cutouts: list[Cutout], backgrounds: list[Background]) -> dict[str, frozenset[str]]:
    """For each cut-out the cut-outs, and as ``background/<id>`` the backgrounds, that its phrases might be read as."""
    found: dict[str, frozenset[str]] = {}
    for one in cutouts:
        others = [other for other in cutouts if other is not one]
        alike = [c.id for c in others if are_similar(one.names, one.category, c.names, c.category)]
        behind = [f"background/{b.id}" for b in backgrounds if are_similar(one.names, "", (b.name,), "")]
        found[one.id] = frozenset(alike + behind)
    return found


def _spans(cut: tuple[str, ...]) -> bool:
    return {"top", "bottom"} <= set(cut) or {"left", "right"} <= set(cut)


def choose_group(pool: list[str], count: int, with_similar: bool, plan: Plan) -> list[str]:
    """The first ids of an ordered pool that may share an image; at most one of them must span it.

    With ``with_similar`` the second resembles the first, where there is such a one; never more than that one pair.
    """
    group = [pool[0]]

    def has_room(name: str) -> bool:
        return name not in group and not (_spans(plan.cuts[name]) and any(_spans(plan.cuts[one]) for one in group))

    if with_similar and count > 1:
        group += [name for name in pool[1:] if has_room(name) and name in plan.similar[group[0]]][:1]
    for name in pool[1:]:
        if len(group) >= count:
            break
        if has_room(name) and not any(name in plan.similar[one] for one in group):
            group.append(name)
    return group


def plan_tasks(plan: Plan, split: str, images: int) -> list[Task]:
    """One task per image of a split, each cut-out used about equally often."""
    rng = np.random.default_rng([plan.seed, SPLITS.index(split), 1])
    ids = [cutout.id for cutout in plan.cutouts[split]]
    queue: list[str] = []
    tasks = []
    for number in range(images):
        count, with_similar = int(rng.choice(plan.counts)), bool(rng.random() < plan.similar_share)
        while len(queue) < 3 * len(ids):
            queue += [ids[i] for i in rng.permutation(len(ids))]
        group = choose_group(queue, count, with_similar, plan)
        for name in group:
            queue.remove(name)
        tasks.append(Task(split, number, tuple(group)))
    return tasks


def make_image(plan: Plan, task: Task) -> Made:
    """Make one image; a pure function of its arguments.

    If no layout of the group shows and tells apart all its members, another group takes its place.

    Raises:
        InputError: If none is found; the message says what to change.
    """
    rng = np.random.default_rng([plan.seed, SPLITS.index(task.split), 2, task.number])
    by_id = {cutout.id: cutout for cutout in plan.cutouts[task.split]}
    group = list(task.group)
    for _ in range(_GROUPS):
        for _ in range(_LAYOUTS if len(group) >= min(plan.counts) else 0):
            members = [by_id[name] for name in group]
            scene = _attempt(plan, members, task.split, rng)
            if scene is not None:
                return _finish(plan, task, members, scene)
        ids = list(by_id)
        group = choose_group([ids[i] for i in rng.permutation(len(ids))], min(plan.counts), False, plan)
    raise InputError(
        f"no layout was found for image {task.number} of {task.split}: its {len(by_id)} cut-outs are too alike or too"
        " large to share an image; add cut-outs, or lower --min-visible or --min-area."
    )


def _attempt(plan: Plan, group: list[Cutout], split: str, rng: np.random.Generator) -> _Scene | None:
    """One random layout with its phrases, or None if an instance is hidden, too small, or has no phrase."""
    sources = [(*_colours(plan.colours_folder, cutout.id), plan.cuts[cutout.id]) for cutout in group]
    may_flip = [not any(map(has_side, cutout.names)) for cutout in group]
    layers = place(sources, may_flip, plan.size, plan.max_upscale, rng)
    front_to_back = stack_order(layers, rng)
    if not _is_open(layers, front_to_back, plan.min_visible):
        return None
    clash = frozenset[str]().union(*(plan.similar[cutout.id] for cutout in group))
    pool = [b for b in plan.backgrounds[split] if f"background/{b.id}" not in clash] or plan.backgrounds[split]
    background = pool[int(rng.integers(len(pool)))]
    picture, crop = crop_background(_picture(str(Path(plan.backgrounds_folder) / background.file)), plan.size, rng)
    made = composite(layers, front_to_back, picture)
    if any(item.visible < plan.min_visible or item.area < plan.min_area for item in made.geometry):
        return None
    similar = np.array([[one.id in plan.similar[other.id] for other in group] for one in group])
    names = [cutout.names for cutout in group]
    phrases = compose_phrases(names, similar, made.geometry, made.occlusion, plan.phrases_per_kind, rng)
    return _Scene(layers, front_to_back, made, phrases, background, crop) if all(phrases) else None


def _is_open(layers: list[Layer], front_to_back: list[int], min_visible: float) -> bool:
    """Whether enough of every layer can be seen: a quick look at every fourth pixel before the work is done."""
    clear: Array | float = 1.0
    for i in front_to_back:
        own = layers[i].alpha[::4, ::4]
        if float((own * clear).sum()) < 0.9 * min_visible * float(own.sum()):
            return False
        clear = clear * (1 - own)
    return True


def _encode(image: Array, extension: str, quality: int) -> bytes:
    options = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, quality], "webp": [cv2.IMWRITE_WEBP_QUALITY, quality]}
    return cv2.imencode(f".{extension}", image[..., ::-1], options.get(extension, []))[1].tobytes()


def _finish(plan: Plan, task: Task, group: list[Cutout], scene: _Scene) -> Made:
    key, made = f"{task.split}-{task.number:06d}", scene.made
    instances, records = [], []
    for i, (cutout, layer, where) in enumerate(zip(group, scene.layers, made.geometry)):
        details: dict[str, Any] = {
            "cutout": cutout.id,
            "centre": [round(where.x, 4), round(where.y, 4)],
            "box": [round(value, 4) for value in where.box],
            "area": round(where.area, 5),
            "visible": round(where.visible, 4),
            "depth": scene.front_to_back.index(i),
        }
        instances.append(
            InstanceEntry(
                id=str(i),
                target=cv2.imencode(".png", made.alphas[i])[1].tobytes(),
                phrases=scene.phrases[i],
                category=cutout.category,
                foreground=_encode(made.foregrounds[i], "png", 0) if plan.with_layers else None,
                extra=details,
            )
        )
        records.append(
            {
                **details,
                "name": cutout.names[0],
                "scale": round(layer.scale, 4),
                "flipped": layer.flipped,
                "corner": list(layer.corner),
                "hides": [round(float(value), 4) for value in made.occlusion[i]],
                "phrases": [{"text": phrase.text, "kind": phrase.kind} for phrase in scene.phrases[i]],
            }
        )
    source = {"background": scene.background.id, **scene.crop}
    return Made(
        key=key,
        image=_encode(made.image, plan.image_format, plan.quality),
        instances=instances,
        background=_encode(made.background, "jpg", plan.quality) if plan.with_layers else None,
        source=source,
        record={"key": key, "split": task.split, "background": source, "instances": records},
    )
