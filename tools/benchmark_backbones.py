"""The diffusion backbone and its students side by side: parameters, FLOPs and CPU time of one pass at 512 pixels.

    python tools/benchmark_backbones.py --table docs/PERFORMANCE.md

Random weights in bfloat16, one image, one phrase of 40 tokens, one thread, process CPU time, all models interleaved,
medians. What is timed is `decode`: text correction, UNet, features and attention maps. The image and the text encoder
are the same for teacher and students and have a row each. FLOPs are those of matrix products and convolutions, a
multiplication and an addition counting as two. Read ratios, not seconds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.backbones import DiffusionBackbone
from lit_matting.backbones.image import VAEEncoder
from lit_matting.backbones.loading import load_parts
from lit_matting.backbones.pruning import Pruning, prune
from lit_matting.backbones.text import CLIPEncoder
from tools.documents import document_with, write_between_markers

STUDENTS = {
    "student base": Pruning(layers_per_block=1),
    "student small": Pruning(layers_per_block=1, mid_block=False),
    "student tiny with mid block": Pruning(layers_per_block=1, levels=3),
    "student tiny": Pruning(layers_per_block=1, levels=3, mid_block=False),
}
PHRASE = "the red umbrella on the left"
MARKERS = "benchmark_backbones"


@dataclass
class Row:
    """One line of the table."""

    name: str
    parameters: int
    run: Callable[[], object]
    flops: int = 0
    seconds: list[float] = field(default_factory=list)


def rows(pretrained: str | None, architecture: str | None, size: int) -> list[Row]:
    """Build everything and return what is to be measured: the teacher, its students, and the two encoders."""
    dtype = torch.bfloat16
    parts = load_parts(pretrained, architecture, unet_dtype=dtype, frozen_dtype=dtype)
    unets = {"teacher": parts.unet} | {name: prune(parts.unet, pruning) for name, pruning in STUDENTS.items()}
    parameters = {name: count(unet) for name, unet in unets.items()}  # the published counts, output layers included
    image_encoder = VAEEncoder(parts.autoencoder, None, "bf16")
    text_encoder = CLIPEncoder(parts.text_model, parts.vocabulary, precision="bf16", cache_size=1)
    backbones = {name: DiffusionBackbone(image_encoder, text_encoder, unet).eval() for name, unet in unets.items()}
    image = torch.rand(1, 3, size, size)
    latent, text = image_encoder(image).to(dtype), text_encoder([PHRASE])
    phrases = iter(range(1_000_000))  # a phrase that was seen before is not encoded again
    return [
        *(
            Row(name, parameters[name], lambda backbone=backbone: backbone.decode(latent, text))
            for name, backbone in backbones.items()
        ),
        Row("image encoder", count(image_encoder), lambda: image_encoder(image)),
        Row("text encoder", count(text_encoder), lambda: text_encoder([f"{PHRASE} {next(phrases)}"])),
    ]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.inference_mode()
def measure(measured: Sequence[Row], rounds: int) -> None:
    """Fill in FLOPs and seconds; the pass that counts is also the one that warms up."""
    for row in measured:
        # the plain form of attention consists of products that the counter knows on every device
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            row.run()
        row.flops = counter.get_total_flops()
        row.run()
    for _ in range(rounds):
        for row in measured:
            started = time.process_time()
            row.run()
            row.seconds.append(time.process_time() - started)


def table(measured: Sequence[Row], size: int, rounds: int) -> str:
    """Return the table in markdown; ratios are against the first row."""
    first, middle = measured[0], statistics.median(measured[0].seconds)
    lines = [
        f"Measured by `python tools/benchmark_backbones.py` on {processor()}, one thread, torch {torch.__version__},"
        f" bfloat16, random weights, {size} x {size}, {rounds} rounds.",
        "",
        "| | parameters | GFLOPs | / teacher | CPU s | / teacher |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in measured:
        seconds = statistics.median(row.seconds)
        lines.append(
            f"| {row.name} | {row.parameters:,} | {row.flops / 1e9:,.0f} | {row.flops / first.flops:.2f} |"
            f" {seconds:.2f} | {seconds / middle:.2f} |"
        )
    return "\n".join(lines)


def processor() -> str:
    """Return what the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/benchmark_backbones.py", description="Teacher and students: parameters, FLOPs, CPU time."
    )
    parser.add_argument("--architecture", default="sd21", help="what to build with random weights (default sd21)")
    parser.add_argument("--pretrained", help="a folder in diffusers' layout instead of random weights")
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes of each (default %(default)s)")
    parser.add_argument("--table", type=document_with(MARKERS), help="Markdown file to write the table into")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = rows(options.pretrained, options.architecture, options.size)
    measure(measured, options.rounds)
    text = table(measured, options.size, options.rounds)
    print(text)
    if options.table:
        write_between_markers(text, MARKERS, options.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
