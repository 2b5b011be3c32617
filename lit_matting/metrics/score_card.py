"""From the kept numbers of each phrase to the tables of the score card."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

METHODS = ("prediction", "all_zero", "perfect_all", "perfect_random")
"""The prediction, and the three baselines computed from the truth alone."""
QUALITIES = ("soft_iou", "sad", "mse", "mae", "band_mae", "grad", "conn")
"""What is averaged over all samples, over the found and over the missed ones."""
SIZES = (("small", 0.05), ("medium", 0.2), ("large", math.inf))
"""Size classes by the share of the image that the referred alpha covers, each up to its bound."""

Average: TypeAlias = Literal["phrase", "instance"]


@dataclass(frozen=True)
class ReferringSample:
    """What is kept of one image and phrase."""

    key: str
    """Names the image; the same for all its phrases."""
    prompt: str
    kind: str
    category: str
    instance: int
    """Which instance of the image the phrase refers to."""
    instances: int
    """How many instances the image has."""
    coverage: float
    """Share of the image that the referred alpha covers, in [0, 1]."""
    values: NDArray[np.float64]
    """(methods, 2 + 2 x qualities): found, strict, each quality, each quality times found; NaN where undefined."""

    @property
    def size(self) -> str:
        """Size class of the referred instance."""
        return next(name for name, bound in SIZES if self.coverage <= bound)

    def quality(self, name: str, method: str = "prediction") -> float:
        """Return one of ``QUALITIES``, or "found" or "strict"."""
        return float(self.values[METHODS.index(method), ("found", "strict", *QUALITIES).index(name)])

    def row(self) -> dict[str, str | int | float]:
        """Return the sample as one flat row of a table, the prediction's values only."""
        row: dict[str, str | int | float] = {
            "key": self.key,
            "instance": self.instance,
            "prompt": self.prompt,
            "kind": self.kind,
            "category": self.category,
            "instances": self.instances,
            "size": self.size,
            "coverage": self.coverage,
            "found": int(self.quality("found")),
            "strict": int(self.quality("strict")),
        }
        row.update({name: self.quality(name) for name in QUALITIES if not math.isnan(self.quality(name))})
        return row


def score_card(samples: Sequence[ReferringSample], average: Average = "phrase") -> dict[str, Any]:
    """Return the score card of samples.

    It has the tables ``overall``, and by name ``kinds``, ``categories``, ``sizes``, ``datasets``; and all of them again
    for each of the ``baselines``. Every table has the same entries; see :class:`ReferringScore`. A rate without any
    sample to count is NaN.
    """

    def tables(row: int) -> dict[str, Any]:
        def by(value: Callable[[ReferringSample], str], order: Iterable[str] | None = None) -> dict[str, Any]:
            present = {value(sample) for sample in samples}
            names = sorted(present) if order is None else [name for name in order if name in present]
            groups = {name: [sample for sample in samples if value(sample) == name] for name in names if name}
            return {name: _table(group, row, average) for name, group in groups.items()}

        return {
            "overall": _table(samples, row, average),
            "kinds": by(lambda sample: sample.kind),
            "categories": by(lambda sample: sample.category),
            "sizes": by(lambda sample: sample.size, [name for name, _ in SIZES]),
            "datasets": by(lambda sample: sample.key.split("/")[0]),
        }

    methods = METHODS[: min((len(sample.values) for sample in samples), default=1)]
    card = tables(0)
    card["baselines"] = {name: tables(row) for row, name in enumerate(methods) if row}
    return card


def _table(samples: Sequence[ReferringSample], row: int, average: Average) -> dict[str, Any]:
    """Return one table of rates and means for one method."""
    values = np.array([sample.values[row] for sample in samples]).reshape(len(samples), 2 + 2 * len(QUALITIES))
    found, strict = values[:, 0], values[:, 1]
    quality, quality_found = np.split(values[:, 2:], 2, axis=1)
    weight = np.ones(len(samples))
    if average == "instance":
        names = [(sample.key, sample.instance) for sample in samples]
        phrases = Counter(names)
        weight = np.array([1 / phrases[name] for name in names])
    ambiguous = weight * np.array([sample.instances > 1 for sample in samples], dtype=float)

    def mean(value: NDArray[np.float64], share: NDArray[np.float64]) -> float:
        defined = ~np.isnan(value)
        total = share[defined].sum()
        return float((share * value)[defined].sum() / total) if total > 0 else math.nan

    def split(share: NDArray[np.float64], numerator: NDArray[np.float64]) -> dict[str, float]:
        result = {"count": float(share.sum())}
        for column, name in enumerate(QUALITIES):
            defined = ~np.isnan(quality[:, column])
            total = (weight * share)[defined].sum()
            if defined.any():
                result[name] = float((weight * numerator[:, column])[defined].sum() / total) if total > 0 else math.nan
        return result

    pairs, swapped = _swaps(samples, found)
    _, strictly_swapped = _swaps(samples, strict)
    table: dict[str, Any] = {
        "count": len(samples),
        "ambiguous": int((ambiguous > 0).sum()),
        "pairs": pairs,
        "found_rate": mean(found, weight),
        "grounding_accuracy": mean(found, ambiguous),
        "strict_accuracy": mean(strict, weight),
        "swap_accuracy": swapped / pairs if pairs else math.nan,
        "strict_swap_accuracy": strictly_swapped / pairs if pairs else math.nan,
    }
    for column, name in enumerate(QUALITIES):
        if not np.isnan(quality[:, column]).all():
            table[name] = mean(quality[:, column], weight)
    table["found"] = split(found, quality_found)
    table["missed"] = split(1 - found, quality - quality_found)
    return table


def _swaps(samples: Sequence[ReferringSample], right: NDArray[np.float64]) -> tuple[int, float]:
    """Return the number of pairs of phrases for different instances of one image, and how many are right in both.

    Over pairs (i, j) of different instances, ``sum r_i r_j`` is half of ``(sum r)^2 - sum over instances (sum r)^2``.
    """
    images: dict[str, dict[int, list[float]]] = {}
    for sample, value in zip(samples, right):
        images.setdefault(sample.key, {}).setdefault(sample.instance, []).append(float(value))
    pairs, both = 0, 0.0
    for instances in images.values():
        sizes = [len(values) for values in instances.values()]
        sums = [sum(values) for values in instances.values()]
        pairs += (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2
        both += (sum(sums) ** 2 - sum(value**2 for value in sums)) / 2
    return pairs, both
