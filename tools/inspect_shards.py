"""Look into shards before training on them: are they whole, what is in them, and is the alpha really an alpha.

    python tools/inspect_shards.py shards/p3m10k/train.index.json --against shards/refmatte --sheet build/sheet.html

Verifies checksums, counts images, instances and phrases by kind, draws histograms of sizes and coverage, warns when a
data set that claims an alpha holds hard masks (training on them destroys soft hair), and, with `--against`, looks for
near-duplicates between training and test images (leakage). The exit status is 1 when a shard or sample is damaged, an
alpha is binary, or a near-duplicate is found. A folder stands for all indexes in it.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_modules.decode import DecodedImage, decode_sample
from data_modules.shards import RawSample, SampleError, ShardIndex
from data_modules.transforms import resize
from lit_matting.checks import InputError
from lit_matting.files import write_whole

SOFT_OF_OUTLINE = 1.75
"""An alpha with fewer soft pixels than this for each pixel of its outline is a hard mask: a mask that was shrunk has
0.6, one that was enlarged 1.6, photographs' alphas have 2.6 in the median."""
BINARY_SHARE = 0.7
"""A data set is called binary when so many of its alphas are: some solid things do have an edge of one pixel."""
SAME_BITS = 8
"""Perceptual hashes of 64 bits that differ in at most so many are near-duplicates."""
SAME_PIXELS = 0.92
"""... if their small grey pictures also correlate by this much."""
COVERAGE_EDGES = (0, 0.01, 0.03, 0.1, 0.3, 1.0001)
SIZE_EDGES = (0, 256, 512, 1024, 2048, 4096, 10**9)
TILE = 160


@dataclass
class Fingerprint:
    """What near-duplicates are found by."""

    where: str
    hash: int
    small: np.ndarray
    """(16, 16) float, mean 0 and length 1."""


@dataclass
class Findings:
    """What is known about one set of shards."""

    name: str
    images: int = 0
    instances: Counter[str] = field(default_factory=Counter)
    """Instances by kind of target: alpha, mask."""
    phrases: Counter[str] = field(default_factory=Counter)
    """Phrases by kind."""
    without_phrases: int = 0
    categories: Counter[str] = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)
    """Long edges, pixels."""
    coverage: list[float] = field(default_factory=list)
    """Mean of every target, the share of the image it covers."""
    binary: list[str] = field(default_factory=list)
    """Alphas that are hard masks in truth."""
    bad: list[str] = field(default_factory=list)
    fingerprints: list[Fingerprint] = field(default_factory=list)
    tiles: list[str] = field(default_factory=list)
    """Rows of the contact sheet."""

    def to_json(self) -> dict[str, Any]:
        """Return counts, histograms and findings."""
        return {
            "name": self.name,
            "images": self.images,
            "instances": dict(self.instances),
            "phrases": dict(self.phrases),
            "instances_without_phrases": self.without_phrases,
            "categories": len(self.categories),
            "long_edge": histogram(self.sizes, SIZE_EDGES),
            "coverage": histogram(self.coverage, COVERAGE_EDGES),
            "binary_alphas": len(self.binary),
            "claims_alpha_but_binary": self.claims_alpha_but_binary,
            "bad": self.bad,
        }

    def facts(self) -> list[str]:
        """Return what the set holds, as lines of text."""
        return [
            f"{self.images} images, instances: {_listed(self.instances)}",
            f"phrases: {_listed(self.phrases)}; instances without a phrase: {self.without_phrases}",
        ]

    def wrong(self) -> list[str]:
        """Return what is wrong with the set, as lines of text."""
        lines = [f"BAD: {line}" for line in self.bad]
        if self.claims_alpha_but_binary:
            lines.insert(
                0,
                f"WARNING: {len(self.binary)} of {self.instances['alpha']} alphas are hard masks, for example"
                f" {self.binary[0]}. Write them with kind 'mask': trained on as alphas they destroy soft hair.",
            )
        return lines

    @property
    def claims_alpha_but_binary(self) -> bool:
        """Whether the alphas of this data set are mostly hard masks."""
        return bool(self.binary) and len(self.binary) >= BINARY_SHARE * self.instances["alpha"]


