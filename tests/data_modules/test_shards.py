"""The shard format: same bytes for same input, whole or not at all, any sample by its offset."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_modules import tar
from data_modules.shards import (
    InstanceEntry,
    SampleError,
    ShardIndex,
    ShardWriter,
    describe_shard,
    expand_braces,
    is_url,
)
from lit_matting.checks import InputError

Pictures = Callable[..., Path]
GREY = np.full((4, 6), 128, np.uint8)
RGB = np.zeros((4, 6, 3), np.uint8)


def test_every_sample_is_what_python_tarfile_finds_at_its_offset(pictures: Pictures) -> None:
    index = ShardIndex.load(pictures("a", 12))
    assert [info.samples for info in index.shards] == [5, 5, 2]
    for number, sample in enumerate(index):
        shard, position = index.where(number)
        with open(index.paths[shard], "rb") as file:
            file.seek(int(index.shards[shard].offsets[position]))
            with tarfile.open(fileobj=file) as archive:
                names = [archive.next().name for _ in range(len(sample.members))]  # type: ignore[union-attr]
        assert names == [f"{sample.key}.{name}" for name in ("json", "png", "0.alpha.png", "1.alpha.png")]
        with tarfile.open(index.paths[shard]) as archive:
            for name, content in sample.members.items():
                assert archive.extractfile(f"{sample.key}.{name}").read() == bytes(content)  # type: ignore[union-attr]


def test_webdataset_reads_the_shards(pictures: Pictures) -> None:
    import webdataset

    path = pictures("a", 7)
    shards = sorted(str(shard) for shard in path.parent.glob("*.tar"))
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [f"{number:06d}" for number in range(7)]
    assert {"json", "png", "0.alpha.png", "1.alpha.png"} <= set(found[0])


def test_same_input_gives_the_same_bytes(tmp_path: Path, pictures: Pictures) -> None:
    first, second = pictures("a", 6), None
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(first.parent.iterdir())]
    moved = tmp_path / "moved"
    os.rename(first.parent, moved)
    os.utime(moved, (1, 1))
    second = pictures("a", 6)
    assert digests == [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(second.parent.iterdir())]


def test_index_agrees_with_the_files(pictures: Pictures) -> None:
    path = pictures("a", 12)
    index = json.loads(path.read_text())
    assert (index["format"], index["samples"], index["instances"]) == ("lit_matting.shards/1", 12, 24)
    for entry in index["shards"]:
        data = (path.parent / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert describe_shard(path.parent / entry["file"]).to_json() == entry


def test_shards_keep_below_their_bytes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_bytes=20_000, tool="t") as writer:
        for number in range(20):
            image = np.random.default_rng(number).integers(0, 255, (30, 30, 3), dtype=np.uint8)
            writer.write(f"{number}", image, "png", [InstanceEntry("0", image[..., 0])])
    sizes = [path.stat().st_size for path in tmp_path.glob("*.tar")]
    assert len(sizes) > 3
    assert max(sizes) <= 20_000 + len(tar.END_OF_ARCHIVE)


def _write(folder: Path, *samples: tuple[str, InstanceEntry], stop: bool = False) -> None:
    with ShardWriter(folder, max_samples=2, tool="t") as writer:
        for key, entry in samples:
            writer.write(key, RGB, "png", [entry])
        if stop:
            raise KeyboardInterrupt


def test_interrupted_writer_leaves_no_index_and_no_half_shard(tmp_path: Path) -> None:
    good = InstanceEntry("0", GREY)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path, ("a", good), ("b", good), ("c", good), stop=True)
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (InstanceEntry("k", np.zeros((4, 5), np.uint8)), "instance 'k': alpha is 5x4 but the image is 6x4"),
        (InstanceEntry("k", GREY, "mask"), "a mask must hold only 0 and 255"),
        (InstanceEntry("k", GREY / 255), "multiply an alpha in"),
        (InstanceEntry("k", GREY, phrases=[("...", "basic")]), "has no words"),
        (InstanceEntry("k", GREY, extra={"kind": 1}), "extra field 'kind'"),
        (InstanceEntry("k", b"no png"), "cannot be read as an image"),
    ],
)
def test_writer_says_what_is_wrong_with_an_instance(tmp_path: Path, entry: InstanceEntry, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _write(tmp_path, ("good", InstanceEntry("0", GREY)), ("bad", entry))
    assert not list(tmp_path.glob("*.index.json"))


@pytest.mark.parametrize("key", ["a.b", "a/b", "a b", ""])
def test_keys_hold_no_dot_slash_or_blank(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match="no dot, slash or blank"):
        _write(tmp_path, (key, InstanceEntry("0", GREY)))


def test_key_written_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="written before"):
        _write(tmp_path, ("a", InstanceEntry("0", GREY)), ("a", InstanceEntry("0", GREY)))


def test_size_of_a_turned_photograph_is_the_size_it_is_shown_in(tmp_path: Path) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(file, "jpeg", exif=exif)
    with ShardWriter(tmp_path, tool="t") as writer:
        writer.write("a", file.getvalue(), "jpg", [InstanceEntry("0", np.ones((6, 4), np.uint8))])
    meta = ShardIndex.load(tmp_path).read(0).meta
    assert (meta["width"], meta["height"]) == (4, 6)


def test_optional_members_and_extra_fields_come_back(tmp_path: Path) -> None:
    colours = np.full((4, 6, 3), (10, 20, 30), np.uint8)
    with ShardWriter(tmp_path, tool="t") as writer:
        entry = InstanceEntry("0", GREY.astype(np.uint16) * 257, foreground=colours, extra={"ref_id": 7})
        writer.write("a", RGB, "png", [entry], extra={"source": {"sha1": "x"}, "note": "ü"}, background=b"jpeg")
    sample = ShardIndex.load(tmp_path).read(0)
    assert (sample.meta["note"], sample.meta["source"]) == ("ü", {"sha1": "x"})
    assert sample.instances[0].fields["ref_id"] == 7
    assert bytes(sample.member("background.jpg")) == b"jpeg"
    foreground = cv2.imdecode(np.frombuffer(sample.member("0.foreground.png"), np.uint8), cv2.IMREAD_COLOR)
    assert (foreground[..., ::-1] == colours).all()
    target = cv2.imdecode(np.frombuffer(sample.member("0.alpha.png"), np.uint8), cv2.IMREAD_UNCHANGED)
    assert target.dtype == np.uint16
    assert (target == 128 * 257).all()


def test_index_file_folder_glob_braces_and_lists_name_the_same_samples(pictures: Pictures) -> None:
    path = pictures("a", 12)
    keys = [sample.key for sample in ShardIndex.load(path)]
    folder = path.parent
    for given in (folder, f"{folder}/*.tar", f"{folder}/a-{{000000..000002}}.tar", [f"{folder}/a.index.json"]):
        assert [sample.key for sample in ShardIndex.load(given)] == keys  # type: ignore[arg-type]
    assert [sample.key for sample in ShardIndex.load(f"{folder}/a-000001.tar")] == keys[5:10]
    os.remove(path)
    assert [sample.key for sample in ShardIndex.load(f"{folder}/*.tar")] == keys
    os.rename(folder / "a-000001.tar", folder / "alone.tar")
    assert [sample.key for sample in ShardIndex.load(folder / "alone.tar")] == keys[5:10]


def test_two_indexes_in_one_folder_must_be_told_apart(tmp_path: Path, pictures: Pictures) -> None:
    path = pictures("a", 1)
    (path.parent / "b.index.json").write_text(path.read_text())
    with pytest.raises(InputError, match=r"a.index.json, b.index.json"):
        ShardIndex.load(path.parent)


def test_shard_cut_short_or_missing_is_known_when_the_index_is_opened(pictures: Pictures) -> None:
    path = pictures("a", 12)
    shard = path.parent / "a-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1000])
    with pytest.raises(InputError, match=r"a-000001.tar' has \d+ bytes but its index says \d+"):
        ShardIndex.load(path)
    shard.unlink()
    with pytest.raises(InputError, match=r"a-000001.tar' is in the index but does not exist"):
        ShardIndex.load(path)
    shard.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    ShardIndex.load(path)
    with pytest.raises(InputError, match=r"a-000001.tar' does not match the checksum"):
        ShardIndex.load(path, verify=True)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.index.json"
    path.write_text(json.dumps({"format": "other/2", "shards": []}))
    with pytest.raises(InputError, match=r"format 'other/2', expected 'lit_matting.shards/1'"):
        ShardIndex.load(path)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        ShardIndex.load(path)
    with pytest.raises(InputError, match=r"no shards found at .*none.index.json"):
        ShardIndex.load(tmp_path / "none.index.json")
    with pytest.raises(InputError, match="no shards found"):
        ShardIndex.load(str(tmp_path / "*.tar"))


def test_damaged_header_inside_a_shard_names_shard_and_sample(pictures: Pictures) -> None:
    path = pictures("a", 5)
    shard = path.parent / "a-000000.tar"
    index = ShardIndex.load(path)
    data = bytearray(shard.read_bytes())
    start = int(index.shards[0].offsets[2])
    data[start : start + 100] = b"x" * 100
    shard.write_bytes(data)
    with pytest.raises(SampleError, match=r"shard 'a-000000.tar'.*checksum"):
        index.read(2)
    assert index.read(3).key == "000003"


def test_header_alone_tells_the_phrases(pictures: Pictures) -> None:
    index = ShardIndex.load(pictures("a", 6))
    for number in range(6):
        assert index.read_header(number).instances == index.read(number).instances


def test_long_names_are_read_back(tmp_path: Path) -> None:
    key = "k" * 150
    with ShardWriter(tmp_path, tool="t") as writer:
        writer.write(key, RGB, "png", [InstanceEntry("0", GREY)])
        writer.write("next", RGB, "png", [InstanceEntry("0", GREY)])
    index = ShardIndex.load(tmp_path)
    assert [sample.key for sample in index] == [key, "next"]
    assert index.read_header(0).key == key


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_members_agree_with_python_tarfile(tmp_path: Path, style: int) -> None:
    files = {
        "a.txt": b"1",
        "folder/" + "n" * 90 + ".txt": b"22",
        "ü.txt" if style != tarfile.USTAR_FORMAT else "u": b"",
    }
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=style) as archive:
        archive.addfile(_directory("folder"))
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert {name: bytes(content) for name, content, _ in tar.members(path.read_bytes())} == files


def _directory(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def test_urls_are_told_from_paths() -> None:
    assert is_url("s3://bucket/x.tar")
    assert is_url("pipe:cat x.tar")
    assert not is_url("/data/x.tar")
    assert not is_url("C/x.tar")
    assert expand_braces("x-{a,b}.tar") == ["x-a.tar", "x-b.tar"]
