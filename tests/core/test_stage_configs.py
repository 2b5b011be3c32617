"""The stages of Stable Diffusion 2.1: one network, handed on from file to file, as docs/METHOD.md tells it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_matting.module import LitMatting
from lit_matting.records import MattingBatch

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("ground", "matte", "refine", "distill", "joint")
TERMS = {
    "ground": {"stm", "ctm", "sg"},
    "matte": {"stm", "ctm", "sg", "alpha_lr"},
    "refine": {"r"},
    "joint": {"stm", "ctm", "sg", "alpha_lr", "r"},
    "distill": {"stm", "ctm", "sg", "alpha_lr", "r", "output", "features", "attention"},
}
PAPER = {"stm": 10.0, "ctm": 0.1, "sg": 0.5, "alpha_lr": 10.0, "r": 1.0}
UNET = "network.backbone.unet"
SHORTER = ({}, {"every_n_train_steps": 2})


def text(stage: str) -> str:
    return (ROOT / "configs" / "experiment" / f"sd21_{stage}.yaml").read_text()


def config(stage: str) -> dict[str, Any]:
    return yaml.safe_load(text(stage))


def documented() -> dict[str, list[str]]:
    """Stage -> the cells of its line in docs/METHOD.md."""
    lines = (ROOT / "docs" / "METHOD.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row for row in rows if len(row) == 9}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_has_its_terms_with_the_papers_weights(stage: str) -> None:
    losses = config(stage)["model"]["losses"]
    assert set(losses) == TERMS[stage]
    for name, weight in PAPER.items():
        if name in losses:
            assert losses[name]["init_args"]["weight"] == weight


@pytest.mark.parametrize("stage", STAGES)
def test_stage_follows_the_papers_schedule_on_the_same_data(stage: str) -> None:
    ours, joint = config(stage)["data"]["init_args"], config("joint")["data"]["init_args"]
    assert ours.pop("detail_size", 0) == (512 if "r" in TERMS[stage] else 0), (
        "the refiner's half scale needs large images"
    )
    joint.pop("detail_size")
    assert ours == joint
    assert ours["schedule"]["init_args"] == {
        "cycle": ["refmatte", "refcoco"], "insert_every": 4, "insert": ["p3m10k", "am2k", "rm1k"],
    }  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_data_sets_without_phrases_are_called_by_the_captions_that_the_tool_writes(stage: str) -> None:
    for name, source in config(stage)["data"]["init_args"]["train"].items():
        given = source["init_args"]
        own = name in ("refmatte", "refcoco")
        assert given.get("template_probability") == (None if own else 0.3)
        captions = given["shards"].replace(".index.json", ".captions.jsonl")  # tools/caption.py without --output
        assert given.get("captions") == (None if own else captions)
    assert "python tools/caption.py $MATTING_DATA/p3m10k/train.index.json" in text(stage)


def test_stage_is_saved_between_validations_into_the_same_file(
    make_model: Callable[..., LitMatting], make_batch: Callable[..., MattingBatch], tmp_path: Path
) -> None:
    class Killed(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("killed")

    for stage in STAGES:
        given = [item["init_args"] for item in config(stage)["trainer"]["callbacks"] if "ModelCheckpoint" in str(item)]
        regular = {"dirpath": f"outputs/sd21_{stage}", "filename": "last", "enable_version_counter": False}
        assert given == [regular, {**regular, "every_n_train_steps": 1000}]
    # the same two, with 2 steps in the place of 1000
    savers = [ModelCheckpoint(**{**item, "dirpath": tmp_path, **more}) for item, more in zip(given, SHORTER)]
    loader = DataLoader([make_batch()] * 10, batch_size=None)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"max_steps": 10, "check_val_every_n_epoch": None, "default_root_dir": tmp_path}
    for interval, last in ((3, 4), (5, 5)):
        trainer = pl.Trainer(callbacks=[*savers, Killed()], val_check_interval=interval, **options)
        with pytest.raises(RuntimeError, match="killed"):
            trainer.fit(make_model(), loader, DataLoader([make_batch()], batch_size=None))
        assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == last


@pytest.mark.parametrize("stage", STAGES)
def test_stage_builds_the_network_that_the_next_one_goes_on_with(stage: str) -> None:
    model, joint = config(stage)["model"], config("joint")["model"]
    for part in ("neck", "refiner", "coarse_stride", "trimap_head", "grounding_head", "alpha_head"):
        assert model.get(part) == joint.get(part), part
    ours, theirs = (item["backbone"]["init_args"] for item in (model, joint))
    assert ours["pretrained"] == theirs["pretrained"] == "sd21"
    assert set(ours) - set(theirs) == ({"pruning"} if stage == "distill" else set())


def test_own_cutouts_train_the_joint_network_at_its_rates_on_shards_of_its_size() -> None:
    ours, joint = config("composites"), config("joint")
    assert ours["model"] == joint["model"]
    assert ours["data"]["init_args"]["image_size"] == joint["data"]["init_args"]["image_size"] == 512
    assert "compose_shards.py CUTOUTS BACKGROUNDS outputs/sd21_composites/shards --size 512\n" in text("composites")
    assert ours["trainer"]["accelerator"] == "auto"
    small = (ROOT / "configs" / "experiment" / "composites.yaml").read_text()
    assert "sd21_composites.yaml" in small
    assert "sd21.yaml" not in small


@pytest.mark.parametrize(("stage", "before"), [("matte", "ground"), ("refine", "matte"), ("distill", "refine")])
def test_stage_is_headed_by_the_one_argument_that_goes_on_from_the_last(stage: str, before: str) -> None:
    callback = next(
        item for item in config(before)["trainer"]["callbacks"] if item["class_path"].endswith("ModelCheckpoint")
    )
    written = f"{callback['init_args']['dirpath']}/{callback['init_args']['filename']}.ckpt"
    flag = "teacher" if stage == "distill" else "initial_weights"
    assert f"sd21_{stage}.yaml --model.{flag} {written}\n" in text(stage)


def test_stages_write_to_folders_of_their_own() -> None:
    for stage in STAGES:
        assert set(re.findall(r"outputs/(\w+)", text(stage).split("\ntrainer:")[1])) == {f"sd21_{stage}"}


@pytest.mark.parametrize("stage", STAGES)
def test_table_of_the_stages_is_what_the_files_say(stage: str) -> None:
    row, whole = documented()[stage], config(stage)
    model, trainer = whole["model"], whole["trainer"]
    rate = model["optimizer"]["init_args"]["lr"]
    frozen = model.get("trainable") is not None and "network.backbone" not in model["trainable"]
    unet = rate * model.get("learning_rate_scales", {}).get(UNET, 1.0)
    (average,) = [item["init_args"]["decay"] for item in trainer["callbacks"] if item["class_path"] == "callbacks.EMA"]
    assert int(row[4].replace(",", "")) == trainer["max_steps"]
    batches = {source["init_args"]["batch_size"] for source in whole["data"]["init_args"]["train"].values()}
    assert batches == {int(row[5])}
    assert float(row[6]) == rate
    assert row[7] == "frozen" if frozen else float(row[7]) == pytest.approx(unet)
    assert float(row[8]) == average
    # what every stage has in common, said once
    assert trainer["precision"] == "bf16-mixed"
    assert trainer["gradient_clip_val"] == 1.0
    assert model["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert model["optimizer"]["init_args"]["weight_decay"] == 0.01
    assert model["schedule"] == {
        "class_path": "lit_matting.optimization.Cosine", "init_args": {"warmup_steps": 500},
    }  # fmt: skip
