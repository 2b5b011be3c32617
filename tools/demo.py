"""The whole road on generated scenes: shards, training, judging, a picture and a table.

    python tools/demo.py                   # configs/experiment/demo.yaml
    python tools/demo.py --config configs/experiment/demo_long.yaml --folder outputs/demo_long --scenes 24000

Every step is one of the project's own commands and is printed before it runs, so that it can be run alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from data_modules.decode import decode_sample
from data_modules.shards import ShardIndex
from lit_matting.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "alpha": "refined alpha",
    "alpha_lr": "unrefined alpha",
    "trimap": "trimap",
    "grounding": "grounding map",
    "all_zero": "baseline: nothing",
    "perfect_all": "baseline: every object, perfect",
    "perfect_random": "baseline: one object blindly, perfect",
}
# without found_rate: every scene has several objects, and there it is the grounding accuracy
COLUMNS = {
    "grounding_accuracy": "grounding",
    "strict_accuracy": "strict",
    "swap_accuracy": "swap",
    "strict_swap_accuracy": "strict swap",
    "soft_iou": "soft IoU",
    "sad": "SAD",
    "band_mae": "band MAE",
}
CELL = 128
PICTURE_IMAGES = 4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/demo.py", description="Train, judge and show the demo.")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/experiment/demo.yaml", help="experiment to run")
    parser.add_argument("--folder", type=Path, default=Path("outputs/demo"), help="where that experiment writes")
    parser.add_argument("--scenes", type=int, default=12000, help="training scenes (default %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of training; default: the experiment's own")
    parser.add_argument("--picture-only", action="store_true", help="draw and print again what is already there")
    options = parser.parse_args(arguments)
    checkpoint = options.folder / "last.ckpt"
    started = time.monotonic()
    if not options.picture_only:
        shards = options.folder / "shards"
        make_scenes(shards, options.scenes)
        config = ["--config", str(_shortest(options.config))]
        seed = [] if options.seed is None else ["--seed_everything", str(options.seed)]
        _run("-m", "lit_matting", "fit", *config, *seed)
        _run("-m", "lit_matting", "test", *config, "--ckpt_path", str(checkpoint))
        held_out = ["--shards", str(shards / "val.index.json"), "--judge", str(shards / "test.index.json")]
        figures = ["--out", str(options.folder / "calibration.json")]
        _run("tools/calibrate.py", str(checkpoint), *held_out, *figures)
    picture = draw(checkpoint, options.folder / "shards/test.index.json", options.folder / "picture.png")
    report = json.loads((options.folder / "report.json").read_text())
    console = Console(width=max(100, Console().width))
    for table in tables(report):
        console.print(table)
    # the largest of the commands above; Linux counts in KiB
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    memory = "" if options.picture_only else f", at most {peak:.1f} GiB of memory"
    console.print(
        f"took {time.monotonic() - started:.0f} s{memory}; picture: [bold]{picture}[/]; figures:"
        f" {options.folder}/report.json"
    )
    console.print(
        f'next: {_python()} -m lit_matting matte PHOTO.jpg "the red one" --checkpoint {checkpoint} -o cutout.png\n'
        "      (this model has only ever seen generated scenes; see docs/DATA.md for training on your own images)",
        highlight=False,
    )
    return 0


def _python() -> str:
    """Return how the user calls this interpreter from here."""
    return str(_shortest(Path(sys.executable)))


def _shortest(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _run(*arguments: str) -> None:
    print(f"$ python {' '.join(arguments)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    code = subprocess.call([sys.executable, *arguments], env=environment)
    if code:
        raise SystemExit(code)


def make_scenes(folder: Path, scenes: int) -> None:
    """Make the shards of a demo, unless they are there with so many training scenes."""
    if not _complete(folder, scenes):
        _run(str(_shortest(ROOT / "tools/scene_shards.py")), str(folder), "--train", str(scenes))


def _complete(folder: Path, scenes: int) -> bool:
    try:
        counts = [len(ShardIndex.load(folder / f"{split}.index.json")) for split in ("train", "val", "test")]
    except (OSError, ValueError):
        return False
    return counts[0] == scenes


# --- the table


def tables(report: dict[str, Any]) -> list[Table]:
    """Return the demo's tables from a report: every method overall, and the refined alpha by kind of phrase."""
    scores = report["scores"]
    cards = {name: scores[name]["overall"] for name in ("alpha", "alpha_lr", "trimap", "grounding")}
    cards |= {name: card["overall"] for name, card in scores["alpha"]["baselines"].items()}
    overall = Table(title=f"{cards['alpha']['count']} phrases on held-out scenes")
    overall.add_column("")
    for title in COLUMNS.values():
        overall.add_column(title, justify="right")
    for name, title in METHODS.items():
        overall.add_row(title, *(_number(cards[name].get(column)) for column in COLUMNS))
    kinds = Table(title="refined alpha, by kind of phrase")
    kinds.add_column("")
    for title in COLUMNS.values():
        kinds.add_column(title, justify="right")
    for kind, card in scores["alpha"]["kinds"].items():
        kinds.add_row(f"{kind} ({card['count']})", *(_number(card.get(column)) for column in COLUMNS))
    return [overall, kinds]


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"


