"""Every experiment in configs/ parses, builds, and fits together, before anybody waits for a run of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from callbacks import LossRamp
from data_modules import InterleavedSchedule
from lit_matting.cli import main
from lit_matting.losses import LossTerm
from lit_matting.optimization import parameter_groups

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))
BACKBONES = sorted((CONFIGS / "backbone").glob("*.yaml"))


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, with every folder that configs take from the environment inside it."""
    monkeypatch.chdir(tmp_path)
    for name in ("MATTING_DATA", "MATTING_OUTPUTS", "MATTING_WEIGHTS"):
        monkeypatch.setenv(name, str(tmp_path))


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> LightningCLI:
    """Parse and check a command against the real parser, and build nothing."""
    found: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "instantiate_classes", lambda cli: found.append(cli))
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: None)
    assert main(["fit", *arguments]) == 0
    return found[0]


def test_the_demo_is_among_the_experiments() -> None:
    assert "demo" in names(EXPERIMENTS)


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("path", EXPERIMENTS, ids=names(EXPERIMENTS))
def test_experiment_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(monkeypatch, "--config", str(path)).config.fit
    assert config.model.losses, "an experiment states its loss map whole"


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("path", EXPERIMENTS, ids=names(EXPERIMENTS))
def test_experiment_builds_and_its_names_mean_something(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: built.append(cli))
    flags = [f"--trainer.default_root_dir={tmp_path}", "--model.initial_weights=null"]
    if "TinyDiffusion" not in path.read_text() and "tiny.yaml" not in path.read_text():
        # everything but the billion weights of a full-size backbone, which have tests of their own
        flags.append(f"--model.backbone={CONFIGS / 'backbone' / 'tiny.yaml'}")
    assert main(["fit", "--config", str(path), *flags]) == 0
    (cli,) = built
    model = cli.model
    # names that only fail when a run has begun
    assert parameter_groups(model, 1.0, 0.0, model.learning_rate_scales)
    for callback in cli.trainer.callbacks:
        if isinstance(callback, LossRamp):
            callback.on_fit_start(cli.trainer, model)
    assert all(isinstance(term, LossTerm) for term in model.objective.terms.values())
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("path", EXPERIMENTS, ids=names(EXPERIMENTS))
def test_experiment_is_headed_by_its_command(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config configs/experiment/{path.name}" in line for line in comments)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=names(EXPERIMENTS))
def test_every_data_set_of_the_schedule_is_seen_in_the_logs(path: Path) -> None:
    # a row of the log is one step, and a step is one data set: every 50th of a schedule of period 5 is always the same
    whole = yaml.safe_load(path.read_text())
    every, steps = whole["trainer"]["log_every_n_steps"], whole["trainer"]["max_steps"]
    given = whole["data"]["init_args"].get("schedule")
    sets = list(whole["data"]["init_args"]["train"])
    schedule = InterleavedSchedule(**given["init_args"]) if given else InterleavedSchedule(sets, insert_every=0)
    assert set(schedule.datasets) == set(sets)
    assert {schedule.dataset(step - 1) for step in range(every, steps + 1, every)} == set(sets)


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("path", BACKBONES, ids=names(BACKBONES))
def test_backbone_is_swapped_by_one_flag(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = CONFIGS / "experiment" / "demo.yaml"
    backbone = parsed(monkeypatch, "--config", str(demo), f"--model.backbone={path}").config.fit.model.backbone
    assert f"class_path: {backbone.class_path}" in path.read_text()
