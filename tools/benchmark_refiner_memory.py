"""How much memory the refiner takes for a large photograph, in bands of several budgets and in one go.

    python tools/benchmark_refiner_memory.py --table docs/PERFORMANCE.md

The default refiner with random weights at both of its scales, one thread, on a photograph whose low-resolution alpha
holds strands of hair. Each budget runs in a fresh process; memory is its peak beyond what the photograph and the small
maps take, so the alpha that is returned is part of it. Every alpha must have the same bits, or the tool fails.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.networks.refiner import SparseRefiner
from tools.benchmark_refiner import hair_bands, processor, resident_bytes, write_between_markers

GRID = 64
MARKERS = ("<!-- benchmark_refiner_memory:start -->", "<!-- benchmark_refiner_memory:end -->")


def small_maps(strands: float) -> tuple[Tensor, Tensor]:
    """Return a low-resolution alpha with strands of hair over a share of the image, and random features."""
    hair = hair_bands(16 * GRID, strands).float()[None]
    return nn.functional.adaptive_avg_pool2d(hair, GRID), torch.randn(1, 32, GRID, GRID)


def measure(height: int, width: int, strands: float, budget: int | None) -> dict[str, Any]:
    """Refine one photograph in this process, once, and return the peak of its memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    refiner = SparseRefiner(max_active_pixels=budget).eval()
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


def markdown(results: Sequence[dict[str, Any]], height: int, width: int) -> str:
    """Return the measurements as a table."""
    image = 12 * height * width / 2**20
    lines = [
        f"Measured by `python tools/benchmark_refiner_memory.py` on {processor()}, one thread, torch"
        f" {torch.__version__}: {width} x {height} pixels, {image:.0f} MiB of float32 themselves. All rows of one share"
        " gave the same bits.",
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
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[4000, 6000], metavar=("H", "W"), help="of the photograph")
    parser.add_argument("--strands", type=float, nargs="+", default=[0.01, 0.1], help="shares covered by hair")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2**16, 2**18, 0], help="active pixels; 0: one go")
    parser.add_argument("--table", type=Path, help="Markdown file whose section between the markers is replaced")
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
    if options.table:
        write_between_markers(options.table, markdown(results, *options.size), MARKERS, "## The refiner's memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
