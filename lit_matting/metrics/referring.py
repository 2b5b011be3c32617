"""The referring score card: was the right thing found, and how good is its matte when it was?

A benchmark that averages the matting errors alone mixes two failures: cutting out the wrong thing, and cutting out the
right thing badly. And it rewards saying nothing: on images of small objects an all-zero matte has a smaller mean error
than a good one. So every number here stands beside that of three mattes made from the truth without reading the phrase:
nothing at all, everything at once, and one object chosen blindly.

Overlap is the soft IoU, ``sum min(p, a) / sum max(p, a)``, and not the product ``sum p a``: a product grows with the
size of the object, so that a faint veil over a large neighbour would outweigh a perfect matte of a small thing. IoU is
the same question asked of things of different sizes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from lit_matting.checks import check_range, check_shape
from lit_matting.metrics import functional
from lit_matting.targets import scaled_kernel, trimap_from_alpha

METHODS = ("prediction", "all_zero", "perfect_all", "perfect_random")
"""The prediction, and the three baselines computed from the truth alone."""
QUALITIES = ("soft_iou", "sad", "mse", "mae", "band_mae", "grad", "conn")
"""What is averaged over all samples, over the found and over the missed ones."""
STRICT_OVERLAP = 0.5
"""Soft IoU with the referred instance above which a sample counts as strictly found."""
ALONE_OVERLAP = 0.1
"""Soft IoU above which the only instance of an image counts as found: there is no rival to overlap less."""
SIZES = (("small", 0.05), ("medium", 0.2), ("large", math.inf))
"""Size classes by the share of the image that the referred alpha covers, each up to its bound."""

TIE = 1e-9

Average: TypeAlias = Literal["phrase", "instance"]


def soft_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the soft IoU of every matte of one stack with every one of another, ``sum min / sum max``.

    Two empty mattes are the same matte: 1.

    Args:
        first: (M, H, W) in [0, 1].
        second: (K, H, W) in [0, 1].

    Returns:
        (M, K) float64 in [0, 1].

    Example:
        >>> soft_iou(torch.tensor([[[1.0, 1.0]], [[0.5, 0.0]]]), torch.tensor([[[1.0, 0.0]]])).squeeze(1).tolist()
        [0.5, 0.5]
    """
    check_shape(second, ("K", "H", "W"), "second", {"H": first.shape[-2], "W": first.shape[-1]})
    first, second = first.float(), second.float()
    shared = torch.stack([_sum(torch.minimum(first, one)) for one in second], dim=1)
    # min + max = sum of both, so the union needs no second pass over the pixels
    union = _sum(first)[:, None] + _sum(second)[None] - shared
    return torch.where(union > 0, shared / union.clamp_min(1e-300), 1.0)


def _sum(mattes: Tensor) -> Tensor:
    """Return the sum over the pixels of each matte: rows in float32, which is fast, and the image in float64."""
    return mattes.sum(-1).sum(-1, dtype=torch.float64)


def is_found(overlaps: Tensor, instance: int) -> Tensor:
    """Return which mattes overlap the referred instance more than every other one; ties and no overlap are misses.

    Args:
        overlaps: (M, K) soft IoU of each matte with each instance of the image.
        instance: The referred instance. Alone in its image (K = 1), it is found above ``ALONE_OVERLAP``.

    Example:
        >>> is_found(torch.tensor([[0.4, 0.3], [0.4, 0.4], [0.0, 0.0]]), 0).tolist()
        [True, False, False]
    """
    referred = overlaps[:, instance]
    if overlaps.shape[1] == 1:
        return referred > ALONE_OVERLAP
    others = torch.cat([overlaps[:, :instance], overlaps[:, instance + 1 :]], dim=1)
    return referred > others.amax(1) + TIE


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


