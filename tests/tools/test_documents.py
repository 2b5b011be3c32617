"""Tables in documents: only they change, and a document without their place is refused before the work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lit_matting.checks import InputError
from tools import ablate, demo_seeds
from tools.documents import write_between_markers

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- x: begin -->", "<!-- x: end -->"


def test_a_document_keeps_what_is_outside_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n<!-- y: begin -->z<!-- y: end -->")
    write_between_markers("nëw", "x", document)
    assert document.read_text(encoding="utf-8") == (
        f"before\n{BEGIN}\nnëw\n{END}\nafter\n<!-- y: begin -->z<!-- y: end -->"
    )


@pytest.mark.parametrize("content", [None, "", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_a_document_without_its_markers_is_refused_and_stays_as_it_is(tmp_path: Path, content: str | None) -> None:
    document = tmp_path / "doc.md"
    if content is not None:
        document.write_text(content)
    with pytest.raises(InputError, match=rf"doc.md' needs the lines {BEGIN} and, below it, {END}, once each"):
        write_between_markers("new", "x", document)
    assert (document.read_text() if document.exists() else None) == content


def test_a_tool_asks_for_the_markers_before_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablate, "run", lambda *call: pytest.fail("it has begun"))
    (tmp_path / "doc.md").write_text("no markers")
    with pytest.raises(SystemExit):
        ablate.main([str(ROOT / "configs/experiment/demo.yaml"), "--table", str(tmp_path / "doc.md")])
    assert "needs the lines <!-- ablation: begin -->" in capsys.readouterr().err


def test_every_table_has_its_place_in_the_documents() -> None:
    written = {
        "RESULTS.md": {"ablation", "demo", "demo_long", "compact_composites", "compact_photographs"},
        "PERFORMANCE.md": {
            path.stem for path in (ROOT / "tools").glob("benchmark_*.py") if "MARKERS" in path.read_text()
        },
    }
    assert written["PERFORMANCE.md"] >= {"benchmark_refiner", "benchmark_inference"}
    for document, names in written.items():
        text = (ROOT / "docs" / document).read_text()
        assert set(re.findall(r"<!-- (\w+): begin -->", text)) == set(re.findall(r"<!-- (\w+): end -->", text)) == names
    assert ROOT / "docs/RESULTS.md" == demo_seeds.DOCUMENT
