"""Muon: orthogonal updates for matrices and kernels, AdamW for everything else.

Apart from optimization.py, which every run imports: pytorch_optimizer takes a second to import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_optimizer
from torch import Tensor


class Muon(pytorch_optimizer.Muon):
    """The Muon of pytorch_optimizer with the division of parameters that it asks for made by itself.

    Weights of hidden layers move along the orthogonal factor of their momentum (K. Jordan et al., "Muon: An optimizer
    for hidden layers in neural networks", 2024), a kernel (O, I, h, w) as the matrix (O, I h w). Their updates are
    scaled to the size that AdamW's have, ``0.2 sqrt(max(rows, columns))`` (J. Liu et al., "Muon is scalable for LLM
    training", arXiv:2502.16982, section 2.2), so that one learning rate serves both. AdamW moves what is no such
    matrix: biases and norms, lookup tables (a step touches few of their rows), and layers with few inputs or outputs.

    Args:
        params: Parameters, or groups of them as :func:`lit_matting.optimization.parameter_groups` makes them.
        lr: Learning rate of groups that name none.
        weight_decay: Decoupled, of groups that name none.
        momentum: Of the matrices.
        betas: Of AdamW.
        eps: Of AdamW.
        smallest: A matrix with fewer rows or columns than this is left to AdamW.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        smallest: int = 16,
    ) -> None:
        members = list(params)
        groups = members if members and isinstance(members[0], Mapping) else [{"params": members}]
        super().__init__(
            [part for group in groups for part in _divided(group, smallest)],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            use_adjusted_lr=True,
            adamw_lr=lr,
            adamw_betas=betas,
            adamw_wd=weight_decay,
            adamw_eps=eps,
        )
        # as torch's own optimizers keep them: whoever makes groups reads them here
        self.defaults.update(lr=lr, weight_decay=weight_decay)


def _divided(group: Mapping[str, Any], smallest: int) -> list[dict[str, Any]]:
    """Split a group into what is orthogonalised and what is left to AdamW; an empty part is left out."""
    members = group["params"]
    hidden, others = [], []
    for parameter in [members] if isinstance(members, Tensor) else members:
        matrix = parameter.ndim > 1 and min(parameter.shape[0], parameter.shape[1:].numel()) >= smallest
        (hidden if matrix and not group.get("tables") else others).append(parameter)
    parts = [{**group, "params": hidden, "use_muon": True}, {**group, "params": others, "use_muon": False}]
    if hidden and others and "name" in group:
        parts[1]["name"] = f"{group['name']}/adamw"
    return [part for part in parts if part["params"]]
