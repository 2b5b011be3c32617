"""A trained network that a student is distilled from."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import torch
from torch import Tensor

from lit_matting.backbones.pruning import mapped
from lit_matting.checkpoints import build_network, read_checkpoint
from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.records import MattingBatch, MattingOutput

log = logging.getLogger(__name__)


class Teacher:
    """Answers for a student to imitate, without gradients.

    It is no module: the student's optimizer, averages, checkpoints and processes never see it. Frozen parts of the
    backbone that are the same in both are kept once, and the latent of an image is then computed once.

    Args:
        network: The trained network; it is put in eval mode and frozen.
        student: The network to be taught.
    """

    def __init__(self, network: MattingNetwork, student: MattingNetwork) -> None:
        self.network = network.eval().requires_grad_(False)
        self.blocks = student.backbone.blocks_from(network.backbone)
        """Of the student's backbone: its modules -> the teacher's; see :func:`mapped`."""
        ours, theirs = student.backbone.frozen_hashes(), network.backbone.frozen_hashes()
        self.shared = tuple(name for name, value in ours.items() if theirs.get(name) == value)
        for name in self.shared:
            network.backbone.set_submodule(name, student.backbone.get_submodule(name))

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], student: MattingNetwork) -> Teacher:
        """Read a teacher from what ``python -m lit_matting fit`` wrote; averaged weights where the run averaged.

        Raises:
            InputError: As :func:`~lit_matting.checkpoints.read_checkpoint`.
        """
        return cls(build_network(read_checkpoint(path)), student)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self  # an average of the student needs no second teacher

    def to(self, device: torch.device | str) -> Teacher:
        """Move the network."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def start(self, student: MattingNetwork) -> float:
        """Copy the teacher's weights into the student, block by block, where names and shapes agree.

        Returns:
            The share of the student's trained parameters that were copied; the rest stays as it was built.
        """
        weights = self.network.state_dict()
        frozen = tuple(f"backbone.{name}." for name in student.backbone.frozen_modules())
        copied = total = 0
        for name, value in student.state_dict().items():
            if frozen and name.startswith(frozen):
                continue
            source = weights.get(self.name_of(name))
            total += value.numel()
            if source is not None and source.shape == value.shape:
                value.copy_(source)
                copied += value.numel()
        log.info("the student starts with %.1f %% of its %d parameters from the teacher", 100 * copied / total, total)
        return copied / total

    def name_of(self, name: str) -> str:
        """Return what the teacher calls a parameter of the student's network."""
        if not name.startswith("backbone."):
            return name
        return f"backbone.{mapped(name.removeprefix('backbone.'), self.blocks)}"

    def latent(self, student: MattingNetwork, batch: MattingBatch) -> Tensor | None:
        """Return the encoded images, one per image, if student and teacher encode them alike."""
        if "image_encoder" not in self.shared:
            return None
        return student.backbone.encode_image(batch.image[:: batch.phrases_per_image])

    @torch.no_grad()
    def __call__(self, batch: MattingBatch, output: MattingOutput, latent: Tensor | None = None) -> MattingOutput:
        """Return the teacher's output, its attention under the names of the student's layers.

        Args:
            batch: What the student saw.
            output: What the student said.
            latent: See :meth:`latent`.
        """
        theirs = self.network(
            batch.image,
            batch.prompts,
            refine=False,
            phrases_per_image=batch.phrases_per_image,
            latent=latent,
        )
        names = {layer: mapped(layer, self.blocks) for layer in output.attention}
        attention = {layer: theirs.attention[name] for layer, name in names.items() if name in theirs.attention}
        return dataclasses.replace(theirs, attention=attention)
