"""Anybody's mattes in a folder, scored by the same functions; and two such reports compared."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from lit_matting.metrics import functional

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str):
    """Return a script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


evaluate_folder, compare_reports = tool("evaluate_folder"), tool("compare_reports")


def alphas(count: int = 3) -> dict[str, np.ndarray]:
    """Return soft ellipses of different sizes."""
    result = {}
    for index in range(count):
        alpha = np.zeros((40 + 4 * index, 60), np.uint8)
        cv2.ellipse(alpha, (30, 20), (8 + index % 9, 12), 0, 0, 360, 255, -1)
        result[f"photo{index}"] = cv2.GaussianBlur(alpha, (0, 0), 2)
    return result


def write(folder: Path, mattes: dict[str, np.ndarray], name: str = "{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for key, matte in mattes.items():
        assert cv2.imwrite(str(folder / name.format(key)), matte)
    return folder


def run(*arguments: object) -> int:
    return evaluate_folder.main([str(argument) for argument in arguments])


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "per_sample.csv").open(newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def test_the_rows_are_what_the_functions_say(tmp_path, capsys) -> None:
    truth = alphas()
    mattes = {key: cv2.GaussianBlur(alpha, (0, 0), 3) for key, alpha in truth.items()}
    trimaps = {key: np.where((alpha > 0) & (alpha < 255), 128, alpha).astype(np.uint8) for key, alpha in truth.items()}
    pred, alpha = write(tmp_path / "p", mattes), write(tmp_path / "a", truth, "{}_alpha.png")
    write(alpha, truth, "{}.jpg")
    trimap = write(alpha, trimaps, "{}_trimap.png")
    patterns = ["--alpha-pattern", "*_alpha.png", "--trimap-pattern", "*_trimap.png"]
    assert run("--pred", pred, "--alpha", alpha, "--trimap", trimap, *patterns, "--out", tmp_path / "r") == 0
    rows = rows_of(tmp_path / "r")
    assert set(rows) == set(truth)
    for key, row in rows.items():
        region = trimaps[key] == 128
        for name in ("sad", "mse", "mad", "grad", "conn"):
            error = getattr(functional, name)
            assert float(row[name]) == error(mattes[key], truth[key])
            assert float(row[f"unknown.{name}"]) == error(mattes[key], truth[key], region)
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["means"]["sad"] == pytest.approx(np.mean([float(row["sad"]) for row in rows.values()]))
    assert "unknown region" in capsys.readouterr().out
    assert (tmp_path / "r" / "report.md").read_text().startswith("3 mattes of ")


def test_16_bit_rgba_grey_and_three_channel_mattes_are_the_same_matte(tmp_path) -> None:
    (key, alpha), *_ = alphas(1).items()
    colour = np.random.default_rng(0).integers(0, 256, (*alpha.shape, 3)).astype(np.uint8)
    forms = {
        "grey": alpha,
        "three": np.dstack([alpha] * 3),
        "rgba": np.dstack([colour, alpha]),
        "sixteen": alpha.astype(np.uint16) * 257,
        "opaque": np.dstack([alpha, alpha, alpha, np.full_like(alpha, 255)]),
    }
    truth = write(tmp_path / "a", {key: alpha})
    for name, form in forms.items():
        pred = write(tmp_path / name, {key: form})
        assert run("--pred", pred, "--alpha", truth, "--out", tmp_path / "r" / name) == 0
        assert float(rows_of(tmp_path / "r" / name)[key]["sad"]) == pytest.approx(0, abs=1e-12)


def test_missing_mattes_fail_unless_allowed(tmp_path, capsys) -> None:
    truth = alphas()
    alpha = write(tmp_path / "a", truth)
    pred = write(tmp_path / "p", {"photo1": truth["photo1"], "other": truth["photo1"]})
    assert run("--pred", pred, "--alpha", alpha) == 2
    assert "2 of 3 truths have no matte" in capsys.readouterr().err
    assert run("--pred", pred, "--alpha", alpha, "--allow-missing", "--out", tmp_path / "r") == 0
    assert list(rows_of(tmp_path / "r")) == ["photo1"]
    assert capsys.readouterr().out.startswith("INCOMPLETE: 2 of 3 truths")


def test_missing_trimaps_fail_unless_allowed(tmp_path, capsys) -> None:
    truth = alphas()
    alpha, pred = write(tmp_path / "a", truth), write(tmp_path / "p", {key: 0 * truth[key] for key in truth})
    trimap = write(tmp_path / "t", {"photo1": np.full_like(truth["photo1"], 128), "other": truth["photo0"]})
    folders = ["--pred", pred, "--alpha", alpha, "--trimap", trimap]
    assert run(*folders) == 2
    assert "2 of 3 truths have no trimap" in capsys.readouterr().err
    assert run(*folders, "--allow-missing", "--out", tmp_path / "r") == 0
    assert capsys.readouterr().out.startswith("INCOMPLETE: 2 of 3 mattes are not in the means of the unknown region.")
    means = json.loads((tmp_path / "r" / "report.json").read_text())["means"]
    assert means["unknown.sad"] == functional.sad(0 * truth["photo1"], truth["photo1"])
    for allowed in ([], ["--allow-missing"]):
        assert run(*folders, "--trimap-pattern", "*_trimap.png", *allowed) == 2
        assert "no trimap in" in capsys.readouterr().err


def test_trimaps_with_another_unknown_value_are_refused(tmp_path, capsys) -> None:
    """With 127 for unknown the region would be empty, and every error in it 0."""
    truth = alphas(1)
    alpha = write(tmp_path / "a", truth)
    for value, status in ((127, 1), (128, 0), (255, 0)):
        trimap = write(tmp_path / "t", {"photo0": np.where(truth["photo0"] > 0, value, 0).astype(np.uint8)})
        assert run("--pred", alpha, "--alpha", alpha, "--trimap", trimap) == status
    assert capsys.readouterr().err.count("but no 128") == 1


def test_other_sizes_fail_unless_resized(tmp_path, capsys) -> None:
    truth = alphas()
    alpha = write(tmp_path / "a", truth)
    halved = {
        key: cv2.resize(matte, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for key, matte in truth.items()
    }
    pred = write(tmp_path / "p", halved)
    assert run("--pred", pred, "--alpha", alpha) == 1
    assert "30 x 20" in capsys.readouterr().err
    assert run("--pred", pred, "--alpha", alpha, "--resize", "--out", tmp_path / "r") == 0
    assert 0 < float(rows_of(tmp_path / "r")["photo0"]["sad"]) < functional.sad(truth["photo0"], 0 * truth["photo0"])


def test_unreadable_and_colour_files_are_named_and_the_rest_is_scored(tmp_path, capsys) -> None:
    truth = alphas()
    alpha = write(tmp_path / "a", truth)
    pred = write(tmp_path / "p", truth)
    (pred / "photo0.png").write_bytes(b"no picture")
    write(pred, {"photo1": np.dstack([truth["photo1"], truth["photo1"] // 2, truth["photo1"]])})
    assert run("--pred", pred, "--alpha", alpha, "--out", tmp_path / "r") == 1
    errors = capsys.readouterr().err
    assert "photo0.png cannot be read" in errors
    assert "photo1.png is a colour picture" in errors
    assert list(rows_of(tmp_path / "r")) == ["photo2"]
    assert (tmp_path / "r" / "report.md").read_text().startswith("INCOMPLETE")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pred", "p", "--alpha", "nowhere"], "no folder"),
        (["--pred", "p", "--alpha", "a", "--alpha-pattern", "*_*"], "exactly one"),
        (["--pred", "p", "--alpha", "a", "--alpha-pattern", "*.tif"], "no image that counts"),
        (["--pred", "p", "--alpha", "a", "--pred-pattern", "x*.png", "--allow-missing"], "has the name of a truth"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", alphas())
    write(tmp_path / "p", alphas())
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err


def test_two_files_of_one_name_are_refused(tmp_path, capsys) -> None:
    alpha = write(tmp_path / "a", alphas())
    write(alpha, alphas(), "{}.jpg")
    assert run("--pred", alpha, "--alpha", alpha) == 2
    assert "are both called 'photo0'" in capsys.readouterr().err


def test_degraded_copies_of_real_mattes_rank_by_their_damage(tmp_path, shared_data) -> None:
    """Truth itself, a little blur, much blur, a hard mask, nothing: every error must say so."""
    source = shared_data / "real_alpha"
    keys = [f"am_gt{index:02d}" for index in range(1, 5)]
    truth = {key: cv2.imread(str(source / f"{key}_alpha.png"), cv2.IMREAD_GRAYSCALE) for key in keys}
    copies = {
        "same": truth,
        "blur1": {key: cv2.GaussianBlur(alpha, (0, 0), 1) for key, alpha in truth.items()},
        "blur4": {key: cv2.GaussianBlur(alpha, (0, 0), 4) for key, alpha in truth.items()},
        "nothing": {key: np.zeros_like(alpha) for key, alpha in truth.items()},
    }
    means = {}
    for name, mattes in copies.items():
        pred = write(tmp_path / name, mattes)
        options = ["--alpha-pattern", "*_alpha.png", "--trimap-pattern", "*_trimap.png", "--allow-missing"]
        place = tmp_path / "reports" / name
        assert run("--pred", pred, "--alpha", source, "--trimap", source, *options, "--out", place) == 0
        means[name] = json.loads((place / "report.json").read_text())["means"]
    for error in ("sad", "mse", "mad", "grad", "conn"):
        values = [means[name][error] for name in copies]
        assert values[0] == 0
        assert values == sorted(values)
        assert len(set(values)) == 4
    for error in ("sad", "grad", "conn"):
        assert means["blur1"][f"unknown.{error}"] <= means["blur1"][error]


# --- two reports ---------------------------------------------------------------------------------------------------


def report(folder: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "per_sample.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def phrases(errors: np.ndarray, images: int) -> list[dict[str, object]]:
    return [
        {
            "key": f"image{number % images}",
            "instance": 0,
            "prompt": f"p{number}",
            "kind": ("a", "b")[number % 2],
            "sad": e,
        }
        for number, e in enumerate(errors)
    ]


def test_a_paired_difference_is_found_where_means_alone_would_not_tell(tmp_path, capsys) -> None:
    """Images differ a hundred times more than the two methods do."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 100, 200)
    first = report(tmp_path / "a", phrases(hard, 200))
    second = report(tmp_path / "b", phrases(hard - 0.5 + rng.normal(0, 1, 200), 200))
    out = tmp_path / "c.json"
    assert compare_reports.main([str(first), str(second), "--by", "kind", "--out", str(out)]) == 0
    result = json.loads(out.read_text())["results"]["all"]["sad"]
    assert result["difference"] == pytest.approx(-0.5, abs=0.2)
    assert result["low"] < result["difference"] < result["high"] < 0
    # the normal interval of the mean of the differences
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 / np.sqrt(200), rel=0.2)
    assert result["b_better"] > 0.6
    text = capsys.readouterr().out
    assert "*" in text
    assert "\na: 100 phrases of 100 images" in text


def test_phrases_of_one_image_count_as_one_draw(tmp_path) -> None:
    """Ten equal phrases per image tell no more than one."""
    rng = np.random.default_rng(1)
    per_image = rng.normal(0, 1, 50)
    widths = []
    for repeats in (1, 10):
        rows = phrases(np.tile(per_image, repeats), 50)
        zero = phrases(np.zeros(50 * repeats), 50)
        first = report(tmp_path / f"a{repeats}", zero)
        second = report(tmp_path / f"b{repeats}", rows)
        out = tmp_path / f"{repeats}.json"
        compare_reports.main([str(first), str(second), "--out", str(out)])
        result = json.loads(out.read_text())["results"]["all"]["sad"]
        widths.append(result["high"] - result["low"])
    assert widths[0] == pytest.approx(widths[1], rel=1e-9)


def test_a_report_equals_itself(tmp_path, capsys) -> None:
    folder = report(tmp_path / "a", phrases(np.arange(10.0), 5))
    assert compare_reports.main([str(folder), str(folder)]) == 0
    assert "0.000 .. 0.000 " in capsys.readouterr().out


def test_instances_are_averaged_first_where_the_protocol_says_so(tmp_path) -> None:
    rows = phrases(np.array([0.0, 0.0, 0.0, 9.0]), 4)
    for row in rows[:3]:
        row["key"] = "image0"
    first, second = report(tmp_path / "a", [{**row, "sad": 0.0} for row in rows]), report(tmp_path / "b", rows)
    (first / "report.json").write_text(json.dumps({"protocol": {"average": "instance", "sha256": "x"}}))
    out = tmp_path / "c.json"
    assert compare_reports.main([str(first), str(second), "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["average"] == "instance"
    assert content["results"]["all"]["sad"]["b"] == 4.5


def test_samples_of_one_report_only_are_left_out_and_told(tmp_path, capsys) -> None:
    rows = phrases(np.arange(10.0), 10)
    first, second = report(tmp_path / "a", rows), report(tmp_path / "b", rows[3:])
    assert compare_reports.main([str(first), str(second)]) == 0
    assert "3 samples only in A and 0 only in B" in capsys.readouterr().out
    other = report(tmp_path / "c", [{**row, "key": "else"} for row in rows])
    assert compare_reports.main([str(first), str(other)]) == 2
    assert "no sample in common" in capsys.readouterr().err


def test_no_report_is_one_sentence(tmp_path, capsys) -> None:
    assert compare_reports.main([str(tmp_path / "x"), str(tmp_path / "y")]) == 2
    assert "give a folder that holds a report" in capsys.readouterr().err
