"""The `matte` command as a person types it: what it writes, what it says, and what is left when it is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_matting.cli import main
from lit_matting.cutting import slug
from lit_matting.pipeline import MattingPipeline

COMMAND = [sys.executable, "-m", "lit_matting", "matte"]
ROOT = Path(__file__).resolve().parents[2]


def shell(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.fixture
def desk(tmp_path: Path, picture: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `photos` with three photographs, one of them in a subfolder, and a hidden file."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["a.png", "b.jpg", "trip/c.png"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(40 + 10 * number, 60, number)).save(path)
    (tmp_path / "photos" / ".hidden.png").write_bytes(b"no picture")
    return tmp_path


@pytest.fixture
def matte(checkpoint: Path) -> Callable[..., int]:
    """Runs the command in this process with the tiny checkpoint."""

    def run(*arguments: object) -> int:
        settings = ["--checkpoint", str(checkpoint), "--device", "cpu", "--precision", "fp32"]
        return main(["matte", *settings, *(str(word) for word in arguments)])

    return run


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_real_run_writes_the_cut_out_at_the_photographs_size(desk: Path, checkpoint: Path) -> None:
    done = shell(
        "photos/b.jpg", "the red thing", "-o", "out/cut.png", "--checkpoint", str(checkpoint), "--precision", "fp32",
        cwd=desk,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "1 made\n"
    matting = MattingPipeline.from_checkpoint(checkpoint, device="cpu", precision="fp32")
    expected = np.asarray(matting(desk / "photos" / "b.jpg", "the red thing").cutout)
    assert read(desk / "out" / "cut.png").shape == (50, 60, 4)
    assert np.abs(read(desk / "out" / "cut.png").astype(int) - expected).max() <= 1
    assert [item.name for item in (desk / "out").iterdir()] == ["cut.png"]


def test_what_fails_is_listed_and_the_rest_is_done_in_a_real_run(desk: Path, checkpoint: Path) -> None:
    (desk / "photos" / "broken.jpg").write_text("not a picture")
    done = shell("photos", "none.png", "the dog", "-o", "out", "--checkpoint", str(checkpoint), cwd=desk)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-3:] == [
        "3 made, 2 failed:",
        "  there is no image 'none.png'.",
        "  'photos/broken.jpg' is not an image of a known format.",
    ]
    made = sorted(path.relative_to(desk / "out").as_posix() for path in (desk / "out").rglob("*") if path.is_file())
    assert made == ["a.the-dog.png", "b.the-dog.png", "trip/c.the-dog.png"]


@pytest.mark.slow
def test_a_killed_run_leaves_no_half_file_and_goes_on_where_it_was(
    tmp_path: Path, checkpoint: Path, picture: Callable[..., np.ndarray], matting: MattingPipeline
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(16):
        Image.fromarray(picture(220, 260, number)).save(tmp_path / "photos" / f"{number:02d}.png")
    words = ["photos", "a cat", "-o", "out", "--checkpoint", str(checkpoint), "--precision", "fp32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*COMMAND, *words], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while len(list((tmp_path / "out").glob("*.png"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < end, "no three pictures in four minutes"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    assert 3 <= len(left) < 16
    for path in left:
        expected = matting(tmp_path / "photos" / path.name.replace(".a-cat", ""), "a cat").cutout
        assert np.abs(read(path).astype(int) - np.asarray(expected)).max() <= 1, path.name

    done = shell(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{16 - len(left)} made, {len(left)} already there (--overwrite makes them again)" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert len(list((tmp_path / "out").glob("*.png"))) == 16


def test_mistakes_are_one_sentence_and_status_2(
    desk: Path, matte: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "empty").mkdir()
    (desk / "words.csv").write_text("image,phrase\nphotos/a.png,the dog\nphotos/a.png,?\n")
    (desk / "fields.csv").write_text("photos/a.png,the dog,and more\n")
    (desk / "lines.csv").write_text("image,phrase\n")
    mistakes = {
        (): "give a photograph and a phrase",
        ("photos/a.png",): "the phrase is missing: after 'photos/a.png' say what to cut out",
        ("photos/a.png", "photos/b.jpg"): "the phrase is missing",
        ("photos",): "the phrase is missing",
        ("the dog",): "'the dog' stands alone",
        ("photos/a.png", " ?! "): "`phrase` has no words: got ' ?! '",
        ("none.png", "the dog"): "there is no image 'none.png'.",
        ("empty", "the dog"): "no images in the folder 'empty'.",
        ("photos/a.png", "the dog", "--bits", "12"): "argument --bits: invalid choice",
        ("photos/a.png", "the dog", "--no-such-flag"): "unrecognized arguments: --no-such-flag",
        ("photos/a.png", "the dog", "-o", "cut.jpg"): ".jpg has no transparency",
        ("photos/a.png", "the dog", "-o", "cut.gif"): "not as '.gif'",
        ("photos/a.png", "the dog", "-o", "cut.webp", "--bits", "16"): "16 bits need .png",
        ("photos/a.png", "the dog", "-o", "cut.png", "--format", "webp"): "disagree",
        ("photos", "the dog", "-o", "cut.png"): "`-o cut.png` is one file, but there are 3 pictures to make",
        ("photos/a.png", "the dog", "-o", "photos/a.png", "--overwrite"): "is one of the photographs",
        ("photos/a.png", "the dog", "--background", "chartroose"): "'chartroose' is no colour",
        ("photos/a.png", "the dog", "--background", "beach.jpg"): "there is no background image 'beach.jpg'",
        ("photos/a.png", "the dog", "--background", "white", "--alpha-only"): "drop one",
        ("photos/a.png", "the dog", "--device", "tpu9"): "`device` 'tpu9' is unknown",
        ("--pairs", "none.csv"): "there is no table 'none.csv'",
        ("--pairs", "lines.csv"): "has no lines; each must be: image,phrase",
        ("--pairs", "fields.csv"): "line 1: expected image,phrase, got 3 fields",
        ("--pairs", "words.csv"): "`phrase of words.csv, line 3` has no words",
        ("--pairs", "words.csv", "the dog"): "`--pairs` brings photographs and phrases with it",
    }
    for words, sentence in mistakes.items():
        assert matte(*words) == 2, words
        printed = capsys.readouterr()
        assert sentence in printed.err, words
        assert printed.err.count("\n") == 1, words
        assert printed.err.startswith("python -m lit_matting matte: error: ")
        assert printed.out == ""
    assert main(["matte", "photos/a.png", "the dog"]) == 2
    assert "there is no checkpoint 'outputs/demo/last.ckpt': `make demo` makes it" in capsys.readouterr().err
    assert main(["matte", "photos/a.png", "the dog", "--checkpoint", "photos/a.png"]) == 2
    assert "'photos/a.png' is not a checkpoint" in capsys.readouterr().err
    assert not list(desk.glob("*.png")), "nothing was written"


def test_finished_pictures_are_made_again_only_when_asked(
    desk: Path, matte: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert matte("photos/a.png", "the dog", "-o", "out.png") == 0
    (desk / "out.png").write_bytes(b"mine")
    assert matte("photos/a.png", "the dog", "-o", "out.png") == 0
    assert (desk / "out.png").read_bytes() == b"mine"
    assert "0 made, 1 already there" in capsys.readouterr().err
    assert matte("photos/a.png", "the dog", "-o", "out.png", "--overwrite") == 0
    assert read(desk / "out.png").shape == (40, 60, 4)


def test_the_output_of_one_run_is_not_the_input_of_the_next(desk: Path, matte: Callable[..., int]) -> None:
    for _ in range(2):
        assert matte("photos", "the dog", "-o", "photos") == 0
    names = sorted(path.name for path in (desk / "photos").rglob("[!.]*.*"))
    assert names == ["a.png", "a.the-dog.png", "b.jpg", "b.the-dog.png", "c.png", "c.the-dog.png"]


def test_what_earlier_runs_wrote_is_no_photograph_whatever_they_were_asked_for(
    desk: Path, matte: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.open("photos/a.png").save("photos/a.2.png")  # of the person's own, whatever it is called
    shutil.copy("photos/b.jpg", "photos/trip/b.the-dog.jpg")
    assert matte("photos", "the dog", "-o", "photos") == 0
    assert matte("photos", "the dog", "-o", "photos", "--format", "webp") == 0
    assert matte("photos", "the dog", "-o", "photos", "--format", "jpg", "--background", "white") == 0
    assert matte("photos/**/*.*", "a cat", "-o", "photos", "--bits", "16") == 0
    assert matte("photos", "a cat", "-o", "photos", "--format", "tiff") == 0
    assert matte("photos", "a cat", "-o", "photos", "--format", "tiff", "--bits", "16", "--overwrite") == 0
    capsys.readouterr()
    assert matte("photos", "the sky", "-o", "out") == 0
    assert capsys.readouterr().err.endswith("5 made\n")
    made = sorted(path.relative_to(desk / "out").as_posix() for path in (desk / "out").rglob("*.*"))
    names = ["a.2.the-sky.png", "a.the-sky.png", "b.the-sky.png", "trip/b.the-dog.the-sky.png", "trip/c.the-sky.png"]
    assert made == names
    assert matte("photos/a.the-dog.png", "the sky", "-o", "again") == 0, "named by itself, it is meant"
    assert [path.name for path in (desk / "again").iterdir()] == ["a.the-dog.the-sky.png"]


def test_pictures_left_out_are_counted(desk: Path, matte: Callable[..., int], caplog: pytest.LogCaptureFixture) -> None:
    assert matte("photos/a.png", "the dog", "-o", "made/") == 0
    assert matte("made", "the cat") == 2
    assert "1 of the pictures in 'made' were written by lit_matting and are left out" in caplog.text


def test_globs_that_the_shell_left_are_expanded(desk: Path, matte: Callable[..., int]) -> None:
    assert matte("photos/**/*.png", "the dog", "-o", "out") == 0
    assert sorted(path.name for path in (desk / "out").iterdir()) == ["a.the-dog.png", "c.the-dog.png"]


def test_alpha_only_is_the_matte_in_8_and_16_bits(
    desk: Path, matte: Callable[..., int], matting: MattingPipeline
) -> None:
    alpha = matting(desk / "photos" / "a.png", "the dog").alpha
    assert matte("photos/a.png", "the dog", "--alpha-only", "-o", "8.png") == 0
    assert matte("photos/a.png", "the dog", "--alpha-only", "-o", "16.tif", "--bits", "16") == 0
    assert matte("photos/a.png", "the dog", "--alpha-only", "-o", "8.jpg") == 0
    assert np.array_equal(read(desk / "8.png"), np.rint(alpha * 255))
    assert np.array_equal(read(desk / "16.tif"), np.rint(alpha * 65535))
    assert read(desk / "8.jpg").shape == (40, 60)


def test_backgrounds_of_colour_and_image(desk: Path, matte: Callable[..., int], matting: MattingPipeline) -> None:
    result = matting(desk / "photos" / "a.png", "the dog")
    assert matte("photos/a.png", "the dog", "--background", "#204060", "-o", "colour.png") == 0
    assert matte("photos/a.png", "the dog", "--background", "photos/b.jpg", "-o", "image.webp") == 0
    assert np.array_equal(read(desk / "colour.png"), np.asarray(result.composite((0x20, 0x40, 0x60))))
    assert np.array_equal(read(desk / "image.webp"), np.asarray(result.composite(desk / "photos" / "b.jpg")))
    assert matte("photos", "the dog", "--background", "white", "--format", "jpg", "-o", "out") == 0
    assert sorted(path.name for path in (desk / "out").rglob("*.*")) == [
        "a.the-dog.jpg",
        "b.the-dog.jpg",
        "c.the-dog.jpg",
    ]


def test_a_table_of_pairs_is_read_from_its_own_folder(desk: Path, matte: Callable[..., int]) -> None:
    table = desk / "photos" / "pairs.csv"
    lines = [
        "image,phrase",
        "a.png,the dog",
        'trip/c.png,"a cat, asleep"',
        "a.png,the cat",
        "a.png,the dog",
        "x.png,it",
    ]
    table.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert matte("--pairs", "photos/pairs.csv", "-o", "out", "--format", "webp") == 1  # x.png is not there
    made = sorted(path.relative_to(desk / "out").as_posix() for path in (desk / "out").rglob("*.*"))
    assert made == ["a.the-cat.webp", "a.the-dog.webp", "trip/c.a-cat-asleep.webp"]


def test_pictures_of_one_name_do_not_overwrite_each_other(
    desk: Path, matte: Callable[..., int], picture: Callable[..., np.ndarray]
) -> None:
    Image.fromarray(picture(30, 30)).save(desk / "photos" / "trip" / "a.png")
    assert matte("photos/a.png", "photos/trip/a.png", "photos/b.jpg", "the dog", "-o", "out") == 0
    made = sorted(path.name for path in (desk / "out").iterdir())
    assert len(made) == 3
    assert made[-1] == "b.the-dog.png"
    assert {read(desk / "out" / name).shape[0] for name in made} == {30, 40, 50}
    long = "a very long description of a thing " * 20
    (desk / "pairs.csv").write_text(f"photos/a.png,{long} one\nphotos/a.png,{long} two\n")
    assert matte("--pairs", "pairs.csv", "-o", "long") == 0
    assert len(list((desk / "long").rglob("*.png"))) == 2


def test_one_picture_that_fails_unexpectedly_does_not_end_the_run(
    desk: Path, matte: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = MattingPipeline.encode

    def fails(self: MattingPipeline, image: Path) -> object:
        errors = {"a.png": MemoryError(), "b.jpg": ZeroDivisionError("by zero")}
        if image.name in errors:
            raise errors[image.name]
        return encode(self, image)

    monkeypatch.setattr(MattingPipeline, "encode", fails)
    assert matte("photos", "the dog", "-o", "out") == 1
    printed = capsys.readouterr().err
    assert "1 made, 2 failed:" in printed
    assert "'photos/a.png' needs more memory than there is" in printed
    assert "'photos/b.jpg' failed unexpectedly (ZeroDivisionError: by zero)" in printed


def test_a_thing_that_is_not_there_is_said_to_be_missing(
    desk: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matting = MattingPipeline.from_checkpoint(checkpoint)
    for threshold, says in ((0.0, False), (1.0, True)):
        matting.threshold = threshold
        matting.save_pretrained(tmp_path / str(threshold))
        assert (
            main(["matte", "photos/a.png", "the dog", "--overwrite", "--checkpoint", str(tmp_path / str(threshold))])
            == 0
        )
        assert ("'the dog' does not seem to be there (confidence 0." in capsys.readouterr().err) is says


def test_a_checkpoint_may_be_a_file_a_folder_or_a_model_of_the_hub(
    desk: Path, matting: MattingPipeline, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matting.save_pretrained("model")
    asked = []

    def snapshot_download(name: str, **_: object) -> str:
        asked.append(name)
        return "model"

    monkeypatch.setattr("lit_matting.sharing.snapshot_download", snapshot_download)
    settings = ["--alpha-only", "--overwrite", "--device", "cpu", "--precision", "fp32"]
    seen = []
    for given in (str(checkpoint), "model", "./model", "me/matting-1.0"):
        assert main(["matte", "photos/a.png", "glass", "-o", "a.png", "--checkpoint", given, *settings]) == 0
        seen.append(read(desk / "a.png"))
    assert asked == ["me/matting-1.0"]
    assert all(np.array_equal(picture, seen[0]) for picture in seen)


@pytest.mark.parametrize("command", [["matte", "photos/a.png", "glass"], ["demo"]])
def test_a_model_that_cannot_be_had_is_one_sentence_that_says_what_was_tried(
    desk: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == ["demo"]:
        pytest.importorskip("gradio")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(desk / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = {
        "me/matting": "'me/matting' is neither a file or folder here nor a model of the Hugging Face hub that can be"
        f" had: it was not downloaded to '{desk / 'cache'}' earlier, and the hub was not asked (HF_HUB_OFFLINE or"
        " `local_files_only`).",
        "outputs/last.ckpt": "there is no checkpoint 'outputs/last.ckpt'.",
        "me/and/you": "there is no checkpoint 'me/and/you'.",
        "./me": "there is no checkpoint 'me'.",
    }
    for given, sentence in said.items():
        assert main([*command, "--checkpoint", given]) == 2
        assert capsys.readouterr().err.strip() == f"python -m lit_matting {command[0]}: error: {sentence}"


def test_names_of_phrases_fit_into_file_names() -> None:
    assert slug("  The Woman's  hair! ") == "the-woman-s-hair"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("穿红衣服的女人") == "穿红衣服的女人"
    assert len(slug("穿" * 200).encode()) <= 80


def test_help_answers_without_importing_torch() -> None:
    code = (
        "import sys, time; from lit_matting.cli import main\n"
        "try: main(['matte', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules; assert time.process_time() < 1.5"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "--background COLOUR|IMAGE" in done.stdout
    assert "exit status: 0 all made" in done.stdout
    assert done.returncode == 0, done.stderr
