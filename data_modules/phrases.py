"""Which phrase an instance is called by, and what a phrase forbids an augmentation to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_modules.shard_format import Phrase
from data_modules.shard_reader import Instance, RawSample
from lit_matting.checks import InputError

TEMPLATE = "template"
"""The kind of phrases made from templates."""
_WORD = re.compile(r"[a-z]+")
# people who describe photographs in a hurry write lft, rt and r (RefCOCO)
_SIDES = """left right lefthand righthand leftmost rightmost leftward rightward leftside rightside leftest rightest
lft lt l rght rite rt r east west clock clockwise"""
_PLACES = """top bottom upper lower middle center centre central corner edge topmost bottommost uppermost lowermost bot
btm mid"""
_COLOURS = """
red orange yellow green blue purple violet pink brown black white grey gray cyan magenta teal turquoise beige
tan maroon crimson scarlet gold golden silver silvery olive lime navy indigo lavender lilac coral salmon peach
cream ivory khaki amber bronze copper rust burgundy mauve fuchsia aqua mint azure cobalt emerald ruby blonde
blond brunette ginger colored coloured colorful colourful reddish orangish yellowish greenish bluish purplish
pinkish brownish blackish whitish greyish grayish
"""
# l, r, east and west are sides as often as parts of names (the L-shaped sofa, Toys R Us, the West Ham shirt), and lt is
# light as well: such phrases are not changed over
_PAIRS = """left right lefthand righthand leftmost rightmost leftward rightward leftside rightside leftest rightest
lft rt"""
_SWAPS = dict(zip(_PAIRS.split()[::2], _PAIRS.split()[1::2]))
_SWAPS.update({right: left for left, right in _SWAPS.items()})
# "the one right behind", "all right", "right side up", "left-over": no side is meant, or it cannot be told
_NO_SIDE = re.compile(
    r"(?<!\bthe )(?<!\bfar )(?<!\bto )\bright (?:above|after|at|before|behind|below|beneath|beside|by|here|in|near|next"
    r"|now|on|over|past|there|under|up)\b|\b(?:all|any|is|are|has|have|was|were|been) (?:left|right)\b"
    r"|(?<!\bthe )\bleft (?:alone|behind|open|out)\b|\b(?:left over|right (?:angle|of way|side up|way up))\b"
)
_SIDE_WORDS = frozenset(_SIDES.split())
_PLACE_WORDS = _SIDE_WORDS | frozenset(_PLACES.split())
_COLOUR_WORDS = frozenset(_COLOURS.split())


@dataclass(frozen=True)
class TextRules:
    """What the phrases of an image forbid."""

    names_side: bool
    """A flip would make the phrase false: it says left or right."""
    names_place: bool
    """A crop would move the thing it names by place: left, top, middle, corner, ..."""
    names_colour: bool
    """A hue change would make it false."""
    can_be_mirrored: bool = True
    """Every phrase can be made true of the mirrored image by :func:`mirrored`."""

    @classmethod
    def of(cls, prompts: Sequence[str]) -> TextRules:
        """Return the rules that hold for all the phrases together.

        Example:
            >>> TextRules.of(["the left-hand mug", "something round"])
            TextRules(names_side=True, names_place=True, names_colour=False, can_be_mirrored=True)
        """
        words = frozenset(word for prompt in prompts for word in _WORD.findall(prompt.lower()))
        side = bool(words & _SIDE_WORDS)
        sure = not side or all(mirrored(prompt) is not None for prompt in prompts)
        return cls(side, bool(words & _PLACE_WORDS), bool(words & _COLOUR_WORDS), sure)


def mirrored(prompt: str) -> str | None:
    """Return a phrase as it is true of the mirrored image, left and right changed over, or None if that is not sure.

    Example:
        >>> mirrored("The dog on the left of the right-hand car")
        'The dog on the right of the left-hand car'
        >>> mirrored("the cup right behind the vase"), mirrored("the horse at 3 o'clock")
        (None, None)
    """
    text = prompt.lower()
    sides = [word for word in _WORD.findall(text) if word in _SIDE_WORDS]
    if _NO_SIDE.search(text.replace("-", " ")) or any(word not in _SWAPS for word in sides):
        return None

    def other(match: re.Match[str]) -> str:
        word = match.group()
        swapped = _SWAPS.get(word.lower(), word)
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return re.sub(r"[A-Za-z]+", other, prompt)


@dataclass(frozen=True)
class Choice:
    """One instance of an image and the phrase it is called by."""

    instance: int
    phrase: Phrase

    def mirrored(self) -> Choice:
        """Return the choice with the phrase that is true of the mirrored image."""
        return Choice(self.instance, Phrase(mirrored(self.phrase.text) or self.phrase.text, self.phrase.kind))


class PhrasePolicy:
    """Chooses the instances and phrases that one visit to an image trains on.

    Args:
        phrases_per_image: Number of choices from one image; of different instances as long as there are enough.
        kinds: Only phrases of these kinds are drawn; None allows every kind.
        kind_weights: How often a kind is drawn against others of the same instance; 1 where not named.
        templates: Phrases with `{category}` in them, for instances without phrases.
        template_probability: How often an instance that has phrases is called by a template all the same.
        warmup_iterations: During so many first iterations ...
        warmup_kinds: ... only phrases of these kinds are drawn.
    """

    def __init__(
        self,
        phrases_per_image: int = 1,
        kinds: Sequence[str] | None = None,
        kind_weights: Mapping[str, float] | None = None,
        templates: Sequence[str] = (),
        template_probability: float = 0.0,
        warmup_iterations: int = 0,
        warmup_kinds: Sequence[str] = (),
    ) -> None:
        if phrases_per_image < 1:
            raise InputError(f"`phrases_per_image` must be 1 or more, got {phrases_per_image}.")
        if not 0 <= template_probability <= 1:
            raise InputError(f"`template_probability` must lie in [0, 1], got {template_probability}.")
        if template_probability and not templates:
            raise InputError("`template_probability` is set but `templates` is empty; give at least one template.")
        if warmup_iterations and not warmup_kinds:
            raise InputError("`warmup_iterations` is set but `warmup_kinds` is empty; name the kinds to begin with.")
        self.phrases_per_image = phrases_per_image
        self.kinds = frozenset(kinds) if kinds is not None else None
        self.kind_weights = dict(kind_weights or {})
        self.templates = tuple(templates)
        self.template_probability = template_probability
        self.warmup_iterations, self.warmup_kinds = warmup_iterations, frozenset(warmup_kinds)

    def choose(self, sample: RawSample, iteration: int, generator: np.random.Generator) -> list[Choice]:
        """Return ``phrases_per_image`` choices, or none if no phrase of the image is allowed.

        When there are too few instances the image's instances are used again, with another phrase if they have one.
        """
        kinds = self.warmup_kinds if iteration < self.warmup_iterations else self.kinds
        allowed: dict[int, list[Phrase]] = {}
        for number, instance in enumerate(sample.instances):
            phrases = [phrase for phrase in instance.phrases if kinds is None or phrase.kind in kinds]
            if phrases or (self.templates and (kinds is None or TEMPLATE in kinds or not instance.phrases)):
                allowed[number] = phrases
        if not allowed:
            return []
        choices: list[Choice] = []
        while len(choices) < self.phrases_per_image:
            order = generator.permutation(list(allowed))[: self.phrases_per_image - len(choices)]
            for number in order.tolist():
                told = {choice.phrase for choice in choices if choice.instance == number}
                # the same picture with the same phrase twice would teach nothing new
                fresh = [phrase for phrase in allowed[number] if phrase not in told] or allowed[number]
                choices.append(Choice(number, self._phrase(sample.instances[number], fresh, generator)))
        return choices

    def _phrase(self, instance: Instance, phrases: list[Phrase], generator: np.random.Generator) -> Phrase:
        draw = generator.random()
        if self.templates and (not phrases or draw < self.template_probability):
            template = self.templates[int(generator.integers(len(self.templates)))]
            return Phrase(template.replace("{category}", instance.category or "foreground"), TEMPLATE)
        if len(phrases) == 1:
            return phrases[0]
        if not self.kind_weights:
            return phrases[int(generator.integers(len(phrases)))]
        weights = np.array([self.kind_weights.get(phrase.kind, 1.0) for phrase in phrases])
        if weights.sum() <= 0:
            weights[:] = 1.0
        return phrases[int(np.searchsorted(np.cumsum(weights), generator.random() * weights.sum(), side="right"))]
