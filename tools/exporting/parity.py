"""Whether exported graphs give the same mattes, and what smaller weights cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_modules.benchmark import BenchmarkSource, list_questions
from data_modules.decode import decode_sample
from data_modules.folder import FolderSource
from data_modules.shards import ShardIndex
from lit_matting.checks import InputError
from lit_matting.pipeline import MattingPipeline

PHRASES = ("the red umbrella", "the glass on the left", "hair")


@dataclass(frozen=True)
class Example:
    """One photograph with a phrase, and its true matte where that is known."""

    image: Any
    """What a pipeline takes."""
    phrase: str
    truth: np.ndarray | None = None
    """(H, W) in [0, 1]."""


def examples(source: str, limit: int) -> list[Example]:
    """Return what to compare on: phrases of a benchmark in shards, or the lines of a table `image,phrase`.

    Raises:
        InputError: If there is nothing.
    """
    if source.lower().endswith(".csv"):
        found = [Example(path, phrase) for path, _, phrase in FolderSource(source).questions()]
        return found[:limit]
    return list(_from_shards(source, limit))


def _from_shards(source: str, limit: int) -> Iterator[Example]:
    index = ShardIndex.load(source)
    questions = list_questions(BenchmarkSource(source, max_phrases=limit), index)
    if not questions:
        raise InputError(f"the shards at {source!r} have no phrases.")
    for question in questions:
        raw = index.read(question.sample)
        decoded = decode_sample(raw, (question.instance,), empty_is_error=False)
        target = decoded.targets[question.instance]
        truth = target.astype(np.float32) / np.iinfo(target.dtype).max
        yield Example(decoded.image, question.text, truth)


def mattes(pipeline: MattingPipeline, given: Sequence[Example]) -> list[np.ndarray]:
    """Return the alpha of every example."""
    return [pipeline(example.image, example.phrase, clean_colours=False).alpha for example in given]


def cost_of_smaller_weights(
    whole: Sequence[np.ndarray], small: Sequence[np.ndarray], given: Sequence[Example]
) -> dict[str, float]:
    """Return by how much smaller weights change mattes.

    ``sad_change`` is the sum of absolute differences (SAD) to the truth with smaller weights, relative to the SAD with
    the whole ones, less 1; below 0 is better. Without a truth it is how far the mattes are from one another, relative
    to their mass. ``mean_difference`` is between the mattes, over all pixels.
    """
    difference = sum(float(np.abs(a - b).sum(dtype=np.float64)) for a, b in zip(whole, small))
    pixels = sum(alpha.size for alpha in whole)
    cost = {"mean_difference": difference / max(pixels, 1), "examples": len(given)}
    if all(example.truth is not None for example in given):
        before, after = (
            sum(float(np.abs(alpha - example.truth).sum(dtype=np.float64)) for alpha, example in zip(made, given))
            for made in (whole, small)
        )
        return {**cost, "sad": before, "sad_small": after, "sad_change": after / max(before, 1e-9) - 1}
    mass = sum(float(alpha.sum(dtype=np.float64)) for alpha in whole)
    return {**cost, "sad_change": difference / max(mass, 1e-9)}


def generated_photograph(side: int) -> np.ndarray:
    """Return a photograph (side, 1.25 side, 3) uint8 of smooth colours and grain, always the same."""
    rng = np.random.default_rng(0)
    height, width = side, side * 5 // 4
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(2 * np.pi * (x * a / width + y * b / height + c)) for a, b, c in rng.uniform(0, 2, (3, 3))]
    return np.clip(127 + 90 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def largest_difference(first: MattingPipeline, second: MattingPipeline, batches: Sequence[int] = (1, 2)) -> float:
    """Return the largest difference of alpha between two pipelines on a generated photograph, over batch sizes."""
    photograph = generated_photograph(first.image_size)
    worst = 0.0
    for count in batches:
        phrases = list(PHRASES[:count])
        made = [pipeline(photograph, phrases, clean_colours=False) for pipeline in (first, second)]
        worst = max(worst, *(float(np.abs(a.alpha - b.alpha).max()) for a, b in zip(*made)))
    return worst
