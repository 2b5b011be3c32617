"""The score card against small scenes worked out by hand."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from lit_matting.metrics import functional
from lit_matting.metrics.referring import ReferringScore, is_found, soft_iou
from lit_matting.metrics.score_card import score_card
from lit_matting.targets import scaled_kernel, trimap_from_alpha


def scene(side: int = 32) -> torch.Tensor:
    """Return a small and a large opaque square that do not touch, (2, side, side): 64 and 256 pixels."""
    instances = torch.zeros(2, side, side)
    instances[0, 2:10, 2:10] = 1
    instances[1, 12:28, 12:28] = 1
    return instances


def card_of(*samples: tuple[torch.Tensor, torch.Tensor, int, str, str], **options) -> dict:
    score = ReferringScore(**options)
    for matte, instances, instance, key, kind in samples:
        score.update([matte], [instances], [instance], [key], [f"thing {instance}"], [kind])
    return score.compute()


def test_soft_iou_of_worked_out_mattes() -> None:
    first = torch.tensor([[[1.0, 0.5, 0.0]], [[0.0, 0.0, 0.0]]])
    second = torch.tensor([[[0.5, 0.5, 0.5]], [[0.0, 0.0, 0.0]]])
    assert soft_iou(first, second).tolist() == [[0.5, 0.0], [0.0, 1.0]]


def test_a_faint_veil_over_a_large_neighbour_does_not_hide_a_good_matte_of_a_small_thing() -> None:
    """By the product sum(p a) the neighbour would win: 256 x 0.3 = 76.8 against 64."""
    instances = scene()
    matte = instances[0] + 0.3 * instances[1]
    assert (matte * instances[1]).sum() > (matte * instances[0]).sum()
    assert card_of((matte, instances, 0, "a", "colour"))["overall"]["found_rate"] == 1


def test_nothing_at_all_and_ties_are_not_found() -> None:
    instances = scene()
    twins = torch.stack([instances[0], instances[0]])
    for matte, truths in [(torch.zeros(32, 32), instances), (twins[0], twins)]:
        for instance in (0, 1):
            assert card_of((matte, truths, instance, "a", "colour"))["overall"]["found_rate"] == 0


def test_the_only_instance_of_an_image_is_found_above_a_tenth_of_overlap() -> None:
    alone = scene()[1:]
    overlaps = torch.tensor([[0.0], [0.1], [0.11]])
    assert is_found(overlaps, 0).tolist() == [False, False, True]
    table = card_of((alone[0], alone, 0, "a", "colour"))["overall"]
    assert table["found_rate"] == 1
    assert table["ambiguous"] == 0
    assert math.isnan(table["grounding_accuracy"])
    assert math.isnan(table["swap_accuracy"])


def test_the_table_of_two_phrases_one_found() -> None:
    instances = scene()
    card = card_of((instances[0], instances, 0, "a", "colour"), (0.5 * instances[0], instances, 1, "a", "shape"))
    table = card["overall"]
    assert (table["count"], table["ambiguous"], table["pairs"]) == (2, 2, 1)
    assert table["grounding_accuracy"] == 0.5
    assert table["strict_accuracy"] == 0.5
    assert table["swap_accuracy"] == 0
    assert table["soft_iou"] == 0.5
    assert table["sad"] == pytest.approx((256 + 32) / 1000 / 2)
    assert table["mae"] == pytest.approx((256 + 32) / 1024 / 2)
    assert table["mse"] == pytest.approx((256 + 16) / 1024 / 2)
    assert table["found"]["count"] == 1
    assert table["found"]["soft_iou"] == 1
    assert table["found"]["sad"] == 0
    assert table["missed"]["sad"] == pytest.approx(0.288)
    assert card["kinds"]["colour"]["grounding_accuracy"] == 1
    assert card["kinds"]["shape"]["grounding_accuracy"] == 0


def test_band_mae_is_the_error_over_the_unknown_band() -> None:
    instances = scene(64)
    matte = (instances[1] * 0.9 + 0.05).clamp(0, 1)
    band = trimap_from_alpha(instances[1:2, None], scaled_kernel(64))[0, 0] == 0.5
    expected = (matte - instances[1]).abs()[band].mean().item()
    assert card_of((matte, instances, 1, "a", "x"))["overall"]["band_mae"] == pytest.approx(expected, rel=1e-6)


def test_a_target_without_a_band_does_not_count_for_band_mae() -> None:
    full = torch.ones(1, 16, 16)
    instances = scene(32)
    matte = 0.5 * instances[0]
    alone = card_of((matte, instances, 0, "a", "x"))["overall"]["band_mae"]
    both = card_of((matte, instances, 0, "a", "x"), (full[0], full, 0, "b", "x"))["overall"]["band_mae"]
    assert both == alone > 0


def test_swap_pairs_are_phrases_for_different_instances_of_one_image() -> None:
    instances = scene()
    right, wrong = [instances[0], instances[1]], [instances[1], instances[0]]
    samples = [
        (right[0], instances, 0, "a", "colour"),
        (right[0], instances, 0, "a", "shape"),
        (right[1], instances, 1, "a", "colour"),
        (wrong[1], instances, 1, "a", "shape"),
        (right[0], instances, 0, "b", "colour"),
    ]
    card = card_of(*samples)
    # image a: 2 x 2 pairs, two of them with the right phrase for the second thing; image b has one phrase only
    assert card["overall"]["pairs"] == 4
    assert card["overall"]["swap_accuracy"] == 0.5
    assert card["kinds"]["colour"]["swap_accuracy"] == 1
    assert card["kinds"]["shape"]["swap_accuracy"] == 0


def test_strict_swap_needs_half_of_the_overlap_in_both() -> None:
    instances = scene()
    card = card_of((instances[0], instances, 0, "a", "x"), (0.4 * instances[1], instances, 1, "a", "x"))["overall"]
    assert card["swap_accuracy"] == 1
    assert card["strict_swap_accuracy"] == 0
    assert card["strict_accuracy"] == 0.5


def test_baselines_of_one_image_with_a_phrase_for_each_instance() -> None:
    """64 and 256 pixels: the union overlaps the small one by 64 / 320 and the large one by 256 / 320."""
    instances = scene()
    card = card_of((instances[0], instances, 0, "a", "x"), (instances[1], instances, 1, "a", "x"))["baselines"]
    nothing, everything, blind = (card[name]["overall"] for name in ("all_zero", "perfect_all", "perfect_random"))
    assert nothing["grounding_accuracy"] == nothing["strict_accuracy"] == nothing["soft_iou"] == 0
    assert nothing["sad"] == pytest.approx((64 + 256) / 2 / 1000)
    assert everything["grounding_accuracy"] == 0.5
    assert everything["strict_accuracy"] == 0.5
    assert everything["soft_iou"] == pytest.approx((0.2 + 0.8) / 2)
    assert everything["swap_accuracy"] == 0
    assert everything["found"]["soft_iou"] == pytest.approx(0.8)
    assert everything["missed"]["soft_iou"] == pytest.approx(0.2)
    assert blind["grounding_accuracy"] == 0.5
    assert blind["soft_iou"] == 0.5
    assert blind["swap_accuracy"] == 0.25
    assert blind["found"] == pytest.approx({"count": 1, "soft_iou": 1, "sad": 0, "mse": 0, "mae": 0, "band_mae": 0})
    assert blind["missed"]["sad"] == pytest.approx(0.32)


def test_the_blind_choice_equals_the_mean_over_all_choices() -> None:
    """Its numbers are those of the perfect mattes of each instance, one after the other, averaged."""
    torch.manual_seed(1)
    instances = torch.rand(3, 24, 24) * (torch.rand(3, 24, 24) < 0.3)
    blind = card_of((instances[0], instances, 0, "a", "x"), boundary=True)["baselines"]["perfect_random"]["overall"]
    each = [card_of((matte, instances, 0, "a", "x"), boundary=True)["overall"] for matte in instances]
    for name in ("found_rate", "strict_accuracy", "soft_iou", "sad", "mse", "mae", "band_mae", "grad", "conn"):
        assert blind[name] == pytest.approx(sum(table[name] for table in each) / 3, rel=1e-12)
    assert blind["found"]["sad"] == each[0]["sad"] == 0
    assert blind["missed"]["conn"] == pytest.approx((each[1]["conn"] + each[2]["conn"]) / 2, rel=1e-12)


def test_everything_at_once_composites_instead_of_adding() -> None:
    instances = torch.full((2, 8, 8), 0.5)
    instances[1, 4:] = 0
    card = card_of((instances[0], instances, 0, "a", "x"))["baselines"]["perfect_all"]["overall"]
    # 1 - 0.5 x 0.5 above, 0.5 below, against 0.5 everywhere
    assert card["sad"] == pytest.approx(32 * 0.25 / 1000)


def test_boundary_errors_are_those_of_the_functions() -> None:
    instances = scene()
    matte = (instances[0] * 0.8 + 0.1 * torch.rand(32, 32)).clamp(0, 1)
    table = card_of((matte, instances, 0, "a", "x"), boundary=True)["overall"]
    assert table["grad"] == functional.grad(matte, instances[0])
    assert table["conn"] == functional.conn(matte, instances[0])
    assert table["sad"] == pytest.approx(functional.sad(matte, instances[0]), rel=1e-6)
    assert table["mse"] == pytest.approx(functional.mse(matte, instances[0]), rel=1e-6)


def test_averaging_over_instances_first_weighs_an_instance_with_many_phrases_once() -> None:
    instances = scene()
    samples = [(instances[0], instances, 0, "a", "x")] * 3 + [(torch.zeros(32, 32), instances, 1, "a", "x")]
    assert card_of(*samples)["overall"]["found_rate"] == 0.75
    table = card_of(*samples, average="instance")["overall"]
    assert table["found_rate"] == 0.5
    assert table["sad"] == pytest.approx(0.128)


def test_categories_and_sizes_have_tables_of_their_own() -> None:
    instances = scene()
    score = ReferringScore()
    score.update([instances[0], instances[0]], [instances] * 2, [0, 1], ["a", "a"], ["p", "q"], ["x", "x"], ["cat", ""])
    card = score.compute()
    assert list(card["categories"]) == ["cat"]
    assert card["categories"]["cat"]["found_rate"] == 1
    # 64 of 1024 pixels are 6 %, 256 are 25 %
    assert card["sizes"]["medium"]["found_rate"] == 1
    assert card["sizes"]["large"]["found_rate"] == 0


def test_the_order_and_the_batching_of_samples_do_not_matter() -> None:
    instances = scene()
    samples = [(instances[index % 2], instances, index // 2 % 2, f"{index}", "x") for index in range(6)]
    expected = card_of(*samples)
    score = ReferringScore()
    mattes, truths, instance, keys, kinds = zip(*reversed(samples))
    score.update(mattes, truths, torch.tensor(instance), keys, [f"thing {index}" for index in instance], kinds)
    assert repr(score.compute()) == repr(expected)
    assert repr(pickle.loads(pickle.dumps(score)).compute()) == repr(expected)


def test_what_is_remembered_of_an_instance_is_not_mistaken_for_another() -> None:
    """The second image has the first one's key, but other things in it."""
    first, second = scene(), scene().flip(1)
    samples = [(first[0], first, 0, "a", "x"), (second[1] * 0.5, second, 0, "a", "y"), (first[0], first, 0, "a", "z")]
    together = ReferringScore(boundary=True)
    for matte, truths, instance, key, kind in samples:
        together.update([matte], [truths], [instance], [key], ["p"], [kind])
        (newest,) = together.newest()
        alone = ReferringScore(boundary=True)
        alone.update([matte], [truths], [instance], [key], ["p"], [kind])
        assert (newest.values == alone.newest()[0].values).all()


