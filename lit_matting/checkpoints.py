"""From a checkpoint to the network it holds, without running anything the checkpoint says.

A checkpoint is untrusted data: people download them. It is read with ``weights_only=True``, so it can hold tensors and
plain values but no code. It also names the classes of its network, and naming is enough to run code: a factory called
``os._exit``, a class that downloads in its constructor. So only classes of this package may be named, and of packages
that the caller says to trust.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_matting.checks import InputError
from lit_matting.files import whole_file
from lit_matting.metrics.report import file_digest
from lit_matting.networks.matting_network import MattingNetwork

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_PREFIX = "network."


@dataclass
class Checkpoint:
    """What inference needs of a trained model."""

    network: dict[str, Any]
    """How :func:`build_network` makes the network: its arguments, classes by ``class_path`` and ``init_args``."""
    weights: dict[str, Tensor]
    """By the network's own names; the backbone's loaded, never trained parts may be missing."""
    image_size: int
    """Side, in pixels, of the square the network sees."""
    threshold: float | None = None
    """The confidence below which the phrase's thing is not there, where that was calibrated."""
    frozen: dict[str, str] = field(default_factory=dict)
    """Part of the backbone that is not among the weights -> SHA-256 of the weights it must have."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What else the checkpoint says about itself: backbone, step."""
    known_sha256: list[str] = field(default_factory=list)
    """Of the file with these weights, and of what it was before calibration rewrote it; see :meth:`file_sha256`."""
    file: tuple[Path, tuple[int, int]] | None = None
    """The file, its size and time when it was opened; None once its SHA-256 is known."""

    def file_sha256(self) -> list[str]:
        """Return every SHA-256 by which a report may know these weights.

        Computed when first asked for, because a checkpoint of training has gigabytes; of a file that has changed since
        it was opened nothing is known.
        """
        if self.file is not None:
            path, stamp = self.file
            if path.is_file() and _stamp(path) == stamp:
                self.known_sha256 = [*self.known_sha256, file_digest(path)]
            self.file = None
        return self.known_sha256


_OWN_FIELDS = ("image_size", "threshold", "frozen", "known_sha256")
"""What a checkpoint says about itself in fields of their own."""


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def read_checkpoint(path: str | os.PathLike[str], trust: Sequence[str] = ()) -> Checkpoint:
    """Read what training wrote.

    With weight averaging on, the weights are the averaged ones.

    Args:
        path: A ``.ckpt`` file.
        trust: Packages besides this one whose classes the checkpoint may name.

    Raises:
        InputError: If there is no such file, it is damaged or unsafe, or was not written by this project.
    """
    path = Path(path)
    stamp = _stamp(path) if path.is_file() else (0, 0)
    content = _load(path)
    about = content.get("lit_matting")
    weights = content.get("state_dict")
    if not isinstance(about, Mapping) or not isinstance(weights, Mapping):
        raise InputError(
            f"checkpoint {str(path)!r} was not made by this project (it has no `lit_matting` entry); give one that"
            " `python -m lit_matting fit` wrote."
        )
    arguments = content.get("hyper_parameters")
    if not isinstance(arguments, Mapping) or "backbone" not in arguments:
        raise InputError(
            f"checkpoint {str(path)!r} does not say how its network is built, because it was trained from Python rather"
            " than by `python -m lit_matting fit`; build the network yourself and give it to"
            " MattingPipeline(network, image_size)."
        )
    known = list(inspect.signature(MattingNetwork).parameters)
    network = {name: _plain(arguments[name]) for name in known if name in arguments}
    check_classes(network, trust)
    origin = {key: _plain(value) for key, value in about.items() if key not in _OWN_FIELDS}
    origin["step"] = content.get("global_step")
    return Checkpoint(
        network=network,
        weights={name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)},
        image_size=int(about.get("image_size") or arguments["image_size"]),
        threshold=about.get("threshold"),
        frozen=_plain(about.get("frozen", {})),
        origin=origin,
        known_sha256=_plain(about.get("known_sha256", [])),
        file=(path, stamp),
    )


def store_threshold(path: str | os.PathLike[str], threshold: float | None) -> None:
    """Write a calibrated threshold of confidence into a checkpoint, all or nothing.

    The file is then another one; that a report of the old one is about the same weights is written down in it.

    Raises:
        InputError: As :func:`read_checkpoint`.
    """
    path = Path(path)
    content = _load(path, mapped=False)
    if not isinstance(content.get("lit_matting"), dict):
        raise InputError(f"checkpoint {str(path)!r} was not made by this project (it has no `lit_matting` entry).")
    about = content["lit_matting"]
    about["threshold"] = threshold
    about["known_sha256"] = [*about.get("known_sha256", []), file_digest(path)]
    with whole_file(path) as temporary:
        torch.save(content, temporary)


