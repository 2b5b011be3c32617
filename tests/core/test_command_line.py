"""The command line: a mistake is one sentence and status 2, and nothing is decided silently."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lit_matting.cli import PROG, main

CHECKPOINTS = "--trainer.enable_checkpointing=true"


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs the command line and returns the one line it complains in."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert said.out == ""
        return said.err.rstrip().splitlines()[-1]

    return run


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_unknown_command_is_named(complaint: Callable[..., str]) -> None:
    assert complaint("fti") == f"{PROG}: error: there is no command 'fti'; see {PROG} --help"


def test_real_process_ends_with_status_2_and_says_why_at_once() -> None:
    done = subprocess.run([sys.executable, "-m", "lit_matting", "fti"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {command} " in said for command in ("fit", "validate", "test", "predict", "matte", "demo"))
    assert main([]) == 2


def test_training_without_an_experiment_names_one(complaint: Callable[..., str]) -> None:
    assert complaint("fit").endswith("fit: error: give an experiment file: --config configs/experiment/demo.yaml")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.image_sise=32"], "unrecognized arguments: --model.image_sise=32"),
        (["--trainer.max_steps=many"], "Parser key \"trainer.max_steps\": Expected a <class 'int'>"),
        (["--model.losses.stm=lit_matting.losses.Nothing"], "lit_matting.losses.Nothing"),
        (["--data.init_args.image_size=33"], "`data.image_size` must be a multiple of 16 for TinyDiffusion, got 33"),
        (["--model.trainable=[network.nothing]"], "`model.trainable` names 'network.nothing', which is no part"),
        (["--model.initial_weights=gone.ckpt"], "`model.initial_weights`: there is no file 'gone.ckpt'"),
        (["--trainer.max_steps=-1", "--trainer.max_epochs=-1"], "`trainer.max_steps` must be set"),
        (["--ckpt_path=gone.ckpt"], "`--ckpt_path`: there is no file 'gone.ckpt'"),
    ],
    ids=lambda value: value[0].split("=")[0].strip("-") if isinstance(value, list) else "",
)
def test_mistake_in_a_flag_is_one_sentence(
    experiment: Path, complaint: Callable[..., str], flags: list[str], said: str
) -> None:
    line = complaint("fit", "--config", experiment, *flags)
    assert line.startswith(f"{PROG} fit: error: ")
    assert said in line


def test_unknown_key_in_a_file_is_one_sentence(experiment: Path, complaint: Callable[..., str]) -> None:
    experiment.write_text(experiment.read_text().replace("max_steps", "max_stepz"))
    assert "'trainer.max_stepz'" in complaint("fit", "--config", experiment)


def test_file_that_is_no_yaml_is_one_sentence(experiment: Path, complaint: Callable[..., str]) -> None:
    experiment.write_text("model: [")
    assert "while parsing" in complaint("fit", "--config", experiment)


def test_variable_that_is_not_set_is_named(complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MATTING_DATA", raising=False)
    said = complaint("fit", "--config", "configs/experiment/sd21_joint.yaml")
    assert said.startswith(f"{PROG} fit: error: `data.init_args.train.refmatte.init_args.shards` needs the environment")
    assert said.endswith(" variable MATTING_DATA, which is not set: export MATTING_DATA=... first.")


def test_reference_to_a_setting_that_is_not_there_is_one_sentence(
    experiment: Path, complaint: Callable[..., str]
) -> None:
    description = yaml.safe_load(experiment.read_text())
    description["trainer"]["max_steps"] = "${trainer.steps}"
    experiment.write_text(yaml.safe_dump(description))
    said = complaint("fit", "--config", experiment)
    assert said.endswith("`trainer.max_steps` cannot be resolved: Interpolation key 'trainer.steps' not found.")


def test_missing_experiment_is_one_sentence(complaint: Callable[..., str]) -> None:
    assert "File does not exist: " in complaint("fit", "--config", "nothing.yaml")


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_judging_needs_trained_weights(experiment: Path, complaint: Callable[..., str], command: str) -> None:
    line = complaint(command, "--config", experiment)
    assert line == f"{PROG} {command}: error: `{command}` needs trained weights: add --ckpt_path CKPT."


def test_what_lightning_refuses_is_one_sentence_too(experiment: Path, complaint: Callable[..., str]) -> None:
    assert main(["fit", "--config", str(experiment), CHECKPOINTS]) == 0
    (checkpoint,) = experiment.parent.rglob("*.ckpt")
    assert "val_dataloader" in complaint("validate", "--config", experiment, "--ckpt_path", checkpoint)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_settings_of_a_checkpoint_that_win_over_the_flags_are_said(
    experiment: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["fit", "--config", str(experiment), CHECKPOINTS]) == 0
    (checkpoint,) = experiment.parent.rglob("*.ckpt")
    flags = ["--trainer.max_steps=2", "--model.losses.stm.weight=7", "--model.optimizer.lr=0.001"]
    with caplog.at_level(logging.WARNING, logger="lit_matting.cli"):
        assert main(["fit", "--config", str(experiment), "--ckpt_path", str(checkpoint), *flags]) == 0
    said = [record.getMessage() for record in caplog.records if record.name == "lit_matting.cli"]
    assert said == [
        "`model.losses.stm.init_args.weight` is 10.0 in the checkpoint and counts; the config's 7.0 does not."
    ]


def test_where_a_run_began_is_no_part_of_its_checkpoint(experiment: Path) -> None:
    first, second = experiment.parent / "first", experiment.parent / "second"
    fit = ["fit", "--config", str(experiment), CHECKPOINTS]
    assert main([*fit, f"--trainer.default_root_dir={first}"]) == 0
    (begin,) = first.rglob("*.ckpt")
    assert main([*fit, f"--trainer.default_root_dir={second}", f"--model.initial_weights={begin}"]) == 0
    (checkpoint,) = second.rglob("*.ckpt")
    begin.unlink()  # the second run does not depend on it any more
    assert "initial_weights" not in torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    resumed = [f"--ckpt_path={checkpoint}", f"--model.initial_weights={begin}", "--trainer.max_steps=2"]
    assert main(["fit", "--config", str(experiment), *resumed]) == 0


def test_checkpoint_loads_by_itself(experiment: Path) -> None:
    from lit_matting.module import LitMatting

    assert main(["fit", "--config", str(experiment), CHECKPOINTS, "--model.losses.stm.weight=3"]) == 0
    (checkpoint,) = experiment.parent.rglob("*.ckpt")
    model = LitMatting.load_from_checkpoint(checkpoint)
    assert model.image_size == 32
    assert model.objective.terms["stm"].weight == 3.0
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


# --- parsing ----------------------------------------------------------------------------------------------------------


def test_size_is_given_once_and_reaches_the_model(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: built.append(cli))
    assert main(["fit", "--config", str(experiment), "--data.init_args.image_size=48"]) == 0
    assert built[0].model.image_size == built[0].datamodule.image_size == 48


def test_effective_config_can_be_printed_and_run_again(
    experiment: Path, capsys: pytest.CaptureFixture[str], complaint: Callable[..., str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(experiment), "--model.losses.sg.weight=0.25", "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["losses"]["sg"]["init_args"]["weight"] == 0.25
    experiment.write_text(printed)
    assert main(["fit", "--config", str(experiment)]) == 0
