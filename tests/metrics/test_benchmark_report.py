"""The report of a test run: its files, its first line, its pictures."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from callbacks.benchmark_report import BenchmarkReport
from callbacks.sample_pictures import SamplePictures
from data_modules import BenchmarkSource, InterleavedDataModule
from data_modules.shards import InstanceEntry, ShardWriter
from lit_matting.checks import InputError
from lit_matting.metrics.protocol import FOLDER
from lit_matting.metrics.referring import ReferringScore
from lit_matting.metrics.report import figure, file_digest, kind_table, markdown_table, overview_table, to_json
from lit_matting.module import LitMatting

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

spec = importlib.util.spec_from_file_location("report_worker", HERE / "report_worker.py")
worker = importlib.util.module_from_spec(spec)
sys.modules["report_worker"] = worker
spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def report_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    worker.run(folder, images=20)
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


TOLD = {"origin": "squares/test", "image_size": 48, "interpolation": "area"}
"""What a loader says that follows the protocol of the squares."""


def squares_protocol(folder: Path, metric_size: int | str = 48, sha256: str | None = None) -> str:
    """Write a protocol that three images of squares can follow."""
    content = yaml.safe_load((FOLDER / "refmatte-test.yaml").read_text())
    content["name"] = "squares"
    content["split"] |= {"release": "Squares_Test", "images": 3, "instances": 6, "sha256": sha256}
    content["expressions"]["per_instance"] = 2
    content["input_size"], content["metric_size"] = 48, metric_size
    path = folder / "squares.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_the_report_holds_the_scores_and_how_they_were_made(report_folder) -> None:
    report = read(report_folder)
    card = report["scores"]["alpha"]
    assert card["overall"]["count"] == 80
    assert card["overall"]["found_rate"] == 0.75
    assert card["kinds"]["colour"]["found_rate"] == 1
    assert card["kinds"]["position"]["found_rate"] == 0.5
    assert card["kinds"]["position"]["swap_accuracy"] == 0
    assert card["baselines"]["all_zero"]["overall"]["found"]["sad"] is None
    assert card["overall"]["conn"] > 0
    assert "baselines" in report["scores"]["trimap"]
    assert report["counts"] == {"phrases": 80, "images": 20, "instances": 40, "datasets": ["squares"]}
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or report["versions"]["torch"]
    assert report["run"]["seconds"] > 0
    assert report["run"]["memory_bytes"][0]["resident"] > 2**20
    assert report["metric_sizes"] == [[48, 48]]


def test_every_sample_has_a_row(report_folder) -> None:
    with (report_folder / "per_sample.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 80
    assert {row["prompt"] for row in rows} == {"red | one", "left one", "grey one", "right one"}
    found = np.mean([int(row["found"]) for row in rows])
    assert found == read(report_folder)["scores"]["alpha"]["overall"]["found_rate"]
    sad = np.mean([float(row["sad"]) for row in rows])
    assert sad == pytest.approx(read(report_folder)["scores"]["alpha"]["overall"]["sad"], rel=1e-12)
    assert all(row["trimap.soft_iou"] == row["soft_iou"] for row in rows)


def test_the_text_starts_with_the_protocol_statement(report_folder) -> None:
    text = (report_folder / "report.md").read_text()
    assert text.splitlines()[0] == (
        "No protocol: 80 phrases for 40 instances of 20 images of squares, averaged over phrases."
    )
    assert "perfect matte of one, blindly" in text
    assert "colour: nothing at all" in text
    assert "samples.png" in text


def test_the_page_shows_sixteen_worst_and_sixteen_median_samples(report_folder) -> None:
    with Image.open(report_folder / "samples.png") as page:
        width, height = page.size
        array = np.asarray(page.convert("L"))
    assert width == 2 * (8 + 4 * 168)
    assert height == 40 + 16 * 198 + 8
    # the last row of both columns holds pictures, not paper
    assert array[-100:, : width // 2].min() < 128
    assert array[-100:, width // 2 :].min() < 128


def test_a_run_that_deviates_says_so_in_its_first_line(tmp_path) -> None:
    worker.run(tmp_path, images=3, protocol="refmatte-test", pictures=0)
    first = (tmp_path / "report.md").read_text().splitlines()[0]
    assert first.startswith("DEVIATES from protocol refmatte-test (")
    for words in ("3 of 2500 images", "6 of 6243 instances", "input size 48 instead of 512", "errors at 48 x 48"):
        assert words in first
    assert not (tmp_path / "samples.png").exists()
    assert read(tmp_path)["deviations"]


def test_a_run_that_follows_a_protocol_says_so(tmp_path) -> None:
    split = tmp_path / "labels.json"
    split.write_text("{}")
    path = squares_protocol(tmp_path, sha256=file_digest(split))
    worker.run(tmp_path / "a", images=3, protocol=path, split_file=str(split), told=TOLD)
    first = (tmp_path / "a" / "report.md").read_text().splitlines()[0]
    assert first.startswith("Follows protocol squares (")
    assert first.endswith("12 phrases for 6 instances of 3 images of squares/test.")
    worker.run(tmp_path / "b", images=3, protocol=path, told=TOLD)
    assert "split file not given" in (tmp_path / "b" / "report.md").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("told", "options", "words"),
    [
        ({"origin": "anything/test"}, {}, ["data set anything/test instead of Squares_Test"]),
        ({"interpolation": "nearest"}, {}, ["interpolation nearest instead of area"]),
        # the stand-in does not say how it shrinks for itself what comes at another size
        ({"image_size": 64}, {}, ["interpolation not known instead of area"]),
        ({}, {"boundary": False}, ["no gradient and connectivity errors"]),
        (None, {}, ["data set not known instead of Squares_Test", "interpolation not known instead of area"]),
    ],
)
def test_what_the_source_says_of_itself_is_held_against_the_protocol(tmp_path, told, options, words) -> None:
    told = None if told is None else {**TOLD, **told}
    worker.run(tmp_path, images=3, protocol=squares_protocol(tmp_path), told=told, pictures=0, **options)
    assert read(tmp_path)["deviations"] == words
    first = (tmp_path / "report.md").read_text().splitlines()[0]
    assert first.startswith(
        f"DEVIATES from protocol squares ({first.split('(')[1][:12]}): {'; '.join(words)}. It is 12"
    )
    assert f"images of {told['origin'] if told else 'squares'}." in first


def test_our_own_loaders_are_seen_in_a_run(tmp_path) -> None:
    """Truths of 64 pixels, resized to 48 or not, from shards that name another data set than the config does."""
    with ShardWriter(tmp_path / "shards", prefix="t", dataset="squares", split="test", tool="test 1") as writer:
        for image in range(3):
            alphas = (worker.instances_of(image, 64).numpy() * 255).astype(np.uint8)
            phrases = [("red one", "colour"), ("left one", "position")]
            entries = [InstanceEntry(str(k), alpha, "alpha", phrases) for k, alpha in enumerate(alphas)]
            writer.write(str(image), image=np.zeros((64, 64, 3), np.uint8), image_ext="png", instances=entries)
    path = squares_protocol(tmp_path)
    found = {}
    for size in ("input", None):
        source = BenchmarkSource(str(tmp_path / "shards"), image_size=size)
        data = InterleavedDataModule(image_size=48, train={}, test={"any_name": source})
        worker.trainer(tmp_path, protocol=path, pictures=0).test(worker.StandIn(), data, verbose=False)
        found[size] = read(tmp_path)
    assert found["input"]["deviations"] == []
    assert found["input"]["statement"].endswith(
        "3 images of squares/test. The split's file is not pinned by the protocol."
    )
    assert found[None]["deviations"] == [
        "errors at 64 x 64 instead of 48 x 48",
        "interpolation not known instead of area",
    ]


def test_errors_at_each_images_own_size_are_what_the_source_hands_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(worker.StandIn, "interpolation", LitMatting.interpolation, raising=False)
    path = squares_protocol(tmp_path, metric_size="native")
    for name, size, words in (
        ("native", None, []),
        ("resized", 48, ["errors at 48 x 48 instead of each image's own size"]),
    ):
        worker.run(tmp_path / name, images=3, protocol=path, told={**TOLD, "image_size": size}, pictures=0)
        assert read(tmp_path / name)["deviations"] == words


def test_the_checkpoint_is_hashed(tmp_path) -> None:
    module = worker.StandIn()
    path = tmp_path / "some.ckpt"
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}, path)
    worker.run(tmp_path / "report", images=2, checkpoint=str(path))
    run = read(tmp_path / "report")["run"]
    assert run["checkpoint"] == str(path)
    assert run["checkpoint_sha256"] == file_digest(path)


def test_headline_numbers_are_logged(tmp_path) -> None:
    trainer = worker.run(tmp_path, images=2)
    assert trainer.callback_metrics["metric/grounding_accuracy"] == 0.75
    assert trainer.callback_metrics["metric/found_rate"] == 0.75
    assert "metric/band_mae" in trainer.callback_metrics


def test_a_second_test_starts_from_nothing(tmp_path) -> None:
    module, data = worker.StandIn(), worker.Shares(2)
    trainer = worker.trainer(tmp_path)
    for _ in range(2):
        trainer.test(module, data, verbose=False)
    assert read(tmp_path)["counts"]["phrases"] == 8


@pytest.mark.slow
def test_two_processes_write_one_report_of_all_samples(tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "report_worker.py"), str(tmp_path / "two"), "20"]
    subprocess.run(command, env=environment, check=True, timeout=240, capture_output=True)
    worker.run(tmp_path / "one", images=20)
    assert (tmp_path / "two" / "per_sample.csv").read_text() == (tmp_path / "one" / "per_sample.csv").read_text()
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one["scores"] == two["scores"]
    assert len(two["run"]["memory_bytes"]) == 2
    assert Image.open(tmp_path / "two" / "samples.png").size == Image.open(tmp_path / "one" / "samples.png").size


def test_a_module_without_scores_is_told() -> None:
    with pytest.raises(InputError, match="test_scores"):
        BenchmarkReport().on_test_start(None, pl.LightningModule())


def test_unknown_protocols_and_split_files_are_named() -> None:
    with pytest.raises(InputError, match="refmatte-rw100"):
        BenchmarkReport(protocol="refmatte")
    with pytest.raises(InputError, match=r"no file 'nowhere\.json'"):
        BenchmarkReport(split_file="nowhere.json")


def offered(count: int, reserve: int, samples: int, seed: int = 0) -> SamplePictures:
    kept = SamplePictures(count, reserve, side=4, seed=seed)
    order = np.random.default_rng(1).permutation(samples)
    for value in order:
        kept.offer(float(value), str(value), torch.zeros(3, 8, 6), torch.zeros(8, 6), torch.zeros(8, 6))
    return kept


def test_the_worst_samples_are_kept_exactly_and_small() -> None:
    worst, _ = offered(5, 10, 300).share(0.0)
    assert sorted(picture.error for picture in worst) == [295, 296, 297, 298, 299]
    assert worst[0].image.shape == (4, 3, 3)
    assert worst[0].matte.shape == (4, 3)


def test_samples_near_the_median_are_found_in_a_fair_draw() -> None:
    kept = offered(16, 256, 5000)
    assert len(kept.chosen) == 256
    _, middle = kept.share(2500.0)
    assert max(abs(picture.error - 2500) for picture in middle) < 0.05 * 5000
    # every sample is as likely as any other: the mean of what is kept is the mean of all
    means = [np.mean([picture.error for picture in offered(0, 100, 1000, seed).chosen]) for seed in range(20)]
    assert np.mean(means) == pytest.approx(499.5, abs=4 * 289 / np.sqrt(2000))


def test_a_small_test_shows_the_exact_median() -> None:
    _, middle = offered(3, 256, 101).share(50.0)
    assert sorted(picture.error for picture in middle) == [49, 50, 51]


def test_tables_align_and_escape() -> None:
    table = markdown_table(["", "n"], [["a | b", "1"], ["c", "200"]])
    assert table.splitlines() == ["|        |   n |", "| ------ | --: |", "| a \\| b |   1 |", "| c      | 200 |"]
    assert figure(float("nan")) == "-"


def test_things_alone_in_their_images_are_found_or_missed_in_the_tables() -> None:
    """There is nothing to confuse them with, so grounding is undefined; three of four mattes are not empty."""
    score, truth = ReferringScore(), worker.instances_of(0)[:1]
    for image, factor in enumerate((1.0, 0.8, 0.5, 0.0)):
        score.update([truth[0] * factor], [truth], [0], [f"squares/{image}"], ["the square"], ["basic"])
    card = score.compute()
    for table in (overview_table({"alpha": card}), kind_table(card, "kinds", "kind")):
        lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
        row = dict(zip(lines[0], lines[2]))
        assert (row["found"], row["grounding"]) == ("0.750", "-")


def test_undefined_numbers_become_null() -> None:
    assert json.loads(to_json({"a": [float("nan"), float("inf"), 1.5]})) == {"a": [None, None, 1.5]}
