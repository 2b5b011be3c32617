"""One experiment, any backbone: a few steps and a validation by the real command, with only the backbone swapped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import save_tiny_pipeline, save_tiny_xl_pipeline

from lit_matting.backbones import Compact
from lit_matting.checks import InputError
from lit_matting.cli import main

ROOT = Path(__file__).resolve().parents[2]
BACKBONES = ROOT / "configs" / "backbone"
DATA_SETS = ("refmatte", "refcoco", "p3m10k", "am2k", "rm1k")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handful of generated scenes."""
    sys.path.insert(0, str(ROOT))
    try:
        from tools.scene_shards import main as write
    finally:
        sys.path.remove(str(ROOT))
    folder = tmp_path_factory.mktemp("shards")
    write([str(folder), "--train", "16", "--val", "2", "--test", "2"])
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Class of backbone -> a folder as diffusers saves it, with random weights at a twentieth of the width."""
    folder = tmp_path_factory.mktemp("pipelines")
    save_tiny_pipeline(folder / "sd")
    save_tiny_xl_pipeline(folder / "xl")
    return {"StableDiffusion": folder / "sd", "StableDiffusionXL": folder / "xl"}


def train(shards: Path, folder: Path, *flags: str) -> Path:
    """Train two steps of the demo and return the checkpoint."""
    data = [f"--data.init_args.train.scenes.init_args.shards={shards / 'train.index.json'}"]
    data += [f"--data.init_args.{part}.scenes.init_args.shards={shards / part}.index.json" for part in ("val", "test")]
    arguments = [
        f"--config={ROOT / 'configs' / 'experiment' / 'demo.yaml'}",
        *data,
        "--data.init_args.train.scenes.init_args.batch_size=4",
        "--data.init_args.num_workers=0",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        f"--trainer.default_root_dir={folder}",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks=null",
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.dirpath={folder}",
        "--trainer.callbacks.filename=last",
        *flags,
    ]
    assert main(["fit", *arguments]) == 0
    return folder / "last.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(BACKBONES.glob("*.yaml")), ids=lambda path: path.stem)
def test_only_the_backbone_is_swapped(path: Path, shards: Path, pipelines: dict[str, Path], tmp_path: Path) -> None:
    if path.stem == "compact":
        try:
            Compact()
        except InputError as error:
            pytest.skip(str(error))
    flags = [f"--model.backbone={path}"]
    kind = yaml.safe_load(path.read_text())["class_path"].rpartition(".")[2]
    if kind in pipelines:
        flags.append(f"--model.backbone.init_args.pretrained={pipelines[kind]}")
    if kind == "StableDiffusion":
        flags.append("--model.backbone.init_args.text_layers=null")  # the tiny text encoder has three
    weights = torch.load(train(shards, tmp_path / "run", *flags), weights_only=False)["state_dict"]
    assert any(key.startswith("network.backbone.") for key in weights)
    # what is frozen is not in the checkpoint; the tiny one trains all it has
    frozen = () if kind == "TinyDiffusion" else ("text_encoder.", "image_encoder.", "features.")
    assert not [key for key in weights if key.startswith(tuple(f"network.backbone.{part}" for part in frozen))]


@pytest.mark.slow
def test_the_papers_training_runs_with_a_backbone_that_has_no_unet(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        Compact()
    except InputError as error:
        pytest.skip(str(error))
    for name in DATA_SETS:
        (tmp_path / name).symlink_to(shards)
    captions = {"key": "none", "instance": "none", "text": "a caption"}
    (shards / "train.captions.jsonl").write_text(json.dumps(captions))
    monkeypatch.setenv("MATTING_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    smaller = ["--data.init_args.image_size=128", "--data.init_args.detail_size=32", "--data.init_args.num_workers=0"]
    flags = [
        f"--config={ROOT / 'configs' / 'experiment' / 'sd21_joint.yaml'}",
        f"--model.backbone={BACKBONES / 'compact.yaml'}",
        *smaller,
        "--data.init_args.val.refmatte.init_args.max_phrases=2",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=15",
        "--trainer.val_check_interval=15",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
    ]
    flags += [f"--data.init_args.train.{name}.init_args.batch_size=1" for name in DATA_SETS]
    assert main(["fit", *flags]) == 0
    assert "names 'network.backbone.unet', but nothing that is trained in this backbone" in caplog.text
    weights = torch.load(tmp_path / "outputs/sd21_joint/last.ckpt", weights_only=True)["state_dict"]
    assert any(key.startswith("network.backbone.") for key in weights)
