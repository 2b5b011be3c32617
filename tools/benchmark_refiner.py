"""Sparse refinement against dense refinement and dense tiles: time and peak memory, in one run.

    python tools/benchmark_refiner.py --out build/benchmark_refiner.json --table docs/PERFORMANCE.md

One thread, process CPU time, all methods interleaved, medians. The same four layers (8 -> 32 -> 32 -> 32 -> 1, 3 x 3,
ReLU) with the same weights, on hair-like bands that cover a given share of the image:

- sparse: what `lit_matting.sparse` does, from the mask to the pasted result, neighbour tables included;
- dense: `F.conv2d` on the whole image, masked after every layer, so that it computes the same function, in the memory
  layout in which it is fastest;
- tiles: the same on those 256-pixel tiles that hold an active pixel, with the halo that makes them exact.

The results are compared before anything is timed. Memory is the peak of a fresh process beyond what the inputs take.
The exit status is 1 when a promised ratio is missed. A busy machine makes everything slower, and what moves memory more
than what computes: read ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.files import write_whole
from lit_matting.sparse import ActiveSet, SubmanifoldConv2d, gather, scatter
from tools.documents import document_with, write_between_markers

WIDTHS = (8, 32, 32, 32, 1)
TILE = 256
HALO = len(WIDTHS) - 1
BAND_WIDTH = 15
FLOOR_ROWS = 512
LINE_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2)
METHODS = ("sparse", "dense", "tiles")
MARKERS = "benchmark_refiner"


def hair_bands(side: int, fraction: float, seed: int = 0) -> Tensor:
    """Return a mask (1, side, side) as the refiner sees it: bands around strands that leave a contour in tufts.

    Strands are drawn until the share of active pixels is reached; all bands are as wide as the refiner's dilation.
    """
    rng = np.random.default_rng(seed)
    mask = np.zeros((side, side), np.uint8)
    pace = 5 * math.sqrt(side / 512)
    while mask.mean() < fraction:
        centre, radius = rng.uniform(0.25, 0.75, 2) * side, rng.uniform(0.1, 0.35) * side
        place = rng.uniform(0, 2 * np.pi)
        for _ in range(12):
            angle = place + rng.normal(0, 0.5)
            point, heading = centre + radius * np.array([np.cos(angle), np.sin(angle)]), angle + rng.normal(0, 0.3)
            strand = [point]
            for _ in range(int(rng.integers(10, 40))):
                heading += rng.normal(0, 0.15)
                point = point + pace * np.array([np.cos(heading), np.sin(heading)])
                strand.append(point)
            cv2.polylines(mask, [np.round(strand).astype(np.int32)], False, 1, BAND_WIDTH)
            if mask.mean() >= fraction:
                break
    return torch.from_numpy(mask.astype(bool))[None]


class Refiner(nn.Module):
    """The four layers, once; every method uses their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SubmanifoldConv2d(i, o) for i, o in pairwise(WIDTHS))

    def sparse(self, image: Tensor, mask: Tensor, background: Tensor) -> Tensor:
        """From the mask to the pasted result."""
        active = ActiveSet.from_mask(mask)
        return scatter(self.rows(gather(image, active), active), active, background)

    def rows(self, rows: Tensor, active: ActiveSet) -> Tensor:
        """The layers on rows."""
        for layer in self.layers[:-1]:
            rows = layer(rows, active).relu_()
        return self.layers[-1](rows, active)

    def maps(self, image: Tensor, mask: Tensor) -> Tensor:
        """The layers on maps, masked after each of them; in place where autograd allows it."""
        # channels last: on this CPU half the time and half the memory of the default layout
        maps = (image * mask).contiguous(memory_format=torch.channels_last)
        for layer in self.layers[:-1]:
            maps = F.conv2d(maps, layer.weight, layer.bias, padding=1).mul_(mask).relu_()
        return F.conv2d(maps, self.layers[-1].weight, self.layers[-1].bias, padding=1)

    def dense(self, image: Tensor, mask: Tensor, background: Tensor) -> Tensor:
        """On the whole image."""
        return torch.where(mask[:, None], self.maps(image, mask[:, None].float()), background)

    def tiles(self, image: Tensor, mask: Tensor, background: Tensor) -> Tensor:
        """On the tiles that hold an active pixel."""
        result = background.clone()
        height, width = mask.shape[1:]
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                inside = mask[:, top : top + TILE, left : left + TILE]
                if not inside.any():
                    continue
                first, start = max(top - HALO, 0), max(left - HALO, 0)
                window = (..., slice(first, top + TILE + HALO), slice(start, left + TILE + HALO))
                maps = self.maps(image[window], mask[window][:, None].float())
                part = maps[:, :, top - first :, left - start :][:, :, : inside.shape[1], : inside.shape[2]]
                place = result[:, :, top : top + TILE, left : left + TILE]
                place.copy_(torch.where(inside[:, None], part, place))
        return result


