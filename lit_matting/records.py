"""The records that travel through the project: one sample, one batch, one output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_matting.checks import check_range, check_shape

Record = TypeVar("Record", bound="_TensorRecord")


class _TensorRecord:
    """Moves every tensor of a frozen dataclass, however nested; Lightning asks a batch for exactly these methods."""

    def _map(self: Record, function: Any) -> Record:
        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, _TensorRecord):
                return value._map(function)
            if isinstance(value, tuple):
                return tuple(apply(item) for item in value)
            if isinstance(value, dict):
                return {key: apply(item) for key, item in value.items()}
            return value

        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return dataclasses.replace(self, **{item.name: apply(getattr(self, item.name)) for item in fields})  # type: ignore[type-var]

    def to(self: Record, *args: Any, **kwargs: Any) -> Record:
        """Return the record with every tensor moved as ``Tensor.to`` would."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self: Record) -> Record:
        """Return the record with every tensor in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def detach(self: Record) -> Record:
        """Return the record with every tensor cut from its graph."""
        return self._map(lambda tensor: tensor.detach())


@dataclass(frozen=True)
class Detail(_TensorRecord):
    """A native-resolution crop of the image that the record holds as a whole, to train the refiner on real detail."""

    image: Tensor
    """(3, h, w) or, in a batch, (B, 3, h, w): RGB in [0, 1] at the photograph's own resolution."""
    target: Tensor
    """(1, h, w) or (B, 1, h, w): alpha in [0, 1]."""
    box: Tensor
    """(4,) or (B, 4): top, left, height, width of the crop as fractions of the whole image."""


@dataclass(frozen=True)
class MattingSample(_TensorRecord):
    """One image, one phrase, and the alpha (or mask) of what the phrase names."""

    image: Tensor
    """(3, H, W) float RGB in [0, 1]."""
    target: Tensor
    """(1, H, W) float in [0, 1]: the alpha, or a hard mask when ``has_alpha`` is False."""
    has_alpha: bool
    """False when the target is a hard mask, as in RefCOCO: the alpha terms then skip the sample."""
    prompt: str
    """The phrase."""
    prompt_kind: str
    """What the phrase describes by: ``colour``, ``position``, ``basic``, ``caption``, ... (the data set's own word)."""
    key: str
    """``dataset/shard/sample``: names the image, and is the same for all phrases of one image."""
    instance: int = 0
    """Which instance of the image the phrase refers to."""
    category: str = ""
    """The instance's category, where the data set has one."""
    instances: Tensor | None = None
    """(K, H, W) alphas of all instances of the image, row ``instance`` being the target: what "found" is judged by."""
    foreground: Tensor | None = None
    """(3, H, W) foreground colours, where the data set has them."""
    detail: Detail | None = None

    def __post_init__(self) -> None:
        sizes = check_shape(self.image, (3, "H", "W"), f"image of {self.key}")
        check_shape(self.target, (1, "H", "W"), f"target of {self.key}", sizes)
        check_range(self.target, 0.0, 1.0, f"target of {self.key}")


