"""Draw docs/using.jpg: what a checkpoint makes of two generated scenes and of real photographs, chosen beforehand.

    python tools/using_pictures.py outputs/demo/last.ckpt --photographs ../shared/data/real_alpha

One row for each phrase: the photo, where the network looked, the trimap, the matte, the cut-out, and under the phrase
how sure the network is. The scenes are the first two of a seed that no experiment trains on, so nothing is picked for
its looks; of the photographs only those are shown whose licence lets them be published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageDraw, ImageFont

from data_modules.scenes import generate
from lit_matting.checks import InputError
from lit_matting.cli import SHOWN_SEED
from lit_matting.files import whole_file
from lit_matting.page.views import grounding_overlay, small_cutout, small_photo, trimap_overlay
from lit_matting.pictures import as_integers
from lit_matting.pipeline import MattingPipeline
from lit_matting.results import MattingResult
from tools.evaluate_photographs import read_index

ROOT = Path(__file__).resolve().parents[1]
SCENE_SIDE = 256
HEIGHT, WORDS, GAP = 150, 190, 4
"""Of a row, of the column with the phrase, and between pictures, in pixels."""
TITLES = ("photo", "where it looked", "trimap", "alpha", "cut-out")
SHOWN_PHOTOGRAPHS = ("p3m_man_denim", "p3m_two_women")
GENERAL = "the foreground"


@dataclass(frozen=True)
class Question:
    """A photo and the phrases it is asked for."""

    photo: Any
    phrases: tuple[str, ...]


def scenes(count: int = 2) -> list[Question]:
    """Return generated scenes, each with the second phrase of its first two objects."""
    found = []
    for number in range(count):
        scene = generate(SHOWN_SEED, number, size=SCENE_SIDE)
        phrases = tuple(phrases[min(number + 1, len(phrases) - 1)][0] for phrases in scene.phrases[:2])
        found.append(Question(as_integers(scene.image), phrases))
    return found


def photographs(folder: Path) -> list[Question]:
    """Return the photographs of a folder that may be published, with their first phrase and a general one.

    Raises:
        InputError: If the folder has no index.
    """
    return [
        Question(example.image, (example.phrases[0], GENERAL))
        for example in read_index(folder)
        if example.licence_class == "permissive" and example.id in SHOWN_PHOTOGRAPHS
    ]


def draw(matting: MattingPipeline, questions: Sequence[Question]) -> Image.Image:
    """Return the picture: a row for each phrase."""
    rows = [_row(result) for question in questions for result in matting(question.photo, list(question.phrases))]
    cell = max(row[0].width for row in rows)
    width = WORDS + len(TITLES) * (cell + GAP)
    sheet = Image.new("RGB", (width, 24 + len(rows) * (HEIGHT + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(TITLES):
        pen.text((WORDS + column * (cell + GAP) + cell / 2, 12), title, "black", font, anchor="mm")
    results = (phrase for question in questions for phrase in question.phrases)
    for number, (row, phrase) in enumerate(zip(rows, results)):
        top = 24 + number * (HEIGHT + GAP)
        words = "\n".join([*_lines(phrase, font), "", *row[-1].info["said"]])
        pen.multiline_text((8, top + HEIGHT / 2), words, "black", font, anchor="lm", spacing=5)
        for column, picture in enumerate(row):
            left = WORDS + column * (cell + GAP) + (cell - picture.width) // 2
            sheet.paste(picture, (left, top))
    return sheet


def _row(result: MattingResult) -> list[Image.Image]:
    photo = small_photo(result)
    alpha = Image.fromarray(as_integers(result.alpha)).convert("RGB")
    overlays = [grounding_overlay(photo, result.grounding), trimap_overlay(photo, result.trimap)]
    row = [_fitted(picture) for picture in (photo, *overlays, alpha)]
    # the cut-out is made small before it is laid on the board, whose squares would shrink with it
    row.append(small_cutout(_fitted(result.cutout)))
    found = {None: [], True: ["found"], False: ["“not there”"]}[result.found]
    row[-1].info["said"] = [f"confidence {result.confidence:.2f}", *found]
    return row


def _fitted(image: Image.Image) -> Image.Image:
    return image.resize((max(1, round(image.width * HEIGHT / image.height)), HEIGHT), Image.Resampling.LANCZOS)


def _lines(phrase: str, font: Any) -> list[str]:
    lines = [""]
    for word in f"“{phrase}”".split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > WORDS - 20 and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python tools/using_pictures.py", description="Draw docs/using.jpg.")
    parser.add_argument("checkpoint", help="what `fit` wrote")
    parser.add_argument("--photographs", type=Path, help="folder with an index.json, as tools/evaluate_photographs.py")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/using.jpg", help="default: docs/using.jpg")
    options = parser.parse_args(arguments)
    try:
        questions = scenes() + ([] if options.photographs is None else photographs(options.photographs))
        picture = draw(MattingPipeline.from_checkpoint(options.checkpoint), questions)
    except InputError as error:
        print(f"using_pictures: error: {error}", file=sys.stderr)
        return 2
    with whole_file(options.out) as temporary:
        picture.save(temporary, format="JPEG", quality=88, subsampling=0)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
