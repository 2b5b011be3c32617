"""What the data stream costs, against decoding alone and against plain ways of reading the same data, in one run.

    python tools/benchmark_data.py --out build/benchmark_data.json

Generated photographs of 512 x 512 (JPEG of about 150 KB, alpha as PNG), one thread, process CPU time, all sides
interleaved, the median of their rounds divided. The exit status is 1 when a ratio is above what docs/DATA.md promises.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np
import simplejpeg
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_modules import Augmentation, InterleavedDataModule, InterleavedSchedule, ShardSource
from data_modules.decode import decode_sample
from data_modules.shards import InstanceEntry, ShardIndex, ShardWriter
from data_modules.stream import StreamLoader, one_thread
from data_modules.transforms import mattes, pictures
from lit_matting.files import write_whole
from lit_matting.targets import targets_for

SIZE, BATCH = 512, 16
PROMISED = {
    "stream / raw decoding": 1.35,
    "five data sets / one": 1.05,
    "parent process, ms per sample": 0.5,
    "memory growth, MB": 20.0,
    "resuming beyond a fresh start, at 10 shards, ms": 2.0,
    "resuming beyond a fresh start, at 1000 shards, ms": 2.0,
}


def photograph(number: int, size: int) -> tuple[bytes, np.ndarray]:
    """Return the JPEG of a picture with detail at every scale, and the soft alpha of one thing in it."""
    rng = np.random.default_rng(number)
    image = rng.normal(0, 9, (size, size, 3)).astype(np.float32)
    for cells, weight in ((4, 0.5), (32, 0.35), (128, 0.15)):
        layer = rng.integers(0, 256, (cells, cells, 3)).astype(np.float32)
        image += weight * cv2.resize(layer, (size, size), interpolation=cv2.INTER_CUBIC)
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    distance = np.hypot(rows, columns) + 0.03 * np.sin(9 * np.arctan2(rows, columns) + number)
    soft = np.clip(0.5 + (0.3 - distance) / 0.05 + rng.normal(0, 0.12, (size, size)), 0, 1)
    alpha = np.where(distance < 0.25, 1, np.where(distance > 0.36, 0, soft))
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="420"), np.rint(alpha * 255).astype(np.uint8)


def write(
    folder: Path, name: str, samples: int, size: int = SIZE, per_shard: int = 50, loose: Path | None = None
) -> Path:
    """Write shards, and the same files loose where asked for; return the index."""
    with ShardWriter(folder, prefix=name, dataset=name, tool="benchmark_data", max_samples=per_shard) as writer:
        for number in range(samples):
            jpeg, alpha = photograph(number % 64, size)
            writer.write(f"{number:06d}", jpeg, "jpg", [InstanceEntry("0", alpha, phrases=[("the thing", "basic")])])
            if loose is not None:
                loose.mkdir(exist_ok=True)
                (loose / f"{number:06d}.jpg").write_bytes(jpeg)
                (loose / f"{number:06d}.png").write_bytes(cv2.imencode(".png", alpha)[1].tobytes())
    return folder / f"{name}.index.json"


def loader(
    paths: dict[str, Path], iterations: int, size: int = SIZE, unpack: bool = False, **settings: Any
) -> StreamLoader:
    """Return a loader of the stream, as a trainer gets it (8 bits) or as floats."""
    module = InterleavedDataModule(
        {name: ShardSource(str(path), batch_size=settings.pop("batch_size", BATCH)) for name, path in paths.items()},
        schedule=InterleavedSchedule(list(paths), 0),
        image_size=size,
        epoch_iterations=iterations,
        **settings,
    )
    module.setup("fit")
    stream = module.train_dataloader()
    stream.unpack = unpack
    return stream


def consumed(batches: Any) -> int:
    """Read a loader to its end and return the number of samples."""
    return sum(len(batch) for batch in batches)


class LooseFiles(Dataset[Any]):
    """The plain way: a list of files."""

    def __init__(self, folder: Path) -> None:
        self.stems = sorted(path.with_suffix("") for path in folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        stem = str(self.stems[number])
        image = cv2.cvtColor(cv2.imread(stem + ".jpg"), cv2.COLOR_BGR2RGB)
        alpha = cv2.imread(stem + ".png", cv2.IMREAD_GRAYSCALE)
        return torch.from_numpy(image).permute(2, 0, 1).float() / 255, torch.from_numpy(alpha)[None].float() / 255, stem


def plain_webdataset(shards: list[str]) -> Any:
    """The plain way to read shards, with webdataset's own decoding and batching."""
    import webdataset

    data = webdataset.WebDataset(shards, shardshuffle=False).decode("torchrgb")
    return data.to_tuple("jpg", "0.alpha.png", "json").batched(BATCH, collation_fn=_stack)


