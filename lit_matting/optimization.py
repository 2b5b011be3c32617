"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch.nn as nn

from lit_matting.checks import InputError

log = logging.getLogger(__name__)

BACKBONE = "network.backbone."
"""Names in the part of the network that one flag swaps begin with this."""


def parameter_groups(
    module: nn.Module, learning_rate: float, weight_decay: float, scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return optimizer groups of the trainable parameters, one per (learning-rate scale, kind of parameter).

    Vectors and scalars (biases, norms, the adapter's gamma) are not decayed: pulling them to zero regularises nothing.
    Lookup tables (embeddings of words and positions) are groups of their own, marked ``tables``, for an optimizer that
    treats matrices as linear maps (:class:`lit_matting.muon.Muon`): their rows are not mixed by any product.

    Args:
        module: The module whose trainable parameters are grouped.
        learning_rate: Of the optimizer.
        weight_decay: Of the optimizer, for matrices and kernels.
        scales: Prefix of parameter names -> factor on the learning rate; the longest matching prefix wins.

    Raises:
        InputError: If a prefix matches no trainable parameter. One inside the backbone is only warned about: another
            backbone in the same experiment has other parts.
    """
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    unused = set(scales)
    embeddings = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix = max((p for p in scales if name == p or name.startswith(p + ".")), key=len, default="")
        unused.discard(prefix)
        decayed = parameter.ndim > 1
        # what multiplies something is called a weight: a table of positions is a parameter by itself
        table = decayed and (name in embeddings or not name.endswith("weight"))
        kind = "/tables" if table else "" if decayed else "/no_decay"
        group = groups.setdefault(
            (prefix, kind),
            {
                "params": [],
                "lr": learning_rate * scales.get(prefix, 1.0),
                "weight_decay": weight_decay if decayed else 0.0,
                "name": f"{prefix or 'rest'}{kind}",
                "tables": table,
            },
        )
        group["params"].append(parameter)
    of_another_backbone = {prefix for prefix in unused if prefix.startswith(BACKBONE)}
    for prefix in sorted(of_another_backbone):
        log.warning(
            "`model.learning_rate_scales` names %r, but nothing that is trained in this backbone starts like that: it"
            " has no effect.",
            prefix,
        )
    wrong = sorted(unused - of_another_backbone)
    if wrong:
        known = ", ".join(
            sorted({name.rsplit(".", 2)[0] for name, p in module.named_parameters() if p.requires_grad})[:6]
        )
        raise InputError(
            f"`model.learning_rate_scales` names {wrong}, but no trainable parameter starts like that;"
            f" they start with {known}, ..."
        )
    return list(groups.values())


class LearningRateSchedule(ABC):
    """A factor on the learning rate as a function of the step.

    Args:
        warmup_steps: Steps of linear warm-up from 0.
    """

    def __init__(self, warmup_steps: int = 0) -> None:
        self.warmup_steps = warmup_steps

    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor at optimizer step ``step`` (from 0) of ``total_steps``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.after_warmup(min(1.0, done))

    @abstractmethod
    def after_warmup(self, done: float) -> float:
        """Return the factor when a share ``done`` in [0, 1] of the steps after warm-up is over."""


class Constant(LearningRateSchedule):
    """The full learning rate after warm-up."""

    def after_warmup(self, done: float) -> float:
        return 1.0


class Cosine(LearningRateSchedule):
    """Half a cosine down to a final factor.

    Args:
        warmup_steps: Steps of linear warm-up from 0.
        final: Factor at the last step.
    """

    def __init__(self, warmup_steps: int = 0, final: float = 0.0) -> None:
        super().__init__(warmup_steps)
        self.final = final

    def after_warmup(self, done: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


class Polynomial(LearningRateSchedule):
    """``(1 - done)^power``, as the published referring-segmentation recipes use it.

    Args:
        warmup_steps: Steps of linear warm-up from 0.
        power: The exponent; 0.9 is the customary value.
    """

    def __init__(self, warmup_steps: int = 0, power: float = 0.9) -> None:
        super().__init__(warmup_steps)
        self.power = power

    def after_warmup(self, done: float) -> float:
        return (1 - done) ** self.power
