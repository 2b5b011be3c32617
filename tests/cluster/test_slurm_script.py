"""tools/slurm.sbatch: what it starts, with a stand-in for srun."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "slurm.sbatch"
STARTED = "python -m lit_matting fit --config E.yaml --config configs/trainer/slurm.yaml"
SIZE = "--trainer.num_nodes 2 --trainer.devices 8"


def started(folder: Path, *arguments: str) -> list[str]:
    """The arguments that srun gets, after those that the script always gives."""
    srun = folder / "bin" / "srun"
    srun.parent.mkdir(exist_ok=True)
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    given = {"PATH": f"{srun.parent}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    command = ["bash", str(SCRIPT), "E.yaml", *arguments]
    done = subprocess.run(command, env={**os.environ, **given}, cwd=folder, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    expected = [*STARTED.split(), *SIZE.split()]
    assert lines[: len(expected)] == expected
    return lines[len(expected) :]


def test_what_follows_the_folder_goes_to_fit_word_by_word(tmp_path: Path) -> None:
    assert started(tmp_path, "out") == []
    more = ["--model.initial_weights", "last one/last.ckpt", "--model.trainable=[network.refiner, network.project]"]
    assert started(tmp_path, "out", *more) == more


def test_a_job_that_runs_again_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for age, name in enumerate(("preempted.ckpt", "last.ckpt")):
        (tmp_path / "out" / name).touch()
        os.utime(tmp_path / "out" / name, (1000 - age, 1000 - age))
    expected = ["--model.teacher=t.ckpt", "--ckpt_path", "out/preempted.ckpt"]
    assert started(tmp_path, "out", "--model.teacher=t.ckpt") == expected