# --- the picture


def draw(checkpoint: Path, index: Path, path: Path) -> Path:
    """Draw image | phrase | trimap | alpha | cut-out for the first held-out scenes, two phrases each."""
    from lit_matting.pipeline import MattingPipeline

    pipeline = MattingPipeline.from_checkpoint(checkpoint)
    shards = ShardIndex.load(index)
    rows = []
    for number in range(len(shards)):
        sample = shards.read(number)
        # not the first phrase each: with the scene's number the kinds take turns
        phrases = [item.phrases[number % len(item.phrases)].text for item in sample.instances if item.phrases][:2]
        if len(phrases) < 2:
            continue
        image = Image.fromarray(decode_sample(sample, ()).image)
        for phrase, result in zip(phrases, pipeline(image, phrases)):
            rows.append(_row(image, phrase, result))
        if len(rows) == 2 * PICTURE_IMAGES:
            break
    # two scenes beside each other: a picture of eight rows would not fit on a first screen
    head = _head()
    sheet = Image.new("RGB", (2 * head.width + CELL // 4, head.height + rows[0].height * len(rows) // 2), "white")
    for column in range(2):
        left = column * (head.width + CELL // 4)
        sheet.paste(head, (left, 0))
        for place, row in enumerate(rows[column * len(rows) // 2 : (column + 1) * len(rows) // 2]):
            sheet.paste(row, (left, head.height + place * row.height))
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _head() -> Image.Image:
    titles = ("image", "phrase", "trimap", "alpha", "cut-out")
    head = Image.new("RGB", (len(titles) * (CELL + 4), 22), "white")
    for place, title in enumerate(titles):
        middle = place * (CELL + 4) + CELL / 2
        ImageDraw.Draw(head).text((middle, 11), title, "black", ImageFont.load_default(13), anchor="mm")
    return head


def _row(image: Image.Image, phrase: str, result: Any) -> Image.Image:
    cells = [
        image,
        _words(phrase),
        _grey(result.trimap),
        _grey(result.alpha),
        _on_checkerboard(result.cutout),
    ]
    row = Image.new("RGB", (len(cells) * (CELL + 4), CELL + 4), "white")
    for place, cell in enumerate(cells):
        row.paste(cell.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (place * (CELL + 4) + 2, 2))
    return row


def _grey(values: Any) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(np.asarray(values, np.float32), 0, 1) * 255).astype(np.uint8))


def _words(phrase: str) -> Image.Image:
    cell = Image.new("RGB", (CELL, CELL), "white")
    font = ImageFont.load_default(16)
    lines, line = [], ""
    for word in phrase.split():
        if font.getlength(f"{line} {word}") > CELL - 16:
            lines, line = [*lines, line], word
        else:
            line = f"{line} {word}".strip()
    ImageDraw.Draw(cell).multiline_text(
        (CELL / 2, CELL / 2), "\n".join([*lines, line]), "black", font, anchor="mm", align="center"
    )
    return cell


def _on_checkerboard(cutout: Image.Image) -> Image.Image:
    pixels = np.asarray(cutout.resize((CELL, CELL), Image.Resampling.LANCZOS), np.float32)
    y, x = np.mgrid[:CELL, :CELL] // 11
    board = np.where((x + y) % 2, 205, 245)[..., None].astype(np.float32)
    share = pixels[..., 3:] / 255
    return Image.fromarray(np.rint(share * pixels[..., :3] + (1 - share) * board).astype(np.uint8))


if __name__ == "__main__":
    cv2.setNumThreads(1)
    sys.exit(main())
