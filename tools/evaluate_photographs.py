"""Score a checkpoint on real photographs with a true alpha, beside what cannot read, and write the table down.

    python tools/evaluate_photographs.py --checkpoint outputs/compact/last.ckpt --data ../shared/data/real_alpha

DATA is a folder with an `index.json`: a list of {"id", "image", "alpha", "expressions", ...}. Every expression of a
photograph is asked once, at the photograph's own size; errors are averaged over its expressions, then over the
photographs of a group (the part of the id before the first `_`). Beside the model stand mattes that need no model:
nothing, everything, and the mean alpha of all the *other* photographs of the group, which knows where photographers put
things. Two rows show whether the phrase is read: the same photographs asked for "the foreground", and asked with the
phrases of the photograph before.

    --pictures FOLDER   a sheet for each photograph: image, trimap, matte, cut-out, and the truth (do not publish those
                        of photographs whose licence does not allow it)
    --figure FILE       one picture of the permissively licensed photographs: image, first phrase's matte, that of "the
                        foreground", its cut-out, and the truth
    --only GLOB         only photographs of such ids
    --report FILE       the report.json of `python -m lit_matting test`, for the table of the unseen cut-outs
    --collect           run nothing: take what an earlier run wrote to OUT
    --document FILE     write the tables between the markers of `--name` in this file, for example docs/RESULTS.md
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.checks import InputError
from lit_matting.files import whole_file, write_whole
from lit_matting.metrics import functional
from lit_matting.metrics.referring import soft_iou
from lit_matting.metrics.report import markdown_table, to_csv, to_json
from lit_matting.pipeline import MattingPipeline
from lit_matting.targets import scaled_kernel, trimap_from_alpha
from tools.documents import around_markers, write_between_markers

ERRORS = {"mae": "MAE", "band_mae": "band MAE", "soft_iou": "soft IoU"}
BLIND = ("nothing", "everything", "the mean alpha of the others")
FOREGROUND = "the foreground"
PUBLISHED = {
    "U2Net, saliency": {"am": 0.115, "p3m": 0.032},
    "U2NetP, saliency": {"am": 0.083, "p3m": 0.049},
    "closed-form matting with the true trimap": {"am": 0.012},
}
"""Mean absolute errors that ../shared/data/README.md states for the same photographs; not measured by this script."""


@dataclass(frozen=True)
class Example:
    """One photograph of the index."""

    id: str
    image: Path
    alpha: Path
    phrases: tuple[str, ...]
    licence_class: str

    @property
    def group(self) -> str:
        """The part of the id before the first underscore."""
        return self.id.split("_")[0]


def read_index(folder: Path) -> list[Example]:
    """Return the photographs of a folder.

    Raises:
        InputError: If there is no index, or an entry lacks something.
    """
    try:
        entries = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        examples = [
            Example(
                entry["id"],
                folder / entry["image"],
                folder / entry["alpha"],
                tuple(entry["expressions"]),
                entry.get("licence_class", "unstated"),
            )
            for entry in entries
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"`--data`: {folder} needs an index.json with id, image, alpha and expressions: {error!r}."
        ) from error
    if not examples or not all(example.phrases for example in examples):
        raise InputError(f"`--data`: {folder} has no photographs, or one without expressions.")
    return examples


def read_alpha(path: Path) -> np.ndarray:
    """Return an alpha (H, W) float32 in [0, 1]."""
    array = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if array is None:
        raise InputError(f"{path} cannot be read as an image.")
    return array.astype(np.float32) / 255


def errors_of(matte: np.ndarray, alpha: np.ndarray, band: np.ndarray) -> dict[str, float]:
    """Return the errors of a matte (H, W) against the true alpha (H, W), ``band`` (H, W) bool being its transition."""
    return {
        "mae": functional.mad(matte, alpha),
        "band_mae": functional.mad(matte, alpha, band),
        "soft_iou": soft_iou(torch.from_numpy(matte)[None], torch.from_numpy(alpha)[None]).item(),
    }


def band_of(alpha: np.ndarray) -> np.ndarray:
    """Return the transition band (H, W) bool of a true alpha, as the score card draws it."""
    trimap = trimap_from_alpha(torch.from_numpy(alpha)[None, None], scaled_kernel(max(alpha.shape)))
    return (trimap[0, 0] == 0.5).numpy()


def score(
    pipeline: MattingPipeline, examples: Sequence[Example], pictures: Path | None, figure: Path | None
) -> list[dict[str, Any]]:
    """Return one row for each photograph, method and phrase."""
    shown: list[np.ndarray] = []
    alphas = {example.id: read_alpha(example.alpha) for example in examples}
    rows: list[dict[str, Any]] = []
    for number, example in enumerate(tqdm(examples, unit="photograph", disable=None)):
        alpha = alphas[example.id]
        band = band_of(alpha)
        others = [alphas[one.id] for one in examples if one.group == example.group and one is not example]
        size = alpha.shape[::-1]
        shrunk = [cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in others]
        mean = np.mean(shrunk, axis=0, dtype=np.float32) if shrunk else np.full_like(alpha, 0.5)
        mattes: list[tuple[str, str, np.ndarray]] = [
            ("nothing", "", np.zeros_like(alpha)),
            ("everything", "", np.ones_like(alpha)),
            ("the mean alpha of the others", "", mean),
        ]
        seen = pipeline.encode(example.image)
        wrong = examples[number - 1].phrases
        asked = {"model": example.phrases, FOREGROUND: (FOREGROUND,), "the phrases of another photograph": wrong}
        for method, phrases in asked.items():
            results = pipeline(seen, list(phrases))
            mattes += [(method, result.phrase, result.alpha) for result in results]
            if method == "model":
                named = results[0]
            if method == FOREGROUND and figure is not None and example.licence_class == "permissive":
                shown.append(_row([_picture(named), named.alpha, results[0].alpha, _cut_out(results[0]), alpha]))
            if method == "model" and pictures is not None:
                write_sheet(results, alpha, pictures / f"{example.id}.png")
        for method, phrase, matte in mattes:
            rows.append(
                {
                    "key": example.id,
                    "group": example.group,
                    "method": method,
                    "phrase": phrase,
                    **errors_of(matte, alpha, band),
                }
            )
    if figure is not None and shown:
        _save(shown, figure)
    return rows


def means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return method -> group -> error, each photograph counting alike however many phrases it has."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        for group in dict.fromkeys(row["group"] for row in rows):
            mine = [row for row in rows if row["method"] == method and row["group"] == group]
            keys = list(dict.fromkeys(row["key"] for row in mine))
            result.setdefault(method, {})[group] = {
                error: float(np.mean([np.mean([row[error] for row in mine if row["key"] == key]) for key in keys]))
                for error in ERRORS
            }
    return result


def photograph_table(table: dict[str, dict[str, dict[str, float]]], counts: dict[str, int], model: str) -> str:
    """Return the means as a Markdown table, published figures last."""
    header = [""] + [f"{count} {group}: {title}" for group, count in counts.items() for title in ERRORS.values()]
    titles = {
        "model": f"{model}, by phrase",
        FOREGROUND: f"{model}, asked for “{FOREGROUND}”",
        "the phrases of another photograph": f"{model}, asked with another photograph's phrases",
    }
    order = [name for name in table if name not in BLIND] + [name for name in table if name in BLIND]
    rows = [
        [titles.get(name, name), *(f"{table[name][group][error]:.3f}" for group in counts for error in ERRORS)]
        for name in order
    ]
    for name, figures in PUBLISHED.items():
        if set(figures) <= set(counts):
            cells = [
                f"{figures[group]:.3f}" if error == "mae" and group in figures else ""
                for group in counts
                for error in ERRORS
            ]
            rows.append([f"*{name} (stated in shared/data/README.md)*", *cells])
    return markdown_table(header, rows)


def unseen_table(report: dict[str, Any]) -> str:
    """Return the score card of the test run: the matte, what it is made from, and the blind baselines."""
    cards = report["scores"]
    names = {"all_zero": "nothing", "perfect_all": "everything, perfectly", "perfect_random": "one thing, blindly"}
    tables = {name: card["overall"] for name, card in cards.items()}
    tables |= {f"*{names[name]}*": card["overall"] for name, card in cards["alpha"]["baselines"].items()}
    shown = {
        "grounding_accuracy": "grounding accuracy",
        "strict_accuracy": "strict",
        "swap_accuracy": "swap",
        "soft_iou": "soft IoU",
        "sad": "SAD",
        "band_mae": "band MAE",
    }
    rows = [[name, *(_cell(card.get(key)) for key in shown)] for name, card in tables.items()]
    return markdown_table(["", *shown.values()], rows)


def _cell(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3f}"


def write_sheet(results: Sequence[Any], alpha: np.ndarray, path: Path) -> None:
    """Write a picture of one photograph: for each phrase image, trimap, matte, cut-out on green; the truth last."""
    _save(
        [_row([_picture(result), result.trimap, result.alpha, _cut_out(result), alpha]) for result in results],
        path,
    )


def _picture(result: Any) -> np.ndarray:
    return result.photo.as_float()


def _cut_out(result: Any) -> np.ndarray:
    alpha = result.alpha[..., None]
    return _picture(result) * alpha + np.array([0.1, 0.7, 0.2]) * (1 - alpha)


def _row(tiles: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([_tile(tile, 240) for tile in tiles], axis=1)


def _save(rows: Sequence[np.ndarray], path: Path) -> None:
    widest = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    with whole_file(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="JPEG" if path.suffix == ".jpg" else "PNG")


def _tile(array: np.ndarray, height: int) -> np.ndarray:
    array = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    width = max(1, round(array.shape[1] * height / array.shape[0]))
    return cv2.resize(array, (width, height), interpolation=cv2.INTER_AREA)


def main(arguments: Sequence[str] | None = None) -> int:
    """Score the photographs; see the module."""
    parser = argparse.ArgumentParser(prog="evaluate_photographs.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="of `python -m lit_matting fit`")
    parser.add_argument("--data", type=Path, required=True, help="folder with index.json")
    parser.add_argument("--report", type=Path, help="report.json of `python -m lit_matting test`, to show as well")
    parser.add_argument("--out", type=Path, help="folder for photographs.json and photographs.csv")
    parser.add_argument("--collect", action="store_true", help="run nothing: take what an earlier run wrote to --out")
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each photograph")
    parser.add_argument("--figure", type=Path, help="one picture of the permissively licensed photographs")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only photographs of such ids")
    parser.add_argument("--document", type=Path, help="write the tables between the markers of `--name` in it")
    parser.add_argument("--name", default="compact", help="of the markers, and of the model in the table")
    options = parser.parse_args(arguments)
    try:
        if options.collect and not options.out:
            raise InputError("`--collect` reads what an earlier run wrote: say where with `--out`.")
        if options.document:
            around_markers(options.document, options.name)  # before the work, not after it
        examples = [one for one in read_index(options.data) if fnmatch.fnmatchcase(one.id, options.only)]
        if not examples:
            raise InputError(f"`--only` {options.only!r} matches no photograph of {options.data}.")
        if options.collect:
            kept = json.loads((options.out / "photographs.json").read_text())
            table, counts, command, rows = kept["means"], kept["counts"], kept["command"], []
        else:
            pipeline = MattingPipeline.from_checkpoint(options.checkpoint)
            rows = score(pipeline, examples, options.pictures, options.figure)
            table = means(rows)
            groups = [example.group for example in examples]
            counts = {group: groups.count(group) for group in dict.fromkeys(groups)}
            command = " ".join(["python", "tools/evaluate_photographs.py", *(arguments or sys.argv[1:])])
        text = f"`{command}`\n\n{photograph_table(table, counts, options.name)}"
        if options.report:
            report = json.loads(options.report.read_text())
            count = report["scores"]["alpha"]["overall"]["count"]
            text = f"{count} phrases for unseen cut-outs:\n\n{unseen_table(report)}\n\nReal photographs: {text}"
        if options.document:
            write_between_markers(text, options.name, options.document)
    except (InputError, OSError) as error:
        print(f"evaluate_photographs: error: {error}", file=sys.stderr)
        return 2
    print(text)
    if options.out and not options.collect:
        write_whole(to_csv(rows), options.out / "photographs.csv")
        write_whole(to_json({"means": table, "counts": counts, "command": command}), options.out / "photographs.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
