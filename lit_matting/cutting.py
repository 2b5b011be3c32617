"""``python -m lit_matting matte``: photographs and a phrase in, cut-outs out, from the shell.

Whatever can be made is made: a photograph that cannot be used is listed at the end, and the rest is done. A file
appears only when it is whole and is not made again, so a run that was stopped goes on where it was.

torch is not imported before it is certain that there is something to do: ``--help`` and mistyped commands answer at
once.
"""

from __future__ import annotations

import argparse
import csv
import glob
import logging
import os
import re
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_matting.checks import InputError, check_prompt
from lit_matting.pictures import PHOTO_SUFFIXES, not_made_here, photographs_in

if TYPE_CHECKING:
    from lit_matting.pipeline import MattingPipeline

log = logging.getLogger(__name__)

PROG = "python -m lit_matting matte"
DEFAULT_CHECKPOINT = "outputs/demo/last.ckpt"
FORMATS = ("png", "webp", "tiff", "jpg")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.ckpt)")
"""`user/name`; what ends in .ckpt is a file that is not there."""

DESCRIPTION = "Cut what a phrase names out of photographs."
EPILOG = f"""examples:
  {PROG} photo.jpg "the red umbrella" -o umbrella.png
  {PROG} photos/ "the dog" -o cutouts/ --background white --format jpg
  {PROG} --pairs pairs.csv -o mattes/ --alpha-only --bits 16

exit status: 0 all made or already there, 1 some failed (they are listed, the rest is done), 2 wrong usage
"""


@dataclass(frozen=True)
class Job:
    """One picture to make."""

    photo: Path
    phrase: str
    output: Path


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong as an :class:`InputError`, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Raises:
        InputError: If the command cannot be meant as it was typed.
    """
    # threads that wait by spinning make a busy machine many times slower; read when torch is first imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _run(parser().parse_intermixed_args(list(arguments)))
    except KeyboardInterrupt:
        print(f"{PROG}: stopped; the same command goes on where it was.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    result = CommandParser(
        prog=PROG,
        usage=f'{PROG} PHOTO... "PHRASE" [-o OUT] [options]\n       {PROG} --pairs CSV [-o OUT] [options]',
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "words",
        nargs="*",
        metavar="PHOTO... PHRASE",
        help="photographs, folders (with their subfolders) or globs; the phrase comes last",
    )
    result.add_argument("--pairs", metavar="CSV", help="a table with a line `image,phrase` for every picture instead")
    result.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="the file to write, or a folder for `photo.the-phrase.png`; default: the current folder",
    )
    add_model_arguments(result)
    result.add_argument(
        "--background",
        default="transparent",
        metavar="COLOUR|IMAGE",
        help="what to put behind: `white`, `#30a0ff`, an image file, or `transparent` (default)",
    )
    result.add_argument("--alpha-only", action="store_true", help="write the matte, a grey picture, not the cut-out")
    result.add_argument("--format", choices=FORMATS, help="of files in a folder (default: png)")
    result.add_argument(
        "--bits", type=int, choices=(8, 16), default=8, help="a channel; 16 for PNG and TIFF (default: 8)"
    )
    result.add_argument("--overwrite", action="store_true", help="make again what is already there")
    result.add_argument(
        "--photo-colours",
        action="store_true",
        help="keep the photograph's colours at soft edges; default: free them of the old background",
    )
    return result


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model runs, and where: what :func:`load_pipeline` reads."""
    parser.add_argument(
        "--checkpoint",
        default=DEFAULT_CHECKPOINT,
        metavar="CKPT",
        help="what `fit` wrote, a folder of save_pretrained, or `user/name` on the Hugging Face hub"
        " (default: %(default)s)",
    )
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of the network (default: by device)")
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let the checkpoint name classes of this package of yours; may be repeated",
    )


def _run(options: argparse.Namespace) -> int:
    asked, failures = _asked(options)
    if not asked:
        raise InputError(" ".join(failures))
    jobs = _plan(asked, options)
    _check(options, jobs)
    waiting = [job for job in jobs if options.overwrite or not job.output.exists()]
    made = _make(load_pipeline(options), waiting, _settings(options), failures) if waiting else 0
    _report(made, len(jobs) - len(waiting), failures)
    return 1 if failures else 0


# --- what to make ---------------------------------------------------------------------------------


