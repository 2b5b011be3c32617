"""Benchmarks show every phrase once; folders give every photograph at its own size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.prediction_writer import write_alpha
from data_modules import BenchmarkSource, FolderSource, InterleavedDataModule, PredictionShards
from data_modules.benchmark import BenchmarkLoader, Question, even_batches
from data_modules.shards import InstanceEntry, ShardIndex, ShardWriter
from lit_matting.checks import InputError
from lit_matting.records import MattingBatch

Pictures = Callable[..., Path]
Picture = Callable[..., tuple[np.ndarray, list[np.ndarray]]]


def _loaders(path: Path, world_size: int = 1, size: int = 24, **settings: object) -> list[BenchmarkLoader]:
    source = BenchmarkSource(str(path), **settings)  # type: ignore[arg-type]
    index = ShardIndex.load(path)
    return [BenchmarkLoader("v", source, index, size, rank, world_size) for rank in range(world_size)]


def _seen(loaders: list[BenchmarkLoader]) -> Counter[tuple[str, int, str]]:
    rows = [zip(b.keys, b.instance.tolist(), b.prompts) for loader in loaders for b in loader]
    return Counter(row for batch in rows for row in batch)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("batch_size", "image_size"), [(8, "input"), (3, None), (1, None)])
def test_every_phrase_is_seen_once_over_all_ranks(
    pictures: Pictures, world_size: int, batch_size: int, image_size: int | str | None
) -> None:
    loaders = _loaders(pictures("v", 7), world_size, batch_size=batch_size, image_size=image_size)
    seen = _seen(loaders)
    assert len(seen) == loaders[0].questions == 7 * 2 * 2
    assert set(seen.values()) == {1}
    lengths = [len(loader) for loader in loaders]
    assert lengths == [len(list(loader)) for loader in loaders]
    # with room to split batches every rank has as many; single phrases cannot be split
    assert max(lengths) - min(lengths) <= (0 if batch_size > 1 else 1)


def test_batches_are_split_only_as_far_as_needed() -> None:
    questions = [Question(0, 0, str(number), "") for number in range(9)]
    assert [len(batch) for batch in even_batches(questions, 4, 2)] == [2, 2, 4, 1]
    assert [len(batch) for batch in even_batches(questions, 4, 3)] == [4, 4, 1]
    assert [len(batch) for batch in even_batches(questions[:1], 4, 3)] == [1]
    assert [q for batch in even_batches(questions, 4, 2) for q in batch] == questions


def test_batches_carry_all_instances_of_their_images(pictures: Pictures, picture: Picture) -> None:
    batch = next(iter(_loaders(pictures("v", 3, instances=3), batch_size=4)[0]))
    assert (batch.dataset, batch.iteration) == ("v", -1)
    assert batch.instances is not None
    for row, key in enumerate(batch.keys):
        image, alphas = picture(int(key[-6:]), instances=3)
        assert torch.equal((batch.instances[row] * 255).round().byte(), torch.from_numpy(np.stack(alphas)))
        assert torch.equal(batch.instances[row][batch.instance[row]], batch.target[row, 0])
        assert torch.equal((batch.image[row] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(image))


def test_own_size_is_kept_and_phrases_of_one_image_share_a_batch(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, prefix="v", tool="t") as writer:
        for number, size in enumerate([(10, 14), (20, 12)]):
            alpha = np.full(size, 200, np.uint8)
            entries = [InstanceEntry(f"{k}", alpha, phrases=[(f"a {k}", ""), (f"b {k}", "")]) for k in range(2)]
            writer.write(f"{number}", np.zeros((*size, 3), np.uint8), "png", entries)
    batches = list(_loaders(tmp_path / "v.index.json", batch_size=3, image_size=None)[0])
    assert [tuple(batch.image.shape) for batch in batches] == [
        (3, 3, 10, 14),
        (1, 3, 10, 14),
        (3, 3, 20, 12),
        (1, 3, 20, 12),
    ]
    small = list(_loaders(tmp_path / "v.index.json", batch_size=8, image_size=16)[0])
    assert [tuple(batch.target.shape) for batch in small] == [(8, 1, 16, 16)]


def test_loaders_say_what_their_shards_are_and_how_they_resize(pictures: Pictures) -> None:
    (loader,) = _loaders(pictures("v", 1))
    assert (loader.name, loader.origin, loader.image_size, loader.interpolation) == ("v", "v/v", 24, "area")
    assert _loaders(pictures("w", 1), image_size=None)[0].image_size is None
    # area means: every pixel of the half size is the mean of four
    (half,) = _loaders(pictures("x", 1), image_size=12)
    whole, small = next(iter(loader)).target[0, 0], next(iter(half)).target[0, 0]
    assert torch.allclose(small, whole.view(12, 2, 12, 2).mean((1, 3)), atol=0.51 / 255)


def test_choices_are_limited_always_in_the_same_way(pictures: Pictures) -> None:
    path = pictures("v", 20)
    some = _seen(_loaders(path, max_phrases=10))
    assert sum(some.values()) == 10
    assert some == _seen(_loaders(path, world_size=2, max_phrases=10))
    # whole images: two phrases of two instances
    assert sorted(Counter(key for key, _, _ in some).values()) == [2, 4, 4]
    assert max(int(key[-6:]) for key, _, _ in some) > 9
    one = _seen(_loaders(path, phrases_per_instance=1))
    assert Counter((key, instance) for key, instance, _ in one) == {
        (f"v/v-{n // 5:06d}/{n:06d}", k): 1 for n in range(20) for k in range(2)
    }
    kinds = {kind for batch in _loaders(path, phrase_kinds=["colour"])[0] for kind in batch.prompt_kinds}
    assert kinds == {"colour"}


def test_templates_ask_for_what_has_no_phrases_and_nothing_to_ask_is_an_error(pictures: Pictures) -> None:
    path = pictures("v", 3, phrases=lambda number, instance: [])
    with pytest.raises(InputError, match="benchmark 'v' has no phrases"):
        _loaders(path)
    seen = _seen(_loaders(path, templates=["the {category}", "the foreground"]))
    assert sum(seen.values()) == 12
    assert {prompt for _, _, prompt in seen} == {"the stripe", "the foreground"}
    captions = path.with_name("captions.jsonl")
    captions.write_text('{"key": "000001", "instance": "i0", "text": "a caption"}\n')
    assert _seen(_loaders(path, captions=str(captions))) == {("v/v-000000/000001", 0, "a caption"): 1}


def test_unknown_size_is_refused() -> None:
    with pytest.raises(InputError, match="`input` or null, got 'native'"):
        BenchmarkSource("x", image_size="native")


# folders ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    cv2.imwrite(str(folder / "a.png"), rng.integers(0, 255, (7, 11, 3), dtype=np.uint8))
    cv2.imwrite(str(folder / "sub" / "b.jpg"), rng.integers(0, 255, (9, 5), dtype=np.uint8))
    (folder / "notes.txt").write_text("no image")
    for hidden in (".hidden.jpg", ".trash/c.jpg", "sub/.thumbnails/b.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_text("no image either")
    return folder


def test_folder_gives_every_image_with_every_phrase_at_its_own_size(photographs: Path) -> None:
    source = FolderSource(str(photographs), ["a cat", " a  dog "])
    found = {(batch.keys[0], batch.prompts[0]): tuple(batch.image.shape) for batch in source.loader()}
    assert found == {
        ("a.png", "a cat"): (1, 3, 7, 11),
        ("a.png", "a dog"): (1, 3, 7, 11),
        ("sub/b.jpg", "a cat"): (1, 3, 9, 5),
        ("sub/b.jpg", "a dog"): (1, 3, 9, 5),
    }
    shared = [key for rank in range(3) for batch in source.loader(rank, 3) for key in batch.keys]
    assert Counter(shared) == {"a.png": 2, "sub/b.jpg": 2}


def test_mattes_of_an_earlier_run_are_no_photographs(photographs: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photographs / "a.2.png").write_bytes((photographs / "a.png").read_bytes())
    write_alpha(np.zeros((7, 11)), photographs / "a.png.the-dog.png")
    for images in (str(photographs), f"{photographs}/**/*.*"):
        keys = [key for _, key, _ in FolderSource(images, "a cat").questions()]
        assert sorted(keys) == ["a.2.png", "a.png", "sub/b.jpg"]
        assert f"1 of the pictures in '{images}' were written by lit_matting" in caplog.text
    named = FolderSource(str(photographs / "a.png.the-dog.png"), "a cat").questions()
    assert [key for _, key, _ in named] == ["a.png.the-dog.png"], "named by itself, it is meant"


def test_table_pairs_images_and_phrases(photographs: Path) -> None:
    table = photographs / "table.csv"
    table.write_text('image,phrase\na.png,"the red, round thing"\nsub/b.jpg,a dog\n')
    assert [(batch.keys[0], batch.prompts[0]) for batch in FolderSource(str(table)).loader()] == [
        ("a.png", "the red, round thing"),
        ("sub/b.jpg", "a dog"),
    ]
    table.write_text("image,phrase\na.png\n")
    with pytest.raises(InputError, match="entry 1: expected image,phrase, got 1"):
        FolderSource(str(table)).loader()
    table.write_text("none.png,a dog\n")
    with pytest.raises(InputError, match=r"none.png' does not exist"):
        FolderSource(str(table)).loader()


def test_two_images_of_a_table_never_have_one_name(photographs: Path, tmp_path: Path) -> None:
    table = photographs / "table.csv"
    absolute = photographs / "sub" / "b.jpg"
    twin = photographs / absolute.relative_to("/")
    twin.parent.mkdir(parents=True)
    twin.write_bytes((photographs / "a.png").read_bytes())
    table.write_text(f"{absolute},it\n{twin.relative_to(photographs)},it\n")
    name = absolute.as_posix().lstrip("/")
    with pytest.raises(InputError, match=rf"entry 2: '.*' and '{absolute}' would both be called '{name}'; put them"):
        FolderSource(str(table)).loader()
    (tmp_path / "a.png").write_bytes((photographs / "sub" / "b.jpg").read_bytes())
    table.write_text("a.png,it\n../a.png,it\n")
    with pytest.raises(InputError, match=r"would both be called 'a.png'"):
        FolderSource(str(table)).loader()
    # one image by three names is one image
    table.write_text("a.png,it\n./a.png,it\nsub/../a.png,a dog\n../photographs/sub/b.jpg,it\n")
    assert [(key, phrase) for _, key, phrase in FolderSource(str(table)).questions()] == [
        ("a.png", "it"),
        ("sub/a.png", "a dog"),
        ("photographs/sub/b.jpg", "it"),
    ]


def test_matte_that_is_asked_for_twice_is_made_once(photographs: Path) -> None:
    table = photographs / "table.csv"
    table.write_text("a.png,a dog\nsub/b.jpg,a dog\na.png,a dog\n")
    assert [batch.keys[0] for batch in FolderSource(str(table)).loader()] == ["a.png", "sub/b.jpg"]
    twice = FolderSource(str(photographs / "a.png"), ["a dog", "a cat", "a dog"])
    assert [phrase for _, _, phrase in twice.questions()] == ["a dog", "a cat"]


def test_shards_hold_every_prediction_though_two_phrases_are_the_same(tmp_path: Path) -> None:
    writer, trainer = PredictionShards(str(tmp_path), image_ext="png"), SimpleNamespace(world_size=1, global_rank=0)
    batch = MattingBatch(
        image=torch.rand(2, 3, 4, 6),
        target=torch.zeros(2, 1, 4, 6),
        has_alpha=torch.tensor([True, True]),
        prompts=("left man", "left man"),
        prompt_kinds=("human", "human"),
        keys=("refcoco/1/2", "refcoco/1/2"),
        instance=torch.tensor([0, 0]),
    )
    writer.on_predict_start(trainer, None)  # type: ignore[arg-type]
    writer.write_on_batch_end(trainer, None, SimpleNamespace(alpha=torch.rand(2, 1, 4, 6)), None, batch, 0, 0)  # type: ignore[arg-type]
    writer.on_predict_end(trainer, None)  # type: ignore[arg-type]
    index = ShardIndex.load(tmp_path / "mattes.index.json")
    assert [index.read(number).instances[0].phrases[0].text for number in range(len(index))] == ["left man"] * 2


def test_shards_of_a_run_on_other_processes_are_not_read_beside_new_ones(tmp_path: Path) -> None:
    for name in ("mattes", "mattes-1", "mattes-old"):
        (tmp_path / f"{name}.index.json").touch()
    trainer = SimpleNamespace(world_size=2, global_rank=1)
    with pytest.raises(InputError, match=r"mattes.index.json' is of an earlier run"):
        PredictionShards(str(tmp_path)).on_predict_start(trainer, None)  # type: ignore[arg-type]
    (tmp_path / "mattes.index.json").unlink()
    writer = PredictionShards(str(tmp_path))
    writer.on_predict_start(trainer, None)  # type: ignore[arg-type]
    writer.on_predict_end(trainer, None)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["mattes-old.index.json"]


def test_photographs_come_the_way_a_viewer_shows_them(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.jpg"
        Image.fromarray(pixels).save(path, exif=exif, quality=100)
        from PIL import ImageOps

        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(float)
        (batch,) = FolderSource(str(path), "it").loader()
        found = batch.image[0].permute(1, 2, 0).numpy() * 255
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "1"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (8, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert(mode)
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    (batch,) = FolderSource(str(path), "it").loader()
    assert batch.image.shape == (1, 3, 8, 16)
    expected = np.asarray(image.convert("L")) if mode == "1" else grey
    assert np.abs(batch.image[0, 0].numpy() * 255 - expected).max() <= 4


def test_folder_without_images_or_phrases_says_so(tmp_path: Path, photographs: Path) -> None:
    with pytest.raises(InputError, match="no images at"):
        FolderSource(str(tmp_path / "none"), "x").loader()
    with pytest.raises(InputError, match=r"`predict.phrases` is empty"):
        FolderSource(str(photographs)).loader()
    with pytest.raises(InputError, match="has no words"):
        FolderSource(str(photographs), "...").loader()


def test_data_module_serves_benchmarks_and_folders(photographs: Path, pictures: Pictures) -> None:
    module = InterleavedDataModule(
        val={"v": BenchmarkSource(str(pictures("v", 2)))},
        test={"t": BenchmarkSource(str(pictures("t", 2)))},
        predict=FolderSource(str(photographs), "it"),
        image_size=24,
    )
    for stage in ("validate", "test", "predict"):
        module.setup(stage)
    assert [b.dataset for loader in module.val_dataloader() for b in loader] == ["v"]
    assert [b.dataset for loader in module.test_dataloader() for b in loader] == ["t"]
    assert [b.dataset for b in module.predict_dataloader()] == ["folder", "folder"]
    with pytest.raises(InputError, match=r"`data.train` is empty"):
        module.setup("fit")
    with pytest.raises(InputError, match=r"`data.test` is empty"):
        InterleavedDataModule().test_dataloader()
