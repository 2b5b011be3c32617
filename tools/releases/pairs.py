"""Any folder of images with a folder of alphas or masks, or a list of both with expressions.

The route for RM-1k, whose file layout is published nowhere, and for AIM-500 (`original`, `mask`) and
RealWorldPortrait-636 (`image`, `alpha`), which may stand in for it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lit_matting.checks import InputError
from tools.releases.files import IMAGES, MATTES, by_stem, key_of, phrases_of, relative, resolve
from tools.releases.source import Listing, Source, Target

_OWN = ("id", "image", "alpha", "mask", "expressions", "expression_types", "category", "width", "height")


def scan_folders(
    root: Path,
    images: str,
    mattes: str,
    dataset: str,
    split: str,
    kind: str = "alpha",
    suffix: str = "",
    category: str = "",
    foregrounds: str | None = None,
    names: Path | None = None,
) -> Listing:
    """List the images of one folder that belong to the mattes of another, by stem, subfolders included.

    Args:
        root: Where both folders are.
        images: Folder of images, below the root.
        mattes: Folder of alphas or masks, below the root; may be the same.
        dataset: Name of the data set.
        split: Name of the split.
        kind: ``alpha`` or ``mask``.
        suffix: What a matte's stem has after its image's, for example ``_alpha``.
        category: Of everything in it.
        foregrounds: Folder of foreground colours, below the root.
        names: A file with one image stem per line: only these are listed.

    Raises:
        InputError: If a folder is missing, or nothing belongs together.
    """
    found = {}
    for what, name in (("images", images), ("mattes", mattes), ("foregrounds", foregrounds)):
        folder = resolve(root, name) if name is not None else None
        if name is not None and (folder is None or not folder.is_dir()):
            raise InputError(f"the folder of {what} {str(root / name)!r} does not exist.")
        found[what] = by_stem(folder, IMAGES if what == "images" else MATTES, recursive=True)
    stems = {stem[: len(stem) - len(suffix)] for stem in found["mattes"] if stem.endswith(suffix)}
    wanted = set(found["images"])
    if images == mattes and suffix:
        wanted -= {stem + suffix for stem in stems}
    listing = Listing(dataset, split, [])
    if names is not None:
        try:
            lines = names.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--list {str(names)!r} cannot be read: {error}.") from None
        listed = [line.strip() for line in lines if line.strip()]
        # a named image must come, so that its absence is told by name
        wanted = {
            Path(line).with_suffix("").as_posix() if Path(line).suffix.lower() in IMAGES else line for line in listed
        }
    elif spare := sorted(wanted - stems):
        listing.warnings.append(f"{len(spare)} images have no matte and are left out, the first is {spare[0]!r}.")
    if not wanted & stems:
        raise InputError(
            f"no image in {str(root / images)!r} has a matte of the same stem in {str(root / mattes)!r}"
            + (f" (with {suffix!r} after it)" if suffix else "; is there a --suffix, as in cat_alpha.png?")
        )
    if names is None:
        wanted &= stems
        if alone := sorted(stems - wanted):
            listing.warnings.append(f"{len(alone)} mattes have no image, the first is {alone[0]!r}.")
    for stem in sorted(wanted):
        matte = found["mattes"].get(stem + suffix, root / mattes / f"{stem}{suffix}.png")
        colours = found["foregrounds"].get(stem)
        target = Target(
            id="0",
            kind=kind,
            file=relative(matte, root),
            category=category,
            foreground=relative(colours, root) if colours else None,
        )
        image = found["images"].get(stem, root / images / f"{stem}.jpg")
        listing.sources.append(Source(key_of(stem), relative(image, root), (target,)))
    return listing


def scan_index(root: Path, index: Path, dataset: str, split: str) -> Listing:
    """List what a JSON file names: a list of {image, alpha or mask, expressions, expression_types, id, category, ...}.

    Entries of the same image become its instances. Every other field is kept.

    Raises:
        InputError: If the file is missing or an entry lacks an image or a matte.
    """
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the list {str(index)!r} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(f"{str(index)!r} is not valid JSON: {error}.") from None
    if not isinstance(entries, list):
        raise InputError(f"{str(index)!r} must be a list of objects, got a {type(entries).__name__}.")
    by_image: dict[str, list[dict[str, Any]]] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "image" not in entry or not ("alpha" in entry or "mask" in entry):
            raise InputError(f"{str(index)!r}, entry {number}: needs an `image` and an `alpha` or a `mask`.")
        by_image.setdefault(entry["image"], []).append(entry)
    listing = Listing(dataset, split, [])
    for image, group in sorted(by_image.items()):
        targets = []
        for entry in group:
            texts = entry.get("expressions", [])
            kinds = entry.get("expression_types") or ["expression"] * len(texts)
            kind = "alpha" if "alpha" in entry else "mask"
            rest = {key: value for key, value in entry.items() if key not in _OWN}
            targets.append(
                Target(
                    id=str(entry.get("id", len(targets))),
                    kind=kind,
                    file=entry[kind],
                    phrases=phrases_of(texts, kinds),
                    category=entry.get("category", ""),
                    extra={"release": rest} if rest else {},
                )
            )
        listing.sources.append(Source(key_of(Path(image).with_suffix("").as_posix()), image, tuple(targets)))
    fields = Counter(key for entry in entries for key in entry)
    listing.report += [f"field {key}: in {count} of {len(entries)} entries" for key, count in sorted(fields.items())]
    return listing
