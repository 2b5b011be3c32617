"""The command line: ``fit | validate | test | predict`` are Lightning's, ``matte`` cuts one thing out of one photo, and
``demo`` shows a page in the browser that does so."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

log = logging.getLogger(__name__)

PROG = "python -m lit_matting"

USAGE = f"""usage: {PROG} COMMAND ...

Text-driven image matting: a photo and a phrase in, the alpha matte of exactly that thing out.

train and judge (configuration files and flags; see --help of each):
  fit        --config configs/experiment/demo.yaml        train
  validate   --config ... --ckpt_path CKPT                score on the validation sets
  test       --config ... --ckpt_path CKPT                score on the test sets, with the full report
  predict    --config ... --ckpt_path CKPT                matte a folder or a list of (image, phrase)

use:
  matte      PHOTO "PHRASE" --checkpoint CKPT -o OUT.png  cut one thing out of one photo
  demo       --checkpoint CKPT                            the same in the browser
"""
SHOWN_SEED = 77_000_001  # no experiment trains on it
SHOWN = ((3, 0, 2), (8, 0, 2), (13, 2, 2), (4, 0, 2))
"""Scenes that the page offers: number, object, and the phrase for it: a material, another, a place, another."""
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; a user's mistake is one sentence and status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] not in (*TRAINER_COMMANDS, "matte", "demo"):
        print(f"{PROG}: error: there is no command {arguments[0]!r}; see {PROG} --help", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from lit_matting.checks import InputError

    try:
        if arguments[0] == "matte":
            from lit_matting.cutting import run

            return run(arguments[1:])
        if arguments[0] == "demo":
            from lit_matting.page import serving

            return serving.run(arguments[1:], _scenes)
        return run_trainer(arguments)
    except InputError as error:
        print(f"{PROG} {arguments[0]}: error: {error}", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        place = error.filename or error
        print(f"{PROG} {arguments[0]}: error: there is no file or folder {str(place)!r}.", file=sys.stderr)
        return 2


def run_trainer(arguments: list[str]) -> int:
    """Hand ``fit``, ``validate``, ``test`` or ``predict`` to LightningCLI."""
    _quiet()
    import lightning.pytorch as pl
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    _log_once()

    # importing the rooms makes their classes known by their short names in configs and in --help
    import callbacks  # noqa: F401
    import data_modules  # noqa: F401
    import lit_matting.backbones
    import lit_matting.losses  # noqa: F401
    from lit_matting.checks import InputError
    from lit_matting.module import LitMatting

    class MattingParser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            # the usage of a command is three screens long and would push the sentence that matters out of sight
            said = " ".join(message.split())
            see = "" if "--help" in said else f" (all options: {PROG} {arguments[0]} --help)"
            raise InputError(f"{said}{see}") from ex

    class MattingCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # one size for both: the network's square is what the data is resized to
            parser.link_arguments("data.init_args.image_size", "model.image_size")

        def _parse_ckpt_path(self) -> None:
            """Let the checkpoint's own model settings win, as they must for its weights to fit, and say so."""
            asked = _flat(self.config[self.config.subcommand].model)
            super()._parse_ckpt_path()
            model = self.config[self.config.subcommand].model
            if self.config[self.config.subcommand].get("ckpt_path"):
                model.initial_weights = None  # a run that goes on does not begin again
            used = _flat(model)
            for key in sorted(asked.keys() | used.keys()):
                if asked.get(key) != used.get(key) and key != "initial_weights":
                    log.warning(
                        "`model.%s` is %r in the checkpoint and counts; the config's %r does not.",
                        key,
                        used.get(key),
                        asked.get(key),
                    )

        def before_instantiate_classes(self) -> None:
            if self.subcommand in ("validate", "test", "predict"):
                self.config[self.subcommand].model.teacher = None  # only training asks it
            if self.subcommand == "predict":
                # callbacks write each matte as it is made; kept for a caller that is not there, all would fill memory
                self.config[self.subcommand].return_predictions = False
            self._say_which_weights()

        def _say_which_weights(self) -> None:
            config = self.config.get(self.subcommand) if self.subcommand else self.config
            checkpoint = config.get("ckpt_path")
            if checkpoint and checkpoint not in ("best", "last", "hpc", "registry"):
                from pathlib import Path

                if not Path(checkpoint).is_file():
                    raise InputError(f"`--ckpt_path`: there is no file {checkpoint!r}.")
            if not checkpoint and self.subcommand in ("validate", "test", "predict"):
                raise InputError(f"`{self.subcommand}` needs trained weights: add --ckpt_path CKPT.")

    if not any(item == "--config" or item.startswith(("--config=", "-c")) for item in arguments) and not any(
        item in ("-h", "--help", "--print_config") or item.startswith(("--help", "--print_config"))
        for item in arguments
    ):
        raise InputError("give an experiment file: --config configs/experiment/demo.yaml")
    try:
        MattingCLI(
            LitMatting,
            pl.LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": PROG, "parser_mode": "omegaconf", "description": "Text-driven image matting"},
            parser_class=MattingParser,
            args=arguments,
        )
    except MisconfigurationException as error:
        raise InputError(" ".join(str(error).split())) from error
    except OmegaConfBaseException as error:
        raise InputError(unresolved(error)) from error
    return 0


def unresolved(error: Exception) -> str:
    """Return in one sentence what a ``${...}`` of a configuration, which could not be resolved, lacks."""
    key, said = getattr(error, "full_key", None), str(error).splitlines()[0]
    place = f"`{key}`" if key else "the configuration"
    if variable := re.search(r"Environment variable '(\w+)' not found", said):
        name = variable.group(1)
        return f"{place} needs the environment variable {name}, which is not set: export {name}=... first."
    return f"{place} cannot be resolved: {said}."


def _scenes() -> list[tuple[Any, str]]:
    """Return generated scenes, none of them from training, with a phrase each; the page itself sees no data."""
    import numpy as np

    from data_modules.scenes import generate

    found = []
    for index, k, p in SHOWN:
        scene = generate(SHOWN_SEED, index, size=512)
        found.append((np.rint(scene.image * 255).astype(np.uint8), scene.phrases[k][p][0]))
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return every setting of a nested config under its dotted name."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if not isinstance(value, dict):
        return {prefix: value}
    nested = (_flat(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items())
    return {key: item for part in nested for key, item in part.items()}


def _quiet() -> None:
    """Silence advice that does not apply: one tar stream feeds the loaders, frozen parts are in eval mode."""
    for text in (
        ".*does not have many workers.*",
        ".*`IterableDataset` has `__len__`.*",
        ".*isinstance.treespec.*",
        ".*LightningCLI's args parameter.*",
        ".*in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", text)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _log_once() -> None:
    """Leave Lightning's messages to the root logger, without its advertisements: it would print each one twice."""
    logging.getLogger("lightning").handlers.clear()
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: "💡" not in record.getMessage())
