"""The stream without a trainer: what batches hold, bad samples, captions, and what a worker imports."""

from __future__ import annotations

import json
import logging
import pickle
import resource
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from data_modules import Augmentation, BenchmarkSource, InterleavedDataModule, InterleavedSchedule, ShardSource
from data_modules.shards import (
    InstanceEntry,
    SampleError,
    ShardFile,
    ShardIndex,
    ShardWriter,
    sample_members,
    write_index,
)
from data_modules.stream import unpacked
from lit_matting.checks import InputError
from lit_matting.records import MattingBatch

Pictures = Callable[..., Path]
Picture = Callable[..., tuple[np.ndarray, list[np.ndarray]]]
ROOT = Path(__file__).resolve().parents[2]


def stream(count: int, train: dict[str, ShardSource], **settings: Any) -> list[MattingBatch]:
    """The first batches of a fresh stream."""
    module = InterleavedDataModule(train, image_size=24, epoch_iterations=count, **settings)
    module.setup("fit")
    return list(module.train_dataloader())


def test_batches_hold_the_pictures_and_alphas_that_their_keys_name(pictures: Pictures, picture: Picture) -> None:
    path = pictures("a", 11)
    batches = stream(4, {"a": ShardSource(str(path), batch_size=6, phrases_per_image=2)})
    for number, batch in enumerate(batches):
        assert (batch.dataset, batch.iteration, len(batch)) == ("a", number, 6)
        assert batch.image.is_contiguous()
        assert batch.keys[::2] == batch.keys[1::2]
        assert (batch.instance[::2] != batch.instance[1::2]).all()
        for row, key in enumerate(batch.keys):
            dataset, shard, sample = key.split("/")
            image, alphas = picture(int(sample))
            assert (dataset, shard) == ("a", f"a-{int(sample) // 5:06d}")
            assert torch.equal((batch.image[row] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(image))
            instance = int(batch.instance[row])
            assert torch.equal((batch.target[row, 0] * 255).round().byte(), torch.from_numpy(alphas[instance]))
            assert batch.prompts[row].endswith(f"{int(sample)} {instance}")
            assert batch.categories[row] == "stripe"
        assert batch.has_alpha.all()


def test_batch_says_how_many_rows_hold_the_same_image(pictures: Pictures) -> None:
    path = str(pictures("a", 11))
    (two,) = stream(1, {"a": ShardSource(path, batch_size=6, phrases_per_image=2)})
    assert two.phrases_per_image == 2
    assert torch.equal(two.image[::2], two.image[1::2])
    # five rows of two, two and one: no step fits them all
    (uneven,) = stream(1, {"a": ShardSource(path, batch_size=5, phrases_per_image=2)})
    assert uneven.phrases_per_image == 1


def test_one_epoch_shows_every_image_once_before_any_is_shown_again(pictures: Pictures) -> None:
    path = pictures("a", 12)
    batches = stream(6, {"a": ShardSource(str(path), batch_size=4)})
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys[:12])) == len(set(keys[12:])) == 12
    assert keys[:12] != keys[12:]


def test_eight_bit_batches_unpack_to_the_same_floats_on_every_path(tmp_path: Path, picture: Picture) -> None:
    with ShardWriter(tmp_path, prefix="w", tool="t") as writer:
        for number in range(4):
            image, alphas = picture(number)
            wide = alphas[1].astype(np.uint16) * 257
            entries = [InstanceEntry(f"{k}", a, phrases=[("it", "")]) for k, a in enumerate((alphas[0], wide))]
            writer.write(f"{number}", image, "png", entries)
    module = InterleavedDataModule({"w": ShardSource(str(tmp_path))}, image_size=24, epoch_iterations=1, detail_size=8)
    module.setup("fit")
    packed, _ = module.train_dataloader().batches[0, 0]
    (floats,) = module.train_dataloader()
    assert isinstance(packed, MattingBatch)
    assert packed.image.dtype == torch.uint8
    assert torch.equal(packed.image.permute(0, 3, 1, 2).float() / 255, floats.image)
    again = unpacked(floats)
    assert torch.equal(again.image, floats.image)
    for row, key in enumerate(floats.keys):
        alpha = picture(int(key[-1]))[1][int(floats.instance[row])]
        assert (floats.target[row, 0] - torch.from_numpy(alpha) / 255).abs().max() < 1e-6
    assert floats.detail is not None
    assert floats.detail.image.dtype == floats.detail.target.dtype == torch.float32


