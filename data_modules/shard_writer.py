"""Writing shards: deterministic, atomic, every sample checked on the way in."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import cv2
import numpy as np
from PIL import Image

from data_modules import tar
from data_modules.shard_format import FORMAT, IMAGE_EXTENSIONS, Phrase, ShardInfo
from lit_matting.checks import InputError, check_prompt

MAX_BYTES = 512 * 2**20
_KEY = re.compile(r"[^./\\\s\x00-\x1f]+")


@dataclass
class InstanceEntry:
    """One instance of an image, as given to :class:`ShardWriter`."""

    id: str
    """Names the instance inside its image; the source data set's own id where there is one."""
    target: np.ndarray | bytes
    """(H, W) uint8 or uint16 alpha, (H, W) bool or 0/255 uint8 mask, or the bytes of such a PNG file."""
    kind: Literal["alpha", "mask"] = "alpha"
    """``mask`` when the target is a hard mask drawn by hand or polygon, which must not be learned as an alpha."""
    phrases: Sequence[Phrase | tuple[str, str]] = ()
    """Phrases as ``Phrase`` or ``(text, kind)``; may be empty where captions or templates come later."""
    category: str = ""
    foreground: np.ndarray | bytes | None = None
    """(H, W, 3) uint8 RGB foreground colours, or PNG bytes."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields for the JSON; they must not be called like one of the format's own."""


def sample_members(
    key: str,
    image: bytes | np.ndarray,
    image_ext: str,
    instances: Sequence[InstanceEntry],
    extra: dict[str, Any] | None = None,
    background: bytes | None = None,
) -> list[tuple[str, bytes]]:
    """Return ``(member name, bytes)`` of one sample in the order of the format; everything is checked here.

    Raises:
        InputError: If the key, a target's size or kind, or a phrase breaks the format; the message names them.
    """
    if not _KEY.fullmatch(key):
        raise InputError(f"sample key {key!r} must hold no dot, slash or blank (a dot separates key and member name).")
    image_ext = image_ext.lower().lstrip(".")
    if image_ext not in IMAGE_EXTENSIONS:
        raise InputError(f"sample {key!r}: image_ext must be one of {', '.join(IMAGE_EXTENSIONS)}, got {image_ext!r}.")
    if isinstance(image, np.ndarray):
        width, height = image.shape[1], image.shape[0]
        image = _encode(image[..., ::-1], image_ext)
    else:
        width, height = _shown_size(image, f"sample {key!r}: image")
    if not instances:
        raise InputError(f"sample {key!r} has no instances; an image without anything to cut out teaches nothing.")
    files: list[tuple[str, bytes]] = [(f"{key}.{image_ext}", image)]
    entries: list[dict[str, Any]] = []
    for number, instance in enumerate(instances):
        where = f"sample {key!r}, instance {instance.id!r}"
        name = f"{number}.{instance.kind}.png"
        files.append((f"{key}.{name}", _target_png(instance, (width, height), where)))
        entry: dict[str, Any] = {
            "id": instance.id,
            "target": name,
            "kind": instance.kind,
            "phrases": [_phrase_json(phrase, where) for phrase in instance.phrases],
            "category": instance.category,
        }
        if instance.foreground is not None:
            entry["foreground"] = f"{number}.foreground.png"
            files.append((f"{key}.{entry['foreground']}", _foreground_png(instance.foreground, (width, height), where)))
        entries.append(_merged(entry, instance.extra, where))
    ids = [instance.id for instance in instances]
    if len(set(ids)) < len(ids):
        raise InputError(f"sample {key!r}: instance ids must differ, got {ids}.")
    if background is not None:
        files.append((f"{key}.background.jpg", background))
    extra = dict(extra or {})
    header = {"width": width, "height": height, "source": extra.pop("source", {})}
    header = _merged({**header, "instances": entries}, extra, f"sample {key!r}")
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return [(f"{key}.json", text.encode("utf-8")), *files]


