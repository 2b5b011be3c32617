"""One training data set: where its shards are, and how samples are drawn from it."""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import cv2
import numpy as np

from data_modules.decode import decode_rgb, decode_sample
from data_modules.draws import Draws
from data_modules.phrases import Choice, PhrasePolicy, TextRules
from data_modules.shard_format import Phrase
from data_modules.shard_location import is_url
from data_modules.shard_reader import SampleError, ShardIndex
from data_modules.transforms import Augmentation, Box, View, detail_box, full_view, recompose, show, show_target
from lit_matting.checks import InputError, check_prompt

_MAX_ATTEMPTS = 50
_LOOKED_AT = 100
_LOCAL_MIX, _REMOTE_MIX = 16, 2
_IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp")


class ShardSource:
    """A training data set in shards.

    Args:
        shards: Index file, folder with one index, glob, brace pattern, URL, or a list of these.
        batch_size: Samples (image + phrase) in a batch of this data set, on each process.
        phrases_per_image: How many phrases of one image come into the same batch, of different instances as long as the
            image has enough: a batch then holds batch_size / phrases_per_image images. With 2, the only difference
            between two samples is the phrase, which teaches to read it.
        phrase_kinds: Draw only phrases of these kinds; null draws all.
        kind_weights: How often a kind is drawn against other phrases of the same instance; 1 where not named.
        templates: Phrases for instances that have none, with `{category}` where the category belongs: `the {category}`.
        template_probability: How often a template takes the place of an instance's own phrase (0.3 for data sets with
            machine captions).
        warmup_iterations: During the first so many iterations of training only `warmup_kinds` are drawn.
        warmup_kinds: The kinds of phrase to begin with, for example `[colour]`.
        mix_shards: Shards that are shuffled together: more mixes better, but all of them must be there to begin. Null
            takes 16 for local shards and 2 for shards behind URLs.
        augment: Whether the data module's augmentation applies to this data set.
        backgrounds: Folder or glob of images to put instances onto that have foreground colours.
        load_foreground: Whether batches carry the foreground colours (data sets that have them for every instance).
        captions: Further phrases beside the shards, as JSON lines `{"key", "instance", "text", "kind"}`
            (tools/caption.py writes them); files, URLs or a list of these.
    """

    def __init__(
        self,
        shards: str | list[str],
        batch_size: int = 16,
        phrases_per_image: int = 1,
        phrase_kinds: list[str] | None = None,
        kind_weights: dict[str, float] | None = None,
        templates: list[str] | None = None,
        template_probability: float = 0.0,
        warmup_iterations: int = 0,
        warmup_kinds: list[str] | None = None,
        mix_shards: int | None = None,
        augment: bool = True,
        backgrounds: str | None = None,
        load_foreground: bool = False,
        captions: str | list[str] | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"`batch_size` of '{shards}' must be 1 or more, got {batch_size}.")
        if mix_shards is not None and mix_shards < 1:
            raise InputError(f"`mix_shards` of '{shards}' must be 1 or more, got {mix_shards}.")
        self.shards = shards
        self.batch_size = batch_size
        self.policy = PhrasePolicy(
            phrases_per_image,
            phrase_kinds,
            kind_weights,
            templates or (),
            template_probability,
            warmup_iterations,
            warmup_kinds or (),
        )
        self.mix_shards = mix_shards
        self.augment = augment
        self.backgrounds = backgrounds
        self.load_foreground = load_foreground
        self.captions = [captions] if isinstance(captions, str) else list(captions or [])

    @property
    def images_per_batch(self) -> int:
        """Images that one batch draws."""
        return -(-self.batch_size // self.policy.phrases_per_image)


@dataclass
class Shown:
    """What one image gives to a batch: one picture, and one target for each chosen phrase."""

    key: str
    image: np.ndarray
    """(size, size, 3) uint8."""
    targets: list[np.ndarray]
    """One (size, size) uint8 or uint16 per choice."""
    choices: list[Choice]
    has_alpha: list[bool]
    categories: list[str]
    foregrounds: list[np.ndarray] | None
    """One (size, size, 3) uint8 per choice."""
    details: list[tuple[np.ndarray, np.ndarray, tuple[float, float, float, float]]]
    """One (image, target, box) per choice, where details are asked for."""

    def release(self) -> None:
        """Let go of the pixels; what remains is what the batch says about them."""
        self.image, self.targets, self.foregrounds, self.details = np.empty(0), [], None, []


class SourceReader:
    """Turns the draws of one data set into what a batch is made of.

    Args:
        name: The data set's name in the configuration.
        source: Its settings.
        index: Its opened shards.
        seed: Seed of the whole stream.
        size: Side of the square network input, in pixels.
        augmentation: Applied where the source allows it; None shows every image whole.
        detail_size: Side of the native-resolution crop, in pixels; 0 for none.
        skip_bad: Whether a sample that cannot be used is replaced by another of its shard, or raises.
        open_url: Returns the bytes of captions behind a URL.
    """

    def __init__(
        self,
        name: str,
        source: ShardSource,
        index: ShardIndex,
        seed: int,
        size: int,
        augmentation: Augmentation | None = None,
        detail_size: int = 0,
        skip_bad: bool = False,
        open_url: Callable[[str], bytes] | None = None,
    ) -> None:
        self.name, self.source, self.index = name, source, index
        mix = source.mix_shards or (_REMOTE_MIX if index.remote else _LOCAL_MIX)
        self.draws = Draws(index.counts, seed, name, mix)
        self.captions = read_captions(source.captions, open_url)
        self.size, self.detail_size = size, detail_size
        self.augmentation = augmentation if source.augment else None
        self.skip_bad = skip_bad
        self.backgrounds = _background_files(source.backgrounds) if source.backgrounds else []
        self._fetching: tuple[int, int] | None = None

    def lacks_phrases(self) -> bool:
        """Return whether templates are to take the place of some phrases, but there are none: all would be templates.

        Looked at are up to 100 samples, evenly spaced, with their captions; shards behind URLs are not fetched for it.
        """
        if not 0 < self.source.policy.template_probability < 1 or self.index.remote:
            return False
        for number in np.unique(np.linspace(0, len(self.index) - 1, _LOOKED_AT).astype(int)).tolist():
            with contextlib.suppress(SampleError):  # what is damaged is said when it is drawn
                sample = self.index.read_header(number)
                sample.add_phrases(self.captions)
                if any(instance.phrases for instance in sample.instances):
                    return False
        return True

    def show(self, draw: int, iteration: int) -> tuple[Shown, list[str]]:
        """Return what draw number ``draw`` gives, and a line for every bad sample that had to be replaced.

        Raises:
            SampleError: If the sample cannot be used and bad ones are not to be skipped.
            InputError: If no allowed phrase is found in many tries.
        """
        epoch, sample = self.draws[draw]
        if self.index.remote:
            self._fetch_ahead(draw)
        bad: list[str] = []
        for attempt in range(_MAX_ATTEMPTS):
            generator = self.draws.sample_generator(epoch, sample, attempt)
            try:
                shown = self._show(sample, iteration, generator)
                if shown is not None:
                    return shown, bad
            except SampleError as error:
                if not self.skip_bad:
                    raise
                bad.append(str(error))
            sample = self.draws.substitute(epoch, sample, attempt)
        if len(bad) == _MAX_ATTEMPTS:
            raise SampleError(
                f"data set '{self.name}': {_MAX_ATTEMPTS} samples in a row cannot be used; first: {bad[0]}"
            )
        warmup = iteration < self.source.policy.warmup_iterations
        kinds = self.source.policy.warmup_kinds if warmup else self.source.policy.kinds
        raise InputError(
            f"data set '{self.name}' has no phrase of kind {', '.join(sorted(kinds or ())) or 'any'} in"
            f" {_MAX_ATTEMPTS} samples; change `{'warmup_kinds' if warmup else 'phrase_kinds'}` or add `templates`."
        )

    def _show(self, number: int, iteration: int, generator: np.random.Generator) -> Shown | None:
        sample = self.index.read(number)
        if self.captions:
            sample.add_phrases(self.captions)
        choices = self.source.policy.choose(sample, iteration, generator)
        if not choices:
            return None
        named = list(dict.fromkeys(choice.instance for choice in choices))
        instances = sample.instances
        new_background = (
            self.augmentation is not None
            and bool(self.backgrounds)
            and generator.random() < self.augmentation.recompose_probability
            and all(instance.foreground is not None for instance in instances)
        )
        wanted = range(len(instances)) if new_background else named
        colours = wanted if new_background else (named if self.source.load_foreground else ())
        decoded = decode_sample(sample, wanted, colours, empty_is_error=False)
        for one in named:
            if not cv2.hasNonZero(decoded.targets[one]):
                raise SampleError(f"{sample.where}: {instances[one].kind} of instance {instances[one].id!r} is empty.")
        image = decoded.image
        if new_background:
            image = recompose(decoded.foregrounds, decoded.targets, self._background(generator))
        targets = {one: decoded.targets[one] for one in named}
        if self.augmentation is None:
            view = full_view(image)
        else:
            rules = TextRules.of([choice.phrase.text for choice in choices])
            view = self.augmentation.draw(image, targets, rules, generator)
            if view.flip and rules.names_side:
                choices = [choice.mirrored() for choice in choices]
        size, hard = self.size, {one: instances[one].kind != "alpha" for one in named}
        shown = {one: show_target(view, target, size, size, hard[one]) for one, target in targets.items()}
        foregrounds = None
        if self.source.load_foreground and all(one in decoded.foregrounds for one in named):
            foregrounds = [show(view, decoded.foregrounds[choice.instance], size, size) for choice in choices]
        return Shown(
            key=f"{self.name}/{sample.shard}/{sample.key}",
            image=show(view, image, size, size),
            targets=[shown[choice.instance] for choice in choices],
            choices=choices,
            has_alpha=[not hard[choice.instance] for choice in choices],
            categories=[instances[choice.instance].category for choice in choices],
            foregrounds=foregrounds,
            details=[self._detail(view, image, targets[c.instance], hard[c.instance], generator) for c in choices]
            if self.detail_size
            else [],
        )

    def _fetch_ahead(self, draw: int) -> None:
        group, shards = self.draws.next_shards(draw)
        if group != self._fetching:
            self._fetching = group
            # a failure here is not reported: reading the shard tries again and says what is wrong
            Thread(target=_quietly, args=(self.index.fetch, shards), daemon=True).start()

    def _detail(
        self, view: View, image: np.ndarray, target: np.ndarray, hard: bool, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float, float]]:
        size, whole = self.detail_size, view.box
        box = detail_box(view, target, size, generator)
        part = View(box, view.flip, view.colour)
        left = box.left - whole.left
        if view.flip:
            left = whole.width - left - box.width
        fractions = (
            (box.top - whole.top) / whole.height,
            left / whole.width,
            box.height / whole.height,
            box.width / whole.width,
        )
        return show(part, image, size, size), show_target(part, target, size, size, hard), fractions

    def _background(self, generator: np.random.Generator) -> np.ndarray:
        path = self.backgrounds[int(generator.integers(len(self.backgrounds)))]
        try:
            image = decode_rgb(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"background '{path}' of data set '{self.name}' cannot be used: {error}.") from error
        scale = generator.uniform(0.5, 1.0)
        height, width = max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))
        top = int(generator.integers(image.shape[0] - height + 1))
        left = int(generator.integers(image.shape[1] - width + 1))
        return Box(top, left, height, width).cut(image)