def test_masks_are_marked_as_having_no_alpha(pictures: Pictures) -> None:
    batch = stream(1, {"m": ShardSource(str(pictures("m", 4, kind="mask")), batch_size=4)})[0]
    assert not batch.has_alpha.any()
    assert set(batch.target.unique().tolist()) == {0.0, 1.0}


def test_warm_up_is_a_function_of_the_iteration(pictures: Pictures) -> None:
    source = ShardSource(str(pictures("a", 9)), batch_size=8, warmup_iterations=3, warmup_kinds=["colour"])
    batches = stream(8, {"a": source})
    assert [set(batch.prompt_kinds) == {"colour"} for batch in batches] == [True] * 3 + [False] * 5


def test_data_sets_of_another_seed_come_in_another_order_and_the_same_seed_in_the_same(pictures: Pictures) -> None:
    path = str(pictures("a", 30))
    first, again, other = (
        stream(3, {"a": ShardSource(path, batch_size=8)}, seed=seed, augment=Augmentation()) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a.image, b.image) and a.prompts == b.prompts for a, b in zip(first, again))
    assert [batch.keys for batch in first] != [batch.keys for batch in other]


def test_two_loaders_in_a_row_go_on_where_the_first_stopped(pictures: Pictures) -> None:
    path = str(pictures("a", 9))
    expected = [batch.keys for batch in stream(6, {"a": ShardSource(path, batch_size=4)})]
    module = InterleavedDataModule({"a": ShardSource(path, batch_size=4)}, image_size=24, epoch_iterations=3)
    module.setup("fit")
    loader = module.train_dataloader()
    assert [batch.keys for batch in loader] + [batch.keys for batch in loader] == expected
    state = module.state_dict()
    assert (state["iteration"], state["used"]) == (6, {"a": 24})
    assert json.loads(json.dumps(state)) == state


def test_captions_and_templates_call_what_has_no_phrases(pictures: Pictures, tmp_path: Path) -> None:
    path = pictures("a", 6, phrases=lambda number, instance: [])
    captions = tmp_path / "captions.jsonl"
    captions.write_text(
        "".join(
            json.dumps({"key": f"{number:06d}", "instance": "i1", "text": f"caption of {number}", "model": "m"}) + "\n"
            for number in range(6)
        )
    )
    source = ShardSource(str(path), batch_size=16, captions=str(captions), templates=["the {category}"])
    batches = stream(10, {"a": source})
    for batch in batches:
        for key, instance, prompt, kind in zip(batch.keys, batch.instance.tolist(), batch.prompts, batch.prompt_kinds):
            caption = (f"caption of {int(key[-6:])}", "caption")
            assert (prompt, kind) in ([("the stripe", "template")] + ([caption] if instance == 1 else []))
    assert {kind for batch in batches for kind in batch.prompt_kinds} == {"caption", "template"}
    captions.write_text('{"key": "a"}\n')
    with pytest.raises(InputError, match="line 1"):
        stream(1, {"a": source})
    captions.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no text in UTF-8"):
        stream(1, {"a": source})
    captions.unlink()
    with pytest.raises(
        InputError, match=r"cannot be read: No such file.*tools/caption\.py, or set .* `captions` to null"
    ):
        stream(1, {"a": source})


