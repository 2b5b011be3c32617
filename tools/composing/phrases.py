"""What cut-outs are called in one image: names, positions and relations, each true of exactly one instance."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from data_modules.shards import Phrase
from tools.composing.layout import Geometry

Array = np.ndarray

KINDS = ("basic", "absolute", "relative")
"""As RefMatte names them: by name alone, by the position in the picture, by another instance."""

# words that tell nothing apart: glue, and attributes that any thing may have
_GLUE = frozenset(
    word
    for words in (
        "a an the of with in on at and or to from for by its his her pair two three",
        "holding wearing sitting standing hanging hugging flying lying filled made covered shaped looking scattered",
        "big small large little tiny long short thick thin old young new round messy shiny shining glowing transparent",
        "black white red green blue yellow orange pink purple brown grey gray golden tan blonde haired dark bright",
        "multicolored colorful striped spotted spots",
    )
    for word in words.split()
)
# words for the same or easily confused things; the first stands for all
_SYNONYMS = (
    "rabbit bunny hare",
    "peacock peahen peafowl",
    "toy plush doll stuffed teddy figurine puppet",
    "plant tree flower daisy cactus houseplant bonsai leaf blooming moss",
    "smoke fog dust cloud steam mist dirt explosion cloudy foggy misty",
    "fire flame burst",
    "woman lady girl female toddler child person people man boy male fireman paratrooper",
    "flare spark star lightning swirl light beam",
    "cow bull ox gnu",
    "deer doe blackbuck antelope goat",
    "sea ocean water ice",
    "guitar cello violin",
)
_GROUP = {word: words.split()[0] for words in _SYNONYMS for word in words.split()}
_SIDE_WORDS = re.compile(r"\b(left|right|leftmost|rightmost)\b", re.IGNORECASE)

_ABSOLUTE = {
    "left": ("on the left", "on the left side of the picture", "at the far left"),
    "right": ("on the right", "on the right side of the picture", "at the far right"),
    "middle": ("in the middle", "in the middle of the picture"),
    "top": ("at the top", "in the upper part of the picture"),
    "bottom": ("at the bottom", "in the lower part of the picture"),
}
_RELATIVE = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "lower down than"),
    "front": ("in front of", "partly hiding"),
    "behind": ("behind", "partly hidden by"),
}
POSITION_MARGIN = 0.12
"""A position holds only if the next instance's centre is at least this share of the image away."""
RELATION_MARGIN = 0.15
SIZE_RATIO = 0.6
"""Smaller means at most this share of the other's area, by pixels and by box."""
OCCLUSION_MARGIN = 0.08
"""In front means hiding at least this share of the other."""


def has_side(name: str) -> bool:
    """Whether the name says left or right, so that a flip would make it false."""
    return _SIDE_WORDS.search(name) is not None


def _singular(word: str) -> str:
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    if len(word) > 2 and word.endswith("ves"):
        return word[:-3] + "f"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us")) else word


@lru_cache(maxsize=4096)
def content_words(text: str) -> frozenset[str]:
    """The words that tell what a thing is, in the singular, each with the word that stands for its near-synonyms.

    Example:
        >>> sorted(content_words("white fluffy toy bunnies"))
        ['bunny', 'fluffy', 'rabbit', 'toy']
    """
    words = [_singular(word) for word in re.findall(r"[a-z]+", text.lower()) if word not in _GLUE]
    return frozenset(form for word in words if word not in _GLUE for form in (word, _GROUP.get(word, word)))


def _overlap(first: frozenset[str], second: frozenset[str]) -> bool:
    # goat and mountaingoat, fruit and kiwifruit: one word inside another counts
    return any(a == b or (min(len(a), len(b)) > 2 and (a.endswith(b) or b.endswith(a))) for a in first for b in second)


def are_similar(names: tuple[str, ...], category: str, other_names: tuple[str, ...], other_category: str) -> bool:
    """Whether a phrase for one might be read as the other: they share a word, or one is named by the other's category.

    Example:
        >>> are_similar(("teddy bear",), "", ("brown bear",), "")
        True
        >>> are_similar(("koala",), "animals", ("goat",), "animals")
        False
    """
    mine, theirs = (frozenset().union(*map(content_words, group)) for group in (names, other_names))
    return (
        _overlap(mine, theirs) or bool(mine & content_words(other_category)) or bool(theirs & content_words(category))
    )


def head_noun(name: str) -> str:
    """The name's last word before any "with", "in", "of", ...: what it is, without its attributes."""
    front = re.split(r"\b(?:of|with|in|on|at|from|and|wearing|holding|sitting|hanging|hugging|filled)\b", name)[
        0
    ].split()
    return front[-1] if front else name


def shared_noun(name: str, others: list[str]) -> str | None:
    """The noun that all these names end in, if it fits all of them alike.

    Example:
        >>> shared_noun("doll with long hair", ["old rag doll"])
        'doll'
        >>> shared_noun("sea lion", ["lion"]) is None  # "the lion" means only one of the two
        True
    """
    noun = head_noun(name)
    fits = all(head_noun(other) == noun and (other == noun) == (name == noun) for other in others)
    return noun if fits else None


