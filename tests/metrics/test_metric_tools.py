"""The two tools behind the figures of docs/METRICS.md, on small mattes."""

from __future__ import annotations

import json
from functools import partial

import cv2
import numpy as np
import pytest

from lit_matting.metrics import functional
from tools import benchmark_metrics, compare_dialects


def test_the_fast_errors_are_those_of_the_plain_versions_and_the_figures_are_written(tmp_path) -> None:
    path = tmp_path / "out" / "figures.json"
    # the exit status also tells whether the promised ratios were kept, which a small size and a busy machine decide
    assert benchmark_metrics.main(["--height", "96", "--width", "160", "--repeats", "1", "--out", str(path)]) in (0, 1)
    content = json.loads(path.read_text())
    assert content["settings"] == {"height": 96, "width": 160, "repeats": 1}
    rows = {(error, kind): row for error, kinds in content["figures"].items() for kind, row in kinds.items()}
    errors, kinds = ("conn", "grad", "sad + mse + mad"), ("hair", "smooth", "binary", "speckle")
    assert set(rows) == {(error, kind) for error in errors for kind in kinds}
    for row in rows.values():
        assert row["difference"] <= 1e-9
        assert row["plain_ms"] > 0
        assert row["fast_ms"] > 0
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["fast_ms"])


def test_a_value_that_is_off_or_a_ratio_that_is_missed_fails_the_benchmark(monkeypatch, capsys) -> None:
    size = ["--height", "40", "--width", "60", "--repeats", "1"]
    monkeypatch.setattr(benchmark_metrics, "KINDS", {"binary": benchmark_metrics.binary})
    plain = benchmark_metrics.plain_grad
    for promised, added, status in ((0.0, 0.0, 0), (0.0, 2e-9, 1), (1e9, 0.0, 1)):
        shifted = partial(lambda pred, alpha, added: plain(pred, alpha) + added, added=added)
        monkeypatch.setattr(benchmark_metrics, "PROMISED", {"grad": {"binary": promised}})
        monkeypatch.setattr(benchmark_metrics, "COMPARED", {"grad": (plain, shifted)})
        assert benchmark_metrics.main(size) == status
    assert capsys.readouterr().out.count("NOT KEPT") == 2


def cells(text: str) -> dict[str, dict[str, str]]:
    """Return all Markdown tables of a text, by row and column."""
    result, header = {}, []
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not header:
            header = row
        elif row and not row[-1].startswith("-"):
            result.setdefault(row[0], {}).update(zip(header[1:], row[1:]))
        header = header if row else []
    return result


def test_the_dialect_table_is_made_of_degraded_copies(tmp_path, capsys) -> None:
    alphas = []
    for index in range(2):
        alpha = np.zeros((40, 60), np.uint8)
        cv2.ellipse(alpha, (30, 20), (12 + 4 * index, 10), 0, 0, 360, 255, -1)
        alphas.append(cv2.GaussianBlur(alpha, (0, 0), 1))
        assert cv2.imwrite(str(tmp_path / f"{index}_alpha.png"), alphas[-1])
    document = tmp_path / "doc.md"
    document.write_text("before\n<!-- dialects: begin -->\nold\n<!-- dialects: end -->\nafter\n")
    arguments = [str(tmp_path), "--alpha-pattern", "*_alpha.png"]
    assert compare_dialects.main([*arguments, "--table", str(document)]) == 0
    written = document.read_text()
    assert "old" not in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert f'`python tools/compare_dialects.py {tmp_path} --alpha-pattern "*_alpha.png"`' in written
    table = cells(written)
    assert cells(capsys.readouterr().out) == table
    sums = np.mean([alpha.sum() / 255000 for alpha in alphas])
    assert float(table["black"]["SAD"]) == pytest.approx(sums, abs=5e-4)
    assert table["black"]["Conn, port"] == table["black"]["Conn, P3M"] == "0.000"
    hard = np.mean([functional.grad((alpha >= 128) * 1.0, alpha, dialect="p3m") for alpha in alphas])
    assert float(table["hard mask"]["Grad, P3M"]) == pytest.approx(hard, rel=2e-2)
    # one grey value around the threshold at 0.9
    down, up = (table[f"0.9 times the truth, rounded {way}"]["Conn"] for way in ("down", "up"))
    assert float(down) > 3 * float(up)
    other = table["the truth itself, by the other sampling"]
    assert other["area means"] == other["bilinear sampling"]


def test_no_alphas_and_a_document_without_markers_are_one_sentence(tmp_path, capsys) -> None:
    assert compare_dialects.main([str(tmp_path)]) == 2
    assert "holds no image that counts" in capsys.readouterr().err
    (tmp_path / "doc.md").write_text("no markers")
    with pytest.raises(SystemExit):
        compare_dialects.main([str(tmp_path), "--table", str(tmp_path / "doc.md")])
    assert "dialects: begin" in capsys.readouterr().err
