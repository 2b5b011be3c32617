"""Two of the known pitfalls that a glance at the source code rules out everywhere; docs/PITFALLS.md has all of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for room in ("lit_matting", "data_modules", "callbacks") for path in (ROOT / room).rglob("*.py")]
ROWS = [line for line in (ROOT / "docs" / "PITFALLS.md").read_text().splitlines() if line[:3].strip("| ").isdigit()]
PROBABILITIES = {"binary_cross_entropy", "BCELoss"}


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


def forbidden(source: str) -> list[str]:
    return [name for name, _ in calls(source) if name in PROBABILITIES]


def drifting(source: str) -> list[str]:
    """Resamplings whose corners lie on corners."""
    return [
        name
        for name, call in calls(source)
        for given in call.keywords
        if given.arg == "align_corners" and not (isinstance(given.value, ast.Constant) and given.value.value is False)
    ]


def test_probabilities_never_enter_a_cross_entropy() -> None:
    # refused by CUDA's autocast, and there is no GPU here that would say so
    assert forbidden("F.binary_cross_entropy(a, b); F.binary_cross_entropy_with_logits(a, b)") == [
        "binary_cross_entropy"
    ]
    assert {path.name: found for path in SOURCES if (found := forbidden(path.read_text()))} == {}


def test_every_resampling_has_half_pixel_centres() -> None:
    assert drifting("F.interpolate(a, align_corners=True); F.interpolate(a, align_corners=False)") == ["interpolate"]
    assert {path.name: found for path in SOURCES if (found := drifting(path.read_text()))} == {}
    # grid_sample's own default is half-pixel centres as well, but says so in a warning: it is to be stated
    stated = [
        any(given.arg == "align_corners" for given in call.keywords)
        for path in SOURCES
        for name, call in calls(path.read_text())
        if name == "grid_sample"
    ]
    assert stated
    assert all(stated)


def named(cell: str) -> list[tuple[str, str]]:
    """File and test of every name in a cell of the table; a name without a file is of the file before it."""
    spans, found, file = re.findall(r"`([^`]*)`", cell), [], ""
    assert spans, "a pitfall without a test"
    for span in spans:
        match = re.fullmatch(r"(\w+\.py)?(?:::(\w+))?", span)
        assert match, f"{span} is no file::test written in full"
        file = match[1] or file
        found.append((file, match[2] or ""))
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_named_test_exists(row: str) -> None:
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    for file, test in named(row.split("|")[4]):
        assert file in tests, file
        assert not test or f"def {test}(" in tests[file], f"{file}::{test}"


def test_rows_are_all_there_and_names_that_are_cut_short_are_refused() -> None:
    assert [int(row.split("|")[1]) for row in ROWS] == list(range(1, 18))
    assert named("`test_a.py`, `::test_b`, [link](METRICS.md), `test_c.py::test_d`") == [
        ("test_a.py", ""), ("test_a.py", "test_b"), ("test_c.py", "test_d"),
    ]  # fmt: skip
    for cut in ("`test_a.py::test_b_...`", "`test_a.py` (`test_b_...`)", "`test_b`", "none"):
        with pytest.raises(AssertionError, match=r"written in full|without a test"):
            named(cut)
