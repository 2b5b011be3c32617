"""The benchmark of teacher and students measures what it says, on the same models at a twentieth of their width."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny_pipeline, tiny_unet

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- benchmark_backbones: begin -->", "<!-- benchmark_backbones: end -->"


def test_teacher_and_students_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_backbones", ROOT / "tools" / "benchmark_backbones.py")
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    save_tiny_pipeline(tmp_path / "pipeline")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["--pretrained", str(tmp_path / "pipeline"), "--size", "64", "--rounds", "1", "--table", str(page)]
    assert benchmark.main(arguments) == 0
    written = page.read_text()
    assert written == f"before\n{BEGIN}\n{capsys.readouterr().out}{END}\nafter\n"
    rows = {}
    for line in written.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[1].replace(",", "").isdigit():
            rows[cells[0]] = (int(cells[1].replace(",", "")), float(cells[3]), float(cells[5]))
    teacher, base, small, tiny_mid, tiny = (rows[name] for name in ("teacher", *benchmark.STUDENTS))
    # the published way to count: with the output layers
    assert teacher[0] == sum(parameter.numel() for parameter in tiny_unet().parameters())
    assert teacher[1:] == (1, 1)
    assert tiny_mid[0] < base[0]  # but its mid block works on a finer grid
    for larger, smaller in ((teacher, base), (base, small), (tiny_mid, tiny)):
        assert smaller[0] < larger[0]
        assert smaller[1] < larger[1]
    assert tiny[1] < 0.9
    assert set(rows) == {"teacher", *benchmark.STUDENTS, "image encoder", "text encoder"}
