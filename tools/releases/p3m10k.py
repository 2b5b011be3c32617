"""P3M-10k (Li et al., ACM MM 2021): portraits with blurred faces for training, and two test sets."""

from __future__ import annotations

from pathlib import Path

from tools.releases.files import IMAGES, MATTES, by_stem, find_folder, key_of, relative, resolve
from tools.releases.source import Listing, Source, Target

SPLITS = ("train", "p3m-500-p", "p3m-500-np")
EXPECTED = {"train": (9_421, 9_421), "p3m-500-p": (500, 500), "p3m-500-np": (500, 500)}
_FOLDERS = {
    # the README has the level `validation`, the authors' own code has not
    "train": (("train",), "blurred_image"),
    "p3m-500-p": (("validation/P3M-500-P", "P3M-500-P"), "blurred_image"),
    "p3m-500-np": (("validation/P3M-500-NP", "P3M-500-NP"), "original_image"),
}


def scan(root: Path, split: str) -> Listing:
    """List one split of the release.

    Raises:
        InputError: If its folders are missing.
    """
    names, image_name = _FOLDERS[split]
    images_folder = find_folder(root, [f"{name}/{image_name}" for name in names], f"P3M-10k's {split}")
    base = images_folder.parent
    extra = {"faces": "blurred" if image_name == "blurred_image" else "as photographed"}
    return list_pairs(root, base, images_folder, Listing("p3m10k", split, [], EXPECTED[split]), "person", extra)


def list_pairs(
    root: Path, base: Path, images_folder: Path, listing: Listing, category: str, extra: dict[str, str]
) -> Listing:
    """Fill a listing with the images of one folder, and beside it ``mask``, and where they exist ``fg`` and ``bg``."""
    images = by_stem(images_folder, IMAGES)
    masks = by_stem(resolve(base, "mask"), MATTES)
    foregrounds = by_stem(resolve(base, "fg"), (".png", ".jpg", ".jpeg"))
    # described as PNG, read by the authors' code as JPEG: both occur
    backgrounds = by_stem(resolve(base, "bg"), (".jpg", ".jpeg", ".png"))
    for stem in sorted(set(images) | set(masks)):
        target = Target(
            id="0",
            kind="alpha",
            # where one of the two is missing, reading it says so by name
            file=relative(masks.get(stem, base / "mask" / f"{stem}.png"), root),
            category=category,
            foreground=relative(foregrounds[stem], root) if stem in foregrounds else None,
        )
        listing.sources.append(
            Source(
                key=key_of(stem),
                image=relative(images.get(stem, images_folder / f"{stem}.jpg"), root),
                targets=(target,),
                background=relative(backgrounds[stem], root) if stem in backgrounds else None,
                extra=dict(extra),
            )
        )
    for what, found in (("fg", foregrounds), ("bg", backgrounds)):
        if found:
            missing = len(set(images) - set(found))
            listing.report.append(
                f"{what}: {len(found)} files" + (f", missing for {missing} images" if missing else "")
            )
    return listing
