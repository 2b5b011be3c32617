"""Evaluation protocols: what exactly was measured, in one locked, hashed file that a report can be held against.

Two numbers called "SAD on RefMatte" compare only if split, phrases, averaging, sizes and units agree. A protocol states
all of them; its hash goes into the report; and where a run deviates, the report says so in its first line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_matting.checks import InputError
from lit_matting.metrics.score_card import ReferringSample

FOLDER = Path(__file__).parent / "protocols"
LOCKED = {
    "refmatte-rw100-native": "b84fdd6e43283034a215c6cb2a5e24625f04b7c1a89413e97d9d1776d774183c",
    "refmatte-rw100": "41cde455be3d07a42fbaf1fe79f9400d4eeabbbf19dcade47437e65bd09858d2",
    "refmatte-test-native": "5ca228ba8c2c96632c0251a8848516b9606609391d9fb7a2d7450d3310a65e4d",
    "refmatte-test": "86803236509f08f22bb63b598d41a26ddc2c8c48fc3c298a95395d42ea6da783",
}
"""Digest of each protocol of this package. A change to a published protocol is a new protocol with a new name."""


@dataclass(frozen=True)
class Protocol:
    """What a benchmark run has to do to be comparable."""

    name: str
    about: str
    source: str
    release: str
    """Which part of which release."""
    images: int
    instances: int
    split_file: str
    """The release's file that lists the split."""
    split_sha256: str | None
    per_instance: int
    """Expressions that each instance is asked for by."""
    average: Literal["phrase", "instance"]
    """"instance": over the expressions of an instance first, then over instances."""
    input_size: int
    """Side of the square the network sees, in pixels."""
    metric_size: int | Literal["native"]
    """Side of the square the errors are computed at, in pixels, or each image's own size."""
    interpolation: str
    region: str
    errors: str
    """The dialect of the gradient and connectivity errors."""
    units: dict[str, str]
    sha256: str
    """Digest of the whole content."""

    @classmethod
    def parse(cls, content: dict[str, Any], place: str) -> Protocol:
        """Read a protocol from the content of its file.

        Raises:
            InputError: If a field is missing, unknown or of the wrong type.
        """
        try:
            content = dict(content)
            split, expressions = dict(content.pop("split")), dict(content.pop("expressions"))
            fields = {
                **content,
                "release": split.pop("release"),
                "images": int(split.pop("images")),
                "instances": int(split.pop("instances")),
                "split_file": split.pop("file"),
                "split_sha256": split.pop("sha256"),
                "per_instance": int(expressions.pop("per_instance")),
                "average": expressions.pop("average"),
            }
            unknown = [*(f"split.{name}" for name in split), *(f"expressions.{name}" for name in expressions)]
            if unknown:
                raise TypeError(f"there is no field {', '.join(unknown)}")
            protocol = cls(sha256="", **fields)
        except KeyError as error:
            raise InputError(f"protocol {place}: the field {error} is missing.") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"protocol {place}: {error}; compare it with one in {FOLDER}.") from error
        for name, allowed in (("average", ("phrase", "instance")), ("region", ("whole",)), ("errors", ("matlab",))):
            if getattr(protocol, name) not in allowed:
                raise InputError(
                    f"protocol {place}: `{name}` must be one of {', '.join(allowed)}, got {getattr(protocol, name)!r}."
                )
        return protocol