@dataclass(frozen=True)
class MattingBatch(_TensorRecord):
    """Samples of one data set, stacked, with the iteration they belong to."""

    image: Tensor
    """(B, 3, H, W) float RGB in [0, 1]."""
    target: Tensor
    """(B, 1, H, W) float in [0, 1]."""
    has_alpha: Tensor
    """(B,) bool."""
    prompts: tuple[str, ...]
    prompt_kinds: tuple[str, ...]
    keys: tuple[str, ...]
    instance: Tensor
    """(B,) int64."""
    categories: tuple[str, ...] = ()
    instances: tuple[Tensor, ...] | None = None
    """B tensors (K_i, H, W), where the source was asked for them."""
    foreground: Tensor | None = None
    """(B, 3, H, W)."""
    detail: Detail | None = None
    dataset: str = ""
    """The data set that every sample of this batch comes from."""
    iteration: int = -1
    """The optimizer step that the schedule made this batch for; -1 outside training."""
    phrases_per_image: int = 1
    """Rows ``[k P, (k + 1) P)`` hold the same image with P phrases: the network encodes it once for all of them."""
    opacity: Tensor | None = None
    """(B, 1, H, W) in [0, 1]: the photographs' own alpha channel, by which predicted mattes are multiplied."""

    @classmethod
    def stack(
        cls, samples: Sequence[MattingSample], dataset: str = "", iteration: int = -1, phrases_per_image: int = 1
    ) -> MattingBatch:
        """Stack samples of one size into a batch.

        Raises:
            ValueError: If the list is empty or the sizes differ; the message names the two samples.
        """
        if not samples:
            raise ValueError("a batch needs at least one sample, got an empty list.")
        first = samples[0]
        for sample in samples[1:]:
            if sample.image.shape != first.image.shape:
                raise ValueError(
                    f"samples of one batch must have one size: {first.key} is {tuple(first.image.shape)} but"
                    f" {sample.key} is {tuple(sample.image.shape)}; set an image_size."
                )

        def all_or_none(name: str) -> list[Any] | None:
            values = [getattr(sample, name) for sample in samples]
            return None if any(value is None for value in values) else values

        foreground, details, instances = all_or_none("foreground"), all_or_none("detail"), all_or_none("instances")
        return cls(
            image=torch.stack([sample.image for sample in samples]),
            target=torch.stack([sample.target for sample in samples]),
            has_alpha=torch.tensor([sample.has_alpha for sample in samples]),
            prompts=tuple(sample.prompt for sample in samples),
            prompt_kinds=tuple(sample.prompt_kind for sample in samples),
            keys=tuple(sample.key for sample in samples),
            instance=torch.tensor([sample.instance for sample in samples]),
            categories=tuple(sample.category for sample in samples),
            instances=None if instances is None else tuple(instances),
            foreground=None if foreground is None else torch.stack(foreground),
            detail=None
            if details is None
            else Detail(
                *(torch.stack([getattr(detail, name) for detail in details]) for name in ("image", "target", "box"))
            ),
            dataset=dataset,
            iteration=iteration,
            phrases_per_image=phrases_per_image,
        )

    def __len__(self) -> int:
        return self.image.shape[0]


@dataclass(frozen=True)
class MattingOutput(_TensorRecord):
    """Everything the network says about a batch. A field that a stage does not compute is None."""

    alpha: Tensor | None
    """(B, 1, H, W) in [0, 1]: the final matte, at the input's size."""
    alpha_lr: Tensor | None
    """(B, 1, h, w) in [0, 1]: the matte on the latent grid (h = H / 8)."""
    trimap: Tensor | None
    """(B, 1, h, w) in [0, 1]: the soft semantic trimap; 0 background, 0.5 transition, 1 foreground."""
    coarse_trimap: Tensor | None
    """(B, 3, h', w') logits of background, transition, foreground on the coarse level (h' = H / 32 mostly)."""
    grounding: Tensor | None
    """(B, 1, h, w) logits: where the phrase's thing is."""
    alphas: tuple[Tensor, ...] = ()
    """The refiner's alpha at each of its scales, coarse to fine, each (B, 1, H_s, W_s) in [0, 1]."""
    active: tuple[Tensor, ...] = ()
    """The refiner's active pixels at each of its scales, each (B, H_s, W_s) bool."""
    refined: tuple[Tensor, ...] = ()
    """The rows that the refiner worked on at each of its scales, each (B,) bool; empty: all of them everywhere. In
    training it may leave some out, and crops of small photographs have no half scale."""
    attention: dict[str, Tensor] = field(default_factory=dict)
    """Cross-attention by layer name, each (B, h_l, w_l), averaged over heads and over the phrase's own words."""
    features: Tensor | None = None
    """(B, C, h, w): the neck's features; the student is distilled towards them."""
    pyramid: dict[int, Tensor] = field(default_factory=dict)
    """Stride in pixels -> the backbone's features (B, C_s, H / s, W / s); only of a training step."""