def _stack(rows: list[tuple[torch.Tensor, torch.Tensor, dict]]) -> list[torch.Tensor]:
    images, alphas, _ = zip(*rows)
    return [torch.stack(images), torch.stack(alphas)]


def cpu_ms(function: Callable[[], int]) -> float:
    """Return the CPU milliseconds of this process per sample."""
    begin = time.process_time()
    samples = function()
    return 1e3 * (time.process_time() - begin) / samples


def compare(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Run all sides in turn, several times, and return the median of each."""
    for function in sides.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            times[name].append(cpu_ms(function))
    return {name: median(found) for name, found in times.items()}


def speed(folder: Path, samples: int, rounds: int) -> dict[str, Any]:
    """Compare the stream with decoding alone, with five data sets, and with the plain ways."""
    paths = {
        name: write(folder / name, name, samples, loose=folder / "loose" if name == "a" else None) for name in "abcde"
    }
    one = {"a": paths["a"]}
    index = ShardIndex.load(paths["a"])
    raws = [index.read(number) for number in range(len(index))]
    iterations = samples // BATCH

    def raw() -> int:
        for sample in raws:
            simplejpeg.decode_jpeg(sample.member("jpg"), "RGB")
            cv2.imdecode(np.frombuffer(sample.member("0.alpha.png"), np.uint8), cv2.IMREAD_UNCHANGED)
        return len(raws)

    def read() -> int:
        for number in range(len(index)):
            index.read(number)
        return len(index)

    decoded = [decode_sample(sample, [0]) for sample in raws[:BATCH]]

    def floats() -> int:
        pictures([item.image for item in decoded])
        mattes([item.targets[0] for item in decoded])
        return BATCH

    alphas = mattes([item.targets[0] for item in decoded])

    def targets() -> int:
        targets_for(alphas, torch.ones(BATCH, dtype=torch.bool), (SIZE // 8, SIZE // 8), (SIZE // 32, SIZE // 32))
        return BATCH

    plain = loader(one, iterations)
    streams = {
        "stream": plain,
        "stream, floats": loader(one, iterations, unpack=True),
        "stream, augmented": loader(one, iterations, augment=Augmentation()),
        "stream, five data sets": loader(paths, iterations),
    }
    loose = DataLoader(LooseFiles(folder / "loose"), batch_size=BATCH, shuffle=True)
    sides: dict[str, Callable[[], int]] = {
        "raw decoding": raw,
        **{name: (lambda stream=stream: consumed(stream)) for name, stream in streams.items()},
        "part: read and parse": read,
        "part: 8 bits to floats": floats,
        "part: training targets": targets,
        "loose files, torch Dataset": lambda: sum(len(batch[0]) for batch in loose),
        "plain webdataset": lambda: sum(len(b[0]) for b in plain_webdataset(sorted(index.paths))),
    }
    times = compare(sides, rounds)
    member = raws[0].members
    return {
        "ms": times,
        "jpeg_bytes": float(np.mean([len(sample.member("jpg")) for sample in raws])),
        "png_bytes": len(member["0.alpha.png"]),
        "ratios": {
            "stream / raw decoding": times["stream"] / times["raw decoding"],
            "five data sets / one": times["stream, five data sets"] / times["stream"],
            "stream, floats / raw decoding": times["stream, floats"] / times["raw decoding"],
            "loose files / stream, floats": times["loose files, torch Dataset"] / times["stream, floats"],
            "plain webdataset / stream, floats": times["plain webdataset"] / times["stream, floats"],
        },
        "paths": one,
    }


def parent(one: dict[str, Path], samples: int) -> float:
    """Return what the training process pays for a sample when workers make the batches, in CPU milliseconds."""
    stream = loader(one, 4 * samples // BATCH, num_workers=2)
    batches = iter(stream)
    for _ in range(4):
        next(batches)
    cost = cpu_ms(lambda: sum(len(batch) for batch in batches))
    stream.close()
    return cost


def memory(folder: Path, samples: int) -> dict[str, float]:
    """Return the growth of the process between the first tenth of many samples and the last, in megabytes."""
    path = write(folder / "small", "small", 500, size=64)
    seen, marks = 0, []
    for batch in loader({"small": path}, samples // BATCH, size=64, augment=Augmentation()):
        seen += len(batch)
        if seen >= samples // 10 and not marks:
            marks.append(_resident_mb())
    marks.append(_resident_mb())
    return {"samples": seen, "before": marks[0], "after": marks[1], "growth": marks[1] - marks[0]}


def _resident_mb() -> float:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def resume(folder: Path) -> dict[str, dict[str, float]]:
    """Return what opening and resuming cost at 10 and at 1,000 shards of 4 samples, in CPU milliseconds."""
    found = {}
    for shards in (10, 1000):
        path = write(folder / f"many{shards}", "many", 4 * shards, size=16, per_shard=4)
        state = {
            "iteration": 900,
            "micro": 0,
            "used": {"many": 900},
            "world_size": 1,
            "accumulate": 1,
            "images_per_batch": {"many": 1},
            "samples": {"many": 4 * shards},
            "seed": 0,
        }
        openings, resumings, fresh = [], [], []
        for _ in range(9):
            for resumed in (False, True):
                module = InterleavedDataModule(
                    {"many": ShardSource(str(path), batch_size=1)}, image_size=16, epoch_iterations=1
                )
                if resumed:
                    module.load_state_dict(dict(state))
                begin = time.process_time()
                module.setup("fit")
                opened = time.process_time()
                next(iter(module.train_dataloader()))
                (resumings if resumed else fresh).append(1e3 * (time.process_time() - opened))
                openings.append(1e3 * (opened - begin))
        found[str(shards)] = {
            "open the index": median(openings),
            "first batch, fresh": median(fresh),
            "first batch, resumed": median(resumings),
        }
    return found


def main() -> int:
    """Run everything, print a table, write JSON, and say whether the promises hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/benchmark_data.json"), help="JSON file for the figures")
    parser.add_argument("--samples", type=int, default=160, help="images of one data set (a multiple of 16)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds whose median is taken")
    parser.add_argument("--memory-samples", type=int, default=20_000, help="samples of the memory test")
    settings = parser.parse_args()
    one_thread(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = speed(folder, settings.samples, settings.rounds)
        result["parent_ms"] = parent(result.pop("paths"), settings.samples)
        result["memory_mb"] = memory(folder, settings.memory_samples)
        result["resume_ms"] = resume(folder)
    beyond = {
        f"resuming beyond a fresh start, at {shards} shards, ms": found["first batch, resumed"]
        - found["first batch, fresh"]
        for shards, found in result["resume_ms"].items()
    }
    checked = {
        **{name: value for name, value in result["ratios"].items() if name in PROMISED},
        "parent process, ms per sample": result["parent_ms"],
        "memory growth, MB": result["memory_mb"]["growth"],
        **beyond,
    }
    result["checked"] = {name: {"found": value, "promised": PROMISED[name]} for name, value in checked.items()}
    write_whole((json.dumps(result, indent=2) + "\n").encode(), settings.out)
    for title in ("ms", "ratios"):
        for name, value in result[title].items():
            print(f"{name:40} {value:8.3f}{' ms per sample' if title == 'ms' else ''}")
    for shards, found in result["resume_ms"].items():
        print(f"{shards} shards: " + ", ".join(f"{name} {value:.1f} ms" for name, value in found.items()))
    failed = [name for name, value in checked.items() if value > PROMISED[name]]
    for name, value in checked.items():
        print(f"{'above' if name in failed else 'within'} {PROMISED[name]:<6g} {name}: {value:.3f}")
    print(f"Figures in {settings.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
