"""What a cut-out costs: time, memory and start-up, as ratios measured in one run.

    python tools/benchmark_inference.py --out build/benchmark_inference.json --table docs/PERFORMANCE.md
    python tools/benchmark_inference.py --checkpoint outputs/demo/last.ckpt --no-full

Processor time of one thread; what is compared is measured in turns, after one call that does not count, and medians
count; the 4000 x 3000 photograph, compared with nothing, is looked at once. Without a checkpoint the small
network is that of configs/experiment/demo.yaml with random weights. Random weights are uncertain of every pixel, which
would make the refiner work on all of them: in the place of what their heads say, trimap and alpha are those of a drawn
disc, whose edge makes 3 % of the pixels uncertain, before the refiner takes their neighbours in.

The full size is Stable Diffusion 2.1's with random weights, in a fresh process for each precision; memory is that
process's peak beyond what it held before the call, weights included in the latter. The exit status is 1 when a promise
is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.documents import document_with, write_between_markers

ROOT = Path(__file__).resolve().parents[1]
MARKERS = "benchmark_inference"
SMALL = ROOT / "configs/experiment/demo.yaml"
FULL = ROOT / "configs/backbone/sd21.yaml"
LARGE_PHOTO = (3000, 4000)
FULL_REPEATS = 3
MEBIBYTE = 2**20


# --- the small network ----------------------------------------------------------------------------


def measure_small(checkpoint: str | None, repeats: int, calls: int) -> dict[str, Any]:
    """Return times of the small network, in seconds of processor time, and how its memory grows."""
    matting = _pipeline(checkpoint, SMALL, "fp32")
    side = matting.image_size
    photographs = [_photograph(side, side, number) for number in range(8)]
    phrases = [f"the {word} one" for word in ("red", "green", "blue", "furry", "left", "right", "small", "large")]

    def second_phrase(encoded: Any) -> Callable[[], Any]:
        return lambda: matting(encoded, "the blue one", clean_colours=False)

    encoded = matting.encode(photographs[0])
    times = in_turns(
        {
            "first call": lambda: matting(photographs[0], "the red one", clean_colours=False),
            "second phrase": second_phrase(encoded),
            "eight one by one": lambda: [
                matting(photograph, phrase, clean_colours=False) for photograph, phrase in zip(photographs, phrases)
            ],
            "eight together": lambda: matting(photographs, phrases, clean_colours=False),
        },
        repeats,
    )
    for number in range(calls // 4):  # until the allocator has what it will need
        matting(_photograph(side, side + number % 40, number), f"thing number {number}").foreground.sum()
    gc.collect()
    before = resident_bytes()
    for number in range(calls):
        matting(_photograph(side, side + number % 40, number), f"thing number {number}").foreground.sum()
    gc.collect()
    return {"side": side, "seconds": times, "calls": calls, "growth": resident_bytes() - before}


def in_turns(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median processor time of each piece of work; they take turns, so that a busy spell meets all."""
    for call in work.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            started = time.process_time()
            call()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _pipeline(checkpoint: str | None, config: Path, precision: str) -> Any:
    from lit_matting.pipeline import MattingPipeline
    from tools.networks import open_pipeline, random_network

    if checkpoint is not None:
        return open_pipeline(checkpoint, precision)
    network, size = random_network(config)
    draw_disc(network)
    return MattingPipeline(network, size, device="cpu", precision=precision)


def draw_disc(network: Any) -> None:
    """Put a disc's trimap and alpha in the place of what the heads of a network with random weights say."""
    import torch

    class Drawn(torch.nn.Module):
        def __init__(self, head: Any, softness: float) -> None:
            super().__init__()
            self.head, self.softness = head, softness

        def forward(self, features: Any, *others: Any) -> Any:
            said = self.head(features, *others)
            height, width = said.shape[-2:]
            y = (torch.arange(height) + 0.5) / height - 0.5
            x = (torch.arange(width) + 0.5) / width - 0.5
            distance = (0.25 - (y[:, None] ** 2 + x**2).sqrt()) * height
            return (0.5 + distance / self.softness).clamp(0, 1).to(said.dtype).expand_as(said)

    network.trimap_head, network.alpha_head = Drawn(network.trimap_head, 2.0), Drawn(network.alpha_head, 1.0)


