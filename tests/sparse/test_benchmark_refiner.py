"""The refinement benchmark compares methods that compute the same thing, and reports what it found."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def markers(tool: ModuleType, between: str) -> str:
    return f"<!-- {tool.MARKERS}: begin -->\n{between}\n<!-- {tool.MARKERS}: end -->"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load("benchmark_refiner")


def test_bands_cover_the_share_that_was_asked_for(benchmark: ModuleType) -> None:
    for fraction in (0.05, 0.2):
        mask = benchmark.hair_bands(512, fraction)
        assert mask.shape == (1, 512, 512)
        # at most one strand too many
        assert fraction <= mask.float().mean() < fraction + 0.03
    assert torch.equal(benchmark.hair_bands(128, 0.1), benchmark.hair_bands(128, 0.1))


def test_sparse_dense_and_tiles_compute_the_same_across_tile_borders(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "TILE", 24)
    refiner = benchmark.Refiner()
    mask = torch.rand(1, 70, 70) < 0.3
    mask[:, 24:48, 24:48] = False
    image, background = torch.randn(1, 8, 70, 70), torch.randn(1, 1, 70, 70)
    with torch.no_grad():
        dense = refiner.dense(image, mask, background)
        torch.testing.assert_close(refiner.sparse(image, mask, background), dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(refiner.tiles(image, mask, background), dense, rtol=1e-5, atol=1e-5)


def test_promises_are_judged_by_their_limits(benchmark: ModuleType) -> None:
    case = {
        "side": 2048,
        "fraction": 0.05,
        "active": 100,
        "seconds": {"sparse": 1.0},
        "dense / sparse": 7.9,
        "tiles / sparse": 3.6,
        "layer / floor": 1.5,
        "memory ratio": 9.0,
    }
    found = benchmark.promises({"cases": [case], "linearity": {"slope": 1.2, "r squared": 0.99, "larger area": 1.1}})
    assert [(promise["value"], promise["limit"], promise["kept"]) for promise in found] == [
        (7.9, ">= 8", False),
        (9.0, ">= 8", True),
        (3.6, ">= 3.5", True),
        (1.5, "<= 2", True),
        (1.2, "0.9 to 1.15", False),
        (0.99, ">= 0.98", True),
        (1.1, "<= 1.5", True),
    ]


def test_a_run_writes_its_report_and_replaces_only_its_own_section(benchmark: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "PERFORMANCE.md"
    page.write_text(f"# Performance\n\nbefore\n\n{markers(benchmark, 'old')}\n\nafter\n", encoding="utf-8")
    small = ["--sides", "64", "--fractions", "0.1", "--repeats", "1", "--training-side", "0", "--no-memory"]
    before = torch.get_num_threads()
    try:
        status = benchmark.main([*small, "--out", str(tmp_path / "report.json"), "--table", str(page)])
    finally:
        torch.set_num_threads(before)
    assert status == 0
    case = json.loads((tmp_path / "report.json").read_text())["cases"][0]
    assert case["difference"] < 1e-5
    assert case["dense / sparse"] == pytest.approx(case["seconds"]["dense"] / case["seconds"]["sparse"])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Performance\n\nbefore\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert f"| 64 | 10% | {case['active']:,} |" in text


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which tells a peak of memory")
def test_the_memory_benchmark_compares_budgets_in_fresh_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    tool, page = load("benchmark_refiner_memory"), tmp_path / "PERFORMANCE.md"
    page.write_text(markers(tool, "old"), encoding="utf-8")
    small = ["--size", "400", "600", "--strands", "0.05", "--budgets", "8000", "0", "--repeats", "0"]
    before = torch.get_num_threads()
    try:
        assert tool.main([*small, "--table", str(page)]) == 0
    finally:
        torch.set_num_threads(before)
    rows = [line.split("|") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:3]
    assert [row[3].strip() for row in rows] == ["8,000", "none"]
    assert rows[0][1] == rows[1][1]
    banded, whole = (float(row[4]) for row in rows)
    assert 0 < banded < whole
