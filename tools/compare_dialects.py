"""What the same mattes score by the definition and by two codes that deviate from it, and by two ways to 512 x 512.

    python tools/compare_dialects.py ../shared/data/real_alpha --alpha-pattern "am_*_alpha.png" --table docs/METRICS.md

Every true alpha is degraded in seven ways and scored at its own size in each of lit_matting/metrics/dialects.py. Then,
enlarged until its longer side has 2048 pixels, it is degraded again, and truth and matte are resized to 512 x 512
by area means or by bilinear sampling. Both tables hold means over all alphas, whole image.

tools/evaluate_folder.py scores mattes of your own by these dialects (`--dialect`).
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.checks import InputError
from lit_matting.metrics import functional
from lit_matting.metrics.dialects import DIALECTS
from lit_matting.metrics.report import figure, markdown_table
from tools.documents import document_with, write_between_markers
from tools.evaluate_folder import find, read

MARKERS = "dialects"
HEADINGS = {"matlab": "", "python_port": ", port", "p3m": ", P3M"}
ENLARGED, SMALL = 2048, 512
SAMPLINGS = {"area means": cv2.INTER_AREA, "bilinear sampling": cv2.INTER_LINEAR}

Matte = NDArray[np.uint8]
Means = dict[str, dict[str, float]]
"""Row -> column -> mean over the alphas."""


def degraded(alpha: Matte, rng: np.random.Generator) -> dict[str, Matte]:
    """Return mattes (H, W) that are wrong in seven ways."""
    soft = (alpha > 0) & (alpha < 255)
    noise = np.clip(alpha + rng.normal(0, 30, alpha.shape), 0, 255)
    return {
        "blurred, sigma 2": cv2.GaussianBlur(alpha, (0, 0), 2),
        "noise of 30 / 255 where alpha is soft": np.where(soft, noise, alpha).astype(np.uint8),
        "hard mask": hard(alpha),
        # 229.5 / 255 is a threshold of Conn: one grey value decides
        "0.9 times the truth, rounded down": np.floor(0.9 * alpha).astype(np.uint8),
        "0.9 times the truth, rounded up": np.ceil(0.9 * alpha).astype(np.uint8),
        "black": np.zeros_like(alpha),
        "inverted": 255 - alpha,
    }


def hard(alpha: Matte) -> Matte:
    """Return the alpha cut at one half."""
    return np.where(alpha >= 128, 255, 0).astype(np.uint8)


def dialect_means(alphas: Sequence[Matte]) -> Means:
    """Return SAD, and Grad and Conn of every dialect, for every degradation."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, alpha in enumerate(alphas):
        for name, matte in degraded(alpha, np.random.default_rng(number)).items():
            row = values[name]
            row["SAD"].append(functional.sad(matte, alpha))
            for dialect in DIALECTS:
                row[f"Grad{HEADINGS[dialect]}"].append(functional.grad(matte, alpha, dialect=dialect))
                row[f"Conn{HEADINGS[dialect]}"].append(functional.conn(matte, alpha, dialect=dialect))
    return _means(values)


def sampling_means(alphas: Sequence[Matte]) -> Means:
    """Return the SAD at 512 x 512 by how truth and matte got there."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for alpha in alphas:
        scale = ENLARGED / max(alpha.shape)
        large = cv2.resize(alpha, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        mattes = {"blurred, sigma 4": cv2.GaussianBlur(large, (0, 0), 4), "hard mask": hard(large)}
        truths = {name: _small(large, mode) for name, mode in SAMPLINGS.items()}
        for sampling, mode in SAMPLINGS.items():
            for name, matte in mattes.items():
                values[name][sampling].append(functional.sad(_small(matte, mode), truths[sampling]))
            values["the truth itself, by the other sampling"][sampling].append(functional.sad(*truths.values()))
    return _means(values)


def _small(matte: Matte, mode: int) -> Matte:
    return cv2.resize(matte, (SMALL, SMALL), interpolation=mode)


def _means(values: dict[str, dict[str, list[float]]]) -> Means:
    return {name: {column: float(np.mean(items)) for column, items in row.items()} for name, row in values.items()}


def table(means: Means, title: str) -> str:
    """Return means as a Markdown table."""
    columns = list(next(iter(means.values())))
    return markdown_table([title, *columns], [[name, *map(figure, row.values())] for name, row in means.items()])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("alpha", type=Path, help="folder of true alphas")
    parser.add_argument("--alpha-pattern", help="which files count; the * is the sample's name (default: all)")
    parser.add_argument("--table", type=document_with(MARKERS), help="Markdown file to write the tables into")
    options = parser.parse_args(arguments)
    try:
        paths = find(options.alpha, options.alpha_pattern, "alpha")
        if not paths:
            raise InputError(f"{options.alpha} holds no image that counts; see `--alpha-pattern`.")
        alphas = [read(path) for path in paths.values()]
        if any(alpha.dtype != np.uint8 for alpha in alphas):
            raise InputError(f"the alphas of {options.alpha} must have 8 bits.")
    except InputError as error:
        print(f"compare_dialects: error: {error}", file=sys.stderr)
        return 2
    pattern = f' --alpha-pattern "{options.alpha_pattern}"' if options.alpha_pattern else ""
    command = f"python tools/compare_dialects.py {options.alpha}{pattern}"
    text = "\n\n".join(
        [
            f"Means over {len(alphas)} alphas at their own size: `{command}`",
            table(dialect_means(alphas), "matte"),
            f"SAD at {SMALL} x {SMALL} of the same alphas, enlarged to {ENLARGED} pixels before:",
            table(sampling_means(alphas), "matte"),
        ]
    )
    print(text)
    if options.table:
        write_between_markers(text, MARKERS, options.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
