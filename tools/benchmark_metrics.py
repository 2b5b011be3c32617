"""Speed and exactness of the matting errors against straightforward implementations, in one run.

    python tools/benchmark_metrics.py --out build/benchmark_metrics.json

One thread, process CPU time, both sides interleaved and their medians divided, on 1080 x 1920 mattes of four kinds:
hair (a body with thin strands), smooth (a wide soft edge), binary, and speckle (noise). The straightforward versions
are in this file: connected components of the whole image at each of the ten thresholds (OpenCV, background excluded),
two full 9 x 9 filter passes in float64, and float64 NumPy. Values are compared as well; the exit status is 1 when a
ratio is below what docs/METRICS.md promises or a value differs by more than 1e-9.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.files import write_whole
from lit_matting.metrics import functional

Matte = NDArray[np.uint8]
PROMISED = {
    "conn": {"hair": 8.0, "smooth": 2.0, "binary": 2.0, "speckle": 2.0},
    "grad": dict.fromkeys(("hair", "smooth", "binary", "speckle"), 4.0),
    "sad + mse + mad": dict.fromkeys(("hair", "smooth", "binary", "speckle"), 5.0),
}
TOLERANCE = 1e-9


def hair(height: int, width: int, rng: np.random.Generator) -> tuple[Matte, Matte]:
    """Return prediction and truth of a soft-edged body with 3,000 strands; it errs where alpha is soft."""
    alpha = np.zeros((height, width), np.uint8)
    centre, axes = np.array([width / 2, height * 0.58]), np.array([width * 0.17, height * 0.38])
    cv2.ellipse(alpha, (int(centre[0]), int(centre[1])), (int(axes[0]), int(axes[1])), 0, 0, 360, 255, -1)
    alpha = cv2.GaussianBlur(alpha, (0, 0), 2)
    for _ in range(3000):
        angle = rng.uniform(0, 2 * np.pi)
        heading = angle + rng.normal(0, 0.4)
        point = centre + 0.98 * axes * (np.cos(angle), np.sin(angle))
        strand = [point]
        for _ in range(14):
            heading += rng.normal(0, 0.25)
            point = point + 9 * np.array([np.cos(heading), np.sin(heading)])
            strand.append(point)
        points = (np.array(strand) * 8).astype(np.int32)
        cv2.polylines(alpha, [points], False, int(rng.integers(60, 256)), 1, cv2.LINE_AA, 3)
    blurred = cv2.GaussianBlur(alpha, (0, 0), 1) + rng.normal(0, 25, alpha.shape)
    soft = (alpha > 0) & (alpha < 255)
    return np.where(soft, np.clip(blurred, 0, 255), alpha).astype(np.uint8), alpha


def smooth(height: int, width: int, rng: np.random.Generator) -> tuple[Matte, Matte]:
    """Return prediction and truth of an ellipse out of focus, the prediction with a slow wave on it."""
    sharp = np.zeros((height, width), np.uint8)
    cv2.ellipse(sharp, (width // 2, height // 2), (width // 4, height // 3), 0, 0, 360, 255, -1)
    alpha = cv2.GaussianBlur(sharp, (0, 0), 40)
    wave = 12 * np.sin(np.arange(width) / 50)[None] * np.cos(np.arange(height) / 70)[:, None]
    pred = np.clip(alpha + wave * (alpha > 0), 0, 255).astype(np.uint8)
    return pred, alpha


def binary(height: int, width: int, rng: np.random.Generator) -> tuple[Matte, Matte]:
    """Return two hard masks, one moved by some pixels, with specks around."""
    alpha = np.zeros((height, width), np.uint8)
    cv2.ellipse(alpha, (width // 2, height // 2), (width // 5, height // 3), 0, 0, 360, 255, -1)
    pred = np.roll(alpha, (3, 5), (0, 1))
    for _ in range(300):
        place = tuple(int(rng.integers(0, size)) for size in (width, height))
        cv2.circle(pred, place, int(rng.integers(1, 6)), int(rng.choice([0, 255])), -1)
    return pred, alpha


def speckle(height: int, width: int, rng: np.random.Generator) -> tuple[Matte, Matte]:
    """Return two independent images of noise: the worst case for everything that looks for structure."""
    pred, alpha = (rng.integers(0, 256, (height, width)).astype(np.uint8) for _ in range(2))
    return pred, alpha


KINDS: dict[str, Callable[[int, int, np.random.Generator], tuple[Matte, Matte]]] = {
    "hair": hair,
    "smooth": smooth,
    "binary": binary,
    "speckle": speckle,
}


def plain_conn(pred: Matte, alpha: Matte) -> float:
    """Return the connectivity error by labelling the image at every threshold."""
    level = np.full(alpha.shape, -1.0)
    for step in range(1, 11):
        threshold = np.uint8(-(-255 * step // 10))
        both = ((pred >= threshold) & (alpha >= threshold)).astype(np.uint8)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(both, connectivity=4)
        omega = labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax() if count > 1 else np.zeros(alpha.shape, bool)
        level[(level == -1) & ~omega] = (step - 1) / 10
    level[level == -1] = 1
    rises = [matte / 255.0 - level for matte in (pred, alpha)]
    phi = [1 - rise * (rise >= 0.15) for rise in rises]
    return float(np.abs(phi[0] - phi[1]).sum() / 1000)


def plain_grad(pred: Matte, alpha: Matte) -> float:
    """Return the gradient error by two 9 x 9 passes over each whole matte in float64."""
    offsets = np.arange(-4, 5)
    gauss = np.exp(-(offsets**2) / (2 * 1.4**2))
    across = np.outer(gauss, -offsets * gauss)
    across /= np.sqrt((across**2).sum())
    down = np.ascontiguousarray(across.T)
    sizes = []
    for matte in (pred, alpha):
        values = matte / 255.0
        low, high = values.min(), values.max()
        values = (values - low) / (high - low) if high > low else np.zeros_like(values)
        parts = [cv2.filter2D(values, cv2.CV_64F, k, borderType=cv2.BORDER_REPLICATE) for k in (across, down)]
        sizes.append(np.sqrt(parts[0] ** 2 + parts[1] ** 2))
    return float(((sizes[0] - sizes[1]) ** 2).sum() / 1000)


def plain_sums(pred: Matte, alpha: Matte) -> float:
    """Return SAD + MSE + MAD in float64."""
    difference = pred / 255.0 - alpha / 255.0
    return float(np.abs(difference).sum() / 1000 + (difference**2).mean() + np.abs(difference).mean())


def fast_sums(pred: Matte, alpha: Matte) -> float:
    """Return SAD + MSE + MAD by this project's functions."""
    return functional.sad(pred, alpha) + functional.mse(pred, alpha) + functional.mad(pred, alpha)


