"""Losses are configuration: switch one off, reweight it, add one of your own, through the real command line."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lit_matting.cli import main
from lit_matting.losses import Objective

OWN_LOSS = '''
import torch

from lit_matting.losses import LossTerm


class Brightness(LossTerm):
    """The mean of the low-resolution alpha: smaller mattes are better, some say.

    Args:
        weight: Factor of the term in the total.
        power: Of the alpha.
    """

    needs = ("alpha_lr",)

    def __init__(self, weight: float = 1.0, power: float = 1.0) -> None:
        super().__init__(weight)
        self.power = power

    def per_image(self, output, targets) -> torch.Tensor:
        return output.alpha_lr.float().pow(self.power).flatten(1).mean(1)
'''


@pytest.fixture
def experiment(experiment: Path) -> Iterator[Path]:
    """The small experiment, with a module of the user's own beside it on the path."""
    (experiment.parent / "my_own_losses.py").write_text(OWN_LOSS)
    yield experiment
    sys.modules.pop("my_own_losses", None)


def objective_of(experiment: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Objective:
    """The objective that ``fit`` would train with: everything is parsed and built, nothing runs."""
    built: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: built.append(cli))
    assert main(["fit", "--config", str(experiment), *flags]) == 0
    return built[0].model.objective


def edited(experiment: Path, **losses: dict | None) -> Path:
    """Write a copy of the experiment with entries of its loss map changed; None takes one out."""
    config = yaml.safe_load(experiment.read_text())
    config["model"]["losses"].update(losses)
    config["model"]["losses"] = {name: term for name, term in config["model"]["losses"].items() if term is not None}
    copy = experiment.with_name("edited.yaml")
    copy.write_text(yaml.safe_dump(config, sort_keys=False))
    return copy


def test_experiment_that_names_the_five_terms_gets_the_papers_weights(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = objective_of(experiment, monkeypatch).terms
    assert {name: term.weight for name, term in terms.items()} == {
        "stm": 10.0, "ctm": 0.1, "sg": 0.5, "alpha_lr": 10.0, "r": 1.0,
    }  # fmt: skip


def test_weight_is_a_flag(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--model.losses.stm.init_args.weight=5", "--model.losses.alpha_lr.init_args.laplacian=0")
    terms = objective_of(experiment, monkeypatch, *flags).terms
    assert {name: term.weight for name, term in terms.items()} == {
        "stm": 5.0, "ctm": 0.1, "sg": 0.5, "alpha_lr": 10.0, "r": 1.0,
    }  # fmt: skip
    assert terms["alpha_lr"].laplacian == 0


def test_weight_of_zero_switches_a_term_off_on_the_command_line(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert objective_of(experiment, monkeypatch, "--model.losses.ctm.init_args.weight=0").terms["ctm"].weight == 0


def test_dropping_its_line_switches_a_term_off(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = objective_of(edited(experiment, ctm=None), monkeypatch).terms
    assert list(terms) == ["stm", "sg", "alpha_lr", "r"]


def test_another_reading_of_a_term_is_one_line(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stm = {"class_path": "lit_matting.losses.SemanticTrimapCrossEntropy", "init_args": {"weight": 1.0}}
    terms = objective_of(edited(experiment, stm=stm), monkeypatch).terms
    assert (type(terms["stm"]).__name__, terms["stm"].weight) == ("SemanticTrimapCrossEntropy", 1.0)


def test_term_from_the_users_own_module_trains_and_is_logged_under_its_name(experiment: Path) -> None:
    own = {"class_path": "my_own_losses.Brightness", "init_args": {"weight": 3.0, "power": 2.0}}
    path = edited(experiment, brightness=own)
    logger = "--trainer.logger={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}"
    assert main(["fit", "--config", str(path), logger, "--trainer.log_every_n_steps=1"]) == 0
    (log,) = (experiment.parent / "logs").rglob("metrics.csv")
    row = next(csv.DictReader(log.open()))
    weights = {"stm": 10, "ctm": 0.1, "sg": 0.5, "alpha_lr": 10, "r": 1, "brightness": 3}
    logged = {name: float(row[f"loss/{name}"]) for name in weights}
    assert 0 < logged["brightness"] < 1
    total = sum(weight * logged[name] for name, weight in weights.items())
    assert math.isclose(float(row["loss/total"]), total, rel_tol=1e-5)


def test_unknown_option_of_a_term_is_one_clear_sentence(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = edited(experiment, stm={"class_path": "lit_matting.losses.SemanticTrimap", "init_args": {"wieght": 1}})
    assert main(["fit", "--config", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("python -m lit_matting fit: error: ")
    assert "wieght" in said


def test_term_that_needs_the_refiner_says_so_when_there_is_none(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(experiment), "--model.refiner=null"]) == 2
    said = capsys.readouterr().err
    assert "`model.losses.r` (Refinement) scores the refiner, but `model.refiner` is null" in said
