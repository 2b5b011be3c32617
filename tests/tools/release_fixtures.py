"""Tiny copies of the releases' folders, quirks included."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

Array = np.ndarray


def picture(seed: int, width: int = 32, height: int = 24) -> Array:
    """A smooth colour picture, (H, W, 3) uint8 RGB, different for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def alpha(seed: int, width: int = 32, height: int = 24) -> Array:
    """A soft blob, (H, W) uint8, with 0 and 255 in it."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0.3, 0.7, 2)
    yy, xx = np.mgrid[:height, :width]
    distance = np.hypot(xx / width - x, yy / height - y)
    return np.clip((0.3 - distance) * 1400 + 128, 0, 255).astype(np.uint8)


def save(path: Path, pixels: Array, **options: Any) -> None:
    """Save an RGB, RGBA, LA or grey array in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def junk(folder: Path) -> None:
    """What archives made on a desktop leave behind."""
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "._p_0.jpg").write_bytes(b"\0\5\26\7")
    (folder / "Thumbs.db").write_bytes(b"junk")


def refmatte(root: Path) -> None:
    """Two train images of 2 and 3 instances, one test and one RW100 image; a doubly nested folder, extra fields."""
    base = root / "RefMatte" / "RefMatte"
    label: dict[str, Any] = {}
    for number, (stem, count) in enumerate({"rim_train_000325a8": 2, "rim_train_0badcafe": 3}.items()):
        save(base / "train/img" / f"{stem}.jpg", picture(number), quality=95)
        for k in range(1, count + 1):
            save(base / "train/mask" / f"{stem}_{k}.png", alpha(10 * number + k))
            label[f"{stem}_{k}"] = {
                "image_name": stem,
                "expressions": [
                    f"dog {k}",
                    "the white and salient dog",
                    "the white dog at the leftmost edge of the picture",
                    "the white dog beside the brown  person ",
                ],
                "category": "dog",
                "attributes": {"colour": "white", "clearness": k},
            }
    junk(base / "train/img")
    junk(base / "train/mask")
    (base / "train/refmatte_train_label.json").write_text(json.dumps(label))
    # the test split spells its folders another way, and its image_name carries the extension
    save(base / "test/Image/rim_test_1.jpg", picture(5), quality=95)
    save(base / "test/Mask/rim_test_1_1.png", alpha(51))
    entry = {"image_name": "rim_test_1.jpg", "expressions": ["the red cup", "cup"]}
    (base / "test/refmatte_test_label.json").write_text("\ufeff" + json.dumps({"rim_test_1_1.png": entry}))
    rw = root / "RefMatte_RW_100"
    save(rw / "image/a_b.c.jpg", picture(6), quality=95)
    rw_label = {}
    for k in (1, 2, 10):
        save(rw / "mask" / f"a_b.c_{k}.png", alpha(60 + k))
        rw_label[f"a_b.c_{k}"] = {"image_name": "a_b.c", "expressions": [f"the person number {k}"]}
    (rw / "refmatte_rw100_label.json").write_text(json.dumps(rw_label))
    (rw / "eval_index_expression.json").write_text(json.dumps({"a_b.c": 0}))


def p3m10k(root: Path) -> None:
    """Train with a grey JPEG, 3-channel and 0/1 masks; one test set below `validation`, one beside it."""
    train = root / "train"
    save(train / "blurred_image/p_00000001.jpg", picture(1), quality=95)
    save(train / "mask/p_00000001.png", alpha(1))
    save(train / "blurred_image/p_00000002.jpg", picture(2)[..., 0], quality=95)
    save(train / "mask/p_00000002.png", np.dstack([alpha(2)] * 3))
    save(train / "blurred_image/p_00000003.jpg", picture(3), quality=95)
    save(train / "mask/p_00000003.png", (alpha(3) > 127).astype(np.uint8))
    save(train / "blurred_image/p_00000004.jpg", picture(4), quality=95)
    save(train / "mask/p_00000004.png", np.dstack([alpha(4)] * 3 + [np.full_like(alpha(4), 255)]))
    junk(train / "blurred_image")
    junk(train / "mask")
    for folder, image in (("validation/P3M-500-P", "blurred_image"), ("P3M-500-NP", "original_image")):
        save(root / folder / image / "p_000000aa.jpg", picture(7), quality=95)
        save(root / folder / "mask/p_000000aa.png", alpha(7))
        save(root / folder / "trimap/p_000000aa.png", np.full((24, 32), 128, np.uint8))


