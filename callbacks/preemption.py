"""Preemption: a cluster says that the time is up, the run saves itself at the next step and can go on elsewhere."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lit_matting.checks import InputError

log = logging.getLogger(__name__)

TO_BE_CONTINUED = 75
"""Exit status of a run that was interrupted and can go on: sysexits' EX_TEMPFAIL, "try again later"."""


class Preemption(Checkpoint):
    """Saves a checkpoint when a signal arrives, and ends the process with status 75.

    The handler only takes note. The checkpoint is written when the optimizer step that is being computed has ended, in
    all processes at the same one, so that the run that continues sees exactly the batches and weights that an
    uninterrupted one would have. (Lightning's own requeueing saves inside the handler, in the middle of a step.) A
    signal during a validation waits for its end.

    Inside a Slurm job the job is put back into its queue. To go on, give the checkpoint as ``--ckpt_path``; the run
    that went on from it deletes it when it ends by itself. That of another run in the same folder stays.

    Args:
        path: Where to write the checkpoint. Null: ``preempted.ckpt`` beside the run's other checkpoints.
        signals: Names of the signals that announce the end.
        requeue: Inside a Slurm job, run ``scontrol requeue`` after saving.
        every_n_steps: The processes ask each other after optimizer steps that this divides. Asking makes the host wait
            for the device; a signal waits for up to so many steps, which must fit into the time that it leaves.
    """

    # a Checkpoint, because Lightning lets those run last: weight averaging, say, has then seen the step as well

    def __init__(
        self,
        path: str | None = None,
        signals: Sequence[str] = ("SIGUSR1", "SIGTERM"),
        requeue: bool = True,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise InputError(f"`every_n_steps` of Preemption must be 1 or more, got {every_n_steps}.")
        known = {item.name for item in signal.Signals}
        for name in signals:
            if name not in known or name in ("SIGKILL", "SIGSTOP"):
                raise InputError(
                    f"`signals` of Preemption: {name!r} is no signal that a process can handle (SIGUSR1?)."
                )
        self.path = None if path is None else Path(path)
        self.signals = tuple(signal.Signals[name] for name in signals)
        self.requeue = requeue
        self.every_n_steps = every_n_steps
        self.asked = False
        """Whether a signal has arrived in this process."""
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the signals, before loader workers inherit the handlers and before Lightning looks for any."""
        if stage == "fit":
            self.asked = False
            self._process = os.getpid()
            self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take them over again: the trainer has put its own handlers beside ours."""
        self._listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and end, if any process was told to and this batch ends an optimizer step at which they ask."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.global_step >= trainer.max_steps > 0:
            return
        if trainer.global_step % self.every_n_steps:  # the same steps in all processes, or they would wait for ever
            return
        if not trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            return
        path = self.place(trainer)
        temporary = path.with_name(f".{path.name}.part")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, path)
            log.warning("Interrupted at step %d; to go on, add --ckpt_path %s", trainer.global_step, path)
            if self.requeue:
                requeue()
        trainer.strategy.barrier()
        # the launcher of the other processes would take a status of theirs for a crash and kill this one
        raise SystemExit(TO_BE_CONTINUED if trainer.is_global_zero else 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delete the checkpoint of an earlier interruption, if this run went on from it and has now ended."""
        # one that this run wrote needs no deleting here: it ended there and then
        path = self.place(trainer)
        if trainer.is_global_zero and trainer.ckpt_path and Path(trainer.ckpt_path).resolve() == path.resolve():
            path.unlink(missing_ok=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def place(self, trainer: Trainer) -> Path:
        """Return where the checkpoint of an interruption lies."""
        if self.path is not None:
            return self.path
        folders = (item.dirpath for item in trainer.checkpoint_callbacks if isinstance(item, ModelCheckpoint))
        return Path(next((folder for folder in folders if folder), trainer.default_root_dir)) / "preempted.ckpt"

    def _listen(self) -> None:
        for number in self.signals:
            current = signal.getsignal(number)
            if current != self._note:
                self._before.setdefault(number, current)
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self.asked = True
        elif number == signal.SIGTERM:  # a loader worker that is told to end; other signals are not for it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def requeue() -> bool:
    """Put the Slurm job of this process back into the queue; return whether there was one and it worked."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.warning("The job could not be requeued (%s): submit it again.", " ".join(said.split()))
        return False
    log.info("Requeued job %s.", job)
    return True
