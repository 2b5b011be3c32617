"""Packing public releases: every quirk of their folders, the bytes, the restart, the bad files."""

from __future__ import annotations

import doctest
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from release_fixtures import alpha, am2k, p3m10k, picture, refcoco, refmatte, save

from data_modules.decode import decode_rgb, decode_sample
from data_modules.shards import RawSample, ShardIndex
from lit_matting.checks import InputError
from tools.make_shards import main
from tools.releases import refmatte as refmatte_release
from tools.releases.pixels import BadFile, read_image, read_matte, read_shapes, without_orientation
from tools.releases.refcoco import load_references

Array = np.ndarray
ROOT = Path(__file__).resolve().parents[2]


def _pack(*arguments: Any) -> None:
    assert main([*map(str, arguments), "--workers", "1"]) == 0


def _read(output: Path, split: str) -> dict[str, RawSample]:
    return {sample.key: sample for sample in ShardIndex.load(output / f"{split}.index.json", verify=True)}


def _target(sample: RawSample, number: int = 0) -> Array:
    data = np.frombuffer(bytes(sample.member(sample.instances[number].target)), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_UNCHANGED)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha1(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: Any) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments), "--workers", "1"]) == status
    return capsys.readouterr().err


# RefMatte


def test_refmatte_is_read_from_its_nested_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refmatte(tmp_path / "in")
    _pack("refmatte", tmp_path / "in", tmp_path / "out")
    train = _read(tmp_path / "out", "train")
    assert {key: len(sample.instances) for key, sample in train.items()} == {
        "rim_train_000325a8": 2,
        "rim_train_0badcafe": 3,
    }
    sample = train["rim_train_000325a8"]
    folder = tmp_path / "in/RefMatte/RefMatte/train"
    assert bytes(sample.member("jpg")) == (folder / "img/rim_train_000325a8.jpg").read_bytes()
    assert bytes(sample.member("1.alpha.png")) == (folder / "mask/rim_train_000325a8_2.png").read_bytes()
    second = sample.instances[1]
    assert (second.id, second.kind, second.category) == ("2", "alpha", "dog")
    assert [(phrase.text, phrase.kind) for phrase in second.phrases] == [
        ("dog 2", "keyword"),
        ("the white and salient dog", "basic"),
        ("the white dog at the leftmost edge of the picture", "absolute"),
        ("the white dog beside the brown person", "relative"),
    ]
    assert second.fields["release"] == {"category": "dog", "attributes": {"colour": "white", "clearness": 2}}
    assert sample.meta["source"]["sha1"] == hashlib.sha1(bytes(sample.member("jpg"))).hexdigest()
    said = capsys.readouterr().out
    assert "expression 2 -> absolute: 100 % absolute" in said
    assert "field attributes: in 5 of 5 entries (kept as release.attributes)" in said
    assert "published are 45000 images and 112506 instances" in said


def test_refmatte_test_and_rw100_are_read_with_their_own_spellings(tmp_path: Path) -> None:
    refmatte(tmp_path / "in")
    _pack("refmatte", tmp_path / "in", tmp_path / "out", "--splits", "test", "rw100")
    test = _read(tmp_path / "out", "test")["rim_test_1"]
    assert [phrase.text for phrase in test.instances[0].phrases] == ["the red cup", "cup"]
    rw = _read(tmp_path / "out", "rw100")["a_b_c"]
    assert [instance.id for instance in rw.instances] == ["1", "2", "10"]
    assert rw.meta["eval_index_expression"] == 0


def test_refmatte_expression_kinds_can_be_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refmatte(tmp_path / "in")
    base = ["refmatte", tmp_path / "in", tmp_path / "out", "--splits", "train", "--expression-kinds"]
    _pack(*base, "a", "b", "c", "d")
    sample = _read(tmp_path / "out", "train")["rim_train_0badcafe"]
    assert [phrase.kind for phrase in sample.instances[0].phrases] == ["a", "b", "c", "d"]
    index = json.loads((tmp_path / "out/train.index.json").read_text())
    assert index["expression_kinds"] == ["a", "b", "c", "d"]
    assert "names 2 kinds, but train has 4 expressions" in _fails(capsys, 2, *base, "a", "b")


