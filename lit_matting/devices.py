"""Where and in which precision inference runs, chosen by itself; and bringing a network there."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn as nn

from lit_matting.backbones.image import VAEEncoder
from lit_matting.checks import InputError
from lit_matting.networks.matting_network import MattingNetwork

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device asked for, or the best one there is.

    Raises:
        InputError: If there is no such device.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"`device` {device!r} is unknown: give cuda, cuda:1, mps or cpu.") from error
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(chosen.type, lambda: True)
    if not there() or (chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"`device` {str(chosen)!r} is not available to PyTorch on this machine; try cpu.")
    return chosen


LARGE = 50_000_000
"""Parameters from which on half precision is worth its conversions on a CPU; the tiny network is slower in it."""


def pick_precision(device: torch.device, precision: str | None = None, parameters: int = LARGE) -> Precision:
    """Return the precision asked for, or the fastest that keeps mattes right on a device.

    Args:
        device: Where the network runs.
        precision: What was asked for.
        parameters: Of the network.

    Raises:
        InputError: If the precision is unknown, or fp16 is asked of a CPU.
    """
    if precision is not None:
        if precision not in DTYPES:
            raise InputError(f"`precision` must be one of {', '.join(DTYPES)}, got {precision!r}.")
        if precision == "fp16" and device.type == "cpu":
            raise InputError("`precision` fp16 is slower than fp32 on a CPU: choose bf16 or fp32.")
        return precision  # type: ignore[return-value]
    if device.type == "cuda":
        # older cards emulate it, at a loss
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    if device.type == "cpu" and parameters >= LARGE:
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return "bf16" if any(getattr(torch.cpu, check, lambda: False)() for check in checks) else "fp32"
    return "fp32"


def place(network: MattingNetwork, device: torch.device, precision: Precision) -> None:
    """Bring a network to a device, and the layers that run in half precision into it: all but the refiner's."""
    network.to(device)
    if precision != "fp32":
        for name in ("backbone.unet", "neck", "coarse_trimap_head", "grounding_head", "trimap_head", "alpha_head"):
            part = network
            for attribute in name.split("."):
                part = getattr(part, attribute, None)
            if part is not None:
                _to_half(part, DTYPES[precision])
    encoder = getattr(network.backbone, "image_encoder", None)
    if precision == "bf16" and isinstance(encoder, VAEEncoder):
        # half of a call's work, and half of its memory; autocast never reaches it
        encoder.to(torch.bfloat16)
        if device.type == "cpu":
            # its convolutions ran 3.3 times faster so (512 x 512, AMX)
            encoder.to(memory_format=torch.channels_last)


def _to_half(part: nn.Module, dtype: torch.dtype) -> None:
    """Convert what autocast would convert again on every call: the same weights, half the memory."""
    for module in part.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)
