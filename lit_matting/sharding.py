"""Spreading the trained weights over processes (FSDP2), for backbones that do not fit one device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn as nn

from lit_matting.networks.matting_network import MattingNetwork

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(network: MattingNetwork, mesh: DeviceMesh) -> None:
    """Shard everything a network trains, in place: each process keeps a part and borrows the rest layer by layer.

    Module by module, never the network as a whole: encoding, decoding and refining are called one by one. The frozen
    parts stay whole. They need no gradients, and the text encoder's cache answers at different times in different
    processes, which must not wait for each other then.

    Args:
        network: The network, every parameter still a plain tensor.
        mesh: One-dimensional mesh of the processes that share the data.
    """
    from torch.distributed.fsdp import fully_shard

    backbone = network.backbone
    frozen = set(map(id, backbone.frozen_modules().values()))
    inner = [part for part in backbone.children() if id(part) not in frozen]
    for part in inner:
        # the largest part runs block by block; its forward pass holds one block whole at a time
        for name in ("down_blocks", "mid_block", "up_blocks"):
            blocks = getattr(part, name, None)
            for block in blocks if isinstance(blocks, nn.ModuleList) else [blocks]:
                if block is not None and _has_parameters(block):
                    fully_shard(block, mesh=mesh)
    outer = [part for part in network.children() if part is not backbone]
    for part in (*inner, *outer):
        if _has_parameters(part):
            fully_shard(part, mesh=mesh)


def _has_parameters(part: nn.Module) -> bool:
    return next(part.parameters(), None) is not None
