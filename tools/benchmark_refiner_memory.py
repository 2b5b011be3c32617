"""How much memory the refiner takes for a large photograph, and from which share on dense tiles are faster.

    python tools/benchmark_refiner_memory.py --table docs/PERFORMANCE.md

The default refiner with random weights at both of its scales, without dense tiles, one thread, on a photograph whose
low-resolution alpha holds strands of hair. Each budget runs in a fresh process; memory is its peak beyond what the
photograph and the small maps take, so the alpha that is returned is part of it. Every alpha must have the same bits,
or the tool fails.

Then one tile at several shares of active pixels, by sparse layers and by dense convolutions (with the halo that makes
them exact), process CPU time, in turn, medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.networks.bands_and_tiles import TILE, Tile
from lit_matting.networks.refiner import Seen, SparseRefiner
from tools.benchmark_refiner import hair_bands, medians, processor, resident_bytes
from tools.documents import document_with, write_between_markers

GRID = 64
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MARKERS = "benchmark_refiner_memory"


def small_maps(strands: float) -> tuple[Tensor, Tensor]:
    """Return a low-resolution alpha with strands of hair over a share of the image, and random features."""
    hair = hair_bands(16 * GRID, strands).float()[None]
    return nn.functional.adaptive_avg_pool2d(hair, GRID), torch.randn(1, 32, GRID, GRID)


def measure(height: int, width: int, strands: float, budget: int | None) -> dict[str, Any]:
    """Refine one photograph in this process, once, and return the peak of its memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    refiner = SparseRefiner(max_active_pixels=budget, dense_above=None).eval()
    for unet in refiner.scales.values():
        nn.init.normal_(unet.leave.weight, std=0.1)
    alpha, features = small_maps(strands)
    with torch.no_grad():
        refiner(torch.rand(1, 3, 64, 96), alpha, alpha, features)  # libraries load themselves on first use
        image = torch.rand(1, 3, height, width)
        before = resident_bytes("VmRSS")
        # 5: forget the peak so far
        Path("/proc/self/clear_refs").write_text("5")
        started = time.process_time()
        refined = refiner(image, alpha, alpha, features)
        seconds = time.process_time() - started
        peak = resident_bytes("VmHWM") - before
    return {
        "budget": budget,
        "bytes": peak,
        "seconds": seconds,
        "active": int(refined.active[-1].sum()),
        "share": float(refined.active[-1].float().mean()),
        "digest": hashlib.sha256(refined.alpha.numpy().tobytes()).hexdigest(),
    }


@torch.no_grad()
def measure_tiles(repeats: int) -> list[tuple[float, float, float]]:
    """Return for several shares of active pixels the seconds of one tile by sparse and by dense layers."""
    refiner = SparseRefiner(max_active_pixels=None).eval()
    unet = refiner.scales["full_scale"]
    halo, small = max(unet.halo()), torch.rand(1, 33, GRID, GRID)
    found = []
    for share in SHARES:
        mask = torch.zeros(1, 2 * TILE, 2 * TILE, dtype=torch.bool)
        # as ragged as tiles come: holes between strands
        mask[:, :TILE, :TILE] = hair_bands(TILE, share) if share < 1 else True
        image, alpha = torch.rand(1, 3, *mask.shape[1:]), torch.rand(1, 1, *mask.shape[1:])
        seen = Seen(image, small[:, :1], small[:, 1:], None)
        # as large as a tile inside an image with its halo on every side
        wide = Tile(0, slice(0, TILE + 2 * halo), slice(0, TILE + 2 * halo))
        candidates = {
            # sparse changes its alpha in place
            "sparse": partial(refiner._in_bands, unet, seen, alpha.clone(), mask, mask),
            "dense": partial(refiner._in_tile, unet, wide, seen, alpha, mask),
        }
        seconds = medians(candidates, repeats)
        found.append((float(mask.sum()) / TILE**2, seconds["sparse"], seconds["dense"]))
        print(f"{found[-1][0]:.0%}: sparse / dense time {seconds['sparse'] / seconds['dense']:.2f}", flush=True)
    return found


def markdown(
    results: Sequence[dict[str, Any]], height: int, width: int, tiles: Sequence[tuple[float, float, float]]
) -> str:
    """Return the measurements as tables."""
    image = 12 * height * width / 2**20
    load = max(os.getloadavg()[0] - 1, 0.0)
    lines = [
        f"Measured by `python tools/benchmark_refiner_memory.py` on {processor()}, one thread, torch"
        f" {torch.__version__}: {width} x {height} pixels, {image:.0f} MiB of float32 themselves;"
        f" {load:.1f} other busy processes on {os.cpu_count()} cores. All rows of one share gave the same bits.",
        "",
        "| active pixels | share | `max_active_pixels` | peak above the image, MiB | CPU s |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        budget = "none" if result["budget"] is None else f"{result['budget']:,}"
        lines.append(
            f"| {result['active']:,} | {result['share']:.1%} | {budget} | {result['bytes'] / 2**20:.0f} |"
            f" {result['seconds']:.1f} |"
        )
    lines += ["", f"One tile of {TILE} pixels:", "", "| active | sparse / dense time |", "|---|---|"]
    lines += [f"| {share:.0%} | {sparse / dense:.2f} |" for share, sparse, dense in tiles]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[4000, 6000], metavar=("H", "W"), help="of the photograph")
    parser.add_argument("--strands", type=float, nargs="+", default=[0.01, 0.05], help="shares covered by hair")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2**18, 0], help="active pixels; 0: one go")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each method on a tile; 0: none")
    parser.add_argument("--table", type=document_with(MARKERS), help="Markdown file to write the table into")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return 0
    if not Path("/proc/self/clear_refs").exists():
        print("benchmark_refiner_memory: needs Linux, which tells a process's peak memory.", file=sys.stderr)
        return 2
    results = []
    for strands in options.strands:
        same = []
        for budget in options.budgets:
            task = json.dumps([*options.size, strands, budget or None])
            done = subprocess.run([sys.executable, __file__, "--one", task], capture_output=True, text=True, check=True)
            same.append(json.loads(done.stdout))
            print(same[-1], flush=True)
        if len({result["digest"] for result in same}) > 1:
            print("benchmark_refiner_memory: the budgets do not give the same alpha.", file=sys.stderr)
            return 1
        results += same
    torch.set_num_threads(1)
    tiles = measure_tiles(options.repeats) if options.repeats else []
    if options.table:
        write_between_markers(markdown(results, *options.size, tiles), MARKERS, options.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
