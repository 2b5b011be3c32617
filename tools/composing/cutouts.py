"""Cut-outs and backgrounds on disk: reading their index, their true colours, and which split they belong to."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy import ndimage

from lit_matting.checks import InputError

Array = np.ndarray

SIDES = ("top", "bottom", "left", "right")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

# a border that a cut-out only touches with a paw is narrow there and wider a little further in; a border that the
# photograph's own frame cut through is as wide at the edge as inside (numbers: the real cut-outs separate cleanly)
_CUT_SHARE = 0.03
_CUT_TAPER = 0.55
# below this alpha an 8-bit colour is mostly rounding
_FAINT = 8 / 255


@dataclass(frozen=True)
class Cutout:
    """One named RGBA cut-out."""

    id: str
    file: str
    names: tuple[str, ...]
    """What to call it, the best name first, without article."""
    category: str
    licence_class: str
    touches: tuple[str, ...] | None
    """Borders its photograph's frame may have cut it at; None when the index does not say."""
    record: dict[str, Any]
    """The index entry as it was."""


@dataclass(frozen=True)
class Background:
    """One background picture."""

    id: str
    file: str
    name: str
    licence_class: str
    record: dict[str, Any]


def _entries(folder: Path, what: str) -> list[dict[str, Any]]:
    """The folder's index.json, or one entry per picture named by its file."""
    if not folder.is_dir():
        raise InputError(f"the {what} folder {str(folder)!r} does not exist.")
    index = folder / "index.json"
    if index.is_file():
        try:
            entries = json.loads(index.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{str(index)!r} is not valid JSON: {error}.") from None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and "file" in entry for entry in entries):
            raise InputError(f"{str(index)!r} must be a list of objects with at least a `file`.")
        missing = [entry["file"] for entry in entries if not (folder / entry["file"]).is_file()]
        if missing:
            raise InputError(
                f"{str(index)!r} names {missing[0]!r}, which is not in {str(folder)!r} ({len(missing)} missing)."
            )
    else:
        files = sorted(
            path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."
        )
        entries = [{"file": name} for name in files]
    if not entries:
        raise InputError(f"the {what} folder {str(folder)!r} holds no pictures ({', '.join(IMAGE_SUFFIXES)}).")
    for entry in entries:
        stem = Path(entry["file"]).stem
        entry.setdefault("id", stem)
        # without an index the file's name is all there is: red_umbrella_02.png -> red umbrella
        entry.setdefault("name", re.sub(r"[\s_\-]*\d+$", "", stem).replace("_", " ").replace("-", " ").strip() or stem)
    seen: set[str] = set()
    for entry in entries:
        if entry["id"] in seen:
            raise InputError(f"two {what} entries in {str(folder)!r} share the id {entry['id']!r}; ids must be unique.")
        seen.add(entry["id"])
    return sorted(entries, key=lambda entry: entry["id"])


def _is_wanted(
    entry: dict[str, Any], exclude: Sequence[str], exclude_id_regex: str | None, licences: Sequence[str] | None
) -> bool:
    if any(fnmatch.fnmatchcase(entry["id"], pattern) for pattern in exclude):
        return False
    if exclude_id_regex and re.search(exclude_id_regex, entry["id"]):
        return False
    return licences is None or entry.get("licence_class", "unstated") in licences


def clean_name(text: str) -> str | None:
    """A name as it stands after "the": no article, no remark behind a comma or bracket; None if it is not a name.

    Example:
        >>> clean_name("An albino peahen (a female peafowl, or peacock).")
        'albino peahen'
        >>> clean_name("A hoverfly resembles a honeybee drone.") is None
        True
    """
    text = re.sub(r"\(.*?\)", "", text)
    if "!" in text or "?" in text or "'s" in text or "’s" in text:
        return None
    text = " ".join(text.split(",")[0].strip().rstrip(".").split())
    text = re.sub(r"^(an?|the)\s+", "", text, flags=re.IGNORECASE)
    text = re.sub(r"^(one|two|three|four|some)\b", lambda match: match.group().lower(), text, flags=re.IGNORECASE)
    if not re.search(r"[A-Za-z]", text) or re.search(r"\b(is|are|was|has|have|resembles?|called|looks?)\b", text):
        return None
    return text


def read_cutouts(
    folder: Path,
    exclude: Sequence[str] = (),
    exclude_id_regex: str | None = None,
    licences: Sequence[str] | None = None,
) -> list[Cutout]:
    """Every wanted cut-out of a folder, sorted by id.

    Raises:
        InputError: If the folder, its index or a file it names is missing, or nothing is left.
    """
    cutouts = []
    for entry in _entries(folder, "cut-outs"):
        if not _is_wanted(entry, exclude, exclude_id_regex, licences):
            continue
        names = dict.fromkeys(filter(None, (clean_name(name) for name in [entry["name"], *entry.get("names", [])])))
        if not names:
            raise InputError(
                f"cut-out {entry['id']!r} has no usable name: {entry['name']!r}; give it one in index.json."
            )
        touches = entry.get("touches")
        cutouts.append(
            Cutout(
                id=entry["id"],
                file=entry["file"],
                names=tuple(names),
                category=entry.get("category", ""),
                licence_class=entry.get("licence_class", "unstated"),
                touches=None if touches is None else tuple(side for side in SIDES if side in touches),
                record=entry,
            )
        )
    if not cutouts:
        raise InputError(f"no cut-out in {str(folder)!r} is left after --exclude, --exclude-id-regex and --licences.")
    return cutouts


def read_backgrounds(
    folder: Path, exclude: Sequence[str] = (), licences: Sequence[str] | None = None
) -> list[Background]:
    """Every wanted background of a folder, sorted by id."""
    backgrounds = [
        Background(entry["id"], entry["file"], entry["name"], entry.get("licence_class", "unstated"), entry)
        for entry in _entries(folder, "backgrounds")
        if _is_wanted(entry, exclude, None, licences)
    ]
    if not backgrounds:
        raise InputError(f"no background in {str(folder)!r} is left after --exclude and --licences.")
    return backgrounds


def split_ids(ids: list[str], val_share: float, holdout: list[str], seed: int, what: str) -> dict[str, list[str]]:
    """Split ids into disjoint ``train`` and ``val``: held-out patterns go to val, then a seeded share of the others.

    Raises:
        InputError: If a holdout pattern matches nothing (a leak that nobody would notice).
    """
    for pattern in holdout:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in ids):
            raise InputError(
                f"--holdout {pattern!r} matches no {what}; the first ids are {', '.join(sorted(ids)[:4])}."
            )
    held = {name for name in ids if any(fnmatch.fnmatchcase(name, pattern) for pattern in holdout)}
    # by hash, not by shuffle: adding one cut-out moves no other one across the split
    order = sorted(set(ids) - held, key=lambda name: hashlib.sha1(f"{seed}/{what}/{name}".encode()).hexdigest())
    drawn = set(order[: round(val_share * len(order))])
    return {"train": sorted(set(ids) - held - drawn), "val": sorted(held | drawn)}


