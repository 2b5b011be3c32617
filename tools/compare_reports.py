"""Compare two reports sample by sample, with bootstrap confidence intervals.

    python tools/compare_reports.py REPORT_A REPORT_B [--by kind] [--out comparison.json]

REPORT_A and REPORT_B are folders written by `python -m lit_matting test` or tools/evaluate_folder.py (or their
per_sample.csv). Samples are paired, so what is hard in both cancels; whole images are drawn, with replacement, because
phrases of one image are alike: counting them as independent would make the intervals too narrow. A star marks a
difference whose interval leaves out 0.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.checks import InputError
from lit_matting.files import write_whole
from lit_matting.metrics.report import figure, markdown_table, to_json

IDENTITY = ("key", "instance", "kind", "prompt")
HIGHER_IS_BETTER = ("found", "strict", "soft_iou")
MEASURES = (*HIGHER_IS_BETTER, "sad", "mse", "mae", "mad", "band_mae", "grad", "conn")
CHUNK = 500


@dataclass(frozen=True)
class Report:
    """The samples of one report by their identity, in order of appearance."""

    place: Path
    rows: dict[tuple[str, ...], dict[str, str]]
    average: str
    protocol: str | None


def load(place: Path) -> Report:
    """Read a report.

    Raises:
        InputError: If there is none, or a sample occurs twice.
    """
    path = place / "per_sample.csv" if place.is_dir() else place
    if not path.is_file():
        raise InputError(f"there is no {path}: give a folder that holds a report.")
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            identity = tuple(row.get(name, "") for name in IDENTITY)
            if identity in rows:
                raise InputError(f"{path}: the sample {', '.join(identity)} occurs twice.")
            rows[identity] = row
    if not rows:
        raise InputError(f"{path} holds no samples.")
    if not rows[next(iter(rows))].get("key"):
        raise InputError(f"{path} is no report: it has no column `key`.")
    described = path.with_name("report.json")
    protocol = (json.loads(described.read_text()).get("protocol") or {}) if described.is_file() else {}
    return Report(place, rows, protocol.get("average", "phrase"), protocol.get("sha256"))


def is_measure(name: str) -> bool:
    """Return whether a column is compared; `trimap.sad` and the like are."""
    return name.rsplit(".", 1)[-1] in MEASURES


def pairs(first: Report, second: Report, average: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the samples of both reports as rows of (a, b) values by measure, and the measures they share.

    Averaged over instances, the phrases of an instance are one row.
    """
    common = [identity for identity in first.rows if identity in second.rows]
    if not common:
        raise InputError(f"{first.place} and {second.place} have no sample in common.")
    columns = [name for name in first.rows[common[0]] if is_measure(name) and name in second.rows[common[0]]]
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for identity in common:
        groups[identity[:2] if average == "instance" else identity].append(identity)
    rows = []
    for members in groups.values():
        row: dict[str, Any] = {
            name: first.rows[members[0]].get(name, "") for name in ("key", "kind", "category", "size")
        }
        for name in columns:
            values = [[_number(report.rows[member].get(name)) for member in members] for report in (first, second)]
            row[name] = tuple(float(np.mean(items)) for items in values)
        rows.append(row)
    return rows, columns


def _number(text: str | None) -> float:
    return float(text) if text else math.nan


