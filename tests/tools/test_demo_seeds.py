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
    (tmp_path / KEPT).write_text(now.replace("max_steps: 2200", "max_steps: 100"))
    with pytest.raises(SystemExit, match=r"was made with another demo\.yaml"):
        check_configuration("demo", tmp_path)
