"""Run the demo with several seeds and write the spread into docs/RESULTS.md.

    python tools/demo_seeds.py demo --seeds 1 2 3
    python tools/demo_seeds.py demo_long --seeds 1 2 3
    python tools/demo_seeds.py demo --collect          # only write the table from the runs that are there

The shards are those of outputs/<experiment>/shards; the seed is that of the weights and of the order of the stream.
Each seed runs in a folder of its own, outputs/seeds/<experiment>/<seed>, and finished ones are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.files import write_whole
from tools.demo import make_scenes
from tools.documents import write_between_markers

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/RESULTS.md"
SCENES = {"demo": 12000, "demo_long": 24000}
"""Training scenes of each experiment, as its file says."""
KEPT = "experiment.yaml"
"""The configuration that a seed was run with, beside its results."""

Scores = dict[str, Any]
ROWS: dict[str, Callable[[Scores], float]] = {
    "grounding accuracy": lambda s: s["alpha"]["overall"]["grounding_accuracy"],
    "… colour phrases": lambda s: s["alpha"]["kinds"]["colour"]["grounding_accuracy"],
    "… shape phrases": lambda s: s["alpha"]["kinds"]["shape"]["grounding_accuracy"],
    "… material phrases": lambda s: s["alpha"]["kinds"]["material"]["grounding_accuracy"],
    "… position phrases": lambda s: s["alpha"]["kinds"]["position"]["grounding_accuracy"],
    "… size phrases": lambda s: s["alpha"]["kinds"]["size"]["grounding_accuracy"],
    "… compound phrases": lambda s: s["alpha"]["kinds"]["compound"]["grounding_accuracy"],
    "strict accuracy": lambda s: s["alpha"]["overall"]["strict_accuracy"],
    "swap accuracy": lambda s: s["alpha"]["overall"]["swap_accuracy"],
    "strict swap accuracy": lambda s: s["alpha"]["overall"]["strict_swap_accuracy"],
    "soft IoU": lambda s: s["alpha"]["overall"]["soft_iou"],
    "soft IoU of the best baseline": lambda s: max(
        card["overall"]["soft_iou"] for card in s["alpha"]["baselines"].values()
    ),
    "SAD": lambda s: s["alpha"]["overall"]["sad"],
    "band MAE": lambda s: s["alpha"]["overall"]["band_mae"],
    "band MAE, unrefined": lambda s: s["alpha_lr"]["overall"]["band_mae"],
    "grounding accuracy of the unrefined alpha": lambda s: s["alpha_lr"]["overall"]["grounding_accuracy"],
    "grounding accuracy of the trimap": lambda s: s["trimap"]["overall"]["grounding_accuracy"],
    "grounding accuracy of the grounding map": lambda s: s["grounding"]["overall"]["grounding_accuracy"],
}


def check_configuration(experiment: str, folder: Path) -> None:
    """Raise :class:`SystemExit` if a seed was run with another configuration than there is now."""
    file, kept = ROOT / f"configs/experiment/{experiment}.yaml", folder / KEPT
    if folder.is_dir() and not (kept.is_file() and kept.read_text() == file.read_text()):
        raise SystemExit(
            f"demo_seeds: error: {folder} was made with another {file.name} than there is now, and one table holds one"
            " configuration: move the folder away."
        )


def run_seed(experiment: str, seed: int, runs: Path) -> None:
    """Train and test one seed in its own folder, unless its report is already there."""
    folder = runs / str(seed)
    output = folder / "outputs" / experiment
    if (output / "report.json").is_file():
        return
    output.mkdir(parents=True, exist_ok=True)
    write_whole((ROOT / f"configs/experiment/{experiment}.yaml").read_bytes(), folder / KEPT)
    link = output / "shards"
    if not link.is_symlink():
        link.symlink_to(ROOT / "outputs" / experiment / "shards")
    config = ["--config", KEPT, "--seed_everything", str(seed), "--data.init_args.seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (["fit"], ["test", "--ckpt_path", f"outputs/{experiment}/last.ckpt"]):
        line = [sys.executable, "-m", "lit_matting", command[0], *config, *command[1:]]
        subprocess.run(line, cwd=folder, env=environment, check=True)


def table(experiment: str, runs: Path) -> str:
    """Return the markdown table of all finished seeds of an experiment."""
    reports = sorted(runs.glob(f"*/outputs/{experiment}/report.json"))
    if not reports:
        raise SystemExit(f"demo_seeds: error: no finished run of {experiment!r} under {runs}.")
    seeds = [path.parents[2].name for path in reports]
    scores = [json.loads(path.read_text())["scores"] for path in reports]
    lines = [
        f"{scores[0]['alpha']['overall']['count']} phrases on held-out scenes of new seeds;"
        f" training seeds {', '.join(seeds)}: `python tools/demo_seeds.py {experiment} --seeds {' '.join(seeds)}`",
        "",
        f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | spread |",
        f"|---|{'--:|' * (len(seeds) + 2)}",
    ]
    for title, value in ROWS.items():
        # a report has null where nothing is defined
        values = [math.nan if found is None else found for found in map(value, scores)]
        known = [item for item in values if not math.isnan(item)]
        cells = [f"{item:.3f}" for item in [*values, statistics.fmean(known)]]
        lines.append(f"| {title} | {' | '.join(cells)} | {max(known) - min(known):.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/demo_seeds.py", description="The demo with several seeds.")
    parser.add_argument("experiment", choices=("demo", "demo_long"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: %(default)s")
    parser.add_argument("--collect", action="store_true", help="run nothing; only write the table")
    options = parser.parse_args(arguments)
    runs = ROOT / "outputs/seeds" / options.experiment
    for folder in sorted(runs.glob("*")):  # also those not asked for now: they stand in the table
        check_configuration(options.experiment, folder)
    if not options.collect:
        make_scenes(ROOT / "outputs" / options.experiment / "shards", SCENES[options.experiment])
        for seed in options.seeds:
            run_seed(options.experiment, seed, runs)
    text = table(options.experiment, runs)
    print(text)
    write_between_markers(text, options.experiment, DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
