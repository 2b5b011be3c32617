"""What an experiment needs before anything is trained: parameters, checkpoint, peak memory and FLOPs, by part.

    python tools/plan.py --config configs/experiment/sd21_joint.yaml --size 512 --batch 8
    python tools/plan.py --config E.yaml --config configs/trainer/gpu.yaml --json
    python tools/plan.py --config E.yaml --size 512 --batch 1 --measure      # also run it here, and compare

The model is built on the meta device, without weights or downloads; a training step and a prediction run on tensors
without contents, while every tensor they would make is counted. Further flags are those of `fit`, for example
`--model.backbone configs/backbone/sd15.yaml`.

Counted are tensors: not the some 0.5 GB of a process with PyTorch and a GPU's context, not what single kernels use
while they run, not an allocator's gaps. A process takes some tens of MiB more: below 256 MiB it may need a quarter more
than planned, and the table says so. What is activated follows PyTorch's autocast and attention on a processor; a GPU
keeps the results of normalisations in float32 and needs somewhat more.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.checks import InputError

MIB = 2**20
FLOOR = 256 * MIB
"""Smallest plan that a process keeps to within 15 %: the demo's of 145 MiB grew it by 33 MiB more, code and gaps."""


def plan(experiment: Any, batch: int, active: float, images: int = 1) -> dict[str, Any]:
    """Return the plan of an experiment whose model is on the meta device.

    Args:
        experiment: What :func:`tools.planning.experiment.read_experiment` returned.
        batch: Images per process and batch.
        active: Share of the pixels that the refiner works on.
        images: Photographs that are matted at once.
    """
    from tools.planning.step import TEACHER, parts_of, prediction, refiner_cost, training_step

    model, size = experiment.model, experiment.size
    parts: dict[str, dict[str, Any]] = {}
    for name, modules in parts_of(model).items():
        parameters = [item for module in modules for item in module.parameters()]
        parts[name] = {
            "parameters": sum(item.numel() for item in parameters),
            "trained": sum(item.numel() for item in parameters if item.requires_grad),
            "weights_bytes": sum(item.numel() * item.element_size() for item in parameters),
        }
    trained = [item for item in model.parameters() if item.requires_grad]
    frozen = model._frozen_prefixes()
    kept = [v for k, v in model.state_dict().items() if not (frozen and k.startswith(frozen))]
    weights_bytes, trained_bytes, kept_bytes = (
        sum(item.numel() * item.element_size() for item in some) for some in (list(model.parameters()), trained, kept)
    )
    teacher_bytes = parts.get(TEACHER, {}).get("weights_bytes", 0)
    average = {"trained": trained_bytes, "all": weights_bytes, "nothing": 0}[experiment.average]
    refiner = model.network.refiner
    costs = [None, None]
    if refiner is not None:
        refined = (min(batch, refiner.train_images or batch), images)
        costs = [refiner_cost(refiner, count, size, active, model.network.backbone.channels) for count in refined]
    step = training_step(model, batch, size, experiment.precision, costs[0], experiment.accelerator != "cpu")
    matting = prediction(model, images, size, experiment.precision, costs[1])
    for name, part in parts.items():
        found = (
            step.flops_by_part.get(name, 0) if name == TEACHER else matting.flops_by_part.get(name, 0) * batch // images
        )
        part["forward_flops"] = found
        part["kept_bytes"] = step.kept_by_part.get(name, 0)
    copied = step.gradients if experiment.copied_gradients else 0
    peak = step.peak + average + copied
    fixed = weights_bytes + teacher_bytes + step.gradients + step.optimizer + average + copied
    return {
        "size": size,
        "batch": batch,
        "precision": experiment.precision,
        "active": active,
        "parts": parts,
        "training": {
            "weights_bytes": weights_bytes + teacher_bytes,
            "gradients_bytes": step.gradients + copied,
            "optimizer_bytes": step.optimizer,
            "average_bytes": average,
            "working_bytes": peak - fixed,
            "peak_bytes": peak,
            "measurable_bytes": step.peak,
            "peak_moment": step.moment,
            "flops": step.flops,
        },
        "inference": {
            "images": images,
            "peak_bytes": matting.peak,
            "measurable_bytes": matting.peak,
            "flops": matting.flops,
        },
        "checkpoint_bytes": kept_bytes + step.optimizer + (kept_bytes if average else 0),
        "shared_folder_bytes": sum(
            v.numel() * v.element_size()
            for k, v in model.state_dict().items()
            if k.startswith("network.") and not (frozen and k.startswith(frozen))
        ),
    }


