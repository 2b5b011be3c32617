"""The five stages in a row, by the real command and the real experiment files, each doing its own work.

The files are those of Stable Diffusion 2.1; an overlay puts the tiny backbone and generated scenes in their place, and
rates with which something is learned from nothing. What a stage trains, with which terms, and how it goes on from the
last one's checkpoint is the files' own. The network sees 64 pixels; the scenes, and so the refiner, have 96.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from lit_matting.cli import main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
STEPS = {"ground": 200, "matte": 250, "refine": 50, "distill": 100, "joint": 4}
MEASURES = ("grounding_accuracy", "soft_iou", "band_mae", "sad")
REFINER = ("network.refiner.", "network.project.")

pytestmark = pytest.mark.slow

OVERLAY = """
trainer:
  accelerator: cpu
  precision: 32-true
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 2
  max_steps: STEPS
  val_check_interval: STEPS
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: FOLDER, name: logs}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: FOLDER, filename: last, enable_version_counter: false}
    - {class_path: callbacks.EMA, init_args: {decay: 0.9}}
    - {class_path: callbacks.GradientNorms}
    - {class_path: callbacks.BenchmarkReport, init_args: {folder: FOLDER}}
model:
  neck: {class_path: lit_matting.networks.neck.Neck, init_args: {channels: 32}}
  grounding_head:
    class_path: lit_matting.networks.heads.GroundingHead
    init_args: {similarity_scale: 8.0, attention_slope: 1.0}
  trimap_head: {class_path: lit_matting.networks.heads.TrimapHead, init_args: {hidden: 16}}
  alpha_head: {class_path: lit_matting.networks.heads.AlphaHead, init_args: {hidden: 16}}
  refiner:
    class_path: lit_matting.networks.refiner.SparseRefiner
    init_args: {feature_channels: 8, widths: [8, 16], blocks: 1, half_scale_above: null}
  coarse_stride: 16
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 3.0e-3, weight_decay: 0.01}}
  schedule: {class_path: lit_matting.optimization.Cosine, init_args: {warmup_steps: 20}}
data:
  class_path: data_modules.InterleavedDataModule
  init_args:
    image_size: 64
    num_workers: 0
    pin_memory: false
    augment: null
    train:
      scenes:
        class_path: data_modules.ShardSource
        init_args: {shards: shards/train.index.json, batch_size: 16, phrases_per_image: 2, phrase_kinds: [colour]}
    schedule: {class_path: data_modules.InterleavedSchedule, init_args: {cycle: [scenes], insert_every: 0, insert: []}}
    val:
      scenes:
        class_path: data_modules.BenchmarkSource
        init_args: {shards: shards/val.index.json, image_size: 96, max_phrases: 2}
    test:
      scenes:
        class_path: data_modules.BenchmarkSource
        init_args: {shards: shards/test.index.json, batch_size: 16, image_size: 96, phrase_kinds: [colour]}
"""


def command(what: str, stage: str, folder: str, *flags: str, steps: int = 1) -> None:
    """Run ``fit`` or ``test`` on a stage's own experiment file."""
    overlay = Path(f"{folder.replace('/', '_')}.yaml")
    overlay.write_text(OVERLAY.replace("FOLDER", folder).replace("STEPS", str(steps)))
    arguments = [f"--config={CONFIGS / 'experiment' / f'sd21_{stage}.yaml'}"]
    arguments += [f"--model.backbone={CONFIGS / 'backbone' / 'tiny.yaml'}", f"--config={overlay}"]
    arguments.append("--model.backbone.init_args.stem_blocks=0")  # colours need no more
    if "learning_rate_scales" in (CONFIGS / "experiment" / f"sd21_{stage}.yaml").read_text():
        arguments.append("--model.learning_rate_scales={network.backbone.unet: 1.0}")  # nothing is pretrained here
    if stage == "distill":
        # without the middle alone the student would be as good as its teacher before it learned anything
        arguments += [f"--model.backbone.init_args.{name}=false" for name in ("middle", "film")]
    assert main([what, *arguments, *flags]) == 0


