"""Generated scenes: exact alphas, phrases that fit one object only (by a second opinion), the same scene again."""

from __future__ import annotations

import math
import re
from collections import Counter

import cv2
import numpy as np
import pytest

from data_modules import scenes as generator
from data_modules.scenes import (
    COLOURS,
    KINDS,
    MATERIALS,
    SHAPES,
    Scene,
    SceneObject,
    generate,
    scenes,
    visible_alphas,
)


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return list(scenes(seed=7, count=120, size=48))


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_image_is_what_the_matting_equation_makes_of_its_parts(many: list[Scene]) -> None:
    for scene in many:
        # collapsed over all layers: I = sum of visible alphas times foregrounds, and the background for the rest
        covered = scene.alphas.sum(0)
        image = (scene.alphas[..., None] * scene.foregrounds).sum(0) + (1 - covered)[..., None] * scene.background
        assert np.abs(image - scene.image).max() < 1e-5


def test_visible_alphas_share_every_pixel_between_objects_and_background(many: list[Scene]) -> None:
    for scene in many:
        assert scene.alphas.min() >= 0
        assert scene.alphas.sum(0).max() <= 1 + 1e-5


def test_what_is_in_front_hides_what_is_behind() -> None:
    layers = np.random.default_rng(0).random((3, 4, 5))
    back, middle, front = visible_alphas(layers)
    assert np.allclose(front, layers[2])
    assert np.allclose(middle, layers[1] * (1 - layers[2]))
    assert np.allclose(back, layers[0] * (1 - layers[1]) * (1 - layers[2]))
    background = np.prod(1 - layers, axis=0)
    assert np.allclose(back + middle + front + background, 1)


def test_opaque_object_in_front_leaves_nothing_of_what_it_covers(many: list[Scene]) -> None:
    covered = 0
    for scene in many:
        for index, alpha in enumerate(scene.alphas):
            opaque = scene.alphas[index + 1 :].max(0, initial=0) > 0.999
            covered += int(opaque.sum())
            assert alpha[opaque].max(initial=0) < 2e-3
    assert covered > 1000


def test_alphas_are_the_objects_own_less_what_stands_in_front_and_most_of_each_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[np.ndarray] = []
    render = generator._render

    def remember(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
        alpha, colours = render(*arguments)
        drawn.append(alpha)
        return alpha, colours

    monkeypatch.setattr(generator, "_render", remember)
    shares = []
    for index in range(60):
        scene = generate(21, index, 48)
        own = drawn[-len(scene.objects) :]  # earlier ones are of arrangements that were thrown away
        for k, alpha in enumerate(scene.alphas):
            clear = np.ones((48, 48))
            for above in own[k + 1 :]:
                clear *= 1 - above.astype(np.float64)
            assert np.allclose(alpha, own[k] * clear, atol=1e-6)
            shares.append(alpha.sum() / own[k].sum())
    assert min(shares) >= 0.6
    assert np.mean(np.array(shares) < 0.98) > 0.05  # occlusion does happen


def test_object_lies_where_its_description_says(many: list[Scene]) -> None:
    for scene in many:
        if len(scene.objects) != 2:
            continue
        for item, alpha in zip(scene.objects, scene.alphas):
            rows, columns = np.nonzero(alpha > 0.1)
            size = alpha.shape[0]
            reach = 1.6 * item.radius + 3 / size
            assert np.abs(columns / size - item.x).max() < reach
            assert np.abs(rows / size - item.y).max() < reach


def test_object_has_the_colour_its_description_says(many: list[Scene]) -> None:
    right = 0
    solid = [(scene, k) for scene in many for k, item in enumerate(scene.objects) if item.material == "solid"]
    for scene, k in solid:
        mean = scene.image[scene.alphas[k] > 0.95].mean(0)
        nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - mean).sum())
        right += nearest == scene.objects[k].colour
    assert len(solid) > 40
    assert right >= 0.95 * len(solid)  # light and shade may bring orange near yellow