def test_refmatte_kinds_stay_unnamed_where_the_texts_disagree(tmp_path: Path) -> None:
    refmatte(tmp_path / "in")
    path = tmp_path / "in/RefMatte/RefMatte/train/refmatte_train_label.json"
    label = json.loads(path.read_text())
    for number, entry in enumerate(label.values()):
        entry["expressions"] = [["cup", "the cup left of the dog", "the cup in the middle of the image"][number % 3]]
    path.write_text(json.dumps(label))
    assert refmatte_release.scan(tmp_path / "in", "train").index_extra["expression_kinds"] == ["expression_0"]


# P3M-10k and AM-2k


def test_p3m10k_masks_of_any_channels_become_one_channel(tmp_path: Path) -> None:
    p3m10k(tmp_path / "in")
    _pack("p3m10k", tmp_path / "in", tmp_path / "out")
    train = _read(tmp_path / "out", "train")
    assert list(train) == ["p_00000001", "p_00000002", "p_00000003", "p_00000004"]
    for number in (1, 2, 4):
        assert np.array_equal(_target(train[f"p_0000000{number}"]), alpha(number))
    assert np.array_equal(_target(train["p_00000003"]), (alpha(3) > 127) * np.uint8(255))
    assert train["p_00000003"].meta["notes"] == ["matte stored as 0 and 1"]
    assert train["p_00000001"].meta["faces"] == "blurred"
    assert train["p_00000001"].instances[0].category == "person"
    grey = decode_sample(train["p_00000002"], [0])
    assert grey.image.shape == (24, 32, 3)
    index = json.loads((tmp_path / "out/train.index.json").read_text())
    assert index["notes"] == {"matte has 3 channels": 1, "matte has 4 channels": 1, "matte stored as 0 and 1": 1}


def test_p3m10k_test_sets_are_found_with_and_without_the_validation_folder(tmp_path: Path) -> None:
    p3m10k(tmp_path / "in")
    _pack("p3m10k", tmp_path / "in", tmp_path / "out", "--splits", "p3m-500-p", "p3m-500-np")
    assert _read(tmp_path / "out", "p3m-500-p")["p_000000aa"].meta["faces"] == "blurred"
    assert _read(tmp_path / "out", "p3m-500-np")["p_000000aa"].meta["faces"] == "as photographed"


def test_am2k_is_read_in_any_case_with_foregrounds_and_either_kind_of_background(tmp_path: Path) -> None:
    am2k(tmp_path / "in")
    _pack("am2k", tmp_path / "in", tmp_path / "out", "--with-background")
    train = _read(tmp_path / "out", "train")
    first = train["m_00000001"]
    base = tmp_path / "in/AM-2K/Train"
    assert bytes(first.member("0.foreground.png")) == (base / "fg/m_00000001.png").read_bytes()
    assert bytes(first.member("background.jpg")) == (base / "bg/m_00000001.jpg").read_bytes()
    from_png = decode_rgb(bytes(train["m_00000002"].member("background.jpg")))
    assert np.abs(from_png.astype(int) - picture(22, 24, 32)).mean() < 4
    assert len(_read(tmp_path / "out", "validation")) == 1