def table(found: dict[str, Any], title: str) -> str:
    """Return a plan as text."""
    rows = [("part", "parameters", "trained", "weights", "forward", "kept for backward")]
    for name, part in found["parts"].items():
        rows.append(
            (
                name,
                f"{part['parameters']:,}",
                f"{part['trained']:,}" if part["trained"] else "frozen",
                _mib(part["weights_bytes"]),
                f"{part['forward_flops'] / 2e9:,.1f} GMAC",
                _mib(part["kept_bytes"]),
            )
        )
    total = [sum(part[key] for part in found["parts"].values()) for key in ("parameters", "trained")]
    forward = sum(part["forward_flops"] for part in found["parts"].values())
    rows.append(("total", f"{total[0]:,}", f"{total[1]:,}", "", f"{forward / 2e9:,.1f} GMAC", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    training, inference = found["training"], found["inference"]
    facts = {
        f"training, {found['batch']} images at {found['size']} pixels, {found['precision']}": "",
        "  weights": _mib(training["weights_bytes"]),
        "  gradients": _mib(training["gradients_bytes"]),
        "  optimizer's states": _mib(training["optimizer_bytes"]),
        "  averaged weights": _mib(training["average_bytes"]),
        "  activations and temporaries": _mib(training["working_bytes"]),
        f"  peak, in the {training['peak_moment']}": _mib(training["peak_bytes"]),
        "  a step computes": f"{training['flops'] / 1e12:,.2f} TFLOP",
        f"using it, {inference['images']} image": "",
        "  peak": _mib(inference["peak_bytes"]),
        "  computes": f"{inference['flops'] / 1e12:,.2f} TFLOP",
        "checkpoint": _mib(found["checkpoint_bytes"]),
        "shared folder": _mib(found["shared_folder_bytes"]),
    }
    width = max(map(len, facts))
    lines += ["", *(f"{name.ljust(width)}  {value.rjust(14)}".rstrip() for name, value in facts.items())]
    small = [name for name in ("training", "inference") if found[name]["peak_bytes"] < FLOOR]
    if small:
        lines.append(
            f"below {_mib(FLOOR)} ({' and '.join(small)} here) a process's own pages count: it may need a quarter more"
        )
    for name, value in found.get("measured", {}).items():
        expected = found[name]["measurable_bytes"]  # one process, no average
        lines.append(
            f"measured here, {name}: {_mib(value)}, {value / expected - 1:+.1%} of the planned {_mib(expected)}"
        )
    return "\n".join([title, "", *lines])


def _mib(count: int) -> str:
    return f"{count / MIB:,.1f} MiB"


def measure(files: list[str], flags: list[str], batch: int, active: float) -> dict[str, int]:
    """Run two training steps and a prediction here, each in a process of its own, and return their peaks, in bytes."""
    peaks = {}
    for what in ("training", "inference"):
        given = json.dumps({"what": what, "files": files, "flags": flags, "batch": batch, "active": active})
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "planning" / "measure.py"), given],
            capture_output=True,
            text=True,
            # everything larger than a page or two goes back to the system when it is freed, so that the peak is one
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        )
        if done.returncode:
            said = (done.stderr.strip() or f"ended with status {done.returncode}").splitlines()[-1]
            raise InputError(f"`--measure`: the {what} run failed here: {said}")
        peaks[what] = int(done.stdout.strip().splitlines()[-1])
    return peaks


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", required=True, help="experiment file; trainer files after it")
    parser.add_argument("--size", type=int, help="side, in pixels, of the network's input; default: the experiment's")
    parser.add_argument("--batch", type=int, help="images per process and batch; default: the experiment's largest")
    parser.add_argument(
        "--active", type=float, default=0.1, help="share of the pixels that is refined (0.1); 1 is the worst case"
    )
    parser.add_argument("--measure", action="store_true", help="also run it here on the processor, and compare")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options, flags = parser.parse_known_args(arguments)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            experiment, found = _planned(options, flags)
    except InputError as error:
        print(f"tools/plan.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        logging.disable(before)
    title = f"{options.config[0]}: {experiment.model.network.backbone.name}"
    print(json.dumps(found, indent=2) if options.json else table(found, title))
    return 0


def _planned(options: argparse.Namespace, flags: list[str]) -> tuple[Any, dict[str, Any]]:
    """Return the experiment that the command line describes, and its plan."""
    for name, value in (("--size", options.size), ("--batch", options.batch)):
        if value is not None and value < 1:
            raise InputError(f"`{name}` must be at least 1, got {value}.")
    if not 0 < options.active <= 1:
        raise InputError(f"`--active` is a share above 0 and at most 1, got {options.active}.")
    if options.size is not None:
        flags.append(f"--data.init_args.image_size={options.size}")
    from tools.planning.experiment import read_experiment

    experiment = read_experiment(options.config, flags, meta=True)
    batch = options.batch or experiment.batch
    found = plan(experiment, batch, options.active)
    if options.measure:
        found["measured"] = measure(options.config, flags, batch, options.active)
    return experiment, found


if __name__ == "__main__":
    sys.exit(main())