def _load(path: Path, mapped: bool = True) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"there is no checkpoint {str(path)!r}.")
    try:
        # mapped, not read: optimizer states, twice the size of the weights, never reach memory
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"checkpoint {str(path)!r} holds Python objects besides tensors and plain values, which could run code when"
            " opened, or is damaged; it was not opened."
        ) from error
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, AttributeError) as error:
        raise InputError(f"{str(path)!r} is not a checkpoint, or is damaged: PyTorch cannot open it.") from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {str(path)!r} was not made by this project (it holds no dictionary).")
    return content


def _plain(value: Any) -> Any:
    """Return nested mappings and sequences as dictionaries and lists, so that JSON can hold them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def check_classes(value: Any, trust: Sequence[str] = (), where: str = "network") -> None:
    """Check that a description of a network names only classes that may be built.

    Every string anywhere in it that could be the import path of something installed counts as a name, because a factory
    argument takes a bare path as well as a ``class_path``.

    Raises:
        InputError: If a name lies outside this package and the trusted ones, or is no class.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_classes(item, trust, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_classes(item, trust, where)
    elif isinstance(value, str) and _DOTTED.fullmatch(value):
        package = value.split(".")[0]
        if package in trust:
            return
        if package != "lit_matting":
            if importlib.util.find_spec(package) is None:
                return  # a file name, or something else that cannot be imported
            raise InputError(
                f"the checkpoint's `{where}` names {value!r}, which is not part of lit_matting; if you trust"
                f" the checkpoint and that package, load it with trust=({package!r},)."
            )
        try:
            named = pkgutil.resolve_name(value)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(
                f"the checkpoint's `{where}` names {value!r}, which this version of lit_matting does not have."
            ) from error
        # lit_matting.networks.neck.torch.hub.load begins well and ends elsewhere
        if not isinstance(named, type) or named.__module__.split(".")[0] != "lit_matting":
            raise InputError(f"the checkpoint's `{where}` names {value!r}, which is not a class of lit_matting.")


def build_network(checkpoint: Checkpoint, trust: Sequence[str] = ()) -> MattingNetwork:
    """Build the network a checkpoint describes and give it the checkpoint's weights; it comes in eval mode.

    Raises:
        InputError: If the description names what it may not, does not fit this version, or the weights do not fit it.
    """
    network = make_network(checkpoint.network, trust)
    load_weights(network, checkpoint.weights)
    network.backbone.check_frozen(checkpoint.frozen, "the checkpoint")
    return network.eval().requires_grad_(False)


def make_network(description: Mapping[str, Any], trust: Sequence[str] = ()) -> MattingNetwork:
    """Build a network as described, with the weights its parts begin with.

    Args:
        description: Arguments of :class:`MattingNetwork`, classes by ``class_path`` and ``init_args``.
        trust: Packages besides this one whose classes it may name.

    Raises:
        InputError: If the description names what it may not, or does not fit this version.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    check_classes(description, trust)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MattingNetwork, "network", fail_untyped=False)
    try:
        return parser.instantiate_classes(parser.parse_object({"network": dict(description)})).network
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"this version of lit_matting cannot build the network that the checkpoint describes: {reason}"
        ) from error


def frozen_prefixes(network: MattingNetwork) -> tuple[str, ...]:
    """Return how the names of the backbone's loaded, never trained parameters begin."""
    return tuple(f"backbone.{name}." for name in network.backbone.frozen_modules())


def trained_weights(network: MattingNetwork) -> dict[str, Tensor]:
    """Return a network's weights on the CPU, without those of the backbone's frozen parts."""
    frozen = frozen_prefixes(network)
    return {
        name: value.detach().cpu().contiguous()
        for name, value in network.state_dict().items()
        if not (frozen and name.startswith(frozen))
    }


def load_weights(network: MattingNetwork, weights: Mapping[str, Tensor]) -> None:
    """Give a network its weights; those of the backbone's frozen parts may be missing, others may not.

    Raises:
        InputError: If weights are missing, unexpected or of another size.
    """
    try:
        result = network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise InputError(
            f"the checkpoint's weights do not fit its own network: {str(error).splitlines()[-1].strip()}"
        ) from error
    frozen = frozen_prefixes(network)
    missing = [name for name in result.missing_keys if not (frozen and name.startswith(frozen))]
    if missing or result.unexpected_keys:
        raise InputError(
            f"the checkpoint's weights do not fit its own network: {len(missing)} are missing (first:"
            f" {(missing or ['-'])[0]}), {len(result.unexpected_keys)} are unexpected (first:"
            f" {(result.unexpected_keys or ['-'])[0]})."
        )
