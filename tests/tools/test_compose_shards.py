"""Composing shards from cut-outs: the equation, the split, the phrases and the repeat, on tiny generated cut-outs."""

from __future__ import annotations

import doctest
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data_modules.shards import ShardIndex
from lit_matting.checks import InputError
from tools.compose_shards import main
from tools.composing import cutouts as cutouts_module
from tools.composing import phrases as phrases_module
from tools.composing.cutouts import cut_sides, split_ids, true_colours
from tools.composing.layout import Layer, composite
from tools.composing.phrases import are_similar

Array = np.ndarray
SIZE = 96


def _disc(height: int, width: int, soft: float = 3.0) -> Array:
    y, x = np.mgrid[:height, :width]
    distance = np.hypot((x - width / 2 + 0.5) / (width / 2), (y - height / 2 + 0.5) / (height / 2))
    return np.clip((0.9 - distance) * min(height, width) / 2 / soft + 0.5, 0, 1)


def _save_cutout(path: Path, colour: tuple[float, float, float], alpha: Array) -> None:
    pixels = np.dstack([np.broadcast_to(np.array(colour)[::-1], (*alpha.shape, 3)), alpha])
    cv2.imwrite(str(path), np.rint(255 * pixels).astype(np.uint8))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    cutouts, backgrounds = folder / "cutouts", folder / "backgrounds"
    cutouts.mkdir()
    backgrounds.mkdir()
    names = ["koala", "trumpet", "strawberry", "cello", "red teddy bear", "brown teddy bear", "left boot", "umbrella"]
    names += ["A puff of smoke.", "bust of a king", "zebra", "lamp", "old teddy bear", "tan teddy bear"]
    rng = np.random.default_rng(0)
    entries = []
    for number, name in enumerate(names):
        alpha = _disc(40 + 3 * number, 50 - 2 * number)
        touches: list[str] = []
        if name == "bust of a king":
            alpha, touches = _disc(120, 50)[:60], ["bottom", "left"]
        if "smoke" in name:
            alpha = 0.6 * alpha
        _save_cutout(cutouts / f"c{number:02d}.png", tuple(rng.random(3)), alpha)
        entry = {"id": f"c{number:02d}", "file": f"c{number:02d}.png", "name": name, "touches": touches}
        entries.append({**entry, "licence_class": "permissive" if number % 2 else "copyleft"})
    (cutouts / "index.json").write_text(json.dumps(entries))
    for number in range(6):
        picture = cv2.resize(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), (140, 100))
        cv2.imwrite(str(backgrounds / f"meadow_{number}.png"), picture)
    (cutouts / ".DS_Store").write_bytes(b"junk")
    return cutouts, backgrounds


def _run(sources: tuple[Path, Path], output: Path, *more: str) -> dict[str, Any]:
    base = [
        str(sources[0]),
        str(sources[1]),
        str(output),
        "--size",
        str(SIZE),
        "--workers",
        "1",
        "--image-format",
        "png",
    ]
    assert main([*base, "--train-images", "24", "--val-images", "8", "--val-share", "0.4", *more]) == 0
    return json.loads((output / "manifest.json").read_text())


