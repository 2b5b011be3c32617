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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lit_matting.checks import check_range, check_shape
from lit_matting.metrics import functional
from lit_matting.metrics.score_card import METHODS, QUALITIES, Average, ReferringSample, score_card
from lit_matting.targets import scaled_kernel, trimap_from_alpha

STRICT_OVERLAP = 0.5
"""Soft IoU with the referred instance above which a sample counts as strictly found."""
ALONE_OVERLAP = 0.1
"""Soft IoU above which the only instance of an image counts as found: there is no rival to overlap less."""
TIE = 1e-9
REMEMBERED = 8
"""Instances whose baselines and band are kept for their next phrase."""


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
class _Known:
    """What is known of an instance without any prediction."""

    truths: Tensor
    """(K, H, W)."""
    boundary: bool
    """Whether the baselines have their gradient and connectivity errors."""
    band: Tensor
    """(H, W) bool: the unknown band of the instance."""
    baselines: Tensor
    """(baselines, columns), on the CPU."""


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
    errors: functional.Dialect = "matlab"
    """The dialect of the gradient and connectivity errors; protocols ask for it."""

    def __init__(self, boundary: bool = False, baselines: bool = True, average: Average = "phrase") -> None:
        # the records are ragged and hold text, so they are gathered as objects in `gather`, not state by state
        super().__init__(sync_on_compute=False)
        if average not in ("phrase", "instance"):
            raise ValueError(f"`average` must be 'phrase' or 'instance', got {average!r}.")
        self.boundary = boundary
        self.methods = METHODS if baselines else METHODS[:1]
        self.average = average
        self._known: dict[tuple[str, int], _Known] = {}
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
            self.values.append(self._measure(matte, truths, key, index))
            self.texts.append(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))

    def _measure(self, matte: Tensor, truths: Tensor, key: str, index: int) -> Tensor:
        """Return the (methods, columns) values of one sample."""
        known = self._known_about(truths, key, index)
        truths = truths.to(matte.device, torch.float32)
        rows = self._rows(matte.float()[None], truths, index, known.band.to(matte.device))
        return torch.cat([rows, known.baselines])

    def _known_about(self, truths: Tensor, key: str, index: int) -> _Known:
        """Return what needs no prediction; all phrases of an instance share it, and mostly come one after the other."""
        known = self._known.get((key, index))
        if known is not None and known.boundary == self.boundary and _same(known.truths, truths):
            return known
        whole = truths.float()
        target = whole[index]
        band = trimap_from_alpha(target[None, None], scaled_kernel(max(target.shape)))[0, 0] == 0.5
        baselines = torch.zeros(0, 2 + 2 * len(QUALITIES), dtype=torch.float64)
        if len(self.methods) > 1:
            everything = 1 - reduce(torch.mul, 1 - whole)
            mattes = torch.stack([torch.zeros_like(everything), everything, *whole])
            rows = self._rows(mattes, whole, index, band)
            # the blind choice: the mean over the perfect mattes of each instance is its exact expectation
            baselines = torch.cat([rows[:2], rows[2:].mean(0, keepdim=True)])
        known = _Known(truths, self.boundary, band, baselines)
        while len(self._known) >= REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[key, index] = known
        return known

    def _rows(self, mattes: Tensor, truths: Tensor, index: int, band: Tensor) -> Tensor:
        """Return the values of mattes (M, H, W) against one instance, (M, columns)."""
        target = truths[index]
        overlaps = soft_iou(mattes, truths)
        difference = (mattes - target).abs()
        absolute = _sum(difference)
        area = target.numel()
        columns = {
            "soft_iou": overlaps[:, index],
            "sad": absolute / 1000,
            "mse": _sum(difference.square()) / area,
            "mae": absolute / area,
            # the mean over no pixels is NaN, which the averages leave out
            "band_mae": difference[:, band].double().mean(1),
        }
        for name in ("grad", "conn"):
            error: Callable[..., float] = getattr(functional, name)
            scores = (
                [error(one, target, dialect=self.errors) for one in mattes]
                if self.boundary
                else [math.nan] * len(mattes)
            )
            columns[name] = torch.tensor(scores, dtype=torch.float64, device=mattes.device)
        found = is_found(overlaps, index).double()
        strict = (overlaps[:, index] > STRICT_OVERLAP).double()
        qualities = torch.stack([columns[name] for name in QUALITIES], dim=1)
        return torch.cat([found[:, None], strict[:, None], qualities, qualities * found[:, None]], dim=1).cpu()

    def newest(self) -> list[ReferringSample]:
        """Return the samples of the last update, in its order."""
        first = len(self.values) - len(self.latest)
        return [_sample(text, value) for text, value in zip(self.texts[first:], self.values[first:])]

    def reset(self) -> None:
        """Forget every sample."""
        super().reset()
        self.latest = ()
        self._known.clear()

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


def _same(first: Tensor, second: Tensor) -> bool:
    alike = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
    return alike and torch.equal(first, second)


def _sample(text: Tensor, value: Tensor) -> ReferringSample:
    return ReferringSample(*json.loads(text.cpu().numpy().tobytes()), values=value.cpu().numpy())
