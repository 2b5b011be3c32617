"""The contract every backbone keeps: (image, phrases) -> feature pyramid, cross-attention maps, text features.

A backbone works in three steps, so that several phrases for one photograph share the costly first one:

    latent = backbone.encode_image(image)      # once per photograph
    text = backbone.encode_text(phrases)       # once per phrase
    output = backbone.decode(latent, text)     # once per pair
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from lit_matting.checks import InputError
from lit_matting.records import _TensorRecord


@dataclass(frozen=True)
class TextFeatures(_TensorRecord):
    """What a text encoder says about a list of phrases."""

    tokens: Tensor
    """(B, T, C): one vector per token."""
    words: Tensor
    """(B, T) bool: the phrase's own words; begin, end and padding tokens are out. Only these take part in grounding."""
    valid: Tensor
    """(B, T) bool: tokens that cross-attention may look at."""
    pooled: Tensor
    """(B, C): the phrase as a whole."""


@dataclass(frozen=True)
class BackboneOutput(_TensorRecord):
    """What a backbone says about images and phrases."""

    features: dict[int, Tensor]
    """Stride in pixels -> (B, ``channels[stride]``, H / stride, W / stride)."""
    attention: dict[str, Tensor]
    """Layer name -> cross-attention probabilities (B, T, h_l, w_l), float32, averaged over heads. May be empty."""
    text: TextFeatures


class Backbone(nn.Module, ABC):
    """Base of all backbones; see the module's docstring for the three steps.

    A subclass sets the four attributes below and implements the three steps. Parameters that are never trained have
    ``requires_grad=False`` and are left out of optimizers, averages and checkpoints (:meth:`frozen_modules`).
    """

    channels: dict[int, int]
    """Stride in pixels -> number of feature channels, finest first; the finest stride is the latent grid's."""
    text_channels: int
    """C of :class:`TextFeatures`."""
    max_tokens: int
    """T of :class:`TextFeatures`."""
    size_multiple: int
    """Image sides must be a multiple of this, in pixels."""

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Return the latent of images (B, 3, H, W) in [0, 1]."""

    @abstractmethod
    def encode_text(self, phrases: Sequence[str]) -> TextFeatures:
        """Return the features of phrases, on the backbone's device."""

    @abstractmethod
    def decode(self, latent: Tensor, text: TextFeatures) -> BackboneOutput:
        """Return features and attention for latents and phrases of the same batch size."""

    def forward(self, image: Tensor, phrases: Sequence[str]) -> BackboneOutput:
        """Return features and attention for images (B, 3, H, W) in [0, 1] and B phrases.

        Raises:
            ValueError: If the number of phrases is not B or a side is no multiple of :attr:`size_multiple`.
        """
        if len(phrases) != image.shape[0]:
            raise ValueError(f"a batch of {image.shape[0]} images needs as many phrases, got {len(phrases)}.")
        self.check_size(*image.shape[-2:])
        return self.decode(self.encode_image(image), self.encode_text(phrases))

    def check_size(self, height: int, width: int) -> None:
        """Raise ``InputError`` unless both sides, in pixels, suit the backbone."""
        if height % self.size_multiple or width % self.size_multiple:
            near = max(self.size_multiple, round(width / self.size_multiple) * self.size_multiple)
            raise InputError(
                f"`data.image_size` must be a multiple of {self.size_multiple} for {type(self).__name__}, got"
                f" {width} x {height} (try {near})."
            )

    def frozen_modules(self) -> dict[str, nn.Module]:
        """Return the parts that are loaded, never trained: kept in eval mode and out of checkpoints."""
        return {}

    def frozen_hashes(self) -> dict[str, str]:
        """Return part -> SHA-256 of the weights of every frozen part.

        A checkpoint holds trained weights only. These sums say which frozen ones it belongs to: the same folder loaded
        in another precision, or another text encoder of the same shape, would be accepted in silence otherwise.
        """
        if self._frozen_hashes is None:
            self._frozen_hashes = {name: _weights_sha256(part) for name, part in self.frozen_modules().items()}
        return dict(self._frozen_hashes)

    _frozen_hashes: dict[str, str] | None = None

    def check_frozen(self, hashes: Mapping[str, str], what: str) -> None:
        """Check that the frozen parts are those that ``what``, a checkpoint, was trained with.

        Args:
            hashes: What :meth:`frozen_hashes` said when it was written; parts that are not frozen here are passed over,
                since their weights are in the checkpoint or are missed there.
            what: Names the checkpoint in the error.

        Raises:
            InputError: If a part has other weights; the message names the parts.
        """
        known = self.frozen_hashes() if hashes else {}
        other = [name for name, value in hashes.items() if known.get(name, value) != value]
        if other:
            sums = ", ".join(f"{name} {known[name][:8]} instead of {hashes[name][:8]}" for name in other)
            raise InputError(
                f"{what} belongs to a backbone with another {' and another '.join(other)} than {self.name} has (SHA-256"
                f" {sums}): give the weights it was trained with as `model.backbone`'s `pretrained`, in the same"
                " `frozen_precision`."
            )

    def blocks_from(self, teacher: Backbone) -> dict[str, str]:
        """Return module of this backbone -> module of a larger one that does the same work there.

        A student takes its first weights from there, and its examples. What is not named has the same name in both.
        Parameters and attention layers are looked up by the longest name they begin with.
        """
        return {}

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode everywhere but in the frozen parts."""
        super().train(mode)
        for module in self.frozen_modules().values():
            module.eval()
        return self

    @property
    def name(self) -> str:
        """What the backbone calls itself in reports and checkpoints."""
        return type(self).__name__


def _weights_sha256(module: nn.Module) -> str:
    """Hash names, precisions, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
