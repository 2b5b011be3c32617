"""Finding a release's files: nested folders, other spellings, dot-files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_modules.shards import Phrase
from lit_matting.checks import InputError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MATTES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_JUNK = ("__macosx", "thumbs.db", "desktop.ini")


def _is_junk(name: str) -> bool:
    # archives made on a desktop carry .DS_Store and ._name beside the real files
    return name.startswith(".") or name.lower() in _JUNK


def resolve(root: Path, path: str) -> Path | None:
    """The existing file or folder at ``root/path``, whatever its upper and lower case, or None."""
    here = root
    for part in Path(path).parts:
        if (here / part).exists():
            here = here / part
            continue
        if not here.is_dir():
            return None
        alike = sorted(name for name in os.listdir(here) if name.lower() == part.lower())
        if not alike:
            return None
        here = here / alike[0]
    return here


def folders(root: Path, depth: int) -> Iterator[Path]:
    """The root and the folders below it, nearest first, down to ``depth`` levels (archives nest their top folder)."""
    level = [root]
    for _ in range(depth + 1):
        yield from level
        level = [
            entry
            for folder in level
            for entry in sorted(folder.iterdir())
            if entry.is_dir() and not _is_junk(entry.name)
        ]


def find_folder(root: Path, candidates: Iterable[str], what: str, depth: int = 2) -> Path:
    """The first of several spellings of a folder, at the root or nested below it.

    Raises:
        InputError: If there is none; the message lists where it was looked for.
    """
    if not root.is_dir():
        raise InputError(f"the release's folder {str(root)!r} does not exist.")
    candidates = list(candidates)
    for base in folders(root, depth):
        for candidate in candidates:
            found = resolve(base, candidate)
            if found is not None and found.is_dir():
                return found
    wanted = " or ".join(repr(candidate) for candidate in candidates)
    raise InputError(f"{what} was not found: no folder {wanted} in {str(root)!r} or {depth} levels below it.")


def by_stem(folder: Path | None, suffixes: tuple[str, ...], recursive: bool = False) -> dict[str, Path]:
    """Files of a folder by stem, sorted; of two files with one stem the earlier suffix wins.

    With ``recursive`` the stem holds the path below the folder, as ``animals/cat``.
    """
    if folder is None:
        return {}
    found: dict[str, Path] = {}
    for base, children, names in os.walk(folder):
        children[:] = sorted(child for child in children if not _is_junk(child)) if recursive else []
        for name in names:
            path = Path(base) / name
            if _is_junk(name) or path.suffix.lower() not in suffixes:
                continue
            stem = path.relative_to(folder).with_suffix("").as_posix()
            other = found.get(stem)
            if other is None or suffixes.index(path.suffix.lower()) < suffixes.index(other.suffix.lower()):
                found[stem] = path
    return dict(sorted(found.items()))


def relative(path: Path, root: Path) -> str:
    """The path below the root, with forward slashes."""
    return Path(os.path.relpath(path, root)).as_posix()


def key_of(name: str) -> str:
    """A sample key made of a file's stem: without dots, slashes and blanks."""
    return re.sub(r"[./\\\s\x00-\x1f]+", "_", name).strip("_")


def phrases_of(texts: Iterable[str], kinds: Iterable[str]) -> tuple[Phrase, ...]:
    """Phrases with their blanks put right."""
    return tuple(Phrase(" ".join(str(text).split()), kind) for text, kind in zip(texts, kinds))