def digest(content: Any) -> str:
    """Return the SHA-256 of the content, whatever its formatting, comments and order of keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def load_protocol(name: str | Path) -> Protocol:
    """Return a protocol of this package by name, or one of your own by the path of its YAML file.

    Raises:
        InputError: If there is none, it is malformed, or a locked one has been changed.
    """
    path = FOLDER / f"{name}.yaml" if str(name) in LOCKED else Path(name)
    if not path.is_file():
        raise InputError(f"there is no protocol {str(name)!r}: give one of {', '.join(LOCKED)}, or a YAML file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"protocol {path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise InputError(f"protocol {path} must be a mapping of fields; compare it with one in {FOLDER}.")
    protocol = Protocol.parse(content, str(path))
    found = digest(content)
    if LOCKED.get(protocol.name, found) != found:
        raise InputError(
            f"protocol {path} is called {protocol.name!r} but is not the locked one ({LOCKED[protocol.name][:12]});"
            f" undo the change, or give it another name."
        )
    return Protocol(**{**vars(protocol), "sha256": found})


@dataclass(frozen=True)
class Observed:
    """What a run did, as far as it can be seen; what cannot be seen is no promise kept and counts as a deviation."""

    image_size: int | None
    """Side of the square the network saw, in pixels; None where it is not known."""
    metric_sizes: frozenset[tuple[int, int]]
    """(height, width) of the mattes that were scored."""
    source_sizes: frozenset[int | Literal["native"]] = frozenset()
    """What the sources resized images and truths to: the side of a square, or "native". Empty where not known."""
    interpolations: frozenset[str] = frozenset()
    """How anything was resized, by the source or before the network. Empty where not known."""
    datasets: frozenset[str] = frozenset()
    """The data sets by the names in their own files, such as refmatte/test. Empty where not known."""
    boundary: bool = False
    """Whether the gradient and connectivity errors were computed."""
    errors: str = "not known"
    """The dialect of these two."""
    split_sha256: str | None = None
    """Digest of the file that lists the split, where the run was given it."""


def deviations(protocol: Protocol, samples: Sequence[ReferringSample], observed: Observed) -> list[str]:
    """Return in words how a run deviates from a protocol; empty where it follows it."""
    found = []
    if any(_plain(dataset) != _plain(protocol.release) for dataset in observed.datasets):
        found.append(f"data set {' and '.join(sorted(observed.datasets))} instead of {protocol.release}")
    elif not observed.datasets:
        found.append(f"data set not known instead of {protocol.release}")
    images = len({sample.key for sample in samples})
    phrases = Counter((sample.key, sample.instance) for sample in samples)
    if images != protocol.images:
        found.append(f"{images} of {protocol.images} images")
    if len(phrases) != protocol.instances:
        found.append(f"{len(phrases)} of {protocol.instances} instances")
    wrong = sum(count != protocol.per_instance for count in phrases.values())
    if wrong:
        found.append(f"{wrong} instances without exactly {protocol.per_instance} expressions")
    if observed.image_size != protocol.input_size:
        found.append(f"input size {observed.image_size or 'not known'} instead of {protocol.input_size}")
    if isinstance(protocol.metric_size, int):
        others = observed.metric_sizes - {(protocol.metric_size, protocol.metric_size)}
        if others:
            height, width = sorted(others)[0]
            more = f" and {len(others) - 1} other sizes" if len(others) > 1 else ""
            found.append(
                f"errors at {height} x {width}{more} instead of {protocol.metric_size} x {protocol.metric_size}"
            )
    elif observed.source_sizes != {"native"}:
        sides = sorted(side for side in observed.source_sizes if isinstance(side, int))
        seen = " and ".join(f"{side} x {side}" for side in sides) if sides else "a size not known"
        found.append(f"errors at {seen} instead of each image's own size")
    others = observed.interpolations - {protocol.interpolation}
    if others or not observed.interpolations:
        seen = " and ".join(sorted(others)) or "not known"
        found.append(f"interpolation {seen} instead of {protocol.interpolation}")
    if not observed.boundary and not {"grad", "conn"}.isdisjoint(protocol.units):
        found.append("no gradient and connectivity errors")
    if observed.errors != protocol.errors:
        found.append(f"errors by the {observed.errors} dialect instead of {protocol.errors}")
    if protocol.split_sha256 and observed.split_sha256 != protocol.split_sha256:
        seen = observed.split_sha256[:12] if observed.split_sha256 else "not given"
        found.append(f"split file {seen} instead of {protocol.split_sha256[:12]}")
    return found


def _plain(name: str) -> str:
    """Return a name without case and punctuation: shards say refmatte/rw100 where the release says RefMatte_RW_100."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