def scores(stage: str, folder: str) -> dict[str, dict[str, float]]:
    """Judge what is in a folder; output -> measure -> value."""
    command("test", stage, folder, f"--ckpt_path={folder}/last.ckpt")
    report = json.loads(Path(folder, "report.json").read_text())["scores"]
    outputs = ("alpha", "alpha_lr", "trimap", "grounding")
    return {name: {measure: report[name]["overall"][measure] for measure in MEASURES} for name in outputs}


def weights(stage: str) -> dict[str, torch.Tensor]:
    return torch.load(f"{stage}/last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, float]]]:
    """Train all stages, each from the last one's checkpoint by one argument; what each scores afterwards."""
    sys.path.insert(0, str(ROOT))
    try:
        from tools.scene_shards import main as write
    finally:
        sys.path.remove(str(ROOT))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("stages"))
        patch.setenv("MATTING_DATA", "nowhere")
        write(["shards", "--train", "400", "--val", "1", "--test", "30", "--size", "96", "--workers", "1"])
        command("fit", "ground", "untrained")
        found = {"untrained": scores("ground", "untrained")}
        before = {
            "ground": [],
            "matte": ["--model.initial_weights=ground/last.ckpt"],
            "refine": ["--model.initial_weights=matte/last.ckpt", "--data.init_args.detail_size=48"],
            "distill": ["--model.teacher=refine/last.ckpt", "--data.init_args.detail_size=48"],
            "joint": ["--model.initial_weights=refine/last.ckpt", "--data.init_args.detail_size=48"],
        }
        for stage, flags in before.items():
            if stage == "distill":  # what the student is before it is taught anything
                command("fit", stage, "student", *flags, "--model.optimizer.init_args.lr=0")
                found["student"] = scores(stage, "student")
            command("fit", stage, stage, *flags, steps=STEPS[stage])
            if stage != "joint":
                found[stage] = scores(stage, stage)
        yield found


def test_ground_finds_what_the_phrase_names(stages: dict) -> None:
    before, after = stages["untrained"]["grounding"], stages["ground"]["grounding"]
    assert after["grounding_accuracy"] > before["grounding_accuracy"] + 0.15
    assert after["soft_iou"] > before["soft_iou"]


def test_matte_sharpens_the_alpha_and_forgets_nothing(stages: dict) -> None:
    before, after = stages["ground"], stages["matte"]
    assert after["alpha_lr"]["band_mae"] < before["alpha_lr"]["band_mae"]
    assert after["grounding"]["grounding_accuracy"] > before["grounding"]["grounding_accuracy"] - 0.05
    assert after["alpha_lr"]["soft_iou"] > before["alpha_lr"]["soft_iou"]


def test_refine_sharpens_at_full_resolution_and_touches_nothing_else(stages: dict) -> None:
    before, after = stages["matte"], stages["refine"]
    assert before["alpha"] == before["alpha_lr"]  # an untrained refiner is the identity
    assert after["alpha"]["band_mae"] < before["alpha"]["band_mae"]
    for name in ("alpha_lr", "trimap", "grounding"):
        assert after[name] == before[name]
    start, end = weights("matte"), weights("refine")
    changed = {name for name in end if not torch.equal(start[name], end[name])}
    assert changed
    assert all(name.startswith(REFINER) for name in changed)


def test_distill_makes_a_smaller_network_as_good(stages: dict) -> None:
    teacher, student = (sum(value.numel() for value in weights(stage).values()) for stage in ("refine", "distill"))
    assert student < 0.85 * teacher
    before, after, whole = (stages[stage]["alpha"]["soft_iou"] for stage in ("student", "distill", "refine"))
    assert before < 0.7 * whole  # the blocks it takes over are not enough ...
    assert after > 0.9 * whole  # ... and what it is taught is


def test_joint_trains_on_all_five_terms(stages: dict) -> None:
    rows = list(csv.DictReader(Path("joint/logs/version_0/metrics.csv").read_text().splitlines()))
    for term in ("stm", "ctm", "sg", "alpha_lr", "r"):
        values = [float(row[f"loss/{term}"]) for row in rows if row[f"loss/{term}"]]
        assert values
        assert all(0 < value < 10 for value in values)
    start, end = weights("refine"), weights("joint")
    moved = {name.split(".")[1] for name in end if not torch.equal(start[name], end[name])}
    assert {"backbone", "neck", "trimap_head", "grounding_head", "alpha_head", "refiner", "project"} <= moved
