"""The ablation: what each run changes, that a finished run is not run again, and what the table says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools import ablate

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "experiment" / "demo.yaml"


def demo() -> dict:
    return yaml.safe_load(DEMO.read_text())


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """Every value of a nested config under its dotted name."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    return {name: leaf for key, item in items for name, leaf in flat(item, f"{prefix}.{key}").items()}


def test_each_variant_switches_one_term_off_and_nothing_else() -> None:
    titles = ablate.variants(demo())
    assert list(titles.values()) == [None, "stm", "ctm", "sg", "alpha_lr", "r"]
    whole, without = (flat(ablate.edited(demo(), DEMO, term, 2, None)) for term in (None, "sg"))
    changed = {name: (whole[name], without[name]) for name in whole if whole[name] != without.get(name)}
    assert changed == {".model.losses.sg.init_args.weight": (0.5, 0.0)}
    assert whole.keys() == without.keys()


def test_whole_run_is_the_experiment_itself_but_for_its_seed_and_where_data_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before, after = flat(demo()), flat(ablate.edited(demo(), DEMO, None, 7, None))
    changed = {name: after[name] for name in after if after[name] != before.get(name)}
    shards = {name: value for name, value in changed.items() if name.endswith(".shards")}
    assert set(changed) - set(shards) == {".seed_everything", ".data.init_args.seed", ".trainer.val_check_interval"}
    assert {changed[".seed_everything"], changed[".data.init_args.seed"]} == {7}
    assert {Path(str(value)).relative_to(tmp_path) for value in shards.values()} == {
        Path(str(before[name])) for name in shards
    }


def test_fewer_steps_shrink_everything_that_is_counted_in_steps() -> None:
    before, after = flat(demo()), flat(ablate.edited(demo(), DEMO, None, 1, demo()["trainer"]["max_steps"] // 10))
    counted = [name for name in before if ".ramps." in name or name.endswith(("warmup_steps", "warmup_iterations"))]
    assert len(counted) >= 3
    for name in counted:
        assert after[name] == round(before[name] / 10), name


def test_file_beside_the_experiment_is_found_from_the_runs_folder(tmp_path: Path) -> None:
    (tmp_path / "backbone.yaml").write_text("")
    config = demo()
    config["model"]["backbone"] = "backbone.yaml"
    edited = ablate.edited(config, tmp_path / "own.yaml", None, 1, None)
    assert edited["model"]["backbone"] == str(tmp_path / "backbone.yaml")


def test_finished_runs_are_kept_until_their_config_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def pretend(folder: Path, *arguments: str) -> None:
        calls.append(arguments)
        config = yaml.safe_load((folder / "experiment.yaml").read_text())
        weights = {name: term["init_args"]["weight"] for name, term in config["model"]["losses"].items()}
        (folder / "last.ckpt").write_text("")
        # a score that tells the runs apart: the terms that are on, and the seed
        value = sum(weight > 0 for weight in weights.values()) + config["seed_everything"] / 10
        scores = {"alpha": {"overall": dict.fromkeys(ablate.MEASURES, value)}}
        (folder / "report.json").write_text(json.dumps({"scores": scores}))

    monkeypatch.setattr(ablate, "call", pretend)
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- ablation: begin --><!-- ablation: end -->\nb\n")
    command = [str(DEMO), "--seeds", "2", "--steps", "100", "--folder", str(tmp_path / "runs"), "--table", str(page)]
    assert ablate.main([*command, "--", "--trainer.precision=32-true"]) == 0
    assert len(calls) == 2 * 2 * 6
    assert all(arguments[-1] == "--trainer.precision=32-true" for arguments in calls)
    assert {arguments[0] for arguments in calls} == {"fit", "test"}
    written = page.read_text()
    # five terms on, seeds 1 and 2: 5.1 and 5.2; four on: 4.1 and 4.2
    assert "| all terms | 5.150 | 0.100 |  |" in written
    assert "| without ctm | 4.150 | 0.100 | -1.000 |" in written
    record = json.loads((tmp_path / "runs" / "ablation.json").read_text())
    assert record["runs"]["without r"]["2"]["soft_iou"] == 4.2
    calls.clear()
    assert ablate.main([*command, "--", "--trainer.precision=32-true"]) == 0
    assert calls == []
    assert page.read_text() == written
    (tmp_path / "runs" / "without_sg" / "2" / "result.json").unlink()  # killed before it was judged
    assert ablate.main([*command, "--", "--trainer.precision=32-true"]) == 0
    assert len(calls) == 2
    assert ablate.main(command) == 0  # without the flag it is another experiment
    assert len(calls) == 2 + 2 * 2 * 6


def test_runs_that_another_process_is_at_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    busy, last = runs / "all_terms" / "1", runs / "without_r" / "1"
    busy.mkdir(parents=True)
    holder = f"""
import fcntl, pathlib, sys, time
with open({str(busy / "lock")!r}, "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    end = time.monotonic() + 60
    while not pathlib.Path({str(last / "result.json")!r}).exists() and time.monotonic() < end:
        time.sleep(0.01)
"""
    order: list[Path] = []

    def pretend(folder: Path, *arguments: str) -> None:
        if arguments[0] == "fit":
            order.append(folder)
            (folder / "last.ckpt").write_text("")
            scores = {"alpha": {"overall": dict.fromkeys(ablate.MEASURES, 0.5)}}
            (folder / "report.json").write_text(json.dumps({"scores": scores}))

    monkeypatch.setattr(ablate, "call", pretend)
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert ablate.main([str(DEMO), "--seeds", "1", "--folder", str(runs)]) == 0
    assert len(order) == 6
    assert order[0] == runs / "without_stm" / "1"
    assert order[-1] == busy
