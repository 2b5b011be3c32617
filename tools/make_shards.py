"""Pack a public release, exactly as it lies on disk, into the shards that training and testing read.

    python tools/make_shards.py refmatte /data/RefMatte    shards/refmatte
    python tools/make_shards.py p3m10k   /data/P3M-10k     shards/p3m10k
    python tools/make_shards.py am2k     /data/AM-2k       shards/am2k
    python tools/make_shards.py refcoco  /data/refer/data  shards/refcoco --name refcoco+
    python tools/make_shards.py pairs    /data/RM-1k       shards/rm1k --dataset rm1k --images image --alphas alpha

Every split becomes <split>-000000.tar, ... and <split>.index.json (counts, byte offsets, checksums). Image bytes stay
as they were; mattes become PNG. The same release and options give byte-identical shards.

A run that was stopped goes on where it was: finished shards are not built again, and no half shard has its final name.
Files that cannot be used are listed by name and the run ends with an error, unless --skip-bad allows that many.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.checks import InputError
from tools.releases import am2k, p3m10k, pairs, refcoco, refmatte
from tools.releases.packing import Packed, Packing, TooManyProblems, pack
from tools.releases.source import Listing

TOOL = "make_shards 1.0"
_EXTRA_PIXELS = "a matte that differs from its image by so many pixels is resized to it (default: %(default)s)"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("root", help="folder of the unpacked release")
    common.add_argument("output", help="folder for the shards")
    group = common.add_argument_group("packing")
    group.add_argument("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N unusable images")
    group.add_argument("--max-samples", type=int, default=1000, metavar="N", help="images in one shard at most")
    group.add_argument("--max-shard-mb", type=int, default=256, metavar="MIB", help="size of one shard at most, about")
    group.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)"
    )
    group.add_argument(
        "--mask-channel",
        choices=("auto", "first", "alpha"),
        default="auto",
        help="which channel of a colour file is the matte (default: auto, which asks where both could be)",
    )
    group.add_argument("--tolerance", type=int, default=3, metavar="PIXELS", help=_EXTRA_PIXELS)
    group.add_argument("--no-foreground", action="store_true", help="leave out foreground colours")
    group.add_argument("--with-background", action="store_true", help="also pack the backgrounds, where there are any")
    group.add_argument("--overwrite", action="store_true", help="replace shards made from other files or options")

    parser = argparse.ArgumentParser(
        prog="make_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="release", required=True, metavar="RELEASE")

    sub = commands.add_parser("refmatte", parents=[common], help="RefMatte train and test, RefMatte-RW100")
    _splits(sub, refmatte.SPLITS)
    sub.add_argument(
        "--expression-kinds",
        nargs="+",
        metavar="KIND",
        help="the kind of the first, second, ... expression, such as keyword basic absolute relative (default: each"
        " place is judged by what most of its expressions say; the judgement is printed)",
    )
    sub = commands.add_parser("p3m10k", parents=[common], help="P3M-10k train, P3M-500-P, P3M-500-NP")
    _splits(sub, p3m10k.SPLITS)
    sub = commands.add_parser("am2k", parents=[common], help="AM-2k train and validation")
    _splits(sub, am2k.SPLITS)
    sub = commands.add_parser("refcoco", parents=[common], help="RefCOCO, RefCOCO+, RefCOCOg")
    sub.add_argument(
        "--name", choices=refcoco.NAMES, default="refcoco", help="which of the three (default: %(default)s)"
    )
    sub.add_argument(
        "--split-by", choices=("unc", "google", "umd"), help="who split it (default: unc; umd for refcocog)"
    )
    sub.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="train, val, testA, testB, test (default: all there are)"
    )
    sub.add_argument("--images", help="folder of COCO train2014 (default: the usual places below the root)")

    sub = commands.add_parser(
        "pairs",
        parents=[common],
        help="any folder of images with a folder of alphas or masks",
        description="RM-1k has no published layout: point --images and --alphas at whatever folders it has. AIM-500 is"
        " --images original --alphas mask, RealWorldPortrait-636 is --images image --alphas alpha. With --index, a JSON"
        " list of {image, alpha or mask, expressions, ...} says what belongs together.",
    )
    sub.add_argument("--dataset", required=True, help="name of the data set")
    sub.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    sub.add_argument("--images", default="image", help="folder of images, below the root (default: %(default)s)")
    sub.add_argument("--alphas", default="alpha", help="folder of alphas, below the root (default: %(default)s)")
    sub.add_argument(
        "--kind", choices=("alpha", "mask"), default="alpha", help="mask: hard masks, never learned as alpha"
    )
    sub.add_argument("--suffix", default="", help="what an alpha's stem has after its image's, such as _alpha")
    sub.add_argument("--foregrounds", help="folder of foreground colours, below the root")
    sub.add_argument("--category", default="", help="what all of them show, such as person")
    sub.add_argument("--list", metavar="FILE", help="take only the images whose stems are in this file, one per line")
    sub.add_argument("--index", metavar="FILE", help="JSON list that names the files, instead of folders")
    return parser


def _splits(parser: argparse.ArgumentParser, splits: tuple[str, ...]) -> None:
    parser.add_argument(
        "--splits", nargs="+", choices=splits, help=f"of {', '.join(splits)} (default: all that are there)"
    )


def scan(options: argparse.Namespace) -> list[Listing]:
    """List the splits that the command line asks for.

    Raises:
        InputError: If a split that was asked for is not there, or none is.
    """
    root = Path(options.root)
    if options.release == "refcoco":
        images = Path(options.images) if options.images else None
        return refcoco.scan(root, options.name, options.split_by, options.splits, images)
    if options.release == "pairs":
        if options.index:
            return [pairs.scan_index(root, Path(options.index), options.dataset, options.split)]
        return [
            pairs.scan_folders(
                root,
                options.images,
                options.alphas,
                options.dataset,
                options.split,
                options.kind,
                options.suffix,
                options.category,
                options.foregrounds,
                Path(options.list) if options.list else None,
            )
        ]
    release = {"refmatte": refmatte, "p3m10k": p3m10k, "am2k": am2k}[options.release]
    more = {"expression_kinds": options.expression_kinds} if options.release == "refmatte" else {}
    listings, errors = [], []
    for split in options.splits or release.SPLITS:
        try:
            listings.append(release.scan(root, split, **more))
        except InputError as error:
            # without --splits, what has been downloaded is taken
            errors.append(error)
    if errors and (options.splits or not listings):
        raise errors[0]
    for error in errors:
        print(f"left out: {error}")
    return listings


def _say(listing: Listing) -> None:
    images, instances = len(listing.sources), sum(len(source.targets) for source in listing.sources)
    print(f"{listing.dataset} {listing.split}: {images} images, {instances} instances")
    for line in listing.report:
        print(f"  {line}")
    if listing.expected and listing.expected != (images, instances):
        print("  warning: published are {} images and {} instances; is it complete?".format(*listing.expected))
    for line in listing.warnings:
        print(f"  warning: {line}")


def _tell(packed: Packed) -> None:
    reused = f" ({packed.reused} of them from an earlier run)" if packed.reused else ""
    print(f"  {packed.index}: {packed.samples} images, {packed.instances} instances, {packed.shards} shards{reused}")
    for note, count in packed.notes.items():
        print(f"  {count} x {note}")
    for line in packed.problems:
        print(f"  left out: {line}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = build_parser().parse_args(arguments)
    status = 0
    try:
        if (
            min(options.max_samples, options.max_shard_mb, options.workers) < 1
            or min(options.skip_bad, options.tolerance) < 0
        ):
            raise InputError(
                "--max-samples, --max-shard-mb and --workers must be at least 1, --skip-bad and --tolerance 0."
            )
        for listing in scan(options):
            _say(listing)
            how = Packing(
                root=options.root,
                output=options.output,
                prefix=listing.split,
                tool=TOOL,
                max_samples=options.max_samples,
                max_bytes=options.max_shard_mb * 2**20,
                skip_bad=options.skip_bad,
                mask_channel=options.mask_channel,
                tolerance=options.tolerance,
                with_foreground=not options.no_foreground,
                with_background=options.with_background,
            )
            try:
                _tell(pack(listing, how, options.workers, options.overwrite))
            except TooManyProblems as error:
                for line in error.problems:
                    print(f"bad: {line}", file=sys.stderr)
                print(f"error: {listing.dataset} {listing.split}: {error}", file=sys.stderr)
                status = 1
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