def am2k(root: Path) -> None:
    """Other upper and lower case, fg PNG, bg once .jpg and once .png, an EXIF-turned image, a 16-bit alpha."""
    base = root / "AM-2K" / "Train"
    save(base / "original/m_00000001.jpg", picture(1), quality=95)
    save(base / "mask/m_00000001.png", alpha(1))
    save(base / "fg/m_00000001.png", picture(11))
    save(base / "bg/m_00000001.jpg", picture(12), quality=95)
    # stored lying, shown standing: 24 x 32 for a viewer, and the matte is of that size
    turned = Image.Exif()
    turned[0x0112] = 6
    save(base / "original/m_00000002.jpg", picture(2), quality=95, exif=turned)
    save(base / "mask/m_00000002.png", alpha(2, 24, 32))
    save(base / "fg/m_00000002.png", picture(21, 24, 32))
    save(base / "bg/m_00000002.png", picture(22, 24, 32))
    # the same tag, but the matte was drawn on the stored pixels
    save(base / "original/m_00000003.jpg", picture(3), quality=95, exif=turned)
    save(base / "mask/m_00000003.png", (alpha(3).astype(np.uint16) * 257).astype(np.uint16))
    save(root / "AM-2K/validation/original/m_000000aa.jpg", picture(7), quality=95)
    save(root / "AM-2K/validation/mask/m_000000aa.png", alpha(7))


def refcoco(root: Path) -> None:
    """Three images (one grey), a reference of two overlapping polygons, run lengths, Python 2 text; splits unc."""
    images = root / "images/mscoco/images/train2014"
    names = {
        1: "COCO_train2014_000000000001.jpg",
        2: "COCO_train2014_000000000002.jpg",
        3: "COCO_train2014_000000000003.jpg",
    }
    save(images / names[1], picture(1), quality=95)
    save(images / names[2], picture(2)[..., 0], quality=95)
    save(images / names[3], picture(3), quality=95)
    coco = {
        "images": [{"id": i, "file_name": name, "height": 24, "width": 32} for i, name in names.items()],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [
            # two 10 x 10 squares that overlap in 5 x 10
            {"id": 100, "image_id": 1, "category_id": 18, "iscrowd": 0, "area": 150, "bbox": [2, 2, 15, 10],
             "segmentation": [[2, 2, 12, 2, 12, 12, 2, 12], [7, 2, 17, 2, 17, 12, 7, 12]]},
            {"id": 101, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 16, "bbox": [20, 4, 4, 4],
             "segmentation": [[20, 4, 24, 4, 24, 8, 20, 8]]},
            # uncompressed run lengths, column by column: 24 rows off, then 24 * 8 on
            {"id": 200, "image_id": 2, "category_id": 1, "iscrowd": 1, "area": 192, "bbox": [1, 0, 8, 24],
             "segmentation": {"counts": [24, 192, 24 * 32 - 216], "size": [24, 32]}},
            {"id": 300, "image_id": 3, "category_id": 18, "iscrowd": 0, "area": 64, "bbox": [0, 0, 8, 8],
             "segmentation": [[0, 0, 8, 0, 8, 8, 0, 8]]},
        ],
    }  # fmt: skip
    refs = [
        _reference(1, 100, 18, 1, "train", ["left dog", "the dog that sits left"]),
        _reference(2, 101, 1, 1, "train", ["guy"]),
        # "café" as the bytes that a Python 2 str holds
        _reference(3, 200, 1, 2, "testA", ["man at caf\xc3\xa9", " . "]),
        _reference(4, 300, 18, 3, "val", ["dog"]),
    ]
    for name in ("refcoco", "refcoco+"):
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "instances.json").write_text(json.dumps(coco))
        (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


def _reference(ref: int, ann: int, category: int, image: int, split: str, sentences: list[str]) -> dict[str, Any]:
    return {
        "ref_id": ref,
        "ann_id": ann,
        "category_id": category,
        "image_id": image,
        "file_name": f"COCO_train2014_{image:012d}_{ann}.jpg",
        "split": split,
        "sent_ids": [10 * ref + i for i in range(len(sentences))],
        "sentences": [
            {"sent_id": 10 * ref + i, "sent": text, "raw": text.upper(), "tokens": text.split()}
            for i, text in enumerate(sentences)
        ],
    }
