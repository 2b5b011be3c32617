"""The main job as a user runs it, in real processes: shards, fit, test, picture, matte, predict; few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def python(folder: Path, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the demo has been run with four training steps."""
    folder = tmp_path_factory.mktemp("road")
    (folder / "configs").symlink_to(ROOT / "configs")
    shards = "outputs/demo/shards"
    python(folder, str(ROOT / "tools/scene_shards.py"), shards, "--train", "24", "--val", "3", "--test", "6")
    quick = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]
    config = "configs/experiment/demo.yaml"
    python(folder, "-m", "lit_matting", "fit", "--config", config, *quick)
    python(folder, "-m", "lit_matting", "test", "--config", config, "--ckpt_path", "outputs/demo/last.ckpt")
    return folder


def test_training_leaves_a_checkpoint_and_a_loss_of_every_term(road: Path) -> None:
    assert (road / "outputs/demo/last.ckpt").is_file()
    header = (road / "outputs/demo/logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"loss/stm", "loss/ctm", "loss/sg", "loss/alpha_lr", "loss/r", "loss/total"} <= set(header)


def test_the_report_has_every_output_beside_the_blind_baselines(road: Path) -> None:
    scores = json.loads((road / "outputs/demo/report.json").read_text())["scores"]
    assert set(scores) == {"alpha", "alpha_lr", "trimap", "grounding"}
    baselines = scores["alpha"]["baselines"]
    assert set(baselines) == {"all_zero", "perfect_all", "perfect_random"}
    # a perfect matte of a blindly chosen one of 2 or 3 objects is right every second to third time
    assert 1 / 3 <= baselines["perfect_random"]["overall"]["grounding_accuracy"] <= 1 / 2
    assert baselines["all_zero"]["overall"]["grounding_accuracy"] == 0


def test_the_demo_draws_its_picture_and_prints_its_table(road: Path) -> None:
    done = python(road, str(ROOT / "tools/demo.py"), "--picture-only")
    assert "refined alpha" in done.stdout
    assert "baseline: nothing" in done.stdout
    assert "next:" in done.stdout
    picture = Image.open(road / "outputs/demo/picture.png")
    assert picture.width > 4 * 128
    assert np.asarray(picture).std() > 10


def test_matte_writes_a_cutout_of_exactly_the_photo_size(road: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (77, 133, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(road / "photo.png")
    command = ["-m", "lit_matting", "matte", "photo.png", "the red one", "--checkpoint", "outputs/demo/last.ckpt"]
    python(road, *command, "-o", "cut.png")
    cutout = Image.open(road / "cut.png")
    assert cutout.size == (133, 77)
    assert cutout.mode == "RGBA"


def test_predict_writes_one_alpha_per_image_at_its_own_size(road: Path) -> None:
    photos = road / "photos"
    photos.mkdir(exist_ok=True)
    sizes = {"one": (90, 61), "two": (128, 200)}
    for name, size in sizes.items():
        Image.new("RGB", size, "teal").save(photos / f"{name}.jpg")
    python(
        road,
        *["-m", "lit_matting", "predict", "--config", "configs/experiment/demo.yaml"],
        *["--ckpt_path", "outputs/demo/last.ckpt", "--data.init_args.predict", "data_modules.FolderSource"],
        *["--data.init_args.predict.images", "photos", "--data.init_args.predict.phrases", "the red one"],
    )
    written = {path.name.split(".")[0]: Image.open(path) for path in (road / "outputs/demo/mattes").rglob("*.png")}
    assert {name: (image.size, image.mode) for name, image in written.items()} == {
        name: (size, "L") for name, size in sizes.items()
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit"], "--config"),
        (["fit", "--config", "configs/experiment/none.yaml"], "none.yaml"),
        (["fit", "--config", "configs/experiment/demo.yaml", "--model.no_such_key", "1"], "no_such_key"),
        (["test", "--config", "configs/experiment/demo.yaml"], "--ckpt_path"),
        (["test", "--config", "configs/experiment/demo.yaml", "--ckpt_path", "gone.ckpt"], "gone.ckpt"),
        (["fit", "--config", "configs/experiment/demo.yaml", "--data.init_args.image_size", "100"], "image_size"),
        (["matte", "photo.png", "  ", "--checkpoint", "outputs/demo/last.ckpt", "-o", "x.png"], "no words"),
        (["matte", "gone.png", "the dog", "--checkpoint", "outputs/demo/last.ckpt", "-o", "x.png"], "gone.png"),
        (["fly"], "fly"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_failing_status(road: Path, arguments: list[str], says: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lit_matting", *arguments], cwd=road, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert says in done.stderr
