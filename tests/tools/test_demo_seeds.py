"""The table over seeds holds one configuration, and says what the reports say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.demo_seeds import KEPT, ROOT, check_configuration, table


def report(accuracy: float) -> dict:
    card = {
        "overall": dict.fromkeys(
            ("strict_accuracy", "swap_accuracy", "strict_swap_accuracy", "soft_iou", "sad", "band_mae"), 0.25
        )
        | {"grounding_accuracy": accuracy, "count": 500},
        "kinds": {
            kind: {"grounding_accuracy": accuracy}
            for kind in ("colour", "shape", "material", "position", "size", "compound")
        },
        "baselines": {"all_zero": {"overall": {"soft_iou": 0.0}}, "perfect_all": {"overall": {"soft_iou": 0.4}}},
    }
    return {"scores": dict.fromkeys(("alpha", "alpha_lr", "trimap", "grounding"), card)}


def test_the_table_gives_each_seed_their_mean_and_their_spread(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 0.8), (2, 0.95)):
        folder = tmp_path / f"{seed}/outputs/demo"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report(accuracy)))
    lines = table("demo", tmp_path).splitlines()
    assert "500 phrases" in lines[0]
    assert "--seeds 1 2" in lines[0]
    assert "| grounding accuracy | 0.800 | 0.950 | 0.875 | 0.150 |" in lines
    assert "| soft IoU of the best baseline | 0.400 | 0.400 | 0.400 | 0.000 |" in lines
    with pytest.raises(SystemExit, match="no finished run"):
        table("demo_long", tmp_path)


def test_a_seed_of_another_configuration_has_no_place_in_the_table(tmp_path: Path) -> None:
    now = (ROOT / "configs/experiment/demo.yaml").read_text()
    check_configuration("demo", tmp_path / "not run yet")
    (tmp_path / KEPT).write_text(now)
    check_configuration("demo", tmp_path)
    (tmp_path / KEPT).write_text(f"{now}\n# not quite the same\n")
    with pytest.raises(SystemExit, match=r"was made with another demo\.yaml"):
        check_configuration("demo", tmp_path)


def test_what_a_report_leaves_undefined_is_left_out_of_the_mean(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 0.8), (2, 0.6)):
        found = report(accuracy)
        if seed == 2:
            found["scores"]["alpha"]["overall"]["sad"] = None
            found["scores"]["alpha"]["overall"]["band_mae"] = 0.35
        folder = tmp_path / f"{seed}/outputs/demo"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(found))
    lines = table("demo", tmp_path).splitlines()
    assert "| SAD | 0.250 | nan | 0.250 | 0.000 |" in lines
    assert "| band MAE | 0.250 | 0.350 | 0.300 | 0.100 |" in lines


def test_the_table_is_not_written_when_any_run_in_it_had_another_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tools.demo_seeds as tool

    (tmp_path / "configs/experiment").mkdir(parents=True)
    (tmp_path / "configs/experiment/demo.yaml").write_text("now")
    for seed, text in ((1, "now"), (2, "before")):
        (tmp_path / f"outputs/seeds/demo/{seed}").mkdir(parents=True)
        (tmp_path / f"outputs/seeds/demo/{seed}" / KEPT).write_text(text)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"demo/2 was made with another demo\.yaml"):
        tool.main(["demo", "--seeds", "1"])