def _photograph(height: int, width: int, seed: int) -> Any:
    import numpy as np

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    wave = np.sin(2 * np.pi * (x / width + y / height + rng.random()))[..., None]
    return np.clip(127 + 90 * wave + rng.integers(-8, 9, (height, width, 3)), 0, 255).astype(np.uint8)


# --- the full size, each precision in a process of its own ----------------------------------------


def print_full(precision: str, large: bool) -> None:
    """Print, as JSON, what the full-size network costs in one precision."""
    import torch

    torch.set_num_threads(1)
    matting = _pipeline(None, FULL, precision)
    # to its precision, before anything is measured
    with matting._running():
        pass
    gc.collect()
    report: dict[str, Any] = {"precision": precision, "weights": resident_bytes(), "seconds": {}, "peaks": {}}
    photograph = _photograph(512, 512, 0)
    encoded = None

    def peak_of(name: str, call: Callable[[], Any]) -> Any:
        gc.collect()
        before = forget_peak()
        result = call()
        report["peaks"][name] = peak_bytes() - before
        return result

    def first() -> Any:
        nonlocal encoded
        encoded = matting.encode(photograph)
        return matting(encoded, "the red umbrella", clean_colours=False)

    def second() -> Any:
        return matting(encoded, "the glass on the left", clean_colours=False)

    peak_of("first call", first)
    peak_of("second phrase", second)
    report["seconds"] = in_turns({"first call": first, "second phrase": second}, FULL_REPEATS)
    if large:
        photograph = _photograph(*LARGE_PHOTO, 1)
        started = time.process_time()
        result = peak_of("4000 x 3000", lambda: matting(photograph, "the red umbrella", clean_colours=False))
        report["seconds"]["4000 x 3000"] = time.process_time() - started
        report["uncertain"] = float(((result.trimap > 0.25) & (result.trimap < 0.75)).mean())
        del result
        started = time.process_time()
        peak_of("4000 x 3000, cut-out with clean colours", lambda: matting(photograph, "the red umbrella").cutout)
        report["seconds"]["4000 x 3000, cut-out with clean colours"] = time.process_time() - started
    print(json.dumps(report))


def measure_full() -> dict[str, Any]:
    """Return what the full-size network costs in bf16 and in fp32."""
    found = {}
    for precision in ("bf16", "fp32"):
        command = [sys.executable, __file__, "--one-full", precision]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment())
        if done.returncode:
            raise SystemExit(f"benchmark_inference: error: the full size in {precision} failed: {done.stderr[-500:]}")
        found[precision] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(found[precision]), flush=True)
    return found


