"""Reading the parts of Stable Diffusion from a folder in diffusers' layout, or from one file in the original layout.

Loading is ``safetensors``, or PyTorch's ``weights_only`` for older files: nothing here runs code from a weight file.
A file that leaves a parameter without a value is refused: the libraries themselves only warn, and train noise.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn as nn

from lit_matting.backbones.architecture import known_architectures, random_model, read_architecture
from lit_matting.backbones.text import CLIPVocabulary, HashedVocabulary, Vocabulary
from lit_matting.backbones.weights import XL_PARTS, check_parameters, find_weights, has_tokenizer
from lit_matting.checks import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

Result = TypeVar("Result")


@dataclass(frozen=True)
class Parts:
    """What a Stable Diffusion consists of, before anything is frozen or removed."""

    unet: UNet2DConditionModel
    autoencoder: AutoencoderKL | AutoencoderTiny
    text_model: Any
    """transformers' CLIPTextModel."""
    vocabulary: Vocabulary


def load_parts(
    pretrained: str | None,
    architecture: str | None = None,
    *,
    tokenizer: str | None = None,
    autoencoder: str | None = None,
    revision: str | None = None,
    unet_dtype: torch.dtype = torch.float32,
    frozen_dtype: torch.dtype = torch.float32,
) -> Parts:
    """Find and load all parts of a model, or build them with random weights.

    Args:
        pretrained: See :func:`~lit_matting.backbones.weights.find_weights`; None builds random weights.
        architecture: Needed for random weights and single files; otherwise not read.
        tokenizer: Folder or hub id with the tokenizer, where ``pretrained`` has none.
        autoencoder: Folder or hub id of another autoencoder, or None.
        revision: Commit, tag or branch, where ``pretrained`` is downloaded.
        unet_dtype: Of the UNet's weights.
        frozen_dtype: Of the other parts' weights.

    Raises:
        InputError: If a part is missing, broken, or not what a named model was published with.
    """
    if pretrained is None:
        return _random_parts(architecture, autoencoder, tokenizer, unet_dtype, frozen_dtype)
    source = find_weights(pretrained, revision)
    parts = Parts(
        unet=load_unet(source, architecture, unet_dtype),
        autoencoder=load_autoencoder(source, architecture, frozen_dtype),
        text_model=load_text_encoder(source, architecture, frozen_dtype),
        vocabulary=CLIPVocabulary(load_tokenizer(source if tokenizer is None else _find_tokenizer(tokenizer))),
    )
    check_parameters(pretrained, "unet", parts.unet)
    check_parameters(pretrained, "vae", parts.autoencoder)
    check_parameters(pretrained, "text_encoder", parts.text_model)
    return parts if autoencoder is None else replace(parts, autoencoder=_other_autoencoder(autoencoder, frozen_dtype))


@dataclass(frozen=True)
class XLParts:
    """What a Stable Diffusion XL consists of, before anything is frozen or removed."""

    unet: UNet2DConditionModel
    autoencoder: AutoencoderKL | AutoencoderTiny
    text_models: tuple[Any, Any]
    """transformers' CLIPTextModel and CLIPTextModelWithProjection."""
    vocabulary: Vocabulary


