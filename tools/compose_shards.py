"""Turn a folder of named RGBA cut-outs and a folder of backgrounds into RefMatte-style training and validation shards.

    python tools/compose_shards.py CUTOUTS BACKGROUNDS OUTPUT --train-images 2000 --val-images 200

Each image holds 2 or 3 cut-outs (--objects) on a background, composited by the matting equation. Each instance has its
visible alpha, and phrases by name, by position and by relation that are true of it alone. No cut-out and no background
is in both splits.

    OUTPUT/train.index.json  train-000000.tar ...   what data_modules.ShardSource reads
    OUTPUT/val.index.json    val-000000.tar ...
    OUTPUT/manifest.json                            every choice: splits, sources, licences, places, sizes, phrases

CUTOUTS/index.json is a list of {"file", "id", "name", "names", "category", "touches", "licence_class", ...}; only
"file" is needed, and without an index each picture is named by its file. BACKGROUNDS likewise.

The same arguments give byte-identical shards, with any number of workers.

Leakage: a cut-out made from a photograph that some benchmark scores must not be trained on. In the optional real data,
the cut-outs fg_am_gtNN come from the photographs real_alpha/am_gtNN, and fg_p3m_* and fg_rs_* from those of
pseudo_alpha and refmatte_composites. Hold them out with --holdout 'fg_am_*' 'fg_p3m_*' 'fg_rs_*' (they go to val), or
drop them with --exclude.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
from tqdm import tqdm

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_modules.shards import ShardWriter
from lit_matting.checks import InputError
from tools.composing.cutouts import (
    file_sha1,
    read_backgrounds,
    read_cutouts,
    split_ids,
    write_colours,
)
from tools.composing.maker import SPLITS, Plan, find_similar, make_image, plan_tasks
from tools.composing.phrases import KINDS
from tools.workers import end_with_parent

TOOL = "compose_shards 1.0"

Given = TypeVar("Given")
Result = TypeVar("Result")


def compose(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build everything in a folder beside the output, then give it the output's name; returns the manifest."""
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not arguments.overwrite:
            raise InputError(
                f"the output {str(output)!r} exists and is not empty; name another one or pass --overwrite."
            )
        # what is replaced is deleted whole, so it must be ours
        if not (output / "manifest.json").is_file():
            raise InputError(
                f"{str(output)!r} has no manifest.json, so --overwrite leaves it alone; name another folder."
            )
    cutouts = read_cutouts(Path(arguments.cutouts), arguments.exclude, arguments.exclude_id_regex, arguments.licences)
    backgrounds = read_backgrounds(Path(arguments.backgrounds), arguments.exclude, arguments.licences)
    cutout_ids = split_ids([c.id for c in cutouts], arguments.val_share, arguments.holdout, arguments.seed, "cut-out")
    background_ids = split_ids(
        [b.id for b in backgrounds], arguments.background_val_share, [], arguments.seed, "background"
    )
    wanted = {"train": arguments.train_images, "val": arguments.val_images}
    for split, images in wanted.items():
        fewest = min(arguments.objects)
        if images and (len(cutout_ids[split]) < fewest or not background_ids[split]):
            raise InputError(
                f"{split} would have {len(cutout_ids[split])} cut-outs and {len(background_ids[split])} backgrounds and"
                f" needs at least {fewest} and 1: change --val-share or --background-val-share, or set"
                f" --{split}-images 0."
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{output.name}.building-", dir=output.parent))
    crew: _Crew | None = None
    os.chmod(building, 0o755)  # mkdtemp's 0700 would stay on the finished folder
    try:
        colours = building / "scratch"
        colours.mkdir()
        crew = _Crew(colours, arguments.workers)
        write = partial(write_colours, Path(arguments.cutouts), colours, 2 * arguments.size)
        cuts = list(crew.map(write, cutouts, "colours"))
        plan = Plan(
            backgrounds_folder=arguments.backgrounds,
            colours_folder=str(colours),
            cutouts={split: [c for c in cutouts if c.id in cutout_ids[split]] for split in SPLITS},
            backgrounds={split: [b for b in backgrounds if b.id in background_ids[split]] for split in SPLITS},
            cuts={cutout.id: cut for cutout, cut in zip(cutouts, cuts)},
            similar=find_similar(cutouts, backgrounds),
            seed=arguments.seed,
            size=arguments.size,
            counts=tuple(sorted(set(arguments.objects))),
            similar_share=arguments.similar_share,
            min_visible=arguments.min_visible,
            min_area=arguments.min_area,
            max_upscale=arguments.max_upscale,
            phrases_per_kind=arguments.phrases_per_kind,
            image_format=arguments.image_format,
            quality=arguments.quality,
            with_layers=arguments.with_layers,
        )
        records = _write_splits(arguments, plan, building, wanted, crew)
        crew.close()
        shutil.rmtree(colours)
        manifest = _manifest(arguments, plan, records)
        text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
        (building / "manifest.json").write_text(text, encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        os.replace(building, output)
    finally:
        if crew is not None:
            crew.close()
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def _write_splits(
    arguments: argparse.Namespace, plan: Plan, folder: Path, wanted: dict[str, int], crew: _Crew
) -> list[dict[str, Any]]:
    records = []
    for split in SPLITS:
        if not wanted[split]:
            continue
        tasks = plan_tasks(plan, split, wanted[split])
        max_bytes = arguments.max_shard_mb * 2**20
        with ShardWriter(folder, split, arguments.dataset, split, TOOL, arguments.max_samples, max_bytes) as writer:
            for made in crew.map(partial(make_image, plan), tasks, split):
                extra = {"source": made.source}
                writer.write(made.key, made.image, arguments.image_format, made.instances, extra, made.background)
                records.append(made.record)
    return records


class _Crew:
    """Runs a function over many arguments, in this process or in several, under a progress bar."""

    def __init__(self, folder: Path, workers: int) -> None:
        # spawned, because a process that has run OpenMP code (pymatting's) cannot be forked
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, end_with_parent) if workers > 1 else None
        self._folder = folder

    def map(self, function: Callable[[Given], Result], arguments: Sequence[Given], what: str) -> Iterator[Result]:
        """Yield the results in the order of the arguments."""
        results: Iterator[Result]
        if self._pool is None:
            cv2.setNumThreads(1)  # pictures this small lose more by waking threads than they gain
            results = map(function, arguments)
        else:
            # the function holds the plan: each process reads it once, instead of getting it with every task
            job = self._folder / f"{what}.job"
            job.write_bytes(pickle.dumps(function))
            results = self._pool.map(partial(_run_job, str(job)), arguments, chunksize=4)
        yield from tqdm(results, total=len(arguments), desc=what, unit="image", disable=None)

    def close(self) -> None:
        """Stop the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=4)
def _job(path: str) -> Callable[[Any], Any]:
    cv2.setNumThreads(1)
    return pickle.loads(Path(path).read_bytes())


def _run_job(path: str, argument: Any) -> Any:
    return _job(path)(argument)


def _manifest(arguments: argparse.Namespace, plan: Plan, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Every choice, without times or absolute paths, so that it repeats byte for byte."""
    ignored = {"cutouts", "backgrounds", "output", "workers", "overwrite"}
    uses: dict[str, int] = {}
    for record in records:
        for name in [
            f"background/{record['background']['background']}",
            *(item["cutout"] for item in record["instances"]),
        ]:
            uses[name] = uses.get(name, 0) + 1
    sources: dict[str, dict[str, Any]] = {"cutouts": {}, "backgrounds": {}}
    for split in SPLITS:
        for cutout in plan.cutouts[split]:
            sources["cutouts"][cutout.id] = {
                "split": split,
                "file": cutout.file,
                "sha1": file_sha1(Path(arguments.cutouts) / cutout.file),
                "names": list(cutout.names),
                "category": cutout.category,
                "cut_sides": list(plan.cuts[cutout.id]),
                "similar": sorted(plan.similar[cutout.id]),
                "licence": cutout.record.get("licence", ""),
                "licence_class": cutout.licence_class,
                "source": cutout.record.get("source", ""),
                "images": uses.get(cutout.id, 0),
            }
        for background in plan.backgrounds[split]:
            sources["backgrounds"][background.id] = {
                "split": split,
                "file": background.file,
                "sha1": file_sha1(Path(arguments.backgrounds) / background.file),
                "name": background.name,
                "licence": background.record.get("licence", ""),
                "licence_class": background.licence_class,
                "source": background.record.get("source", ""),
                "images": uses.get(f"background/{background.id}", 0),
            }
    kinds = [phrase["kind"] for record in records for item in record["instances"] for phrase in item["phrases"]]
    return {
        "tool": TOOL,
        "arguments": {name: value for name, value in sorted(vars(arguments).items()) if name not in ignored},
        "counts": {
            **{f"{split}_images": sum(record["split"] == split for record in records) for split in SPLITS},
            "instances": sum(len(record["instances"]) for record in records),
            "phrases": {kind: kinds.count(kind) for kind in KINDS},
        },
        **sources,
        "images": records,
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="compose_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cutouts", help="folder of RGBA cut-outs, with or without index.json")
    parser.add_argument("backgrounds", help="folder of background pictures, with or without index.json")
    parser.add_argument("output", help="folder for the shards; appears only when everything is finished")

    group = parser.add_argument_group("how much")
    _number(group, "--train-images", 2000, "images in train")
    _number(group, "--val-images", 200, "images in val")
    _number(group, "--size", 512, "side of the square images, in pixels")
    _number(group, "--seed", 0, "every choice follows from it")
    _number(group, "--workers", os.cpu_count() or 1, "processes; the result does not depend on it")

    group = parser.add_argument_group("what goes where")
    group.add_argument("--holdout", nargs="*", default=[], metavar="GLOB", help="cut-outs of such ids go to val only")
    group.add_argument("--exclude", nargs="*", default=[], metavar="GLOB", help="files of such ids are not used")
    group.add_argument("--exclude-id-regex", metavar="REGEX", help="cut-outs whose id it matches are not used")
    group.add_argument(
        "--licences",
        type=lambda text: [item.strip() for item in text.split(",") if item.strip()],
        metavar="CLASS,...",
        help="use only files of these licence classes: permissive, share_alike, copyleft, non_commercial, unstated",
    )
    _share(group, "--val-share", 0.15, "of the cut-outs that are not held out go to val")
    _share(group, "--background-val-share", 0.2, "of the backgrounds go to val")

    group = parser.add_argument_group("the images")
    group.add_argument(
        "--objects",
        type=int,
        nargs="+",
        default=[2, 3],
        choices=(1, 2, 3),
        help="cut-outs in one image, drawn among these numbers; one alone is large, as in a portrait (default: 2 3)",
    )
    _share(group, "--similar-share", 0.15, "of the images hold two things of similar name, told apart by position only")
    _share(group, "--min-visible", 0.6, "of every instance's alpha stays visible")
    _share(group, "--min-area", 0.008, "of the image is what every instance covers at least")
    group.add_argument(
        "--max-upscale",
        type=float,
        default=2.0,
        metavar="FACTOR",
        help="no cut-out is enlarged more, unless it has to span the image (default: %(default)s)",
    )
    _number(group, "--phrases-per-kind", 3, "phrases of one kind for one instance at most")

    group = parser.add_argument_group("the shards")
    group.add_argument("--dataset", default="composites", help="name of the data set (default: %(default)s)")
    group.add_argument("--image-format", choices=("jpg", "png", "webp"), default="jpg", help="default: %(default)s")
    _number(group, "--quality", 95, "of jpg and webp, 1 to 100")
    group.add_argument(
        "--with-layers",
        action="store_true",
        help="also store foreground colours and the background, for re-composition",
    )
    _number(group, "--max-samples", 1000, "images in one shard at most")
    _number(group, "--max-shard-mb", 512, "MiB of one shard at most")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    return parser


def _number(group: argparse._ArgumentGroup, name: str, default: int, text: str) -> None:
    group.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")


def _share(group: argparse._ArgumentGroup, name: str, default: float, text: str) -> None:
    group.add_argument(
        name, type=float, default=default, metavar="SHARE", help=f"this share {text} (default: %(default)s)"
    )


def _check(arguments: argparse.Namespace) -> None:
    for name in ("val_share", "background_val_share", "similar_share", "min_visible", "min_area"):
        value = getattr(arguments, name)
        if not 0 <= value <= 1:
            raise InputError(f"--{name.replace('_', '-')} is a share and must lie in [0, 1], got {value:g}.")
    if arguments.size < 32:
        raise InputError(f"--size must be at least 32 pixels, got {arguments.size}.")
    if arguments.seed < 0:
        raise InputError(f"--seed must be 0 or more, got {arguments.seed}.")
    if not 1 <= arguments.quality <= 100:
        raise InputError(f"--quality must lie in 1 to 100, got {arguments.quality}.")
    if arguments.max_upscale <= 0:
        raise InputError(f"--max-upscale must be above 0, got {arguments.max_upscale:g}.")
    try:
        re.compile(arguments.exclude_id_regex or "")
    except re.error as error:
        raise InputError(f"--exclude-id-regex {arguments.exclude_id_regex!r} is not a pattern: {error}.") from None
    if arguments.train_images < 0 or arguments.val_images < 0 or not arguments.train_images + arguments.val_images:
        raise InputError("--train-images and --val-images must be 0 or more, and not both 0.")
    if arguments.phrases_per_kind < 1 or arguments.max_samples < 1 or arguments.max_shard_mb < 1:
        raise InputError("--phrases-per-kind, --max-samples and --max-shard-mb must be at least 1.")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        _check(options)
        manifest = compose(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = manifest["counts"]
    phrases = ", ".join(f"{number} {kind}" for kind, number in counts["phrases"].items())
    print(f"{counts['train_images']} train and {counts['val_images']} val images in {options.output}")
    print(f"{counts['instances']} instances; phrases: {phrases}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
