"""Two processes with uneven shares say what one process says of all samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def answers(world: int, count: int, folder: Path) -> list[dict]:
    script = str(Path(__file__).with_name("gloo_worker.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(count), str(folder / f"store{world}-{count}")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 1])
def test_two_processes_say_what_one_says(tmp_path, count) -> None:
    """With one sample the second process has none at all, and must not hang or spoil the result."""
    (single,) = answers(1, count, tmp_path)
    for answer in answers(2, count, tmp_path):
        assert json.dumps(answer["card"]) == json.dumps(single["card"])
        assert answer["sad"] == pytest.approx(single["sad"], rel=1e-12)
        assert answer["conn"] == pytest.approx(single["conn"], rel=1e-12)
        assert answer["samples"] == single["samples"]
