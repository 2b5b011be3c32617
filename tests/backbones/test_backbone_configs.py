"""Every file in configs/backbone builds what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from tiny_models import save_tiny_pipeline

from lit_matting.backbones import Backbone, Compact, StableDiffusion, TinyDiffusion
from lit_matting.backbones.architecture import known_architectures
from lit_matting.backbones.weights import NAMED
from lit_matting.checks import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "backbone"
STUDENTS = ["sd21_student_base", "sd21_student_small", "sd21_student_tiny_mid", "sd21_student_tiny"]
STABLE_DIFFUSION = ["sd15", "sd21", "sd21_base", "sd_turbo", *STUDENTS]


def parse(*arguments: str) -> tuple[ArgumentParser, object]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    return parser, parser.parse_args(list(arguments))


def test_tiny_builds() -> None:
    parser, config = parse(f"--backbone={CONFIGS / 'tiny.yaml'}")
    assert isinstance(parser.instantiate(config).backbone, TinyDiffusion)


def test_compact_builds() -> None:
    try:
        Compact()
    except InputError as error:  # its default parts are packages of their own
        pytest.skip(str(error))
    parser, config = parse(f"--backbone={CONFIGS / 'compact.yaml'}")
    backbone = parser.instantiate(config).backbone
    assert isinstance(backbone, Compact)
    assert backbone.max_tokens == 24


def test_every_file_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"tiny", "compact", "sdxl", *STABLE_DIFFUSION}


def test_the_xl_file_names_known_weights() -> None:
    arguments = parse(f"--backbone={CONFIGS / 'sdxl.yaml'}")[1].backbone.init_args
    assert NAMED[arguments.pretrained].architecture == arguments.architecture


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_stable_diffusion_builds_from_a_folder_given_on_the_command_line(name: str, tmp_path: Path) -> None:
    save_tiny_pipeline(tmp_path)
    parser, config = parse(
        f"--backbone={CONFIGS / name}.yaml",
        f"--backbone.init_args.pretrained={tmp_path}",
        # the tiny text encoder has three layers
        "--backbone.init_args.text_layers=null",
    )
    backbone = parser.instantiate(config).backbone
    assert isinstance(backbone, StableDiffusion)
    assert backbone.max_tokens == 40
    assert backbone.unet.is_gradient_checkpointing
    assert (backbone.pruning is not None) == (name in STUDENTS)
    # sd15 pads with the end token, which is the last of the vocabulary; the others with id 0
    assert backbone.text_encoder.words.pad == (519 if name == "sd15" else 0)


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_the_named_weights_belong_to_the_architecture(name: str) -> None:
    arguments = parse(f"--backbone={CONFIGS / name}.yaml")[1].backbone.init_args
    assert NAMED[arguments.pretrained].architecture == arguments.architecture
    assert arguments.architecture in known_architectures()


def test_random_weights_are_one_argument_away() -> None:
    config = parse(f"--backbone={CONFIGS / 'sd21.yaml'}", "--backbone.init_args.pretrained=null")[1]
    assert config.backbone.init_args.pretrained is None
    assert config.backbone.init_args.architecture == "sd21"


@pytest.mark.parametrize("name", [*STABLE_DIFFUSION, "sdxl"])
@pytest.mark.parametrize("before", ["sd21_student_tiny", "sdxl", "tiny", "compact"])
def test_nothing_of_the_file_before_survives_a_swap(before: str, name: str) -> None:
    # arguments that two classes share outlive a change of class, so each file states all that any other states
    alone = parse(f"--backbone={CONFIGS / name}.yaml")[1].backbone
    swapped = parse(f"--backbone={CONFIGS / before}.yaml", f"--backbone={CONFIGS / name}.yaml")[1].backbone
    assert swapped.class_path == alone.class_path
    assert swapped.init_args == alone.init_args