def _asked(options: argparse.Namespace) -> tuple[list[tuple[Path, Path, str]], list[str]]:
    """Return ``(photo, its name in the output folder, phrase)`` of every picture, and what is not there."""
    if options.pairs is not None:
        if options.words:
            raise InputError(f"`--pairs` brings photographs and phrases with it; drop {options.words[0]!r}.")
        return _read_pairs(Path(options.pairs))
    words = options.words
    if not words:
        raise InputError('give a photograph and a phrase: PHOTO "the red umbrella" (see --help).')
    looks_like_photo = os.path.isfile(words[-1]) and Path(words[-1]).suffix.lower() in PHOTO_SUFFIXES
    if len(words) == 1 and not looks_like_photo and not os.path.isdir(words[0]):
        raise InputError(f'{words[0]!r} stands alone: give a photograph and a phrase, PHOTO "the red umbrella".')
    if looks_like_photo or len(words) == 1:
        raise InputError(f"the phrase is missing: after {words[-1]!r} say what to cut out, as in 'the red umbrella'.")
    phrase = check_prompt(words[-1], "phrase")
    photos: dict[Path, Path] = {}
    missing = []
    for word in words[:-1]:
        found = _find(word)
        if not found:
            kind = "no images in the folder" if os.path.isdir(word) else "there is no image"
            missing.append(f"{kind} {word!r}.")
        for photo, name in found:
            photos.setdefault(photo, name)
    return [(photo, name, phrase) for photo, name in photos.items()], missing


def _find(word: str) -> list[tuple[Path, Path]]:
    """Return the photographs a word stands for, with their names in the output folder."""
    path = Path(word)
    if path.is_dir():
        return [(item, item.relative_to(path)) for item in photographs_in(path)]
    if path.exists():
        return [(path, Path(path.name))]
    # a shell expands globs by itself, unless they are quoted or there is no shell
    found = sorted(Path(item) for item in glob.glob(word, recursive=True)) if glob.has_magic(word) else []
    found = [item for item in found if item.is_file() and item.suffix.lower() in PHOTO_SUFFIXES]
    return [(item, Path(item.name)) for item in not_made_here(found, word)]