def read_captions(
    paths: Sequence[str], open_url: Callable[[str], bytes] | None = None
) -> dict[tuple[str, str], list[Phrase]]:
    """Read caption files into ``(sample key, instance id) -> phrases``.

    Args:
        paths: The files.
        open_url: Returns the bytes behind a URL; without it they must be local.

    Raises:
        InputError: If a file is missing or a line is not a caption; the message names file and line.
    """
    captions: dict[tuple[str, str], list[Phrase]] = {}
    for path in paths:
        try:
            data = open_url(path) if open_url is not None and is_url(path) else Path(path).read_bytes()
        except OSError as error:
            raise InputError(
                f"captions '{path}' cannot be read: {error.strerror}; make them with tools/caption.py, or set this data"
                " set's `captions` to null to do without."
            ) from error
        try:
            lines = data.decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"captions '{path}' are no text in UTF-8: {error.reason}.") from error
        for number, line in enumerate(lines, start=1):
            try:
                entry: dict[str, Any] = json.loads(line)
                where = (entry["key"], str(entry["instance"]))
                phrase = Phrase(check_prompt(entry["text"]), entry.get("kind", "caption"))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError, InputError) as error:
                raise InputError(f"captions '{path}', line {number}: {error} ({line[:80]!r}).") from error
            captions.setdefault(where, []).append(phrase)
    return captions


def _quietly(function: Callable[[Any], None], argument: Any) -> None:
    with contextlib.suppress(Exception):
        function(argument)


def _background_files(pattern: str) -> Sequence[str]:
    pattern = os.path.join(glob.escape(pattern), "*") if os.path.isdir(pattern) else pattern
    files = sorted(path for path in glob.glob(pattern) if path.lower().endswith(_IMAGE_FILES))
    if not files:
        raise InputError(f"no background images at '{pattern}'; give a folder or a glob of jpg, png or webp files.")
    return files