class ReferringScore(Metric):
    """Collects, sample by sample, whether the phrase's thing was found and how good its matte is.

    Per sample a few numbers are kept and no picture. :meth:`compute` returns, for all samples and per phrase kind,
    category and size:

    - ``found_rate``: the matte overlaps the referred instance more than any other of its image (the only instance of
      an image is found above a soft IoU of 0.1); ``grounding_accuracy``: the same over the images with several
      instances only, where there is something to confuse;
    - ``strict_accuracy``: soft IoU with the referred instance above 0.5;
    - ``swap_accuracy``: over all pairs of phrases for different instances of one image, both found;
      ``strict_swap_accuracy``: both strictly;
    - the means of ``soft_iou``, ``sad`` (thousands), ``mse``, ``mae``, ``band_mae`` (absolute error over the unknown
      band of the true alpha, which is where matting is hard; samples without a band do not count), with ``boundary``
      also ``grad`` and ``conn``; and the same under ``found`` and under ``missed``.

    ``baselines`` holds the same for an all-zero matte, for a perfect matte of all instances together, and for a perfect
    matte of one instance drawn uniformly and independently for each phrase, in expectation and not sampled.

    Args:
        boundary: Also compute the gradient and connectivity errors, which cost about ten times the rest.
        baselines: Also compute the baselines.
        average: "phrase" counts every phrase alike; "instance" averages over the phrases of an instance first, as
            RefMatte's protocol does.
    """

    full_state_update = False
    values: list[Tensor]
    texts: list[Tensor]

    def __init__(self, boundary: bool = False, baselines: bool = True, average: Average = "phrase") -> None:
        # the records are ragged and hold text, so they are gathered as objects in `gather`, not state by state
        super().__init__(sync_on_compute=False)
        if average not in ("phrase", "instance"):
            raise ValueError(f"`average` must be 'phrase' or 'instance', got {average!r}.")
        self.boundary = boundary
        self.methods = METHODS if baselines else METHODS[:1]
        self.average = average
        self.latest: tuple[Tensor, ...] = ()
        """The mattes (H, W) of the last update, on their device: for callbacks that want to show some."""
        self.add_state("values", default=[], dist_reduce_fx=None)
        self.add_state("texts", default=[], dist_reduce_fx=None)

    def update(
        self,
        alpha: Sequence[Tensor],
        instances: Sequence[Tensor],
        instance: Sequence[int] | Tensor,
        keys: Sequence[str],
        prompts: Sequence[str],
        kinds: Sequence[str],
        categories: Sequence[str] = (),
    ) -> None:
        """Add samples; their sizes may differ.

        Args:
            alpha: B predicted mattes, each (H, W) in [0, 1].
            instances: B stacks (K, H, W) in [0, 1]: the true alphas of all instances of the image.
            instance: (B,) index of the referred instance.
            keys: Name of the image, the same for all phrases of one image.
            prompts: The phrases.
            kinds: What each phrase describes by.
            categories: Category of the referred instance, where known.
        """
        self.latest = tuple(alpha)
        categories = categories or [""] * len(prompts)
        counts = {len(item) for item in (alpha, instances, instance, keys, prompts, kinds, categories)}
        if len(counts) != 1:
            raise ValueError(f"ReferringScore.update needs lists of one length, got lengths {sorted(counts)}.")
        for matte, truths, index, key, prompt, kind, category in zip(
            alpha, instances, [int(item) for item in instance], keys, prompts, kinds, categories
        ):
            check_shape(matte, ("H", "W"), f"alpha of {key}")
            check_range(matte, 0.0, 1.0, f"alpha of {key}")
            count = check_shape(truths, ("K", *matte.shape), f"instances of {key}")["K"]
            check_range(truths, 0.0, 1.0, f"instances of {key}")
            if not 0 <= index < count:
                raise ValueError(f"`instance` of {key} must be one of its {count} instances, got {index}.")
            # no Apple GPU has the float64 of the sums
            matte, truths = (
                item.detach().to("cpu" if item.device.type == "mps" else item.device) for item in (matte, truths)
            )
            coverage = float(truths[index].double().mean())
            text = json.dumps([key, prompt, kind, category, index, count, coverage], ensure_ascii=False)
            self.values.append(self._measure(matte, truths, index))
            self.texts.append(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))

    def _measure(self, matte: Tensor, truths: Tensor, index: int) -> Tensor:
        """Return the (methods, columns) values of one sample."""
        truths = truths.to(matte.device, torch.float32)
        mattes = matte.float()[None]
        if len(self.methods) > 1:
            everything = 1 - reduce(torch.mul, 1 - truths)
            mattes = torch.stack([mattes[0], torch.zeros_like(everything), everything, *truths])
        target = truths[index]
        overlaps = soft_iou(mattes, truths)
        trimap = trimap_from_alpha(target[None, None], scaled_kernel(max(target.shape)))[0, 0]
        difference = (mattes - target).abs()
        absolute = _sum(difference)
        area = target.numel()
        columns = {
            "soft_iou": overlaps[:, index],
            "sad": absolute / 1000,
            "mse": _sum(difference.square()) / area,
            "mae": absolute / area,
            # the mean over no pixels is NaN, which the averages leave out
            "band_mae": difference[:, trimap == 0.5].double().mean(1),
        }
        for name in ("grad", "conn"):
            error: Callable[..., float] = getattr(functional, name)
            scores = [error(one, target) for one in mattes] if self.boundary else [math.nan] * len(mattes)
            columns[name] = torch.tensor(scores, dtype=torch.float64, device=mattes.device)
        found = is_found(overlaps, index).double()
        qualities = torch.stack([columns[name] for name in QUALITIES], dim=1)
        strict = (overlaps[:, index] > STRICT_OVERLAP).double()
        rows = torch.cat([found[:, None], strict[:, None], qualities, qualities * found[:, None]], dim=1)
        if len(self.methods) > 1:
            # the blind choice: the mean over the perfect mattes of each instance is its exact expectation
            rows = torch.cat([rows[:3], rows[3:].mean(0, keepdim=True)])
        return rows.cpu()

    def newest(self) -> list[ReferringSample]:
        """Return the samples of the last update, in its order."""
        first = len(self.values) - len(self.latest)
        return [_sample(text, value) for text, value in zip(self.texts[first:], self.values[first:])]

    def reset(self) -> None:
        """Forget every sample."""
        super().reset()
        self.latest = ()

    def gather(self) -> list[ReferringSample]:
        """Return the samples of all processes, in an order that does not depend on how they were shared out.

        A collective operation: every process must call it.
        """
        own = [(text.cpu(), value.cpu()) for text, value in zip(self.texts, self.values)]
        own = [(text.numpy().tobytes(), value.numpy()) for text, value in own]
        shares = [own]
        if dist.is_available() and dist.is_initialized():
            shares = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(shares, own)
        samples = [ReferringSample(*json.loads(text), values=value) for share in shares for text, value in share]
        return sorted(samples, key=lambda sample: (sample.key, sample.instance, sample.kind, sample.prompt))

    def compute(self) -> dict[str, Any]:
        """Return the score card as plain nested dictionaries; see :func:`score_card`."""
        return score_card(self.gather(), self.average)


def _sample(text: Tensor, value: Tensor) -> ReferringSample:
    return ReferringSample(*json.loads(text.cpu().numpy().tobytes()), values=value.cpu().numpy())


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