def _read_pairs(table: Path) -> tuple[list[tuple[Path, Path, str]], list[str]]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if row]
    except FileNotFoundError:
        raise InputError(f"there is no table {str(table)!r}.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"the table {str(table)!r} cannot be read: {error}.") from error
    if rows and [cell.strip().lower() for cell in rows[0][1]] == ["image", "phrase"]:
        rows = rows[1:]
    if not rows:
        raise InputError(f"the table {str(table)!r} has no lines; each must be: image,phrase.")
    asked, missing = [], []
    for number, row in rows:
        if len(row) != 2:
            raise InputError(
                f"the table {str(table)!r}, line {number}: expected image,phrase, got {len(row)} fields (a phrase"
                " with a comma needs quotes)."
            )
        phrase = check_prompt(row[1], f"phrase of {table}, line {number}")
        image = Path(row[0].strip())
        photo = image if image.is_absolute() else table.parent / image
        if photo.is_file():
            # what climbs out of the table's folder must not climb out of the output folder
            inside = not image.is_absolute() and ".." not in image.parts
            asked.append((photo, image if inside else Path(image.name), phrase))
        else:
            missing.append(f"there is no image {str(photo)!r} ({str(table)!r}, line {number}).")
    return list(dict.fromkeys(asked)), missing


def _plan(asked: Sequence[tuple[Path, Path, str]], options: argparse.Namespace) -> list[Job]:
    """Decide where each picture goes."""
    out = Path(options.output or ".")
    suffix = out.suffix.lower()
    names_file = bool(suffix) and not out.is_dir() and not (options.output or "").endswith(("/", os.sep))
    if names_file and len(asked) <= 1:
        if options.format and suffix.removeprefix(".") not in _same_format(options.format):
            raise InputError(f"`--format {options.format}` and the ending of `-o {out}` disagree; drop one.")
        return [Job(photo, phrase, out) for photo, _, phrase in asked]
    if names_file and suffix.removeprefix(".") in {name for known in FORMATS for name in _same_format(known)}:
        raise InputError(f"`-o {out}` is one file, but there are {len(asked)} pictures to make: give a folder.")
    ending = options.format or "png"
    outputs = [out / name.parent / f"{name.stem}.{slug(phrase)}.{ending}" for _, name, phrase in asked]
    taken: dict[str, int] = {}
    for output in outputs:
        taken[str(output).casefold()] = taken.get(str(output).casefold(), 0) + 1
    jobs = []
    for (photo, _, phrase), output in zip(asked, outputs):
        if taken[str(output).casefold()] > 1:
            # photographs of one name, or phrases that differ in what file names cannot hold
            mark = zlib.crc32(f"{photo.as_posix()}\n{phrase}".encode())
            output = output.with_name(f"{output.stem}.{mark:08x}.{ending}")
        jobs.append(Job(photo, phrase, output))
    # where the shell expanded a glob, what the same command wrote before is named one by one
    written = {job.output.resolve() for job in jobs}
    return [job for job in jobs if job.photo.resolve() not in written]


def _same_format(name: str) -> tuple[str, ...]:
    return {"jpg": ("jpg", "jpeg"), "tiff": ("tiff", "tif")}.get(name, (name,))


def slug(phrase: str) -> str:
    """Return a phrase as part of a file name.

    Example:
        >>> slug("the woman's hair")
        'the-woman-s-hair'
    """
    name = re.sub(r"\W+", "-", phrase.lower()).strip("-")
    # file systems count bytes: 255 for the whole name
    return name.encode()[:80].decode(errors="ignore").rstrip("-")


def _check(options: argparse.Namespace, jobs: Sequence[Job]) -> None:
    if options.alpha_only and options.background != "transparent":
        raise InputError("`--alpha-only` writes the matte and has no `--background`; drop one.")
    from lit_matting.picture_files import check_format

    for job in jobs[:1]:
        transparent = options.background == "transparent" and not options.alpha_only
        check_format(job.output.suffix.lower(), options.bits, transparent)
    photos = {job.photo.resolve() for job in jobs}
    for job in jobs:
        if job.output.resolve() in photos:
            raise InputError(f"`-o {job.output}` is one of the photographs; choose another name.")
        if job.output.is_dir():
            raise InputError(f"`-o {job.output}` is a folder in the place of a file; choose another name.")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return how to save a result; a background image is read once."""
    background: Any = None
    if options.background != "transparent":
        from lit_matting.pictures import background_colours, read_photo

        background = options.background
        if os.path.isfile(background):
            background = read_photo(background).as_float()
        else:
            background_colours(background, (1, 1))
    return {
        "save": {"background": background, "alpha_only": options.alpha_only, "bits": options.bits},
        "call": {"clean_colours": not options.photo_colours},
    }


# --- making it ------------------------------------------------------------------------------------


def load_pipeline(options: argparse.Namespace) -> MattingPipeline:
    """Return the pipeline that the options of :func:`add_model_arguments` ask for."""
    given = options.checkpoint
    if given == DEFAULT_CHECKPOINT and not os.path.exists(given):
        raise InputError(f"there is no checkpoint {given!r}: `make demo` makes it, or give another by --checkpoint.")
    from lit_matting.pipeline import MattingPipeline

    shared = os.path.isdir(given) or (not os.path.exists(given) and _HUB_ID.fullmatch(given))
    build = MattingPipeline.from_pretrained if shared else MattingPipeline.from_checkpoint
    return build(given, device=options.device, precision=options.precision, trust=tuple(options.trust))


def _make(matting: MattingPipeline, jobs: Sequence[Job], settings: dict[str, Any], failures: list[str]) -> int:
    """Make every picture that can be made, and return how many; what failed is added to ``failures``."""
    from tqdm import tqdm

    photos: dict[Path, list[Job]] = {}
    for job in jobs:
        photos.setdefault(job.photo, []).append(job)
    made = 0
    with tqdm(total=len(jobs), unit="picture", disable=None if len(jobs) > 1 else True) as bar:
        for photo, group in photos.items():
            encoded, reason = _attempt(lambda: matting.encode(photo), photo)  # noqa: B023 (called at once)
            for job in group:
                if reason is None:
                    result, failure = _attempt(lambda: _cut(matting, encoded, job, settings), photo)  # noqa: B023
                else:
                    failure = reason
                if failure is not None:
                    failures.append(f"{job.phrase!r}: {failure}" if len(group) > 1 else failure)
                else:
                    made += 1
                    if result.found is False:
                        bar.write(
                            f"{photo}: {job.phrase!r} does not seem to be there (confidence {result.confidence:.3f},"
                            f" below {result.threshold:.3f}).",
                            file=sys.stderr,
                        )
                bar.update()
    return made


def _cut(matting: MattingPipeline, encoded: Any, job: Job, settings: dict[str, Any]) -> Any:
    result = matting(encoded, job.phrase, **settings["call"])
    result.save(job.output, **settings["save"])
    return result


def _attempt(work: Any, photo: Path) -> tuple[Any, str | None]:
    """Return what ``work`` returns, or why it could not: one picture must not end a run of thousands."""
    import torch

    try:
        return work(), None
    except InputError as error:
        return None, str(error)
    except (MemoryError, torch.OutOfMemoryError):
        return None, f"{str(photo)!r} needs more memory than there is; make it smaller, or try --device cpu."
    except OSError as error:
        return None, f"{str(photo)!r}: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}."
    except Exception as error:
        log.debug("unexpected error", exc_info=True)
        return None, f"{str(photo)!r} failed unexpectedly ({type(error).__name__}: {' '.join(str(error).split())})."


def _report(made: int, there: int, failures: Sequence[str]) -> None:
    parts = [f"{made} made"]
    if there:
        parts.append(f"{there} already there (--overwrite makes them again)")
    if failures:
        parts.append(f"{len(failures)} failed:")
    print(", ".join(parts), file=sys.stderr)
    for failure in failures:
        print(f"  {failure}", file=sys.stderr)
