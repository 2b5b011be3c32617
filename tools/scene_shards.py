"""Write generated scenes to webdataset shards.

    python tools/scene_shards.py outputs/demo/shards --train 12000 --val 40 --test 400

Training, validation and test scenes come from different seeds, so no scene is in two of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_modules.scenes import Scene, generate
from data_modules.shards import InstanceEntry, ShardWriter
from lit_matting.checks import InputError
from lit_matting.version import VERSION
from tools.workers import end_with_parent

JPEG_QUALITY = 95
CHUNK = 64
"""Scenes that a worker process makes at a time."""


def encode(scene: Scene, key: str) -> tuple[str, bytes, list[InstanceEntry]]:
    """Return key, JPEG bytes and instances of a scene, as :class:`ShardWriter` takes them."""
    pixels = np.rint(scene.image * 255).astype(np.uint8)
    # full chroma: at this size halved colour would bleed over the strands
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        JPEG_QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    jpeg = cv2.imencode(".jpg", pixels[..., ::-1], options)[1].tobytes()
    instances = [
        InstanceEntry(
            id=str(index),
            target=np.rint(alpha * 255).astype(np.uint8),
            kind="alpha",
            phrases=list(phrases),
            category=f"{item.material} {item.shape}",
            extra={"colour": item.colour, "shape": item.shape, "material": item.material},
        )
        for index, (alpha, item, phrases) in enumerate(zip(scene.alphas, scene.objects, scene.phrases))
    ]
    return key, jpeg, instances


def _encode_range(seed: int, size: int, start: int, stop: int) -> list[tuple[str, bytes, list[InstanceEntry]]]:
    cv2.setNumThreads(1)
    return [encode(generate(seed, index, size), f"{seed}-{index:07d}") for index in range(start, stop)]


def write_split(
    folder: Path, split: str, seed: int, count: int, size: int, workers: int, progress: Callable[[int], object]
) -> None:
    """Write ``count`` scenes of stream ``seed`` as split ``split``; the same arguments give the same bytes."""
    bounds = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    tool = f"scene_shards {VERSION}"
    with ShardWriter(folder, prefix=split, dataset="scenes", split=split, tool=tool, max_samples=2000) as writer:
        for samples in _in_order(partial(_encode_range, seed, size), bounds, workers):
            for key, jpeg, instances in samples:
                writer.write(key, image=jpeg, image_ext="jpg", instances=instances)
            progress(len(samples))


def _in_order(make: Callable[..., list], bounds: Sequence[tuple[int, int]], workers: int) -> Iterator[list]:
    if workers <= 1:
        yield from (make(*bound) for bound in bounds)
        return
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        yield from pool.map(make, *zip(*bounds))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/scene_shards.py", description="Write generated scenes to webdataset shards."
    )
    parser.add_argument("folder", type=Path, help="where the shards go; made if missing")
    parser.add_argument("--train", type=int, default=12000, help="training scenes (default %(default)s)")
    parser.add_argument("--val", type=int, default=40, help="validation scenes (default %(default)s)")
    parser.add_argument("--test", type=int, default=300, help="test scenes (default %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of a scene in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the training scenes (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default %(default)s)")
    options = parser.parse_args(arguments)
    counts = {"train": options.train, "val": options.val, "test": options.test}
    if min(counts.values()) < 0 or options.size < 32:
        parser.error("counts must not be negative and the size must be at least 32 pixels.")
    try:
        with tqdm(total=sum(counts.values()), unit=" scenes", desc="scenes") as bar:
            for offset, (split, count) in enumerate(counts.items()):
                if count:
                    seed = options.seed + 1_000_000 * offset
                    write_split(options.folder, split, seed, count, options.size, options.workers, bar.update)
    except InputError as error:
        print(f"scene_shards: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
