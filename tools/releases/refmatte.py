"""RefMatte and RefMatte-RW100 (Li et al., CVPR 2023): composites with one alpha and four expressions per instance.

The label file maps a mask's stem to its image and expressions. Which of the four expressions is of which kind is
written nowhere, so it is a setting; where it is not set, each place in the list is judged by what most of its
expressions say.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from lit_matting.checks import InputError
from tools.releases.files import IMAGES, MATTES, by_stem, folders, key_of, phrases_of, relative, resolve
from tools.releases.source import Listing, Source, Target

SPLITS = ("train", "test", "rw100")
KINDS = ("keyword", "basic", "absolute", "relative")
EXPECTED = {"train": (45_000, 112_506), "test": (2_500, 6_243), "rw100": (100, 221)}
_LABELS = {
    "train": "refmatte_train_label.json",
    "test": "refmatte_test_label.json",
    "rw100": "refmatte_rw100_label.json",
}
_PICTURE = re.compile(r"\b(picture|photo|photograph|image|pic|scene)\b")
_RELATION = re.compile(
    r"\b(beside|besides|near|next to|close to|adjacent|left of|right of|above|over|underneath|under|below|behind|on top"
    r" of|in front of|on the|at the (?:left|right|top|bottom|back|front))\b"
)


def scan(root: Path, split: str, expression_kinds: list[str] | None = None) -> Listing:
    """List one split of the release.

    Args:
        root: The unpacked release; the split may be nested two folders deep.
        split: ``train``, ``test`` or ``rw100``.
        expression_kinds: The kind of the first, second, ... expression; None judges by the text.

    Raises:
        InputError: If the label file or its folders are missing or of another form.
    """
    label_file, images, masks = _locate(root, split)
    label = _load(label_file)
    for stem, entry in label.items():
        if not isinstance(entry, dict):
            raise InputError(f"{str(label_file)!r}: entry {stem!r} must be an object, got a {type(entry).__name__}.")
    listing = Listing("refmatte", split, [], EXPECTED[split])
    by_image: dict[str, list[tuple[int, str, str, dict[str, Any]]]] = {}
    for stem, entry in label.items():
        stem = re.sub(r"\.(png|jpg)$", "", stem, flags=re.IGNORECASE)
        image, _, number = stem.rpartition("_")
        named = entry.get("image_name", image)
        name = re.sub(r"\.(jpg|jpeg|png)$", "", str(named), flags=re.IGNORECASE)
        order = int(number) if number.isdigit() else 0
        by_image.setdefault(name, []).append((order, stem, number or stem, entry))
    kinds = _kinds(label, expression_kinds, listing)
    chosen = _load(evaluated) if (evaluated := resolve(label_file.parent, "eval_index_expression.json")) else {}
    used: set[str] = set()
    for name in sorted(by_image):
        targets = []
        for _, stem, number, entry in sorted(by_image[name], key=lambda item: item[:2]):
            used.add(stem)
            texts = _texts(entry)
            rest = {key: value for key, value in entry.items() if key not in ("image_name", "expressions")}
            targets.append(
                Target(
                    id=number,
                    kind="alpha",
                    file=relative(masks.get(stem, label_file.parent / "mask" / f"{stem}.png"), root),
                    phrases=phrases_of(texts, kinds),
                    category=str(entry.get("category", entry.get("entity_name", entry.get("keyword", "")))),
                    extra={"release": rest} if rest else {},
                )
            )
        extra = {"eval_index_expression": chosen[name]} if name in chosen else {}
        file = relative(images.get(name, label_file.parent / "img" / f"{name}.jpg"), root)
        listing.sources.append(Source(key_of(name), file, tuple(targets), extra=extra))
    for what, files, wanted in (("masks", masks, used), ("images", images, set(by_image))):
        spare = sorted(set(files) - wanted)
        if spare:
            listing.warnings.append(
                f"{len(spare)} {what} have no entry in {label_file.name}, the first is {spare[0]!r}."
            )
    return listing


def _locate(root: Path, split: str) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    if not root.is_dir():
        raise InputError(f"the release's folder {str(root)!r} does not exist.")
    for base in folders(root, 3):
        label = resolve(base, _LABELS[split])
        if label is None:
            continue
        image_folder = resolve(base, "img") or resolve(base, "image") or resolve(base, "images")
        mask_folder = resolve(base, "mask") or resolve(base, "alpha")
        if image_folder is None or mask_folder is None:
            raise InputError(f"{str(label)!r} has no folders `img` (or `image`) and `mask` beside it.")
        return label, by_stem(image_folder, IMAGES[:3]), by_stem(mask_folder, MATTES[:1])
    raise InputError(f"RefMatte's {split} was not found: no {_LABELS[split]!r} in {str(root)!r} or 3 levels below it.")


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} must be a JSON object, got a {type(value).__name__}.")
    return value


def _texts(entry: dict[str, Any]) -> list[str]:
    texts = entry.get("expressions", entry.get("expression"))
    if texts is None:
        texts = [entry[key] for key in ("keyword", "entity_name") if key in entry][:1]
    return [texts] if isinstance(texts, str) else list(texts)


def guess_kind(text: str) -> str:
    """What one expression tells its instance by, judged by its words alone.

    Example:
        >>> guess_kind("the plastic bag which is silver at the rightmost edge of the image")
        'absolute'
        >>> guess_kind("the lightgray bag beside the woman"), guess_kind("the lightgray bag"), guess_kind("bag")
        ('relative', 'basic', 'keyword')
    """
    text = text.lower()
    if _PICTURE.search(text):
        return "absolute"
    if _RELATION.search(text):
        return "relative"
    return "basic" if len(text.split()) > 2 else "keyword"


def _kinds(label: dict[str, Any], stated: list[str] | None, listing: Listing) -> list[str]:
    """The kind of each place in the list of expressions, with the evidence written into the report."""
    lists = [_texts(entry) for entry in label.values()]
    length = max(map(len, lists), default=0)
    if stated is not None and len(stated) != length:
        raise InputError(
            f"--expression-kinds names {len(stated)} kinds, but {listing.split} has {length} expressions each."
        )
    kinds, votes_per_place = [], []
    for place in range(length):
        texts = [texts[place] for texts in lists if place < len(texts)]
        votes = Counter(guess_kind(text) for text in texts)
        best, count = votes.most_common(1)[0]
        # most of them must agree: a wrong kind in every report is worse than a plain number
        kinds.append(stated[place] if stated else best if count >= 0.6 * len(texts) else f"expression_{place}")
        votes_per_place.append(dict(sorted(votes.items())))
        shares = ", ".join(f"{100 * votes[kind] / len(texts):.0f} % {kind}" for kind in KINDS if votes[kind])
        words = sum(len(text.split()) for text in texts) / len(texts)
        listing.report.append(f"expression {place} -> {kinds[-1]}: {shares}; {words:.1f} words; e.g. {texts[0]!r}")
    fields = Counter(key for entry in label.values() for key in entry)
    for key, count in sorted(fields.items()):
        example = next(entry[key] for entry in label.values() if key in entry)
        kept = "" if key in ("image_name", "expressions") else " (kept as release." + key + ")"
        text = json.dumps(example, ensure_ascii=False)
        short = text if len(text) <= 60 else text[:57] + "..."
        listing.report.append(f"field {key}: in {count} of {len(label)} entries{kept}; e.g. {short}")
    lengths = Counter(map(len, lists))
    if len(lengths) > 1:
        listing.warnings.append(f"instances differ in their number of expressions: {dict(sorted(lengths.items()))}.")
    listing.index_extra["expression_kinds"] = kinds
    return kinds