def shape_outline(item: SceneObject, size: int) -> np.ndarray:
    """The object's shape drawn as a polygon by OpenCV, far from the generator's distance functions."""

    def place(points: list[tuple[float, float]]) -> np.ndarray:
        turn = np.array([[math.cos(item.angle), -math.sin(item.angle)], [math.sin(item.angle), math.cos(item.angle)]])
        pixels = (np.array(points) @ turn.T * item.radius + np.array([item.x, item.y])) * 4 * size - 0.5
        return np.round(pixels).astype(np.int32)

    around = [2 * math.pi * step / 60 for step in range(60)]
    canvas = np.zeros((4 * size, 4 * size), np.uint8)
    if item.shape == "circle":
        cv2.fillPoly(canvas, [place([(math.cos(a), math.sin(a)) for a in around])], 1)
    elif item.shape == "ring":
        cv2.fillPoly(canvas, [place([(1.02 * math.cos(a), 1.02 * math.sin(a)) for a in around])], 1)
        cv2.fillPoly(canvas, [place([(0.46 * math.cos(a), 0.46 * math.sin(a)) for a in around])], 0)
    elif item.shape == "square":
        cv2.fillPoly(canvas, [place([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])], 1)
    elif item.shape == "triangle":
        corners = [(1.16 * math.cos(a), 1.16 * math.sin(a)) for a in (-math.pi / 2, math.pi / 6, math.pi * 5 / 6)]
        cv2.fillPoly(canvas, [place(corners)], 1)
    elif item.shape == "star":
        tips = [(1.15 if step % 2 == 0 else 0.5, -math.pi / 2 + math.pi * step / 5) for step in range(10)]
        cv2.fillPoly(canvas, [place([(r * math.cos(a), r * math.sin(a)) for r, a in tips])], 1)
    else:
        for long, short in ((1.05, 0.33), (0.33, 1.05)):
            bar = [(-long, -short), (long, -short), (long, short), (-long, short)]
            cv2.fillPoly(canvas, [place(bar)], 1)
    return cv2.resize(255 * canvas, (size, size), interpolation=cv2.INTER_AREA) > 127


def test_every_shape_is_the_shape_it_is_called() -> None:
    seen = Counter()
    for scene in scenes(seed=11, count=60, size=96):
        for item, alpha in zip(scene.objects, scene.alphas):
            in_front = scene.alphas[list(scene.objects).index(item) + 1 :].sum(0) > 0.02
            if item.material != "solid" or in_front.any():
                continue
            drawn, wanted = alpha > 0.5, shape_outline(item, 96)
            assert (drawn & wanted).sum() / (drawn | wanted).sum() > 0.9, item
            seen[item.shape] += 1
    assert set(seen) == set(SHAPES)


def test_materials_differ_in_their_alpha() -> None:
    values: dict[str, list[float]] = {material: [] for material in MATERIALS}
    for scene in scenes(seed=5, count=60, size=96):
        for item, alpha in zip(scene.objects, scene.alphas):
            part = alpha[alpha > 0.02]
            values[item.material].append(float(((part > 0.05) & (part < 0.95)).mean()))
    share = {material: np.mean(found) for material, found in values.items()}
    assert share["solid"] < 0.25  # an antialiased edge
    assert share["solid"] < share["furry"] < 0.8  # strands
    assert min(share["glass"], share["smoky"]) > 0.8  # transparent all over


def test_values_are_float32_in_range(many: list[Scene]) -> None:
    for scene in many[:20]:
        for name in ("image", "alphas", "foregrounds", "background"):
            array = getattr(scene, name)
            assert array.dtype == np.float32, name
            assert array.min() >= 0, name
            assert array.max() <= 1 + 1e-6, name
        assert scene.image.shape == scene.background.shape == (48, 48, 3)
        assert scene.foregrounds.shape == (len(scene.objects), 48, 48, 3)


# --- phrases ----------------------------------------------------------------------------------------------------------


def fitting(phrase: str, objects: tuple[SceneObject, ...]) -> list[int]:
    """Which objects a phrase can mean, read word by word as a person would; knows nothing of how phrases are made."""
    words = set(re.findall(r"\w+", phrase))
    candidates = list(range(len(objects)))
    for attribute, vocabulary in (("colour", COLOURS), ("shape", SHAPES), ("material", MATERIALS)):
        for word in words & set(vocabulary):
            candidates = [k for k in candidates if getattr(objects[k], attribute) == word]
    directions = {
        ("left", "leftmost"): lambda item: item.x,
        ("right", "rightmost"): lambda item: -item.x,
        ("top", "topmost", "highest"): lambda item: item.y,
        ("bottom", "lowest"): lambda item: -item.y,
        ("large", "largest", "big", "biggest"): lambda item: -item.radius,
        ("small", "smallest", "little"): lambda item: item.radius,
    }
    for names, rank in directions.items():
        if words & set(names):
            candidates = [min(candidates, key=lambda k: rank(objects[k]))] if candidates else []
    return candidates