class ShardFile:
    """Writes one shard; it has its final name only when it is complete.

    For tools that build shards in parallel, each process its own; :class:`ShardWriter` builds a data set in order.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # the process id keeps two runs from writing into one another's half shard
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._file: BinaryIO = open(self._partial, "wb")  # noqa: SIM115 (closed by close or discard)
        self._sha256 = hashlib.sha256()
        self._offsets: list[int] = []
        self.bytes = 0
        self.instances = 0

    @property
    def samples(self) -> int:
        """Number of samples written so far."""
        return len(self._offsets)

    def write(self, files: Iterable[tuple[str, bytes]], instances: int = 0) -> None:
        """Append one sample given as its members (:func:`sample_members`)."""
        self.append(b"".join(tar.member(name, data) for name, data in files), instances)

    def append(self, packed: bytes, instances: int = 0) -> None:
        """Append one sample given as tar bytes."""
        self._offsets.append(self.bytes)
        self._put(packed)
        self.instances += instances

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)

    def close(self) -> ShardInfo:
        """Finish the shard, give it its name, and return its index entry."""
        self._put(tar.END_OF_ARCHIVE)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)
        offsets = np.asarray(self._offsets, dtype=np.int64)
        return ShardInfo(
            self.path.name, len(offsets), self.bytes, self._sha256.hexdigest(), offsets, instances=self.instances
        )

    def discard(self) -> None:
        """Remove the unfinished file."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


class ShardWriter:
    """Writes a data set as numbered shards of bounded size, and its index last.

    The same calls give byte-identical files. If an exception leaves the ``with`` block, no index is written and the
    unfinished shard is removed.

    Args:
        folder: Where the shards go; made if it does not exist.
        prefix: First part of the names: ``<prefix>-000000.tar``, ..., ``<prefix>.index.json``.
        dataset: Name of the data set, for the index.
        split: Name of the split, for the index.
        tool: Name and version of what writes, for the index.
        max_samples: Images in one shard at most.
        max_bytes: Bytes of one shard at most, unless a single sample is larger.

    Example::

        with ShardWriter("shards", prefix="train", dataset="scenes", split="train", tool="make_scenes 0.1") as writer:
            writer.write("000000", image=jpeg, image_ext="jpg", instances=[InstanceEntry("0", alpha)])
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str = "train",
        dataset: str = "",
        split: str = "",
        tool: str = "",
        max_samples: int = 1000,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self.prefix, self.dataset, self.split, self.tool = prefix, dataset or prefix, split or prefix, tool
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.shards: list[ShardInfo] = []
        self._open: ShardFile | None = None
        self._keys: set[str] = set()

    def write(
        self,
        key: str,
        image: bytes | np.ndarray,
        image_ext: str,
        instances: Sequence[InstanceEntry],
        extra: dict[str, Any] | None = None,
        background: bytes | None = None,
    ) -> None:
        """Append one image with its instances.

        Args:
            key: Unique name of the image, without dot, slash or blank.
            image: The bytes of the image file, or (H, W, 3) uint8 RGB to be encoded as ``image_ext``.
            image_ext: ``jpg``, ``png`` or ``webp``.
            instances: At least one.
            extra: Further fields for the sample's JSON; ``source`` says where the image came from.
            background: JPEG bytes of the background alone.

        Raises:
            InputError: If something breaks the format; the message names the sample and the field.
        """
        if key in self._keys:
            raise InputError(f"sample key {key!r} was written before; keys must be unique inside a data set.")
        files = sample_members(key, image, image_ext, instances, extra, background)
        packed = b"".join(tar.member(name, data) for name, data in files)
        self._keys.add(key)
        shard = self._open
        if shard is not None and (shard.samples >= self.max_samples or shard.bytes + len(packed) > self.max_bytes):
            self.shards.append(shard.close())
            shard = self._open = None
        if shard is None:
            shard = self._open = ShardFile(self.folder / f"{self.prefix}-{len(self.shards):06d}.tar")
        shard.append(packed, instances=len(instances))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._open is not None:
                self._open.discard()
            return
        if self._open is not None:
            self.shards.append(self._open.close())
            self._open = None
        write_index(self.folder, self.prefix, self.dataset, self.split, self.tool, self.shards)


def write_index(
    folder: str | Path,
    prefix: str,
    dataset: str,
    split: str,
    tool: str,
    shards: Sequence[ShardInfo],
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write ``<prefix>.index.json`` for finished shards and return its path; the file appears whole or not at all.

    Raises:
        InputError: If there are no shards.
    """
    if not shards:
        raise InputError(f"no sample was written for {prefix!r} in {folder}: an index needs at least one shard.")
    index = {
        "format": FORMAT,
        "dataset": dataset,
        "split": split,
        "tool": tool,
        "samples": sum(shard.samples for shard in shards),
        "instances": sum(shard.instances for shard in shards),
        **(extra or {}),
        "shards": [shard.to_json() for shard in shards],
    }
    path = Path(folder) / f"{prefix}.index.json"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def _phrase_json(phrase: Phrase | tuple[str, str], where: str) -> dict[str, str]:
    phrase = phrase if isinstance(phrase, Phrase) else Phrase(*phrase)
    return {"text": check_prompt(phrase.text, f"phrase of {where}"), "kind": phrase.kind}