def load_xl_parts(
    pretrained: str | None,
    architecture: str | None = None,
    revision: str | None = None,
    unet_dtype: torch.dtype = torch.float32,
    frozen_dtype: torch.dtype = torch.float32,
) -> XLParts:
    """Find and load all parts of a Stable Diffusion XL, or build them with random weights.

    Arguments and errors as for :func:`load_parts`; single files are refused.
    """
    if pretrained is None:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        parts = _random_parts(architecture, None, None, unet_dtype, frozen_dtype)
        config = read_architecture(architecture or "").get("text_encoder_2")
        if config is None:
            raise InputError(f"`architecture: {architecture}` has no `text_encoder_2`: give `sdxl` or a file like it.")
        second = random_model(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**config)), frozen_dtype)
        return XLParts(parts.unet, parts.autoencoder, (parts.text_model, second), parts.vocabulary)
    source = find_weights(pretrained, revision, XL_PARTS)
    if source.is_file():
        raise InputError("`pretrained` of StableDiffusionXL must be a folder or a hub id, not a single file.")
    xl = XLParts(
        unet=load_unet(source, dtype=unet_dtype),
        autoencoder=load_autoencoder(source, dtype=frozen_dtype),
        text_models=(
            load_text_encoder(source, dtype=frozen_dtype),
            load_text_encoder(source, dtype=frozen_dtype, part="text_encoder_2", projected=True),
        ),
        vocabulary=CLIPVocabulary(load_tokenizer(source)),
    )
    for part, model in zip(XL_PARTS, (xl.unet, xl.autoencoder, *xl.text_models)):
        check_parameters(pretrained, part, model)
    return xl


def _random_parts(
    architecture: str | None,
    autoencoder: str | None,
    tokenizer: str | None,
    unet_dtype: torch.dtype,
    frozen_dtype: torch.dtype,
) -> Parts:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if architecture is None:
        raise InputError(
            "`pretrained: null` builds random weights and needs an `architecture`: one of"
            f" {', '.join(known_architectures())}, or a JSON file."
        )
    configs = read_architecture(architecture)
    text_config = CLIPTextConfig(**configs["text_encoder"])
    return Parts(
        unet=random_model(lambda: UNet2DConditionModel(**configs["unet"]), unet_dtype),
        autoencoder=random_model(lambda: AutoencoderKL(**configs["vae"]), frozen_dtype)
        if autoencoder is None
        else _other_autoencoder(autoencoder, frozen_dtype),
        text_model=random_model(lambda: CLIPTextModel(text_config), frozen_dtype),
        vocabulary=HashedVocabulary(text_config.vocab_size)
        if tokenizer is None
        else CLIPVocabulary(load_tokenizer(_find_tokenizer(tokenizer))),
    )


def _other_autoencoder(autoencoder: str, dtype: torch.dtype) -> AutoencoderKL | AutoencoderTiny:
    return load_autoencoder(find_weights(autoencoder, parts=("vae",)), dtype=dtype)


def _find_tokenizer(tokenizer: str) -> Path:
    return find_weights(tokenizer, parts=("tokenizer",))