def test_every_phrase_fits_its_object_and_no_other(many: list[Scene]) -> None:
    for scene in many:
        for k, phrases in enumerate(scene.phrases):
            for phrase, _ in phrases:
                assert fitting(phrase, scene.objects) == [k], (phrase, scene.objects)


def test_phrase_says_what_its_kind_promises(many: list[Scene]) -> None:
    known = {"colour": set(COLOURS), "shape": set(SHAPES), "material": set(MATERIALS)}
    for scene in many:
        for phrase, kind in (pair for phrases in scene.phrases for pair in phrases):
            words = set(re.findall(r"\w+", phrase))
            named = {attribute for attribute, vocabulary in known.items() if words & vocabulary}
            expected = {"position": set(), "size": set()}.get(kind, {kind})
            if kind == "compound":
                assert len(named) == 2, phrase
            else:
                assert named == expected, phrase


def test_every_word_of_a_phrase_counts_somewhere(many: list[Scene]) -> None:
    # compound phrases are there because one attribute alone often fits two objects
    needed = total = 0
    for scene in many:
        for phrases in scene.phrases:
            for phrase, kind in phrases:
                if kind != "compound":
                    continue
                total += 1
                words = [word for word in phrase.split() if word in {*COLOURS, *SHAPES, *MATERIALS}]
                needed += any(len(fitting(f"the {word}", scene.objects)) > 1 for word in words)
    assert total > 50
    assert needed == total


def test_positions_and_sizes_are_told_apart_by_a_clear_margin(many: list[Scene]) -> None:
    for scene in many:
        for k, phrases in enumerate(scene.phrases):
            me, others = scene.objects[k], [item for j, item in enumerate(scene.objects) if j != k]
            for phrase, kind in phrases:
                if kind == "size":
                    ratio = [max(me.radius, o.radius) / min(me.radius, o.radius) for o in others]
                    assert min(ratio) > 1.3, phrase
                if kind == "position":
                    upright = bool({"top", "topmost", "highest", "bottom", "lowest"} & set(phrase.split()))
                    gaps = [abs(me.y - o.y) if upright else abs(me.x - o.x) for o in others]
                    assert min(gaps) > 0.12, phrase


def test_all_kinds_shapes_colours_and_materials_occur_and_every_object_can_be_asked_for(many: list[Scene]) -> None:
    kinds = Counter(kind for scene in many for phrases in scene.phrases for _, kind in phrases)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 20
    objects = [item for scene in many for item in scene.objects]
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.material for item in objects} == set(MATERIALS)
    assert all(phrases for scene in many for phrases in scene.phrases)
    assert {len(scene.objects) for scene in many} == {2, 3}


def test_distractors_often_share_an_attribute(many: list[Scene]) -> None:
    shared = sum(
        any(
            getattr(a, name) == getattr(b, name)
            for i, a in enumerate(scene.objects)
            for b in scene.objects[:i]
            for name in ("shape", "colour", "material")
        )
        for scene in many
    )
    assert shared > 0.7 * len(many)


# --- the same again ---------------------------------------------------------------------------------------------------


def test_scene_is_a_function_of_seed_index_and_size() -> None:
    one, again = generate(3, 14, 48), generate(3, 14, 48)
    for name in ("image", "alphas", "foregrounds", "background"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert one.objects == again.objects
    assert one.phrases == again.phrases
    others = [generate(3, 15, 48), generate(4, 14, 48)]
    assert all(not np.array_equal(one.image, other.image) for other in others)


def test_part_of_a_stream_is_the_stream() -> None:
    whole, part = list(scenes(9, 6, 32)), list(scenes(9, 2, 32, start=4))
    for one, other in zip(whole[4:], part):
        assert np.array_equal(one.image, other.image)
        assert one.phrases == other.phrases
