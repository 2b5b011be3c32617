"""Architectures without weights: small JSON files, and models filled with random numbers in seconds.

What ``pretrained: null`` builds. Useful for measuring memory and time, for tests, and as the frame that a checkpoint of
ours is loaded into; useless as a starting point of training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn

from lit_matting.checks import InputError

FOLDER = Path(__file__).parent / "architectures"

Model = TypeVar("Model", bound=nn.Module)


def read_architecture(name: str) -> dict[str, dict[str, Any]]:
    """Return the configurations of a model's parts, ``unet``, ``vae``, ``text_encoder``, ..., by name or from a file.

    Args:
        name: ``sd15``, ``sd21``, ..., or the path of a JSON file of the same form.

    Raises:
        InputError: If there is no such architecture; the message lists the known ones.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise InputError(
            f"`architecture` {name!r} is unknown: give one of {', '.join(known_architectures())}, or the path of a JSON"
            " file with the keys `unet`, `vae` and `text_encoder`."
        )
    try:
        parts = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"the architecture file {path} is no valid JSON: {error}.") from error
    missing = {"unet", "vae", "text_encoder"} - set(parts)
    if missing:
        raise InputError(f"the architecture file {path} lacks {', '.join(sorted(missing))}.")
    return parts


def known_architectures() -> list[str]:
    """Return the names that :func:`read_architecture` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def random_model(build: Callable[[], Model], dtype: torch.dtype = torch.float32) -> Model:
    """Build a model without spending time or memory on its own initialisation, and fill it with random weights.

    The same numbers on every call: a frozen part is left out of checkpoints, so two builds must agree. Weights have
    PyTorch's own spread, variance ``1 / (3 fan_in)``, and repeat a small pool: drawing 866 million numbers would take
    longer than using them once.

    Args:
        build: Makes the model; called on the meta device.
        dtype: Of the weights. Under ``torch.device("meta")`` the model stays there, without contents.

    Raises:
        TypeError: If the model has a parameter or buffer of a kind that is not known here.
    """
    with torch.device("meta"):
        model = build()
    if torch.get_default_device().type == "meta":
        return nn.Module.to(model, dtype)  # diffusers' own warns of what does not concern models without contents
    # one tensor at a time, so that a bfloat16 model never exists in float32
    generator = torch.Generator().manual_seed(0)
    # a prime length, so that no weight matrix has rows that repeat, and short enough for the processor's cache
    pool = torch.empty(262_139).uniform_(-1, 1, generator=generator).to(dtype)
    for name, module in model.named_modules():
        for key, value in list(module.named_parameters(recurse=False)):
            filled = torch.empty(value.shape, dtype=dtype)
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                filled.fill_(1.0 if key == "weight" else 0.0)
            elif key == "bias":
                filled.zero_()
            elif isinstance(module, nn.Embedding):
                _repeat(pool, 0.02 * math.sqrt(3), filled)
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                _repeat(pool, 1 / math.sqrt(value[0].numel()), filled)
            else:
                raise TypeError(f"no random initialisation is known for {name}.{key} of {type(module).__name__}.")
            setattr(module, key, nn.Parameter(filled, requires_grad=value.requires_grad))
        for key, value in list(module.named_buffers(recurse=False)):
            if key != "position_ids":
                raise TypeError(f"no initial value is known for the buffer {name}.{key}.")
            setattr(module, key, torch.arange(value.shape[-1]).expand(value.shape).clone())
    return model


def _repeat(pool: torch.Tensor, scale: float, into: torch.Tensor) -> None:
    """Fill ``into`` with the scaled pool, over and over."""
    flat = into.view(-1)
    for start in range(0, len(flat), len(pool)):
        part = flat[start : start + len(pool)]
        torch.mul(pool[: len(part)], scale, out=part)
