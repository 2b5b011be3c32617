"""What a release says about its images, before any pixel is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_modules.shards import Phrase


@dataclass(frozen=True)
class Target:
    """One instance of an image, as its release describes it."""

    id: str
    kind: str
    """``alpha`` or ``mask``."""
    file: str | None = None
    """Path of the alpha or mask, relative to the release's root."""
    shapes: Any = None
    """Polygons or run lengths as COCO writes them, where there is no file."""
    phrases: tuple[Phrase, ...] = ()
    category: str = ""
    foreground: str | None = None
    """Path of the foreground colours, relative to the release's root."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields for the sample's JSON."""


@dataclass(frozen=True)
class Source:
    """One image of a release."""

    key: str
    image: str
    """Path relative to the release's root; it may turn out not to exist."""
    targets: tuple[Target, ...]
    background: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Listing:
    """One split of a release."""

    dataset: str
    split: str
    sources: list[Source]
    expected: tuple[int, int] | None = None
    """Images and instances that the release's publication states."""
    report: list[str] = field(default_factory=list)
    """What was found in the release's own files, for the eye."""
    warnings: list[str] = field(default_factory=list)
    index_extra: dict[str, Any] = field(default_factory=dict)
    """Facts that belong into the data set's index."""