def compare(rows: Sequence[dict[str, Any]], name: str, draws: int, seed: int) -> dict[str, float] | None:
    """Return both means, their difference (second minus first) with its 95 % interval, and who wins how often.

    Images are drawn with replacement; None if no sample has both values.
    """
    values = np.array([row[name] for row in rows], dtype=float)
    defined = ~np.isnan(values).any(1)
    if not defined.any():
        return None
    difference = values[defined, 1] - values[defined, 0]
    images = {key: number for number, key in enumerate(dict.fromkeys(row["key"] for row in rows))}
    image = np.array([images[row["key"]] for row in rows])[defined]
    sums = np.bincount(image, difference, len(images))
    counts = np.bincount(image, minlength=len(images)).astype(float)
    kept = counts > 0
    low, high = np.percentile(bootstrap(sums[kept], counts[kept], draws, seed), (2.5, 97.5))
    better = difference > 0 if name.rsplit(".", 1)[-1] in HIGHER_IS_BETTER else difference < 0
    return {
        "samples": int(defined.sum()),
        "images": int(kept.sum()),
        "a": float(values[defined, 0].mean()),
        "b": float(values[defined, 1].mean()),
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "b_better": float(better.mean()),
        "b_worse": float(((difference != 0) & ~better).mean()),
    }


def bootstrap(sums: NDArray[np.float64], counts: NDArray[np.float64], draws: int, seed: int) -> NDArray[np.float64]:
    """Return the means of ``draws`` resamples of images, given each image's sum and number of samples."""
    generator = np.random.default_rng(seed)
    images = len(sums)
    means = []
    for start in range(0, draws, CHUNK):
        times = generator.multinomial(images, np.full(images, 1 / images), min(CHUNK, draws - start))
        means.append((times @ sums) / (times @ counts))
    return np.concatenate(means)


def table(results: dict[str, dict[str, float]]) -> str:
    """Return comparisons as a Markdown table."""
    rows = []
    for name, result in results.items():
        sure = "*" if result["low"] > 0 or result["high"] < 0 else ""
        rows.append(
            [
                name,
                *(figure(result[part]) for part in ("a", "b", "difference")),
                f"{figure(result['low'])} .. {figure(result['high'])} {sure}".strip(),
                f"{100 * result['b_better']:.0f} %",
                f"{100 * result['b_worse']:.0f} %",
            ]
        )
    return markdown_table(["", "A", "B", "B - A", "95 %", "B better", "B worse"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two reports; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, help="folder of the first report")
    parser.add_argument("b", type=Path, help="folder of the second report")
    parser.add_argument("--by", choices=("kind", "category", "size"), help="one more table for each of these")
    parser.add_argument("--average", choices=("phrase", "instance"), help="default: what the protocol of A says")
    parser.add_argument("--draws", type=int, default=5000, help="bootstrap resamples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args(arguments)
    try:
        first, second = load(options.a), load(options.b)
        average = options.average or first.average
        if options.by == "kind" and average == "instance":
            raise InputError("`--by kind` needs --average phrase: an instance has phrases of all kinds.")
        rows, names = pairs(first, second, average)
    except InputError as error:
        print(f"compare_reports: error: {error}", file=sys.stderr)
        return 2
    print(f"A: {options.a}\nB: {options.b}")
    alone = [len(report.rows) - len(set(first.rows) & set(second.rows)) for report in (first, second)]
    if any(alone):
        print(f"NOTE: {alone[0]} samples only in A and {alone[1]} only in B are left out.")
    if first.protocol != second.protocol:
        print("NOTE: the reports follow different protocols; their numbers may not be comparable.")
    results: dict[str, dict[str, dict[str, float]]] = {}
    groups = {"all": rows}
    if options.by:
        groups.update({name: [row for row in rows if row[options.by] == name] for name in _names(rows, options.by)})
    for group, members in groups.items():
        compared = {name: compare(members, name, options.draws, options.seed) for name in names}
        results[group] = {name: result for name, result in compared.items() if result is not None}
        images = len({row["key"] for row in members})
        print(f"\n{group}: {len(members)} {average}s of {images} images\n\n{table(results[group])}")
    if options.out:
        content = {
            "a": str(options.a),
            "b": str(options.b),
            "average": average,
            "draws": options.draws,
            "results": results,
        }
        write_whole(to_json(content), options.out)
    return 0


def _names(rows: Sequence[dict[str, Any]], column: str) -> list[str]:
    return sorted({row[column] for row in rows if row[column]})


if __name__ == "__main__":
    sys.exit(main())
