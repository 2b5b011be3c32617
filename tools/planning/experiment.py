"""An experiment file's model without its weights: on the meta device, or with random ones."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_matting.backbones.base import Backbone
from lit_matting.checkpoints import make_network, read_checkpoint
from lit_matting.checks import InputError
from lit_matting.module import LitMatting
from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.teacher import Teacher


@dataclass(frozen=True)
class Experiment:
    """What an experiment says about a run."""

    model: LitMatting
    size: int
    """Side, in pixels, of what the network sees."""
    batch: int
    """Images per process and batch, the largest of its sources."""
    precision: str
    accelerator: str
    average: str
    """What its weight averaging copies: ``trained`` parameters, ``all`` or ``nothing``."""
    copied_gradients: bool
    """Whether DDP keeps gradients a second time."""


def read_experiment(files: Sequence[str], flags: Sequence[str], meta: bool) -> Experiment:
    """Parse configuration files as ``fit`` does and build the model; nothing is loaded, downloaded or written.

    A student has a teacher: the network of the checkpoint that ``--model.teacher`` names, or else its own before it was
    pruned.

    Args:
        files: As after ``--config``, in their order.
        flags: Further flags of ``fit``.
        meta: On the meta device; else with random weights.

    Raises:
        InputError: If a file is missing, or does not describe a model.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    import callbacks  # noqa: F401
    import data_modules  # noqa: F401
    import lit_matting.backbones
    import lit_matting.losses  # noqa: F401

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise InputError(" ".join(message.split())) from ex

    class Reader(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("data.init_args.image_size", "model.image_size")

        def instantiate_classes(self) -> None:
            pass  # neither a trainer, whose devices may not be here, nor data

    for file in files:
        if not Path(file).is_file():
            raise InputError(f"`--config`: there is no file {file!r}.")
    arguments = [item for file in files for item in ("--config", file)]
    with missing_environment():
        reader = Reader(
            LitMatting,
            pl.LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            run=False,
            parser_kwargs={"parser_mode": "omegaconf"},
            parser_class=Parser,
            args=[*arguments, *flags],
        )
    config = reader.config
    config.model.initial_weights = None
    teaching, config.model.teacher = config.model.get("teacher"), None
    with tempfile.TemporaryDirectory() as folder:
        without_weights(config.model.backbone, Path(folder))
        # what has no `pretrained` is small, or reads installed packages, which needs real tensors
        at_once = meta and "pretrained" in (config.model.backbone.get("init_args") or {})
        chosen = torch.device("meta" if at_once else "cpu")
        # the model alone: the trainer's devices may not be here
        config.trainer, trainer = {}, config.trainer
        with chosen:
            model = reader.parser.instantiate_classes(config).model
            assert isinstance(model, LitMatting)
            taught = any(term.needs_teacher for term in model.objective.terms.values())
            teacher = _teacher(reader.parser, config, teaching, Path(folder)) if taught else None
    if meta:
        model = model.to("meta")
    if teacher is not None:
        if meta:
            for network in (model.network, teacher.to("meta")):
                _pretend_weights(network.backbone)
        model.teacher = Teacher(teacher, model.network)
    sources = config.data.init_args.get("train") or {}
    sizes = [source.init_args.get("batch_size") or 1 for source in sources.values()]
    return Experiment(
        model=model,
        size=int(config.model.image_size),
        batch=max(sizes, default=1),
        precision=str(trainer.precision or "32-true"),
        accelerator=str(trainer.accelerator or "auto"),
        average=_average(trainer.callbacks or []),
        copied_gradients=_copied_gradients(trainer.strategy),
    )


@contextmanager
def missing_environment() -> Iterator[None]:
    """Let ``${oc.env:NAME}`` stand for anything: no file of a data set is opened."""
    import os

    names = [name for name in ("MATTING_DATA", "MATTING_OUTPUTS", "MATTING_WEIGHTS") if name not in os.environ]
    os.environ.update(dict.fromkeys(names, "."))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def without_weights(backbone: Any, folder: Path) -> None:
    """Change a backbone's configuration so that its weights are not needed; ``folder`` takes a file if need be."""
    from lit_matting.backbones.weights import NAMED

    given = backbone.get("init_args") or {}
    pretrained = given.get("pretrained")
    if pretrained is None:
        return
    if pretrained in NAMED:
        given["architecture"] = NAMED[pretrained].architecture
    elif Path(pretrained).expanduser().is_dir():
        parts = ("unet", "vae", "text_encoder", "text_encoder_2")
        files = {part: Path(pretrained).expanduser() / part / "config.json" for part in parts}
        content = {part: json.loads(file.read_text()) for part, file in files.items() if file.is_file()}
        public = {part: {k: v for k, v in c.items() if not k.startswith("_")} for part, c in content.items()}
        path = folder / "architecture.json"
        path.write_text(json.dumps(public))
        given["architecture"] = str(path)
    elif given.get("architecture") is None:
        raise InputError(
            f"`pretrained: {pretrained}` does not say what it holds: add its `architecture`, for example"
            " --model.backbone.init_args.architecture sd21."
        )
    given["pretrained"] = None
    for name in ("tokenizer", "autoencoder", "revision"):
        if name in given:
            given[name] = None


def _teacher(parser: Any, config: Any, checkpoint: str | None, folder: Path) -> MattingNetwork:
    """Build what a student is distilled from: what a checkpoint describes, or the student's own before pruning."""
    if checkpoint is not None:
        description = read_checkpoint(checkpoint).network
        without_weights(description["backbone"], folder)
        return make_network(description)
    whole = config.clone()
    if "pruning" in (whole.model.backbone.get("init_args") or {}):
        whole.model.backbone.init_args.pruning = None
    return parser.instantiate_classes(whole).model.network


def _pretend_weights(backbone: Backbone) -> None:
    """Let frozen parts of one shape count as the same weights: those of tensors without contents have no sum."""
    backbone._frozen_hashes = {
        name: str([(key, value.dtype, value.shape) for key, value in part.state_dict().items()])
        for name, part in backbone.frozen_modules().items()
    }


def _average(callbacks: Sequence[Any]) -> str:
    from lightning.pytorch.callbacks import WeightAveraging

    for item in callbacks:
        module, name = str(item.get("class_path", "")).rsplit(".", 1)
        kind = getattr(importlib.import_module(module), name)
        if isinstance(kind, type) and issubclass(kind, WeightAveraging):
            return "trained" if kind.__module__.startswith("callbacks") else "all"
    return "nothing"


def _copied_gradients(strategy: Any) -> bool:
    name = strategy if isinstance(strategy, str) else strategy.get("class_path", "") if strategy else ""
    options = {} if isinstance(strategy, str) or not strategy else strategy.get("init_args") or {}
    is_ddp = str(name).startswith("ddp") or str(name).endswith("DDPStrategy")
    return is_ddp and not (options.get("gradient_as_bucket_view") or options.get("dict_kwargs", {}))
