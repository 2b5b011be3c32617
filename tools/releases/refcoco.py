"""RefCOCO, RefCOCO+ and RefCOCOg: COCO photographs, hard masks, and several sentences per object.

The references are a Python 2 pickle. Unpickling runs whatever code the file names, so it is opened by an unpickler that
knows nothing but containers, text and numbers.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

from lit_matting.checks import InputError
from tools.releases.files import find_folder, key_of, phrases_of, relative, resolve
from tools.releases.source import Listing, Source, Target

NAMES = ("refcoco", "refcoco+", "refcocog")
SPLIT_BY = {"refcoco": ("unc", "google"), "refcoco+": ("unc",), "refcocog": ("umd", "google")}
SPLITS = ("train", "val", "testA", "testB", "test")
# references and sentences of the UNC splits, as papers on them state
_STATED = {
    ("refcoco", "unc"): {
        "train": (42_404, 120_624),
        "val": (3_811, 10_834),
        "testA": (1_975, 5_657),
        "testB": (1_810, 5_095),
    },
    ("refcoco+", "unc"): {"train": (0, 120_191), "val": (0, 10_758), "testA": (0, 5_726), "testB": (0, 4_889)},
}
_REFERENCE = (
    "ref_id", "ann_id", "category_id", "image_id", "file_name", "split", "sent_ids", "sentences"
)  # fmt: skip
_NEEDED = ("ref_id", "ann_id", "image_id", "split")
_ANNOTATION = ("id", "image_id", "category_id", "segmentation", "bbox", "area", "iscrowd")
_IMAGES = ("images/mscoco/images/train2014", "images/train2014", "train2014", "coco/train2014", "images")


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every class and function: containers, text and numbers need none."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, and only lists, dicts, text and numbers belong in it"
        )


def load_references(path: Path) -> list[dict[str, Any]]:
    """The references of a ``refs(*).p`` file, its text decoded.

    Raises:
        InputError: If it is no such pickle, or names a class or function to call.
    """
    try:
        # Python 2 strings are bytes: latin1 keeps every byte, and _text reads them as UTF-8
        value = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
        TypeError,
        OverflowError,
    ) as error:
        raise InputError(f"{str(path)!r} cannot be unpickled: {error or type(error).__name__}.") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) and "sentences" in item for item in value):
        raise InputError(f"{str(path)!r} must hold a list of references with `sentences`.")
    return _text(value)


def _load_instances(path: Path) -> dict[str, Any]:
    try:
        coco = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not valid JSON: {error}.") from None
    if not isinstance(coco, dict) or not {"images", "annotations"} <= set(coco):
        raise InputError(f"{str(path)!r} must be an object with `images` and `annotations`, as COCO writes them.")
    return coco


def _text(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return value.encode("latin1").decode("utf-8")
        except (UnicodeEncodeError, UnicodeDecodeError):
            return value
    if isinstance(value, dict):
        return {_text(key): _text(item) for key, item in value.items()}
    return [_text(item) for item in value] if isinstance(value, (list, tuple)) else value


def scan(
    root: Path, name: str, split_by: str | None = None, splits: list[str] | None = None, images: Path | None = None
) -> list[Listing]:
    """List the splits of one of the three data sets.

    Args:
        root: Folder that holds ``refcoco``, ``refcoco+``, ``refcocog`` (or is one of them).
        name: Which of the three.
        split_by: Who split it: ``unc``, ``google`` or ``umd``; None takes the usual one.
        splits: Which splits; None takes all that the file has.
        images: The folder of COCO train2014, if it is not in the usual place below the root.

    Raises:
        InputError: If a file or folder is missing or a split does not exist.
    """
    split_by = split_by or SPLIT_BY[name][0]
    if split_by not in SPLIT_BY[name]:
        raise InputError(f"{name} has no split by {split_by!r}; there is {' and '.join(SPLIT_BY[name])}.")
    folder = _data_folder(root, name)
    pickled = resolve(folder, f"refs({split_by}).p")
    instances_file = resolve(folder, "instances.json")
    for path, what in ((pickled, f"refs({split_by}).p"), (instances_file, "instances.json")):
        if path is None:
            raise InputError(f"{name}: {what!r} is not in {str(folder)!r}.")
    assert pickled is not None
    assert instances_file is not None
    references = load_references(pickled)
    for number, reference in enumerate(references):
        if lacking := [field for field in _NEEDED if field not in reference]:
            raise InputError(f"{str(pickled)!r}: reference {number} has no `{lacking[0]}`.")
    coco = _load_instances(instances_file)
    if images is None:
        images = find_folder(root if root != folder else root.parent, _IMAGES, "the folder of COCO train2014", depth=1)
    elif not images.is_dir():
        raise InputError(f"the folder of images {str(images)!r} does not exist.")
    present = Counter(reference["split"] for reference in references)
    wanted = splits or [split for split in SPLITS if split in present]
    missing = [split for split in wanted if split not in present]
    if missing:
        raise InputError(f"{name} ({split_by}) has no split {missing[0]!r}; there is {', '.join(sorted(present))}.")
    tables = _Tables(coco, images, root)
    listings = [_listing(name, split_by, split, references, tables) for split in wanted]
    _warn_of_shared_images(listings)
    return listings


class _Tables:
    """COCO's images, annotations and categories by id."""

    def __init__(self, coco: dict[str, Any], folder: Path, root: Path) -> None:
        self.images = {item["id"]: item for item in coco["images"]}
        self.annotations = {item["id"]: item for item in coco["annotations"]}
        self.categories = {item["id"]: item["name"] for item in coco.get("categories", [])}
        self.folder, self.root = folder, root


