"""Two training steps, or a prediction, for real with random weights; prints the growth of the process's peak memory.

Started by `tools/plan.py --measure` in a process of its own.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lit_matting.module import LitMatting
from lit_matting.networks.inference import matte_at_native_size
from lit_matting.networks.refiner import SparseRefiner
from tools.planning.experiment import read_experiment
from tools.planning.step import AUTOCAST, phrases, random_batch, refine_share


def peak_bytes() -> int:
    """Return the process's peak of resident memory since :func:`restart`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def restart() -> int:
    """Let the peak begin anew, and return what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def run(model: LitMatting, what: str, batch: int, size: int, precision: str, active: float) -> None:
    """Take two training steps, or matte one image."""
    if isinstance(model.network.refiner, SparseRefiner):
        refine_share(model.network.refiner, active)
    autocast = torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST)
    if what == "inference":
        with torch.no_grad(), autocast:
            matte_at_native_size(model.eval().network, torch.rand(1, 3, size, size), phrases(1), size)
        return
    model.train()
    model.log = model.log_dict = lambda *call, **options: None  # type: ignore[method-assign]
    optimizer = model.make_optimizer([item for item in model.parameters() if item.requires_grad])
    for index in range(2):
        data = random_batch(batch, size)
        with autocast:
            loss = model.training_step(data, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        del loss, data


def main(given: dict[str, Any]) -> None:
    """Build, run and print."""
    small = read_experiment([str(Path(__file__).with_name("warm_up.yaml"))], [], meta=False)
    run(small.model, given["what"], 1, small.size, "bf16-mixed", 0.5)  # what is loaded on first use is no part of it
    del small
    before = restart()
    experiment = read_experiment(given["files"], given["flags"], meta=False)
    run(experiment.model, given["what"], given["batch"], experiment.size, experiment.precision, given["active"])
    print(peak_bytes() - before)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(json.loads(sys.argv[1]))
