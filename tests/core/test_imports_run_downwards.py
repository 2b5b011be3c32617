"""The rooms of the house see each other in one direction only, and a loader worker never loads a model."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lit_matting", "data_modules", "callbacks", "tools")

# a room sees rooms of lower levels, never one of its own level; what is not named here is see-through
LEVELS = {
    "lit_matting.checks": 0,
    "lit_matting.records": 1,
    "lit_matting.targets": 2,
    "lit_matting.sparse": 2,
    "lit_matting.backbones": 3,
    "lit_matting.losses": 3,
    "lit_matting.metrics": 3,
    "lit_matting.networks": 4,
    "lit_matting.module": 5,
    "lit_matting.pipeline": 5,
    "lit_matting.cli": 6,
}
DATA_MODULES_SEE = {"lit_matting.checks", "lit_matting.pictures", "lit_matting.records", "lit_matting.targets"}


def modules() -> dict[str, Path]:
    """Every module of the repository's packages, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str, path: Path) -> set[str]:
    """Our modules that a module imports anywhere: at its top, in a function, or for type checking only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            # `from package import thing`: the thing may be a module, else it is defined in the package itself
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        else:
            continue
        found |= {module for module in names if module in MODULES and module != name}
    return found


GRAPH = {name: imported(name, path) for name, path in MODULES.items()}


def room(module: str) -> str | None:
    """The named room that a module is in."""
    return next((name for name in LEVELS if module == name or module.startswith(name + ".")), None)


def reached(start: str) -> dict[str, list[str]]:
    """Every module that importing ``start`` may bring in, with the way there.

    A way ends at a named room other than its own: what that room sees is judged where it starts itself.
    """
    ways = {start: [start]}
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module != start and room(module) not in (None, room(start)):
            continue
        for other in GRAPH[module]:
            if other not in ways:
                ways[other] = [*ways[module], other]
                waiting.append(other)
    return ways


def test_the_test_sees_the_imports_it_is_about() -> None:
    assert "lit_matting.networks.refiner" in GRAPH["lit_matting.networks.matting_network"]
    assert "lit_matting.checks" in GRAPH["lit_matting.records"]
    assert "data_modules" in GRAPH["lit_matting.cli"]  # inside a function
    assert all(any(room(module) == name for module in MODULES) for name in LEVELS), "a room is gone or was renamed"


@pytest.mark.parametrize("start", sorted(name for name in MODULES if room(name) is not None))
def test_room_sees_lower_rooms_only(start: str) -> None:
    own = room(start)
    for module, way in reached(start).items():
        other = room(module)
        if other not in (None, own):
            assert LEVELS[other] < LEVELS[own], f"imports run downwards only: {' -> '.join(way)}"


def test_no_two_modules_import_each_other() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module not in done:
            for other in GRAPH[module]:
                visit(other, (*way, module))
            done.add(module)

    # a package that re-exports its modules, and the lazy names of the top package, are not what is meant
    for module in MODULES:
        if MODULES[module].name != "__init__.py":
            visit(module, ())


def seen_by(package: str) -> dict[str, list[str]]:
    """Everything a package may bring in, with one way there."""
    ways: dict[str, list[str]] = {}
    for module in MODULES:
        if module == package or module.startswith(package + "."):
            ways.update(reached(module))
    return {module: way for module, way in ways.items() if not (module == package or module.startswith(package + "."))}


def test_data_modules_see_records_checks_targets_and_pictures_only() -> None:
    ways = seen_by("data_modules")
    assert set(ways) <= DATA_MODULES_SEE, next(way for module, way in ways.items() if module not in DATA_MODULES_SEE)


def test_callbacks_never_see_data_modules() -> None:
    for module, way in seen_by("callbacks").items():
        assert module.split(".")[0] not in ("data_modules", "tools"), " -> ".join(way)


def test_only_the_command_line_knows_data_modules_and_callbacks() -> None:
    for module, imports in GRAPH.items():
        if module.split(".")[0] == "lit_matting" and module != "lit_matting.cli":
            others = {name for name in imports if name.split(".")[0] in ("data_modules", "callbacks")}
            assert not others, f"{module} imports {others}"


def test_nobody_imports_tools() -> None:
    for module, imports in GRAPH.items():
        if module.split(".")[0] != "tools":
            assert not any(name.split(".")[0] == "tools" for name in imports), module


def run(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after ``code``."""
    program = f"import sys\n{code}\nprint(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_loader_worker_never_loads_a_model() -> None:
    # what a spawned worker imports to unpickle its work: every module but those that are classes of Lightning
    lightning = {"data_modules.interleaved", "data_modules.prediction_shards"}
    names = [name for name in MODULES if name.startswith("data_modules.") and name not in lightning]
    loaded = run("\n".join(f"import {name}" for name in ["data_modules", *names]))
    assert {"torch", "cv2", "data_modules"} <= loaded
    assert loaded.isdisjoint({"diffusers", "transformers", "lightning", "torchmetrics"})


def test_data_module_itself_never_loads_a_diffusion_model() -> None:
    loaded = run("from data_modules import InterleavedDataModule")
    assert "lightning" in loaded
    assert "diffusers" not in loaded


def test_losses_and_metrics_never_load_a_model() -> None:
    loaded = run("import lit_matting.losses, lit_matting.sparse, lit_matting.targets, lit_matting.metrics.functional")
    assert loaded.isdisjoint({"diffusers", "transformers", "lightning"})