def _data_folder(root: Path, name: str) -> Path:
    for candidate in (resolve(root, name), resolve(root, f"data/{name}"), root):
        if candidate is not None and candidate.is_dir() and resolve(candidate, "instances.json") is not None:
            return candidate
    raise InputError(f"{name} was not found: no 'instances.json' in {str(root / name)!r} or {str(root)!r}.")


def _listing(name: str, split_by: str, split: str, references: list[dict[str, Any]], tables: _Tables) -> Listing:
    listing = Listing(name, split, [])
    listing.index_extra["split_by"] = split_by
    by_image: dict[int, list[dict[str, Any]]] = {}
    for reference in references:
        if reference["split"] == split:
            by_image.setdefault(reference["image_id"], []).append(reference)
    sentences = empty = 0
    for image_id, group in sorted(by_image.items()):
        # the references' own file_name has the annotation's number in it and is no file
        image = tables.images.get(image_id)
        file = image["file_name"] if image else f"COCO_train2014_{image_id:012d}.jpg"
        targets = []
        for reference in sorted(group, key=lambda item: item["ref_id"]):
            annotation = tables.annotations.get(reference["ann_id"], {})
            texts = [sentence.get("sent") or sentence.get("raw", "") for sentence in reference["sentences"]]
            kept = [text for text in texts if any(character.isalnum() for character in text)]
            sentences, empty = sentences + len(kept), empty + len(texts) - len(kept)
            category_id = reference.get("category_id", annotation.get("category_id"))
            targets.append(
                Target(
                    id=str(reference["ref_id"]),
                    kind="mask",
                    shapes=annotation.get("segmentation", []),
                    phrases=phrases_of(kept, ["sentence"] * len(kept)),
                    category=tables.categories.get(category_id, ""),
                    extra={
                        "ann_id": reference["ann_id"],
                        "category_id": category_id,
                        "sent_ids": reference.get("sent_ids", []),
                        "iscrowd": annotation.get("iscrowd", 0),
                        **_release(reference, annotation),
                    },
                )
            )
        extra: dict[str, Any] = {"image_id": image_id}
        if image:
            extra["annotated_size"] = [image["width"], image["height"]]
        listing.sources.append(
            Source(key_of(Path(file).stem), relative(tables.folder / file, tables.root), tuple(targets), extra=extra)
        )
    count = sum(map(len, by_image.values()))
    listing.report.append(f"{len(by_image)} images, {count} references, {sentences} sentences")
    own = [reference for group in by_image.values() for reference in group]
    _report_fields(listing, own, "reference", _REFERENCE)
    annotations = [tables.annotations[item["ann_id"]] for item in own if item["ann_id"] in tables.annotations]
    _report_fields(listing, annotations, "annotation", _ANNOTATION)
    if empty:
        listing.warnings.append(f"{empty} sentences have no words and are left out.")
    stated = _STATED.get((name, split_by), {}).get(split)
    if stated and (stated[1] != sentences or stated[0] not in (0, count)):
        numbers = f"{stated[0]} references and {stated[1]} sentences" if stated[0] else f"{stated[1]} sentences"
        listing.warnings.append(f"papers state {numbers}; is it complete?")
    return listing


def _release(reference: dict[str, Any], annotation: dict[str, Any]) -> dict[str, Any]:
    """Fields that the published files do not have, kept as they are."""
    rest = {key: value for key, value in annotation.items() if key not in _ANNOTATION}
    rest |= {key: value for key, value in reference.items() if key not in _REFERENCE}
    return {"release": rest} if rest else {}


def _report_fields(listing: Listing, group: list[dict[str, Any]], what: str, known: tuple[str, ...]) -> None:
    fields = Counter(key for item in group for key in item)
    other = {key: count for key, count in sorted(fields.items()) if key not in known}
    missing = [key for key in known if fields[key] < len(group)]
    listing.report.append(f"fields of a {what}: {', '.join(sorted(fields))}")
    for key, count in other.items():
        listing.report.append(f"  {key}: not a published field, in {count} of {len(group)} (kept as release.{key})")
    for key in missing:
        listing.report.append(f"  {key}: missing in {len(group) - fields[key]} of {len(group)}")


def _warn_of_shared_images(listings: list[Listing]) -> None:
    for number, first in enumerate(listings):
        for second in listings[number + 1 :]:
            shared = {source.image for source in first.sources} & {source.image for source in second.sources}
            if shared:
                second.warnings.append(
                    f"{len(shared)} images are also in {first.split}: this split divides objects, not images."
                )
