"""Small shards of pictures whose pixels say what they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from data_modules.shards import InstanceEntry, ShardWriter


def picture(number: int, size: int = 24, instances: int = 2) -> tuple[np.ndarray, list[np.ndarray]]:
    """A picture of `instances` upright stripes with soft edges, and their alphas; the pixels depend on the number."""
    rng = np.random.default_rng(number)
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    columns = np.arange(size)
    alphas = []
    for k in range(instances):
        middle = (k + 0.5) * size / instances
        row = np.clip(size / instances / 2 - np.abs(columns + 0.5 - middle), 0, 1)
        alphas.append(np.tile(np.rint(row * 255).astype(np.uint8), (size, 1)))
    return image, alphas


def write_pictures(
    folder: Path,
    samples: int,
    name: str = "train",
    max_samples: int = 5,
    instances: int = 2,
    kind: str = "alpha",
    size: int = 24,
    phrases: Callable[[int, int], Sequence[tuple[str, str]]] | None = None,
    offset: int = 0,
    **fields: object,
) -> Path:
    """Write shards of pictures `offset`, `offset + 1`, ... and return the path of their index."""

    def two(number: int, instance: int) -> Sequence[tuple[str, str]]:
        return [(f"thing {number} {instance}", "basic"), (f"shade {number} {instance}", "colour")]

    with ShardWriter(folder, prefix=name, dataset=name, split=name, tool="test 1", max_samples=max_samples) as writer:
        for number in range(offset, offset + samples):
            image, alphas = picture(number, size, instances)
            writer.write(
                f"{number:06d}",
                image=image,
                image_ext="png",
                instances=[
                    InstanceEntry(
                        id=f"i{k}",
                        target=alpha if kind == "alpha" else alpha > 127,
                        kind=kind,  # type: ignore[arg-type]
                        phrases=(phrases or two)(number, k),
                        category="stripe",
                        **fields,  # type: ignore[arg-type]
                    )
                    for k, alpha in enumerate(alphas)
                ],
                extra={"source": {"number": number}},
            )
    return folder / f"{name}.index.json"


@pytest.fixture(name="picture", scope="session")
def picture_fixture() -> Callable[..., tuple[np.ndarray, list[np.ndarray]]]:
    """The picture of a number, and its alphas."""
    return picture


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """Writes shards under the test's own folder: pictures("a", 12, ...) gives the index path."""

    def write(name: str, samples: int, **settings: object) -> Path:
        return write_pictures(tmp_path / name, samples, name=name, **settings)  # type: ignore[arg-type]

    return write


@pytest.fixture(scope="session")
def runner() -> ModuleType:
    """The module of small training runs."""
    spec = importlib.util.spec_from_file_location("train_runner", Path(__file__).with_name("train_runner.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settings(tmp_path: Path, pictures: Callable[..., Path]) -> dict[str, Any]:
    """Three data sets of different size, the smallest of which ends its epoch several times."""
    return {
        "train": {
            "a": {"shards": str(pictures("a", 13)), "batch_size": 4, "phrases_per_image": 2},
            "b": {"shards": str(pictures("b", 11, kind="mask")), "batch_size": 3, "mix_shards": 1},
            "c": {"shards": str(pictures("c", 2)), "batch_size": 3},
        },
        "schedule": {"cycle": ["a", "b"], "insert_every": 4, "insert": ["c"]},
        "trainer": {"max_steps": 20},
        "folder": str(tmp_path),
        "journal": str(tmp_path / "journal.jsonl"),
    }