def _merged(entry: dict[str, Any], extra: dict[str, Any], where: str) -> dict[str, Any]:
    clash = sorted(set(entry) & set(extra))
    if clash:
        raise InputError(f"{where}: extra field {clash[0]!r} is one of the format's own; call it something else.")
    return {**entry, **extra}


def _encode(array: np.ndarray, extension: str) -> bytes:
    options = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, 95], "jpeg": [cv2.IMWRITE_JPEG_QUALITY, 95]}.get(extension, [])
    done, data = cv2.imencode(f".{extension}", np.ascontiguousarray(array), options)
    if not done:
        raise InputError(f"an array of shape {array.shape} and type {array.dtype} cannot be written as {extension}.")
    return data.tobytes()


def _shown_size(data: bytes, what: str) -> tuple[int, int]:
    """Width and height of an image as a viewer shows it (EXIF orientation applied), from its header alone."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{what} cannot be read as an image ({len(data)} bytes): {error}.") from error
    return (height, width) if turned else (width, height)


def _target_png(instance: InstanceEntry, size: tuple[int, int], where: str) -> bytes:
    if instance.kind not in ("alpha", "mask"):
        raise InputError(f"{where}: kind must be 'alpha' or 'mask', got {instance.kind!r}.")
    target = instance.target
    if isinstance(target, np.ndarray):
        if target.dtype == np.bool_:
            target = target.astype(np.uint8) * 255
        if target.ndim != 2 or target.dtype not in (np.uint8, np.uint16):
            raise InputError(
                f"{where}: target must be (H, W) uint8, uint16 or bool, got {target.shape} {target.dtype}"
                " (multiply an alpha in [0, 1] by 255 and round it)."
            )
        if instance.kind == "mask" and not np.isin(target, (0, 255)).all():
            raise InputError(f"{where}: a mask must hold only 0 and 255; give a soft target the kind 'alpha'.")
        found, data = (target.shape[1], target.shape[0]), _encode(target, "png")
    else:
        found, data = _shown_size(target, f"{where}: target"), target
    if found != size:
        raise InputError(f"{where}: {instance.kind} is {found[0]}x{found[1]} but the image is {size[0]}x{size[1]}.")
    return data


def _foreground_png(foreground: np.ndarray | bytes, size: tuple[int, int], where: str) -> bytes:
    if isinstance(foreground, np.ndarray):
        found, data = (foreground.shape[1], foreground.shape[0]), _encode(foreground[..., ::-1], "png")
    else:
        found, data = _shown_size(foreground, f"{where}: foreground"), foreground
    if found != size:
        raise InputError(f"{where}: foreground is {found[0]}x{found[1]} but the image is {size[0]}x{size[1]}.")
    return data
