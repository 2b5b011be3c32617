"""Smaller UNets from larger ones: whole blocks are left out, and the rest keeps the teacher's weights.

The choice of blocks follows BK-SDM (Kim et al. 2024): the second of two residual-and-attention pairs of every down
block, the middle of three of every up block, the mid block, the innermost level. What is left out is stated in the
configuration; where each remaining block comes from is an explicit map. Different from BK-SDM's fixed models, any
combination works, and so does any UNet of the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from lit_matting.checks import InputError

PER_LEVEL = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "num_attention_heads",
    "layers_per_block",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "only_cross_attention",
)
"""Entries of a UNet's configuration that may hold one value for each level, outermost first."""


@dataclass(frozen=True)
class Pruning:
    """What to leave out of a UNet. Of Stable Diffusion 2.1's 865,910,724 parameters there remain:

    - ``layers_per_block: 1``: 583,480,964 (BK-SDM base)
    - and ``mid_block: false``: 485,787,524 (small)
    - ``layers_per_block: 1``, ``levels: 3``: 424,519,044
    - and ``mid_block: false``: 326,825,604 (tiny)

    Args:
        layers_per_block: Residual layers to keep in each down block; each up block keeps one more. Null: all.
        mid_block: Keep the mid block.
        levels: Levels to keep, counted from the finest. Null: all. The features end at the last of them.
    """

    layers_per_block: int | None = None
    mid_block: bool = True
    levels: int | None = None


def pruned_config(config: Mapping[str, Any], pruning: Pruning) -> dict[str, Any]:
    """Return the configuration of the pruned UNet.

    Raises:
        InputError: If more is to be kept than there is.
    """
    result = {key: value for key, value in config.items() if not key.startswith("_")}
    levels = len(result["block_out_channels"])
    kept = pruning.levels or levels
    if not 2 <= kept <= levels:
        raise InputError(f"`pruning.levels` must be between 2 and the UNet's {levels}, got {kept}.")
    for key in PER_LEVEL:
        if isinstance(result.get(key), (list, tuple)):
            result[key] = list(result[key][:kept])
    result["up_block_types"] = list(result["up_block_types"][levels - kept :])
    layers = _layers(config)
    if pruning.layers_per_block is not None:
        if not 1 <= pruning.layers_per_block <= min(layers):
            raise InputError(
                f"`pruning.layers_per_block` must be between 1 and the UNet's {min(layers)}, got"
                f" {pruning.layers_per_block}."
            )
        result["layers_per_block"] = pruning.layers_per_block
    if not pruning.mid_block:
        result["mid_block_type"] = None
    return result


def pruning_between(config: Mapping[str, Any], student: Mapping[str, Any]) -> Pruning:
    """Return which pruning of a UNet leaves the blocks that another, smaller one has, whatever the widths.

    Args:
        config: Of the whole UNet.
        student: Of the other one.
    """
    return Pruning(
        layers_per_block=_layers(student)[0],
        mid_block=student["mid_block_type"] is not None,
        levels=len(student["block_out_channels"]),
    )


def block_map(config: Mapping[str, Any], pruning: Pruning) -> dict[str, str]:
    """Return module of the pruned UNet -> module of the whole one that it takes its weights from.

    Everything that is not named here, the layers before and after the blocks, keeps its place. Both work on the same
    grid, with one exception: where levels were left out, the mid block works on the grid of the last level kept.
    """
    levels = len(config["block_out_channels"])
    kept = pruning.levels or levels
    dropped = levels - kept
    blocks: dict[str, str] = {}
    for level in range(kept):
        teacher_layers = _layers(config)[level]
        layers = pruning.layers_per_block or teacher_layers
        for layer in range(layers):
            for kind in _kinds(config["down_block_types"][level]):
                name = f"down_blocks.{level}.{kind}.{layer}"
                blocks[name] = name
        if level < kept - 1:
            blocks[f"down_blocks.{level}.downsamplers.0"] = f"down_blocks.{level}.downsamplers.0"
        # up blocks are counted from the innermost, and their last layer is the one that meets the next finer level
        up = kept - 1 - level
        for layer, source in enumerate([*range(layers), teacher_layers]):
            for kind in _kinds(config["up_block_types"][up + dropped]):
                blocks[f"up_blocks.{up}.{kind}.{layer}"] = f"up_blocks.{up + dropped}.{kind}.{source}"
        if level > 0:
            blocks[f"up_blocks.{up}.upsamplers.0"] = f"up_blocks.{up + dropped}.upsamplers.0"
    if pruning.mid_block:
        blocks["mid_block"] = "mid_block"
    return blocks


def mapped(name: str, blocks: Mapping[str, str]) -> str:
    """Return the whole UNet's name of what the pruned one calls ``name``: a parameter, a module, an attention layer.

    Example:
        >>> blocks = {"up_blocks.0.attentions.1": "up_blocks.1.attentions.2"}
        >>> mapped("up_blocks.0.attentions.1.transformer_blocks.0", blocks)
        'up_blocks.1.attentions.2.transformer_blocks.0'
        >>> mapped("conv_in.weight", blocks)
        'conv_in.weight'
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in blocks:
            return ".".join([blocks[prefix], *parts[length:]])
    return name


def prune(unet: UNet2DConditionModel, pruning: Pruning) -> UNet2DConditionModel:
    """Return a pruned copy of a UNet, with the weights of the blocks that stay.

    Args:
        unet: The whole UNet, its output layers included; it is left as it is.
        pruning: What to leave out.

    Raises:
        InputError: If more is to be kept than there is, or what stays does not fit together, as where the levels beside
            a removed one have different widths.
    """
    with torch.device("meta"):
        student = UNet2DConditionModel(**pruned_config(unet.config, pruning))
    blocks = block_map(unet.config, pruning)
    weights = unet.state_dict()
    chosen = {}
    for name, value in student.state_dict().items():
        source = weights[mapped(name, blocks)]
        if source.shape != value.shape:
            raise InputError(
                f"`pruning` does not fit this UNet: {name} would have the shape {tuple(value.shape)}, but"
                f" {mapped(name, blocks)} has {tuple(source.shape)}; keep more `levels`."
            )
        chosen[name] = source.clone()
    student.load_state_dict(chosen, assign=True)
    return student


def _kinds(block_type: str) -> tuple[str, ...]:
    """What the layers of a block consist of."""
    return ("resnets", "attentions") if "Attn" in block_type else ("resnets",)


def _layers(config: Mapping[str, Any]) -> list[int]:
    """Residual layers of each down block."""
    layers = config["layers_per_block"]
    return [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)