@pytest.mark.parametrize(
    ("own", "captioned", "share", "warned"),
    [
        (False, None, 0.3, True),
        (False, "000017", 0.3, False),
        (False, "of other shards", 0.3, True),
        (True, None, 0.3, False),
        (False, None, 1.0, False),  # only templates are wanted
        (False, None, 0.0, False),  # templates for what has no phrases, as documented
    ],
)
def test_template_share_of_a_data_set_without_any_phrases_is_warned_about(
    own: bool,
    captioned: str | None,
    share: float,
    warned: bool,
    pictures: Pictures,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = pictures("a", 23, phrases=lambda number, instance: [("it", "basic")] if own and number == 9 else [])
    captions = tmp_path / "captions.jsonl"
    captions.write_text(json.dumps({"key": captioned, "instance": "i1", "text": "a caption"}) + "\n")
    given = None if captioned is None else str(captions)
    source = ShardSource(str(path), templates=["the thing"], template_probability=share, captions=given)
    InterleavedDataModule({"a": source}, image_size=24).setup("fit")
    assert [record.message for record in caplog.records] == warned * [
        "Data set 'a' has no phrases of its own, so every one will be a template, not 30 %: caption it"
        " (tools/caption.py) and name the file in its `captions`, or set `template_probability` to 1."
    ]


def test_data_set_without_any_allowed_phrase_says_which_kinds_were_asked_for(pictures: Pictures) -> None:
    path = str(pictures("a", 3))
    with pytest.raises(InputError, match=r"'a' has no phrase of kind caption in .* change `phrase_kinds`"):
        stream(1, {"a": ShardSource(path, phrase_kinds=["caption"])})


def test_instances_are_put_onto_other_backgrounds_by_the_matting_equation(tmp_path: Path, picture: Picture) -> None:
    colours = np.full((24, 24, 3), (250, 10, 10), np.uint8)
    with ShardWriter(tmp_path / "f", prefix="f", tool="t") as writer:
        for number in range(3):
            image, alphas = picture(number)
            entries = [
                InstanceEntry(f"{k}", alpha, phrases=[(f"no {k}", "basic")], foreground=colours)
                for k, alpha in enumerate(alphas)
            ]
            writer.write(f"{number}", image, "png", entries)
    cv2.imwrite(str(tmp_path / "green.png"), np.full((30, 50, 3), (0, 200, 0), np.uint8))
    source = ShardSource(str(tmp_path / "f"), batch_size=4, backgrounds=str(tmp_path / "*.png"), load_foreground=True)
    still = Augmentation(0, flip_probability=0, brightness=0, contrast=0, saturation=0, hue=0, recompose_probability=1)
    batch = stream(1, {"f": source}, augment=still)[0]
    alpha = torch.from_numpy(sum(a.astype(float) for a in picture(0)[1]) / 255)
    expected = torch.stack([alpha * c / 255 + (1 - alpha) * b / 255 for c, b in ((250, 0), (10, 200), (10, 0))])
    assert (batch.image - expected).abs().max() < 1.01 / 255
    assert batch.foreground is not None
    assert torch.allclose(batch.foreground[0, :, 0, 0], torch.tensor([250, 10, 10]) / 255)


def test_new_backgrounds_are_drawn_again_the_same(tmp_path: Path, picture: Picture) -> None:
    with ShardWriter(tmp_path / "f", prefix="f", tool="t") as writer:
        for number in range(6):
            image, alphas = picture(number)
            colours = np.full((24, 24, 3), 40 * number, np.uint8)
            entries = [InstanceEntry(f"{k}", a, phrases=[("it", "")], foreground=colours) for k, a in enumerate(alphas)]
            writer.write(f"{number}", image, "png", entries)
    for number in range(5):
        cv2.imwrite(str(tmp_path / f"b{number}.png"), picture(100 + number, size=40)[0])
    source = ShardSource(str(tmp_path / "f"), batch_size=6, backgrounds=str(tmp_path / "*.png"))
    runs = [stream(4, {"f": source}, augment=Augmentation(), num_workers=workers) for workers in (0, 1)]
    plain = stream(4, {"f": ShardSource(str(tmp_path / "f"), batch_size=6)}, augment=Augmentation())
    for first, second in zip(*runs):
        assert torch.equal(first.image, second.image)
        assert torch.equal(first.target, second.target)
    assert not all(torch.equal(one.image, other.image) for one, other in zip(runs[0], plain))


def test_missing_data_sets_are_left_out_or_refused(pictures: Pictures, caplog: pytest.LogCaptureFixture) -> None:
    train = {"a": ShardSource(str(pictures("a", 3))), "b": ShardSource("/nowhere/train.index.json")}
    schedule = InterleavedSchedule(["a", "b"], 4, ["c"])
    with caplog.at_level(logging.WARNING):
        assert {batch.dataset for batch in stream(4, train, schedule=schedule)} == {"a"}
    assert "/nowhere/train.index.json" in caplog.text
    assert "'c' is in `data.schedule` but not in `data.train`" in caplog.text
    with pytest.raises(InputError, match="/nowhere"):
        stream(4, train, schedule=schedule, missing_datasets="raise")


# bad samples --------------------------------------------------------------------------------------------------------


def _damage(files: list[tuple[str, bytes]], kind: str) -> list[tuple[str, bytes]]:
    header = json.loads(files[0][1])
    if kind == "missing image":
        return [item for item in files if not item[0].endswith(".jpg")]
    if kind == "missing alpha":
        return [item for item in files if not item[0].endswith("alpha.png")]
    if kind == "cut JPEG":
        return [(name, data[: len(data) // 2] if name.endswith(".jpg") else data) for name, data in files]
    if kind == "no JPEG":
        return [(name, b"\xff\xd8 what is this" if name.endswith(".jpg") else data) for name, data in files]
    if kind == "zero-size PNG":
        return [(name, ZERO_SIZE_PNG if name.endswith(".png") else data) for name, data in files]
    if kind == "zero-size JPEG":
        return [(name, _of_height_zero(data) if name.endswith(".jpg") else data) for name, data in files]
    if kind == "empty image":
        return [(name, b"" if name.endswith(".jpg") else data) for name, data in files]
    if kind == "cut PNG":
        return [(name, data[:-30] if name.endswith(".png") else data) for name, data in files]
    if kind == "broken PNG":
        return [(name, _flipped(data) if name.endswith(".png") else data) for name, data in files]
    if kind in ("other size", "empty alpha"):
        shape = (12, 24) if kind == "other size" else (24, 24)
        png = cv2.imencode(".png", np.full(shape, 0 if kind == "empty alpha" else 9, np.uint8))[1].tobytes()
        return [(name, png if name.endswith(".png") else data) for name, data in files]
    if kind == "empty phrase":
        header["instances"][0]["phrases"][0]["text"] = " ... "
    if kind == "NaN":
        header["instances"][0]["coverage"] = float("nan")
    if kind == "no instances":
        header["instances"] = []
    if kind == "missing field":
        del header["instances"][0]["target"]
    text = b"{" if kind == "broken JSON" else json.dumps(header).encode()
    return [(files[0][0], text), *files[1:]]


ZERO_SIZE_PNG = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    + bytes(8)
    + b"\x08\0\0\0\0"
    + zlib.crc32(b"IHDR" + bytes(8) + b"\x08\0\0\0\0").to_bytes(4, "big")
    + b"\0\0\0\0IEND\xaeB`\x82"
)


def _of_height_zero(jpeg: bytes) -> bytes:
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + b"\0\0" + jpeg[frame + 7 :]


def _flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :]


BAD = {
    "missing image": "it has no image",
    "missing alpha": "member '0.alpha.png' is missing",
    "cut JPEG": "image 'jpg': its JPEG is damaged",
    "no JPEG": "image 'jpg': its JPEG is damaged",
    "zero-size PNG": "alpha '0.alpha.png': it is not a readable image",
    "zero-size JPEG": "image 'jpg': its JPEG is damaged",
    "empty image": r"image 'jpg': it is not a readable image \(0 bytes\)",
    "cut PNG": "alpha '0.alpha.png': its PNG is cut short",
    "broken PNG": "alpha '0.alpha.png': it is not a readable image",
    "other size": "alpha of instance 'k' is 24x12 but the image is 24x24",
    "empty alpha": "alpha of instance 'k' is empty",
    "empty phrase": ".*a phrase of instance 'k' has no words",
    "NaN": ".*NaN is no number",
    "no instances": "it has no instances",
    "missing field": "'target' is missing",
    "broken JSON": "its JSON cannot be used",
}


@pytest.fixture
def with_bad(tmp_path: Path, picture: Picture) -> Callable[[str, int], str]:
    """Writes 40 samples, some of which are bad in one way, and returns their folder."""

    def write(kind: str, bad: int) -> str:
        file = ShardFile(tmp_path / "bad" / "bad-000000.tar")
        for number in range(40):
            image, alphas = picture(number, instances=1)
            entry = InstanceEntry("k", alphas[0], phrases=[("the stripe", "basic")])
            files = sample_members(f"{number:02d}", image, "jpg", [entry])
            file.write(_damage(files, kind) if number < bad else files)
        write_index(tmp_path / "bad", "bad", "bad", "train", "t", [file.close()])
        return str(tmp_path / "bad")

    return write


@pytest.mark.parametrize("kind", BAD)
def test_bad_sample_is_named_or_skipped_and_counted(
    with_bad: Callable[[str, int], str], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = ShardSource(with_bad(kind, 1), batch_size=10)
    with pytest.raises(SampleError, match=f"shard 'bad-000000.tar', sample '00': {BAD[kind]}"):
        stream(4, {"bad": source})
    with caplog.at_level(logging.WARNING):
        first, second = (stream(4, {"bad": source}, on_bad_sample="skip", max_bad_fraction=0.5) for _ in range(2))
    assert all("/00" not in key for batch in first for key in batch.keys)
    assert [batch.keys for batch in first] == [batch.keys for batch in second]
    assert caplog.text.count("Replaced a bad sample (1 so far)") == 2


def test_too_many_bad_samples_stop_the_run(with_bad: Callable[[str, int], str]) -> None:
    source = ShardSource(with_bad("cut JPEG", 10), batch_size=10)
    with pytest.raises(SampleError, match=r"bad samples among \d+ are more than `data.max_bad_fraction` = 0.05"):
        stream(50, {"bad": source}, on_bad_sample="skip", max_bad_fraction=0.05)
    assert len(stream(50, {"bad": source}, on_bad_sample="skip", max_bad_fraction=0.9)) == 50


def test_data_set_of_bad_samples_only_ends_with_an_error(with_bad: Callable[[str, int], str]) -> None:
    source = ShardSource(with_bad("cut JPEG", 40), batch_size=10)
    with pytest.raises(SampleError, match="samples in a row cannot be used"):
        stream(1, {"bad": source}, on_bad_sample="skip")


def test_error_of_a_worker_arrives_as_one_sentence(with_bad: Callable[[str, int], str]) -> None:
    source = ShardSource(with_bad("cut JPEG", 40), batch_size=10)
    with pytest.raises(
        SampleError, match=r"^shard 'bad-000000.tar', sample '\d\d': image 'jpg': its JPEG is damaged [^\n]*$"
    ):
        stream(1, {"bad": source}, num_workers=2)


def test_shard_cut_short_while_training_is_named(with_bad: Callable[[str, int], str]) -> None:
    folder = with_bad("none", 0)
    module = InterleavedDataModule({"bad": ShardSource(folder, batch_size=10)}, image_size=24, epoch_iterations=4)
    module.setup("fit")
    shard = Path(folder) / "bad-000000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])
    with pytest.raises(SampleError, match=r"shard 'bad-000000.tar'.*(ends inside|nothing at byte)"):
        list(module.train_dataloader())


def test_shard_that_disappears_while_training_is_named_at_once(with_bad: Callable[[str, int], str]) -> None:
    folder = with_bad("none", 0)
    module = InterleavedDataModule({"bad": ShardSource(folder, batch_size=10)}, image_size=24, epoch_iterations=4)
    module.setup("fit")
    (Path(folder) / "bad-000000.tar").unlink()
    with pytest.raises(InputError, match=r"bad-000000.tar' was there when its index was opened and is gone now"):
        list(module.train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_sample_of_a_benchmark_stops_it_with_one_sentence(
    with_bad: Callable[[str, int], str], workers: int
) -> None:
    folder = with_bad("cut JPEG", 1)
    module = InterleavedDataModule(val={"v": BenchmarkSource(folder)}, image_size=24, num_workers=workers)
    module.setup("validate")
    with pytest.raises(
        SampleError, match=r"^shard 'bad-000000.tar', sample '00': image 'jpg': its JPEG is damaged [^\n]*$"
    ):
        list(module.val_dataloader()[0])


# workers and memory -------------------------------------------------------------------------------------------------


def test_spawned_worker_imports_neither_model_nor_lightning(pictures: Pictures, tmp_path: Path) -> None:
    module = InterleavedDataModule({"a": ShardSource(str(pictures("a", 3)), batch_size=2)}, image_size=24)
    module.setup("fit")
    (tmp_path / "dataset.pickle").write_bytes(pickle.dumps(module.train_dataloader().batches))
    code = (
        "import pickle, sys; batches = pickle.load(open(sys.argv[1], 'rb')); print(len(batches[0, 0][0]));"
        "print([name for name in ('lightning', 'diffusers', 'transformers', 'torchvision') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "dataset.pickle")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split("\n")[:2] == ["2", "[]"]


@pytest.mark.slow
def test_memory_stays_flat_over_many_samples(pictures: Pictures) -> None:
    path = str(pictures("a", 200))
    module = InterleavedDataModule(
        {"a": ShardSource(path, batch_size=50)}, image_size=24, epoch_iterations=400, augment=Augmentation()
    )
    module.setup("fit")
    peaks = []
    for number, _ in enumerate(module.train_dataloader()):
        if number in (100, 399):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    # kilobytes; 15,000 samples lie between the two
    assert peaks[1] - peaks[0] < 4_000


def test_a_draw_reads_one_shard_however_many_there_are(pictures: Pictures) -> None:
    module = InterleavedDataModule(
        {"a": ShardSource(str(pictures("a", 60, max_samples=1)), batch_size=1)}, image_size=24, epoch_iterations=1
    )
    module.load_state_dict(
        {
            "iteration": 1000,
            "micro": 0,
            "used": {"a": 1000},
            "world_size": 1,
            "accumulate": 1,
            "images_per_batch": {"a": 1},
            "samples": {"a": 60},
            "seed": 0,
        }
    )
    module.setup("fit")
    index: ShardIndex = module.train_dataloader().batches.readers["a"].index
    assert [batch.iteration for batch in module.train_dataloader()] == [1000]
    assert len(index._files) == 1
