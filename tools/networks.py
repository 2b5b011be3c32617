"""Networks for the tools: from a checkpoint, or as a configuration describes them, with random weights."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_matting.checkpoints import make_network
from lit_matting.checks import InputError
from lit_matting.devices import Precision
from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.pipeline import MattingPipeline

SEED = 0
_REFINER = {"class_path": "lit_matting.networks.refiner.SparseRefiner"}


def open_pipeline(
    given: str | os.PathLike[str], precision: Precision | None, trust: Sequence[str] = ()
) -> MattingPipeline:
    """Return the pipeline of a checkpoint, or of a folder of save_pretrained, on the CPU.

    Raises:
        InputError: As the pipeline's own constructors do.
    """
    build = MattingPipeline.from_pretrained if os.path.isdir(given) else MattingPipeline.from_checkpoint
    return build(given, device="cpu", precision=precision, trust=trust)


def random_network(path: str | os.PathLike[str]) -> tuple[MattingNetwork, int]:
    """Return a network with random weights, always the same, and the side in pixels of the square it sees.

    Args:
        path: An experiment of ``configs/experiment``, or a backbone of ``configs/backbone``, which gets the default
            heads and refiner. Pre-trained weights that it names are not loaded.

    Raises:
        InputError: If it is neither.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the configuration {os.fspath(path)!r} cannot be read: {error}.") from error
    description: dict[str, Any]
    size = 512
    if isinstance(content, dict) and "class_path" in content:
        description = {"backbone": content, "refiner": _REFINER}
    elif isinstance(content, dict) and isinstance(content.get("model"), dict):
        known = inspect.signature(MattingNetwork).parameters
        description = {name: value for name, value in content["model"].items() if name in known}
        size = content.get("data", {}).get("init_args", {}).get("image_size", size)
    else:
        raise InputError(f"{os.fspath(path)!r} is neither an experiment nor a backbone: give a file of configs/.")
    if isinstance(description["backbone"], str):  # a backbone's file, named beside the experiment
        description["backbone"] = yaml.safe_load((Path(path).parent / description["backbone"]).read_text())
    arguments = description["backbone"].setdefault("init_args", {})
    if "pretrained" in arguments:
        arguments["pretrained"] = None
    torch.manual_seed(SEED)
    network = make_network(description).eval().requires_grad_(False)
    network.backbone.check_size(size, size)
    return network, size
