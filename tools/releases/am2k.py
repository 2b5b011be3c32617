"""AM-2k (Li et al., IJCV 2022): animals of 20 kinds, with estimated foregrounds and backgrounds for training."""

from __future__ import annotations

from pathlib import Path

from tools.releases.files import find_folder
from tools.releases.p3m10k import list_pairs
from tools.releases.source import Listing

SPLITS = ("train", "validation")
EXPECTED = {"train": (1_800, 1_800), "validation": (200, 200)}


def scan(root: Path, split: str) -> Listing:
    """List one split of the release.

    Raises:
        InputError: If its folders are missing.
    """
    images_folder = find_folder(root, [f"{split}/original"], f"AM-2k's {split}")
    listing = Listing("am2k", split, [], EXPECTED[split])
    return list_pairs(root, images_folder.parent, images_folder, listing, "animal", {})
