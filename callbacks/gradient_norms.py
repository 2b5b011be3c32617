"""How large the gradients are, group by group."""

from __future__ import annotations

import lightning.pytorch as pl
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class GradientNorms(pl.Callback):
    """Log the gradient's L2 norm of every parameter group as ``grad_norm/<group>``, before clipping.

    The groups are those of ``model.learning_rate_scales``, each split into matrices, lookup tables and vectors. With
    sharded parameters (FSDP) it is the norm of this process's share.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        norms = {}
        for index, group in enumerate(optimizer.param_groups):
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            norms[f"grad_norm/{group.get('name', index)}"] = get_total_norm(gradients)
        pl_module.log_dict(norms)