def read_rgba(path: Path) -> tuple[Array, Array]:
    """The cut-out's colours (H, W, 3) RGB and alpha (H, W), float32 in [0, 1], cropped to what is not transparent."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise InputError(f"{str(path)!r} is not a picture that OpenCV can read.")
    if pixels.ndim != 3 or pixels.shape[2] != 4:
        raise InputError(f"cut-out {str(path)!r} has no alpha channel (its shape is {pixels.shape}); RGBA is needed.")
    scale = 65535.0 if pixels.dtype == np.uint16 else 255.0
    values = pixels.astype(np.float32) / scale
    colour, alpha = values[..., 2::-1], values[..., 3]
    rows, columns = np.flatnonzero(alpha.max(axis=1)), np.flatnonzero(alpha.max(axis=0))
    if not rows.size or alpha.max() < 0.1:
        raise InputError(f"cut-out {str(path)!r} is transparent everywhere; remove it or name it in --exclude.")
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.ascontiguousarray(colour[window]), np.ascontiguousarray(alpha[window])


def cut_sides(alpha: Array, touches: tuple[str, ...] | None) -> tuple[str, ...]:
    """The sides at which the photograph's frame cut the object, among those it touches.

    A tight crop touches all four borders with a paw or an ear. There the object tapers; where it was cut it does not.

    Example:
        >>> wall = np.zeros((40, 40), np.float32); wall[10:, 5:30] = 1
        >>> cut_sides(wall, ("bottom", "left"))
        ('bottom',)
    """
    inset = max(4, round(0.015 * max(alpha.shape)))
    found = []
    for side in SIDES if touches is None else touches:
        lines = alpha if side in ("top", "bottom") else alpha.T
        lines = lines if side in ("top", "left") else lines[::-1]
        edge, inside = (lines[0] > 0.5).mean(), (lines[min(inset, len(lines) - 1)] > 0.5).mean()
        if edge >= _CUT_SHARE and edge >= _CUT_TAPER * inside:
            found.append(side)
    return tuple(found)


def true_colours(colour: Array, alpha: Array) -> Array:
    """The object's own colours F, (H, W, 3) in [0, 1], with what is left of its old background taken out.

    A soft pixel of a cut-out often still holds ``alpha F + (1 - alpha) B`` of the photograph it came from, which shows
    as a halo on any other background. Multi-level foreground estimation (Germer et al. 2020, pymatting) solves for F.
    It also needs B beside the object, where cut-outs are usually cleared to black; so the colour of the faintest
    pixels, which is nearly B, is carried outwards first. Colours that are clean already stay as they are.
    """
    from pymatting import estimate_foreground_ml  # compiles for a second; only where it is needed

    image = colour
    clear = alpha == 0
    if clear.any() and np.ptp(colour[clear], axis=0).max() == 0:
        known = alpha >= min(_FAINT, float(alpha.max()))
        nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        image = colour[tuple(nearest)]
    estimated = estimate_foreground_ml(image.astype(np.float64), alpha.astype(np.float64))
    return np.clip(estimated, 0.0, 1.0).astype(np.float32)


def write_colours(folder: Path, target: Path, longest_side: int, cutout: Cutout) -> tuple[str, ...]:
    """Write ``<target>/<id>.png``, the cut-out with its own colours, and return the sides it was cut at."""
    colour, alpha = read_rgba(folder / cutout.file)
    cut = cut_sides(alpha, cutout.touches)
    foreground = true_colours(colour, alpha)
    factor = longest_side / max(alpha.shape)
    if factor < 1:
        size = (max(2, round(alpha.shape[1] * factor)), max(2, round(alpha.shape[0] * factor)))
        foreground, alpha = resize_colours(foreground, alpha, size)
    pixels = np.rint(255 * np.dstack([foreground[..., ::-1], alpha])).astype(np.uint8)
    cv2.imwrite(str(target / f"{cutout.id}.png"), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return cut


def resize_colours(foreground: Array, alpha: Array, size: tuple[int, int]) -> tuple[Array, Array]:
    """Resize colours (H, W, 3) and alpha (H, W) together to (width, height).

    Colours are resized as ``alpha F`` and divided again, so a soft edge keeps the object's colour instead of taking in
    whatever was estimated beyond it.
    """
    method = cv2.INTER_AREA if size[0] * size[1] < alpha.size else cv2.INTER_CUBIC
    small = np.clip(cv2.resize(alpha, size, interpolation=method), 0, 1)
    weighted = cv2.resize(foreground * alpha[..., None], size, interpolation=method)
    plain = cv2.resize(foreground, size, interpolation=method)
    soft = small[..., None]
    return np.clip(np.where(soft > 1 / 255, weighted / np.maximum(soft, 1e-6), plain), 0, 1), small


def file_sha1(path: Path) -> str:
    """The file's sha1, by which the manifest names its source."""
    return hashlib.sha1(path.read_bytes()).hexdigest()
