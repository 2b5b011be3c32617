"""Switch each loss term of an experiment off in turn, and say what it was worth.

    python tools/ablate.py configs/experiment/demo.yaml --seeds 3
    python tools/ablate.py configs/experiment/demo.yaml --seeds 2 --steps 600 --table docs/RESULTS.md
    python tools/ablate.py configs/experiment/sd21_joint.yaml -- --model.backbone configs/backbone/sd15.yaml

Every run is a `fit` and a `test` of the project's own command in a folder of its own. A run that is finished is not run
again, so the same command goes on after a kill, or with more seeds; started in two terminals, it shares the runs among
them. With `--steps`, everything that is counted in steps shrinks alike: warm-up, ramps, the curriculum. What follows
`--` goes to both commands.

The table gives the mean over seeds and the spread, the largest less the smallest: a difference smaller than the spread
of the whole objective is no difference.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.files import write_whole
from tools.documents import document_with, write_between_markers

ROOT = Path(__file__).resolve().parents[1]
WHOLE = "all terms"
MARKERS = "ablation"
COUNTED_IN_STEPS = ("warmup_steps", "warmup_iterations")
MEASURES = {
    "grounding_accuracy": "grounding accuracy",
    "soft_iou": "soft IoU",
    "band_mae": "band MAE",
    "sad": "SAD",
}

Config = dict[str, Any]
Results = dict[str, dict[str, dict[str, float]]]
"""Variant -> seed -> measure -> value."""


def variants(experiment: Config) -> dict[str, str | None]:
    """Return the title of every variant and the term that it does without."""
    return {WHOLE: None} | {f"without {name}": name for name in experiment["model"]["losses"]}


def edited(experiment: Config, origin: Path, without: str | None, seed: int, steps: int | None) -> Config:
    """Return the experiment of one run.

    Args:
        experiment: As it stands in its file.
        origin: That file; names of other files in it are relative to it, those of data to the working folder.
        without: The term to switch off; its weight becomes 0, so that it is still logged.
        seed: Of weights, data and dropout.
        steps: Train so many steps instead of the experiment's own.
    """
    config = copy.deepcopy(experiment)
    config["seed_everything"] = seed
    config["data"]["init_args"]["seed"] = seed
    if without is not None:
        config["model"]["losses"][without].setdefault("init_args", {})["weight"] = 0.0
    total = config["trainer"]["max_steps"]
    steps = steps or total
    config["trainer"]["max_steps"] = steps
    # judged once, at the end, which is also when the checkpoint is written
    config["trainer"]["val_check_interval"] = steps
    return _walk(config, origin.parent, steps / total)


def _walk(value: Any, folder: Path, factor: float, key: str = "") -> Any:
    if key == "ramps":
        return {term: [round(step * factor) for step in ends] for term, ends in value.items()}
    if isinstance(value, dict):
        return {name: _walk(item, folder, factor, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_walk(item, folder, factor, key) for item in value]
    if isinstance(value, str) and value.endswith(".yaml") and (folder / value).is_file():
        return str((folder / value).resolve())
    if isinstance(value, str) and key == "shards" and "://" not in value and "$" not in value:
        return str(Path(value).absolute())
    if isinstance(value, int) and key in COUNTED_IN_STEPS:
        return round(value * factor)
    return value


def run(config: Config, folder: Path, flags: Sequence[str], wait: bool = True) -> dict[str, float] | None:
    """Train and judge one variant in its folder, unless that is done already; return what it scored.

    While another process is at it, its result is waited for, or without ``wait`` None is returned at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # let go by the system when its holder ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        return _run(config, folder, flags)