def resident_bytes() -> int:
    """Return how much memory this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_peak() -> int:
    """Set the peak of memory back to what is held now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def peak_bytes() -> int:
    """Return the largest amount of memory held since :func:`forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


# --- start-up -------------------------------------------------------------------------------------


def measure_start(repeats: int) -> dict[str, float]:
    """Return processor time of an import and of a command's help, less that of an empty interpreter for the former."""
    commands = {
        "empty": ["-c", "pass"],
        "import": ["-c", "import lit_matting"],
        "matte --help": ["-m", "lit_matting", "matte", "--help"],
    }

    def run(words: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=_environment(), cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    seconds = {name: statistics.median(run(words) for _ in range(repeats)) for name, words in commands.items()}
    return {
        "import": max(0.0, seconds["import"] - seconds["empty"]),
        "matte --help": seconds["matte --help"],
    }


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# --- the report -----------------------------------------------------------------------------------


def promises(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every promise with its measured value and whether it is kept."""
    found: list[dict[str, Any]] = []

    def add(name: str, value: float, limit: float, at_least: bool = False) -> None:
        kept = value >= limit if at_least else value <= limit
        sign = ">=" if at_least else "<="
        found.append({"name": name, "value": value, "limit": f"{sign} {limit:g}", "kept": kept})

    small = report["small"]["seconds"]
    add("small network: a batch of 8 / one by one", small["eight together"] / small["eight one by one"], 0.8)
    add(
        f"small network: memory growth over {report['small']['calls']} calls, MiB",
        report["small"]["growth"] / MEBIBYTE,
        8,
    )
    if "full" in report:
        half, whole = report["full"]["bf16"], report["full"]["fp32"]
        seconds = half["seconds"]
        add("full size: second phrase / first call", seconds["second phrase"] / seconds["first call"], 0.6)
        for name in ("first call", "second phrase"):
            ratio = whole["seconds"][name] / seconds[name]
            add(f"full size, {name}: fp32 / bf16 time", ratio, 2, at_least=True)
        add("full size, 512 x 512: memory beside the weights, MiB", half["peaks"]["first call"] / MEBIBYTE, 1024)
        add("full size, 4000 x 3000: memory beside the weights, MiB", half["peaks"]["4000 x 3000"] / MEBIBYTE, 2048)
    add("import lit_matting, seconds", report["start"]["import"], 0.2)
    add("matte --help, seconds", report["start"]["matte --help"], 1.5)
    return found


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown tables."""
    small = report["small"]
    lines = [
        f"Measured by `{report['command']}` on {report['processor']}, one thread, processor time; the small network is"
        f" {report['network']} at {small['side']} pixels.",
        "",
        "| promised | measured | limit | |",
        "|---|---|---|---|",
    ]
    for promise in report["promises"]:
        kept = "kept" if promise["kept"] else "**missed**"
        lines.append(f"| {promise['name']} | {promise['value']:.2f} | {promise['limit']} | {kept} |")
    seconds = small["seconds"]
    lines += ["", "| small network | ms |", "|---|---|"]
    lines += [f"| {name} | {1e3 * value:.0f} |" for name, value in seconds.items()]
    share = seconds["second phrase"] / seconds["first call"]
    lines += ["", f"There a second phrase takes {share:.2f} of a first call: its image encoder is a few layers."]
    if "full" in report:
        lines += ["", "| full size | bf16 s | fp32 s | bf16 MiB | fp32 MiB |", "|---|---|---|---|---|"]
        half, whole = report["full"]["bf16"], report["full"]["fp32"]
        for name in half["seconds"]:
            cells = [f"{run['seconds'][name]:.1f}" if name in run["seconds"] else "" for run in (half, whole)]
            cells += [f"{run['peaks'][name] / MEBIBYTE:.0f}" if name in run["peaks"] else "" for run in (half, whole)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="of the small network; default: the demo's with random weights")
    parser.add_argument("--repeats", type=int, default=9, help="times each piece of work is measured")
    parser.add_argument("--calls", type=int, default=200, help="calls over which memory must not grow")
    parser.add_argument("--no-full", action="store_true", help="leave out the full size: minutes, and 12 GiB of memory")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--table", type=document_with(MARKERS), help="Markdown file to write the table into")
    parser.add_argument("--one-full", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one_full:
        print_full(options.one_full, large=options.one_full == "bf16")
        return 0
    import torch

    from lit_matting.checks import InputError
    from lit_matting.files import write_whole
    from tools.benchmark_refiner import processor

    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "command": "python tools/benchmark_inference.py",
        "processor": processor(),
        "torch": torch.__version__,
        "network": options.checkpoint or "configs/experiment/demo.yaml with random weights",
    }
    try:
        report["start"] = measure_start(3)
        report["small"] = measure_small(options.checkpoint, options.repeats, options.calls)
    except InputError as error:
        print(f"benchmark_inference: error: {error}", file=sys.stderr)
        return 2
    if not options.no_full:
        report["full"] = measure_full()
    report["promises"] = promises(report)
    for promise in report["promises"]:
        mark = "ok    " if promise["kept"] else "MISSED"
        print(f"{mark} {promise['name']}: {promise['value']:.2f} ({promise['limit']})")
    if options.out:
        write_whole((json.dumps(report, indent=2) + "\n").encode(), options.out)
    if options.table:
        write_between_markers(markdown(report), MARKERS, options.table)
    return 0 if all(promise["kept"] for promise in report["promises"]) else 1


if __name__ == "__main__":
    sys.exit(main())