def test_an_orientation_tag_is_followed_only_where_the_matte_does(tmp_path: Path) -> None:
    am2k(tmp_path / "in")
    _pack("am2k", tmp_path / "in", tmp_path / "out", "--splits", "train", "--no-foreground")
    train = _read(tmp_path / "out", "train")
    # shown standing: turned clockwise by a viewer
    turned = decode_sample(train["m_00000002"], [0])
    assert turned.image.shape == (32, 24, 3)
    assert np.abs(turned.image.astype(int) - np.rot90(picture(2), -1)).mean() < 6
    # the matte fits the stored pixels: the tag is gone, the pixels are the same
    stored = decode_sample(train["m_00000003"], [0])
    assert stored.image.shape == (24, 32, 3)
    assert np.abs(stored.image.astype(int) - picture(3)).mean() < 6
    assert stored.targets[0].dtype == np.uint16
    assert np.array_equal(stored.targets[0] // 257, alpha(3))


def test_unsetting_the_orientation_changes_nothing_else(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 8, "a caption"
    save(tmp_path / "a.jpg", picture(0), exif=exif)
    before = (tmp_path / "a.jpg").read_bytes()
    after = without_orientation(before)
    assert len(after) == len(before)
    assert sum(a != b for a, b in zip(before, after)) == 1
    (tmp_path / "b.jpg").write_bytes(after)
    with Image.open(tmp_path / "b.jpg") as image:
        assert dict(image.getexif()) == {0x0112: 1, 0x010E: "a caption"}


# pairs


def test_pairs_take_folders_of_any_name_and_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "in"
    save(root / "images/cats/one.tif", picture(1))
    save(root / "GT/cats/one_alpha.png", alpha(1))
    save(root / "images/two.png", picture(2))
    save(root / "GT/two_alpha.png", alpha(2))
    save(root / "images/lonely.png", picture(3))
    base = ["pairs", root, tmp_path / "out", "--dataset", "rm1k", "--images", "images", "--alphas", "gt"]
    assert "is there a --suffix" in _fails(capsys, 2, *base)
    _pack(*base, "--suffix", "_alpha", "--category", "cat")
    assert "1 images have no matte and are left out, the first is 'lonely'" in capsys.readouterr().out
    found = _read(tmp_path / "out", "train")
    assert set(found) == {"cats_one", "two"}
    # a TIFF is no member of a shard: it becomes PNG, pixel by pixel the same
    assert np.array_equal(decode_rgb(bytes(found["cats_one"].member("png"))), picture(1))
    assert found["cats_one"].meta["notes"] == ["re-encoded from TIFF"]
    assert found["two"].instances[0].category == "cat"
    index = json.loads((tmp_path / "out/train.index.json").read_text())
    assert (index["dataset"], index["samples"], index["tool"]) == ("rm1k", 2, "make_shards 1.0")


def test_a_list_of_names_selects_and_a_missing_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "in"
    for number in range(3):
        save(root / f"image/i{number}.png", picture(number))
        save(root / f"alpha/i{number}.png", alpha(number))
    base = ["pairs", root, tmp_path / "out", "--dataset", "d", "--list", tmp_path / "list.txt"]
    (tmp_path / "list.txt").write_text("i0\ni2.jpg\n")
    _pack(*base)
    assert set(_read(tmp_path / "out", "train")) == {"i0", "i2"}
    (tmp_path / "list.txt").write_text("i0\ni7\n")
    assert "bad: i7: image/i7.jpg: No such file" in _fails(capsys, 1, *base, "--overwrite")


def test_a_json_list_brings_expressions_and_keeps_its_other_fields(tmp_path: Path) -> None:
    root = tmp_path / "in"
    save(root / "a.png", picture(1))
    save(root / "a_1.png", alpha(1))
    save(root / "a_2.png", (alpha(2) > 127) * np.uint8(255))
    entries = [
        {"id": "a1", "image": "a.png", "alpha": "a_1.png", "expressions": ["the cup", "the left cup"],
         "expression_types": ["basic", "absolute"], "licence": "MIT"},
        {"id": "a2", "image": "a.png", "mask": "a_2.png", "expressions": ["the dog"], "category": "dog"},
    ]  # fmt: skip
    (root / "index.json").write_text(json.dumps(entries))
    _pack("pairs", root, tmp_path / "out", "--dataset", "real", "--split", "test", "--index", root / "index.json")
    sample = _read(tmp_path / "out", "test")["a"]
    assert [(instance.id, instance.kind) for instance in sample.instances] == [("a1", "alpha"), ("a2", "mask")]
    assert [phrase.kind for phrase in sample.instances[0].phrases] == ["basic", "absolute"]
    assert sample.instances[0].fields["release"] == {"licence": "MIT"}


# RefCOCO


def test_refcoco_masks_are_unions_and_texts_are_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refcoco(tmp_path / "in")
    _pack("refcoco", tmp_path / "in", tmp_path / "out", "--name", "refcoco+")
    said = capsys.readouterr().out
    assert "1 sentences have no words and are left out" in said
    assert "1 images, 2 references, 3 sentences" in said
    assert "papers state 120191 sentences; is it complete?" in said
    train = _read(tmp_path / "out", "train")
    (sample,) = train.values()
    assert sample.key == "COCO_train2014_000000000001"
    assert [instance.id for instance in sample.instances] == ["1", "2"]
    dog = sample.instances[0]
    assert (dog.kind, dog.category, dog.fields["ann_id"]) == ("mask", "dog", 100)
    assert [phrase.text for phrase in dog.phrases] == ["left dog", "the dog that sits left"]
    expected = np.zeros((24, 32), bool)
    expected[2:12, 2:17] = True
    assert np.array_equal(_target(sample) == 255, expected), "the overlap of two polygons must not be a hole"
    (crowd,) = _read(tmp_path / "out", "testA").values()
    columns = np.zeros((24, 32), bool)
    columns[:, 1:9] = True
    assert np.array_equal(_target(crowd) == 255, columns)
    assert [phrase.text for phrase in crowd.instances[0].phrases] == ["man at café"]
    assert crowd.instances[0].fields["iscrowd"] == 1
    assert decode_sample(crowd, [0]).image.shape == (24, 32, 3)


def test_references_that_call_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "touched").touch, ())

    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([{"sentences": Evil()}], protocol=2))
    with pytest.raises(InputError, match="only lists, dicts, text and numbers"):
        load_references(tmp_path / "refs(unc).p")
    assert not (tmp_path / "touched").exists()
    (tmp_path / "short.p").write_bytes(pickle.dumps([{"sentences": []}], protocol=2)[:-5])
    with pytest.raises(InputError, match="cannot be unpickled"):
        load_references(tmp_path / "short.p")