def _run(config: Config, folder: Path, flags: Sequence[str]) -> dict[str, float]:
    text = f"# flags: {' '.join(flags)}\n{yaml.safe_dump(config, sort_keys=False)}"
    path, result = folder / "experiment.yaml", folder / "result.json"
    if result.is_file() and path.is_file() and path.read_text() == text:
        return json.loads(result.read_text())
    result.unlink(missing_ok=True)
    write_whole(text.encode(), path)
    call(folder, "fit", "--config", path.name, *flags)
    checkpoint = newest(folder, "*.ckpt")
    call(folder, "test", "--config", path.name, "--ckpt_path", str(checkpoint.relative_to(folder)), *flags)
    overall = json.loads(newest(folder, "report.json").read_text())["scores"]["alpha"]["overall"]
    scores = {name: float(overall[name]) for name in MEASURES}
    write_whole(json.dumps(scores).encode(), result)
    return scores


def call(folder: Path, *arguments: str) -> None:
    """Run one of the project's commands inside a folder; its progress goes to ``log.txt`` there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (folder / "log.txt").open("a") as log:
        code = subprocess.call(
            [sys.executable, "-m", "lit_matting", *arguments], cwd=folder, env=environment, stdout=log, stderr=log
        )
    if code:
        raise SystemExit(f"ablate: error: {arguments[0]} failed; {folder / 'log.txt'} ends with what it said.")


def newest(folder: Path, pattern: str) -> Path:
    """Return the file below a folder that was written last."""
    found = sorted(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(
            f"ablate: error: the run in {folder} left no {pattern}: the experiment needs a ModelCheckpoint and a"
            " BenchmarkReport among its callbacks."
        )
    return found[-1]


def table(results: Results, heading: str) -> str:
    """Return the markdown table: mean and spread of each measure, and the distance to the whole objective's mean."""
    lines = [heading, "", "| | " + " | ".join(f"{title} | spread | change" for title in MEASURES.values()) + " |"]
    lines.append("|---" + "|--:" * (3 * len(MEASURES)) + "|")
    for title, seeds in results.items():
        cells = []
        for name in MEASURES:
            values = [scores[name] for scores in seeds.values()]
            mean = statistics.fmean(values)
            change = mean - statistics.fmean(scores[name] for scores in results[WHOLE].values())
            cells += [f"{mean:.3f}", f"{max(values) - min(values):.3f}", "" if title == WHOLE else f"{change:+.3f}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/ablate.py", description="Switch each loss term off in turn, with several seeds."
    )
    parser.add_argument("experiment", type=Path, help="an experiment file, its loss map inline")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps; default: the experiment's own")
    parser.add_argument("--folder", type=Path, help="where the runs go (default outputs/ablation/EXPERIMENT)")
    parser.add_argument("--table", type=document_with(MARKERS), help="Markdown file to write the table into")
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    options, flags = parser.parse_args(given[:cut]), given[cut + 1 :]
    experiment = yaml.safe_load(options.experiment.read_text())
    if not isinstance((experiment.get("model") or {}).get("losses"), dict):
        parser.error(f"{options.experiment} has no loss map under model.losses.")
    folder = (options.folder or Path("outputs/ablation") / options.experiment.stem).absolute()
    command = " ".join(["python tools/ablate.py", *given[:cut], *([] if cut == len(given) else ["--", *flags])])
    steps = options.steps or experiment["trainer"]["max_steps"]
    heading = f"`{command}`: {steps} training steps, seeds 1 to {options.seeds}, final alpha."
    # seed by seed: a table that is cut short still compares all variants
    runs = [
        (title, str(seed), edited(experiment, options.experiment, without, seed, options.steps))
        for seed in range(1, options.seeds + 1)
        for title, without in variants(experiment).items()
    ]
    results: Results = {title: {} for title, _, _ in runs}
    for wait in (False, True):  # what another process is at is left for the end
        for title, seed, config in runs:
            if seed in results[title]:
                continue
            scores = run(config, folder / title.replace(" ", "_") / seed, flags, wait)
            if scores is not None:
                results[title][seed] = scores
                print(f"seed {seed}, {title}: {scores}", flush=True)
    text = table(results, heading)
    record = {"command": command, "steps": steps, "runs": results}
    write_whole(json.dumps(record, indent=1).encode(), folder / "ablation.json")
    write_whole(f"{text}\n".encode(), folder / "ablation.md")
    if options.table:
        write_between_markers(text, MARKERS, options.table)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