@pytest.fixture(scope="module")
def made(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("made") / "shards"
    return output, _run(sources, output, "--with-layers", "--quality", "100", "--similar-share", "0.5")


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha1(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _samples(folder: Path) -> list[tuple[Any, dict[str, Array]]]:
    result = []
    for split in ("train", "val"):
        for sample in ShardIndex.load(folder / f"{split}.index.json", verify=True):
            pictures = {
                name: cv2.imdecode(np.frombuffer(bytes(data), np.uint8), cv2.IMREAD_UNCHANGED)
                for name, data in sample.members.items()
                if name != "json"
            }
            result.append((sample, pictures))
    return result


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    short = ("--train-images", "6", "--val-images", "2")
    _run(sources, tmp_path / "one", *short)
    _run(sources, tmp_path / "two", *short, "--workers", "2")
    _run(sources, tmp_path / "other", *short, "--seed", "1")
    assert _digests(tmp_path / "one") == _digests(tmp_path / "two")
    assert _digests(tmp_path / "one")["train-000000.tar"] != _digests(tmp_path / "other")["train-000000.tar"]


def test_stored_layers_give_the_stored_image_by_the_matting_equation(made: tuple[Path, dict[str, Any]]) -> None:
    for sample, pictures in _samples(made[0]):
        alphas = np.stack([pictures[item.target] for item in sample.instances]) / 255.0
        colours = np.stack([pictures[f"{i}.foreground.png"] for i in range(len(alphas))]).astype(float)
        expected = (alphas[..., None] * colours).sum(0)
        expected += (1 - alphas.sum(0))[..., None] * pictures["background.jpg"]
        # the stored background went through JPEG, the one in the image did not
        off = np.abs(expected - pictures["png"])
        assert off[alphas.sum(0) == 1].max(initial=0) <= 0.51
        assert off.mean() < 1.0


def test_stored_alphas_never_sum_to_more_than_one(made: tuple[Path, dict[str, Any]]) -> None:
    for sample, pictures in _samples(made[0]):
        total = sum(pictures[item.target].astype(int) for item in sample.instances)
        assert total.max() <= 255


def _random_layers(rng: np.random.Generator, count: int, size: int) -> list[Layer]:
    soft = [cv2.GaussianBlur((rng.random((size, size)) > 0.5).astype(np.float32), (0, 0), 2) for _ in range(count)]
    alphas = [np.clip(3 * alpha - 1, 0, 1) for alpha in soft]
    return [Layer(rng.random((size, size, 3), np.float32), alpha, 1.0, False, (0, 0)) for alpha in alphas]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_composite_equals_painting_back_to_front(count: int) -> None:
    rng = np.random.default_rng(count)
    layers = _random_layers(rng, count, 40)
    background = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    order = [int(i) for i in rng.permutation(count)]
    result = composite(layers, order, background)
    painted = background.astype(float)
    for i in reversed(order):
        alpha = layers[i].alpha[..., None]
        painted = alpha * 255 * layers[i].foreground + (1 - alpha) * painted
    assert np.abs(result.image - painted).max() <= 0.5 + 0.5 + 0.5 * count  # one rounding each: image, colours, alphas
    stored = (result.alphas[..., None] / 255.0 * result.foregrounds).sum(0)
    stored += (1 - result.alphas.sum(0, dtype=int) / 255.0)[..., None] * background
    assert np.abs(result.image - stored).max() <= 0.5 + 1e-9


def test_visible_alpha_is_own_alpha_times_what_the_layers_in_front_let_through() -> None:
    layers = _random_layers(np.random.default_rng(5), 3, 32)
    result = composite(layers, [2, 0, 1], np.zeros((32, 32, 3), np.uint8))
    a0, a1, a2 = (layer.alpha.astype(float) for layer in layers)
    for stored, expected in zip(result.alphas, (a0 * (1 - a2), a1 * (1 - a2) * (1 - a0), a2)):
        assert np.abs(stored / 255.0 - expected).max() <= 1 / 255
    assert result.alphas.sum(0, dtype=int).max() <= 255
    assert result.occlusion[2, 0] == pytest.approx((a0 * a2).sum() / a0.sum(), abs=1e-6)
    assert result.occlusion[0, 2] == 0


def test_no_cutout_and_no_background_is_in_both_splits(made: tuple[Path, dict[str, Any]]) -> None:
    used: dict[str, set[str]] = {"train": set(), "val": set()}
    for record in made[1]["images"]:
        used[record["split"]] |= {item["cutout"] for item in record["instances"]}
        used[record["split"]].add("background " + record["background"]["background"])
    assert used["train"]
    assert used["val"]
    assert not used["train"] & used["val"]


def test_held_out_patterns_go_to_val_and_a_new_cutout_moves_no_other() -> None:
    ids = [f"a{i}" for i in range(20)] + ["fg_x1", "fg_x2"]
    split = split_ids(ids, 0.3, ["fg_*"], 7, "cut-out")
    assert {"fg_x1", "fg_x2"} <= set(split["val"])
    assert len(split["val"]) == 2 + 6
    assert sorted(split["train"] + split["val"]) == sorted(ids)
    more = split_ids([*ids, "new"], 0.3, ["fg_*"], 7, "cut-out")
    assert len(set(more["val"]) ^ set(split["val"])) <= 1
    with pytest.raises(InputError, match=r"--holdout 'typo_\*' matches no cut-out"):
        split_ids(ids, 0.3, ["typo_*"], 7, "cut-out")


def _holds(text: str, me: dict[str, Any], others: list[dict[str, Any]]) -> bool:
    """Whether the phrase is true of ``me`` and of no other, by the geometry in the manifest alone."""
    (x, y), margin = me["centre"], 0.1199
    xs, ys = [o["centre"][0] for o in others], [o["centre"][1] for o in others]
    absolute = {
        r"(on the left|on the left side of the picture|at the far left)$": all(x + margin <= v for v in xs),
        r"(on the right|on the right side of the picture|at the far right)$": all(x - margin >= v for v in xs),
        r"in the middle( of the picture)?$": len(xs) == 2 and min(xs) + margin <= x <= max(xs) - margin,
        r"(at the top|in the upper part of the picture)$": all(y + margin <= v for v in ys),
        r"(at the bottom|in the lower part of the picture)$": all(y - margin >= v for v in ys),
    }
    for pattern, is_true in absolute.items():
        if re.search(pattern, text):
            return is_true
    relation = re.match(
        r"the (?P<me>.+?) (?P<how>to the left of|left of|to the right of|right of|above|higher up than|below|lower down"
        r" than|in front of|partly hiding|behind|partly hidden by) the (?P<other>.+)$",
        text,
    )
    if relation:
        other = next(o for o in others if o["name"] == relation["other"])
        ox, oy = other["centre"]
        how = relation["how"]
        if "left" in how:
            return x + 0.1499 <= ox
        if "right" in how:
            return x - 0.1499 >= ox
        if how in ("above", "higher up than"):
            return y + 0.1499 <= oy
        if how in ("below", "lower down than"):
            return y - 0.1499 >= oy
        return (me["depth"] < other["depth"]) == (how in ("in front of", "partly hiding"))
    size = re.match(r"the (smaller|larger) (of the (?P<a>.+) and the (?P<b>.+)|(?P<noun>\w+))$", text)
    if size:
        if size["noun"]:
            rivals = [o for o in others if o["name"].split()[-1] == size["noun"]]
        else:
            rivals = [o for o in others if o["name"] in (size["a"], size["b"])]
        assert len(rivals) == 1
        return (me["area"] < rivals[0]["area"]) == (size[1] == "smaller")
    return text == f"the {me['name']}"


def test_every_phrase_is_true_of_its_instance_alone(made: tuple[Path, dict[str, Any]]) -> None:
    kinds = set()
    pairs = 0
    for record in made[1]["images"]:
        texts = [phrase["text"] for item in record["instances"] for phrase in item["phrases"]]
        assert len(set(texts)) == len(texts), f"{record['key']} uses one phrase for two instances"
        for item in record["instances"]:
            others = [other for other in record["instances"] if other is not item]
            assert item["phrases"]
            for phrase in item["phrases"]:
                kinds.add(phrase["kind"])
                assert _holds(phrase["text"], item, others), (record["key"], phrase["text"])
            if "teddy" in item["name"] and any("teddy" in other["name"] for other in others):
                pairs += 1
                assert all(phrase["kind"] != "basic" for phrase in item["phrases"])
    assert kinds == {"basic", "absolute", "relative"}
    assert pairs > 0, "no image tests two things of similar name"


def test_the_manifests_places_are_those_of_the_stored_alphas(made: tuple[Path, dict[str, Any]]) -> None:
    records = {record["key"]: record for record in made[1]["images"]}
    for sample, pictures in _samples(made[0]):
        for item, stated in zip(sample.instances, records[sample.key]["instances"]):
            alpha = pictures[item.target].astype(float)
            places = (np.arange(SIZE) + 0.5) / SIZE
            assert stated["centre"] == pytest.approx(
                [(alpha.sum(0) @ places) / alpha.sum(), (alpha.sum(1) @ places) / alpha.sum()], abs=1e-4
            )
            assert stated["visible"] >= 0.6
            assert (alpha > 25).mean() == pytest.approx(stated["area"], abs=1e-5)
            assert [phrase.text for phrase in item.phrases] == [phrase["text"] for phrase in stated["phrases"]]


def test_a_cutout_that_its_frame_cut_stands_on_the_images_border(made: tuple[Path, dict[str, Any]]) -> None:
    assert made[1]["cutouts"]["c09"]["cut_sides"] == ["bottom"]
    seen = 0
    for sample, pictures in _samples(made[0]):
        for item in sample.instances:
            if item.fields["cutout"] == "c09" and item.fields["depth"] == 0:
                seen += 1
                assert pictures[item.target][-1].max() == 255
            elif item.fields["cutout"] != "c09":
                assert max(pictures[item.target][0].max(), pictures[item.target][-1].max()) < 255
    assert seen > 0


def test_one_object_alone_fills_more_of_the_image_and_is_called_by_name_only(
    sources: tuple[Path, Path], made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    manifest = _run(sources, tmp_path / "out", "--objects", "1")
    assert all(len(record["instances"]) == 1 for record in manifest["images"])
    alone = [record["instances"][0] for record in manifest["images"]]
    assert {phrase["kind"] for item in alone for phrase in item["phrases"]} == {"basic"}
    assert all(item["visible"] > 0.98 for item in alone)  # nothing hides it; 8 bits round
    shared = [item for record in made[1]["images"] for item in record["instances"]]
    # the sides grow by 1.45, so the areas by about 2; the caps for large cut-outs take some of it back
    assert np.mean([item["area"] for item in alone]) > 1.5 * np.mean([item["area"] for item in shared])


def test_a_name_with_a_side_in_it_is_never_flipped(made: tuple[Path, dict[str, Any]]) -> None:
    items = [item for record in made[1]["images"] for item in record["instances"]]
    assert {item["flipped"] for item in items if item["cutout"] == "c06"} == {False}
    assert {item["flipped"] for item in items} == {False, True}


def test_border_that_is_only_touched_is_not_cut() -> None:
    disc = (_disc(60, 80, soft=0.5) > 0.5).astype(np.float32)[3:-3, 4:-4]
    assert cut_sides(disc, ("top", "bottom", "left", "right")) == ()
    assert cut_sides(disc[:35], ("top", "bottom")) == ("bottom",)
    assert cut_sides(disc[:, 30:], None) == ("left",)


@pytest.mark.parametrize("cleared", [True, False])
def test_old_background_is_taken_out_of_soft_pixels(cleared: bool) -> None:
    alpha = _disc(80, 80, soft=12.0).astype(np.float32)
    red, green = np.array([0.9, 0.1, 0.1]), np.array([0.1, 0.8, 0.2])
    mixed = (alpha[..., None] * red + (1 - alpha[..., None]) * green).astype(np.float32)
    if cleared:
        mixed[alpha == 0] = 0
    soft = (alpha > 0.15) & (alpha < 0.9)
    before = np.abs(mixed - red)[soft].mean()
    after = np.abs(true_colours(mixed, alpha) - red)[soft].mean()
    assert before > 0.2
    assert after < 0.05


def test_clean_colours_stay_as_they_are() -> None:
    alpha = _disc(64, 64, soft=8.0).astype(np.float32)
    clean = np.where(alpha[..., None] > 0, np.array([0.3, 0.6, 0.9]), 0).astype(np.float32)
    assert np.abs(true_colours(clean, alpha) - [0.3, 0.6, 0.9])[alpha > 0.05].max() < 0.02


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("frog", "frog", True),
        ("white fluffy toy bunny", "big eared rabbit", True),
        ("mountaingoat", "goat", True),
        ("avocado fruit", "kiwifruit", True),
        ("doll with messy orange hair", "Seville orange", False),
        ("white snowy owl", "white peahen", False),
        ("pair of cherries", "strawberry", False),
    ],
)
def test_similar_names_are_found(one: str, other: str, expected: bool) -> None:
    assert are_similar((one,), "", (other,), "") is expected
    assert are_similar((other,), "", (one,), "") is expected


def test_licence_filter_and_exclusion_leave_only_what_was_asked_for(sources: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "bg").mkdir()
    entries = []
    for path in sorted(sources[1].iterdir()):
        (tmp_path / "bg" / path.name).write_bytes(path.read_bytes())
        entries.append({"file": path.name, "name": "wall", "licence_class": "permissive"})
    (tmp_path / "bg" / "index.json").write_text(json.dumps(entries))
    few = ("--train-images", "3", "--val-images", "0", "--val-share", "0")
    options = ("--licences", "permissive", "--exclude", "c01", "--exclude-id-regex", "^c1[0-9]$")
    manifest = _run((sources[0], tmp_path / "bg"), tmp_path / "out", *few, *options)
    assert sorted(manifest["cutouts"]) == ["c03", "c05", "c07", "c09"]
    assert {entry["licence_class"] for entry in manifest["cutouts"].values()} == {"permissive"}


def test_folders_without_an_index_name_their_pictures_by_file(sources: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    for number, name in enumerate(("red_umbrella_02", "garden-gnome", "kettle1")):
        (tmp_path / "cut" / f"{name}.png").write_bytes((sources[0] / f"c{number:02d}.png").read_bytes())
    few = ("--train-images", "2", "--val-images", "0", "--val-share", "0")
    manifest = _run((tmp_path / "cut", sources[1]), tmp_path / "out", *few)
    assert {entry["names"][0] for entry in manifest["cutouts"].values()} == {"red umbrella", "garden gnome", "kettle"}


def test_mistakes_are_told_in_one_sentence_and_leave_nothing_behind(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cutouts, backgrounds = map(str, sources)
    out = tmp_path / "out"
    opaque = tmp_path / "opaque"
    opaque.mkdir()
    for name in ("cup", "hat", "key"):
        cv2.imwrite(str(opaque / f"{name}.png"), np.zeros((20, 20, 3), np.uint8))
    no_val = ["--val-images", "0", "--val-share", "0", "--workers", "1"]
    for arguments, message in (
        ([str(tmp_path / "none"), backgrounds, str(out)], "does not exist"),
        ([str(opaque), backgrounds, str(out), *no_val], "has no alpha channel"),
        ([cutouts, backgrounds, str(out), "--min-visible", "60"], "--min-visible is a share"),
        ([cutouts, backgrounds, str(out), "--holdout", "c0*", "c1*"], "train would have 0 cut-outs"),
        ([cutouts, backgrounds, str(opaque)], "is not empty"),
        ([cutouts, backgrounds, str(opaque), "--overwrite"], "has no manifest.json"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["opaque"]


def test_examples_in_the_docstrings_are_true() -> None:
    for module in (cutouts_module, phrases_module):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0


@pytest.mark.slow
def test_real_cutouts_compose_with_benchmark_photographs_held_out(shared_data: Path, tmp_path: Path) -> None:
    held = ["fg_am_*", "fg_p3m_*", "fg_rs_*"]
    base = [str(shared_data / "cutouts"), str(shared_data / "backgrounds"), str(tmp_path / "out"), "--size", "128"]
    counts = ["--train-images", "16", "--val-images", "16", "--exclude", "tux_[b-p]*", "fg_am_gt1*"]
    assert main([*base, *counts, "--holdout", *held, "--workers", "1"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for record in manifest["images"]:
        others = record["instances"]
        for item in others:
            assert record["split"] == "val" or not item["cutout"].startswith("fg_")
            assert item["phrases"]
        names = [name for item in others for name in manifest["cutouts"][item["cutout"]]["similar"]]
        for item in others:
            if item["cutout"] in names:
                assert all(phrase["kind"] != "basic" for phrase in item["phrases"])
    for sample, pictures in _samples(tmp_path / "out"):
        total = sum(pictures[item.target].astype(int) for item in sample.instances)
        assert total.max() <= 255