def load_unet(
    source: Path, architecture: str | None = None, dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """Load the UNet.

    Args:
        source: Folder with the subfolder ``unet``, or a single file.
        architecture: What a single file holds; see :func:`~lit_matting.backbones.architecture.read_architecture`.
        dtype: Of the weights.

    Raises:
        InputError: If it is not there, not whole, or cannot be read without running code from it.
    """
    from diffusers import UNet2DConditionModel

    return _load_diffusers(UNet2DConditionModel, source, "unet", architecture, dtype)


def load_autoencoder(
    source: Path, architecture: str | None = None, dtype: torch.dtype = torch.float32
) -> AutoencoderKL | AutoencoderTiny:
    """Load the autoencoder, of either kind: from the subfolder ``vae``, or from a folder that holds nothing else.

    Arguments and errors as for :func:`load_unet`.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    if source.is_file():
        return _load_diffusers(AutoencoderKL, source, "vae", architecture, dtype)
    part = "" if (source / "config.json").is_file() else "vae"
    kinds: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    name = _read_config(source / part).get("_class_name", "AutoencoderKL")
    if name not in kinds:
        raise InputError(f"{source / part} holds a {name}, but the image encoder must be an {' or '.join(kinds)}.")
    return _load_diffusers(kinds[name], source, part, architecture, dtype)


def load_text_encoder(
    source: Path,
    architecture: str | None = None,
    dtype: torch.dtype = torch.float32,
    part: str = "text_encoder",
    projected: bool = False,
) -> Any:
    """Load transformers' CLIPTextModel, or CLIPTextModelWithProjection.

    Other arguments and errors as for :func:`load_unet`.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    if source.is_file():
        # the only code that knows how the original files spell their text encoder; not a public name of diffusers
        from diffusers.loaders.single_file_utils import (
            create_diffusers_clip_model_from_ldm,
            load_single_file_checkpoint,
        )

        with _configuration_folder(architecture, source) as folder:
            model = _read(
                source,
                lambda: create_diffusers_clip_model_from_ldm(
                    kind,
                    load_single_file_checkpoint(str(source)),
                    subfolder=part,
                    config=folder,
                    torch_dtype=dtype,
                    local_files_only=True,
                ),
            )
        _check_values(source, model, [])
        return model
    _read_config(source / part)
    return _whole(
        source / part,
        lambda: kind.from_pretrained(
            source, subfolder=part, dtype=dtype, local_files_only=True, output_loading_info=True
        ),
    )


def load_tokenizer(source: Path, part: str = "tokenizer") -> Any:
    """Load transformers' CLIPTokenizer from the subfolder ``part``, or from a folder that holds nothing else.

    Raises:
        InputError: If there is none.
    """
    from transformers import CLIPTokenizer

    folder = source / part if (source / part).is_dir() else source
    if not has_tokenizer(folder):
        raise InputError(
            f"{source} holds no tokenizer (vocab.json and merges.txt, or tokenizer.json): give a folder that does as"
            " `tokenizer`, for example that of any Stable Diffusion 1 or 2."
        )
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _load_diffusers(kind: Any, source: Path, part: str, architecture: str | None, dtype: torch.dtype) -> Any:
    if source.is_file():
        with _configuration_folder(architecture, source) as folder:
            model = _read(
                source,
                lambda: kind.from_single_file(
                    str(source), config=folder, subfolder=part, torch_dtype=dtype, local_files_only=True
                ),
            )
        _check_values(source, model, [])
        return model
    _read_config(source / part)
    return _whole(
        source / part,
        lambda: kind.from_pretrained(
            source, subfolder=part or None, torch_dtype=dtype, local_files_only=True, output_loading_info=True
        ),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist, so {folder.parent} is no folder in diffusers' layout: it needs the subfolders"
            " unet, vae, text_encoder and tokenizer."
        )
    return json.loads(path.read_text())


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every part it loads: a library logs, it does not draw."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _read(source: Path, load: Callable[[], Result]) -> Result:
    try:
        with no_progress_bars():
            return load()
    except InputError:
        raise
    except Exception as error:  # whatever the two libraries raise, the file is what the user gave
        raise InputError(f"{source} could not be read: {type(error).__name__}: {error}") from error


def _whole(source: Path, load: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> Any:
    model, report = _read(source, load)
    _check_values(source, model, [*report["missing_keys"], *(str(key) for key in report.get("mismatched_keys", ()))])
    return model


def _check_values(source: Path, model: nn.Module, missing: list[str]) -> None:
    missing = missing or [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise InputError(
            f"{source} does not hold the whole {type(model).__name__}: {len(missing)} parameters are missing, the first"
            f" is {missing[0]}; download it again, or correct `architecture` if it is a single file."
        )


@contextmanager
def _configuration_folder(architecture: str | None, source: Path) -> Iterator[str]:
    """A folder of configurations as diffusers wants it beside a single file, which has none inside."""
    if architecture is None:
        raise InputError(
            f"`pretrained` is the single file {source.name}, which does not say what it holds: give its `architecture`."
        )
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    with tempfile.TemporaryDirectory() as folder:
        for part, config in read_architecture(architecture).items():
            named = {"_class_name": classes[part]} if part in classes else {"model_type": "clip_text_model"}
            path = Path(folder) / part / "config.json"
            path.parent.mkdir()
            path.write_text(json.dumps({**named, **config}))
        yield folder
