"""Find the confidence below which a phrase's thing is not in the photograph, and store it in the checkpoint.

    python tools/calibrate.py outputs/demo/last.ckpt --shards outputs/demo/shards/val.index.json \\
        --judge outputs/demo/shards/test.index.json

Every image is asked for things that are in it, by its own phrases, and for as many that are not, by phrases of other
images. A phrase is taken as naming something absent when it uses words of its object's category or attributes ("the red
star": red and star) and nothing in the image has all of them; phrases that use none ("the leftmost one") fit anywhere
and are left out. Where categories have synonyms, some of these phrases will be true after all.

The cut is chosen on one set of images and judged on another. From then on `matte` says when a thing is not there, and
`MattingResult.found` is False.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from data_modules.decode import decode_sample
from data_modules.shard_reader import Instance, ShardIndex
from lit_matting.checks import InputError
from lit_matting.files import write_whole

if TYPE_CHECKING:
    from lit_matting.pipeline import MattingPipeline

_FORMAT_FIELDS = {"id", "target", "kind", "phrases", "foreground"}


@dataclass(frozen=True)
class Questions:
    """What one image is asked for."""

    sample: int
    present: tuple[str, ...]
    absent: tuple[str, ...]


def attributes(instance: Instance) -> frozenset[str]:
    """Return the words by which an instance is known: of its category, and of every text among its extra fields."""
    texts = [value for name, value in instance.fields.items() if name not in _FORMAT_FIELDS and isinstance(value, str)]
    return frozenset(_words(" ".join(texts)))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def questions(index: ShardIndex, limit: int) -> list[Questions]:
    """Return what to ask of each image, about ``limit`` present and as many absent things in all; always the same.

    Raises:
        InputError: If no phrase can be told to name something absent.
    """
    images: list[tuple[list[str], list[frozenset[str]]]] = []
    naming: dict[str, frozenset[str]] = {}
    for number in range(len(index)):
        instances = index.read_header(number).instances
        known = [attributes(instance) for instance in instances]
        for instance, words in zip(instances, known):
            for phrase in instance.phrases:
                used = words & _words(phrase.text)
                if used:
                    naming[phrase.text] = used
        images.append(([phrase.text for item in instances for phrase in item.phrases], known))
    rng = np.random.default_rng(0)
    found, left = [], limit
    for number in rng.permutation(len(images)).tolist():
        own, known = images[number]
        own = own[:left]
        strange = [text for text, used in naming.items() if not any(used <= words for words in known)]
        if own and strange:
            chosen = rng.choice(len(strange), min(len(own), len(strange)), replace=False)
            found.append(Questions(number, tuple(own), tuple(strange[k] for k in chosen)))
            left -= len(own)
        if left <= 0:
            break
    if not found:
        raise InputError(
            "no phrase of these shards names something that another image lacks: phrases must use the words of"
            " `category` or of other fields of their instance."
        )
    return found


def measure(matting: MattingPipeline, index: ShardIndex, asked: Sequence[Questions]) -> Iterator[tuple[float, bool]]:
    """Yield the confidence of every phrase, and whether its thing is there."""
    from tqdm import tqdm

    for item in tqdm(asked, unit="image", disable=None):
        image = decode_sample(index.read(item.sample), ()).image
        results = matting(image, [*item.present, *item.absent], clean_colours=False)
        for number, result in enumerate(results):
            yield result.confidence, number < len(item.present)


def judged(measured: Sequence[tuple[float, bool]], threshold: float) -> dict[str, float]:
    """Return how well a threshold tells present from absent things."""
    found = [value >= threshold for value, there in measured if there]
    rejected = [value < threshold for value, there in measured if not there]
    shares = sum(found) / len(found), sum(rejected) / len(rejected)
    return {
        "balanced_accuracy": sum(shares) / 2,
        "found": shares[0],
        "rejected": shares[1],
        "present": len(found),
        "absent": len(rejected),
    }


def calibrate(checkpoint: str, shards: str, judge: str | None, limit: int, trust: Sequence[str] = ()) -> dict[str, Any]:
    """Choose the threshold on ``shards``, judge it on ``judge``, store it in the checkpoint, and return the figures.

    Raises:
        InputError: If the checkpoint or the shards cannot be used.
    """
    from lit_matting.checkpoints import store_threshold
    from lit_matting.confidence import best_threshold
    from lit_matting.pipeline import MattingPipeline

    if Path(checkpoint).is_dir():
        raise InputError(f"{checkpoint!r} is a folder: calibrate the checkpoint it came from, and save it again.")
    matting = MattingPipeline.from_checkpoint(checkpoint, trust=trust)
    index = ShardIndex.load(shards)
    measured = list(measure(matting, index, questions(index, limit)))
    threshold = best_threshold(measured).threshold
    report = {"threshold": threshold, "chosen_on": {"shards": shards, **judged(measured, threshold)}}
    if judge is not None:
        other = ShardIndex.load(judge)
        held_out = list(measure(matting, other, questions(other, limit)))
        report["judged_on"] = {"shards": judge, **judged(held_out, threshold)}
    store_threshold(checkpoint, threshold)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python tools/calibrate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="what `fit` wrote; the threshold is written into it")
    parser.add_argument("--shards", required=True, help="images that the network was not trained on, with phrases")
    parser.add_argument("--judge", help="further such images, by which the threshold is judged")
    parser.add_argument("--phrases", type=int, default=300, help="present things asked for (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="as for `matte`")
    options = parser.parse_args(arguments)
    try:
        report = calibrate(options.checkpoint, options.shards, options.judge, options.phrases, options.trust)
    except InputError as error:
        print(f"calibrate: error: {error}", file=sys.stderr)
        return 2
    scores = report.get("judged_on", report["chosen_on"])
    print(
        f"not there below a confidence of {report['threshold']:.3f}: balanced accuracy"
        f" {scores['balanced_accuracy']:.3f} on {scores['shards']} ({scores['found']:.0%} of {scores['present']}"
        f" present things found, {scores['rejected']:.0%} of {scores['absent']} absent ones rejected)"
    )
    if options.out:
        write_whole((json.dumps(report, indent=2) + "\n").encode(), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