def test_a_python_2_text_pickle_is_read(tmp_path: Path) -> None:
    # protocol 0, as Python 2's cPickle writes: S is a byte string, V unicode, I an integer
    data = b"(lp0\n(dp1\nS'ref_id'\np2\nI7\nsS'sentences'\np3\n(lp4\nS'caf\\xc3\\xa9'\np5\naVna\\u00efve\np6\nasa."
    (tmp_path / "r.p").write_bytes(data)
    assert load_references(tmp_path / "r.p") == [{"ref_id": 7, "sentences": ["café", "naïve"]}]


def test_missing_splits_and_files_of_refcoco_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refcoco(tmp_path / "in")
    base = ["refcoco", tmp_path / "in", tmp_path / "out"]
    assert "has no split 'testB'; there is testA, train, val" in _fails(capsys, 2, *base, "--splits", "testB")
    assert "no split by 'umd'; there is unc and google" in _fails(capsys, 2, *base, "--split-by", "umd")
    assert "'refs(google).p' is not in" in _fails(capsys, 2, *base, "--split-by", "google")
    assert "refcocog was not found" in _fails(capsys, 2, *base, "--name", "refcocog")


# pixels


def test_matte_channels_are_asked_for_where_both_could_be_meant(tmp_path: Path) -> None:
    grey, other = alpha(1), alpha(2)
    full, size = np.full_like(grey, 255), (32, 24)
    save(tmp_path / "rgba.png", np.dstack([grey, grey, grey, full]))
    save(tmp_path / "cut.png", np.dstack([full, full, full, other]))
    save(tmp_path / "both.png", np.dstack([grey, grey, grey, other]))
    save(tmp_path / "la.png", np.dstack([grey, full]))
    save(tmp_path / "colour.png", picture(3))

    def read(name: str, channel: str = "auto") -> Any:
        pixels = read_matte(tmp_path, name, "alpha", size, channel)[0]
        assert isinstance(pixels, np.ndarray)
        return pixels

    assert np.array_equal(read("rgba.png"), grey)
    assert np.array_equal(read("cut.png"), other)
    assert np.array_equal(read("la.png"), grey)
    with pytest.raises(BadFile, match=r"both\.png: both its colours and its alpha could be the matte"):
        read("both.png")
    assert np.array_equal(read("both.png", "first"), grey)
    assert np.array_equal(read("both.png", "alpha"), other)
    with pytest.raises(BadFile, match="a colour picture, not a matte"):
        read("colour.png")
    assert np.array_equal(read("colour.png", "first"), picture(3)[..., 0])