COMPARED: dict[str, tuple[Callable[[Matte, Matte], float], Callable[[Matte, Matte], float]]] = {
    "conn": (plain_conn, functional.conn),
    "grad": (plain_grad, functional.grad),
    "sad + mse + mad": (plain_sums, fast_sums),
}


def compare(
    plain: Callable[[Matte, Matte], float],
    fast: Callable[[Matte, Matte], float],
    pair: tuple[Matte, Matte],
    repeats: int,
) -> dict[str, float]:
    """Return median CPU milliseconds of both, their ratio, and how far the values are apart."""
    times: dict[str, list[float]] = {"plain": [], "fast": []}
    difference = abs(plain(*pair) - fast(*pair))
    for _ in range(repeats):
        for name, function in (("plain", plain), ("fast", fast)):
            start = time.process_time()
            function(*pair)
            times[name].append(time.process_time() - start)
    medians = {f"{name}_ms": 1000 * float(np.median(values)) for name, values in times.items()}
    return {**medians, "ratio": medians["plain_ms"] / medians["fast_ms"], "difference": difference}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=1080)
    parser.add_argument("--width", type=int, default=1920)
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each side; medians are compared")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    figures: dict[str, dict[str, dict[str, float]]] = {name: {} for name in COMPARED}
    good = True
    print(f"{options.height} x {options.width}, one thread, medians of {options.repeats} runs in CPU ms")
    print(f"{'error':16} {'matte':8} {'plain':>9} {'here':>9} {'ratio':>7} {'promised':>9} {'difference':>11}")
    for kind, make in KINDS.items():
        pair = make(options.height, options.width, np.random.default_rng(0))
        for name, functions in COMPARED.items():
            row = compare(*functions, pair, options.repeats)
            promised = PROMISED[name][kind]
            kept = row["ratio"] >= promised and row["difference"] <= TOLERANCE
            good &= kept
            figures[name][kind] = row
            print(
                f"{name:16} {kind:8} {row['plain_ms']:9.2f} {row['fast_ms']:9.2f} {row['ratio']:6.1f}x"
                f" {promised:8.0f}x {row['difference']:11.1e}{'' if kept else '  NOT KEPT'}"
            )
    if options.out:
        settings = {"height": options.height, "width": options.width, "repeats": options.repeats}
        content = json.dumps({"settings": settings, "figures": figures}, indent=2) + "\n"
        write_whole(content.encode(), options.out)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