def absolute_positions(i: int, geometry: tuple[Geometry, ...]) -> list[str]:
    """Which of left, right, middle, top, bottom is true of instance i alone, by a clear margin."""
    me, others = geometry[i], [item for j, item in enumerate(geometry) if j != i]
    if not others:
        return []  # a place tells nothing apart where there is one thing
    found = []
    if me.x < 0.48 and all(me.x + POSITION_MARGIN <= other.x for other in others):
        found.append("left")
    if me.x > 0.52 and all(me.x - POSITION_MARGIN >= other.x for other in others):
        found.append("right")
    if len(others) == 2 and abs(me.x - 0.5) < 0.18:
        low, high = sorted(other.x for other in others)
        if low + POSITION_MARGIN <= me.x <= high - POSITION_MARGIN:
            found.append("middle")
    if me.y < 0.45 and all(me.y + POSITION_MARGIN <= other.y for other in others):
        found.append("top")
    if me.y > 0.55 and all(me.y - POSITION_MARGIN >= other.y for other in others):
        found.append("bottom")
    return found


def relations(i: int, j: int, geometry: tuple[Geometry, ...], occlusion: Array) -> list[str]:
    """What is plainly true of instance i with respect to instance j."""
    me, other = geometry[i], geometry[j]
    dx, dy = other.x - me.x, other.y - me.y
    found = []
    # a thing that is mostly above is not called "to the left of", even where its centre is
    if abs(dx) >= max(RELATION_MARGIN, 0.7 * abs(dy)):
        found.append("left" if dx > 0 else "right")
    if abs(dy) >= max(RELATION_MARGIN, 1.2 * abs(dx)):
        found.append("above" if dy > 0 else "below")
    if occlusion[i, j] >= OCCLUSION_MARGIN:
        found.append("front")
    if occlusion[j, i] >= OCCLUSION_MARGIN:
        found.append("behind")
    return found


def _is_smaller(a: Geometry, b: Geometry) -> bool:
    return a.area <= SIZE_RATIO * b.area and a.box[2] * a.box[3] <= SIZE_RATIO * b.box[2] * b.box[3]


def compose_phrases(
    names: list[tuple[str, ...]],
    similar: Array,
    geometry: tuple[Geometry, ...],
    occlusion: Array,
    per_kind: int,
    rng: np.random.Generator,
) -> list[list[Phrase]]:
    """Phrases for every instance, at most ``per_kind`` of each kind, each true of that instance alone.

    An instance that resembles another one in the same image is called by its position or its size only, and never
    serves as a landmark.

    Args:
        names: Of each instance, best first.
        similar: (K, K) bool, which instances might be mistaken for each other.
        geometry: Of each instance, after placement.
        occlusion: (K, K), see ``Composite``.
        per_kind: How many phrases of one kind an instance gets.
        rng: Chooses among the true ones.
    """
    count = len(names)
    result = []
    for i in range(count):
        alike = [j for j in range(count) if j != i and similar[i, j]]
        found: dict[str, list[str]] = {kind: [] for kind in KINDS}
        callings = list(names[i])
        # the shared noun alone: here only the position tells them apart
        if alike and (noun := shared_noun(names[i][0], [names[j][0] for j in alike])):
            callings.append(noun)
        if not alike:
            found["basic"] = [f"the {name}" for name in names[i]]
        for where in absolute_positions(i, geometry):
            found["absolute"] += [f"the {name} {words}" for name in callings for words in _ABSOLUTE[where]]
        for j in range(count):
            if j == i:
                continue
            if not alike and not any(similar[j, k] for k in range(count) if k != j):
                landmark = names[j][0]
                for relation in relations(i, j, geometry, occlusion):
                    found["relative"] += [f"the {names[i][0]} {words} the {landmark}" for words in _RELATIVE[relation]]
                first, second = (names[i][0], landmark) if rng.random() < 0.5 else (landmark, names[i][0])
                if _is_smaller(geometry[i], geometry[j]):
                    found["relative"].append(f"the smaller of the {first} and the {second}")
                elif _is_smaller(geometry[j], geometry[i]):
                    found["relative"].append(f"the larger of the {first} and the {second}")
            elif alike == [j] and (noun := shared_noun(names[i][0], [names[j][0]])):
                if _is_smaller(geometry[i], geometry[j]):
                    found["relative"].append(f"the smaller {noun}")
                elif _is_smaller(geometry[j], geometry[i]):
                    found["relative"].append(f"the larger {noun}")
        phrases = []
        for kind in KINDS:
            texts = list(dict.fromkeys(found[kind]))
            # the best name always stays; the rest is drawn
            fixed, free = (texts[:1], texts[1:]) if kind == "basic" else ([], texts)
            drawn = [free[k] for k in sorted(rng.permutation(len(free))[: max(per_kind - len(fixed), 0)])]
            phrases += [Phrase(text, kind) for text in fixed + drawn]
        result.append(phrases)
    return result
