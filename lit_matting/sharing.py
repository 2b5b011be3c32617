"""Models as folders that can be shared: weights as safetensors, a configuration, a card for people."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lit_matting.checkpoints import Checkpoint
from lit_matting.checks import InputError
from lit_matting.files import whole_file, write_whole
from lit_matting.metrics.report import overview_table
from lit_matting.version import VERSION

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_SCORES = (
    "`alpha` is the refined matte; below it what it was made from, and mattes that cannot read, to compare with."
    " Grounding: the matte overlaps the phrase's thing more than any other; strict: by a soft IoU above 0.5; swap:"
    " both of two phrases for different things of one image. SAD, Grad and Conn in thousands."
)


def write_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Write weights and configuration into a folder; the configuration last, so that it stands for a whole model."""
    with whole_file(folder / WEIGHTS_FILE) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(checkpoint.weights, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
    fields = dataclasses.fields(checkpoint)
    checkpoint.file_sha256()
    about = {item.name: getattr(checkpoint, item.name) for item in fields if item.name not in ("weights", "file")}
    # one key of our own: the hub's mixin would read the others as arguments of the pipeline
    content = {"lit_matting": {**about, "version": VERSION}}
    write_whole((json.dumps(content, indent=2) + "\n").encode(), folder / CONFIG_FILE)


def read_folder(folder: Path, name: str) -> Checkpoint:
    """Read what :func:`write_folder` wrote; ``name`` is what the user called it.

    Raises:
        InputError: If a file is missing, damaged or of another project.
    """
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for file in (config, weights):
        if not file.is_file():
            raise InputError(f"{name!r} was not made by save_pretrained: it has no {file.name}.")
    try:
        about = json.loads(config.read_text(encoding="utf-8"))["lit_matting"]
        return Checkpoint(
            network=dict(about["network"]),
            weights=load_file(weights),
            image_size=int(about["image_size"]),
            threshold=about["threshold"],
            frozen=dict(about.get("frozen", {})),
            origin=dict(about["origin"]),
            known_sha256=list(about.get("known_sha256", [])),
        )
    except SafetensorError as error:
        raise InputError(f"the weights in {name!r} are damaged: {error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name!r} was not made by save_pretrained of lit_matting: see its {CONFIG_FILE}.") from error


def download(name: str, **options: Any) -> Path:
    """Fetch a model from the hub and return its folder; ``options`` are those of ``snapshot_download``.

    Raises:
        InputError: If there is no such model, or no way to it; the message says what was tried.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE], **options))
    except LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE or options.get("local_files_only")
        asked = "was not asked (HF_HUB_OFFLINE or `local_files_only`)" if offline else "cannot be reached"
        cache = str(options.get("cache_dir") or constants.HF_HUB_CACHE)
        raise InputError(
            f"{name!r} is neither a file or folder here nor a model of the Hugging Face hub that can be had: it was not"
            f" downloaded to {cache!r} earlier, and the hub {asked}."
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"{name!r} is neither a file or folder here nor a model of the Hugging Face hub that can be had:"
            f" {' '.join(str(error).split())[:200]}."
        ) from error


def origin_of(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return what a model card says of where the weights are from."""
    if checkpoint is None:
        return {}
    frozen = ", ".join(f"{name} (SHA-256 {sha256})" for name, sha256 in checkpoint.frozen.items())
    origin = {
        key.replace("_", " ").capitalize(): value for key, value in checkpoint.origin.items() if key != "backbone"
    }
    return {"Its frozen parts, not in this folder": frozen or None, **origin}


def report_summary(path: str | os.PathLike[str], checkpoint: Checkpoint | None) -> str:
    """Return what a model card says of a report that ``python -m lit_matting test`` wrote, as Markdown.

    Args:
        path: The ``report.json``.
        checkpoint: What the card is of. Scores of other weights are refused: in a card, which travels with these, a
            remark beside them would be overlooked.

    Raises:
        InputError: If there is no such report, it is of another kind, or it judged another checkpoint.
    """
    path = Path(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        judged, protocol = report["run"]["checkpoint_sha256"], report["protocol"]
        about = {
            "Protocol": f"{protocol['name']} (SHA-256 {protocol['sha256']})" if protocol else "none",
            "Checkpoint judged": f"SHA-256 {judged}",
            "Square the network saw": f"{report['image_size'] or 'unknown'} pixels",
            "Judged": f"{report['written']}, lit_matting {report['versions']['lit_matting']}",
        }
        text = f"{report['statement']}\n\n{overview_table(report['scores'])}\n\n{_SCORES}\n\n{_table('', '', about)}"
    except OSError as error:
        raise InputError(f"the report {str(path)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(
            f"{str(path)!r} is not the report.json of `python -m lit_matting test`, or was written by another version."
        ) from error
    known = [] if checkpoint is None else checkpoint.file_sha256()
    if judged not in known:
        other = f"checkpoint {judged[:12]}" if judged else "weights in memory"
        own = f"of {' or '.join(sha256[:12] for sha256 in known)}" if known else "of a file that is not known any more"
        raise InputError(
            f"the report {str(path)!r} judged {other}, but these weights are {own}: judge them by `python -m"
            " lit_matting test --ckpt_path CKPT`, and give that report."
        )
    return text


def model_card(
    about: Mapping[str, Any], license: str | None, results: Mapping[str, Any], notes: str, report: str = ""
) -> ModelCard:
    """Return the card of a model: what it is, how to use it, what was measured.

    Args:
        about: What it is; None is left out.
        license: Of the weights, as the hub spells it.
        results: What was measured, and how much it was.
        notes: Further text.
        report: What :func:`report_summary` returned.
    """
    table = _table("", "", {name: value for name, value in about.items() if value is not None})
    scores = _table("measure", "value", results) if results else ""
    measured = "\n".join(filter(None, [report, scores])) or "Not evaluated, or not stated.\n"
    # without a licence the hub shows none, which is the truth
    licence = f"license: {license}\n" if license else ""
    return ModelCard(
        f"---\nlibrary_name: lit_matting\npipeline_tag: image-segmentation\n{licence}"
        "tags:\n- image-matting\n- referring-image-matting\n---\n"
        "# Text-driven image matting\n\n"
        "A photo and a phrase in, the alpha matte of exactly that thing out.\n\n"
        "```python\nfrom lit_matting import MattingPipeline\n\n"
        'matting = MattingPipeline.from_pretrained("this folder or model")\n'
        'matting("photo.jpg", "the red umbrella").cutout.save("umbrella.png")\n```\n\n'
        f"{table}\n## Results\n\n{measured}\n{notes}\n"
    )


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    return f"| {left} | {right} |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())