def test_mattes_of_a_slightly_other_size_are_resized_and_of_another_refused(tmp_path: Path) -> None:
    save(tmp_path / "near.png", alpha(1, 34, 25))
    save(tmp_path / "far.png", alpha(1, 40, 24))
    pixels, notes = read_matte(tmp_path, "near.png", "alpha", (32, 24))
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (24, 32)
    assert notes == ["matte resized by a few pixels"]
    with pytest.raises(BadFile, match=r"far\.png: the alpha is 40x24 but the image is 32x24"):
        read_matte(tmp_path, "far.png", "alpha", (32, 24))
    with pytest.raises(BadFile, match=r"near\.png: the alpha is 34x25"):
        read_matte(tmp_path, "near.png", "alpha", (32, 24), tolerance=1)


def test_palette_one_bit_and_wide_mattes_are_read(tmp_path: Path) -> None:
    hard = (alpha(1) > 127) * np.uint8(255)
    Image.fromarray(hard).convert("1").save(tmp_path / "bit.png")
    Image.fromarray(alpha(2)).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(alpha(3).astype(np.uint16)).save(tmp_path / "wide.png")
    assert np.array_equal(read_matte(tmp_path, "bit.png", "alpha", (32, 24))[0], hard)
    assert np.abs(read_matte(tmp_path, "palette.png", "alpha", (32, 24))[0].astype(int) - alpha(2)).max() <= 1  # type: ignore[union-attr]
    pixels, notes = read_matte(tmp_path, "wide.png", "alpha", (32, 24))
    assert np.array_equal(pixels, alpha(3))
    assert notes == ["8-bit matte stored in 16 bits"]


def test_masks_are_made_hard_and_plain_ones_keep_their_bytes(tmp_path: Path) -> None:
    hard = (alpha(1) > 127) * np.uint8(255)
    save(tmp_path / "hard.png", hard)
    save(tmp_path / "soft.png", alpha(1))
    assert read_matte(tmp_path, "hard.png", "mask", (32, 24)) == ((tmp_path / "hard.png").read_bytes(), [])
    pixels, notes = read_matte(tmp_path, "soft.png", "mask", (32, 24))
    assert np.array_equal(pixels, hard)
    assert notes == ["soft mask made hard"]


