"""Commands of `python -m lit_matting`, one after the other in the same processes: `process_runner.py COMMANDS.json`.

The launcher of the other processes starts this file again with the same arguments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_matting.cli import main


class Keep(Callback):
    """Leaves the weights of the end of training, and what validation measured, in a folder."""

    def __init__(self, folder: str, wait_s: float = 0.0) -> None:
        self.folder = Path(folder)
        self.wait_s = wait_s

    def on_train_batch_end(self, *call: Any) -> None:
        time.sleep(self.wait_s)  # long enough for a signal to come in between

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = trainer.strategy.lightning_module_state_dict()  # all processes: sharded weights are gathered
        if trainer.is_global_zero:
            torch.save({name: value.clone() for name, value in state.items()}, self.folder / "weights.pt")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            (self.folder / "validation.json").write_text(json.dumps(metrics))


def start(folder: Path, commands: list[list[str]]) -> subprocess.Popen[bytes]:
    """Start the commands in processes of their own; what they say goes to ``log.txt`` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commands.json").write_text(json.dumps(commands))
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    with (folder / "log.txt").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder / "commands.json")],
            stdout=said,
            stderr=said,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def finish(folder: Path, process: subprocess.Popen[bytes], status: int = 0) -> None:
    """Wait for the end and check the exit status."""
    code = process.wait(400)
    assert code == status, f"status {code}\n" + (folder / "log.txt").read_text()[-3000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for command in json.loads(Path(sys.argv[1]).read_text()):
        status = main(command)
        if status:
            sys.exit(status)
