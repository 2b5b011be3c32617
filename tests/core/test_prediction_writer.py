"""Mattes to files: whole or not at all, each under a name of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks import PredictionWriter
from callbacks.prediction_writer import file_name, write_alpha
from lit_matting.records import MattingBatch, MattingOutput


def predict(writer: PredictionWriter, alphas: torch.Tensor, keys: list[str], prompts: list[str]) -> None:
    batch = MattingBatch(
        image=torch.zeros(len(keys), 3, *alphas.shape[-2:]),
        target=torch.zeros_like(alphas),
        has_alpha=torch.zeros(len(keys), dtype=torch.bool),
        prompts=tuple(prompts),
        prompt_kinds=("",) * len(keys),
        keys=tuple(keys),
        instance=torch.zeros(len(keys), dtype=torch.long),
    )
    output = MattingOutput(alphas, None, None, None, None)
    writer.write_on_batch_end(None, None, output, None, batch, 0, 0)  # type: ignore[arg-type]


def test_file_holds_the_alpha_in_bytes_at_its_own_size(tmp_path: Path) -> None:
    alpha = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.1, 0.999]])[None, None]
    predict(PredictionWriter(str(tmp_path / "new")), alpha, ["photo.jpg"], ["the red umbrella"])
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == "photo.jpg.the-red-umbrella.png"
    with Image.open(path) as picture:
        assert (picture.mode, picture.size) == ("L", (3, 2))
        assert np.array(picture).tolist() == [[0, 128, 255], [64, 26, 255]]


def test_images_of_one_name_in_two_folders_do_not_overwrite_each_other(tmp_path: Path) -> None:
    alphas = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    predict(PredictionWriter(str(tmp_path)), alphas, ["a/photo.jpg", "b/photo.jpg"], ["a dog", "a dog"])
    values = {path.parent.name: np.array(Image.open(path)).item() for path in tmp_path.rglob("*.png")}
    assert values == {"a": 0, "b": 255}


def test_phrases_of_one_image_each_have_a_file() -> None:
    assert file_name("photo", "a dog") != file_name("photo", "a cat")
    long = "the very " * 40
    assert file_name("photo", long + "small dog") != file_name("photo", long + "small cat")


def test_what_a_name_cannot_say_does_not_make_two_mattes_one_file() -> None:
    keys = ["a.jpg", "../a.jpg", "./a.jpg", "b/a.jpg", "b/../a.jpg", "/a.jpg"]
    phrases = ["the dog", "the dog!", "The dog", "the-dog", "the  dog", "the dog's", "the dog s", "the dogs", "!?", "?"]
    phrases += ["matte", "ein Strauß", "ein strauß", "红色的雨伞" * 40, "红色的雨伞" * 41]
    names = {file_name(key, phrase).casefold() for key in keys for phrase in phrases}
    assert len(names) == len(keys) * len(phrases)


@pytest.mark.parametrize(
    ("key", "phrase", "name"),
    [
        ("a.jpg", "the dog", "a.jpg.the-dog.png"),
        ("b/a.jpg", "the girl's 2 dogs", "b/a.jpg.the-girl-s-2-dogs.png"),
        ("a.jpg", "红色的雨伞", "a.jpg.红色的雨伞.png"),
    ],
)
def test_ordinary_names_are_nothing_but_image_and_phrase(key: str, phrase: str, name: str) -> None:
    assert file_name(key, phrase) == name


@pytest.mark.parametrize("key", ["../../etc/photo", "/etc/photo", "a/../../photo", ".", ""])
def test_no_key_leads_out_of_the_folder(tmp_path: Path, key: str) -> None:
    path = (tmp_path / "out" / file_name(key, "a dog")).resolve()
    assert (tmp_path / "out") in path.parents


@pytest.mark.parametrize("phrase", ["红色的雨伞在左边" * 40, "x" * 500, "a/b\\c:d*e?", "..", "!?"])
def test_any_phrase_makes_a_name_that_file_systems_take(tmp_path: Path, phrase: str) -> None:
    path = tmp_path / file_name("k" * 100, phrase)
    write_alpha(np.zeros((2, 2)), path)
    assert path.is_file()
    assert path.parent == tmp_path
    assert len(path.name.encode()) < 255


def test_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "matte.png"
    write_alpha(np.ones((2, 2)), path)
    before = path.read_bytes()

    def disk_full(picture: Image.Image, target: Path, **options: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_alpha(np.zeros((2, 2)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