def inputs(side: int, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, mask and background."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, WIDTHS[0], side, side, generator=generator)
    return image, hair_bands(side, fraction), torch.zeros(1, 1, side, side)


def training_step(refiner: Refiner, method: str, image: Tensor, mask: Tensor) -> None:
    """One forward and backward pass, gradients of all weights."""
    refiner.zero_grad()
    if method == "sparse":
        active = ActiveSet.from_mask(mask)
        refiner.rows(gather(image, active), active).square().mean().backward()
    else:
        (refiner.maps(image, mask[:, None].float()).square() * mask[:, None]).mean().backward()


def medians(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of process CPU time of each candidate, all of them in turn.

    Each timed pass follows an untimed one, so that no candidate pays for the memory that another one gave back.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            candidate()
            started = time.process_time()
            candidate()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def gemm_floor(rows: int) -> Callable[[], None]:
    """Return the matrix products that a 32 -> 32 layer cannot do without, on a buffer that is already there."""
    gathered, matrix = torch.randn(FLOOR_ROWS, 9 * 32), torch.randn(9 * 32, 32)
    result = torch.zeros(max(rows, FLOOR_ROWS), 32)

    def run() -> None:
        for start in range(0, max(rows - FLOOR_ROWS, 0) + 1, FLOOR_ROWS):
            torch.mm(gathered, matrix, out=result[start : start + FLOOR_ROWS])

    return run


def measure(side: int, fraction: float, repeats: int) -> dict[str, Any]:
    """Time all methods at one size and share, and one layer against its floor."""
    refiner = Refiner()
    image, mask, background = inputs(side, fraction)
    with torch.no_grad():
        results = {method: getattr(refiner, method)(image, mask, background) for method in METHODS}
        difference = max(float((results["sparse"] - results[method]).abs().max()) for method in METHODS)
        if difference > 1e-5:
            raise RuntimeError(f"{side} px, {fraction:.0%}: the methods differ by {difference:.1e}")
        active = ActiveSet.from_mask(mask)
        layer, rows = refiner.layers[1], torch.randn(len(active), 32)
        candidates: dict[str, Callable[[], Any]] = {
            method: lambda method=method: getattr(refiner, method)(image, mask, background) for method in METHODS
        }
        seconds = medians(candidates, repeats)
        # short ones on their own and more often: the dense pass would leave them a cold cache
        seconds |= medians({"layer": lambda: layer(rows, active), "floor": gemm_floor(len(active))}, 3 * repeats)
    return {
        "side": side,
        "fraction": fraction,
        "active": len(active),
        "difference": difference,
        "seconds": seconds,
        "dense / sparse": seconds["dense"] / seconds["sparse"],
        "tiles / sparse": seconds["tiles"] / seconds["sparse"],
        "layer / floor": seconds["layer"] / seconds["floor"],
    }


def measure_linearity(side: int, repeats: int) -> dict[str, Any]:
    """Time the sparse method alone at several shares of one side, and with as many pixels on a quarter of the area."""
    refiner = Refiner()
    cases = [(side, fraction) for fraction in LINE_FRACTIONS] + [(side // 2, 4 * LINE_FRACTIONS[2])]
    # one image of each side for all shares
    images = {edge: inputs(edge, 0.01) for edge in (side, side // 2)}
    prepared = [(images[edge][0], hair_bands(edge, fraction), images[edge][2]) for edge, fraction in cases]
    active = [int(mask.sum()) for _, mask, _ in prepared]
    with torch.no_grad():
        runs = {str(number): lambda number=number: refiner.sparse(*prepared[number]) for number in range(len(prepared))}
        seconds = list(medians(runs, 3 * repeats).values())
    slope, fit = log_log_line(list(zip(active[:-1], seconds[:-1])))
    per_pixel = [time / pixels for time, pixels in zip(seconds, active)]
    return {
        "side": side,
        "active": active[:-1],
        "seconds": seconds[:-1],
        "slope": slope,
        "r squared": fit,
        "larger area": per_pixel[2] / per_pixel[-1],
    }


def measure_training(side: int, fraction: float, repeats: int) -> dict[str, Any]:
    """Time a training step, sparse and dense."""
    refiner = Refiner()
    image, mask, _ = inputs(side, fraction)
    gradients = {}
    for method in ("sparse", "dense"):
        training_step(refiner, method, image, mask)
        # the dense mean is over all pixels, the sparse one over the active ones
        scale = 1.0 if method == "sparse" else mask.numel() / int(mask.sum())
        gradients[method] = [parameter.grad * scale for parameter in refiner.parameters()]
    for one, other in zip(gradients["sparse"], gradients["dense"]):
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-5):
            raise RuntimeError(f"gradients differ by {float((one - other).abs().max()):.1e}")
    steps = {
        method: lambda method=method: training_step(refiner, method, image, mask) for method in ("sparse", "dense")
    }
    seconds = medians(steps, repeats)
    return {
        "side": side,
        "fraction": fraction,
        "seconds": seconds,
        "dense / sparse": seconds["dense"] / seconds["sparse"],
    }


def peak_bytes(method: str, side: int, fraction: float, training: bool) -> int | None:
    """Return the peak memory of one pass in a fresh process beyond its inputs; None where Linux does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    task = json.dumps([method, side, fraction, training])
    done = subprocess.run(
        [sys.executable, __file__, "--peak", task], capture_output=True, text=True, check=True, timeout=600
    )
    return int(done.stdout)


def print_peak(method: str, side: int, fraction: float, training: bool) -> None:
    """Inside the fresh process: run once and print the peak in bytes."""
    refiner = Refiner()

    def run(side: int, fraction: float) -> None:
        image, mask, background = inputs(side, fraction)
        before = resident_bytes("VmRSS")
        # 5: forget the peak so far
        Path("/proc/self/clear_refs").write_text("5")
        if training:
            training_step(refiner, method, image, mask)
        else:
            with torch.no_grad():
                getattr(refiner, method)(image, mask, background)
        peaks.append(resident_bytes("VmHWM") - before)

    peaks: list[int] = []
    run(64, 0.1)  # libraries load themselves on first use
    run(side, fraction)
    print(peaks[-1])


def resident_bytes(key: str) -> int:
    """Return what Linux says of this process's memory: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def log_log_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return slope and R squared of the straight line through points on logarithmic axes.

    >>> slope, fit = log_log_line([(1, 3), (10, 30), (100, 300)])
    >>> round(slope, 6), round(fit, 6)
    (1.0, 1.0)
    """
    x, y = np.log(np.array(points, dtype=float)).T
    slope, offset = np.polyfit(x, y, 1)
    rest = y - (slope * x + offset)
    return float(slope), float(1 - rest.var() / y.var())


def promises(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every promised figure that the report has, with its limit and whether it is kept."""
    cases = {(case["side"], case["fraction"]): case for case in report["cases"]}
    found: list[dict[str, Any]] = []

    def add(name: str, value: float | None, low: float = -math.inf, high: float = math.inf) -> None:
        if value is not None:
            limit = " to ".join(f"{edge:g}" for edge in (low, high) if math.isfinite(edge))
            sign = "" if math.isfinite(low) and math.isfinite(high) else ">= " if math.isfinite(low) else "<= "
            found.append({"name": name, "value": value, "limit": sign + limit, "kept": low <= value <= high})

    for fraction, faster, smaller in ((0.01, 25, 20), (0.05, 8, 8), (0.2, 2, None)):
        if case := cases.get((2048, fraction)):
            add(f"2048 px, {fraction:.0%}: dense / sparse time", case["dense / sparse"], low=faster)
            if smaller is not None:
                add(f"2048 px, {fraction:.0%}: dense / sparse memory", case.get("memory ratio"), low=smaller)
    if case := cases.get((2048, 0.05)):
        add("2048 px, 5%: tiles / sparse time", case["tiles / sparse"], low=3.5)
        add("2048 px, 5%: 32 -> 32 layer / GEMM floor", case["layer / floor"], high=2.0)
    if line := report.get("linearity"):
        add("log-log slope of time over active pixels", line["slope"], 0.9, 1.15)
        add("R squared of that line", line["r squared"], low=0.98)
        add("time per active pixel, as many pixels on 4 x the area", line["larger area"], high=1.5)
    if step := report.get("training"):
        name = f"training step, {step['side']} px, {step['fraction']:.0%}: dense / sparse"
        add(f"{name} time", step["dense / sparse"], low=8)
        add(f"{name} memory", step.get("memory ratio"), low=12)
    return found


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown tables."""
    machine = report["machine"]
    lines = [
        f"Measured by `{report['command']}` on {machine['processor']}, one thread, torch {machine['torch']},"
        f" {machine['load']:.1f} other busy processes on {machine['cores']} cores.",
        "",
        "| side | active | pixels | sparse ms | dense / sparse | tiles / sparse | layer / floor | sparse MiB |"
        " dense MiB | tiles MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        memory = case.get("memory", {})
        mebibytes = [f"{memory[method] / 2**20:.0f}" if memory.get(method) else "" for method in METHODS]
        lines.append(
            f"| {case['side']} | {case['fraction']:.0%} | {case['active']:,} | {1e3 * case['seconds']['sparse']:.0f} |"
            f" {case['dense / sparse']:.1f} | {case['tiles / sparse']:.1f} | {case['layer / floor']:.2f} |"
            f" {' | '.join(mebibytes)} |"
        )
    lines += ["", "| promised | measured | limit | |", "|---|---|---|---|"]
    for promise in report["promises"]:
        kept = "kept" if promise["kept"] else "**missed**"
        lines.append(f"| {promise['name']} | {promise['value']:.2f} | {promise['limit']} | {kept} |")
    return "\n".join(lines)


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def run(
    sides: Sequence[int], fractions: Sequence[float], repeats: int, memory: bool, training_side: int | None
) -> dict[str, Any]:
    """Measure everything and return the report."""
    report: dict[str, Any] = {
        "command": "python tools/benchmark_refiner.py",
        "machine": {
            "processor": processor(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load": max(os.getloadavg()[0] - 1, 0.0),
        },
        "repeats": repeats,
        "cases": [],
    }
    for side in sides:
        for fraction in fractions:
            case = measure(side, fraction, repeats)
            if memory:
                case["memory"] = {method: peak_bytes(method, side, fraction, False) for method in METHODS}
                if case["memory"]["sparse"]:
                    case["memory ratio"] = case["memory"]["dense"] / case["memory"]["sparse"]
            report["cases"].append(case)
            print(
                f"{side:5d} px {fraction:4.0%}: sparse {1e3 * case['seconds']['sparse']:7.1f} ms,"
                f" dense / sparse {case['dense / sparse']:5.1f}, tiles / sparse {case['tiles / sparse']:5.1f},"
                f" layer / floor {case['layer / floor']:.2f}, memory ratio {case.get('memory ratio', math.nan):.1f}",
                flush=True,
            )
    if len(fractions) > 1:
        report["linearity"] = measure_linearity(max(sides), repeats)
    if training_side is not None:
        report["training"] = measure_training(training_side, 0.05, repeats)
        if memory:
            peaks = {method: peak_bytes(method, training_side, 0.05, True) for method in ("sparse", "dense")}
            report["training"]["memory"] = peaks
            if peaks["sparse"] and peaks["dense"]:
                report["training"]["memory ratio"] = peaks["dense"] / peaks["sparse"]
    report["promises"] = promises(report)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048], help="image sides in pixels")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.2], help="active shares")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each method; the median counts")
    parser.add_argument("--training-side", type=int, default=1024, help="side of the training step; 0: leave it out")
    parser.add_argument("--no-memory", action="store_true", help="leave out the fresh processes that measure memory")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--table", type=document_with(MARKERS), help="Markdown file to write the table into")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.peak:
        print_peak(*json.loads(options.peak))
        return 0
    report = run(
        options.sides, options.fractions, options.repeats, not options.no_memory, options.training_side or None
    )
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