def histogram(values: Sequence[float], edges: Sequence[float]) -> dict[str, int]:
    """Count values between edges.

    Example:
        >>> histogram([1, 5, 6], [0, 4, 10])
        {'0-4': 1, '4-10': 2}
    """
    counts, _ = np.histogram(values, bins=edges)
    return {_interval(low, high): int(count) for low, high, count in zip(edges, edges[1:], counts)}


def _interval(low: float, high: float) -> str:
    return f"{low:.4g}-{high:.4g}" if high < 10**9 else f"{low:.4g} and more"


def is_binary(alpha: np.ndarray) -> bool:
    """Say whether an alpha is a hard mask, with no more soft pixels than resizing leaves along an outline."""
    top = 65535 if alpha.dtype == np.uint16 else 255
    soft = int(np.count_nonzero((alpha > 0.02 * top) & (alpha < 0.98 * top)))
    solid = (alpha > top // 2).astype(np.uint8)
    # the morphological gradient is two pixels wide
    outline = int(np.count_nonzero(cv2.morphologyEx(solid, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)))) / 2
    return soft < SOFT_OF_OUTLINE * outline


def fingerprint(image: np.ndarray, where: str) -> Fingerprint:
    """Return the perceptual hash of an image: signs of its 8 x 8 lowest frequencies against their median."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    frequencies = cv2.dct(resize(grey, 32, 32).astype(np.float32))[:8, :8].reshape(-1)
    bits = frequencies > np.median(frequencies[1:])
    small = resize(grey, 16, 16).astype(np.float32)
    small -= small.mean()
    return Fingerprint(
        where, int("".join("1" if bit else "0" for bit in bits), 2), small / (np.linalg.norm(small) + 1e-6)
    )


def near_duplicates(first: Sequence[Fingerprint], second: Sequence[Fingerprint]) -> Iterator[tuple[str, str, int]]:
    """Yield pairs that look the same, also when one is mirrored or re-encoded, with the bits their hashes differ in."""
    if not first or not second:
        return
    hashes = np.array([item.hash for item in second], dtype=np.uint64)
    smalls = np.stack([item.small for item in second])
    for item in first:
        apart = (
            np.bitwise_count(hashes ^ np.uint64(item.hash))
            if hasattr(np, "bitwise_count")
            else _bits(hashes, item.hash)
        )
        # a mirrored picture has another hash but the same small picture, mirrored
        straight = np.tensordot(smalls, item.small, axes=2)
        mirrored = np.tensordot(smalls, item.small[:, ::-1], axes=2)
        close = ((apart <= SAME_BITS) & (straight >= SAME_PIXELS)) | (np.maximum(straight, mirrored) >= 0.985)
        for number in np.nonzero(close)[0].tolist():
            yield item.where, second[number].where, int(apart[number])


def _bits(hashes: np.ndarray, other: int) -> np.ndarray:
    return np.array([bin(int(value) ^ other).count("1") for value in hashes])


def inspect(index: ShardIndex, name: str, limit: int, pixels: bool, wanted_tiles: int) -> Findings:
    """Read the samples of a data set (all, or ``limit`` spread over it) and return what is found."""
    found = Findings(name)
    numbers = np.unique(np.linspace(0, len(index) - 1, min(limit or len(index), len(index))).astype(int)).tolist()
    shown = set(numbers[:: max(1, len(numbers) // max(1, wanted_tiles))][:wanted_tiles])
    for number in tqdm(numbers, desc=name, unit="image", disable=None):
        try:
            sample = index.read(number)
            decoded = decode_sample(sample, range(len(sample.instances)), empty_is_error=False) if pixels else None
        except SampleError as error:
            found.bad.append(str(error))
            continue
        found.images += 1
        _count(found, sample)
        if decoded is not None:
            _measure(found, sample, decoded)
            if number in shown:
                found.tiles.append(_tile(sample, decoded))
    return found


def _count(found: Findings, sample: RawSample) -> None:
    for instance in sample.instances:
        found.instances[instance.kind] += 1
        found.phrases.update(phrase.kind for phrase in instance.phrases)
        found.without_phrases += not instance.phrases
        found.categories[instance.category] += 1
    found.sizes.append(max(sample.meta.get("width", 0), sample.meta.get("height", 0)))


def _measure(found: Findings, sample: RawSample, decoded: DecodedImage) -> None:
    for number, target in decoded.targets.items():
        instance = sample.instances[number]
        found.coverage.append(float(target.mean()) / (65535 if target.dtype == np.uint16 else 255))
        if instance.kind == "alpha" and is_binary(target):
            found.binary.append(f"{sample.where}, instance {instance.id!r}")
        if found.coverage[-1] == 0:
            found.bad.append(f"{sample.where}: {instance.kind} of instance {instance.id!r} is empty.")
    found.fingerprints.append(fingerprint(decoded.image, sample.where))


def _tile(sample: RawSample, decoded: DecodedImage) -> str:
    """Return a row of the contact sheet: the picture, and every instance on a checkerboard with its phrases."""
    scale = TILE / max(decoded.image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in decoded.image.shape[:2])
    image = resize(decoded.image, height, width)
    place = f"<b>{html.escape(sample.key)}</b><br>{html.escape(sample.shard)}.tar<br>{_size(sample)}"
    cells = [f'<figure><img src="{_data_url(image)}" alt=""><figcaption>{place}</figcaption></figure>']
    board = np.where((np.add.outer(np.arange(height) // 8, np.arange(width) // 8) % 2)[..., None], 205, 245).astype(
        np.float32
    )
    for number, target in decoded.targets.items():
        alpha = resize(target, height, width)[..., None] / (65535 if target.dtype == np.uint16 else 255)
        cut = np.rint(alpha * image + (1 - alpha) * board).astype(np.uint8)
        instance = sample.instances[number]
        by_kind: dict[str, list[str]] = {}
        for phrase in instance.phrases:
            by_kind.setdefault(phrase.kind, []).append(html.escape(phrase.text))
        words = "".join(f"<p><i>{html.escape(kind)}</i> {'<br>'.join(texts)}</p>" for kind, texts in by_kind.items())
        caption = f"<b>{html.escape(instance.id)}</b> {instance.kind} {html.escape(instance.category)}"
        caption += words or "<p>no phrase</p>"
        cells.append(f'<figure><img src="{_data_url(cut)}" alt=""><figcaption>{caption}</figcaption></figure>')
    return f"<section>{''.join(cells)}</section>"


def _size(sample: RawSample) -> str:
    return f"{sample.meta.get('width', '?')} x {sample.meta.get('height', '?')}"


def _data_url(image: np.ndarray) -> str:
    data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


_STYLE = """
body{font:13px/1.4 system-ui,sans-serif;background:#fafafa;color:#222;margin:24px;max-width:1200px}
h1{font-size:20px}h2{font-size:16px;margin:32px 0 4px}pre{margin:4px 0;white-space:pre-wrap;font:inherit}
.wrong{color:#b00020}.charts{display:flex;gap:40px;flex-wrap:wrap;margin:8px 0}table{border-spacing:6px 1px}
caption{text-align:left;color:#777}td:first-child{text-align:right;min-width:90px}td div{background:#88a;height:10px}
section{display:flex;gap:16px;flex-wrap:wrap;border-top:1px solid #ddd;padding:12px 0}
figure{margin:0;width:200px}img{display:block}figcaption{padding-top:4px;overflow-wrap:anywhere}
figcaption p{margin:2px 0}i{color:#777}
"""


def write_sheet(path: Path, results: Sequence[Findings], pairs: Sequence[dict[str, Any]]) -> None:
    """Write the contact sheet: what was found in each set, as text, bars and pictures, in one file without others."""
    parts = ["<h1>Contact sheet</h1>"]
    if pairs:
        lines = "\n".join(f"{pair['train']} and {pair['test']}" for pair in pairs[:50])
        parts.append(f'<pre class="wrong">{len(pairs)} near-duplicates:\n{html.escape(lines)}</pre>')
    for found in results:
        facts, wrong = found.facts(), "\n".join(found.wrong())
        parts.append(f"<h2>{html.escape(found.name)}</h2><pre>{html.escape(chr(10).join(facts))}</pre>")
        parts.append(f'<pre class="wrong">{html.escape(wrong)}</pre>' if wrong else "")
        charts = [_bars("long edge, pixels", histogram(found.sizes, SIZE_EDGES))]
        if found.coverage:
            charts.append(_bars("instances by coverage of the image", histogram(found.coverage, COVERAGE_EDGES)))
        parts.append(f'<div class="charts">{"".join(charts)}</div>{"".join(found.tiles)}')
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Contact sheet</title><style>{_STYLE}</style>'
    write_whole((head + "".join(parts)).encode(), path)


def _bars(title: str, counts: dict[str, int]) -> str:
    most = max(counts.values()) or 1
    rows = "".join(
        f'<tr><td>{name}</td><td><div style="width:{round(180 * count / most)}px"></div></td><td>{count}</td></tr>'
        for name, count in counts.items()
    )
    return f"<table><caption>{title}</caption>{rows}</table>"


def _indexes(given: Sequence[str]) -> list[str]:
    """The given sources, a folder replaced by all indexes in it."""
    found = []
    for source in given:
        inside = sorted(str(path) for path in Path(source).glob("*.index.json")) if Path(source).is_dir() else []
        found += inside or [source]
    return found


def describe(found: Findings) -> str:
    """Return the findings as lines of text."""
    lines = found.facts()
    lines.append(f"long edge, pixels: {_listed(histogram(found.sizes, SIZE_EDGES))}")
    if found.coverage:
        lines.append(f"coverage of the image: {_listed(histogram(found.coverage, COVERAGE_EDGES))}")
    lines += found.wrong()
    return "\n  ".join([f"{found.name}: {lines[0]}", *lines[1:]])


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name or '(none)'} {count}" for name, count in counts.items() if count) or "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Inspect, print, write what was asked for, and say whether anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="index files, folders, globs or brace patterns to look into")
    parser.add_argument("--against", nargs="*", default=[], help="test sets to look for near-duplicates in")
    parser.add_argument(
        "--limit", type=int, default=0, help="look at so many images of each set, spread evenly; 0: all"
    )
    parser.add_argument("--no-checksums", action="store_true", help="compare sizes only, which reads less")
    parser.add_argument("--no-pixels", action="store_true", help="decode nothing: count and verify only")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet (HTML) here")
    parser.add_argument("--sheet-rows", type=int, default=12, help="images of each set on the contact sheet")
    parser.add_argument("--json", type=Path, help="write everything found here")
    settings = parser.parse_args(arguments)
    results: list[Findings] = []
    given = _indexes(settings.shards)
    try:
        for source in [*given, *_indexes(settings.against)]:
            index = ShardIndex.load(source, verify=not settings.no_checksums)
            name = f"{index.dataset}/{index.split} ({source})"
            rows = settings.sheet_rows if settings.sheet else 0
            results.append(inspect(index, name, settings.limit, not settings.no_pixels, rows))
            print(describe(results[-1]))
    except InputError as error:
        print(f"inspect_shards: {error}", file=sys.stderr)
        return 1
    train, test = results[: len(given)], results[len(given) :]
    pairs = [
        {"train": f"{a.name}: {one}", "test": f"{b.name}: {two}", "bits": bits}
        for a in train
        for b in test
        for one, two, bits in near_duplicates(a.fingerprints, b.fingerprints)
    ]
    for pair in pairs:
        print(f"NEAR-DUPLICATE: {pair['train']} and {pair['test']} ({pair['bits']} bits apart)")
    if test and not pairs:
        print("No near-duplicates between training and test sets.")
    try:
        if settings.sheet:
            write_sheet(settings.sheet, results, pairs)
            print(f"Contact sheet: {settings.sheet}")
        if settings.json:
            text = json.dumps({"sets": [found.to_json() for found in results], "near_duplicates": pairs}, indent=2)
            write_whole((text + "\n").encode(), settings.json)
    except OSError as error:
        print(f"inspect_shards: {error}", file=sys.stderr)
        return 1
    return int(bool(pairs) or any(found.bad or found.claims_alpha_but_binary for found in results))


if __name__ == "__main__":
    sys.exit(main())