_UPRIGHT: dict[int, Callable[[Array], Array]] = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_decode_as_a_viewer_shows_them(tmp_path: Path, turn: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    save(tmp_path / f"a.{suffix}", picture(4), exif=exif, quality=98)
    image = read_image(tmp_path, f"a.{suffix}", lambda shown: shown)
    upright = _UPRIGHT[turn](picture(4))
    decoded = decode_rgb(image.data)
    assert (image.height, image.width) == upright.shape[:2]
    assert np.abs(decoded.astype(int) - upright).mean() < 4
    if suffix == "jpg" or turn == 1:
        assert image.data == (tmp_path / f"a.{suffix}").read_bytes()


def test_segmentations_without_an_area_are_bad(tmp_path: Path) -> None:
    for shapes in ([], [[1, 1, 2, 2]], {"counts": [768], "size": [24, 32]}, {"size": [24, 32]}):
        with pytest.raises(BadFile, match=r"x\.jpg, instance 1: its segmentation"):
            read_shapes(shapes, (32, 24), "x.jpg, instance 1")


# packing


def _folder(root: Path, count: int = 6) -> None:
    for number in range(count):
        save(root / f"image/i{number}.jpg", picture(number), quality=95)
        save(root / f"alpha/i{number}.png", alpha(number))


@pytest.mark.slow
def test_the_same_release_gives_the_same_bytes_in_any_order_of_making(tmp_path: Path) -> None:
    _folder(tmp_path / "in")
    base = ["pairs", tmp_path / "in"]
    more = ["--dataset", "d", "--max-samples", "2"]
    _pack(*base, tmp_path / "one", *more)
    assert main([*map(str, [*base, tmp_path / "two", *more]), "--workers", "2"]) == 0
    assert _digests(tmp_path / "one") == _digests(tmp_path / "two")
    # a copy elsewhere, its files made in another order and at another time
    for path in sorted((tmp_path / "in").rglob("*.*"), reverse=True):
        copy = tmp_path / "elsewhere" / path.relative_to(tmp_path / "in")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        os.utime(copy, (1, 1))
    _pack("pairs", tmp_path / "elsewhere", tmp_path / "three", *more)
    assert _digests(tmp_path / "one") == _digests(tmp_path / "three")
    assert sorted(_digests(tmp_path / "one")) == [
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "train.index.json",
    ]


def test_shards_are_bounded_in_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        save(tmp_path / f"in/image/i{number}.png", rng.integers(0, 256, (500, 500, 3), dtype=np.uint8))
        save(tmp_path / f"in/alpha/i{number}.png", alpha(number, 500, 500))
    _pack("pairs", tmp_path / "in", tmp_path / "out", "--dataset", "d", "--max-shard-mb", "1")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(sizes) == 3
    assert max(sizes) < 1.05 * 2**20


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "in")
    more = ["--dataset", "d", "--max-samples", "2"]
    _pack("pairs", tmp_path / "in", tmp_path / "whole", *more)
    import tools.releases.packing as packing

    real, built = packing._build, []

    def stop_at_the_third(number: int, *rest: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        built.append(number)
        return real(number, *rest)

    monkeypatch.setattr(packing, "_build", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        _pack("pairs", tmp_path / "in", tmp_path / "out", *more)
    assert built == [0, 1]
    assert not (tmp_path / "out/train.index.json").exists()
    # what a kill in the middle of writing leaves behind
    (tmp_path / "out/.train-000002.tar.77.partial").write_bytes(b"half")
    (tmp_path / "out/train-000001.tar").unlink()

    def note(number: int, *rest: Any) -> Any:
        built.append(number)
        return real(number, *rest)

    monkeypatch.setattr(packing, "_build", note)
    built.clear()
    _pack("pairs", tmp_path / "in", tmp_path / "out", *more)
    assert built == [1, 2], "finished shards are not built again"
    assert _digests(tmp_path / "out") == _digests(tmp_path / "whole")
    built.clear()
    _pack("pairs", tmp_path / "in", tmp_path / "out", *more)
    assert built == []


def _children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")
def test_a_killed_run_leaves_no_process_and_goes_on_to_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(16):
        save(tmp_path / f"in/image/i{number:02d}.jpg", picture(number, 1000, 750), quality=95)
        save(tmp_path / f"in/alpha/i{number:02d}.png", alpha(number, 1000, 750))
    more = ["--dataset", "d", "--max-samples", "2"]
    _pack("pairs", tmp_path / "in", tmp_path / "whole", *more)
    command = ["pairs", str(tmp_path / "in"), str(tmp_path / "out"), *more, "--workers", "2"]
    process = subprocess.Popen([sys.executable, ROOT / "tools/make_shards.py", *command])
    end = time.monotonic() + 100
    while len(list((tmp_path / "out").glob(".train.progress/0*.json"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.005)
    workers = _children(process.pid)
    assert workers
    process.kill()
    process.wait()
    assert not (tmp_path / "out/train.index.json").exists()
    while any(map(_alive, workers)):
        assert time.monotonic() < end, "a worker outlives its parent"
        time.sleep(0.05)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.tar")}
    assert 2 <= len(sizes) <= 8
    for name, size in sizes.items():
        assert size == (tmp_path / "whole" / name).stat().st_size, "a half shard has its final name"
    capsys.readouterr()
    _pack("pairs", tmp_path / "in", tmp_path / "out", *more)
    reused = int(capsys.readouterr().out.split(" of them from an earlier run")[0].rpartition("(")[2])
    assert 2 <= reused <= len(sizes)
    assert _digests(tmp_path / "out") == _digests(tmp_path / "whole")


def test_shards_of_other_files_or_options_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _folder(tmp_path / "in")
    base = ["pairs", tmp_path / "in", tmp_path / "out", "--dataset", "d"]
    _pack(*base)
    assert "made from other files or options" in _fails(capsys, 2, *base, "--max-samples", "2")
    _pack(*base, "--max-samples", "2", "--overwrite")
    _pack(*base, "--overwrite")
    assert sorted(_digests(tmp_path / "out")) == ["train-000000.tar", "train.index.json"]


def test_bad_files_are_named_and_end_the_run_unless_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _folder(tmp_path / "in")
    image = tmp_path / "in/image/i1.jpg"
    good = image.read_bytes()
    image.write_bytes(good[:-60])
    save(tmp_path / "in/alpha/i3.png", np.zeros((24, 32), np.uint8))
    (tmp_path / "in/alpha/i4.png").write_bytes(b"")
    base = ["pairs", tmp_path / "in", tmp_path / "out", "--dataset", "d", "--max-samples", "2"]
    error = _fails(capsys, 1, *base)
    assert "bad: i1: image/i1.jpg: its JPEG is damaged" in error
    assert "bad: i3: alpha/i3.png: the alpha is empty" in error
    assert "bad: i4: alpha/i4.png: " in error
    assert "3 images cannot be used (0 allowed)" in error
    assert not (tmp_path / "out/train.index.json").exists()
    assert "(2 allowed)" in _fails(capsys, 1, *base, "--skip-bad", "2")
    _pack(*base, "--skip-bad", "3")
    assert list(_read(tmp_path / "out", "train")) == ["i0", "i2", "i5"]
    index = json.loads((tmp_path / "out/train.index.json").read_text())
    assert [line.split(":")[0] for line in index["skipped"]] == ["i1", "i3", "i4"]


def test_a_file_put_right_is_taken_up_by_the_next_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _folder(tmp_path / "in")
    base = ["pairs", tmp_path / "in", tmp_path / "out", "--dataset", "d", "--max-samples", "2"]
    matte = tmp_path / "in/alpha/i3.png"
    good = matte.read_bytes()
    matte.write_bytes(bytes(len(good)))
    _fails(capsys, 1, *base)
    matte.write_bytes(good)
    _pack(*base)
    assert "(2 of them from an earlier run)" in capsys.readouterr().out
    assert len(_read(tmp_path / "out", "train")) == 6


def test_two_files_that_would_share_a_key_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.b", "a_b"):
        save(tmp_path / f"in/image/{name}.png", picture(1))
        save(tmp_path / f"in/alpha/{name}.png", alpha(1))
    error = _fails(capsys, 2, "pairs", tmp_path / "in", tmp_path / "out", "--dataset", "d")
    assert "would share a sample key, the first is 'a_b'" in error


def test_a_release_that_is_not_there_is_told_with_where_it_was_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for name, message in (
        ("refmatte", "'refmatte_train_label.json'"),
        ("p3m10k", "no folder 'train/blurred_image'"),
        ("am2k", "no folder 'train/original'"),
        ("refcoco", "no 'instances.json'"),
    ):
        assert message in _fails(capsys, 2, name, tmp_path / "in", tmp_path / "out")
        assert "does not exist" in _fails(capsys, 2, name, tmp_path / "none", tmp_path / "out") or name == "refcoco"


def test_examples_in_the_docstrings_are_true() -> None:
    found = doctest.testmod(refmatte_release)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.slow
def test_real_photographs_with_expressions_are_packed_by_their_lists(shared_data: Path, tmp_path: Path) -> None:
    for name in ("real_alpha", "ref_masks", "refmatte_composites"):
        folder = shared_data / name
        _pack("pairs", folder, tmp_path / name, "--dataset", name, "--split", "test", "--index", folder / "index.json")
        entries = json.loads((folder / "index.json").read_text())
        samples = _read(tmp_path / name, "test")
        instances = [instance for sample in samples.values() for instance in sample.instances]
        assert sorted(instance.id for instance in instances) == sorted(entry["id"] for entry in entries)
        assert sum(len(i.phrases) for i in instances) == sum(len(entry["expressions"]) for entry in entries)
        assert {i.kind for i in instances} == ({"mask"} if name == "ref_masks" else {"alpha"})


def test_fields_that_the_published_references_do_not_have_are_kept_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refcoco(tmp_path / "in")
    folder = tmp_path / "in/refcoco"
    references = pickle.loads((folder / "refs(unc).p").read_bytes())
    references[0]["difficulty"] = "hard"
    del references[1]["sent_ids"]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(references, protocol=2))
    coco = json.loads((folder / "instances.json").read_text())
    coco["annotations"][0]["depth"] = 3
    (folder / "instances.json").write_text(json.dumps(coco))
    _pack("refcoco", tmp_path / "in", tmp_path / "out", "--splits", "train")
    (sample,) = _read(tmp_path / "out", "train").values()
    assert sample.instances[0].fields["release"] == {"depth": 3, "difficulty": "hard"}
    assert "release" not in sample.instances[1].fields
    said = capsys.readouterr().out
    assert "difficulty: not a published field, in 1 of 2 (kept as release.difficulty)" in said
    assert "sent_ids: missing in 1 of 2" in said


@pytest.mark.parametrize(
    ("release", "file", "text", "message"),
    [
        ("refmatte", "RefMatte/RefMatte/train/refmatte_train_label.json", "{", "is not valid JSON"),
        ("refmatte", "RefMatte/RefMatte/train/refmatte_train_label.json", "[1]", "must be a JSON object, got a list"),
        ("refmatte", "RefMatte/RefMatte/train/refmatte_train_label.json", '{"a_1": "x"}', "entry 'a_1' must be an obj"),
        ("refcoco", "refcoco/instances.json", "{", "is not valid JSON"),
        ("refcoco", "refcoco/instances.json", "{}", "must be an object with `images` and `annotations`"),
        ("refcoco", "refcoco/refs(unc).p", "(lp0\n(dp1\nS'sentences'\n(lp2\nsa.", "reference 0 has no `ref_id`"),
    ],
)
def test_annotations_of_another_form_are_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], release: str, file: str, text: str, message: str
) -> None:
    {"refmatte": refmatte, "refcoco": refcoco}[release](tmp_path / "in")
    (tmp_path / "in" / file).write_text(text)
    error = _fails(capsys, 2, release, tmp_path / "in", tmp_path / "out", "--splits", "train")
    assert message in error
    assert error.count("\n") == 1