def test_an_empty_card_counts_nothing() -> None:
    card = ReferringScore().compute()
    assert card["overall"]["count"] == 0
    assert math.isnan(card["overall"]["found_rate"])
    assert score_card([])["kinds"] == {}


def test_half_precision_mattes_are_scored() -> None:
    instances = scene()
    table = card_of((instances[0].bfloat16(), instances, 0, "a", "x"))["overall"]
    assert table["soft_iou"] == 1


def test_unicode_phrases_survive_the_collection() -> None:
    score = ReferringScore()
    score.update([scene()[0]], [scene()], [0], ["k/ü"], ["der große Löwe 狮子"], ["x"], ["Löwe"])
    (sample,) = score.gather()
    assert (sample.key, sample.prompt, sample.category) == ("k/ü", "der große Löwe 狮子", "Löwe")
    assert sample.row()["found"] == 1


def test_wrong_input_names_the_image() -> None:
    score = ReferringScore()
    instances = scene()
    with pytest.raises(ValueError, match="instances of refmatte/3"):
        score.update([instances[0]], [instances[:, :8]], [0], ["refmatte/3"], ["p"], ["x"])
    with pytest.raises(ValueError, match="one of its 2 instances, got 2"):
        score.update([instances[0]], [instances], [2], ["refmatte/3"], ["p"], ["x"])
    with pytest.raises(ValueError, match="alpha of refmatte/3"):
        score.update([instances[0] * math.nan], [instances], [0], ["refmatte/3"], ["p"], ["x"])
    with pytest.raises(ValueError, match="one length"):
        score.update([instances[0]], [instances], [0], ["a", "b"], ["p"], ["x"])
    with pytest.raises(ValueError, match="'phrase' or 'instance'"):
        ReferringScore(average="image")
