"""Every file in configs/ builds what it describes: trainers with callbacks, full-size models without contents."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from callbacks import BenchmarkReport, Preemption
from lit_matting.checks import InputError
from lit_matting.cli import main
from lit_matting.module import LitMatting
from tools.planning.experiment import read_experiment

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAINERS = sorted((CONFIGS / "trainer").glob("*.yaml"))
BACKBONES = sorted((CONFIGS / "backbone").glob("*.yaml"))
EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))
FULL_SIZE = CONFIGS / "experiment" / "sd21_joint.yaml"


def trainer_of(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pl.Trainer:
    """The trainer that an experiment and this file describe, on processors: there may be no GPUs here."""
    built: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: built.append(cli))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MATTING_DATA", str(tmp_path))
    tiny = f"--model.backbone={CONFIGS / 'backbone' / 'tiny.yaml'}"
    flags = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}", tiny]
    assert main(["fit", "--config", str(FULL_SIZE), "--config", str(path), *flags]) == 0
    return built[0].trainer


def test_all_five_trainers_are_there() -> None:
    assert {path.stem for path in TRAINERS} >= {"cpu", "gpu", "ddp8", "slurm", "fsdp"}


@pytest.mark.parametrize("path", TRAINERS, ids=[path.stem for path in TRAINERS])
def test_trainer_builds_keeps_the_experiments_callbacks_and_is_headed_by_its_command(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = yaml.safe_load(path.read_text())["trainer"]
    tasks = said["devices"] * said["num_nodes"]
    if path.stem == "slurm":
        for name, value in {"JOB_ID": 1, "NTASKS": tasks, "NTASKS_PER_NODE": said["devices"], "NNODES": 4}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        for name in ("PROCID", "LOCALID", "NODEID"):
            monkeypatch.setenv(f"SLURM_{name}", "0")
    trainer = trainer_of(path, tmp_path, monkeypatch)
    kinds = [type(callback) for callback in trainer.callbacks]
    assert BenchmarkReport in kinds
    assert kinds.count(ModelCheckpoint) == 2
    assert kinds.count(Preemption) == (path.stem != "cpu")
    assert trainer.world_size == tasks
    assert trainer.num_nodes == said["num_nodes"]
    assert trainer.precision == said["precision"]
    assert f"--config configs/trainer/{path.name}" in path.read_text()
    expected = {"ddp8": DDPStrategy, "slurm": DDPStrategy, "fsdp": ModelParallelStrategy}.get(path.stem, object)
    assert isinstance(trainer.strategy, expected)
    if isinstance(trainer.strategy, DDPStrategy):
        # which parameters have a gradient other than 0 changes with the data set
        assert not trainer.strategy._ddp_kwargs.get("static_graph")
        assert not trainer.strategy._ddp_kwargs.get("find_unused_parameters")
    if path.stem == "slurm":
        environment = trainer.strategy.cluster_environment
        assert isinstance(environment, SLURMEnvironment)
        assert not environment.auto_requeue, "Preemption requeues, at the end of a step"


def without_contents(path: Path, *flags: str) -> LitMatting:
    try:
        return read_experiment([str(path)], flags, meta=True).model
    except InputError as error:
        if "pip install" in str(error):  # the parts of `Compact` are packages of their own
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("path", EXPERIMENTS, ids=[path.stem for path in EXPERIMENTS])
def test_experiment_builds_at_full_size(path: Path) -> None:
    model = without_contents(path)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())
    # its statistics would alternate with the data sets of the schedule
    normed = [part for part in model.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    assert not any(parameter.requires_grad for part in normed for parameter in part.parameters())


@pytest.mark.parametrize("path", BACKBONES, ids=[path.stem for path in BACKBONES])
def test_backbone_builds_at_full_size_inside_the_full_experiment(path: Path) -> None:
    model = without_contents(FULL_SIZE, "--model.backbone", str(path))
    backbone = model.network.backbone
    said = yaml.safe_load(path.read_text())
    assert type(backbone).__name__ == said["class_path"].rsplit(".", 1)[1]
    frozen = {id(item) for part in backbone.frozen_modules().values() for item in part.parameters()}
    assert not any(item.requires_grad for item in backbone.parameters() if id(item) in frozen)
    if said["init_args"].get("pretrained") == "sd21" and said["init_args"]["pruning"] is None:
        assert sum(item.numel() for item in backbone.unet.parameters()) == 865_898_560
    assert torch.get_default_device().type == "cpu"


@pytest.mark.parametrize(
    ("student", "parameters"),
    [
        ("base", 583_480_964),
        ("small", 485_787_524),
        ("tiny_mid", 424_519_044),
        ("tiny", 326_825_604),
        (None, 424_519_044),
    ],
)
def test_student_inside_the_distillation_has_the_published_size(student: str | None, parameters: int) -> None:
    flags = [] if student is None else ["--model.backbone", str(CONFIGS / "backbone" / f"sd21_student_{student}.yaml")]
    unet = without_contents(CONFIGS / "experiment" / "sd21_distill.yaml", *flags).network.backbone.unet
    output_layers = 2 * 320 + (9 * 320 * 4 + 4)  # a norm and a convolution, which are not read
    assert sum(item.numel() for item in unet.parameters()) == parameters - output_layers
