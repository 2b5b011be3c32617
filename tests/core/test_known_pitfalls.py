"""Two of the known pitfalls that a glance at the source code rules out everywhere; docs/PITFALLS.md has all of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for room in ("lit_matting", "data_modules", "callbacks") for path in (ROOT / room).rglob("*.py")]
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


@pytest.mark.parametrize("line", (ROOT / "docs" / "PITFALLS.md").read_text().splitlines()[8:])
def test_every_named_test_exists(line: str) -> None:
    import re

    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    file = ""
    for name, test in re.findall(r"`(\w+\.py)?(?:::(\w+))?`", line):
        file = name or file
        if name:
            assert name in tests, name
        if test:
            source = tests[file] if name else "".join(tests.values())
            assert f"def {test}(" in source, test
