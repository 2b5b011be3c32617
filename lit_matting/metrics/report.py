"""Score cards and samples as files: JSON for machines, CSV per sample, Markdown for people."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_matting.metrics.score_card import ReferringSample
from lit_matting.version import VERSION

PACKAGES = (
    "torch",
    "lightning",
    "torchmetrics",
    "diffusers",
    "transformers",
    "numpy",
    "opencv-python-headless",
)
RATES = (
    ("found_rate", "found"),
    ("grounding_accuracy", "grounding"),
    ("strict_accuracy", "strict"),
    ("swap_accuracy", "swap"),
    ("strict_swap_accuracy", "strict swap"),
)
ERRORS = (
    ("soft_iou", "soft IoU"),
    ("sad", "SAD"),
    ("mse", "MSE"),
    ("mae", "MAD"),
    ("band_mae", "band MAD"),
    ("grad", "Grad"),
    ("conn", "Conn"),
)
CATEGORIES_SHOWN = 40
BASELINE_NAMES = {
    "all_zero": "nothing at all",
    "perfect_all": "perfect matte of all objects",
    "perfect_random": "perfect matte of one, blindly",
}


def to_json(content: Any) -> bytes:
    """Return content as JSON; numbers that are not defined become null, which any reader understands."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [clean(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    return (json.dumps(clean(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as CSV with a header of all their columns, in order of first appearance; undefined is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return text.getvalue().encode()


def sample_rows(scores: Mapping[str, Sequence[ReferringSample]]) -> list[dict[str, Any]]:
    """Return one row per sample: all of the first score, and the main values of the others beside it.

    Args:
        scores: Samples by the name of what was scored, all in the order of :meth:`ReferringScore.gather`.
    """
    (_, first), *others = scores.items()
    rows = [sample.row() for sample in first]
    for name, samples in others:
        for row, sample in zip(rows, samples):
            row.update({f"{name}.{value}": sample.quality(value) for value in ("found", "soft_iou", "sad")})
    return rows


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an aligned Markdown table: the first column to the left, all others to the right."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width if not column else "-" * (width - 1) + ":" for column, width in enumerate(widths)])
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        )
        + " |"
        for line in lines
    )


def figure(value: Any) -> str:
    """Return a number as people read it: three decimals, or three significant digits when it is small or large.

    Example:
        >>> figure(0.9471), figure(0.000123), figure(153.77), figure(None), figure(512)
        ('0.947', '0.000123', '154', '-', '512')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if abs(value) < 1e-9 or 0.01 <= abs(value) < 10 else f"{value:.3g}"


def overview_table(cards: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the main table: every score's overall row, and under them the baselines of the first.

    Args:
        cards: :func:`lit_matting.metrics.score_card.score_card` by the name of what was scored; the first is the final
            matte.
    """
    first = next(iter(cards.values()))
    tables = {name: card["overall"] for name, card in cards.items()}
    tables.update({BASELINE_NAMES[name]: card["overall"] for name, card in first["baselines"].items()})
    return _table_of(tables, "", with_count=False)


def kind_table(card: Mapping[str, Any], part: str, title: str) -> str:
    """Return one part of a card ("kinds", "sizes", "categories", "datasets"); kinds have the baselines beneath."""
    tables: dict[str, Mapping[str, Any]] = {}
    names = sorted(card[part], key=lambda name: -card[part][name]["count"]) if part == "categories" else card[part]
    for name in list(names)[:CATEGORIES_SHOWN]:
        tables[name] = card[part][name]
        if part == "kinds":
            for baseline, baseline_card in card["baselines"].items():
                tables[f"{name}: {BASELINE_NAMES[baseline]}"] = baseline_card[part][name]
    return _table_of(tables, title, with_count=True)


def found_table(cards: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the errors over the found and over the missed samples of every score and baseline."""
    first = next(iter(cards.values()))
    tables = {name: card["overall"] for name, card in cards.items()}
    tables.update({BASELINE_NAMES[name]: card["overall"] for name, card in first["baselines"].items()})
    shown = [(key, title) for key, title in ERRORS if any(key in table["found"] for table in tables.values())]
    rows = []
    for name, table in tables.items():
        for half in ("found", "missed"):
            values = [figure(table[half].get(key)) for key, _ in shown]
            rows.append([f"{name}, {half}", f"{table[half]['count']:g}", *values])
    return markdown_table(["", "phrases", *(title for _, title in shown)], rows)


def _table_of(tables: Mapping[str, Mapping[str, Any]], title: str, with_count: bool) -> str:
    shown = [(key, name) for key, name in (*RATES, *ERRORS) if any(key in table for table in tables.values())]
    header = [title, *(["phrases"] if with_count else []), *(name for _, name in shown)]
    rows = [
        [
            name,
            *([str(table["count"])] if with_count else []),
            *(figure(table.get(key)) for key, _ in shown),
        ]
        for name, table in tables.items()
    ]
    return markdown_table(header, rows)


def environment() -> dict[str, str]:
    """Return the versions that a number may depend on."""
    versions = {"lit_matting": VERSION, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
